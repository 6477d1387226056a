"""A compiled program's text (HLO), read: computations of instructions, each with its results,
operands and layout.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "token": 0}
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = ")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%([\w.\-]+)"
)


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array of a result.

    Attributes:
      kind: element type.
      order: axes from the fastest to the slowest.
      tile: the fastest axes are padded to multiples of it, its last entry being that of the fastest
        one.
      on_chip: it does not lie in main memory.
    """

    kind: str
    dims: tuple[int, ...]
    order: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    on_chip: bool = False

    @property
    def bytes(self) -> int:
        """With the padding of its tiles."""
        digits = re.search(r"\d+", self.kind)
        bits = _BITS[self.kind] if self.kind in _BITS else int(digits.group(0)) if digits else 32
        dims = list(self.dims)
        for axis, multiple in zip(self.order, reversed(self.tile), strict=False):
            dims[axis] += -dims[axis] % multiple
        return math.prod(dims) * bits // 8

    @property
    def memory(self) -> int:
        """Bytes in main memory."""
        return 0 if self.on_chip else self.bytes


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    kind: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    called: tuple[str, ...]
    text: str
    root: bool

    @property
    def source(self) -> str:
        """Where in the program it comes from, as JAX names it."""
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found.group(1) if found else ""


Computation = dict[str, Instruction]


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """All computations of a program, and the name of the one it begins with."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            current = computations.setdefault(head.group(1), {})
            entry = head.group(1) if line.startswith("ENTRY") else entry
        elif current is not None and (start := _INSTRUCTION.match(line)):
            instruction = _instruction(line, start)
            current[instruction.name] = instruction
    return computations, entry


def _instruction(line: str, start: re.Match[str]) -> Instruction:
    rest = line[start.end() :]
    shape, rest = _balanced(rest) if rest.startswith("(") else rest.split(" ", 1)
    kind, _, rest = rest.lstrip().partition("(")
    inside, rest = _balanced("(" + rest)
    branches = re.search(r"branch_computations=\{([^}]*)\}", rest)
    called = _CALLED.findall(rest) + (_NAME.findall(branches.group(1)) if branches else [])
    return Instruction(
        name=start.group(2),
        kind=kind,
        shapes=tuple(_shapes(shape)),
        operands=tuple(_NAME.findall(inside)),
        called=tuple(called),
        text=inside + rest,
        root=bool(start.group(1)),
    )


def _balanced(text: str) -> tuple[str, str]:
    """What stands between the parenthesis that the text begins with and its partner, and what
    follows.
    """
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[: at + 1], text[at + 1 :]
    raise ValueError(f"unbalanced: {text[:80]}")


def _shapes(text: str) -> Iterator[Shape]:
    for kind, dims, layout in _ARRAY.findall(text):
        order, _, placing = layout.partition(":")
        tile = re.search(r"T\(([\d,]+)\)", placing)
        yield Shape(
            kind,
            tuple(int(n) for n in dims.split(",") if n),
            tuple(int(n) for n in order.split(",") if n),
            tuple(int(n) for n in tile.group(1).split(",")) if tile and dims else (),
            bool(re.search(r"S\(\d+\)", placing)),
        )


def first_group(text: str) -> tuple[int, ...]:
    """The first of a collective's groups of devices, in any of the three ways in which HLO writes
    them.
    """
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", text):
        return tuple(int(n) for n in listed.group(1).split(","))
    if axes := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes.group(1))}
        group, step = [0], 1
        for name, size in reversed(sizes.items()):
            if name in axes.group(2):
                group = [at * step + place for at in range(size) for place in group]
            step *= size
        return tuple(sorted(group))
    if tiled := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        _, members, dims, order = tiled.groups()
        shape = [int(n) for n in dims.split(",")]
        axes_order = [int(n) for n in order.split(",")] if order else list(range(len(shape)))
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        places = [0]
        for axis in axes_order:
            places = [place + at * strides[axis] for place in places for at in range(shape[axis])]
        return tuple(places[: int(members)])
    return ()
