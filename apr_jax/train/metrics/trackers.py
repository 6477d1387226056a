"""Programs that show the metrics of a run while it goes on: TensorBoard, Weights & Biases.

`train.tracker` chooses one of them. A tracker gets what is written to metrics.jsonl, and the text
of the trees that validations sample. It has a copy only: metrics.jsonl is what the rest of the
library reads, and a tracker that fails does not end the run.
"""

import contextlib
import html
import importlib.util
import json
import os
import secrets
from pathlib import Path
from typing import Any

from apr_jax.errors import UsageError, UserError
from apr_jax.io.disk_errors import disk_errors
from apr_jax.io.json_files import write_json
from apr_jax.io.terminal import Terminal, one_line

# Names that `train.tracker` may have -> the package that the tracker needs. The name is that of the
# extra, too.
_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}

# Scalars that TensorBoard may queue. Its thread dies when the disk is full, and then a full queue
# would stop the run.
_QUEUE = 100_000

# File of a run that says which run of Weights & Biases it is.
WANDB_FILE = "wandb.json"
_PROJECT = "apr_jax"


class Tracker:
    """Takes what a run logs, and shows it nowhere. It is the base class of those that do."""

    def numbers(self, step: int, numbers: dict[str, float]) -> None:
        """Shows the metrics of a step."""

    def text(self, step: int, name: str, text: str) -> None:
        """Shows a text as it is, with its spaces and line breaks.

        The metrics of the same step come later, and perhaps those of the step before, too.
        """

    def close(self) -> None:
        """Sends what is left."""


def require_tracker(name: str) -> None:
    """Raises UsageError if the package of the tracker `train.tracker=name` is not installed."""
    package = _PACKAGES.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        raise UsageError(
            f"train.tracker={name}: needs the package {package}; pip install 'apr_jax[{name}]'"
        )


def open_tracker(
    name: str, folder: Path, start: int, title: str, config: dict[str, Any]
) -> Tracker:
    """Opens the tracker that `train.tracker` names.

    Args:
      name: "none", "tensorboard" or "wandb".
      folder: folder of the run, on this machine.
      start: step from which the run goes on. What was shown of later steps is taken back, or kept
        if it stays the same.
      title: name of the run for people.
      config: the experiment as plain values.

    Raises:
      UserError: the tracker does not start.
    """
    if name == "tensorboard":
        return TensorBoard(folder, start)
    if name == "wandb":
        return WeightsAndBiases(folder, title, config)
    return Tracker()


class TensorBoard(Tracker):
    """Writes the files of TensorBoard into the folder `tensorboard` of a run.

    Args:
      folder: folder of the run, on this machine.
      start: step from which the run goes on. TensorBoard forgets what earlier starts wrote of later
        steps.
    """

    def __init__(self, folder: Path, start: int):
        import tensorboardX

        self._writer = tensorboardX.SummaryWriter(
            str(folder / "tensorboard"), purge_step=start + 1, max_queue=_QUEUE
        )

    def numbers(self, step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        # TensorBoard reads Markdown, in which indented lines are code.
        code = "".join(f"    {line}\n" for line in text.splitlines())
        self._writer.add_text(name, code, step)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # A full disk was reported by metrics.jsonl before.
            self._writer.close()


class WeightsAndBiases(Tracker):
    """Sends a run to Weights & Biases.

    Its environment variables hold: `WANDB_MODE=offline` writes the files that `wandb sync` uploads
    later, and `WANDB_PROJECT` names another project than apr_jax. A run in one folder is one run
    there, however often it is started again: its id stands in wandb.json.

    A run that was killed does some steps again, bit for bit. W&B keeps what it knows of them.

    Args:
      folder: folder of the run, on this machine.
      title: name of the run for people.
      config: the experiment as plain values.

    Raises:
      UserError: wandb does not start, for example because nobody is logged in.
    """

    def __init__(self, folder: Path, title: str, config: dict[str, Any]):
        import wandb

        self._texts: dict[int, dict[str, str]] = {}  # Texts that wait for the numbers of a step.
        self._html = wandb.Html
        run_id = _run_id(folder / WANDB_FILE)
        try:
            self._run: wandb.Run | None = wandb.init(
                project=os.environ.get("WANDB_PROJECT", _PROJECT),
                name=os.environ.get("WANDB_NAME", title),
                id=run_id,
                resume="allow",
                dir=str(folder),
                config=config,
                # The terminal is the progress bar's.
                settings=wandb.Settings(console="off"),
            )
        except (wandb.Error, OSError) as error:
            raise UserError(
                f"train.tracker=wandb: wandb does not start: {one_line(str(error))};"
                " `wandb login` once, or set WANDB_MODE=offline"
            ) from None

    def numbers(self, step: int, numbers: dict[str, float]) -> None:
        texts = self._texts.pop(step, {})
        run = self._run
        if run is None:
            return
        panels = {name: self._html(_preformatted(text)) for name, text in texts.items()}
        # When its process has died, wandb raises errors of many classes, private ones too.
        try:
            # W&B takes no step twice: a lower one is known to it from an earlier start.
            if step >= run.step:
                run.log({**numbers, **panels}, step=step, commit=True)
        except Exception as error:
            self._give_up(error)

    def text(self, step: int, name: str, text: str) -> None:
        self._texts.setdefault(step, {})[name] = text

    def close(self) -> None:
        if self._run is None:
            return
        try:
            self._run.finish()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Goes on without W&B, and says so."""
        self._run = None
        reason = one_line(str(error)) or type(error).__name__
        Terminal(stderr=True).print(
            f"train.tracker=wandb: wandb has failed: {reason}; the run goes on without it, and"
            " metrics.jsonl has everything",
            soft_wrap=True,
        )


def _run_id(path: Path) -> str:
    """Returns the id of a run in Weights & Biases, which is made at its first start.

    Raises:
      UserError: the file is damaged, or the disk is full.
    """
    if path.is_file():
        try:
            return str(json.loads(path.read_text(encoding="utf-8"))["id"])
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{path}: must be an object with the id of the run in Weights & Biases; delete the"
                " file to begin a new one"
            ) from None
    run_id = secrets.token_hex(4)
    with disk_errors(path):
        write_json(path, {"id": run_id})
    return run_id


def _preformatted(text: str) -> str:
    """Returns a page of HTML that shows a text as it is."""
    return f"<pre>{html.escape(text)}</pre>"
