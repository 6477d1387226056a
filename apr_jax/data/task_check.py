"""Tries a task before anything is trained on it: `apr task check`.

A task is code that its author wrote in an hour, and a training that runs on a faulty one ends a day
later with a model that learned something else. So every promise of `tasks.base.Task` is tried here
on random problems:

    problems          drawn again from the same seeds, written as JSON and read back, split
    prompts           the same each time, in the task's alphabet, inside the window
    demonstrations    of each method: whole, right, in the alphabet, within the limits
    scores            of right, wrong and hostile answers: in time, alike, and never an error

Each trial gives findings: "ok", a "note" (worth a look) or a "fault" (a training would fail, or
learn the wrong thing) with what to change.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import io
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from apr_jax.data.demonstrate import broken_bound, sequential_tokens
from apr_jax.data.encode import ThreadTokens, tokenize_tree
from apr_jax.errors import UserError
from apr_jax.io.terminal import visible
from apr_jax.tasks.base import Bounds, Method, Problem, Score, Spawn, Task, Thread, flatten
from apr_jax.tasks.problem_files import cut
from apr_jax.tasks.registry import config_of, remake
from apr_jax.tasks.sandbox import Failure, SandboxedVerifier
from apr_jax.text.sentence_piece import SentencePieceTokenizer
from apr_jax.text.tokenizer import CONTROL_PIECES, Tokenizer

Level = Literal["ok", "note", "fault"]

# Answers that a model writes sooner or later, none of which is right.
HOSTILE_ANSWERS: Mapping[str, str] = {
    "the empty text": "",
    "a space": " ",
    "a hundred thousand letters": "a" * 100_000,
    "five thousand digits": "9" * 5_000,
    "ten thousand brackets": "(" * 10_000,
    "a power of powers": "9**9**9**9**9",
    "line ends": "\n" * 1_000,
    "control pieces": "".join(CONTROL_PIECES),
    "a NUL": "\x00",
    "an escape sequence": "\x1b[2J\x1b]0;title\x07",
    "Arabic digits": "٣٤+٥٦",
    "a superscript digit": "2²",
    "Chinese characters": "四十六",
    "an emoji": "🧮",
    "not a number": "nan",
    "infinity": "1e999",
    "a JSON object": '{"reward": 1}',
    "Python code": "__import__('os').abort()",
}
_SCORED_PROBLEMS = 20  # Whose answers are scored, as each costs a call of the sandbox.
_SLOW_SECONDS = 0.1  # A score that takes longer holds up a step of 100 trees for ten seconds.
_FEW_KEYS = 0.5  # Share of different problems below which a note is given.


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one trial of a task found.

    Attributes:
      level: how bad it is.
      subject: what was tried: "problems", "prompts", "demonstrations serial", "scores" ...
      text: what was seen.
      remedy: what to change; empty if nothing need change.
    """

    level: Level
    subject: str
    text: str
    remedy: str = ""


class _Faulty(Exception):
    """A trial that cannot go on; carries its finding."""

    def __init__(self, subject: str, text: str, remedy: str = ""):
        super().__init__(text)
        self.finding = Finding("fault", subject, text, remedy)


def check_task(
    task: Task,
    count: int,
    seed: int,
    time_limit: float,
    memory_limit: float,
    bounded: bool = True,
) -> Iterator[Finding]:
    """Tries a task, and yields a finding as soon as there is one.

    Args:
      task: its `bounds` are those of the rollout if `bounded`.
      count: number of problems that are drawn.
      seed: decides which; the same seed gives the same findings but for the seconds.
      time_limit: seconds that the score of one answer may take.
      memory_limit: GiB of address space that the scorer may take.
      bounded: whether there are limits to which lengths can be held. If not, the smallest limits
        that hold every demonstration are told.
    """
    trial = _Trial(task, seed, bounded)
    parts: list[Callable[[], Iterator[Finding]]] = [
        lambda: trial.try_problems(count),
        trial.try_split,
        trial.try_prompts,
        trial.try_demonstrations,
        lambda: trial.try_scores(time_limit, memory_limit),
    ]
    for part in parts:
        try:
            yield from part()
        except _Faulty as fault:
            yield fault.finding
            if not trial.problems:
                return


class _Trial:
    """The state of a check: the problems that were drawn, and answers that demonstrations gave.

    Args:
      task, seed, bounded: see `check_task`.
    """

    def __init__(self, task: Task, seed: int, bounded: bool):
        self._task = task
        self._seed = seed
        self._bounded = bounded
        self._again = task  # From `try_problems` on: made anew, as a worker process makes it.
        self.problems: list[Problem] = []
        self._right_answers: dict[str, str] = {}  # Problem id -> a demonstrated right answer.

    def try_problems(self, count: int) -> Iterator[Finding]:
        """Draws the problems, twice; each must survive JSON and `check`."""
        subject = "problems"
        self._again = _call(subject, "making the task anew", _remade, self._task)

        drawn: dict[str, Problem] = {}
        for number in range(count):
            seed = self._seed + number
            problem = _call(subject, f"draw({seed})", self._task.draw, seed)
            if not isinstance(problem, Problem):
                raise _Faulty(subject, f"draw({seed}) returns {problem!r}", "return a Problem")
            if not isinstance(problem.data, Mapping):
                raise _Faulty(
                    subject,
                    f"draw({seed}) returns a problem whose data is {problem.data!r}",
                    "make data a dict with what the task needs to know of the problem",
                )
            # The id of a draw may be any; a data build names problems by their place.
            drawn[f"draw-{number}"] = dataclasses.replace(problem, id=f"draw-{number}")

            again = _call(subject, f"draw({seed})", self._again.draw, seed)
            if again.data != problem.data:
                raise _Faulty(
                    subject,
                    f"draw({seed}) gives {_shown(problem.data)}, and {_shown(again.data)} in"
                    " another process",
                    f'draw from random.Random(f"{self._task.kind or "my task"} {{seed}}") alone; a'
                    " set has no fixed order",
                )
        for problem in drawn.values():
            self._check_json(problem)
        self.problems = list(drawn.values())

        keys = collections.Counter(
            _call(subject, "key", self._task.key, problem) for problem in drawn.values()
        )
        groups = {_call(subject, "group", self._task.group, problem) for problem in drawn.values()}
        text = f"{count:,} drawn, {len(keys):,} different, in {len(groups):,} groups"
        if len(groups) < 3:
            yield Finding(
                "fault",
                subject,
                text,
                "training, validation and test need groups of their own: draw more kinds of"
                " problems, or make `key` and `group` finer",
            )
        elif len(keys) < _FEW_KEYS * count:
            yield Finding(
                "note",
                subject,
                text,
                "a data build looks for different ones; if the task has few, ask for few"
                " (data.demonstrations, data.heldout)",
            )
        else:
            yield Finding("ok", subject, text)
        first = self.problems[0]
        line = _call(subject, "show", self._task.show, first)
        yield Finding("ok", subject, f"the first is {cut(visible(str(line)))}")

    def _check_json(self, problem: Problem) -> None:
        """Writes a problem as a line of a problems file, reads it, and has the task check it."""
        subject = "problems"
        line = _call(subject, f"JSON of {_shown(problem.data)}", json.dumps, problem.to_json())
        record = json.loads(line)
        record.pop("id")
        if record != problem.data:
            raise _Faulty(
                subject,
                f"data {_shown(problem.data)} is {_shown(record)} when it comes back from a file",
                "hold only what JSON has: lists instead of tuples, texts as keys",
            )
        read = Problem(problem.id, record)
        checked = _call(subject, f"check of the drawn {_shown(record)}", self._task.check, read)
        if not isinstance(checked, Problem):
            raise _Faulty(subject, f"check returns {checked!r}", "return the Problem")

    def try_split(self) -> Iterator[Finding]:
        """Splits a few problems; no group may stand in two parts."""
        subject = "split"
        heldout = max(1, len(self.problems) // 10)
        train = max(1, len(self.problems) // 2)
        split = _call(
            subject,
            f"split({train}, {heldout}, {self._seed})",
            self._task.split,
            train,
            heldout,
            self._seed,
        )
        parts = {
            "train": split.train,
            "validation": split.validation,
            "test": split.test,
        }
        of_group: dict[Any, str] = {}
        for name, part in parts.items():
            if not part:
                raise _Faulty(subject, f"{name} is empty", "give every part of the split problems")
            for problem in part:
                owner = of_group.setdefault(self._task.group(problem), name)
                if owner != name:
                    raise _Faulty(
                        subject,
                        f"{cut(self._task.show(problem))} is in {owner} and in {name}",
                        "keep the problems of a group in one part; `Task.split` does by itself",
                    )
        sizes = ", ".join(f"{len(part):,} {name}" for name, part in parts.items())
        yield Finding("ok", subject, f"{sizes}; no group in two of them")

    def try_prompts(self) -> Iterator[Finding]:
        """Writes the prompt of each problem, with and without a condition."""
        subject = "prompts"
        lengths = []
        for problem in self.problems:
            prompt = self._prompt(self._task, problem, None)
            if prompt != self._prompt(self._again, problem, None):
                raise _Faulty(
                    subject,
                    f"the prompt of {_shown(problem.data)} is not the same each time",
                    "let it depend on the problem and the condition alone",
                )
            lengths.append(len(prompt))
        yield Finding("ok", subject, f"{min(lengths)} to {max(lengths)} characters")

        for name, method in self._task.methods.items():
            if method.condition is None:
                continue
            for stated in (method.condition.low, method.condition.high):
                problem = self.problems[0]
                if self._prompt(self._task, problem, stated) == self._prompt(
                    self._task, problem, None
                ):
                    raise _Faulty(
                        subject,
                        f"a condition of {stated} {method.condition.counts} changes nothing",
                        f"have `prompt` state it, or take the condition from method {name!r}",
                    )

    def _prompt(self, task: Task, problem: Problem, condition: int | None) -> str:
        """Returns the prompt of a problem, which is a text in the task's alphabet."""
        subject = "prompts"
        prompt = _call(
            subject, f"prompt of {_shown(problem.data)}", task.prompt, problem, condition
        )
        if not isinstance(prompt, str) or not prompt:
            raise _Faulty(subject, f"a prompt is {prompt!r}", "return a text that is not empty")
        _check_alphabet(task, subject, "a prompt", prompt)
        return prompt

    def try_demonstrations(self) -> Iterator[Finding]:
        """Demonstrates every problem by every method."""
        if not self._task.methods:
            yield Finding(
                "note",
                "demonstrations",
                "the task has none",
                "without them RL starts from a model that you bring (`apr train rl --init`)",
            )
            return
        threads: dict[str, list[Thread]] = {}
        for name, method in self._task.methods.items():
            try:
                threads[name] = self._demonstrate(name, method)
            except _Faulty as fault:
                yield fault.finding
        if not threads:
            return
        tokenizer = _tokenizer(self._task, threads)
        for name, made in threads.items():
            yield self._judge_answers(name, made)
            yield from self._judge_lengths(name, made, tokenizer)

    def _demonstrate(self, name: str, method: Method) -> list[Thread]:
        """Returns the demonstrations of a method, which are whole and the same each time."""
        subject = f"demonstrations {name}"
        made = []
        for number, problem in enumerate(self.problems):
            of_what = f"demonstrate({_shown(problem.data)}, {name!r}, {number})"
            thread = _call(subject, of_what, self._task.demonstrate, problem, name, number)
            _check_thread(self._task, thread, subject)
            again = _call(subject, of_what, self._again.demonstrate, problem, name, number)
            if again != thread:
                raise _Faulty(
                    subject,
                    f"{of_what} differs from one process to the next",
                    "let it depend on problem, method and seed alone",
                )
            expected = self._prompt(self._task, problem, thread.condition)
            if thread.prompt != expected:
                raise _Faulty(
                    subject,
                    f"the root's prompt is {cut(thread.prompt)!r}, but `prompt` writes"
                    f" {cut(expected)!r}",
                    "begin the demonstration with self.prompt(problem, condition), and set"
                    " Thread.condition to what it states",
                )
            made.append(thread)
        depth = max(_depth(thread) for thread in made)
        if depth > method.depth:
            raise _Faulty(
                subject,
                f"threads are {depth} deep below the root, but Method.depth is {method.depth}",
                f"Method(..., depth={depth})",
            )
        if depth and not method.parallel:
            raise _Faulty(
                subject, "a method that is not parallel spawns", "Method(parallel=True, ...)"
            )
        return made

    def _judge_answers(self, name: str, made: list[Thread]) -> Finding:
        """Scores the demonstrated answers, in this process: the task itself wrote them."""
        subject = f"demonstrations {name}"
        wrong = []
        for problem, thread in zip(self.problems, made, strict=True):
            score = _call(
                subject,
                f"score of {cut(thread.answer)!r}",
                self._task.score,
                problem,
                thread.answer,
            )
            if not isinstance(score, Score):
                raise _Faulty(subject, f"score returns {score!r}", "return a Score")
            if score.correct:
                self._right_answers.setdefault(problem.id, thread.answer)
            else:
                wrong.append((problem, thread, score))
        right = len(made) - len(wrong)
        text = f"{right:,} of {len(made):,} give a right answer"
        if not wrong:
            return Finding("ok", subject, text)
        problem, thread, score = wrong[0]
        example = (
            f"; the first wrong one: {cut(self._task.show(problem))}, answer"
            f" {cut(thread.answer)!r}: {score.reason or 'no reason given'}"
        )
        if not right:
            return Finding(
                "fault", subject, text + example, "either they or `score` are wrong throughout"
            )
        return Finding(
            "note",
            subject,
            text + example,
            "right for a search that may fail; data.correct_only=true leaves these out",
        )

    def _judge_lengths(
        self, name: str, made: list[Thread], tokenizer: Tokenizer
    ) -> Iterator[Finding]:
        """Tells what demonstrations take, and which limits they break."""
        subject = f"demonstrations {name}"
        trees = [tokenize_tree(thread, tokenizer) for thread in made]
        threads = [len(tree) for tree in trees]
        totals = [sum(int(thread.sampled.sum()) for thread in tree) for tree in trees]
        chains = [sequential_tokens(tree) for tree in trees]
        yield Finding(
            "ok",
            subject,
            f"{_range(threads)} threads, {_range(totals)} sampled tokens, {_range(chains)} of them"
            " one after the other",
        )
        if not self._bounded:
            yield Finding("ok", subject, f"limits that hold them all: {_least_limits(trees)}")
            return
        broken = collections.Counter(broken_bound(tree, self._task.bounds) for tree in trees)
        fitting = broken.pop("", 0)
        if not broken:
            yield Finding("ok", subject, "all fit the limits")
            return
        which = ", ".join(
            f"{count:,} by limits.{_LIMIT_OF[bound]}" for bound, count in broken.most_common()
        )
        yield Finding(
            "note" if fitting > len(trees) / 2 else "fault",
            subject,
            f"{len(trees) - fitting:,} of {len(trees):,} would be dropped: {which}",
            f"limits that hold them all: {_least_limits(trees)}",
        )

    def try_scores(self, time_limit: float, memory_limit: float) -> Iterator[Finding]:
        """Scores right, altered and hostile answers in the sandbox."""
        scored = self.problems[:_SCORED_PROBLEMS]
        with _SandboxTrial(self._task, time_limit, memory_limit) as sandbox:
            yield from self._score_right_answers(sandbox, scored)
            yield from self._score_hostile_answers(sandbox, scored[:3])
            yield from sandbox.judge_seconds()

    def _score_right_answers(
        self, sandbox: _SandboxTrial, scored: list[Problem]
    ) -> Iterator[Finding]:
        """Scores demonstrated answers twice, and other spellings of them once."""
        subject = "scores"
        refused: dict[str, str] = {}  # How it is spelled -> the first such answer that is wrong.
        pairs = [
            (problem, self._right_answers[problem.id])
            for problem in scored
            if problem.id in self._right_answers
        ]
        for problem, answer in pairs:
            first = sandbox.score(problem, answer)
            if first != sandbox.score(problem, answer):
                raise _Faulty(
                    subject,
                    f"{cut(answer)!r} is scored differently the second time",
                    "let the score depend on problem and answer alone",
                )
            if not first.correct:
                raise _Faulty(
                    subject,
                    f"{cut(answer)!r} is right in this process and wrong in the sandbox",
                    "the sandbox makes the task from its settings alone: keep no other state",
                )
            for how, spelling in _spellings(answer).items():
                if not sandbox.score(problem, spelling, how).correct:
                    refused.setdefault(how, spelling)
        if pairs:
            yield Finding("ok", subject, f"{len(pairs)} right answers, each twice: alike")
        if refused:
            wrong = ", ".join(f"{how} ({cut(spelling)!r})" for how, spelling in refused.items())
            yield Finding(
                "note",
                subject,
                f"one spelling only: right answers are wrong with {wrong}",
                "fine if models learn it from demonstrations; else have `score` accept them",
            )

    def _score_hostile_answers(
        self, sandbox: _SandboxTrial, scored: list[Problem]
    ) -> Iterator[Finding]:
        subject = "scores"
        for problem in scored:
            for what, answer in HOSTILE_ANSWERS.items():
                score = sandbox.score(problem, answer, what)
                if score.correct and answer != self._right_answers.get(problem.id):
                    raise _Faulty(
                        subject,
                        f"{what} ({cut(answer)!r}) counts as right for"
                        f" {cut(self._task.show(problem))}",
                        "RL will find that answer: accept only what you can read",
                    )
        yield Finding("ok", subject, f"{len(HOSTILE_ANSWERS)} hostile answers: wrong, and no error")


class _SandboxTrial:
    """A sandboxed verifier that keeps the time; a context manager.

    Args:
      task: whose answers are scored.
      time_limit, memory_limit: see `check_task`.
    """

    def __init__(self, task: Task, time_limit: float, memory_limit: float):
        self._verifier = SandboxedVerifier(task, time_limit, memory_limit)
        self._seconds: list[float] = []
        self._warm = False

    def __enter__(self) -> _SandboxTrial:
        self._verifier.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._verifier.__exit__(*exception)

    def score(self, problem: Problem, answer: str, what: str = "") -> Score:
        """Returns the score of one answer; `what` describes the answer for the finding."""
        subject = "scores"
        said = io.StringIO()
        began = time.perf_counter()
        try:
            with contextlib.redirect_stderr(said):
                (outcome,) = self._verifier.verify([(problem, answer)])
        except UserError as error:
            raise _Faulty(subject, str(error)) from None
        if self._warm:  # The first answer waits for the process.
            self._seconds.append(time.perf_counter() - began)
        self._warm = True
        if isinstance(outcome, Failure):
            shown = f"{what} ({cut(answer)!r})" if what else repr(cut(answer))
            reason = said.getvalue().strip().removeprefix("verifier: ") or outcome.value
            raise _Faulty(
                subject,
                f"no verdict on {shown}: {reason}",
                "have `score` return Score(0.0, correct=False, stated=None, reason=...) for what"
                " it cannot read",
            )
        return outcome

    def judge_seconds(self) -> Iterator[Finding]:
        """Tells how long a score took."""
        if not self._seconds:
            return
        median = statistics.median(self._seconds)
        text = f"{_duration(median)} an answer, {_duration(max(self._seconds))} the slowest"
        if median <= _SLOW_SECONDS:
            yield Finding("ok", "scores", text)
        else:
            yield Finding(
                "note",
                "scores",
                text,
                f"a step of 100 trees waits {100 * median:.0f} s for its verdicts",
            )


_LIMIT_OF = {
    "dropped_window": "window",
    "dropped_max_thread_tokens": "max_thread_tokens",
    "dropped_threads": "max_threads, limits.children or limits.max_depth",
}


def _remade(task: Task) -> Task:
    """Returns the task as a worker process gets it."""
    return remake(config_of(task), task.bounds)


def _call(subject: str, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns the function's result; what it raises becomes a fault with its line."""
    try:
        return function(*arguments)
    except _Faulty:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        last = frames[-1]
        words = visible(f"{type(error).__name__}: {error}")
        raise _Faulty(
            subject,
            f"{what} raises {words} ({last.filename}, line {last.lineno})",
            "mend the task there",
        ) from None


def _check_thread(task: Task, thread: Any, subject: str) -> None:
    """Raises a fault if a demonstration is no tree of threads in the task's alphabet."""
    if not isinstance(thread, Thread):
        raise _Faulty(subject, f"demonstrate returns {thread!r}", "return a Thread")
    if not isinstance(thread.prompt, str) or not isinstance(thread.answer, str):
        raise _Faulty(
            subject,
            f"a thread has the prompt {thread.prompt!r} and the answer {thread.answer!r}",
            'both are texts; an answer that was not found is ""',
        )
    if not isinstance(thread.body, tuple):
        raise _Faulty(
            subject, f"the body of a thread is {thread.body!r}", "a tuple of texts and Spawns"
        )
    _check_alphabet(task, subject, "a prompt or message", thread.prompt)
    _check_alphabet(task, subject, "an answer", thread.answer)
    for part in thread.body:
        if isinstance(part, Spawn):
            if not part.children:
                raise _Faulty(subject, "a Spawn has no children", "leave it out")
            for child in part.children:
                _check_thread(task, child, subject)
        elif isinstance(part, str):
            _check_alphabet(task, subject, "a body", part)
        else:
            raise _Faulty(
                subject, f"the body of a thread holds {part!r}", "texts and Spawns, in their order"
            )


def _check_alphabet(task: Task, subject: str, what: str, text: str) -> None:
    unknown = sorted(set(text) - set(task.alphabet) - set("".join(task.phrases)))
    if unknown:
        raise _Faulty(
            subject,
            f"{what} holds {unknown[0]!r}, which the task's alphabet lacks: {cut(text)!r}",
            "add it to `alphabet`: a tokenizer that was trained without it refuses the text",
        )


def _tokenizer(task: Task, threads: Mapping[str, list[Thread]]) -> Tokenizer:
    """Trains a tokenizer on the demonstrations, as a data build does."""
    texts = []
    for made in threads.values():
        for root in made:
            for thread in flatten(root):
                texts += [thread.prompt, thread.answer]
                texts += [part for part in thread.body if isinstance(part, str)]
    return _call(
        "demonstrations",
        "training a tokenizer",
        SentencePieceTokenizer.train,
        texts,
        task.phrases,
        task.alphabet,
    )


def _depth(thread: Thread) -> int:
    """Returns the levels of threads below this one."""
    children = [child for part in thread.body if isinstance(part, Spawn) for child in part.children]
    return max((1 + _depth(child) for child in children), default=0)


def _least_limits(trees: list[list[ThreadTokens]]) -> str:
    """Returns the smallest limits that hold every tree, as fields of `Limits`."""
    threads = [thread for tree in trees for thread in tree]
    spawned = collections.Counter(
        (number, thread.parent, thread.round)
        for number, tree in enumerate(trees)
        for thread in tree
        if thread.depth > 0
    )
    bounds = Bounds(
        window=max(int(thread.position.max()) + 2 for thread in threads),
        max_thread_tokens=max(len(thread.tokens) for thread in threads),
        max_threads=max(len(tree) for tree in trees),
        children=max(spawned.values(), default=1),
        max_depth=max(1, *(thread.depth for thread in threads)),
    )
    # A spawn divides the free threads among its children, so nested trees may need some to spare.
    while any(broken_bound(tree, bounds) for tree in trees):
        bounds = dataclasses.replace(bounds, max_threads=bounds.max_threads + 1)
    fields = dataclasses.asdict(bounds)
    return ", ".join(f"{name}={value}" for name, value in fields.items())


def _spellings(answer: str) -> dict[str, str]:
    """Returns other spellings of an answer that a person would take for the same."""
    spellings = {
        "a space before": f" {answer}",
        "a space after": f"{answer} ",
        "a full stop": f"{answer}.",
        "capitals": answer.upper(),
        "small letters": answer.lower(),
        "no spaces": answer.replace(" ", ""),
    }
    return {how: text for how, text in spellings.items() if text != answer}


def _range(values: list[int]) -> str:
    return f"{min(values):,} to {max(values):,}" if min(values) < max(values) else f"{values[0]:,}"


def _duration(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _shown(data: Any) -> str:
    return cut(visible(repr(dict(data) if isinstance(data, Mapping) else data)))
