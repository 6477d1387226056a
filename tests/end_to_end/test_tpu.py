"""Programs compiled for TPU chips on this machine. Attention: nothing L x L, and chips exchange nothing.
The rollout on 128 chips: they exchange nothing, no host, no hidden copy of the cache; a decode step
moves what is live and no more.

Needs the extra [tpu] (`make test-tpu` installs it) and no TPU. In a process of its own: libtpu is
loaded once, at JAX's start.
"""

import importlib.util
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from apr_jax.plan.hlo import parse

ROOT = Path(__file__).parents[2]
_ATTENTION = """
import json
import sys
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from apr_jax.model.attention.packed import attend_packed
from apr_jax.model.sharding import BATCH_AXES, make_mesh
from apr_jax.plan.topology import describe

LENGTH, HEAD_SIZE = map(int, sys.argv[2:])
mesh = make_mesh(data=1, fsdp=2, tensor=2, devices=describe(sys.argv[1]))
rows, heads = PartitionSpec(BATCH_AXES), PartitionSpec(BATCH_AXES, "tensor")

def of(spec, dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

def grads(q, k, v, segment, hidden_block):
    out = lambda *x: attend_packed(*x, segment, hidden_block, mesh).astype(jnp.float32)
    return jax.grad(lambda *x: jnp.sum(out(*x) ** 2), (0, 1, 2))(q, k, v)

x = (
    of(PartitionSpec(BATCH_AXES, None, "tensor"), jnp.bfloat16, 2, LENGTH, 8, HEAD_SIZE),
    of(heads, jnp.bfloat16, 2, 4, LENGTH, HEAD_SIZE),
    of(heads, jnp.bfloat16, 2, 4, LENGTH, HEAD_SIZE),
    of(rows, jnp.int32, 2, LENGTH),
    of(rows, jnp.int32, 2, LENGTH),
)
compiled = jax.jit(grads).lower(*x).compile()
print(json.dumps({"program": compiled.as_text(), "temporary": compiled.memory_analysis().temp_size_in_bytes}))
"""
_STEP = """
import json
import math
import sys
import jax
from apr_jax.config import load
from apr_jax.train.session import build_mesh
from apr_jax.plan.programs import abstract_params, lower
from apr_jax.plan.topology import describe

config = load("experiments/paper.py", ["model.layers=2", "train.sft.batch_rows=16", "train.rl.micro_batch_rows=16"])
params = abstract_params(config, vocab=78)
compiled = lower(sys.argv[1], config, params, build_mesh(config, describe("v4:2x2x4"))).compile()

def parts(shardings, leaves):
    pairs = zip(jax.tree.leaves(shardings), jax.tree.leaves(leaves), strict=True)
    return [[math.prod(leaf.shape), math.prod(sharding.shard_shape(leaf.shape))] for sharding, leaf in pairs]

state = compiled.args_info[0][0]
print(json.dumps({
    "inputs": parts(compiled.input_shardings[0][0], state),
    "outputs": parts(compiled.output_shardings[0], state),
    "program": compiled.as_text(),
}))
"""
_CODE = """
import json
import jax
from apr_jax.config import load
from apr_jax.model.sharding import make_mesh
from apr_jax.plan.programs import abstract_params, lower_rollout
from apr_jax.plan.topology import describe

config = load("experiments/mini.py", ["train.rl.problems=64", "train.rl.group=16", "schedule.slots=64"])
mesh = make_mesh(devices=describe("v5e:8x16"))
params = abstract_params(config, vocab=78)
compiled = lower_rollout(config, params, mesh).compile()
memory, model = compiled.memory_analysis(), config.model
columns = model.kv_heads * model.head_size  # Registers are 128 wide.
print(json.dumps({
    "devices": mesh.size,
    "program": compiled.as_text(),
    "temporary": memory.temp_size_in_bytes,
    "forest": memory.output_size_in_bytes,
    "weights": sum(4 * leaf.size for leaf in jax.tree.leaves(params)),
    "cache": 2 * 4 * model.layers * config.schedule.slots * config.limits.window * -(-columns // 128) * 128,
}))
"""


_ROLLOUT = """
import json
from apr_jax.config import load
from apr_jax.train.session import build_mesh
from apr_jax.plan.plan import compile_text
from apr_jax.plan.programs import abstract_params, lower
from apr_jax.plan.topology import describe

config = load("experiments/paper.py", ["model.layers=2"])
mesh = build_mesh(config, describe("v4:2x2x4"))
lowered = lower("rollout", config, abstract_params(config, vocab=78), mesh)
print(json.dumps({"program": compile_text(lowered)[0]}))
"""
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.tpu,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra [tpu]"),
]


def compiled(code, *arguments):
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


def planned(tmp_path, topology, *flags):
    path = tmp_path / "plan.json"
    command = (
        "plan",
        "--config",
        "experiments/paper.py",
        "--topology",
        topology,
        "--json",
        str(path),
        *flags,
    )
    run = subprocess.run(
        [sys.executable, "-m", "apr_jax", *command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=900,
    )
    return run.returncode, run.stdout + run.stderr, json.loads(path.read_text())


def array_sizes(program):
    """Numbers of each array in the text of a program."""
    return [
        math.prod(map(int, shape.split(","))) for shape in re.findall(r"\w\[([\d,]+)\]", program)
    ]


@pytest.mark.parametrize("topology", ["v3:4x4", "v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_training_attention_at_4096(topology):
    """Each chip has one row and four heads of 4,096 columns: as large as a sixteenth of one head's
    scores.
    """
    found = compiled(_ATTENTION, topology, "4096", "64")
    sizes = array_sizes(found["program"])
    assert 4 * 64 * 4096 in sizes
    assert max(sizes) < 4096 * 4096 / 8
    assert found["temporary"] < 2 * 4096 * 4096  # One head's scores in bfloat16.
    assert found["program"].count('custom_call_target="tpu_custom_call"') == 2
    for word in _COLLECTIVES:
        assert word not in found["program"], word


@pytest.mark.parametrize(
    ("topology", "head_size"),
    [("v3:4x4", 64), ("v4:2x2x1", 128), ("v5e:2x2", 64), ("v5e:2x2", 128), ("v6e:2x2", 256)],
)
def test_training_attention_at_131_072(topology, head_size):
    """Each chip has one row and four heads. VMEM holds the blocks of forward and backward pass, or
    they do not compile; the chips of v3 have the least, 16 MiB a core.
    """
    found = compiled(_ATTENTION, topology, "131072", str(head_size))
    program = found["program"]
    assert max(array_sizes(program)) == 4 * head_size * 131_072  # Of one head, all scores are more.
    assert program.count('custom_call_target="tpu_custom_call"') == 2
    for word in _COLLECTIVES:
        assert word not in program, word


@pytest.mark.parametrize("program", ["supervised", "update"])
def test_supervised_step_keeps_nothing_whole_on_every_chip(program):
    """Two layers of the paper's on 2 x 8 chips: each holds an eighth of all but norms and passes on
    only weights, gradients.
    """
    found = compiled(_STEP, program)
    for size, part in found["inputs"] + found["outputs"]:
        assert part * 8 == size or size <= 2 * 1024, (size, part)
    assert len(found["inputs"]) >= len(found["outputs"]) > 3 * 9
    collective_costs = re.findall(
        rf"= (.*?) (?:{'|'.join(_COLLECTIVES)})(?:-start)?\(", found["program"]
    )
    sizes = [
        math.prod(map(int, shape.split(",")))
        for cost in collective_costs
        for shape in re.findall(r"\w\[([\d,]+)\]", cost)
    ]
    assert max(sizes) == 1_024 * 2 * 2_752  # The largest weight of a layer.
    # Columns of a row: no activation leaves its chip.
    assert not any("4608" in cost for cost in collective_costs)


def test_sharded_weights_are_gathered_before_the_rollout():
    """They are never gathered within its loops.

    The model has two layers of the paper's, with weights in eighths.
    """
    computations, entry = parse(compiled(_ROLLOUT)["program"])
    begun = [one for one in computations[entry].values() if one.kind.startswith("all-gather")]
    assert begun  # Else this reads the program wrongly.
    left = [
        name for one in computations[entry].values() if one.kind == "while" for name in one.called
    ]
    looped: set[str] = set()
    while left:
        name = left.pop()
        if name not in looped:
            looped.add(name)
            left += [called for one in computations[name].values() for called in one.called]
    kinds = {one.kind for name in looped for one in computations[name].values()}
    assert {"while", "convolution"} <= kinds  # A product is a convolution to the TPU's compiler.
    assert not [kind for kind in kinds if kind.startswith(_COLLECTIVES)]


def test_a_plan_from_the_command_line(tmp_path):
    """Two layers of the paper's on a v4 slice: fits, at half of the peak or more; without room its
    status says so.
    """
    few = ("--set", "model.layers=2", "--set", "train.sft.batch_rows=64", "--program", "supervised")
    for topology in ("v4:2x2x4", "v5p:2x2x4"):
        status, said, found = planned(tmp_path, topology, *few)
        stage = found["stages"]["supervised"]
        assert status == 0 and "fits" in said and "supervised step by chips" in said
        assert stage["fits"] and stage["share_of_peak"] >= 0.5 and stage["bound"] == "compute"
        assert found["mesh"] == {"data": 2, "fsdp": 8, "tensor": 1} and found["recipes"] == {}
    status, said, found = planned(
        tmp_path, "v4:2x2x1", "--set", "mesh.fsdp=1", *few, "--set", "train.sft.batch_rows=1024"
    )
    assert (
        status == 1
        and "does not compile" in said
        and "does not fit; --set model.remat=layer" in " ".join(said.split())
    )


# v4 and v6e keep as much on the chip as v5e.
@pytest.mark.parametrize("topology", ["v3:4x4", "v5e:4x4", "v5p:2x2x2"])
def test_decode_step_moves_little_beyond_weights_and_cache(tmp_path, topology):
    """Two layers of the paper's: at most 1.3 times that, from contexts of a few hundred tokens
    on.
    """
    status, said, found = planned(
        tmp_path, topology, "--set", "model.layers=2", "--program", "rollout"
    )
    stage = found["stages"]["rollout"]
    assert status == 0 and stage["fits"] and "decode step, contexts of 512" in said
    assert set(stage["decode"]) == {"256", "512", "1024", "2048", "4096"}
    for moved, must in stage["decode"].values():
        assert 0.5 * must < moved <= 1.3 * must


def test_the_rollout_on_128_chips():
    found = compiled(_CODE)
    assert found["devices"] == 128
    for word in _COLLECTIVES:
        assert word not in found["program"], word
    for word in ("callback", "infeed", "outfeed"):
        assert word not in found["program"], word
    assert found["temporary"] <= 1.2 * (found["weights"] + found["cache"] + found["forest"])
