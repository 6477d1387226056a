"""A task of one's own in one file: a word is shown with its letters shuffled.

    experiment:  task=TaskConfig("examples/anagrams.py:Anagrams", letters=4)

A serial demonstration writes orders of the letters until one is a word; a parallel one gives every
first letter to a child, which tries the orders that begin with it. docs/adding_a_task.md says what
each part is for.
"""

import dataclasses
import itertools
import random

from apr_jax.tasks import Method, Problem, Score, Spawn, Task, Thread

WORDS = "able acid aunt bark bird calm cold desk dust earl fast fund gold hunt jump lamp milk nest"


@dataclasses.dataclass(frozen=True)
class AnagramConfig:
    """Settings of the task; they are set by TaskConfig(..., letters=3) or --set task.letters=3."""

    letters: int = 4

    def __post_init__(self):
        if not 2 <= self.letters <= 4:
            raise ValueError(f"task.letters={self.letters} must be from 2 to 4")


class Anagrams(Task):
    """Which word is it? Problems hold the shuffled `letters`."""

    Config = AnagramConfig
    alphabet = "abcdefghijklmnopqrstuvwxyz,:!-"

    @property
    def words(self) -> set[str]:
        return {word[: self.config.letters] for word in WORDS.split()}

    @property
    def methods(self) -> dict[str, Method]:
        return {"serial": Method(parallel=False), "parallel": Method(parallel=True, depth=1)}

    def draw(self, seed: int) -> Problem:
        rng = random.Random(f"anagram {seed}")
        word = rng.choice(sorted(self.words))
        return Problem(f"anagram-{seed}", {"letters": "".join(rng.sample(word, len(word)))})

    def prompt(self, problem: Problem, condition: int | None = None) -> str:
        return problem.data["letters"] + ":"

    def demonstrate(self, problem: Problem, method: str, seed: int) -> Thread:
        letters = problem.data["letters"]
        if method == "serial":
            return self._search(self.prompt(problem), "", letters, seed)
        children = tuple(
            self._search(f"{first}-{letters.replace(first, '', 1)}", first, letters, seed)
            for first in sorted(set(letters))
        )
        answer = next((child.answer for child in children if child.answer), "")
        return Thread(self.prompt(problem), (Spawn(children),), answer)

    def _search(self, prompt: str, first: str, letters: str, seed: int) -> Thread:
        """Writes down orders of the letters that begin with `first` until one is a word."""
        rest = sorted(letters.replace(first, "", 1))
        orders = [first + "".join(order) for order in sorted(set(itertools.permutations(rest)))]
        random.Random(f"{letters}{first}{seed}").shuffle(orders)
        tried = list(itertools.takewhile(lambda order: order not in self.words, orders))
        found = orders[len(tried)] if len(tried) < len(orders) else ""
        return Thread(prompt, (",".join(tried) + "!",), found)

    def score(self, problem: Problem, answer: str) -> Score:
        if not answer:
            return Score(0.0, correct=False, stated=None, reason="states no word")
        of_letters = sorted(answer) == sorted(problem.data["letters"])
        correct = of_letters and answer in self.words
        reason = "" if correct else "is no word" if of_letters else "has other letters"
        return Score(float(correct), correct, answer, reason)
