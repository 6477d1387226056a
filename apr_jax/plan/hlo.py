"""Reads the text of a compiled program (HLO) as computations of instructions.

Each instruction has its operands, and its results with their layout.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "token": 0}
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = ")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
# A name, or an element of a tuple: `%while.1#3`.
_NAME = re.compile(r"%([\w.\-]+(?:#\d+)?)")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%([\w.\-]+)"
)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Shape and layout of one array of a result.

    Attributes:
      kind: element type.
      dims: sizes of the axes.
      order: axes from the fastest to the slowest.
      tile: multiples to which the fastest axes are padded; the last entry is for the fastest axis.
      on_chip: whether the array lies in on-chip memory instead of main memory.
    """

    kind: str
    dims: tuple[int, ...]
    order: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    on_chip: bool = False

    @property
    def bytes(self) -> int:
        """Bytes of the array with the padding of its tiles."""
        dims = list(self.dims)
        for axis, multiple in zip(self.order, reversed(self.tile), strict=False):
            dims[axis] += -dims[axis] % multiple
        return math.prod(dims) * self._bits // 8

    @property
    def _bits(self) -> int:
        """Bits of an element; types such as bf16 and f8e4m3 have the number in their name."""
        if self.kind in _BITS:
            return _BITS[self.kind]
        digits = re.search(r"\d+", self.kind)
        return int(digits.group(0)) if digits else 32

    @property
    def memory(self) -> int:
        """Bytes of the array in main memory."""
        return 0 if self.on_chip else self.bytes


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a computation.

    Attributes:
      name: its name within the computation.
      kind: its operation, for example "fusion".
      shapes: its results.
      operands: names of the instructions whose results it takes.
      called: names of the computations that it runs.
      text: everything after the operation, operands included.
      root: whether its result is that of the computation.
    """

    name: str
    kind: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    called: tuple[str, ...]
    text: str
    root: bool

    @property
    def source(self) -> str:
        """The JAX operation that it comes from, with its scopes; "" if it has none."""
        match = re.search(r'op_name="([^"]*)"', self.text)
        return match.group(1) if match else ""


Computation = dict[str, Instruction]


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Reads a program.

    Returns:
      its computations by name, and the name of the computation with which the program begins.
    """
    computations: dict[str, Computation] = {}
    entry = ""
    current = None
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            current = computations.setdefault(head.group(1), {})
            entry = head.group(1) if line.startswith("ENTRY") else entry
        elif current is not None and (start := _INSTRUCTION.match(line)):
            instruction = _instruction(line, start)
            current[instruction.name] = instruction

    for computation in computations.values():
        _add_elements(computation)
    return computations, entry


def _add_elements(computation: Computation) -> None:
    """Adds an instruction for each element of a tuple that an operand names, such as `%while.1#3`.

    XLA of JAX 0.12 writes such names where it wrote `get-tuple-element` instructions before.
    """
    for instruction in list(computation.values()):
        for operand in instruction.operands:
            name, _, index = operand.partition("#")
            if not index or name not in computation or operand in computation:
                continue
            element = computation[name].shapes[int(index) : int(index) + 1]
            text = f"(%{name}), index={index}"
            computation[operand] = Instruction(
                operand, "get-tuple-element", element, (name,), (), text, root=False
            )


def _instruction(line: str, start: re.Match[str]) -> Instruction:
    """Reads an instruction's line, whose `start` names it."""
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
    """Splits a text that begins with a parenthesis after the partner of that parenthesis."""
    depth = 0
    for index, letter in enumerate(text):
        if letter == "(":
            depth += 1
        elif letter == ")":
            depth -= 1
        if depth == 0:
            return text[: index + 1], text[index + 1 :]
    raise ValueError(f"unbalanced: {text[:80]}")


def _shapes(text: str) -> Iterator[Shape]:
    """Reads arrays such as `f32[8,64]{1,0:T(8,128)S(1)}`: type, sizes, order, tile and memory."""
    for kind, dims, layout in _ARRAY.findall(text):
        order, _, placement = layout.partition(":")
        tile = re.search(r"T\(([\d,]+)\)", placement)
        yield Shape(
            kind,
            dims=_numbers(dims),
            order=_numbers(order),
            tile=_numbers(tile.group(1)) if tile and dims else (),
            on_chip=bool(re.search(r"S\(\d+\)", placement)),
        )


def _numbers(text: str) -> tuple[int, ...]:
    """Reads numbers that are separated by commas."""
    return tuple(int(number) for number in text.split(",") if number)


def first_group(text: str) -> tuple[int, ...]:
    """Reads the first group of devices of a collective; () if it has none.

    HLO writes groups in three ways: as a list, by axes of a mesh, and by the order of an array.
    """
    # {{0,1},{2,3}}: the groups themselves.
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", text)
    if listed:
        return _numbers(listed.group(1))

    # mesh['x'=4,'y'=8] {'y'}: devices that differ only in the named axes of a mesh.
    axes = re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", text)
    if axes:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes.group(1))}
        group = [0]
        stride = 1
        for name, size in reversed(sizes.items()):
            if name in axes.group(2):
                group = [index * stride + device for index in range(size) for device in group]
            stride *= size
        return tuple(sorted(group))

    # [4,8]<=[8,4]T(1,0): 4 groups of 8, in the order of a transposed array of all devices.
    tiled = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if tiled:
        _, members, dims, order = tiled.groups()
        shape = _numbers(dims)
        axis_order = _numbers(order) if order else range(len(shape))
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        devices = [0]
        for axis in axis_order:
            devices = [
                device + index * strides[axis] for device in devices for index in range(shape[axis])
            ]
        return tuple(devices[: int(members)])
    return ()
