"""The output bytes of a compiled program's collectives on one device, counted from its HLO text.

The output of an all-gather is the whole array, that of a reduce-scatter the share of the device. A
collective in a loop counts once for each iteration that may run; if only data determine their
number, it counts once. Of the branches of a conditional the one with the most bytes counts.
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
    """Collectives by channel id: async pairs and fused steps repeat an operation in the text."""

    by_channel: dict[str, tuple[str, int]] = field(default_factory=dict)  # kind, output bytes
    open_loops: int = 0  # loops with collectives whose number of iterations depends on data

    def add(self, other: "Collectives", times: int = 1) -> None:
        """Add the collectives of a part of the program that runs `times` times."""
        self.by_channel |= {
            channel: (kind, times * size) for channel, (kind, size) in other.by_channel.items()
        }
        self.open_loops += other.open_loops

    @property
    def bytes(self) -> Counter:
        """Output bytes on one device, by kind of collective."""
        totals = Counter()
        for kind, size in self.by_channel.values():
            totals[kind] += size
        return totals


def collectives(text: str) -> Collectives:
    """The collectives of a compiled program (`compiled.as_text()`) and of all that it calls."""
    entry, computations = split(text)
    return count(entry, computations, {})


def split(text: str) -> tuple[str, dict[str, list[str]]]:
    """The name of the entry computation, and the lines of every computation by its name."""
    entry, lines, computations = "", [], {}
    for line in text.splitlines():
        if header := COMPUTATION.match(line):
            lines = computations[header[2]] = []
            entry = header[2] if header[1] else entry
        else:
            lines.append(line)
    return entry, computations


def count(
    name: str, computations: Mapping[str, list[str]], known: dict[str, Collectives]
) -> Collectives:
    """The collectives of a computation and of all that it calls. known: results so far, by name."""
    if name not in known:
        known[name] = total = Collectives()
        for line in computations.get(name, ()):
            if instruction := INSTRUCTION.match(line):
                total.add(*of_instruction(instruction, line, computations, known))
    return known[name]


def of_instruction(
    instruction: re.Match, line: str, computations: Mapping, known: dict
) -> tuple[Collectives, int]:
    """The collectives of an instruction and of all that it calls, and how often they run."""
    kind = instruction["op"].removesuffix("-done")
    if kind in KINDS:
        channel = CHANNEL.search(line)
        return Collectives(
            {channel[1] if channel else instruction["name"]: (kind, size(instruction["type"]))}
        ), 1
    called = [count(name, computations, known) for name in CALLED.findall(line)]
    called += [
        count(name.strip(" %"), computations, known)
        for names in BRANCHES.findall(line)
        for name in names.split(",")
    ]
    if instruction["op"] == "conditional":
        return max(called, key=lambda one: one.bytes.total()), 1
    total = Collectives()
    for one in called:
        total.add(one)
    if instruction["op"] != "while":
        return total, 1
    iterations = trips(line, computations)
    total.open_loops += iterations is None and bool(total.by_channel)
    return total, 1 if iterations is None else iterations


def trips(line: str, computations: Mapping[str, list[str]]) -> int | None:
    """The largest number of iterations of a loop; None if it depends on data.

    If XLA does not state it, it follows from the limit that the condition compares a counter with,
    which starts at 0.
    """
    if known := TRIPS.search(line):
        return int(known[1])
    loop = LOOP.search(line)
    if loop is None:
        return None
    condition, body = ("\n".join(computations[name]) for name in loop.groups())
    limit = max((int(number) for _, number in CONSTANT.findall(condition)), default=None)
    if limit is None:
        return None
    return -(-limit // increment(body, {index for _, index in COUNTER.findall(condition)}))


def increment(body: str, counters: set[str]) -> int:
    """The increment of a loop's counter: 1, or more if XLA has partly unrolled the loop."""
    names = {name for name, index in COUNTER.findall(body) if index in counters}
    constants = dict(CONSTANT.findall(body))
    return max(
        (int(constants[b]) for a, b in ADD.findall(body) if a in names and b in constants),
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
    """Bytes of an element of a dtype: its name holds the number of bits, except for pred (bool)."""
    bits = re.search(r"\d+", name)
    return int(bits[0]) / 8 if bits else 1
