"""Any number of trees through one rollout of fixed shape: one compilation, batch after batch, and
never an idle device.

The life of a batch:
1. The next trees are cut out of the prompts; the last batch is filled up with copies that are
   thrown away.
2. It is sent to the device before the one in front of it is fetched, so the device works while the
   host writes.
3. The caller gets the forest, with the number of its first tree. What it has stored by then is what
   an interruption keeps; `done` is where a second start goes on. A tree is the same in any batch,
   so an interrupted stream ends as an unbroken one.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from apr_jax.io.terminal import Terminal
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
      rollout: `make_rollout`'s, or another of its form.
      prompts: of all N trees, numpy leaves; every tree has its own identity.
      batch: trees of one call, at most N of them are asked at a time; a multiple of the mesh's data
        shards.
      decode slots: of one shard, for the occupancy shown.
      done: trees that are decoded already.
      progress: show trees/s, tokens/s, decode slot occupancy and the time left on standard error.
    """
    total = len(prompts.length)
    columns = (
        TextColumn(label),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn(_RATES),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Terminal(stderr=True), disable=not progress) as bar:
        shown = bar.add_task("", total=total, completed=done, trees=0.0, tokens=0.0, live=0.0)
        ahead = _send(rollout, params, prompts, key, batch, done) if done < total else None
        sampled, began = 0, bar.get_time()
        for begin in range(done, total, batch):
            following = begin + batch
            sent, ahead = ahead, None
            if following < total:
                ahead = _send(rollout, params, prompts, key, batch, following)
            forest, work = jax.device_get(sent)
            count = min(batch, total - begin)
            forest = jax.tree.map(lambda field, count=count: field[:count], forest)
            sampled += int(forest.total_tokens.sum())
            seconds = max(bar.get_time() - began, 1e-9)
            bar.update(
                shown,
                completed=begin + count,
                trees=(begin + count - done) / seconds,
                tokens=sampled / seconds,
                live=float(np.sum(work.live) / max(1, np.sum(work.steps) * slots)),
            )
            yield begin, forest


def _send(
    rollout: Rollout, params: Any, prompts: Prompts, key: jax.Array, batch: int, begin: int
) -> Any:
    chosen = np.minimum(np.arange(begin, begin + batch), len(prompts.length) - 1)
    part = {
        field.name: getattr(prompts, field.name)[chosen] for field in dataclasses.fields(Prompts)
    }
    return rollout(params, Prompts(**part), key)
