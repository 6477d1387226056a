"""Whole thread trees: the device engine against a host loop on top of an engine that knows no
trees.

The host loop is how such systems are usually driven: all roots until each spawns or ends; then all
children of all trees; then the parents again, their contexts read anew. Each batch waits for its
slowest thread, and each round for its slowest batch. Both answer the same problems with the same
weights, greedily."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax

from apr_jax.bench.paired import Contestant
from apr_jax.bench.peers import Peer
from apr_jax.bench.plain_decoding import text_rollout
from apr_jax.evaluate.runner import make_runner
from apr_jax.tasks import Countdown, load_problems
from apr_jax.text.tokenizer import BOS
from apr_jax.threads import Limits, make_prompts
from apr_jax.threads import protocol as p
from apr_jax.train.checkpoint.restored import Restored

TREES = 64

# (contexts) -> what follows each, up to and with `<eos>` or `</spawn>`.
Generate = Callable[[list[list[int]]], list[list[int]]]


def prompts_of(restored: Restored, problems: Path, count: int = TREES) -> list[list[int]]:
    """The first problems of a file, as token ids."""
    task = Countdown(restored.config.task, restored.config.solver)
    return [
        [BOS, *restored.tokenizer.encode(task.prompt(problem, None))]
        for problem in load_problems(problems)[:count]
    ]


def engine(restored: Restored, ids: list[list[int]]) -> Contestant:
    """Our engine on all devices."""
    # The host loop's engines know no protocol, so a model that was trained with it is measured
    # without it as well.
    limits = dataclasses.replace(restored.config.limits, constrain=False)
    runner = make_runner(restored, limits, len(ids))
    prompts = make_prompts(ids, max(map(len, ids)))

    def run() -> float:
        forest, _ = runner.rollout(runner.params, prompts, jax.random.key(0))
        return float(forest.total_tokens.sum())

    return Contestant("apr_jax", run, "tokens")


def lone_roots(restored: Restored, ids: list[list[int]], tokens: int = 110) -> Contestant:
    """The same model, prompts and decode slots without a spawn: what decoding alone allows, with no
    message to read and no answer.
    """
    config, width = restored.config, max(map(len, ids))
    limits = Limits(
        window=width + tokens,
        max_thread_tokens=width + tokens,
        max_threads=1,
        children=1,
        max_depth=0,
    )
    slots = make_runner(restored, config.limits, len(ids)).slots
    schedule = dataclasses.replace(config.schedule, slots=slots)
    decode_text = text_rollout(config.model, restored.params, limits, schedule, jax.devices())
    prompts = make_prompts(ids, width)

    def run() -> float:
        return float(decode_text(prompts).total_tokens.sum())

    return Contestant("apr_jax, lone roots", run, "tokens")


def latency(restored: Restored, ids: list[list[int]], children: int) -> list[Contestant]:
    """One tree at a time with a decode slot for every thread, and the same trees on one decode
    slot: one thread after the other.
    """

    limits = dataclasses.replace(
        restored.config.limits, max_threads=children + 1, children=children
    )

    def contestant(name: str, slots: int) -> Contestant:
        schedule = dataclasses.replace(restored.config.schedule, slots=slots, prefill_batch=1)
        one = dataclasses.replace(
            restored, config=dataclasses.replace(restored.config, schedule=schedule)
        )
        runner = make_runner(one, limits, 1)
        prompts = [
            make_prompts([prompt], len(max(ids, key=len)), children=children) for prompt in ids
        ]

        def run() -> float:
            for prompt in prompts:
                jax.block_until_ready(runner.rollout(runner.params, prompt, jax.random.key(0)))
            return float(len(prompts))

        return Contestant(name, run, "trees")

    return [contestant("threads in parallel", children + 1), contestant("one after the other", 1)]


def host_loop(peer: Peer, limits: Limits, ids: list[list[int]]) -> Contestant:
    """A host loop that drives the peer."""

    def generate(contexts: list[list[int]]) -> list[list[int]]:
        most = limits.window - min(map(len, contexts))
        written = peer.generate(contexts, [p.EOS, p.END_SPAWN], most)
        return [
            new[: limits.window - len(context)]
            for context, new in zip(contexts, written, strict=True)
        ]

    return Contestant(
        f"host loop on {peer.name}", lambda: float(answer(ids, generate, limits)[1]), "tokens"
    )


def answer(
    contexts: list[list[int]], generate: Generate, limits: Limits, depth: int = 0
) -> tuple[list[list[int]], int]:
    """The answers of these threads, and the tokens sampled in them and below them."""
    answers: list[list[int]] = [[] for _ in contexts]
    contexts, waiting, total = list(contexts), list(range(len(contexts))), 0
    while waiting:
        written = dict(zip(waiting, generate([contexts[index] for index in waiting]), strict=True))
        total += sum(map(len, written.values()))
        spawns = {
            index: new
            for index, new in written.items()
            if _spawns(new) and depth < limits.max_depth
        }
        for index, new in written.items():
            if new[-1:] == [p.EOS] and p.JOIN in new:
                answers[index] = new[new.index(p.JOIN) + 1 : -1]
        messages = {index: _messages(new)[: limits.children] for index, new in spawns.items()}
        started = [[p.BOS, *message] for each in messages.values() for message in each]
        below, more = answer(started, generate, limits, depth + 1) if started else ([], 0)
        total, joined = total + more, iter(below)
        for index, new in spawns.items():
            block = [token for _ in messages[index] for token in (p.MSG, *next(joined))]
            contexts[index] = [
                *contexts[index],
                *new[: new.index(p.SPAWN)],
                p.JOINED,
                *block,
                p.END_JOINED,
            ]
        waiting = [index for index in spawns if len(contexts[index]) < limits.window]
    return answers, total


def _spawns(written: list[int]) -> bool:
    return written[-1:] == [p.END_SPAWN] and p.SPAWN in written


def _messages(written: list[int]) -> list[list[int]]:
    """The messages of the spawn block at the end."""
    block = written[written.index(p.SPAWN) + 1 : -1]
    starts = [place for place, token in enumerate(block) if token == p.MSG]
    return [
        block[start + 1 : end] for start, end in zip(starts, [*starts[1:], len(block)], strict=True)
    ]
