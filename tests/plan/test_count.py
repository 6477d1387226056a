"""What is counted of a program, on programs so small that the counts can be done by hand."""

import re

import jax
import jax.numpy as jnp
import pytest

from apr_jax.plan.count import COLLECTIVES, Counter
from apr_jax.plan.hlo import first_group, parse

LOOP = """HloModule jit_f

%fused (param_0.1: f32[10,8,128], param_1.2: s32[]) -> f32[8,128] {
  %param_0.1 = f32[10,8,128]{2,1,0:T(8,128)} parameter(0)
  %param_1.2 = s32[]{:T(128)} parameter(1)
  %slice.1 = f32[1,8,128]{2,1,0:T(8,128)} dynamic-slice(%param_0.1, %param_1.2), dynamic_slice_sizes={1,8,128}
  ROOT %bitcast.1 = f32[8,128]{1,0:T(8,128)} bitcast(%slice.1)
}

%body (arg: (s32[], f32[10,8,128], f32[128,64])) -> (s32[], f32[10,8,128], f32[128,64]) {
  %arg = (s32[]{:T(128)}, f32[10,8,128]{2,1,0:T(8,128)}, f32[128,64]{1,0:T(8,128)S(1)}) parameter(0)
  %index = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %all = f32[10,8,128]{2,1,0:T(8,128)} get-tuple-element(%arg), index=1
  %weights = f32[128,64]{1,0:T(8,128)S(1)} get-tuple-element(%arg), index=2
  %one = f32[8,128]{1,0:T(8,128)} fusion(%all, %index), kind=kLoop, calls=%fused
  %product = f32[8,64]{1,0:T(8,128)} convolution(%one, %weights), dim_labels=bf_io->bf
  %gathered = f32[64,64]{1,0:T(8,128)} all-gather(%product), replica_groups=mesh['x'=4,'y'=8] {'y'}, dimensions={0}
  ROOT %out = (s32[]{:T(128)}, f32[10,8,128]{2,1,0:T(8,128)}, f32[128,64]{1,0:T(8,128)S(1)}) tuple(%index, %all, %weights)
}

%cond (arg.1: (s32[], f32[10,8,128], f32[128,64])) -> pred[] {
  %ten = s32[]{:T(128)} constant(10)
  %arg.1 = (s32[]{:T(128)}, f32[10,8,128]{2,1,0:T(8,128)}, f32[128,64]{1,0:T(8,128)S(1)}) parameter(0)
  %index.1 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%index.1, %ten), direction=LT
}

ENTRY %main (x: (s32[], f32[10,8,128], f32[128,64])) -> (s32[], f32[10,8,128], f32[128,64]) {
  %x = (s32[]{:T(128)}, f32[10,8,128]{2,1,0:T(8,128)}, f32[128,64]{1,0:T(8,128)S(1)}) parameter(0)
  ROOT %while.1 = (s32[], f32[10,8,128], f32[128,64]) while(%x), body=%body, condition=%cond, metadata={op_name="f/decode"}
}
"""


def count(text, turns=lambda source: 1.0):
    computations, entry = parse(text)
    return Counter(computations, turns).of(entry)


def test_a_loop_by_hand():
    found = count(LOOP)
    assert found.flops == 10 * 2 * 8 * 64 * 128
    slice_read_and_written = 2 * 8 * 128 * 4 + 4  # And where it begins.
    padded = 8 * 128 * 4  # The product's 64 columns take 128.
    product = 8 * 128 * 4 + padded  # Its weights are on the chip.
    gather = padded + 64 * 128 * 4
    assert found.bytes == 10 * (slice_read_and_written + product + gather)
    ((collective, times),) = found.collectives.items()
    assert (collective.kind, collective.bytes, collective.group, times) == (
        "all-gather",
        64 * 128 * 4,
        tuple(range(8)),
        10,
    )


def test_elements_of_tuples_may_be_named_directly():
    """As in JAX 0.12: `%arg#1` instead of a `get-tuple-element` instruction."""
    lines = [line for line in LOOP.splitlines() if "get-tuple-element" not in line]
    direct = "\n".join(lines)
    elements = {"index": "arg#0", "all": "arg#1", "weights": "arg#2", "index.1": "arg.1#0"}
    for name, element in elements.items():
        direct = re.sub(rf"%{re.escape(name)}(?=[,)])", f"%{element}", direct)
    assert direct.count("#") == 7
    assert count(direct) == count(LOOP)


def test_a_collective_beside_other_work_is_one():
    """Its first and its last part stand in two fusions, under one channel."""
    text = """HloModule m

%begin (a: f32[8,128]) -> f32[64,128] {
  %a = f32[8,128]{1,0} parameter(0)
  ROOT %g = f32[64,128]{1,0} all-gather(%a), channel_id=CHANNEL, replica_groups=[1,8]<=[8], dimensions={0}
}

%end (b: f32[8,128]) -> f32[64,128] {
  %b = f32[8,128]{1,0} parameter(0)
  ROOT %h = f32[64,128]{1,0} all-gather(%b), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}
}

ENTRY %main (x: f32[8,128]) -> f32[64,128] {
  %x = f32[8,128]{1,0} parameter(0)
  %one = f32[64,128]{1,0} fusion(%x), kind=kCustom, calls=%begin
  ROOT %two = f32[64,128]{1,0} fusion(%x), kind=kCustom, calls=%end
}
"""
    assert sum(count(text.replace("CHANNEL", "7")).collectives.values()) == 1
    assert sum(count(text.replace("CHANNEL", "8")).collectives.values()) == 2


def test_in_place_fusion_reads_all_its_operands():
    text = """HloModule m

%body (a: f32[64,32], b: f32[64,32]) -> f32[64,32] {
  %a = f32[64,32]{1,0} parameter(0)
  %b = f32[64,32]{1,0} parameter(1)
  ROOT %c = f32[64,32]{1,0} add(%a, %b)
}

ENTRY %main (a: f32[64,32], b: f32[64,32]) -> f32[64,32] {
  %a = f32[64,32]{1,0} parameter(0)
  %b = f32[64,32]{1,0} parameter(1)
  ROOT %o = f32[64,32]{1,0} fusion(%a, %b), kind=kLoop, output_to_operand_aliasing={{}: (0, {})}, calls=%body
}
"""
    assert count(text).bytes == 3 * 4 * 64 * 32
    kernel = text.replace(
        "fusion(%a, %b), kind=kLoop", 'custom-call(%a, %b), custom_call_target="tpu_custom_call"'
    )
    # What it does in place `kernels` counts.
    assert count(kernel.replace(", calls=%body", "")).bytes == 4 * 64 * 32


def test_operand_renamed_in_an_inner_fusion_is_read():
    text = """HloModule m

%renamed (p: f32[32,64]) -> f32[32,64] {
  %p = f32[32,64]{1,0} parameter(0)
  ROOT %b = f32[32,64]{1,0} bitcast(%p)
}

%product (a: f32[8,32], w: f32[32,64]) -> f32[8,64] {
  %a = f32[8,32]{1,0} parameter(0)
  %w = f32[32,64]{1,0} parameter(1)
  %f = f32[32,64]{1,0} fusion(%w), kind=kLoop, calls=%renamed
  ROOT %c = f32[8,64]{1,0} convolution(%a, %f), dim_labels=bf_io->bf
}

ENTRY %main (a: f32[8,32], w: f32[32,64]) -> f32[8,64] {
  %a = f32[8,32]{1,0} parameter(0)
  %w = f32[32,64]{1,0} parameter(1)
  ROOT %o = f32[8,64]{1,0} fusion(%a, %w), kind=kOutput, calls=%product
}
"""
    assert count(text).bytes == 4 * (8 * 32 + 32 * 64 + 8 * 64)


def test_a_loop_whose_end_only_the_data_knows():
    open_ended = LOOP.replace("direction=LT", "direction=NE")
    asked = []
    found = count(open_ended, lambda source: asked.append(source) or 3.0)
    assert asked == ["f/decode"] and found.flops == 3 * 2 * 8 * 64 * 128
    computations, entry = parse(open_ended)
    ((source, turn),) = Counter(computations).loops(entry)
    assert source == "f/decode" and turn.flops == 2 * 8 * 64 * 128


def test_a_loop_that_takes_two_steps_a_turn():
    """As the compiler writes a product of which every device has a part."""
    raising = LOOP.replace(
        "  ROOT %out =",
        "  %two = s32[]{:T(128)} constant(2)\n"
        "  %raised = s32[]{:T(128)} add(%index, %two)\n  ROOT %out =",
    ).replace("tuple(%index, %all", "tuple(%raised, %all")
    assert count(raising).flops == 5 * 2 * 8 * 64 * 128
    assert count(raising.replace("constant(10)", "constant(9)")).flops == 5 * 2 * 8 * 64 * 128


def test_bookkeeping_of_an_asynchronous_permute_travels_nowhere():
    start = (
        "%sent = (f32[8,64]{1,0:T(8,128)}, f32[8,64]{1,0:T(8,128)}, u32[]{:S(2)}, u32[]{:S(2)})"
        " collective-permute-start(%product), source_target_pairs={{0,1},{1,0}}"
    )
    sending = re.sub(r"%gathered = .*", start, LOOP)
    ((collective, times),) = count(sending).collectives.items()
    padded = 8 * 128 * 4
    assert (collective.kind, collective.bytes, times) == ("collective-permute", padded, 10)


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,2},{1,3}}", (0, 2)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=3] {'axis_0'}", (0, 3)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=3] {'axis_1'}", (0, 1, 2)),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", (0, 1, 4, 5)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("dimensions={0}", ()),
    ],
)
def test_groups_of_devices(text, group):
    assert first_group(text) == group


def test_batched_product_counts_only_pairs_that_meet():
    """As TPUs write it: a convolution over the batch, dilated so that each place meets its own
    kernel.
    """
    text = """HloModule m

ENTRY %main (a: f32[16,8,32], b: f32[16,32,4]) -> f32[16,8,4] {
  %a = f32[16,8,32]{2,1,0} parameter(0)
  %b = f32[16,32,4]{2,1,0} parameter(1)
  ROOT %c = f32[16,8,4]{2,1,0} convolution(%a, %b), window={size=16 stride=15 lhs_dilate=16}, dim_labels=0bf_0io->0bf
}
"""
    assert count(text).flops == 2 * 16 * 8 * 4 * 32


def test_a_compiled_program_of_this_machine():
    """A scan counts as often as it turns, where XLA's own count takes its body once."""

    def f(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    shapes = (
        jax.ShapeDtypeStruct((64, 32), jnp.float32),
        jax.ShapeDtypeStruct((7, 32, 32), jnp.float32),
    )
    compiled = jax.jit(f).lower(*shapes).compile()
    found = count(compiled.as_text())
    assert found.flops == 7 * 2 * 64 * 32 * 32
    assert 7 * (2 * 64 * 32 + 32 * 32) * 4 <= found.bytes <= 4 * 7 * (2 * 64 * 32 + 32 * 32) * 4


def test_collectives_of_a_compiled_program():
    mesh = jax.make_mesh((8,), ("x",))
    split, whole = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in (("x",), ()))
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=split)
    compiled = jax.jit(lambda x: x * 2, out_shardings=whole).lower(x).compile()
    ((collective, times),) = count(compiled.as_text()).collectives.items()
    assert collective.kind in COLLECTIVES and times == 1
    assert collective.bytes == 64 * 32 * 4 and collective.group == tuple(range(8))
