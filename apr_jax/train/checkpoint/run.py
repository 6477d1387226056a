"""What stays the same through a run, so that a run never goes on from another run's checkpoint."""

import base64
import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from apr_jax.compare import FREE, LENGTHS, differences
from apr_jax.config import Experiment, to_dict
from apr_jax.errors import UserError
from apr_jax.tasks import Method
from apr_jax.text.stored import tokenizer_from_bytes
from apr_jax.text.tokenizer import Tokenizer

_REMEDY = "use the same settings, or another --workdir"
_REMEDIES = {"data": "give --data the folder of the same data, or use another --workdir"}


@dataclasses.dataclass(frozen=True)
class Run:
    """What stays the same through a run, and is written into each of its checkpoints.

    Attributes:
      config: the experiment.
      method: the method whose demonstrations the model learned from.
      stage: "sft" or "rl".
      tokenizer: the tokenizer of the run.
      origin: digest of the parameters from which the run started, or "" if they were random.
      file_method: what the method is if its demonstrations are those of a file of thread trees;
        None if it is one of the task's own.
      data: SHA-256 of what the training reads, demonstrations or problems.
    """

    config: Experiment
    method: str
    stage: str
    tokenizer: Tokenizer
    origin: str = ""
    file_method: Method | None = None
    data: str = ""

    def to_meta(self) -> dict[str, Any]:
        """Returns the run as it stands in the `meta` of a step."""
        return {
            "config": to_dict(self.config),
            "method": self.method,
            "file_method": self.file_method and dataclasses.asdict(self.file_method),
            "stage": self.stage,
            "origin": self.origin,
            "data": self.data,
            "tokenizer": _encode(self.tokenizer),
        }


def read_tokenizer(meta: dict[str, Any]) -> Tokenizer:
    """Reads the tokenizer of the run from the `meta` of a step."""
    return tokenizer_from_bytes(base64.b64decode(meta["tokenizer"]))


def check_same_run(run: Run, meta: dict[str, Any], folder: Path) -> None:
    """Checks that a run may go on from a step, whose folder and `meta` these are.

    Raises:
      UserError: another run saved the step; the message names what differs.
    """
    wanted = {
        "stage": run.stage,
        "method": run.method,
        "tokenizer": _fingerprint(_encode(run.tokenizer)),
        "init": run.origin,
        "data": run.data[:16],
    }
    saved = {
        "stage": meta["stage"],
        "method": meta["method"],
        "tokenizer": _fingerprint(meta["tokenizer"]),
        "init": meta["origin"],
        "data": meta.get("data", "")[:16],
    }
    for name in wanted:
        if wanted[name] != saved[name]:
            raise UserError(
                f"checkpoint {folder}: was saved with {name}={saved[name]!r}, not"
                f" {wanted[name]!r}; {_REMEDIES.get(name, _REMEDY)}"
            )

    settings_of_other_stage = "train.rl." if run.stage == "sft" else "train.sft."
    free = (*FREE, *LENGTHS, settings_of_other_stage)
    differing = [
        f"{name}={old!r} (now {new!r})"
        for name, old, new in differences(meta["config"], run.config, free)
    ]
    if differing:
        raise UserError(f"checkpoint {folder}: was saved with {', '.join(differing)}; {_REMEDY}")


def _encode(tokenizer: Tokenizer) -> str:
    """Returns a tokenizer as text for JSON."""
    return base64.b64encode(tokenizer.to_bytes()).decode()


def _fingerprint(text: str) -> str:
    """Returns 16 hex digits that stand for a long text in a message."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
