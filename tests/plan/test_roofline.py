"""From counts to seconds, hours and advice, by hand; and the published model has the published
size.
"""

import dataclasses
import types

import pytest

from apr_jax.config import load, override
from apr_jax.plan import roofline
from apr_jax.plan.chips import CHIPS, collective_seconds, extent_of, group_bandwidth
from apr_jax.plan.kernels import work
from apr_jax.plan.programs import STAGES, abstract_params, forest_chunks
from apr_jax.plan.recipe import advice, recipe, supervised_steps
from apr_jax.plan.roofline import CollectiveCost, Shares, Stage, analyse, decode_steps, turns
from apr_jax.plan.scaling import HOP, weak_scaling

PAPER = load("experiments/paper.py")
GIB = 2**30


def stage(name="supervised", **fields):
    values = {
        "argument_bytes": GIB,
        "output_bytes": GIB,
        "temp_bytes": GIB,
        "alias_bytes": GIB,
        "flops": 1e12,
        "useful_flops": 1e12,
        "bytes": 1e9,
        "collective_costs": (),
        "compute": 3.6,
        "memory": 1.0,
        "interconnect": 0.5,
        "tokens": 1e6,
        "decode": {},
        "compiled": 1.0,
    }
    return Stage(name=name, **values | fields)


def test_the_published_size():
    from apr_jax.model.transformer import count_params

    parameters = count_params(abstract_params(PAPER, vocab=78))[1]
    assert round(parameters / 1e6) == 228
    norms = (2 * PAPER.model.layers + 1) * PAPER.model.width
    assert roofline.product_parameters(PAPER.model) == parameters - norms
    assert (PAPER.train.sft.batch_rows, PAPER.train.sft.epochs) == (256, 10)
    assert (PAPER.train.rl.problems, PAPER.train.rl.group, PAPER.limits.window) == (64, 5, 4_096)


def test_links_of_a_group():
    v5e = CHIPS["v5e"]
    v4 = CHIPS["v4"]
    v3 = CHIPS["v3"]
    line = [(x, 0, 0) for x in range(4)]
    square = [(x, y, 0) for x in range(4) for y in range(4)]
    assert group_bandwidth(v5e, (16, 16, 1), line) == v5e.link
    assert group_bandwidth(v5e, (16, 16, 1), [(x, 0, 0) for x in range(16)]) == 2 * v5e.link
    # Not a whole pod's axis: no ring.
    assert group_bandwidth(v5e, (8, 8, 1), [(x, 0, 0) for x in range(8)]) == v5e.link
    assert group_bandwidth(v4, (4, 4, 4), line) == 2 * v4.link
    assert group_bandwidth(v4, (4, 4, 4), square) == 4 * v4.link
    # Two devices a chip share its links.
    assert group_bandwidth(v3, (8, 8, 1), line) == v3.link / 2
    assert group_bandwidth(v3, (8, 8, 1), [(0, 0, 0)] * 2) == v3.device_bandwidth
    devices = [types.SimpleNamespace(coords=place) for place in square]
    assert extent_of(devices) == (4, 4, 1)


def test_time_of_a_collective():
    assert collective_seconds("all-gather", 800, 8, 100.0) == 7.0
    assert collective_seconds("all-reduce", 800, 8, 100.0) == 14.0
    assert collective_seconds("reduce-scatter", 800, 8, 100.0) == 7.0
    assert collective_seconds("collective-permute", 800, 8, 100.0) == 8.0
    assert collective_seconds("all-reduce", 800, 1, 100.0) == 0.0


def test_the_longest_part_binds():
    assert (stage().seconds, stage().bound) == (3.6, "compute")
    assert stage(memory=4.0).bound == "HBM"
    assert stage(interconnect=4.0).bound == "interconnect"
    assert stage().total_bytes == 2 * GIB


def with_steps(steps):
    """Scale paper with a number of steps instead of epochs."""
    sft = dataclasses.replace(PAPER.train.sft, steps=steps, epochs=0)
    return dataclasses.replace(PAPER, train=dataclasses.replace(PAPER.train, sft=sft))


def test_hours_of_the_recipe():
    times = {"supervised": 3.6, "rollout": 36.0, "rescoring": 18.0, "update": 72.0}
    stages = {name: stage(name, compute=times[name]) for name in STAGES}
    fixed = with_steps(19_000)
    found = recipe(fixed, stages, 64, "apr")
    assert found.steps == 19_000
    asked = 4  # Rollouts of 320 problems: every 5,000 steps and after the last.
    assert found.supervised == pytest.approx(19.0 + asked * 36 / 3600)
    # Before the first step and every 25 of 150; 1,000 problems, 320 trees a rollout.
    validations = 7 * 4
    assert found.reinforced == pytest.approx((150 * (36 + 18 + 2 * 72) + validations * 36) / 3600)
    free = override(fixed, ["train.rl.objective.kl=0"])
    without = recipe(
        free, {name: stages[name] for name in STAGES if name != "rescoring"}, 64, "apr"
    )
    assert without.reinforced == pytest.approx((150 * (36 + 2 * 72) + validations * 36) / 3600), (
        "no reference, no rescoring"
    )
    assert (
        recipe(PAPER, {name: stages[name] for name in STAGES if name != "rescoring"}, 64, "apr")
        is None
    )
    assert found.chip_hours == pytest.approx(64 * (found.supervised + found.reinforced))
    assert recipe(PAPER, {"rollout": stages["rollout"]}, 64, "apr") is None


def test_epoch_takes_the_steps_of_its_methods_rows(monkeypatch):
    """Ten epochs at scale paper: APR's trees fill five times the rows of SoS+'s."""
    monkeypatch.setattr("apr_jax.plan.recipe._SAMPLE", 150)
    serial, parallel = (supervised_steps(PAPER, method) for method in ("sos+", "apr"))
    assert serial == pytest.approx(4_400, rel=0.2) and parallel == pytest.approx(21_600, rel=0.2)
    assert supervised_steps(with_steps(7), "apr") == 7


def test_what_to_change_when_it_does_not_fit():
    chip = CHIPS["v5e"]
    # A decode slot is 288 MiB.
    assert "schedule.slots=20" in advice(PAPER, "rollout", 1.1 * GIB, GIB, chip, 8)
    assert "limits.window" in advice(PAPER, "rollout", 7 * GIB, GIB, chip, 8)
    assert "mesh.fsdp=16" in advice(PAPER, "supervised", 4 * GIB, 20 * GIB, chip, 8)
    assert "model.remat=layer" in advice(PAPER, "supervised", 4 * GIB, GIB, chip, 8)
    careful = dataclasses.replace(PAPER, model=dataclasses.replace(PAPER.model, remat="layer"))
    assert "train.rl.micro_batch_rows" in advice(careful, "update", 4 * GIB, GIB, chip, 8)


def test_turns_of_the_loops_that_only_data_ends():
    shape = Shares(64, 1)  # 5 trees a shard.
    steps = decode_steps(PAPER, shape)
    assert steps == 4_096  # 5 x 16,720 tokens on 24 decode slots need fewer.
    assert decode_steps(PAPER, Shares(1, 1)) == 320 * 16_720 / 24
    cut = dataclasses.replace(
        PAPER, schedule=dataclasses.replace(PAPER.schedule, context_buckets=(1_024, 2_048))
    )
    decode = [
        turns(f"x/while/body/decode_{bound}/while", "rollout", cut, shape)
        for bound in (1_024, 2_048, 4_096)
    ]
    assert decode == [1_024, 1_024, 2_048]
    assert turns("x/while/body/decode_4096/while", "rollout", PAPER, shape) == 3_072
    assert turns("jit(rollout)/shard_map/while", "rollout", PAPER, shape) == 1
    assert turns("x/prefill_batch/while/body/prefill_1024/while", "rollout", PAPER, shape) == 1
    assert turns("x/prefill_batch/while/body/prefill_2048/while", "rollout", PAPER, shape) == 0
    assert (
        turns("x/prefill_batch/while/body/prefill_1024/while/body/while", "rollout", PAPER, shape)
        == 8
    )
    assert turns("x/while/body/prefill_batch/while", "rollout", PAPER, shape) == pytest.approx(
        5 * 10.2 / 8
    )
    assert turns("jit(step)/while", "update", PAPER, shape) == forest_chunks(PAPER) == 5
    assert turns("jit(step)/while/body/while", "update", PAPER, shape) == 1


def test_kernel_opaque_to_the_compiler_is_counted():
    text = """HloModule m

ENTRY %main (a: bf16[4,16,64,4608]) -> bf16[4,16,64,4608] {
  %a = bf16[4,16,64,4608]{3,2,1,0} parameter(0)
  ROOT %attend_forward.1 = bf16[4,16,64,4608]{3,2,1,0} custom-call(%a), custom_call_target="tpu_custom_call"
}
"""
    memory = types.SimpleNamespace(
        argument_size_in_bytes=1,
        output_size_in_bytes=2,
        temp_size_in_bytes=3,
        alias_size_in_bytes=0,
    )
    devices = [
        types.SimpleNamespace(coords=(x, y, z))
        for x in range(4)
        for y in range(4)
        for z in range(4)
    ]
    flat = types.SimpleNamespace(flat=devices)
    mesh = types.SimpleNamespace(devices=flat, size=64, shape={"data": 8, "fsdp": 8, "tensor": 1})
    found = analyse("supervised", text, memory, PAPER, mesh, CHIPS["v4"], 1.0)
    pairs = 9 * 10 / 2  # Blocks of 512 of a row of 4,608, the upper half of them unseen.
    assert found.flops == 4 * 16 * pairs * 2 * 2 * 512 * 512 * 64
    assert found.compute == 2 * found.flops / 275e12  # 64 of the 128 columns.
    operands = 2 * 4 * 16 * 64 * 4608 * 2
    assert found.bytes == operands + 4 * 16 * (pairs - 9) * 2 * 512 * 64 * 2
    tokens = 256 * 4608
    dense = 6 * roofline.product_parameters(PAPER.model)
    attention = 12 * 18 * 16 * 64 * 4609 / 2
    assert found.tokens == tokens and found.useful_flops == pytest.approx(
        tokens * (dense + attention) / 64
    )


@pytest.mark.parametrize(("columns", "near"), [(4_608, 32), (131_072, 32)])
def test_backward_attention_moves_gradients_of_far_queries(columns, near):
    """Near are 4 MiB of gradients: 32 blocks of 512 columns of 64 numbers in float32."""
    limits = dataclasses.replace(PAPER.limits, max_thread_tokens=columns)
    config = dataclasses.replace(PAPER, limits=limits)
    found = work("attend_backward", config, 3, CHIPS["v4"])
    count = columns // 512
    distances = [i - j for i in range(count) for j in range(i + 1)]
    assert found.flops == 3 * len(distances) * 5 * 2 * 512 * 512 * 64
    later = sum(distance > 0 for distance in distances)
    far = sum(distance >= near for distance in distances)
    counted_as_result = max(0, count - near)
    expected = later * 2 * 2 + (2 * far - counted_as_result) * 4
    assert found.bytes == 3 * expected * 512 * 64


@pytest.mark.parametrize(
    ("bound", "steps", "lengths", "vain"),
    [(1_024, 1_024, (256, 512, 1_024), 64), (4_096, 3_072, (2_048, 4_096), 128)],
)
def test_a_decode_step_moves_what_is_live(bound, steps, lengths, vain):
    """The kernel's cache is written in place: the text says whole arrays, the step reads blocks,
    the last one half in vain.
    """
    text = """HloModule m

%body (x: (s32[], bf16[24,4096,1024])) -> (s32[], bf16[24,4096,1024]) {
  %x = (s32[], bf16[24,4096,1024]) parameter(0)
  %i = s32[] get-tuple-element(%x), index=0
  %k = bf16[24,4096,1024]{2,1,0} get-tuple-element(%x), index=1
  %q = bf16[24,1,1024]{2,1,0} broadcast(%i), dimensions={}
  %decode_attention.1 = (bf16[24,1,1024]{2,1,0}, bf16[24,4096,1024]{2,1,0}) custom-call(%q, %k), KERNEL
  %after = bf16[24,4096,1024]{2,1,0} get-tuple-element(%decode_attention.1), index=1
  ROOT %out = (s32[], bf16[24,4096,1024]) tuple(%i, %after)
}

%cond (x: (s32[], bf16[24,4096,1024])) -> pred[] {
  %x = (s32[], bf16[24,4096,1024]) parameter(0)
  %i = s32[] get-tuple-element(%x), index=0
  %n = s32[] constant(3)
  ROOT %less = pred[] compare(%i, %n), direction=NE
}

ENTRY %main (x: (s32[], bf16[24,4096,1024])) -> (s32[], bf16[24,4096,1024]) {
  %x = (s32[], bf16[24,4096,1024]) parameter(0)
  ROOT %while.1 = (s32[], bf16[24,4096,1024]) while(%x), body=%body, condition=%cond, LOOP
}
""".replace("LOOP", f'metadata={{op_name="a/decode_{bound}/while"}}').replace(
        "KERNEL", 'custom_call_target="tpu_custom_call", output_to_operand_aliasing={{1}: (1, {})}'
    )
    memory = types.SimpleNamespace(
        argument_size_in_bytes=1,
        output_size_in_bytes=1,
        temp_size_in_bytes=1,
        alias_size_in_bytes=0,
    )
    mesh = types.SimpleNamespace(
        devices=types.SimpleNamespace(flat=[types.SimpleNamespace(coords=(0, 0, 0))] * 64),
        size=64,
        shape={"data": 8, "fsdp": 8, "tensor": 1},
    )
    found = analyse("rollout", text, memory, PAPER, mesh, CHIPS["v4"], 1.0)
    queries = 3 * 24 * 1024 * 2 + 4  # Made of one number, read by the kernel, and what it finds.
    position = 2 * 1024 * 2  # Keys and values of a layer.
    weights = 2 * roofline.product_parameters(PAPER.model)
    assert found.decode == {
        length: (
            queries + 24 * position * (length + vain + 16),
            weights + 18 * 24 * position * length,
        )
        for length in lengths
    }
    assert found.bytes == steps * (queries + 24 * position * (2_048 + 128 + 16))
    # 16 heads on a unit of 128.
    assert found.compute == steps * 4 * 24 * 16 * 1_024 * 2_048 * 8 / 275e12


def test_weak_scaling_bends_where_slices_end():
    chip = CHIPS["v5e"]
    mesh = {"data": 32, "fsdp": 8, "tensor": 1}
    collective_costs = (
        CollectiveCost("all-gather", 8, 1, 60, 1e9, 0.005),
        CollectiveCost("all-reduce", 32, 32, 40, 1e9, 0.031),
    )
    base = stage(compute=0.05, memory=0.01, interconnect=0.036, collective_costs=collective_costs)
    points = {point.chips: point for point in weak_scaling(base, chip, mesh, 228_000_000)}
    assert list(points) == [8, 16, 32, 64, 128, 256, 512, 1024]
    assert all(points[n].network == 0 for n in points if n <= 256)
    assert points[512].network == pytest.approx(2 * (2 * 228e6 / 8) / 2 / 6.25e9)
    assert points[256].latency == pytest.approx(100 * HOP * 16)
    assert points[256].seconds == pytest.approx(0.05 + points[256].latency)
    assert points[256].interconnect == pytest.approx(0.036)  # What the program was compiled for.
    # One copy of the weights: no sum of gradients.
    assert points[8].interconnect == pytest.approx(0.005)
    assert points[16].interconnect == pytest.approx(0.005 + 0.016)
    assert all(
        points[a].seconds <= points[b].seconds
        for a, b in zip((8, 64, 256), (64, 256, 1024), strict=True)
    )
    shared = weak_scaling(base, chip, mesh | {"tensor": 4}, 228_000_000)
    # A copy of the weights takes 32.
    assert [point.chips for point in shared] == [
        32,
        64,
        128,
        256,
        512,
        1024,
    ]
