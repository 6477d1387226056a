"""How every test runs: eight simulated devices, shapes and types checked at each call, compiled programs kept on disk."""

import os
import sys
from pathlib import Path

# Before JAX is imported: the number of simulated devices can't change afterwards.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("APR_CACHE", str(Path(__file__).parents[1] / ".cache" / "xla"))

# Helpers that stand beside the tests (scripted.py, small_data.py) are imported by name.
for _folder in ("", "threads", "data"):
    sys.path.insert(0, str(Path(__file__).parent / _folder))

from jaxtyping import install_import_hook

# Shapes and types are checked at each call where a shape error would broadcast silently (the threads run on numpy too).
_CHECKED = ("model", "learn.objective")
install_import_hook([f"apr_jax.{module}" for module in _CHECKED], "checking.check")

from apr_jax.runtime import keep_compiled

keep_compiled()
