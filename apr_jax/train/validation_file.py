"""What a validation has found so far, on disk, so that a run that was stopped in it goes on there.

    WORKDIR/validation.json   the answers of the last validation, as far as it came

A machine may be taken away more often than a validation takes time. If each start began the
validation anew, such a run would never take another step. The file stays when the validation is
done, and the next validation replaces it.
"""

import json
from pathlib import Path
from typing import Any

import jax

from apr_jax.io.disk_errors import disk_errors
from apr_jax.io.json_files import json_line
from apr_jax.io.lease import Lease
from apr_jax.io.storage import write_text
from apr_jax.train.checkpoint.checksum import json_sum

FILE = "validation.json"


class ValidationFile:
    """The file of a run's last validation, which the first process keeps for all.

    Args:
      workdir: folder of the run.
      lease: lease of the workdir, which is checked before each write.
    """

    def __init__(self, workdir: Path, lease: Lease | None = None):
        self._path = workdir / FILE
        self._lease = lease

    def read(self, identity: str) -> dict[str, Any] | None:
        """Returns what was written under an identity; None if that is not there, or damaged.

        Args:
          identity: tells the validation from every other one, see `write`.
        """
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
            is_whole = found["sum"] == json_sum(found["identity"], found["answers"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):  # It is damaged.
            return None
        if not is_whole or found["identity"] != identity:
            return None
        answers: dict[str, Any] = found["answers"]
        return answers

    def write(self, identity: str, answers: dict[str, Any]) -> None:
        """Replaces the file, whole or not at all, if this is the first process.

        Args:
          identity: tells the validation from every other one: a sum over the weights, the problems
            and the settings.
          answers: JSON values.

        Raises:
          UserError: the disk is full.
        """
        if jax.process_index() > 0:
            return
        if self._lease is not None:
            self._lease.check()
        values = {"identity": identity, "answers": answers, "sum": json_sum(identity, answers)}
        with disk_errors(self._path):
            write_text(self._path, json_line(values))
