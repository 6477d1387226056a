"""The devices of a TPU topology, as libtpu describes them on a machine that has none."""

import importlib.metadata
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from apr_jax.errors import UsageError, UserError
from apr_jax.plan.chips import CHIPS

_LIBTPU = (0, 0, 52)  # The compilers of older versions abort on the rollout's loop.


def describe(topology: str) -> list[Any]:
    """Lists the devices of a topology.

    Raises:
      UsageError: the topology is unknown; the message lists known ones.
      UserError: libtpu is missing or too old.
    """
    examples = ", ".join(chip.example for chip in CHIPS.values())
    name, _, shape = topology.partition(":")
    if name not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", shape):
        raise UsageError(
            f"--topology {topology!r}: write it as generation:chips, one of {examples}; or cpu"
        )
    _require_libtpu()
    # With these variables libtpu compiles only. Without them it would ask the cloud's metadata
    # server which machine it runs on, and take a lock.
    for variable, value in {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_MIN_LOG_LEVEL": "4",
    }.items():
        os.environ.setdefault(variable, value)
    # JAX read JAX_PLATFORMS when it was imported, before the line above could set it.
    jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
    cores = CHIPS[name].cores
    options = {"chip_config_name": cores} if cores else {}
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **options
        )
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition("; ")[0]
        raise UsageError(f"--topology {topology!r}: {reason}; good ones are {examples}") from None
    return list(description.devices)


def _require_libtpu() -> None:
    """Raises UserError if libtpu is missing or too old."""
    remedy = "pip install 'apr_jax[tpu]' (in the clone: .venv/bin/pip install -e '.[tpu]')"
    try:
        version = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"apr plan: libtpu is not installed, and it is what compiles for TPUs: {remedy}"
        ) from None
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:3])
    if numbers < _LIBTPU:
        wanted = ".".join(map(str, _LIBTPU))
        raise UserError(
            f"apr plan: libtpu {version} is too old, its compiler aborts; {wanted} or newer:"
            f" {remedy}"
        )
