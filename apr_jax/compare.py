"""Comparison of two configs: the fields in which they differ.

A run in a folder can only go on with the config that it was begun with. If it is started again with
another one, the refusal names the fields that differ.
"""

import contextlib
from collections.abc import Iterable
from typing import Any

from apr_jax.config import ConfigError, Experiment, flatten_fields, from_dict, to_dict

# Fields that may change when a run goes on, or beginnings of their names. They decide where and how
# fast it runs, what it shows and tells, and which step is its best, but not what it learns.
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
    # What a step keeps for its backward pass, and how many rows it takes at a time.
    "model.remat",
    "train.rl.micro_batch_rows",
    # What an export tells other programs.
    "model.max_positions",
    "train.hang_",
    "train.tracker",
    *(
        f"train.rl.reward.{field}"
        for field in ("time_limit", "memory_limit", "workers", "max_unknown")
    ),
)

# Fields that say how long a training is. A training may go on as a longer one. Evaluations may not:
# they belong to the training as it was.
LENGTHS = ("train.sft.steps", "train.sft.epochs", "train.rl.steps")


def differences(
    old: dict[str, Any], new: Experiment, free: Iterable[str] = ()
) -> list[tuple[str, Any, Any]]:
    """Returns the fields in which two configs differ, sorted: (name, old value, new value).

    Args:
      old: JSON of a config. A field that it lacks counts as having had its default.
      new: the other config.
      free: names, or beginnings of names, of fields that may differ.
    """
    # Reading the old config fills in its defaults. It cannot be read if it has fields that do not
    # exist any more; then it is compared as it is.
    with contextlib.suppress(ConfigError):
        old = to_dict(from_dict(old))

    before = flatten_fields(old)
    now = flatten_fields(to_dict(new))
    return [
        (name, before.get(name), now.get(name))
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and not name.startswith(tuple(free))
    ]
