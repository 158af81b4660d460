"""Kernels that a compiled GPU program launches, and the bytes that they move, from its HLO text.

Every scheduled instruction is a kernel that reads its operands and writes its result; those that
only name memory (NO_KERNEL) are none, and an asynchronous pair is one. Of an operand that a fusion
only slices, the slices are read; where a fusion updates an array in place, the update is written. A
loop runs as often as XLA knows, or else once, and of the branches of a conditional the one that
moves most runs, unless the caller chooses. The host waits for a number from the device at a
conditional, and at each iteration of a loop whose iterations XLA does not know. Bytes are those of
operands and results: what caches of the device save, and what a kernel reads twice, is not counted.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from benchmarks.hlo import ARRAY, BRANCHES, CALLED, INSTRUCTION, LOOP, TRIPS, size, split

NO_KERNEL = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "opt-barrier", "add-dependency", "domain",
}  # fmt: skip
SLICES = {"slice", "dynamic-slice", "gather"}
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # index of the operand that holds the update
CALLS = {"while", "conditional", "call", "async-start"}  # run other computations
OTHER = "other"  # the part of what has none
OP_NAME = re.compile(r'op_name="([^"]*)"')
WORKSPACE = re.compile(r", [su]8\[\d*\]\S*\)$")  # of a library's matmul or convolution


@dataclass(frozen=True)
class Traffic:
    """What a part of a program does."""

    kernels: int = 0
    bytes: int = 0  # read and written
    waits: int = 0  # how often the host waits for a number from the device

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(
            self.kernels + other.kernels, self.bytes + other.bytes, self.waits + other.waits
        )


Label = Callable[[str], str | None]  # an instruction's op_name -> its part; None: its caller's
# (op_name, number of branches) -> the branch that a conditional runs, None: the costliest; for a
# loop whose iterations XLA does not know, with 0 branches -> the iterations, None: 1.
Choice = Callable[[str, int], int | None]


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    type: str
    op: str
    operands: tuple[str, ...]
    line: str

    @classmethod
    def of(cls, line: str) -> "Instruction | None":
        """The instruction of a line of HLO text; None if it holds none."""
        match = INSTRUCTION.match(line)
        if match is None:
            return None
        depth, end = 1, match.end()
        while depth and end < len(line):
            depth += {"(": 1, ")": -1}.get(line[end], 0)
            end += 1
        operands = re.findall(r"%([\w.\-]+)", line[match.end() : end])
        return cls(match["name"], match["type"], match["op"], tuple(operands), line)

    @cached_property
    def op_name(self) -> str:
        """Where in the traced program the instruction comes from; "" if XLA does not say."""
        match = OP_NAME.search(self.line)
        return match[1] if match else ""

    @cached_property
    def called(self) -> list[str]:
        """The computations that it calls, a conditional's branches in their order."""
        branches = [
            name.strip(" %") for names in BRANCHES.findall(self.line) for name in names.split(",")
        ]
        return branches or CALLED.findall(self.line)


@dataclass(frozen=True)
class Computation:
    """Instructions by name, in the order of the text; the last one is the root."""

    instructions: dict[str, Instruction]

    @classmethod
    def of(cls, lines: Sequence[str]) -> "Computation":
        found = (Instruction.of(line) for line in lines)
        return cls({one.name: one for one in found if one is not None})

    @cached_property
    def root(self) -> Instruction:
        """The instruction whose value the computation returns."""
        marked = [one for one in self.instructions.values() if one.line.lstrip().startswith("ROOT")]
        return marked[0] if marked else list(self.instructions.values())[-1]

    @cached_property
    def results(self) -> list[Instruction]:
        """The instructions whose values are the parts of the root."""
        root = self.source(self.root.name)
        return [self.source(name) for name in root.operands] if root.op == "tuple" else [root]

    @cached_property
    def parameters(self) -> list[Instruction]:
        """In the order of their numbers."""
        found = [one for one in self.instructions.values() if one.op == "parameter"]
        return sorted(found, key=lambda one: int(one.line.split("parameter(")[1].split(")")[0]))

    def source(self, name: str) -> Instruction:
        """The instruction behind a name, through bitcasts."""
        one = self.instructions[name]
        return self.source(one.operands[0]) if one.op == "bitcast" else one


def count_of(kind: str) -> int:
    """The numbers of the arrays in a type, "(bf16[4,8]{1,0}, f32[])"."""
    shapes = (dims for _, dims in ARRAY.findall(kind))
    return sum(math.prod(int(n) for n in dims.split(",") if n) for dims in shapes)


@dataclass(frozen=True)
class Event:
    """An instruction that the program runs, and what all of its runs do together."""

    part: str
    instruction: Instruction
    traffic: Traffic


@dataclass(frozen=True)
class Program:
    """A compiled program; `label` and `choose` as in `events`."""

    computations: Mapping[str, Computation]
    label: Label
    choose: Choice

    def run(self, name: str, part: str, times: int = 1) -> Iterator[Event]:
        """What a computation does in so many runs; `part` is that of its caller.

        In a branch only a part within the caller's counts: XLA makes equal branches of two
        conditionals one, which then names the part of the first.
        """
        known = self.computations[name]
        home = self.home(name) if part == OTHER else None
        for one in known.instructions.values():
            own = self.part_of(one) or (part if one.op_name else home or part)
            if name in self.branches and part != OTHER and not own.startswith(f"{part}/"):
                own = part
            if one.op == "while":
                yield from self.loop(one, own, times)
            elif one.op == "conditional":
                yield from self.conditional(one, own, times)
            elif one.op in CALLS:
                yield from self.run(one.called[0], own, times)
            elif one.op not in NO_KERNEL and not one.op.endswith(("-done", "-update")):
                yield Event(own, one, Traffic(times, times * self.moved(known, one)))

    @cached_property
    def branches(self) -> set[str]:
        """The computations that run within a branch of a conditional."""
        found: set[str] = set()
        new = [
            name
            for known in self.computations.values()
            for one in known.instructions.values()
            if one.op == "conditional"
            for name in one.called
        ]
        while new:
            name = new.pop()
            if name not in found:
                found.add(name)
                inner = self.computations[name].instructions.values()
                new += [called for one in inner if one.op in CALLS for called in one.called]
        return found

    def part_of(self, one: Instruction) -> str | None:
        """The part of an instruction, by its own op_name or by one of its fusion's."""
        inner = []
        if one.op.startswith("fusion"):
            inner = list(self.computations[one.called[0]].instructions.values())
        labels = (self.label(each.op_name) for each in (one, *reversed(inner)))
        return next((label for label in labels if label), None)

    def home(self, name: str) -> str | None:
        """The part of what XLA has made in a computation, without saying where it comes from.

        It is the one that everything else belongs to; None if there are several.
        """
        parts = filter(None, map(self.part_of, self.computations[name].instructions.values()))
        outer = {part.partition("/")[0] for part in parts}
        return outer.pop() if len(outer) == 1 else None

    def loop(self, one: Instruction, part: str, times: int) -> Iterator[Event]:
        """All iterations of a loop."""
        trips, names = TRIPS.search(one.line), LOOP.search(one.line)
        assert names is not None
        if trips is None:
            chosen = self.choose(one.op_name, 0)
            iterations = 1 if chosen is None else chosen
            yield Event(part, one, Traffic(waits=times * max(iterations, 1)))
        else:
            iterations = int(trips[1])
        for name in names.groups():
            yield from self.run(name, part, times * iterations)

    def conditional(self, one: Instruction, part: str, times: int) -> Iterator[Event]:
        """The branch of a conditional that counts."""
        branches = [list(self.run(name, part, times)) for name in one.called]
        chosen = self.choose(one.op_name, len(branches))
        if chosen is None:
            sums = [sum(event.traffic.bytes for event in branch) for branch in branches]
            chosen = sums.index(max(sums))
        yield Event(part, one, Traffic(waits=times))
        yield from branches[chosen]

    def moved(self, known: Computation, one: Instruction) -> int:
        """Bytes that a kernel reads and writes."""
        operands = [size(known.instructions[name].type) for name in one.operands]
        if one.op.startswith("fusion"):
            inner = self.computations[one.called[0]]
            shares = zip(inner.parameters, self.shares(inner), strict=True)
            read = sum(share * size(one.type) for one, share in shares)
            return round(read) + self.written(inner, inner.root)
        if one.op in SLICES:
            return 2 * size(one.type)
        if one.op in UPDATES:
            return 2 * operands[UPDATES[one.op]]
        if one.op in ("copy", "copy-start"):
            return 2 * operands[0]
        return sum(operands) + size(WORKSPACE.sub(")", one.type))

    def shares(self, inner: Computation) -> list[float]:
        """Of each parameter of a fusion, the share of its numbers that the result needs.

        What is computed number by number from an array needs no more than is needed of itself.
        """
        needed = dict.fromkeys(inner.instructions, 0.0)
        needed[inner.root.name] = 1.0
        for user in reversed(inner.instructions.values()):
            for index, name in enumerate(user.operands):
                share = needed[user.name] * self.share(inner, user, index)
                needed[name] = min(needed[name] + share, 1.0)
        return [needed[one.name] for one in inner.parameters]

    def share(self, inner: Computation, user: Instruction, index: int) -> float:
        """The share of an operand's numbers that an instruction in a fusion needs."""
        if index == 0 and user.op in UPDATES and user in inner.results:
            return 0
        if user.op == "fusion":
            return self.shares(self.computations[user.called[0]])[index]
        result, operand = (
            count_of(one.type) for one in (user, inner.instructions[user.operands[index]])
        )
        return result / operand if index == 0 and user.op in SLICES and operand else 1

    def written(self, inner: Computation, root: Instruction) -> int:
        """Bytes of a fusion's result that its kernel writes."""
        root = inner.source(root.name)
        if root.op == "tuple":
            return sum(self.written(inner, inner.instructions[name]) for name in root.operands)
        if root.op in UPDATES:
            return size(inner.instructions[root.operands[UPDATES[root.op]]].type)
        if root.op == "fusion":
            nested = self.computations[root.called[0]]
            return self.written(nested, nested.root)
        return size(root.type)


def events(
    text: str, label: Label = lambda name: None, choose: Choice = lambda name, branches: None
) -> Iterator[Event]:
    """What a compiled program runs (`compiled.as_text()`), in the part "other" what has no part.

    label: the part of an instruction by its op_name, the path of named scopes that it was traced
    in; None if it names none, then its part is that of the loop or conditional around it. choose:
    what runs where data decide.
    """
    entry, lines = split(text)
    computations = {name: Computation.of(body) for name, body in lines.items()}
    return Program(computations, label, choose).run(entry, OTHER)


def by_part(found: Iterable[Event]) -> dict[str, Traffic]:
    """What each part does."""
    total: dict[str, Traffic] = {}
    for event in found:
        total[event.part] = total.get(event.part, Traffic()) + event.traffic
    return total


def largest(found: Iterable[Event], count: int) -> list[tuple[str, str, Traffic]]:
    """The instructions that move most: (part, what each gives and where it comes from, traffic).

    Instructions of the same part, result and op_name are one.
    """
    total: dict[tuple[str, str], Traffic] = {}
    for event in found:
        one = event.instruction
        layout_free = re.sub(r"\{[\d,]*\}", "", one.type)
        key = event.part, f"{layout_free} {re.sub(r'[.0-9]+$', '', one.name)} {one.op_name}"
        total[key] = total.get(key, Traffic()) + event.traffic
    ordered = sorted(total.items(), key=lambda item: -item[1].bytes)
    return [(*key, traffic) for key, traffic in ordered[:count]]
