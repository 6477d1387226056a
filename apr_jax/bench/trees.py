"""Measures whole thread trees: our engine on the device against a host loop around another engine.

An engine that knows no trees is usually driven by a host loop. The loop decodes all roots until
each spawns or ends, then all children of all trees, then the parents again, whose contexts are read
again. Each batch waits for its slowest thread, and each round for its slowest batch. Both
contestants answer the same problems greedily and with the same weights.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax

from apr_jax.bench.paired import Contestant
from apr_jax.bench.peers import Peer
from apr_jax.bench.plain_decoding import text_rollout
from apr_jax.evaluate.runner import make_runner
from apr_jax.tasks import load_problems, make_task
from apr_jax.text.tokenizer import BOS
from apr_jax.threads import Limits, make_prompts
from apr_jax.threads import protocol as p
from apr_jax.train.checkpoint.restored import Restored

TREES = 64

# Contexts -> the tokens that follow each, up to `<eos>` or `</spawn>`, which are included.
Generate = Callable[[list[list[int]]], list[list[int]]]


def prompts_of(restored: Restored, problems: Path, count: int = TREES) -> list[list[int]]:
    """Reads the first problems of a file, as token ids of their prompts."""
    task = make_task(restored.config.task)
    return [
        [BOS, *restored.tokenizer.encode(task.prompt(problem, None))]
        for problem in load_problems(problems, task)[:count]
    ]


def engine(restored: Restored, ids: list[list[int]]) -> Contestant:
    """Makes the contestant of our engine, on all devices."""
    # The engines of the host loop do not enforce the protocol, so ours does not either.
    limits = dataclasses.replace(restored.config.limits, constrain=False)
    runner = make_runner(restored, limits, len(ids))
    prompts = make_prompts(ids, max(map(len, ids)))

    def run() -> float:
        forest, _ = runner.rollout(runner.params, prompts, jax.random.key(0))
        return float(forest.total_tokens.sum())

    return Contestant("apr_jax", run, "tokens")


def lone_roots(restored: Restored, ids: list[list[int]], tokens: int = 110) -> Contestant:
    """Makes a contestant whose roots never spawn, with the same model, prompts and decode slots.

    It shows the rate of decoding alone, without messages and answers to read.

    Args:
      restored: the model.
      ids: token ids of the prompts.
      tokens: number of tokens that each root decodes.
    """
    config = restored.config
    width = max(map(len, ids))
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
    """Makes contestants that grow trees with forced children, one tree at a time.

    In one of them every thread has a decode slot of its own. In the other all threads share one
    slot and so run one after the other.
    """
    limits = dataclasses.replace(
        restored.config.limits, max_threads=children + 1, children=children
    )
    width = max(map(len, ids))

    def contestant(name: str, slots: int) -> Contestant:
        schedule = dataclasses.replace(restored.config.schedule, slots=slots, prefill_batch=1)
        config = dataclasses.replace(restored.config, schedule=schedule)
        runner = make_runner(dataclasses.replace(restored, config=config), limits, 1)
        prompts = [make_prompts([prompt], width, children=children) for prompt in ids]

        def run() -> float:
            for prompt in prompts:
                jax.block_until_ready(runner.rollout(runner.params, prompt, jax.random.key(0)))
            return float(len(prompts))

        return Contestant(name, run, "trees")

    return [contestant("threads in parallel", children + 1), contestant("one after the other", 1)]


def host_loop(peer: Peer, limits: Limits, ids: list[list[int]]) -> Contestant:
    """Makes the contestant of a host loop that drives a peer."""

    def generate(contexts: list[list[int]]) -> list[list[int]]:
        # The peer may write more after a long context than the window allows; that is cut off.
        most = limits.window - min(map(len, contexts))
        written = peer.generate(contexts, [p.EOS, p.END_SPAWN], most)
        return [
            new[: limits.window - len(context)]
            for context, new in zip(contexts, written, strict=True)
        ]

    def run() -> float:
        _, tokens = answer(ids, generate, limits)
        return float(tokens)

    return Contestant(f"host loop on {peer.name}", run, "tokens")


def answer(
    contexts: list[list[int]], generate: Generate, limits: Limits, depth: int = 0
) -> tuple[list[list[int]], int]:
    """Runs threads, and the trees below them, to their ends.

    Args:
      contexts: the tokens that each thread is given.
      generate: decodes what follows each context.
      limits: bounds of children, depth and window.
      depth: depth of these threads; that of a root is 0.

    Returns:
      the answer of each thread, and the number of tokens sampled in these threads and below.
    """
    answers: list[list[int]] = [[] for _ in contexts]
    contexts = list(contexts)
    running = list(range(len(contexts)))
    total = 0
    while running:
        # All running threads decode until each spawns or ends.
        written = dict(zip(running, generate([contexts[index] for index in running]), strict=True))
        total += sum(map(len, written.values()))
        for index, new in written.items():
            if new[-1:] == [p.EOS] and p.JOIN in new:
                answers[index] = new[new.index(p.JOIN) + 1 : -1]

        # The children of all threads that spawn run to their ends.
        messages = {
            index: _messages(new)[: limits.children]
            for index, new in written.items()
            if _spawns(new) and depth < limits.max_depth
        }
        children = [
            [p.BOS, *message] for own_messages in messages.values() for message in own_messages
        ]
        joined: list[list[int]] = []
        if children:
            joined, tokens = answer(children, generate, limits, depth + 1)
            total += tokens

        # Their parents go on after the answers, which replace the spawn block.
        remaining = iter(joined)
        for index, own_messages in messages.items():
            new = written[index]
            block = [token for _ in own_messages for token in (p.MSG, *next(remaining))]
            contexts[index] = [
                *contexts[index],
                *new[: new.index(p.SPAWN)],
                p.JOINED,
                *block,
                p.END_JOINED,
            ]
        running = [index for index in messages if len(contexts[index]) < limits.window]
    return answers, total


def _spawns(written: list[int]) -> bool:
    """Whether a thread has ended with a spawn block."""
    return written[-1:] == [p.END_SPAWN] and p.SPAWN in written


def _messages(written: list[int]) -> list[list[int]]:
    """Returns the messages of the spawn block at the end of a thread's text."""
    block = written[written.index(p.SPAWN) + 1 : -1]
    starts = [index for index, token in enumerate(block) if token == p.MSG]
    ends = [*starts[1:], len(block)]
    return [block[start + 1 : end] for start, end in zip(starts, ends, strict=True)]
