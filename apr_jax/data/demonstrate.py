"""Solver work on all cores: problems in, token streams of demonstrations out, the same for any
number of workers.

The life of a sample:
  1. Demonstration k takes problem k (from the start again when there are fewer problems) and its
     own seed; nothing else is random.
  2. Problems go to worker processes by chunks. A worker runs the solver, verifies the answer, and
     makes the streams.
  3. A demonstration that the rollout could never have produced (too long, too many threads) is
     dropped and counted.
  4. The rest are flattened into an `Example`, compact arrays for the data set, and come back in
     order.

Workers are started by a fork server, never forked from a process in which JAX may hold threads.
They and the server end with the process that started them, however that ends."""

import collections
import concurrent.futures
import dataclasses
import functools
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self, TypeVar

import numpy as np

from apr_jax.data.encode import ThreadTokens, tokenize_tree
from apr_jax.data.integers import fitted, signed, unsigned
from apr_jax.io.subprocesses import StopSignals, end_with_parent, start_fork_server
from apr_jax.tasks import Bounds, Problem, Task, TaskConfig, Thread
from apr_jax.tasks.registry import remake
from apr_jax.text.tokenizer import Tokenizer

CHUNK = 128  # Problems that a worker gets at a time.
Example = dict[str, Any]  # Feature name -> array; see `builder.MEANINGS`.
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a problem becomes a demonstration.

    Attributes:
      task: of the experiment.
      method: one of the task's.
      seed: of the data; demonstration k folds k into it.
      tokenizer: serialized.
      bounds: what does not fit is dropped.
      correct_only: what does not find the answer is dropped, too.
    """

    task: TaskConfig
    method: str
    seed: int
    tokenizer: bytes
    bounds: Bounds
    correct_only: bool = False

    def make_task(self) -> Task:
        """The task, its demonstrations as wide and deep as the rollout."""
        return remake(self.task, self.bounds)


@dataclasses.dataclass(frozen=True)
class Counts:
    """Sums over demonstrations; those that were dropped count in the first seven only.

    Attributes:
      made: demonstrations that the solver made.
      solved: whose answer is right.
      dropped_window, dropped_max_thread_tokens, dropped_threads: left out for the first bound they
        break: positions, tokens of a stream, or number and depth of threads.
      dropped_wrong: left out because they do not find the answer (`data.correct_only`), and break
        no bound.
      dropped_children: threads below the roots of all that were left out.
      kept_solved: right ones that were kept.
      threads: of the kept.
      tokens: sampled tokens over all threads of the kept.
      sequential: sampled tokens on the longest chain, of the kept.
      stored: tokens over all threads of the kept, given ones included: what an epoch of training
        reads.
      window: positions of each tree's longest thread, of the kept.
      longest: tokens of the longest stream kept.
      conditions: how many of the kept state each condition.
    """

    made: int = 0
    solved: int = 0
    dropped_window: int = 0
    dropped_max_thread_tokens: int = 0
    dropped_threads: int = 0
    dropped_wrong: int = 0
    dropped_children: int = 0
    kept_solved: int = 0
    threads: int = 0
    tokens: int = 0
    sequential: int = 0
    stored: int = 0
    window: int = 0
    longest: int = 0
    conditions: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)

    def __add__(self, other: "Counts") -> "Counts":
        sums = {name: value + getattr(other, name) for name, value in vars(self).items()}
        return Counts(**(sums | {"longest": max(self.longest, other.longest)}))


class Workers:
    """A pool of processes; with one worker everything runs in this process. Use it as a context
    manager.

    Ctrl-C, SIGTERM and SIGHUP raise KeyboardInterrupt or `Stopped` where the next result is taken.

    Args:
      count: processes; None for all cores of this process.
    """

    def __init__(self, count: int | None = None):
        self.count = count or len(os.sched_getaffinity(0))
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None
        self._signals = StopSignals()

    def __enter__(self) -> Self:
        self._signals.__enter__()
        if self.count > 1:
            start_fork_server()
            context = multiprocessing.get_context("forkserver")
            self._pool = concurrent.futures.ProcessPoolExecutor(self.count, context, _start_worker)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self._pool is not None:
                self._pool.shutdown(cancel_futures=True)
        finally:
            self._signals.__exit__()

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """`map` in order; few results wait at a time, so that a slow consumer never fills the
        memory.
        """
        for result in self._map(function, items):
            self._signals.check()
            yield result

    def _map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        if self._pool is None:
            yield from map(function, items)
            return
        pending: collections.deque[concurrent.futures.Future[Result]] = collections.deque()
        for item in items:
            pending.append(self._pool.submit(function, item))
            if len(pending) > 2 * self.count:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def map_chunks(
        self, function: Callable[[Item], Result], items: Iterable[Item]
    ) -> Iterator[Result]:
        """The same for work too small to be sent one by one."""
        results = (
            map(function, items)
            if self._pool is None
            else self._pool.map(function, items, chunksize=CHUNK)
        )
        for result in results:
            self._signals.check()
            yield result


def _start_worker() -> None:
    # Ctrl-C is the parent's to handle; it stops the pool.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def demonstrations(
    recipe: Recipe, problems: list[Problem], count: int, workers: Workers
) -> Iterator[tuple[list[Example], Counts]]:
    """Demonstrations 0..count-1, a chunk at a time and in order, without the dropped ones."""
    chunks = (
        [(k, problems[k % len(problems)]) for k in range(start, min(start + CHUNK, count))]
        for start in range(0, count, CHUNK)
    )
    return workers.map(functools.partial(_demonstrate, recipe), chunks)


def texts(recipe: Recipe, problem: Problem) -> list[str]:
    """Every text of demonstration 0 of a problem: what the tokenizer is trained on (the recipe's
    own is not used).
    """
    found: list[str] = []

    def collect(thread: Thread) -> None:
        found.extend((thread.prompt, thread.answer))
        for part in thread.body:
            if isinstance(part, str):
                found.append(part)
            else:
                for child in part.children:
                    collect(child)

    collect(recipe.make_task().demonstrate(problem, recipe.method, recipe.seed << 32))
    return found


@functools.lru_cache(maxsize=4)
def _tools(recipe: Recipe) -> tuple[Task, Tokenizer, dict[str, np.dtype]]:
    """Made once a process, not once a chunk."""
    tokenizer = Tokenizer(recipe.tokenizer)
    return recipe.make_task(), tokenizer, stored_types(tokenizer.vocab_size, recipe.bounds)


def _demonstrate(recipe: Recipe, chunk: list[tuple[int, Problem]]) -> tuple[list[Example], Counts]:
    task, tokenizer, types = _tools(recipe)
    examples, counts = [], Counts()
    for k, problem in chunk:
        thread = task.demonstrate(problem, recipe.method, (recipe.seed << 32) + k)
        solved = int(task.score(problem, thread.answer).correct)
        streams = tokenize_tree(thread, tokenizer)
        broken = broken_bound(streams, recipe.bounds)
        if not broken and recipe.correct_only and not solved:
            broken = "dropped_wrong"
        if broken:
            dropped: dict[str, Any] = {broken: 1}
            counts += Counts(made=1, solved=solved, dropped_children=len(streams) - 1, **dropped)
            continue
        examples.append(flatten(streams, types))
        counts += Counts(
            made=1,
            solved=solved,
            kept_solved=solved,
            threads=len(streams),
            tokens=sum(int(stream.sampled.sum()) for stream in streams),
            sequential=sequential_tokens(streams),
            stored=sum(len(stream.tokens) for stream in streams),
            window=max(int(stream.position.max()) + 1 for stream in streams),
            longest=max(len(stream.tokens) for stream in streams),
            conditions=collections.Counter([] if thread.condition is None else [thread.condition]),
        )
    return examples, counts


def broken_bound(streams: list[ThreadTokens], bounds: Bounds) -> str:
    """The field of `Counts` for the first bound that a tree breaks; "" if it fits."""
    if any(stream.position.max() >= bounds.window for stream in streams):
        return "dropped_window"
    if any(len(stream.tokens) > bounds.max_thread_tokens for stream in streams):
        return "dropped_max_thread_tokens"
    return "" if _have_threads(streams, 0, bounds.max_threads - 1, bounds) else "dropped_threads"


def _have_threads(
    streams: list[ThreadTokens], thread_index: int, free: int, bounds: Bounds
) -> bool:
    """Whether a thread with `free` threads below it can spawn all that it does: a rollout divides
    what each spawn leaves evenly among the children, if they may spawn too, and their parent."""
    children: dict[int, list[int]] = {}
    for place, stream in enumerate(streams):
        if stream.parent == thread_index:
            children.setdefault(stream.round, []).append(place)
    for _, spawned in sorted(children.items()):
        free -= len(spawned)
        depth = streams[thread_index].depth + 1
        if free < 0 or len(spawned) > bounds.children or depth > bounds.max_depth:
            return False
        each = free // (len(spawned) + 1) if depth < bounds.max_depth else 0
        free -= each * len(spawned)
        if not all(_have_threads(streams, place, each, bounds) for place in spawned):
            return False
    return True


def sequential_tokens(streams: list[ThreadTokens], thread_index: int = 0) -> int:
    """Sampled tokens on the longest chain: a thread's own, and at each of its spawns those of the
    longest child.
    """
    longest: dict[int, int] = {}
    for place, stream in enumerate(streams):
        if stream.parent == thread_index:
            chain = sequential_tokens(streams, place)
            longest[stream.round] = max(longest.get(stream.round, 0), chain)
    return int(streams[thread_index].sampled.sum()) + sum(longest.values())


def stored_types(vocab_size: int, bounds: Bounds) -> dict[str, np.dtype]:
    """Feature name -> the integer type in which it is stored: wide enough for every tree that fits
    the bounds.

    Raises:
      ValueError: a feature needs more than 32 bits.
    """
    place = unsigned(bounds.max_thread_tokens)
    return {
        "tokens": unsigned(vocab_size - 1),
        "position": place,
        "hidden_block": place,
        "sampled": unsigned(1, least_bits=8),
        "length": place,
        "parent": signed(bounds.max_threads - 1),
        "round": place,
        "depth": unsigned(bounds.max_depth, least_bits=8),
        "child": unsigned(bounds.children - 1),
    }


def flatten(streams: list[ThreadTokens], types: dict[str, np.dtype]) -> Example:
    """A tree as compact arrays: the threads' tokens one after the other, and one number a thread.

    Args:
      types: from `stored_types`.

    Raises:
      ValueError: a value does not fit its type.
    """
    example: Example = {
        name: np.concatenate([getattr(stream, name) for stream in streams])
        for name in ("tokens", "position", "hidden_block", "sampled")
    }
    example["length"] = [len(stream.tokens) for stream in streams]
    for name in ("parent", "round", "depth", "child"):
        example[name] = [getattr(stream, name) for stream in streams]
    return {
        name: fitted(values, types[name], f"demonstration: {name}")
        for name, values in example.items()
    }


def unflatten(example: Example) -> list[ThreadTokens]:
    """The inverse of `flatten`."""
    stops = np.cumsum(example["length"].astype(np.int64))
    streams = []
    for place, (start, stop) in enumerate(zip(stops - example["length"], stops, strict=True)):
        part = slice(int(start), int(stop))
        streams.append(
            ThreadTokens(
                example["tokens"][part].astype(np.int32),
                example["position"][part].astype(np.int32),
                example["hidden_block"][part].astype(np.int32),
                example["sampled"][part].astype(bool),
                *(int(example[name][place]) for name in ("parent", "round", "depth", "child")),
            )
        )
    return streams
