"""What the models of a run had seen in their training when they were evaluated."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apr_jax.evaluate.folder import parse_lines
from apr_jax.evaluate.scores import mean
from apr_jax.train.metrics.recorder import FILE


def trainings(models: Path, steps: Mapping[str, int]) -> dict[str, dict[str, float]]:
    """Returns what each training had read and made up to a step.

    Args:
      models: folder of the run that trained the models.
      steps: model, for example "apr/rl" -> the step that was evaluated.

    Returns:
      model -> its `steps`; the `tokens` that its updates had read; for supervised models the
      `epochs`, for others the `trees`. Models whose metrics are not in the folder are left out.
      Not every step has a line of metrics, so tokens and trees are the mean of the lines times the
      steps.
    """
    found = {}
    for model, step in steps.items():
        lines = [line for line in read_metrics(models / model) if line["step"] <= step]
        if not lines or not step:
            continue
        seen: dict[str, float] = {"steps": step}
        for name in ("tokens", "trees"):
            values = [line[name] for line in lines if line.get(name) is not None]
            if values:
                seen[name] = step * mean(values)
        last = lines[-1]
        if last.get("epochs") is not None:
            seen["epochs"] = last["epochs"] / last["step"] * step
        found[model] = seen
    return found


def read_metrics(training: Path) -> list[dict[str, Any]]:
    """Reads the metrics of a training; there are none if the folder has no such file.

    A half line at the end, which a killed process leaves, is left out.

    Raises:
      UserError: a line is damaged.
    """
    path = training / FILE
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    whole_lines = text[: text.rfind("\n") + 1]
    return parse_lines(path, whole_lines, "delete the line")
