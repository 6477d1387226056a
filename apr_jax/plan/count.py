"""What a compiled program does: products, bytes of main memory, collectives, loop by loop.

XLA's own cost analysis counts a loop's body once and a Pallas kernel as nothing. Here
  1. `hlo.parse` reads computations and their instructions;
  2. `Counter.of` walks one, into fusions, branches and loops; a loop counts as often as its
     condition says, or as `turns(name of the loop)` does where only the data knows;
  3. bytes are those that an instruction reads from and writes to main memory: operands and results
     that the compiler placed in on-chip memory (`S(n)` in a layout) cost none, of what is sliced
     only the slice counts, and of what is written in place only what is new. What a kernel writes
     in place is left to `kernels.py`.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterator

from apr_jax.plan.hlo import Computation, Instruction, first_group

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Instructions that move nothing themselves; what "-start" began, its "-done" is not counted again.
_FREE = re.compile(
    r"parameter|constant|tuple|get-tuple-element|bitcast|after-all|partition-id|replica-id|iota|add-dependency|opt-barrier|"
    r"send|recv|async-update|.*-done"
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective as it stands in the program.

    Attributes:
      bytes: of the whole result (all-gather), or of what each device puts in.
      group: places in the mesh of the devices that talk to each other; the first such group.
      source: where it comes from.
    """

    kind: str
    bytes: int
    group: tuple[int, ...]
    source: str


@dataclasses.dataclass
class Count:
    """Sums over a program; those of one device.

    Attributes:
      flops: of matrix products, without those of Pallas kernels.
      bytes: read from and written to main memory.
      kernels: name of a Pallas kernel -> how often it runs.
      collectives: collective -> how often it runs.
    """

    flops: float = 0.0
    bytes: float = 0.0
    kernels: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    collectives: collections.Counter[Collective] = dataclasses.field(
        default_factory=collections.Counter
    )

    def add(self, other: "Count", times: float = 1) -> None:
        self.flops += times * other.flops
        self.bytes += times * other.bytes
        for mine, its in ((self.kernels, other.kernels), (self.collectives, other.collectives)):
            for key, count in its.items():
                mine[key] += count * times  # type: ignore[index, assignment]  # Expected counts need not be whole.


@dataclasses.dataclass(frozen=True)
class _Window:
    """How a convolution, as which TPUs see every product, moves over its input: fields by spatial
    axis.
    """

    fields: dict[str, list[str]]

    @classmethod
    def of(cls, text: str) -> "_Window":
        found = re.search(r"window=\{([^}]*)\}", text)
        pairs = (part.split("=") for part in found.group(1).split()) if found else ()
        return cls({name: values.split("x") for name, values in pairs})

    def places(self, axis: int, left: int, right: int, out: int) -> int:
        """Pairs of a place of the result and one of the kernel that meet an input: a batch is an
        axis on which few do.
        """

        def field(name: str, default: str) -> str:
            return self.fields[name][axis] if name in self.fields else default

        stride, dilation, step = (
            int(field(name, "1")) for name in ("stride", "rhs_dilate", "lhs_dilate")
        )
        low = int(field("pad", "0_0").split("_")[0])
        met = (o * stride + k * dilation - low for o in range(out) for k in range(right))
        return sum(1 for at in met if 0 <= at <= (left - 1) * step and at % step == 0)


@dataclasses.dataclass(frozen=True)
class Counter:
    """Counts the work of a program.

    Attributes:
      turns: source of a loop whose number of turns the program does not say -> that number.
    """

    computations: dict[str, Computation]
    turns: Callable[[str], float] = lambda source: 1.0

    def of(self, name: str) -> Count:
        """All that running a computation once does."""
        total, seen = Count(), set[str]()
        computation = self.computations[name]
        for instruction in computation.values():
            self._add(total, instruction, computation, seen)
        return total

    def loops(self, name: str) -> Iterator[tuple[str, Count]]:
        """Source of each loop that a computation holds, at any depth, and the work of one turn."""
        for instruction in self.computations[name].values():
            if instruction.kind == "while":
                yield instruction.source, self.of(self._body(instruction))
            if instruction.kind in ("while", "conditional", "call"):
                for called in instruction.called:
                    yield from self.loops(called)

    def _add(
        self, total: Count, instruction: Instruction, computation: Computation, seen: set[str]
    ) -> None:
        kind = instruction.kind
        if kind == "while":
            total.add(self.of(self._body(instruction)), self._turns(instruction))
        elif kind == "conditional":
            costs = [self.of(name) for name in instruction.called]
            total.add(max(costs, key=lambda cost: cost.bytes))
        elif kind in ("call", "async-start"):
            for name in instruction.called:
                total.add(self.of(name))
        elif not _FREE.fullmatch(kind):
            self._add_work(total, instruction, seen)
            total.bytes += self._traffic(instruction, computation)

    def _add_work(self, total: Count, instruction: Instruction, seen: set[str]) -> None:
        """Products, kernels and collectives, also those within a fusion.

        Args:
          seen: channels of collectives that were counted. One that runs beside other work stands in
            each of its fusions.
        """
        kind = instruction.kind.removesuffix("-start")
        if kind in ("dot", "convolution"):
            total.flops += self._product_flops(instruction)
        elif kind in COLLECTIVES:
            channel = re.search(r"channel_id=\d+|$", instruction.text)[0]  # type: ignore[index]  # It always matches.
            if channel and channel in seen:
                return
            seen.add(channel)
            total.collectives[_collective(kind, instruction)] += 1
        elif kind == "custom-call" and 'custom_call_target="tpu_custom_call"' in instruction.text:
            total.kernels[re.sub(r"\.\d+$", "", instruction.name)] += 1
        elif kind == "fusion":
            inner = Count()
            for name in instruction.called:
                for part in self.computations[name].values():
                    self._add_work(inner, part, seen)
            if "all-reduce-scatter" in instruction.called[0]:
                inner.collectives = collections.Counter(
                    {
                        dataclasses.replace(c, kind="reduce-scatter"): n
                        for c, n in inner.collectives.items()
                    }
                )
            total.add(inner)

    def _body(self, loop: Instruction) -> str:
        return re.search(r"body=%([\w.\-]+)", loop.text).group(1)  # type: ignore[union-attr]

    def _turns(self, loop: Instruction) -> float:
        """As the compiler says, or the condition `index < constant`."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text):
            return float(known.group(1))
        condition = self.computations[re.search(r"condition=%([\w.\-]+)", loop.text).group(1)]  # type: ignore[union-attr]
        root = next(instruction for instruction in condition.values() if instruction.root)
        limits = [condition[name] for name in root.operands if condition[name].kind == "constant"]
        if root.kind == "compare" and "direction=LT" in root.text and limits:
            return float(re.match(r"\((\d+)\)", limits[0].text).group(1))  # type: ignore[union-attr]
        return self.turns(loop.source)

    def _product_flops(self, product: Instruction) -> float:
        """2 x elements of the result x what each sums over."""
        computation = next(c for c in self.computations.values() if c.get(product.name) is product)
        left, right = (computation[name].shapes[0].dims for name in product.operands[:2])
        out = product.shapes[0].dims
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", product.text)
        if contracted:
            return (
                2.0
                * math.prod(out)
                * math.prod(left[int(axis)] for axis in contracted.group(1).split(",") if axis)
            )
        labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", product.text)
        if not labels:
            return 0.0
        at = [
            dict(zip(text, dims, strict=True))
            for text, dims in zip(labels.groups(), (left, right, out), strict=True)
        ]
        window = _Window.of(product.text)
        places = math.prod(
            window.places(int(axis), at[0][axis], at[1][axis], at[2][axis])
            for axis in at[1]
            if axis.isdigit()
        )
        return 2.0 * at[2]["b"] * at[2]["f"] * at[1]["i"] * places

    def _traffic(self, instruction: Instruction, computation: Computation) -> float:
        kind, results = instruction.kind, instruction.shapes
        inputs = [computation[name] for name in instruction.operands if name in computation]
        if kind in ("dynamic-slice", "slice", "gather"):
            return sum(shape.memory for shape in results) + (
                results[0].bytes if _in_memory(inputs[0]) else 0
            )
        if kind == "dynamic-update-slice":
            return inputs[1].shapes[0].memory + (
                inputs[1].shapes[0].bytes if _in_memory(inputs[0]) else 0
            )
        if kind == "scatter":
            return 2.0 * sum(shape.memory for shape in inputs[2].shapes)
        if kind in ("slice-start", "dynamic-slice-start"):
            return float(results[1].memory + (results[1].bytes if _in_memory(inputs[0]) else 0))
        if kind == "custom-call" and re.search(
            r'custom_call_target="(AllocateBuffer|ConcatBitcast)"', instruction.text
        ):
            return 0.0
        if kind == "custom-call":
            # output_to_operand_aliasing
            taken = re.findall(r"\{(\d*)\}: \((\d+),", instruction.text)
            results = tuple(
                shape
                for at, shape in enumerate(results)
                if at not in {int(out or 0) for out, _ in taken}
            )
            inputs = [
                each for at, each in enumerate(inputs) if at not in {int(read) for _, read in taken}
            ]
        if kind != "fusion":
            first = results[:1] if kind.endswith("-start") else results
            return float(
                sum(s.memory for s in first) + sum(s.memory for each in inputs for s in each.shapes)
            )
        inner = self.computations[instruction.called[0]]
        parameters = [each for each in inner.values() if each.kind == "parameter"]
        read = 0.0
        for each in parameters:
            number = int(re.match(r"\((\d+)\)", each.text).group(1))  # type: ignore[union-attr]
            if number < len(inputs) and _in_memory(inputs[number]):
                read += self._read(each, inner)
        return read + sum(self._written(instruction, inner))

    def _read(self, parameter: Instruction, inner: Computation) -> float:
        """Bytes of a fusion's operand that it reads."""
        total = 0.0
        for user in _users(parameter, inner):
            if (
                user.kind in ("dynamic-slice", "slice", "gather")
                and user.operands[0] == parameter.name
            ):
                total += user.shapes[0].bytes
            elif user.kind == "bitcast":
                # As the result of a fusion within a fusion it is read by what stands around that.
                total += user.shapes[0].bytes if user.root else self._read(user, inner)
            elif (
                user.kind in ("dynamic-update-slice", "scatter")
                and user.operands[0] == parameter.name
            ):
                continue
            elif user.kind == "fusion":
                deeper = self.computations[user.called[0]]
                at = user.operands.index(parameter.name)
                total += sum(
                    self._read(p, deeper) for p in deeper.values() if p.text.startswith(f"({at})")
                )
            else:
                return parameter.shapes[0].bytes
        return min(total, parameter.shapes[0].bytes)

    def _written(self, fusion: Instruction, inner: Computation) -> Iterator[float]:
        root = next(instruction for instruction in inner.values() if instruction.root)
        parts = [inner[name] for name in root.operands] if root.kind == "tuple" else [root]
        for shape, part in zip(fusion.shapes, parts, strict=False):
            while part.kind == "bitcast":
                part = inner[part.operands[0]]
            if shape.on_chip:
                continue
            new = {"dynamic-update-slice": 1, "scatter": 2}.get(part.kind)
            yield float(inner[part.operands[new]].shapes[0].bytes if new else shape.bytes)


def _in_memory(instruction: Instruction) -> bool:
    return any(not shape.on_chip for shape in instruction.shapes)


def _users(instruction: Instruction, computation: Computation) -> Iterator[Instruction]:
    return (other for other in computation.values() if instruction.name in other.operands)


def _collective(kind: str, instruction: Instruction) -> Collective:
    shapes = instruction.shapes
    if instruction.kind.endswith("-start") and kind in ("all-gather", "collective-permute"):
        shapes = shapes[len(shapes) // 2 :][:1] if len(shapes) > 1 else shapes
    size = sum(shape.bytes for shape in shapes)
    group = first_group(instruction.text)
    if kind == "reduce-scatter":
        size *= len(group)
    return Collective(kind, size, group, instruction.source)
