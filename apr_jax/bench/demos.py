"""Makes demonstrations to measure with, without built data."""

import dataclasses

from apr_jax.config import Experiment
from apr_jax.data.demonstrate import Bounds, Recipe, texts
from apr_jax.tasks import Problem, draw
from apr_jax.text.tokenizer import Tokenizer


def make_recipe(
    config: Experiment, count: int, method: str = "apr"
) -> tuple[Recipe, list[Problem]]:
    """Makes a recipe of demonstrations by a method, and draws `count` problems of the task."""
    problems = [draw(config.task, seed) for seed in range(count)]
    bounds = Bounds(
        **{field.name: getattr(config.limits, field.name) for field in dataclasses.fields(Bounds)}
    )
    recipe = Recipe(config.task, config.solver, method, config.data.seed, b"", bounds)
    written = [text for problem in problems[:256] for text in texts(recipe, problem)]
    task = recipe.countdown()
    tokenizer = Tokenizer.train(written, task.phrases, task.alphabet)
    return dataclasses.replace(recipe, tokenizer=tokenizer.to_bytes()), problems
