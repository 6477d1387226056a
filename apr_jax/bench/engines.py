"""Measures our engine against other engines, with the same weights: `apr bench rollout`.

The other engines (peers) are those of the extra [bench] that are installed. Each of them runs in a
process of its own.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

from apr_jax.bench import plain_decoding, trees
from apr_jax.bench.paired import Result, measured
from apr_jax.bench.peers import installed, opened
from apr_jax.errors import UsageError
from apr_jax.model.transformer import init_params
from apr_jax.train.checkpoint.restored import Restored

# Numbers of children of the trees whose latency is measured, and the number of trees.
_LATENCY_CHILDREN = (1, 2, 4, 8, 16)
_LATENCY_TREES = 8


def bench_rollout(
    restored: Restored | None, problems: Path | None, peers: Sequence[str], repeats: int
) -> Iterator[Result]:
    """Measures and prints part after part.

    Args:
      restored: a checkpoint that grows thread trees; None measures plain decoding only.
      problems: a file of problems that it answers; None measures plain decoding only.
      peers: names of other engines; empty takes all that are installed.
      repeats: measured repeats of each part.

    Raises:
      UsageError: the number of problems is no multiple of the number of devices.
    """
    if restored is not None and problems is not None:
        ids = trees.prompts_of(restored, problems)
        if not ids or len(ids) % jax.device_count():
            raise UsageError(
                f"{problems}: has {len(ids)} problems, must have a multiple of"
                f" {jax.device_count()}, the devices"
            )

    # Plain decoding of models with random weights.
    names = list(peers) or installed()
    for shape, config in plain_decoding.SHAPES.items():
        params = init_params(config, plain_decoding.VOCAB, jax.random.key(0))
        with opened(names, params, config) as others:
            for batch in plain_decoding.BATCHES:
                contestants = [
                    *plain_decoding.contest(shape, params, batch, others),
                    *plain_decoding.machine(shape, batch),
                ]
                yield measured(f"decode {shape}, batch {batch}", contestants, repeats)
    if restored is None or problems is None:
        return

    # Whole thread trees.
    with opened(names, restored.params, restored.config.model) as others:
        loops = [trees.host_loop(peer, restored.config.limits, ids) for peer in others]
        contestants = [trees.engine(restored, ids), *loops, trees.lone_roots(restored, ids)]
        yield measured(f"{len(ids)} thread trees", contestants, repeats)

    # Latency of one tree at a time.
    for children in _LATENCY_CHILDREN:
        contest = trees.latency(restored, ids[:_LATENCY_TREES], children)
        yield measured(f"latency of a tree with {children} children", contest, repeats)
