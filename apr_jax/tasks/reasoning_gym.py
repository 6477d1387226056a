"""Any data set of reasoning-gym as a task, with the package's own problems and scores.

    task=TaskConfig("reasoning_gym", dataset="leg_counting", options={"max_animals": 4})

reasoning-gym (github.com/open-thought/reasoning-gym) makes problems from a seed and a data set's
options, and scores an answer from 0 to 1. A problem here is one such entry: its seed makes it again
where an answer is scored, so an entry may hold what JSON cannot. There are no demonstrations:
training starts from a model that was pretrained, or from demonstrations in a file of your own.

Needs `pip install 'apr_jax[tasks]'`. Its `countdown` is another puzzle than the paper's, which is
`TaskConfig("countdown")`. Some of its scorers accept a single spelling of the answer; `apr task
check` shows that.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import string
from typing import Any

from apr_jax.tasks.base import Problem, Score, Task

_SEEDS = 2**31  # Some data sets seed numpy, which takes 32 bits.
_ALPHABET_DRAWS = 200  # Entries that are read for characters beyond ASCII.


@dataclasses.dataclass(frozen=True)
class ReasoningGymConfig:
    """Settings of the task.

    Attributes:
      dataset: a data set's name in reasoning-gym.
      options: options of that data set, passed on as they are.
      threshold: an answer of at least this reward counts as correct in accuracies.
    """

    dataset: str = "leg_counting"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    threshold: float = 1.0

    def __post_init__(self):
        if not 0 < self.threshold <= 1:
            raise ValueError(f"task.threshold={self.threshold} must be above 0 and at most 1")
        names = _dataset_names()
        if self.dataset not in names:
            near = difflib.get_close_matches(self.dataset, names, n=1, cutoff=0.0)
            raise ValueError(
                f"task.dataset={self.dataset!r}: reasoning-gym has no such data set; did you mean"
                f" {near[0]!r}?"
            )
        taken = {"seed", "size"} & set(self.options)
        if taken:
            raise ValueError(
                f"task.options[{min(taken)!r}]: must be left out; seeds and numbers of problems"
                " follow from the experiment's `data`"
            )
        try:
            _entry(self.dataset, json.dumps(self.options), 0)
        except Exception as error:  # What a data set refuses, it refuses in its own way.
            raise ValueError(
                f"task.options={self.options!r}: the data set {self.dataset!r} refuses them"
                f" ({type(error).__name__}: {error})"
            ) from None


class ReasoningGym(Task):
    """Questions of one data set of reasoning-gym; problems hold its `seed` and its `question`."""

    Config = ReasoningGymConfig

    @property
    def alphabet(self) -> str:
        """ASCII, and what else the first entries hold in questions and answers."""
        found = set(string.printable)
        for seed in range(_ALPHABET_DRAWS):
            entry = self._entry(seed)
            found.update(entry["question"], _text(entry["answer"]))
        return "".join(sorted(found - set("\r\x0b\x0c")))

    def draw(self, seed: int) -> Problem:
        seed %= _SEEDS
        entry = self._entry(seed)
        return Problem(f"entry-{seed}", {"seed": seed, "question": entry["question"]})

    def key(self, problem: Problem) -> str:
        """Two entries of the same question are the same problem."""
        return str(problem.data["question"])

    def prompt(self, problem: Problem, condition: int | None = None) -> str:
        return str(problem.data["question"])

    def show(self, problem: Problem) -> str:
        return " ".join(str(problem.data["question"]).split())

    def score(self, problem: Problem, answer: str) -> Score:
        if not answer.strip():
            return Score(0.0, correct=False, stated=None, reason="states nothing")
        entry = self._entry(problem.data["seed"])
        reward = self._dataset_of(problem).score_answer(answer, entry)
        reward = min(max(float(reward), 0.0), 1.0)
        correct = reward >= self.config.threshold
        reason = "" if correct else f"reward {reward:g}; an answer is {_text(entry['answer'])!r}"
        return Score(reward, correct, answer.strip(), reason)

    def check(self, problem: Problem) -> Problem:
        seed = problem.data.get("seed")
        if type(seed) is not int or not 0 <= seed < _SEEDS:
            raise ValueError(f'"seed" {seed!r} must be a whole number from 0 to {_SEEDS - 1}')
        question = self._entry(seed)["question"]
        if problem.data.get("question") != question:
            raise ValueError(
                f'"question" is not the one that "seed" {seed} gives with this version of'
                f" reasoning-gym and these options: {question!r}"
            )
        return problem

    def _entry(self, seed: int) -> dict[str, Any]:
        return _entry(self.config.dataset, json.dumps(self.config.options), seed)

    def _dataset_of(self, problem: Problem) -> Any:
        return _make(self.config.dataset, json.dumps(self.config.options), problem.data["seed"])


def _text(answer: Any) -> str:
    """Returns an entry's answer as text; a few data sets have none, because many are right."""
    return "" if answer is None else str(answer)


@functools.lru_cache(maxsize=1)
def _dataset_names() -> list[str]:
    """Returns the names of all data sets.

    Raises:
      ValueError: reasoning-gym is not installed.
    """
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ValueError(
            f"task.kind='reasoning_gym': needs reasoning-gym ({error}); pip install"
            " 'apr_jax[tasks]'"
        ) from None
    return sorted(DATASETS)


@functools.lru_cache(maxsize=64)
def _make(name: str, options: str, seed: int) -> Any:
    """Returns the data set whose only entry is that of the seed."""
    import reasoning_gym

    return reasoning_gym.create_dataset(name, size=1, seed=seed, **json.loads(options))


@functools.lru_cache(maxsize=4096)
def _entry(name: str, options: str, seed: int) -> dict[str, Any]:
    """Returns the entry of a seed: `question`, `answer` and `metadata`."""
    entry: dict[str, Any] = _make(name, options, seed)[0]
    return entry
