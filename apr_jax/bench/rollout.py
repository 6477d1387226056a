"""`apr bench rollout`: the engine against engines that people use, in one run, by turns, on the same weights.

Peers are those of the extra [bench] that are installed; each runs in a process of its own.
"""

import contextlib
import importlib.util
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from rich.console import Console

from apr_jax.bench import decode, trees
from apr_jax.bench.measure import Contestant, Result, measure, show
from apr_jax.bench.peers import PEERS, Peer, open_peer
from apr_jax.errors import UsageError
from apr_jax.learn.checkpoint import Restored
from apr_jax.model.config import ModelConfig
from apr_jax.model.export import save_llama
from apr_jax.model.transformer import Params, init_params

_MODULES = {"transformers": "transformers", "llama.cpp": "llama_cpp", "vllm": "vllm"}
_LATENCY_CHILDREN = (1, 2, 4, 8, 16)
_LATENCY_TREES = 8


def bench_rollout(
    restored: Restored | None, problems: Path | None, peers: Sequence[str], repeats: int
) -> Iterator[Result]:
    """Measures and prints part after part.

    Args:
      restored: a checkpoint of thread trees, and `problems`, a file that it answers; without them only plain decoding is
        measured.
      peers: names; empty for all that are installed.
    """
    if restored is not None and problems is not None:
        ids = trees.prompts_of(restored, problems)
        if not ids or len(ids) % jax.device_count():
            raise UsageError(
                f"{problems}: has {len(ids)} problems, must have a multiple of {jax.device_count()}, the devices"
            )
    names = list(peers) or [name for name in PEERS if importlib.util.find_spec(_MODULES[name])]
    if not peers and (left := [name for name in PEERS if name not in names]):
        Console(stderr=True).print(f"without {', '.join(left)}: pip install 'apr_jax[bench]' brings them")
    for shape, config in decode.SHAPES.items():
        params = init_params(config, decode.VOCAB, jax.random.key(0))
        with opened(names, params, config) as others:
            for batch in decode.BATCHES:
                contestants = [*decode.contest(shape, params, batch, others), *decode.machine(shape, batch)]
                yield _measured(f"decode {shape}, batch {batch}", contestants, repeats)
    if restored is None or problems is None:
        return
    with opened(names, restored.params, restored.config.model) as others:
        loops = [trees.host_loop(peer, restored.config.limits, ids) for peer in others]
        yield _measured(
            f"{len(ids)} thread trees", [trees.engine(restored, ids), *loops, trees.lone_roots(restored, ids)], repeats
        )
    for children in _LATENCY_CHILDREN:
        contest = trees.latency(restored, ids[:_LATENCY_TREES], children)
        yield _measured(f"latency of a tree with {children} children", contest, repeats)


@contextlib.contextmanager
def opened(names: Sequence[str], params: Params, config: ModelConfig) -> Iterator[list[Peer]]:
    """The peers, on these weights."""
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise UsageError(f"--peer {unknown[0]}: there are {', '.join(PEERS)}")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        save_llama(params, config, Path(folder))
        yield [stack.enter_context(open_peer(name, Path(folder))) for name in names]


def _measured(part: str, contestants: Sequence[Contestant], repeats: int) -> Result:
    result = measure(part, contestants, repeats)
    show(result)
    return result
