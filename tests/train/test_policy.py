"""The transformer as a policy: what travels before a rollout, and how the devices of a tensor axis
share its work.
"""

import dataclasses
import functools
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from apr_jax.model.config import ModelConfig
from apr_jax.model.kv_cache import cache_tpu
from apr_jax.model.sharding import make_mesh
from apr_jax.model.transformer import decode_specs, init_params, make_decode, prepare_decode
from apr_jax.threads import Limits, Schedule, make_prompts
from apr_jax.train.policy import cast_and_prepare, make_policy_rollout
from apr_jax.train.step import place_whole

MODEL = ModelConfig(layers=2, width=64, heads=8, kv_heads=8, head_size=16, mlp=256)
VOCAB = 128
LIMITS = Limits(window=24, max_thread_tokens=32, max_threads=3, children=2, constrain=True)
SCHEDULE = Schedule(slots=2, prefill_batch=1, prefill_chunk=8)
TREES = 8


def _decoding(model, vocab, tensor, tpu=False):
    """Lowers two decode steps on `tensor` devices; returns the program and its arguments.

    The first step reads six tokens of each of two decode slots, the second reads the seventh.
    """
    params = init_params(model, vocab, jax.random.key(0))
    if model.qkv_bias:  # Zeros would hide a bias of another head.
        for name in ("q_bias", "kv_bias"):
            leaf = params["layers"][name]
            params["layers"][name] = jax.random.normal(jax.random.key(1), leaf.shape)
    prepared = prepare_decode(params, model, tpu, tensor)
    decode, init_cache = make_decode(model, (16,), tpu, tensor)

    def read(prepared, tokens):
        position = jnp.broadcast_to(jnp.arange(7), (2, 7))
        first, cache = decode(prepared, tokens[:, :6], init_cache(2, 16), position[:, :6], 16)
        second, _ = decode(prepared, tokens[:, 6:], cache, position[:, 6:], 16)
        return jnp.concatenate([first, second], axis=1)

    mapped = jax.shard_map(
        read,
        mesh=make_mesh(1, 1, tensor),
        in_specs=(decode_specs(prepared, model, tensor), PartitionSpec()),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    tokens = jax.random.randint(jax.random.key(2), (2, 7), 0, vocab)
    return jax.jit(mapped).lower(prepared, tokens), (prepared, tokens)


def _flops(program):
    return program.cost_analysis()["flops"]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("tensor", "vocab", "change"),
    [
        pytest.param(4, VOCAB, {}, id="every device has two heads and their keys"),
        pytest.param(4, VOCAB, {"kv_heads": 2, "tied": False}, id="two devices a group"),
        pytest.param(
            4, VOCAB, {"kv_heads": 1, "qkv_bias": True, "qk_norm": True}, id="one group for all"
        ),
        pytest.param(4, VOCAB - 1, {"heads": 6, "kv_heads": 6}, id="the MLP alone is shared"),
        pytest.param(8, VOCAB, {"mlp": 250, "kv_heads": 4}, id="the MLP is not shared"),
    ],
)
def test_devices_that_share_heads_give_the_logits_of_one(tensor, vocab, change):
    model = dataclasses.replace(MODEL, **change)
    lowered, arguments = _decoding(model, vocab, 1)
    alone = lowered.compile()
    lowered, shared_arguments = _decoding(model, vocab, tensor)
    shared = lowered.compile()
    expected = alone(*arguments)
    assert expected.shape == (2, 7, vocab)
    np.testing.assert_allclose(shared(*shared_arguments), expected, atol=2e-5)

    # Before compilation: XLA joins sums of the two steps.
    text = lowered.as_text()
    shared_parts = [model.heads % tensor == 0, model.mlp % tensor == 0]
    assert text.count("stablehlo.all_reduce") == sum(shared_parts) * model.layers * 2
    assert text.count("stablehlo.all_gather") == 2 * (vocab % tensor == 0)
    if not change:
        assert _flops(shared) <= 0.3 * _flops(alone)


@pytest.mark.thorough
def test_devices_share_a_loop_over_layers_too(monkeypatch):
    """The form for TPU, whose parameters are stacked, with its kernel interpreted."""
    monkeypatch.setattr(cache_tpu, "over", functools.partial(cache_tpu.over, interpret=True))
    model = dataclasses.replace(MODEL, kv_heads=2, qkv_bias=True)
    lowered, arguments = _decoding(model, VOCAB, 1)
    expected = lowered.compile()(*arguments)
    lowered, arguments = _decoding(model, VOCAB, 4, tpu=True)
    np.testing.assert_allclose(lowered.compile()(*arguments), expected, atol=2e-5)
    assert lowered.as_text().count("stablehlo.all_reduce") == 2 * 2, "of one layer, in two steps"


def _rollout(model, axes):
    """The rollout on a mesh, and its arguments."""
    mesh = make_mesh(*axes)
    rollout = make_policy_rollout(model, LIMITS, SCHEDULE, mesh)
    params = place_whole(init_params(model, 32, jax.random.key(0)), mesh)
    ids = [[1, 12 + tree, 20] for tree in range(TREES)]
    prompts = make_prompts(ids, 4, temperature=1.0, children=[2, 0] * (TREES // 2))
    return rollout, (params, prompts, jax.random.key(3))


@pytest.mark.thorough
def test_trees_of_shared_heads_are_those_of_one_device():
    """Two shards of four devices, whose loops end at different times."""
    model = dataclasses.replace(MODEL, layers=1, width=32, kv_heads=2, mlp=64)
    rollout, arguments = _rollout(model, (1, 1, 1))
    expected = jax.device_get(rollout(*arguments)[0])
    assert expected.children.sum() > 0
    assert expected.total_tokens.sum() > 100
    rollout, arguments = _rollout(model, (2, 1, 4))
    forest, work = jax.device_get(rollout(*arguments))
    assert work.steps[0] != work.steps[1]
    for field in dataclasses.fields(expected):
        mine, theirs = getattr(forest, field.name), getattr(expected, field.name)
        if field.name == "logprob":
            np.testing.assert_allclose(mine, theirs, atol=1e-5)
        else:
            np.testing.assert_array_equal(mine, theirs, err_msg=field.name)


@pytest.mark.thorough
def test_weights_are_gathered_in_the_type_of_the_computation(tmp_path):
    """Read off the program as it was split over the devices. Later the compiler of CPUs computes
    everything in float32.
    """
    model = ModelConfig(
        layers=1, width=32, heads=8, kv_heads=8, head_size=4, mlp=64, dtype="bfloat16"
    )
    mesh = make_mesh(1, 8, 1)
    params = place_whole(init_params(model, 48, jax.random.key(0)), mesh)
    whole = PartitionSpec()
    gather = jax.shard_map(
        lambda prepared: prepared, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False
    )

    def prepare_and_gather(params):
        return gather(cast_and_prepare(params, model, mesh))

    # A name that no other run had: a program that comes from the cache is not written out.
    prepare_and_gather.__name__ += f"_{time.time_ns()}"
    prepare = jax.jit(prepare_and_gather)
    options = {
        "xla_dump_to": str(tmp_path),
        "xla_dump_hlo_as_text": True,
        "xla_dump_hlo_pass_re": "spmd-partitioning",
    }
    compiled = prepare.lower(params).compile(options)
    (written,) = tmp_path.glob("*after_spmd-partitioning*")

    sizes = {"bf16": [], "f32": []}
    for kind, shape in re.findall(r"= (\w+)\[([\d,]*)\]\S* all-gather\(", written.read_text()):
        sizes[kind].append(int(np.prod([int(size) for size in shape.split(",")])))
    assert len(sizes["bf16"]) >= 6, "the matrices of a layer and the embedding"
    assert sum(sizes["bf16"]) >= 48 * 32 + 4 * 32 * 32 + 3 * 32 * 64, "each of them whole"
    assert set(sizes["f32"]) <= {model.width}, "norms alone"

    expected = prepare_decode(jax.device_get(params), model)
    expected["embed"] = expected["embed"].astype(model.dtype)
    jax.tree.map(np.testing.assert_array_equal, compiled(params), expected)
