"""Tables 1 to 3 of the paper and the other tables of the report.

They are plain rows, for the report and for results.json.

A cell with a score is {"mean", "low", "high", "n"}; in Tables 1 to 3 it also has the measures of
the trees. The paper's figure beside it is `paper`, in percent.
"""

from __future__ import annotations

from typing import Any

from apr_jax.evaluate import failures
from apr_jax.evaluate.scores import MEASURES, summarize
from apr_jax.paper import published_figures
from apr_jax.paper.results import Answered, Results, Score, share
from apr_jax.paper.suite import MODELS, RANDOM_PARENT_BEAM, STAGES, STRONGER_MODELS


def cell(score: Score) -> dict[str, Any]:
    """Writes a score as a cell of a table."""
    return {"mean": score.mean, "low": score.low, "high": score.high, "n": len(score.values)}


def main_table(results: Results) -> dict[str, dict[str, Any]]:
    """Returns the evaluations of the headline.

    Returns:
      name -> its summary with `label`, `thread_tokens`, `failures` by kind, and its `measures` with
      their intervals.
    """
    rows = {}
    for name, answered in results.headline().items():
        rows[name] = answered.summary | {
            "label": answered.label,
            "thread_tokens": answered.thread_tokens(),
            "failures": failures.count(answered.traces),
            "measures": {key: cell(answered.measure(key)) for key in MEASURES},
        }
    return rows


def sampled_failures(results: Results) -> dict[str, dict[str, Any]]:
    """Failures of the plain evaluations at the highest temperature, where comparisons are made.

    Returns:
      name -> its `label`, `n` trees and `failures` by kind; empty if the run has no temperature.
    """
    temperatures = results.config.evaluate.temperatures
    plain = results.plain(max(temperatures)) if temperatures else {}
    return {
        name: {
            "label": answered.label,
            "n": len(answered.traces),
            "failures": failures.count(answered.traces),
        }
        for name, answered in plain.items()
    }


def oracle_table(results: Results) -> dict[str, dict[str, Any]]:
    """Returns, by method, accuracy and cost of its demonstrations of the test problems."""
    rows = {}
    for method, traces in results.oracle.items():
        # Demonstrations are no answers of a model, so their traces lack two fields of a summary.
        completed = [
            trace | {"threads": [], "claimed": trace["correct"], "reward": float(trace["correct"])}
            for trace in traces
        ]
        summary = summarize(completed)
        score = share({trace["id"]: float(trace["correct"]) for trace in traces})
        rows[method] = {"accuracy": cell(score)} | {key: summary[key] for key in MEASURES}
    return rows


def temperature_table(
    results: Results, models: dict[str, dict[float, float]]
) -> list[dict[str, Any]]:
    """Returns the accuracy of models by temperature, with what their threads did.

    Args:
      results: the evaluations of the run.
      models: what the paper has: name -> temperature -> accuracy in percent. The name is a model,
        followed by `published_figures.ENFORCED` where the child count is enforced.

    Returns:
      rows with `model`, `label`, `run` (whether anything was evaluated), `step` (the training step
      of the model; None if nothing was evaluated) and `cells`: temperature -> {"ours", "paper"},
      each of which may be None.
    """
    published_temperatures = {t for accuracy in models.values() for t in accuracy}
    temperatures = sorted({0.0, *results.config.evaluate.temperatures, *published_temperatures})
    return [
        _temperature_row(results, name, published, temperatures)
        for name, published in models.items()
    ]


def _temperature_row(
    results: Results, name: str, published: dict[float, float], temperatures: list[float]
) -> dict[str, Any]:
    """Returns a row of `temperature_table`."""
    model = name.removesuffix(published_figures.ENFORCED)
    label = MODELS[model]
    decoding: dict[str, Any] = {}
    if model != name:
        forced = results.config.evaluate.forced
        # Without a number in the config nothing was evaluated, and -1 finds nothing.
        decoding["forced"] = forced[-1] if forced else -1
        label += f", {forced[-1]} forced children" if forced else ", children enforced"

    cells = {}
    step = None
    for temperature in temperatures:
        answered = results.get(model, temperature=temperature, **decoding)
        ours = None
        if answered:
            ours = cell(answered.accuracy()) | answered.spent(answered.groups)
            step = answered.summary["step"] if step is None else step
        cells[f"{temperature:g}"] = {"ours": ours, "paper": published.get(temperature)}
    return {
        "model": name,
        "label": label,
        "run": any(both["ours"] for both in cells.values()),
        "step": step,
        "cells": cells,
    }


def all_tables(results: Results) -> dict[str, list[dict[str, Any]]]:
    """Tables 1 to 3 by name.

    Table 3 ends with models that the paper's has not: APR with a random parent beam, and the
    stronger serial searches that the run has.
    """
    answered = {one.evaluation.model for one in results.answered.values()}
    random_parent_beam = [f"{RANDOM_PARENT_BEAM}/{stage}" for stage in STAGES]
    stronger = [model for model in STRONGER_MODELS if model in answered]
    ours: dict[str, dict[float, float]] = {model: {} for model in (*random_parent_beam, *stronger)}
    table3 = published_figures.TABLE_3 | ours
    return {
        "table1": temperature_table(results, published_figures.TABLE_1),
        "table2": temperature_table(results, published_figures.TABLE_2),
        "table3": temperature_table(results, table3),
    }


def every_score(results: Results) -> list[dict[str, Any]]:
    """Returns a row for every evaluation, with its accuracy and what its threads did."""
    return [_score(answered) for answered in results.answered.values()]


def _score(answered: Answered) -> dict[str, Any]:
    """Returns a row of `every_score`; `by_n` has pass@n and cons@n if there are several samples."""
    summary = answered.summary
    row: dict[str, Any] = {
        "name": answered.evaluation.name,
        "label": answered.label,
        "accuracy": cell(answered.accuracy()),
    }
    row |= {key: summary[key] for key in (*MEASURES, "spawned", "truncated", "samples")}
    if summary["samples"] > 1:
        row["by_n"] = [
            {"n": n, "pass": cell(passed), "cons": cell(agreed), "total_tokens": tokens}
            for n, (passed, agreed, tokens) in enumerate(answered.by_n, start=1)
        ]
    return row
