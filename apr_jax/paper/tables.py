"""Tables 1 to 3 of the paper and those of this report, as plain rows: the report and results.json
take them from here.

A cell that holds a score is {"mean", "low", "high", "n"}, in Tables 1 to 3 with the measures of its
trees; the paper's figure beside it is `paper`, in percent."""

from __future__ import annotations

from typing import Any

from apr_jax.evaluate import failures
from apr_jax.evaluate.scores import MEASURES, summarize
from apr_jax.paper import published_figures
from apr_jax.paper.results import Answered, Results, Score, share
from apr_jax.paper.suite import DRAWN, MODELS, STAGES


def cell(score: Score) -> dict[str, Any]:
    """A score as JSON."""
    return {"mean": score.mean, "low": score.low, "high": score.high, "n": len(score.values)}


def main_table(results: Results) -> dict[str, dict[str, Any]]:
    """Name -> the plain greedy evaluation: its summary, its label, intervals of its measures, and
    failures by kind.
    """
    found = {}
    for name, one in results.plain().items():
        kinds = failures.count(one.traces)
        measures = {key: cell(one.measure(key)) for key in MEASURES}
        about = {
            "label": one.label,
            "thread_tokens": one.thread_tokens(),
            "failures": kinds,
            "measures": measures,
        }
        found[name] = one.summary | about
    return found


def sampled_failures(results: Results) -> dict[str, dict[str, Any]]:
    """Name -> the plain evaluation at the highest temperature, as comparisons are: its label, `n`
    trees, failures by kind.
    """
    temperatures = results.config.evaluate.temperatures
    shown = results.plain(max(temperatures)) if temperatures else {}
    return {
        name: {"label": one.label, "n": len(one.traces), "failures": failures.count(one.traces)}
        for name, one in shown.items()
    }


def oracle_table(results: Results) -> dict[str, dict[str, Any]]:
    """Method -> success and cost of its demonstrations of the test problems."""
    found = {}
    for method, traces in results.oracle.items():
        summary = summarize(
            [trace | {"threads": [], "claimed": trace["correct"]} for trace in traces]
        )
        score = share({trace["id"]: float(trace["correct"]) for trace in traces})
        found[method] = {"accuracy": cell(score)} | {key: summary[key] for key in MEASURES}
    return found


def temperature_table(
    results: Results, models: dict[str, dict[float, float]]
) -> list[dict[str, Any]]:
    """Rows of accuracy by temperature, each with what the threads did.

    Args:
      models: what the paper has: model, maybe followed by " enforced", -> temperature -> accuracy
        in percent.

    Returns:
      rows with `model`, `label`, `run` (whether there is anything), `step` (of the model: a run has
      one; None if nothing ran)
      and `cells`: temperature -> {"ours", "paper"}, each or None.
    """
    temperatures = sorted(
        {0.0, *results.config.evaluate.temperatures, *(t for row in models.values() for t in row)}
    )
    forced = results.config.evaluate.forced
    rows = []
    for name, published in models.items():
        model, _, enforced = name.partition(" ")
        count = forced[-1] if forced else -1
        found = {
            t: results.get(model, temperature=t, **({"forced": count} if enforced else {}))
            for t in temperatures
        }
        cells = {
            f"{temperature:g}": {
                "ours": cell(one.accuracy()) | one.spent(one.groups) if one else None,
                "paper": published.get(temperature),
            }
            for temperature, one in found.items()
        }
        held = (
            f", held to {count} children"
            if enforced and forced
            else enforced and ", children enforced"
        )
        rows.append(
            {
                "model": name,
                "label": MODELS[model] + (held or ""),
                "run": any(found.values()),
                "step": next((one.summary["step"] for one in found.values() if one), None),
                "cells": cells,
            }
        )
    return rows


def all_tables(results: Results) -> dict[str, list[dict[str, Any]]]:
    """Tables 1 to 3 by name; APR on drawn beams is the last of Table 3."""
    return {
        "table1": temperature_table(results, published_figures.TABLE_1),
        "table2": temperature_table(results, published_figures.TABLE_2),
        "table3": temperature_table(
            results, published_figures.TABLE_3 | {f"{DRAWN}/{stage}": {} for stage in STAGES}
        ),
    }


def every_score(results: Results) -> list[dict[str, Any]]:
    """One row an evaluation, whatever it is for: accuracy and what the threads did."""
    return [_score(one) for one in results.answered.values()]


def _score(one: Answered) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": one.evaluation.name,
        "label": one.label,
        "accuracy": cell(one.accuracy()),
    }
    row |= {key: one.summary[key] for key in (*MEASURES, "spawned", "truncated", "samples")}
    if one.summary["samples"] > 1:
        row["by_n"] = [
            {"n": n, "pass": cell(passed), "cons": cell(agreed), "total_tokens": tokens}
            for n, (passed, agreed, tokens) in enumerate(one.by_n, start=1)
        ]
    return row
