"""Counts the work of a compiled program: FLOPs of products, bytes of main memory, and collectives.

XLA's own cost analysis counts a loop's body once and a Pallas kernel as nothing. Here

1. `hlo.parse` reads computations and their instructions;
2. `Counter.of` walks a computation, into its fusions, branches and loops. A loop's body counts as
   often as its condition says, or `turns(name of the loop)` times where that depends on the data;
3. bytes are those that an instruction reads from and writes to main memory. Operands and results
   that the compiler placed in on-chip memory (`S(n)` in a layout) cost none. Of an array that is
   sliced only the slice counts, and of an array that is updated in place only the new part. Arrays
   that a kernel updates in place are left to `kernels.py`.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence

from apr_jax.plan.hlo import Computation, Instruction, Shape, first_group

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

# Instructions that move nothing themselves. The work of a pair "...-start" and "...-done" is
# counted at its start.
_FREE = re.compile(
    "parameter|constant|tuple|get-tuple-element|bitcast|after-all|partition-id|replica-id|iota"
    "|add-dependency|opt-barrier|send|recv|async-update|.*-done"
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of the program.

    Attributes:
      kind: one of COLLECTIVES.
      bytes: size of the whole result (all-gather), or of each device's contribution.
      group: indices in the mesh of the devices that take part; the first group if there are
        several.
      source: the JAX operation that it comes from.
    """

    kind: str
    bytes: int
    group: tuple[int, ...]
    source: str


@dataclasses.dataclass
class Count:
    """Sums over a program, as one device runs it.

    Attributes:
      flops: FLOPs of matrix products, without those of Pallas kernels.
      bytes: bytes read from and written to main memory.
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
        """Adds the work of `other`, done `times` times; an expected number need not be whole."""
        self.flops += times * other.flops
        self.bytes += times * other.bytes
        for kernel, count in other.kernels.items():
            self.kernels[kernel] += count * times  # type: ignore[assignment]  # See above.
        for collective, count in other.collectives.items():
            self.collectives[collective] += count * times  # type: ignore[assignment]


@dataclasses.dataclass(frozen=True)
class _Window:
    """How a convolution moves over its input. TPUs express every product as a convolution.

    Attributes:
      fields: name of a field -> its value on each spatial axis.
    """

    fields: dict[str, list[str]]

    @classmethod
    def of(cls, text: str) -> "_Window":
        """Reads the window of an instruction's text."""
        match = re.search(r"window=\{([^}]*)\}", text)
        fields = {}
        for part in match.group(1).split() if match else ():
            name, values = part.split("=")
            fields[name] = values.split("x")
        return cls(fields)

    def meetings(self, axis: int, left: int, right: int, out: int) -> int:
        """Counts the pairs (position of the result, position of the kernel) that meet an input.

        The other pairs fall into padding or between dilated inputs and cost nothing. A batch axis
        is written as a spatial axis on which few pairs meet an input.

        Args:
          axis: the spatial axis.
          left: size of the input on the axis.
          right: size of the kernel on the axis.
          out: size of the result on the axis.
        """

        def field(name: str, default: str) -> str:
            return self.fields[name][axis] if name in self.fields else default

        stride = int(field("stride", "1"))
        kernel_dilation = int(field("rhs_dilate", "1"))
        input_dilation = int(field("lhs_dilate", "1"))
        low_padding = int(field("pad", "0_0").split("_")[0])
        last = (left - 1) * input_dilation

        count = 0
        for result in range(out):
            for kernel in range(right):
                position = result * stride + kernel * kernel_dilation - low_padding
                if 0 <= position <= last and position % input_dilation == 0:
                    count += 1
        return count


@dataclasses.dataclass(frozen=True)
class Counter:
    """Counts the work of a program.

    Attributes:
      computations: the program's computations by name.
      turns: source of a loop -> its number of iterations, for loops where the program does not say
        it.
    """

    computations: dict[str, Computation]
    turns: Callable[[str], float] = lambda source: 1.0

    def of(self, name: str) -> Count:
        """Counts everything that one run of a computation does."""
        total = Count()
        channels: set[str] = set()
        computation = self.computations[name]
        for instruction in computation.values():
            self._add(total, instruction, computation, channels)
        return total

    def loops(self, name: str) -> Iterator[tuple[str, Count]]:
        """Yields source and work of one iteration of each loop in a computation, at any depth."""
        for instruction in self.computations[name].values():
            if instruction.kind == "while":
                yield instruction.source, self.of(self._body(instruction))
            if instruction.kind in ("while", "conditional", "call"):
                for called in instruction.called:
                    yield from self.loops(called)

    def _add(
        self, total: Count, instruction: Instruction, computation: Computation, channels: set[str]
    ) -> None:
        """Adds the work of one instruction of a computation to `total`.

        `channels` is explained at `_add_work`.
        """
        kind = instruction.kind
        if kind == "while":
            total.add(self.of(self._body(instruction)), self._turns(instruction))
        elif kind == "conditional":
            # The dearest branch.
            branches = [self.of(name) for name in instruction.called]
            total.add(max(branches, key=lambda branch: branch.bytes))
        elif kind in ("call", "async-start"):
            for name in instruction.called:
                total.add(self.of(name))
        elif not _FREE.fullmatch(kind):
            self._add_work(total, instruction, channels)
            total.bytes += self._traffic(instruction, computation)

    def _add_work(self, total: Count, instruction: Instruction, channels: set[str]) -> None:
        """Adds products, kernels and collectives to `total`, also those within a fusion.

        `channels` has those of the collectives that were counted already. A collective that runs
        beside other work stands in several fusions, under one channel.
        """
        kind = instruction.kind.removesuffix("-start")
        if kind in ("dot", "convolution"):
            total.flops += self._product_flops(instruction)
        elif kind in COLLECTIVES:
            channel = re.search(r"channel_id=\d+", instruction.text)
            if channel:
                if channel[0] in channels:
                    return
                channels.add(channel[0])
            total.collectives[_collective(kind, instruction)] += 1
        elif kind == "custom-call" and 'custom_call_target="tpu_custom_call"' in instruction.text:
            total.kernels[re.sub(r"\.\d+$", "", instruction.name)] += 1
        elif kind == "fusion":
            inner = Count()
            for name in instruction.called:
                for part in self.computations[name].values():
                    self._add_work(inner, part, channels)
            if "all-reduce-scatter" in instruction.called[0]:
                inner.collectives = _as_reduce_scatter(inner.collectives)
            total.add(inner)

    def _body(self, loop: Instruction) -> str:
        """Returns the name of the computation that a loop repeats."""
        return _required(r"body=%([\w.\-]+)", loop.text)

    def _turns(self, loop: Instruction) -> float:
        """Finds the number of iterations: from the compiler, by the condition, or by `turns`."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text)
        if known:
            return float(known.group(1))

        # A condition `index < constant` says it too.
        condition = self.computations[_required(r"condition=%([\w.\-]+)", loop.text)]
        root = _root(condition)
        end = _constant(root, condition)
        if root.kind == "compare" and "direction=LT" in root.text and end is not None:
            return float(math.ceil(end / self._step(loop, root, condition)))
        return self.turns(loop.source)

    def _step(self, loop: Instruction, compare: Instruction, condition: Computation) -> int:
        """Returns by how much an iteration raises the index that `compare` looks at.

        It is 1, except where the compiler has split a product over devices into a loop.
        """
        places = [
            re.search(r"index=(\d+)", condition[name].text)
            for name in compare.operands
            if condition[name].kind == "get-tuple-element"
        ]
        body = self.computations[self._body(loop)]
        new_values = _root(body).operands
        if not places or places[0] is None or int(places[0][1]) >= len(new_values):
            return 1
        raised = body[new_values[int(places[0][1])]]
        return (_constant(raised, body) or 1) if raised.kind == "add" else 1

    def _product_flops(self, product: Instruction) -> float:
        """FLOPs of a product: 2 x elements of the result x terms that each of them sums."""
        computation = next(c for c in self.computations.values() if c.get(product.name) is product)
        left, right = (computation[name].shapes[0].dims for name in product.operands[:2])
        out = product.shapes[0].dims

        # A `dot` names the axes that it sums over.
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", product.text)
        if contracted:
            terms = math.prod(left[int(axis)] for axis in contracted.group(1).split(",") if axis)
            return 2.0 * math.prod(out) * terms

        # A `convolution` labels its axes: b batch, f features, i and o input and output features of
        # the kernel, and digits for spatial axes.
        labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", product.text)
        if not labels:
            return 0.0
        left_size = dict(zip(labels.group(1), left, strict=True))
        right_size = dict(zip(labels.group(2), right, strict=True))
        out_size = dict(zip(labels.group(3), out, strict=True))
        window = _Window.of(product.text)
        meetings = math.prod(
            window.meetings(int(axis), left_size[axis], right_size[axis], out_size[axis])
            for axis in right_size
            if axis.isdigit()
        )
        return 2.0 * out_size["b"] * out_size["f"] * right_size["i"] * meetings

    def _traffic(self, instruction: Instruction, computation: Computation) -> float:
        """Bytes that an instruction reads from and writes to main memory."""
        kind = instruction.kind
        results = instruction.shapes
        inputs = [computation[name] for name in instruction.operands if name in computation]

        # Of a sliced array only the slice is read, and it is written. The result of an asynchronous
        # slice is the second one.
        if kind in ("dynamic-slice", "slice", "gather"):
            return _memory(results) + _if_in_memory(inputs[0], results[0])
        if kind in ("slice-start", "dynamic-slice-start"):
            return _memory(results[1:2]) + _if_in_memory(inputs[0], results[1])

        # Of an array that is updated in place only the update counts: it is read and written.
        if kind == "dynamic-update-slice":
            update = inputs[1].shapes[:1]
            return _memory(update) + _if_in_memory(inputs[0], update[0])
        if kind == "scatter":
            return 2.0 * _memory(inputs[2].shapes)

        if kind == "custom-call":
            return _custom_call_traffic(instruction, inputs)
        if kind == "fusion":
            return self._fusion_traffic(instruction, inputs)

        # Everything else reads its operands and writes its results. An asynchronous start also
        # lists operands and bookkeeping among its results, so only its first result counts.
        written = results[:1] if kind.endswith("-start") else results
        return _memory(written) + sum(_memory(each.shapes) for each in inputs)

    def _fusion_traffic(self, fusion: Instruction, inputs: list[Instruction]) -> float:
        """Bytes that a fusion reads and writes; what it computes in between stays on the chip."""
        inner = self.computations[fusion.called[0]]
        read = 0.0
        for parameter in inner.values():
            if parameter.kind == "parameter":
                number = int(_required(r"^\((\d+)\)", parameter.text))
                if number < len(inputs) and _in_memory(inputs[number]):
                    read += self._read(parameter, inner)
        return read + sum(self._written(fusion, inner))

    def _read(self, parameter: Instruction, inner: Computation) -> float:
        """Bytes of a fusion's operand that the fusion reads.

        The operand is given as a parameter of the fusion's computation `inner`.
        """
        size = parameter.shapes[0].bytes
        total = 0.0
        for user in _users(parameter, inner):
            is_first_operand = user.operands[0] == parameter.name
            if user.kind in ("dynamic-slice", "slice", "gather") and is_first_operand:
                total += user.shapes[0].bytes
            elif user.kind in ("dynamic-update-slice", "scatter") and is_first_operand:
                continue  # It is updated in place, not read.
            elif user.kind == "bitcast":
                # A bitcast that is the result of a fusion within a fusion is read outside of it.
                total += user.shapes[0].bytes if user.root else self._read(user, inner)
            elif user.kind == "fusion":
                deeper = self.computations[user.called[0]]
                number = user.operands.index(parameter.name)
                total += sum(
                    self._read(each, deeper)
                    for each in deeper.values()
                    if each.text.startswith(f"({number})")
                )
            else:
                return size  # Any other user reads all of it.
        return min(total, size)

    def _written(self, fusion: Instruction, inner: Computation) -> Iterator[float]:
        """Bytes of each result of a fusion that are written to main memory."""
        root = _root(inner)
        parts = [inner[name] for name in root.operands] if root.kind == "tuple" else [root]
        for shape, part in zip(fusion.shapes, parts, strict=False):
            while part.kind == "bitcast":
                part = inner[part.operands[0]]
            if shape.on_chip:
                continue
            # Of an array that is updated in place only the update is written.
            update = {"dynamic-update-slice": 1, "scatter": 2}.get(part.kind)
            yield float(inner[part.operands[update]].shapes[0].bytes if update else shape.bytes)


def _custom_call_traffic(call: Instruction, inputs: list[Instruction]) -> float:
    """Bytes that a custom call reads and writes, such as a Pallas kernel.

    An operand that a result takes the place of is updated in place: `kernels.py` knows how much of
    it the kernel reads and writes.
    """
    if re.search(r'custom_call_target="(AllocateBuffer|ConcatBitcast)"', call.text):
        return 0.0
    # output_to_operand_aliasing={{result}: (operand, ...)}; {} is the only result.
    aliases = re.findall(r"\{(\d*)\}: \((\d+),", call.text)
    aliased_results = {int(result or 0) for result, _ in aliases}
    aliased_operands = {int(operand) for _, operand in aliases}
    written = [shape for index, shape in enumerate(call.shapes) if index not in aliased_results]
    read = [each for index, each in enumerate(inputs) if index not in aliased_operands]
    return _memory(written) + sum(_memory(each.shapes) for each in read)


def _memory(shapes: Sequence[Shape]) -> float:
    """Bytes of arrays in main memory."""
    return float(sum(shape.memory for shape in shapes))


def _if_in_memory(instruction: Instruction, part: Shape) -> float:
    """Bytes of a part of an instruction's result, if the result lies in main memory."""
    return float(part.bytes) if _in_memory(instruction) else 0.0


def _in_memory(instruction: Instruction) -> bool:
    """Returns whether any of an instruction's results lies in main memory."""
    return any(not shape.on_chip for shape in instruction.shapes)


def _constant(instruction: Instruction, computation: Computation) -> int | None:
    """Returns the value of the operand that is a constant integer; None if there is none."""
    for name in instruction.operands:
        operand = computation.get(name)
        if operand is None or operand.kind != "constant":
            continue
        if value := re.match(r"\((-?\d+)\)", operand.text):
            return int(value[1])
    return None


def _users(instruction: Instruction, computation: Computation) -> Iterator[Instruction]:
    """Returns the instructions of a computation that take the result of `instruction`."""
    return (user for user in computation.values() if instruction.name in user.operands)


def _root(computation: Computation) -> Instruction:
    """Returns the instruction whose result is that of the computation."""
    return next(instruction for instruction in computation.values() if instruction.root)


def _required(pattern: str, text: str) -> str:
    """Returns the first group of a pattern that the compiler always writes."""
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"HLO without {pattern}: {text[:80]}")
    return match.group(1)


def _as_reduce_scatter(
    collectives: collections.Counter[Collective],
) -> collections.Counter[Collective]:
    """Turns collectives into reduce-scatters, which the compiler writes as fused all-reduces."""
    return collections.Counter(
        {
            dataclasses.replace(collective, kind="reduce-scatter"): count
            for collective, count in collectives.items()
        }
    )


def _collective(kind: str, instruction: Instruction) -> Collective:
    """Reads a collective from its instruction."""
    shapes = instruction.shapes
    operands = len(instruction.operands)
    if instruction.kind.endswith("-start") and kind in ("all-gather", "collective-permute"):
        # An asynchronous start gives back its operands, then the results, then bookkeeping.
        shapes = shapes[operands : 2 * operands] if len(shapes) > operands else shapes
    size = sum(shape.bytes for shape in shapes)
    group = first_group(instruction.text)
    if kind == "reduce-scatter":
        size *= len(group)  # The instruction's result is the device's part of the whole.
    return Collective(kind, size, group, instruction.source)
