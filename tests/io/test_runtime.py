"""What every command does before JAX works, seen from a process of its own: the cache of compiled
programs, and devices.
"""

import json
import os
import subprocess
import sys

import jax
import pytest

from apr_jax.errors import UsageError, UserError
from apr_jax.io import runtime

SCRIPT = """
import json, os, sys
os.sched_getaffinity = lambda process: range(int(sys.argv[1]))
from apr_jax.io.runtime import start
start()
import jax, jax.monitoring
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
jax.jit(lambda x: x * 2 + 1)(1.0).block_until_ready()
hit = "/jax/compilation_cache/cache_hits" in events
print(json.dumps({"devices": jax.device_count(), "hit": hit}))
"""


def _start(home, cores=1, **settings):
    """A process at home in `home` on so many cores, without what this one inherited; what it
    says.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("APR_", "JAX_", "XLA_"))
    }
    environment |= {"HOME": str(home), "JAX_PLATFORMS": "cpu"} | settings
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(cores)], env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def test_second_start_takes_the_compiled_programs(tmp_path):
    """They are kept without being asked for."""
    kept = tmp_path / ".cache" / "apr_jax"
    assert not _start(tmp_path)["hit"] and any(kept.iterdir())
    assert _start(tmp_path)["hit"]


@pytest.mark.thorough
def test_programs_are_kept_where_the_user_says_or_nowhere(tmp_path):
    mine = tmp_path / "mine"
    _start(tmp_path, APR_CACHE=str(mine))
    assert any(mine.iterdir())
    assert not _start(tmp_path, APR_CACHE="off")["hit"]
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("cores", "settings", "devices"),
    [
        (1, {}, 1),
        (2, {}, 2),
        (3, {}, 2),
        (64, {}, 8),
        (2, {"JAX_NUM_CPU_DEVICES": "3"}, 3),
        (2, {"XLA_FLAGS": "--xla_force_host_platform_device_count=5"}, 5),
    ],
)
def test_every_core_is_a_device_by_default(cores, settings, devices, tmp_path):
    """Up to 8 and a power of two, so that batches divide."""
    assert _start(tmp_path, cores=cores, APR_CACHE="off", **settings)["devices"] == devices


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        (
            "jax_enable_x64",
            True,
            "JAX_ENABLE_X64=True: weights and checkpoints are of 32-bit numbers; unset",
        ),
        ("jax_disable_jit", True, "JAX_DISABLE_JIT=True: "),
        ("jax_numpy_rank_promotion", "raise", "JAX_NUMPY_RANK_PROMOTION=raise: "),
        ("jax_numpy_dtype_promotion", "strict", "JAX_NUMPY_DTYPE_PROMOTION=strict: "),
        ("jax_transfer_guard", "disallow", "JAX_TRANSFER_GUARD=disallow: "),
        (
            "jax_transfer_guard_device_to_host",
            "disallow",
            "JAX_TRANSFER_GUARD_DEVICE_TO_HOST=disallow: ",
        ),
    ],
)
def test_unusable_jax_settings_are_refused_by_name(name, value, told):
    """Were JAX_ENABLE_X64 not refused, the first save would end the run: KeyError: 8."""
    runtime.check_settings()
    old = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        with pytest.raises(UsageError, match=told):
            runtime.check_settings()
    finally:
        jax.config.update(name, old)


@pytest.mark.parametrize(
    ("settings", "status", "told"),
    [
        (
            {"JAX_PLATFORMS": "cuda", "CUDA_VISIBLE_DEVICES": ""},
            1,
            "JAX_PLATFORMS=cuda: no such device can be used here (",
        ),
        ({"JAX_ENABLE_X64": "1"}, 2, "JAX_ENABLE_X64=1: weights"),
    ],
)
def test_the_environment_is_told_of_in_one_line(tmp_path, settings, status, told):
    """Before anything is read or written: by `apr report`, as by every command that uses JAX."""
    environment = os.environ | {"APR_CACHE": "off"} | settings
    command = [sys.executable, "-m", "apr_jax", "report", str(tmp_path)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    (line,) = ended.stderr.splitlines()
    assert ended.returncode == status
    assert line.startswith(f"apr: error: {told}")


@pytest.mark.parametrize(
    "error", [RuntimeError("Unable to initialize backend 'tpu': it is in use"), AssertionError()]
)
def test_missing_device_is_named_before_reading_files(monkeypatch, error):
    def failing():
        raise error

    monkeypatch.setattr(jax, "devices", failing)
    with pytest.raises(UserError, match="JAX_PLATFORMS=cpu"):
        runtime.check_devices()
