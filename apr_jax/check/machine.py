"""Versions of the packages, devices and their memory."""

import importlib.metadata
import os
import platform
from collections import Counter
from typing import Any

import jax

import apr_jax
from apr_jax.check.findings import Finding

# Those that compute; the CUDA plug-ins and libtpu are there on their machines only.
_PACKAGES = (
    "jax",
    "jaxlib",
    "libtpu",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
)


def check_versions() -> Finding:
    """Lists the versions of Python and the packages, which all processes must share."""
    versions = {"apr_jax": apr_jax.__version__, "Python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    text = ", ".join(f"{name} {version}" for name, version in versions.items())
    return Finding("versions", "ok", text, figures=versions, facts=versions)


def check_devices() -> Finding:
    """Lists the devices and their memory; no device may be nearly full before a run begins."""
    devices = jax.local_devices()
    kinds = Counter(f"{device.platform} ({device.device_kind})" for device in devices)
    text = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    if jax.process_count() > 1:
        text = f"{jax.process_count()} processes, each with {text}"

    memory = [device_memory(device) for device in devices]
    figures = {
        "processes": jax.process_count(),
        "devices": dict(kinds),
        "memory": [total for total, _ in memory],
        "free": [free for _, free in memory],
    }
    total, free = min(memory, key=lambda pair: pair[1])
    shared = " for all of them together" if devices[0].platform == "cpu" else " each"
    text += f"; {total / 2**30:.1f} GiB{shared}, {free / 2**30:.1f} GiB free"
    if free < total / 2 and devices[0].platform != "cpu":
        text += ": another program holds the rest; end it"
        return Finding("devices", "fault", text, figures=figures, facts={"devices": dict(kinds)})
    return Finding("devices", "ok", text, figures=figures, facts={"devices": dict(kinds)})


def device_memory(device: Any) -> tuple[int, int]:
    """Returns the bytes of a device's memory, all and those that are free.

    A CPU device has the memory of the machine.
    """
    statistics = device.memory_stats() or {}
    if device.platform != "cpu" and "bytes_limit" in statistics:
        total = statistics["bytes_limit"]
        return total, total - statistics.get("bytes_in_use", 0)
    page = os.sysconf("SC_PAGE_SIZE")
    return page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
