"""Demonstrations on all cores: problems go in, token sequences of solved trees come out.

The life of a demonstration:
1. Demonstration k takes problem k (from the first again if there are fewer problems) and a seed of
   its own. Nothing else is random, so the result does not depend on the number of workers.
2. Problems go to worker processes by chunks. A worker runs the solver, verifies the answer, and
   makes the token sequences of all threads.
3. A demonstration that the rollout could never have produced (too long, or too many threads) is
   dropped and counted.
4. The rest become `Example`s, compact arrays for the data set, and come back in order.

Workers are started by a fork server, never forked from a process in which JAX may hold threads.
They and the server end with the process that started them, however that ends.
"""

import collections
import concurrent.futures
import concurrent.futures.process
import dataclasses
import functools
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Self, TypeVar

import numpy as np

from apr_jax.data.encode import ThreadTokens, tokenize_tree
from apr_jax.data.integers import fitted, signed, unsigned
from apr_jax.errors import UserError
from apr_jax.io.subprocesses import StopSignals, end_with_parent, start_fork_server
from apr_jax.tasks import Bounds, Problem, Task, TaskConfig, Thread
from apr_jax.tasks.registry import remake
from apr_jax.text.stored import tokenizer_from_bytes
from apr_jax.text.tokenizer import Tokenizer

CHUNK = 128  # Problems that a worker gets at a time.
Example = dict[str, np.ndarray]  # Feature name -> array; see `dataset.MEANINGS`.
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a problem becomes a demonstration.

    Attributes:
      task: the task of the experiment.
      method: name of one of the task's methods.
      seed: seed of the data. The seed of demonstration k is made of it and k.
      tokenizer: the serialized tokenizer.
      bounds: trees that do not fit them are dropped.
      correct_only: whether trees with a wrong answer are dropped, too.
    """

    task: TaskConfig
    method: str
    seed: int
    tokenizer: bytes
    bounds: Bounds
    correct_only: bool = False

    def make_task(self) -> Task:
        """Makes the task, whose demonstrations are as wide and deep as the rollout."""
        return remake(self.task, self.bounds)


@dataclasses.dataclass(frozen=True)
class Counts:
    """Sums over demonstrations.

    Attributes:
      made: demonstrations that the solver made.
      solved: those of them whose answer is right.
      dropped_window: demonstrations that were dropped because a thread takes more positions than
        the window has.
      dropped_max_thread_tokens: others that were dropped because a thread has too many tokens.
      dropped_threads: others that were dropped because the tree has too many threads, is too deep,
        or spawns too many children at once.
      dropped_wrong: others that were dropped because their answer is wrong (`data.correct_only`).
      dropped_children: threads below the roots of all dropped trees.
      kept_solved: kept demonstrations whose answer is right. All fields below are of the kept, too.
      threads: threads, roots included.
      tokens: sampled tokens of all threads.
      sequential: sampled tokens on the longest chain of each tree.
      stored: tokens of all threads, prompt tokens included, which an epoch of training reads.
      window: positions that the longest thread of each tree takes.
      longest: tokens of the longest thread of all, a maximum and no sum.
      conditions: condition -> number of demonstrations that state it.
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
        totals = {name: value + getattr(other, name) for name, value in vars(self).items()}
        totals["longest"] = max(self.longest, other.longest)
        return Counts(**totals)


class Workers:
    """A pool of processes, used as a context manager.

    With one worker everything runs in this process. Ctrl-C, SIGTERM and SIGHUP raise
    KeyboardInterrupt or `Stopped` where the next result is taken.

    Args:
      count: number of processes; None for all cores of this process.
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
        """Maps items in order; few results wait at a time, so that memory never fills up.

        Raises:
          UserError: a process of the pool was killed.
        """
        yield from self._checked(self._map(function, items))

    def _checked(self, results: Iterable[Result]) -> Iterator[Result]:
        """Takes results one by one, and looks for signals after each."""
        try:
            for result in results:
                self._signals.check()
                yield result
        except concurrent.futures.process.BrokenProcessPool:
            raise UserError(
                f"data: one of {self.count} worker processes was killed, most likely because memory"
                " is full; make room, and start the same command again"
            ) from None

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
        """Maps items in order, and sends them by chunks: for work too small to be sent singly.

        Raises:
          UserError: a process of the pool was killed.
        """
        results: Iterable[Result]
        if self._pool is None:
            results = map(function, items)
        else:
            results = self._pool.map(function, items, chunksize=CHUNK)
        yield from self._checked(results)


def _start_worker() -> None:
    # Ctrl-C is the parent's to handle; it stops the pool.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def demonstrations(
    recipe: Recipe, problems: list[Problem], count: int, workers: Workers
) -> Iterator[tuple[list[Example], Counts]]:
    """Makes demonstrations 0 to `count` - 1, a chunk at a time and in order.

    Args:
      recipe: how a problem becomes a demonstration.
      problems: demonstration k is of problem k modulo their number.
      count: number of demonstrations.
      workers: the processes that make them.

    Returns:
      for each chunk, its demonstrations without the dropped ones, and its counts.
    """

    def chunk(start: int) -> list[tuple[int, Problem]]:
        stop = min(start + CHUNK, count)
        return [(k, problems[k % len(problems)]) for k in range(start, stop)]

    chunks = map(chunk, range(0, count, CHUNK))
    return workers.map(functools.partial(_demonstrate, recipe), chunks)


def given_demonstrations(
    recipe: Recipe, solved: Sequence[tuple[Problem, Thread]], workers: Workers
) -> Iterator[tuple[list[Example], Counts]]:
    """Makes examples of trees that exist already, in place of the task's own demonstrations.

    Args:
      recipe: decides what is dropped, and the tokens.
      solved: problems with their trees.
      workers: the processes that do it.

    Returns:
      as `demonstrations`.
    """
    chunks = (solved[start : start + CHUNK] for start in range(0, len(solved), CHUNK))
    return workers.map(functools.partial(_encode_given, recipe), chunks)


def texts(recipe: Recipe, problem: Problem) -> list[str]:
    """Returns every text of demonstration 0 of a problem, on which a tokenizer can be trained.

    The recipe's own tokenizer is not used.
    """
    root = recipe.make_task().demonstrate(problem, recipe.method, _seed(recipe, 0))
    return texts_of(root)


def texts_of(thread: Thread) -> list[str]:
    """Returns the texts of a thread and of all below it."""
    written = [thread.prompt, thread.answer]
    for part in thread.body:
        if isinstance(part, str):
            written.append(part)
        else:
            for child in part.children:
                written += texts_of(child)
    return written


def _seed(recipe: Recipe, k: int) -> int:
    """Returns the seed of demonstration k, which no other seed of the data has for any k."""
    return (recipe.seed << 32) + k


@functools.lru_cache(maxsize=4)
def _tools(recipe: Recipe) -> tuple[Task, Tokenizer, dict[str, np.dtype]]:
    """Returns task, tokenizer and stored types, which are made once a process."""
    tokenizer = tokenizer_from_bytes(recipe.tokenizer)
    return recipe.make_task(), tokenizer, stored_types(tokenizer.vocab_size, recipe.bounds)


def _demonstrate(recipe: Recipe, chunk: list[tuple[int, Problem]]) -> tuple[list[Example], Counts]:
    """Demonstrates the problems of a chunk, each given with the number of its demonstration."""
    task, _, _ = _tools(recipe)
    trees = (
        (problem, task.demonstrate(problem, recipe.method, _seed(recipe, k)))
        for k, problem in chunk
    )
    return _encode_given(recipe, trees)


def _encode_given(
    recipe: Recipe, solved: Iterable[tuple[Problem, Thread]]
) -> tuple[list[Example], Counts]:
    """Makes examples of the trees that solve problems, drops what does not fit, and counts."""
    task, tokenizer, types = _tools(recipe)
    examples = []
    counts = Counts()
    for problem, root in solved:
        is_solved = task.score(problem, root.answer).correct
        threads = tokenize_tree(root, tokenizer)

        reason = broken_bound(threads, recipe.bounds)
        if not reason and recipe.correct_only and not is_solved:
            reason = "dropped_wrong"
        if reason:
            counts += _count_dropped(threads, is_solved, reason)
        else:
            counts += _count_kept(threads, is_solved, root.condition)
            examples.append(flatten(threads, types))
    return examples, counts


def _count_dropped(threads: list[ThreadTokens], is_solved: bool, reason: str) -> Counts:
    """Returns the counts of a tree that is dropped; `reason` is the field that counts it."""
    dropped: dict[str, Any] = {reason: 1}
    return Counts(made=1, solved=int(is_solved), dropped_children=len(threads) - 1, **dropped)


def _count_kept(threads: list[ThreadTokens], is_solved: bool, condition: int | None) -> Counts:
    """Returns the counts of a tree that is kept."""
    stated = [] if condition is None else [condition]
    return Counts(
        made=1,
        solved=int(is_solved),
        kept_solved=int(is_solved),
        threads=len(threads),
        tokens=sum(int(thread.sampled.sum()) for thread in threads),
        sequential=sequential_tokens(threads),
        stored=sum(len(thread.tokens) for thread in threads),
        window=max(int(thread.position.max()) + 1 for thread in threads),
        longest=max(len(thread.tokens) for thread in threads),
        conditions=collections.Counter(stated),
    )


def broken_bound(threads: list[ThreadTokens], bounds: Bounds) -> str:
    """Returns the field of `Counts` for the first bound that a tree breaks, or "" if it fits."""
    if any(thread.position.max() >= bounds.window for thread in threads):
        return "dropped_window"
    if any(len(thread.tokens) > bounds.max_thread_tokens for thread in threads):
        return "dropped_max_thread_tokens"
    if not _can_spawn(threads, 0, bounds.max_threads - 1, bounds):
        return "dropped_threads"
    return ""


def _can_spawn(threads: list[ThreadTokens], thread_index: int, free: int, bounds: Bounds) -> bool:
    """Tells whether a rollout could make all threads below one.

    A rollout divides what each spawn leaves evenly among the children, if they may spawn too, and
    their parent.

    Args:
      threads: the tree.
      thread_index: the thread that spawns.
      free: number of threads that may still be made below it.
      bounds: limits of the rollout.
    """
    spawns: dict[int, list[int]] = {}  # Which spawn -> thread indices of its children.
    for index, thread in enumerate(threads):
        if thread.parent == thread_index:
            spawns.setdefault(thread.round, []).append(index)

    depth = threads[thread_index].depth + 1
    for _, children in sorted(spawns.items()):
        free -= len(children)
        if free < 0 or len(children) > bounds.children or depth > bounds.max_depth:
            return False
        share = free // (len(children) + 1) if depth < bounds.max_depth else 0
        free -= share * len(children)
        if not all(_can_spawn(threads, child, share, bounds) for child in children):
            return False
    return True


def sequential_tokens(threads: list[ThreadTokens], thread_index: int = 0) -> int:
    """Counts the sampled tokens on the longest chain of a thread and all below it.

    These are the thread's own, and at each of its spawns those of the child with the longest chain.
    """
    longest: dict[int, int] = {}  # Which spawn -> tokens of the longest chain of a child.
    for index, thread in enumerate(threads):
        if thread.parent == thread_index:
            chain = sequential_tokens(threads, index)
            longest[thread.round] = max(longest.get(thread.round, 0), chain)
    return int(threads[thread_index].sampled.sum()) + sum(longest.values())


def stored_types(vocab_size: int, bounds: Bounds) -> dict[str, np.dtype]:
    """Returns the integer type of each stored feature: the narrowest that holds all its values.

    Raises:
      ValueError: a feature needs more than 32 bits.
    """
    in_thread = unsigned(bounds.max_thread_tokens)
    return {
        "tokens": unsigned(vocab_size - 1),
        "position": in_thread,
        "hidden_block": in_thread,
        "sampled": unsigned(1, least_bits=8),
        "length": in_thread,
        "parent": signed(bounds.max_threads - 1),
        "round": in_thread,
        "depth": unsigned(bounds.max_depth, least_bits=8),
        "child": unsigned(bounds.children - 1),
    }


_OF_TOKENS = ("tokens", "position", "hidden_block", "sampled")  # Features with a value a token.
_OF_THREADS = ("parent", "round", "depth", "child")  # Features with a value a thread.


def flatten(threads: list[ThreadTokens], types: dict[str, np.dtype]) -> Example:
    """Returns a tree as compact arrays.

    Args:
      threads: the n threads of the tree.
      types: feature -> type of its integers, from `stored_types`.

    Returns:
      feature -> array: [n] if it has a value a thread, else [sum of the lengths], one thread after
      the other.

    Raises:
      ValueError: a value does not fit its type.
    """
    values: dict[str, Any] = {}
    for name in _OF_TOKENS:
        values[name] = np.concatenate([getattr(thread, name) for thread in threads])
    values["length"] = [len(thread.tokens) for thread in threads]
    for name in _OF_THREADS:
        values[name] = [getattr(thread, name) for thread in threads]
    return {
        name: fitted(column, types[name], f"demonstration: {name}")
        for name, column in values.items()
    }


def unflatten(example: Example) -> list[ThreadTokens]:
    """Returns the threads of a tree that `flatten` made arrays of."""
    stops = np.cumsum(example["length"].astype(np.int64))  # [n]
    starts = stops - example["length"]  # [n]
    threads = []
    for index, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        part = slice(int(start), int(stop))
        threads.append(
            ThreadTokens(
                tokens=example["tokens"][part].astype(np.int32),
                position=example["position"][part].astype(np.int32),
                hidden_block=example["hidden_block"][part].astype(np.int32),
                sampled=example["sampled"][part].astype(bool),
                parent=int(example["parent"][index]),
                round=int(example["round"][index]),
                depth=int(example["depth"][index]),
                child=int(example["child"][index]),
            )
        )
    return threads
