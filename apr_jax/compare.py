"""Which fields of two configs differ: a folder goes on with the config that it was begun with, and
says what is another.
"""

import contextlib
import json
from collections.abc import Iterable
from typing import Any

from apr_jax.config import ConfigError, Experiment, from_dict, to_dict

# Fields that a run may change when it goes on: they decide where and how fast it runs, what it
# shows, which step is its best.
FREE = (
    "mesh.",
    "schedule.",
    "evaluate.",
    *(
        f"train.{stage}.{field}"
        for stage in ("sft", "rl")
        for field in ("save_every", "validate_every", "validation")
    ),
    "train.sft.log_every",
    *(f"train.rl.reward.{field}" for field in ("time_limit", "memory_limit", "max_unknown")),
)
# How long it runs: what was evaluated belongs to the shorter one.
LENGTHS = ("train.sft.steps", "train.sft.epochs", "train.rl.steps")


def differences(
    old: dict[str, Any], new: Experiment, free: Iterable[str] = ()
) -> list[tuple[str, Any, Any]]:
    """The fields in which they differ, by name: (name, old value, new value).

    Args:
      old: JSON of a config; what it lacks had its default then.
      free: names, or beginnings of names, that may differ.
    """
    with contextlib.suppress(ConfigError):  # What no config has now stays, and differs.
        old = to_dict(from_dict(old))
    before, now = (_flatten(json.loads(json.dumps(values))) for values in (old, to_dict(new)))
    return [
        (name, before.get(name), now.get(name))
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and not name.startswith(tuple(free))
    ]


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= (
            _flatten(value, f"{prefix}{name}.")
            if isinstance(value, dict)
            else {prefix + name: value}
        )
    return flat
