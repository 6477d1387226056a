"""Any number of trees through one rollout of fixed shape, batch after batch, compiled once.

The life of a batch:
1. The next `batch` trees are cut out of the prompts. The last batch is filled up with copies of the
   last tree, which are thrown away afterwards.
2. The batch is sent to the device before the batch in front of it is fetched, so that the device
   works while the host verifies and writes.
3. The caller gets the batch's forest, with the number of its first tree.

A caller that stores what it gets can be interrupted at any time: `done`, the number of stored
trees, is where a second start goes on. A tree does not depend on the batch it is decoded in, so an
interrupted stream gives the same trees as an unbroken one.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from apr_jax.io.stage_line import Bars
from apr_jax.threads import Prompts, ThreadForest, Work

Rollout = Callable[[Any, Prompts, jax.Array], tuple[ThreadForest, Work]]

_RATES = (
    "{task.fields[trees]:,.1f} trees/s, {task.fields[tokens]:,.0f} tokens/s, decode slots"
    " {task.fields[live]:.0%} full"
)


def stream(
    rollout: Rollout,
    params: Any,
    prompts: Prompts,
    key: jax.Array,
    *,
    batch: int,
    slots: int,
    done: int = 0,
    progress: bool = True,
    label: str = "rollout",
) -> Iterator[tuple[int, ThreadForest]]:
    """Yields (number of the first tree, forest with numpy leaves) until all trees are decoded.

    Args:
      rollout: decodes one batch, as the functions of `train.policy.make_policy_rollout` do.
      params: the model's parameters.
      prompts: the prompts of all N trees, numpy leaves. Each tree has its own identity.
      key: a typed PRNG key, the same for all batches.
      batch: trees of one call; a multiple of the number of the mesh's data shards.
      slots: decode slots of one shard, for the occupancy that is shown.
      done: number of trees, from the first on, that are decoded already.
      progress: whether to show trees/s, tokens/s, occupancy and the time left on standard error.
      label: name of the bar.
    """
    total = len(prompts.length)
    columns = (
        TextColumn(label),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn(_RATES),
        TimeRemainingColumn(),
    )
    with Bars(*columns, shown=progress) as bar:
        shown = bar.add_task("", total=total, completed=done, trees=0.0, tokens=0.0, live=0.0)
        tokens = 0
        start = bar.get_time()

        next_result = _send(rollout, params, prompts, key, batch, done) if done < total else None
        for first in range(done, total, batch):
            result = next_result
            if first + batch < total:
                next_result = _send(rollout, params, prompts, key, batch, first + batch)
            forest, work = jax.device_get(result)

            trees = min(batch, total - first)
            forest = jax.tree.map(lambda field, trees=trees: field[:trees], forest)
            tokens += int(forest.total_tokens.sum())
            seconds = max(bar.get_time() - start, 1e-9)
            bar.update(
                shown,
                completed=first + trees,
                trees=(first + trees - done) / seconds,
                tokens=tokens / seconds,
                live=float(np.sum(work.live) / max(1, np.sum(work.steps) * slots)),
            )
            yield first, forest


def _send(
    rollout: Rollout, params: Any, prompts: Prompts, key: jax.Array, batch: int, first: int
) -> Any:
    """Starts the rollout of the batch whose first tree is `first`, without waiting for it."""
    last = len(prompts.length) - 1
    trees = np.minimum(np.arange(first, first + batch), last)
    fields = {
        field.name: getattr(prompts, field.name)[trees] for field in dataclasses.fields(Prompts)
    }
    return rollout(params, Prompts(**fields), key)
