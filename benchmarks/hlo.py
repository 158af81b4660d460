"""What the devices tell one another in a compiled program, counted from its text: bytes that each collective puts out on a device.

Of an all-gather that is the whole, of a reduce-scatter the share that stays. A loop counts as often as it may run; where nothing but
the data says how often, once. Of a conditional's branches the costliest counts.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>\(.*?\)|\S+) (?P<op>[\w\-]+)\("
)
ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
CHANNEL = re.compile(r"channel_id=(\d+)")
TRIPS = re.compile(r'"?known_trip_count"?:\{"n":"(\d+)"\}')
CONSTANT = re.compile(r"%?([\w.\-]+) = [su]32\[\]\S* constant\((\d+)\)")
COUNTER = re.compile(r"%?([\w.\-]+) = [su]32\[\]\S* get-tuple-element\(\S+\), index=(\d+)")
ADD = re.compile(r" add\(%?([\w.\-]+), %?([\w.\-]+)\)")
LOOP = re.compile(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)")
CALLED = re.compile(
    r"(?:calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
)
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclass
class Collectives:
    """Each by its channel: an asynchronous one, or one among the steps of another operation, stands in the text several times."""

    moved: dict[str, tuple[str, int]] = field(default_factory=dict)  # its kind and bytes
    open_loops: int = 0  # of which nothing but the data says how often they run

    def add(self, other: "Collectives", times: int = 1) -> None:
        self.moved |= {
            channel: (kind, times * size) for channel, (kind, size) in other.moved.items()
        }
        self.open_loops += other.open_loops

    @property
    def bytes(self) -> Counter:
        """By kind."""
        found = Counter()
        for kind, size in self.moved.values():
            found[kind] += size
        return found


def collectives(text: str) -> Collectives:
    """Those of a compiled program (`compiled.as_text()`), all that it calls included."""
    entry, computations = split(text)
    return count(entry, computations, {})


def split(text: str) -> tuple[str, dict[str, list[str]]]:
    """The name of the computation that a program begins with, and the lines of all of them."""
    entry, lines, computations = "", [], {}
    for line in text.splitlines():
        if found := COMPUTATION.match(line):
            lines = computations[found[2]] = []
            entry = found[2] if found[1] else entry
        else:
            lines.append(line)
    return entry, computations


def count(
    name: str, computations: Mapping[str, list[str]], known: dict[str, Collectives]
) -> Collectives:
    if name not in known:
        known[name] = total = Collectives()
        for line in computations.get(name, ()):
            if found := INSTRUCTION.match(line):
                total.add(*of_instruction(found, line, computations, known))
    return known[name]


def of_instruction(
    found: re.Match, line: str, computations: Mapping, known: dict
) -> tuple[Collectives, int]:
    """What an instruction and all that it calls move, and how often."""
    kind = found["op"].removesuffix("-done")
    if kind in KINDS:
        channel = CHANNEL.search(line)
        return Collectives(
            {channel[1] if channel else found["name"]: (kind, size(found["type"]))}
        ), 1
    called = [count(name, computations, known) for name in CALLED.findall(line)]
    called += [
        count(name.strip(" %"), computations, known)
        for names in BRANCHES.findall(line)
        for name in names.split(",")
    ]
    if found["op"] == "conditional":
        return max(called, key=lambda one: one.bytes.total()), 1
    total = Collectives()
    for one in called:
        total.add(one)
    if found["op"] != "while":
        return total, 1
    turns = trips(line, computations)
    total.open_loops += turns is None and bool(total.moved)
    return total, 1 if turns is None else turns


def trips(line: str, computations: Mapping[str, list[str]]) -> int | None:
    """How often a loop runs at most: what XLA knows, else the number that its condition compares a counter with, which begins at 0."""
    if known := TRIPS.search(line):
        return int(known[1])
    condition, body = ("\n".join(computations[name]) for name in LOOP.search(line).groups())
    limit = max((int(number) for _, number in CONSTANT.findall(condition)), default=None)
    return (
        None
        if limit is None
        else -(-limit // pace(body, {index for _, index in COUNTER.findall(condition)}))
    )


def pace(body: str, counters: set[str]) -> int:
    """What is added to a loop's counter in a turn: 1, or more where XLA has unrolled one of its own."""
    names = {name for name, index in COUNTER.findall(body) if index in counters}
    constants = dict(CONSTANT.findall(body))
    return max(
        (int(constants[by]) for what, by in ADD.findall(body) if what in names and by in constants),
        default=1,
    )


def size(kind: str) -> int:
    """Bytes of the arrays in a type, "(bf16[4,8]{1,0}, f32[])"."""
    return round(
        sum(
            math.prod(int(n) for n in dims.split(",") if n) * width(name)
            for name, dims in ARRAY.findall(kind)
        )
    )


def width(name: str) -> float:
    """Bytes of an element: its bits are in its name, but for a bool's."""
    bits = re.search(r"\d+", name)
    return int(bits[0]) / 8 if bits else 1
