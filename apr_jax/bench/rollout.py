"""Thread trees a second: the device engine against a host loop that generates round by round.

Both drive the same model, greedily, on the same number of lanes. The model's logits are overruled by a script
(`_script`), so that an untrained one writes trees of realistic, ragged shape; what it computes is all still computed.

The host loop is what one writes on top of a plain `generate`: all roots until each spawns or ends; then all children
of all trees, in batches; then the parents again, from their rewound contexts. Each batch waits for its slowest
thread, and each round for its slowest batch.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from apr_jax.bench.measure import Contestant
from apr_jax.config import Experiment
from apr_jax.errors import UsageError
from apr_jax.model.transformer import init_params, make_decode
from apr_jax.threads import Limits, Prompts, Schedule, tree_rollout
from apr_jax.threads import protocol as p

_KINDS = 4  # Roots think for different times before they spawn.
_ANSWER, _ROOT = 10, 11  # Text ids: of answers; then one a kind of root, one a message, one a child's thoughts.
_MOST_CHILDREN = 8


@contextmanager
def contest(config: Experiment) -> Iterator[tuple[Contestant, Contestant]]:
    """As many trees as one step of reinforcement learning has."""
    limits, schedule = config.limits, config.schedule
    trees = config.learn.rl.problems * config.learn.rl.group
    script = _script(limits)
    params = init_params(config.model, script.shape[0], jax.random.key(config.seed))
    decode, init_cache = make_decode(config.model)
    scripted = _follow(decode, jnp.asarray(script))
    roots = np.array([[p.BOS, _ROOT + tree % _KINDS] for tree in range(trees)], np.int32)

    engine = jax.jit(
        lambda params, prompts: (
            tree_rollout(scripted, init_cache, params, prompts, jax.random.key(0), limits, schedule)[0].total_tokens
        )
    )
    prompts = Prompts(
        jnp.asarray(roots), jnp.full(trees, 2, jnp.int32), jnp.arange(trees, dtype=jnp.int32), jnp.zeros(trees)
    )
    generate = jax.jit(_make_generate(scripted, init_cache, limits, schedule))
    host = HostLoop(lambda contexts, used: generate(params, contexts, used), limits.window, schedule.lanes)
    mine, its = int(engine(params, prompts).sum()), host.run(roots.tolist())
    if mine != its:
        raise RuntimeError(f"bench rollout: the engine sampled {mine} tokens, the host loop {its}")
    yield (
        Contestant("device engine", lambda: float(engine(params, prompts).sum()), "tokens"),
        Contestant("host loop, round by round", lambda: float(host.run(roots.tolist())), "tokens"),
    )


def _script(limits: Limits) -> np.ndarray:
    """[V, window + 1] the token that follows each token at each position.

    A root of kind k thinks k (C + 1) pairs of tokens, spawns C children and answers; child i thinks for a time that
    grows with i, up to half of the window.
    """
    children = min(limits.children, _MOST_CHILDREN)
    width = 2 * children + 2
    if limits.max_depth < 1 or limits.window < (_KINDS + 1) * width:
        raise UsageError(
            f"bench rollout: limits.window={limits.window} and max_depth={limits.max_depth} must be at least "
            f"{(_KINDS + 1) * width} and 1, so that the trees have room"
        )
    message = _ROOT + _KINDS
    thought = message + children
    place = np.arange(limits.window + 1)
    following = np.full((thought + children, len(place)), p.EOS)
    following[p.SPAWN] = p.MSG
    following[p.MSG] = message + np.minimum((place - 3) // 2 % (children + 1), children - 1)
    following[p.END_JOINED] = p.JOIN
    following[p.JOIN] = _ANSWER
    for kind in range(_KINDS):
        following[_ROOT + kind] = np.where(place < 1 + kind * width, _ROOT + kind, p.SPAWN)
    for child in range(children):
        following[message + child] = p.END_SPAWN if child == children - 1 else p.MSG
        following[message + child, 1] = thought + child  # A child's whole prompt is its message.
        ends = 2 + (limits.window // 2) * (child + 1) // children
        following[thought + child] = np.where(place < ends, thought + child, p.JOIN)
    return following.astype(np.int32)


def _follow(decode: Callable, script: Array) -> Callable:
    """The model with its logits overruled by the script."""

    def scripted(params: Any, tokens: Array, cache: Any, positions: Array) -> tuple[Array, Any]:
        logits, cache = decode(params, tokens, cache, positions)
        wanted = script[tokens, jnp.minimum(positions, script.shape[1] - 1)]
        return logits * 1e-6 + 100.0 * jax.nn.one_hot(wanted, script.shape[0]), cache

    return scripted


def _make_generate(decode: Callable, init_cache: Callable, limits: Limits, schedule: Schedule) -> Callable:
    """A plain greedy `generate(params, contexts [W, M], used [W]) -> (contexts, used)`: until `<eos>` or `</spawn>`."""
    lanes, window = schedule.lanes, limits.window
    lane = jnp.arange(lanes)

    def generate(params: Any, context: Array, used: Array) -> tuple[Array, Array]:
        def read_chunk(carry: tuple[Array, Any]) -> tuple[Array, Any]:
            begin, cache = carry
            at = begin + jnp.arange(schedule.chunk)[None, :]
            tokens = context.at[lane[:, None], at].get(mode="fill", fill_value=p.PAD)
            _, cache = decode(params, tokens, cache, jnp.where(at < used[:, None] - 1, at, window))
            return begin + schedule.chunk, cache

        begin = (jnp.zeros((), jnp.int32), init_cache(lanes, window))
        _, cache = jax.lax.while_loop(lambda carry: jnp.any(carry[0] < used - 1), read_chunk, begin)

        def step(carry: tuple[Array, Array, Array, Any]) -> tuple[Array, Array, Array, Any]:
            context, used, live, cache = carry
            last = jnp.where(live, used - 1, window)
            fed = context.at[lane, last].get(mode="fill", fill_value=p.PAD)
            logits, cache = decode(params, fed[:, None], cache, last[:, None])
            token = jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32)
            context = context.at[lane, jnp.where(live, used, window)].set(token, mode="drop")
            used = used + live
            live &= (token != p.EOS) & (token != p.END_SPAWN) & (used < window)
            return context, used, live, cache

        context, used, _, _ = jax.lax.while_loop(
            lambda carry: jnp.any(carry[2]), step, (context, used, used > 0, cache)
        )
        return context, used

    return generate


class HostLoop:
    """Thread trees on top of `generate(contexts [W, M], used [W])`, which knows nothing of trees."""

    def __init__(self, generate: Callable, window: int, lanes: int):
        self._generate, self._window, self._lanes = generate, window, lanes

    def run(self, contexts: list[list[int]]) -> int:
        """Answers all threads and, round by round, those that they spawn; returns how many tokens were sampled."""
        return self._answer(contexts)[1]

    def _answer(self, contexts: list[list[int]]) -> tuple[list[list[int]], int]:
        """The answers of these threads, and the tokens sampled in them and below them."""
        answers: list[list[int]] = [[] for _ in contexts]
        waiting, total = list(range(len(contexts))), 0
        while waiting:
            written = self._write([contexts[index] for index in waiting])
            total += sum(len(new) - len(contexts[index]) for index, new in zip(waiting, written, strict=True))
            spawned = {index: new for index, new in zip(waiting, written, strict=True) if new[-1] == p.END_SPAWN}
            for index, new in zip(waiting, written, strict=True):
                if new[-1] == p.EOS:
                    answers[index] = new[new.index(p.JOIN) + 1 : -1]
            messages = {index: _messages(new) for index, new in spawned.items()}
            below, more = (
                self._answer([[p.BOS, *m] for texts in messages.values() for m in texts]) if spawned else ([], 0)
            )
            total += more
            joined = iter(below)
            for index, new in spawned.items():
                block = [token for _ in messages[index] for token in (p.MSG, *next(joined))]
                contexts[index] = [*new[: new.index(p.SPAWN)], p.JOINED, *block, p.END_JOINED]
            waiting = list(spawned)
        return answers, total

    def _write(self, contexts: list[list[int]]) -> list[list[int]]:
        """What each context becomes by `generate`, a full set of lanes at a time."""
        written: list[list[int]] = []
        for start in range(0, len(contexts), self._lanes):
            part = contexts[start : start + self._lanes]
            tokens, used = np.zeros((self._lanes, self._window), np.int32), np.zeros(self._lanes, np.int32)
            for row, context in enumerate(part):
                tokens[row, : len(context)], used[row] = context, len(context)
            found, ends = jax.device_get(self._generate(tokens, used))
            written += [row[:end].tolist() for row, end in zip(found[: len(part)], ends, strict=False)]
        return written


def _messages(context: list[int]) -> list[list[int]]:
    """The messages of the spawn block at the end of a context."""
    block = context[context.index(p.SPAWN) + 1 : -1]
    starts = [place for place, token in enumerate(block) if token == p.MSG]
    return [block[start + 1 : end] for start, end in zip(starts, [*starts[1:], len(block)], strict=True)]
