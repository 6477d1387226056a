"""The transformer as a policy: what travels between devices before a rollout."""

import re

import jax
import numpy as np
from jax.sharding import PartitionSpec

from apr_jax.model.config import ModelConfig
from apr_jax.model.sharding import make_mesh
from apr_jax.model.transformer import init_params, prepare_decode
from apr_jax.train.policy import cast_and_prepare
from apr_jax.train.step import place_whole


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
    prepare = jax.jit(lambda params: gather(cast_and_prepare(params, model, mesh)))
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
