"""`apr bench rollout`: the engine against engines that people use, in one run, by turns, on the
same weights.

Peers are those of the extra [bench] that are installed; each runs in a process of its own.
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

_LATENCY_CHILDREN = (1, 2, 4, 8, 16)
_LATENCY_TREES = 8


def bench_rollout(
    restored: Restored | None, problems: Path | None, peers: Sequence[str], repeats: int
) -> Iterator[Result]:
    """Measures and prints part after part.

    Args:
      restored: a checkpoint of thread trees, and `problems`, a file that it answers; without them
        only plain decoding is measured.
      peers: names; empty for all that are installed.
    """
    if restored is not None and problems is not None:
        ids = trees.prompts_of(restored, problems)
        if not ids or len(ids) % jax.device_count():
            raise UsageError(
                f"{problems}: has {len(ids)} problems, must have a multiple of"
                f" {jax.device_count()}, the devices"
            )
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
    with opened(names, restored.params, restored.config.model) as others:
        loops = [trees.host_loop(peer, restored.config.limits, ids) for peer in others]
        yield measured(
            f"{len(ids)} thread trees",
            [trees.engine(restored, ids), *loops, trees.lone_roots(restored, ids)],
            repeats,
        )
    for children in _LATENCY_CHILDREN:
        contest = trees.latency(restored, ids[:_LATENCY_TREES], children)
        yield measured(f"latency of a tree with {children} children", contest, repeats)
