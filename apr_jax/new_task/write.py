"""Writes the files with which a task of one's own begins: `apr new`."""

import keyword
import re
from pathlib import Path

from apr_jax.errors import UsageError
from apr_jax.io.storage import write_text

_TEMPLATE = Path(__file__).parent
_FILES = ("my_task.py", "my_task_config.py", "test_my_task.py")


def write_new_task(name: str, folder: Path) -> list[Path]:
    """Writes a task, an experiment and a test, and returns their files.

    Args:
      name: of the task, in words of small letters joined by underscores. The class is called by the
        same words with capitals.
      folder: where the files are written; made if missing.

    Raises:
      UsageError: the name cannot be that of a module, or one of the files is there. Then nothing is
        written.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or keyword.iskeyword(name):
        raise UsageError(
            f"new {name!r}: must be the name of a Python module in small letters, like word_sums"
        )
    files = [folder / file.replace("my_task", name) for file in _FILES]
    there = [str(file) for file in files if file.exists()]
    if there:
        raise UsageError(
            f"new {name}: {', '.join(there)} is there already; take another name, or --out another"
            " folder"
        )

    folder.mkdir(parents=True, exist_ok=True)
    class_name = "".join(word.capitalize() for word in name.split("_"))
    for template, file in zip(_FILES, files, strict=True):
        text = (_TEMPLATE / template).read_text(encoding="utf-8")
        write_text(file, text.replace("MyTask", class_name).replace("my_task", name))
    return files
