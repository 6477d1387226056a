"""The rollout, compiled for 128 TPU chips on this machine: no word between them, no host, no hidden copy of the cache.

Needs the extra [tpu] (`make test-all` installs it) and no TPU. In a process of its own: libtpu is loaded once, at JAX's start.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_CODE = """
import json
import jax
from apr_jax.config import load
from apr_jax.model.sharding import make_mesh
from apr_jax.model.transformer import init_params
from apr_jax.plan import VOCAB, describe, lower_rollout

config = load("experiments/mini.py", ["learn.rl.problems=64", "learn.rl.group=16", "schedule.lanes=64"])
mesh = make_mesh(devices=describe("v5e:8x16"))
params = jax.eval_shape(lambda: init_params(config.model, VOCAB, jax.random.key(0)))
compiled = lower_rollout(config, params, mesh).compile()
memory, model = compiled.memory_analysis(), config.model
print(json.dumps({
    "devices": mesh.size,
    "program": compiled.as_text(),
    "temporary": memory.temp_size_in_bytes,
    "forest": memory.output_size_in_bytes,
    "weights": sum(4 * leaf.size for leaf in jax.tree.leaves(params)),
    "cache": 2 * 4 * model.layers * config.schedule.lanes * config.limits.window * model.kv_heads * model.head_size,
}))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra [tpu]")
def test_the_rollout_on_128_chips():
    run = subprocess.run([sys.executable, "-c", _CODE], capture_output=True, text=True, cwd=ROOT, timeout=900)
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["devices"] == 128
    for word in ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"):
        assert word not in found["program"], word
    for word in ("callback", "infeed", "outfeed"):
        assert word not in found["program"], word
    assert found["temporary"] <= 1.2 * (found["weights"] + found["cache"] + found["forest"])
