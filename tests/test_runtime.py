"""What every command does before JAX works, seen from a process of its own: the cache of compiled programs, and devices."""

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json, os, sys
os.sched_getaffinity = lambda process: range(int(sys.argv[1]))
from apr_jax.runtime import start
start()
import jax, jax.monitoring
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
jax.jit(lambda x: x * 2 + 1)(1.0).block_until_ready()
print(json.dumps({"devices": jax.device_count(), "hit": "/jax/compilation_cache/cache_hits" in events}))
"""


def _start(home, cores=1, **settings):
    """A process at home in `home` on so many cores, without what this one inherited; what it says."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("APR_", "JAX_", "XLA_"))}
    environment |= {"HOME": str(home), "JAX_PLATFORMS": "cpu"} | settings
    ended = subprocess.run([sys.executable, "-c", SCRIPT, str(cores)], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def test_programs_are_kept_without_being_asked_and_a_second_start_takes_them(tmp_path):
    kept = tmp_path / ".cache" / "apr_jax"
    assert not _start(tmp_path)["hit"] and any(kept.iterdir())
    assert _start(tmp_path)["hit"]


def test_programs_are_kept_where_the_user_says_or_nowhere(tmp_path):
    mine = tmp_path / "mine"
    _start(tmp_path, APR_CACHE=str(mine))
    assert any(mine.iterdir())
    assert not _start(tmp_path, APR_CACHE="off")["hit"]
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


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
def test_every_core_is_a_device_unless_the_user_says_otherwise(cores, settings, devices, tmp_path):
    """Up to 8 and a power of two, so that batches divide."""
    assert _start(tmp_path, cores=cores, APR_CACHE="off", **settings)["devices"] == devices
