"""Makes demonstrations to measure with, without built data."""

import dataclasses

from apr_jax.config import Experiment
from apr_jax.data.demonstrate import Recipe, texts
from apr_jax.tasks import Bounds, Problem, make_task
from apr_jax.text.sentence_piece import SentencePieceTokenizer


def make_recipe(
    config: Experiment, count: int, method: str = "apr"
) -> tuple[Recipe, list[Problem]]:
    """Makes a recipe of demonstrations by a method, and draws `count` problems of the task."""
    task = make_task(config.task, config.limits)
    problems = [task.draw(seed) for seed in range(count)]
    bounds = Bounds.of(config.limits)
    recipe = Recipe(config.task, method, config.data.seed, b"", bounds, config.data.correct_only)
    written = [text for problem in problems[:256] for text in texts(recipe, problem)]
    tokenizer = SentencePieceTokenizer.train(written, task.phrases, task.alphabet)
    return dataclasses.replace(recipe, tokenizer=tokenizer.to_bytes()), problems
