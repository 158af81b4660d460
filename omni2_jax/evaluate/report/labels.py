"""What a report calls the systems that were measured, so that each name stands for one of them."""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from omni2_jax.evaluate.results import Results

# Of a system's description: how it was measured, and not what it is.
MEASURING = ("timed", "speech", "device", "mesh")
SHORT = 8  # characters of a checksum


def told_apart(results: Sequence[Results]) -> list[Results]:
    """The results, with other labels where one label names several systems.

    Such a label gets what differs, as "final (checksum 831b802b)". One system that measured the
    same twice gets a number, as "final (2)".
    """
    systems: dict[str, list[list[Results]]] = {}
    for found in results:
        known = systems.setdefault(found.label, [])
        system = next((one for one in known if belongs(found, one)), None)
        if system is None:
            known.append([found])
        else:
            system.append(found)
    taken = {label for label, known in systems.items() if len(known) == 1}
    labels: dict[int, str] = {}
    for label, known in systems.items():
        names = [label] if len(known) == 1 else distinct(label, known, taken)
        for name, system in zip(names, known, strict=True):
            labels |= {id(found): name for found in system}
    return [dataclasses.replace(found, label=labels[id(found)]) for found in results]


def belongs(found: Results, system: Sequence[Results]) -> bool:
    """Whether results are of the same system, and measure nothing that it has already."""
    measured = set().union(*map(measurements, system))
    return identity(found) == identity(system[0]) and not measurements(found) & measured


def measurements(found: Results) -> set[tuple[str, str, str]]:
    """What was measured: the rows of the paper, the data set, and the tasks."""
    return {(row, found.dataset, task) for row in found.rows or [""] for task in found.tasks}


def identity(found: Results) -> dict[str, Any]:
    """What must be equal in all results of one system.

    Where the user has chosen the label, the checkpoint: it may have been measured with several
    settings, or in several folders of answers. Where the label is the name that a system has by
    default, its whole description.
    """
    is_chosen = any(word.partition("=")[0] == "--label" for word in found.command)
    if found.label == found.system.get("name") and not is_chosen:
        return description(found)
    return {"checksum": found.system.get("checksum")}


def description(found: Results) -> dict[str, Any]:
    """What a system is, by the names of settings."""
    return flat({name: value for name, value in found.system.items() if name not in MEASURING})


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """All settings in one mapping, also those that lie within others."""
    flattened: dict[str, Any] = {}
    for name, value in settings.items():
        flattened |= flat(value) if isinstance(value, Mapping) else {name: value}
    return flattened


def distinct(label: str, systems: Sequence[Sequence[Results]], taken: set[str]) -> list[str]:
    """Labels for the systems of one label, which are added to those that are taken."""
    descriptions = [description(system[0]) for system in systems]
    names = list(dict.fromkeys(name for one in descriptions for name in one))
    texts = {name: [said(name, one.get(name)) for one in descriptions] for name in names}
    telling = max(texts.values(), key=lambda column: len(set(column)), default=[])
    found = []
    for number in range(len(systems)):
        base = f"{label} ({telling[number]})" if len(set(telling)) > 1 else label
        numbered = (f"{base} ({count})" for count in itertools.count(2))
        found.append(unused(itertools.chain([base], numbered), taken))
    return found


def unused(names: Iterable[str], taken: set[str]) -> str:
    """The first of the names that is not taken, which it is from now on."""
    name = next(name for name in names if name not in taken)
    taken.add(name)
    return name


def said(name: str, value: Any) -> str:
    """A setting in a label: "temperature 1.0"; a name as it is, a checksum shortened."""
    if name == "name":
        return str(value)
    return f"{name} {str(value)[:SHORT] if 'sha256' in name or name == 'checksum' else value}"
