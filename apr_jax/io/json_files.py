"""How the library writes JSON: files that hold one value, and files of JSON lines.

A file of JSON lines (`.jsonl`) holds one value a line, so that lines can be appended to it.
"""

import json
from pathlib import Path
from typing import Any

from apr_jax.io.storage import write_text


def write_json(path: Path, value: Any) -> None:
    """Writes a value to a file as indented JSON; the file appears whole or not at all.

    Args:
      path: of this machine or in a bucket; an older file there is replaced.
      value: dicts, lists, tuples (read back as lists), strings, numbers, booleans and None.

    Raises:
      OSError: the file cannot be written.
      UserError: the bucket cannot be written.
      TypeError: JSON cannot hold the value.
    """
    write_text(path, json.dumps(value, indent=2) + "\n")


def json_line(value: Any) -> str:
    """Returns a value as one line of a file of JSON lines, line end included.

    Raises:
      TypeError: JSON cannot hold the value.
    """
    return json.dumps(value) + "\n"
