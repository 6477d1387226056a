"""Traces of trees whose answers are scored in the test's own process."""

from apr_jax.evaluate.trace import to_trace


def scored_trace(forest, tree, problem, answer, task, tokenizer):
    """The first sample's line of `traces.jsonl` of a tree that joined `answer`."""
    return to_trace(forest, tree, problem, 0, task.score(problem, answer), task, tokenizer)
