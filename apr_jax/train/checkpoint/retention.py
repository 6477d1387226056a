"""Which step of a run is the best, and which steps are kept.

The best step is the one with the largest validation accuracy, the last of equals. It is kept, and
so are the two last steps, from which an interrupted run goes on.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orbax.checkpoint.checkpoint_managers import preservation_policy

from apr_jax.errors import UserError
from apr_jax.io.library_errors import shows_damage, what_went_wrong
from apr_jax.train.checkpoint.step_files import (
    FOLDER,
    is_whole,
    read_meta,
    step_folders,
    unfinished,
    unreadable,
)

BEST = "validation_accuracy"  # The best step is the one in which this metric is largest.
_NOT_VALIDATED = -1.0  # The score of a step without that metric.
_LAST_STEPS_KEPT = 2


def best_step(path: Path) -> Path:
    """Finds the step that is meant by `path`: the step itself, or the best step of a run.

    Raises:
      UserError: there is no step, `path` is a step whose save has not ended, or one of a run's
        steps is damaged, so that the best of them is not known. No other step takes its place: it
        would silently be another model.
    """
    is_step = path.parent.name == FOLDER and path.name.isdigit() and path.is_dir()
    if is_step or (path / "meta").is_dir():
        if not is_whole(path):
            raise unfinished(path)
        return path
    folders = step_folders(path)
    scores = {folder: _known_score(folder, folders) for folder in folders}
    return max(folders, key=lambda folder: (scores[folder], int(folder.name)))


def _known_score(folder: Path, folders: Sequence[Path]) -> float:
    """Reads how good a step of a run is; `folders` are all its steps.

    Raises:
      UserError: the step is damaged, or cannot be read here and now.
    """
    try:
        return _score(read_meta(folder))
    except Exception as error:
        # A training under way has just deleted the step, because others are better.
        if not folder.is_dir():
            return _NOT_VALIDATED
        if not shows_damage(error):
            raise unreadable(folder, error) from error
        others = ", ".join(str(other) for other in folders if other != folder)
        remedy = f"to take another step, name it ({others})" if others else "train again"
        raise UserError(
            f"checkpoint {folder}: damaged ({what_went_wrong(error)}), so which step of the run is"
            f" the best is not known; {remedy}"
        ) from None


class LastAndBest(preservation_policy.PreservationPolicy):
    """Keeps the last steps and the best one.

    Steps whose score cannot be read are kept too, because one of them may be the best. The scores
    are read from `meta` and not given to Orbax: it could not open a folder in which the metrics of
    one step are damaged. The step that is being saved has no score yet, but is among the last.

    Args:
      folder: the folder of the run's checkpoints.
    """

    def __init__(self, folder: Path):
        self._folder = folder

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Returns, for each of Orbax's descriptions of a step, whether to keep the step."""
        del context
        steps = [info.step for info in checkpoints]
        kept = set(sorted(steps)[-_LAST_STEPS_KEPT:])
        scores = {}
        for step in steps:
            try:
                scores[step] = _score(read_meta(self._folder / str(step)))
            # It is damaged, cannot be read just now, or, as one of the last, is not written yet.
            except Exception:
                kept.add(step)
        if scores:
            kept.add(max(scores, key=lambda step: (scores[step], step)))
        return [step in kept for step in steps]


def _score(meta: dict[str, Any]) -> float:
    """Returns how good a step is, by its `meta`."""
    return float(meta["metrics"].get(BEST, _NOT_VALIDATED))
