"""Stages of a long command, run in their order, each of them once.

The life of a run (OUT is its folder):
1. `reserve` writes OUT/config.json, and refuses a folder that belongs to another config.
2. `run_stages` runs the stages that are not done. A finished stage is noted in OUT/stages.json with
   the seconds that it took. It never runs again, unless the file that it made is gone or a stage
   that it needs had to run again. An unfinished stage goes on from its own checkpoint.

So the command can be stopped and started at will.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from apr_jax.compare import FREE, differences
from apr_jax.config import Experiment, to_dict
from apr_jax.errors import UsageError, UserError
from apr_jax.io.json_files import write_json
from apr_jax.io.runtime import alone_fails, first_decides, is_first
from apr_jax.io.stage_line import StageLine
from apr_jax.io.storage import is_remote

_POLL_SECONDS = 2.0
_READS = 5  # Attempts to read a file of a bucket.


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a command.

    Attributes:
      name: its name in stages.json and on the screen.
      makes: a file or folder that exists when the stage is done.
      run: does the work, or goes on with unfinished work; may return a few words on what came of
        it.
      about: what it does, in a few words.
      needs: names of earlier stages; when one of them runs again, so does this one.
      kind: stages of one kind take the same time for the same work.
      work: how much there is to do, in a unit that all stages of the kind share.
      together: whether all processes run it; otherwise only the first one does.
    """

    name: str
    makes: Path
    run: Callable[[], str | None]
    about: str
    needs: tuple[str, ...] = ()
    kind: str = ""
    work: float = 1.0
    together: bool = False


def run_stages(stages: list[Stage], out: Path, again: tuple[str, ...] = ()) -> None:
    """Runs every stage that is not done or is named in `again`, and the stages that need these."""
    first_decides(lambda: _note_left(stages, out, again))
    record = read_record(out)
    left = [stage for stage in stages if not _is_done(stage, record)]

    for index, stage in enumerate(left):
        if is_first():
            _run_first(stage, left[index:], stages, out, record)
        elif stage.together:
            stage.run()
        else:
            _wait(stage.name, out)

        following = left[index + 1] if index + 1 < len(left) else None
        if following and _folder(following) != _folder(stage):
            _forget_compiled()


def _run_first(
    stage: Stage, left: list[Stage], stages: list[Stage], out: Path, record: dict[str, Any]
) -> None:
    """Runs a stage in the first process, which also prints it and notes it on disk.

    `left` lists this stage and those after it that are not done.
    """
    number = stages.index(stage) + 1
    width = len(str(len(stages)))
    title = f"{number:>{width}}/{len(stages)}  {stage.name}  {stage.about}"
    ahead = estimate(left, stages, record)
    if ahead:
        title += f" ({ahead})"

    # The other processes wait for a stage that this one runs alone; a failure has to end them too.
    failing = contextlib.nullcontext() if stage.together else alone_fails()
    with StageLine(title) as line:
        with failing, _timed(record, stage.name, out):
            words = stage.run()
        minutes = f"{record[stage.name]['seconds'] / 60:.1f} min"
        line.finish(f"{minutes}: {words}" if words else minutes)


def _note_left(stages: list[Stage], out: Path, again: tuple[str, ...]) -> int:
    """Notes in stages.json which stages have to run again, for all processes to read.

    Returns:
      how many stages are left.
    """
    record = read_record(out)
    left: set[str] = set()
    for stage in stages:
        is_done = _is_done(stage, record) and stage.makes.exists()
        if not is_done or stage.name in again or left & set(stage.needs):
            left.add(stage.name)

    stale = [name for name in left if record.get(name, {}).get("done", False)]
    if stale:
        for name in stale:
            record[name]["done"] = False
        write_json(out / "stages.json", record)
    return len(left)


def _is_done(stage: Stage, record: dict[str, Any]) -> bool:
    return bool(record.get(stage.name, {}).get("done", False))


def _wait(name: str, out: Path) -> None:
    """Waits until the first process has noted that the stage is done.

    If the first process fails instead, JAX ends this one.
    """
    while not read_record(out).get(name, {}).get("done", False):
        time.sleep(_POLL_SECONDS)


def estimate(left: list[Stage], stages: list[Stage], record: dict[str, Any]) -> str:
    """Says in words how long the stages that are left will take; "" if nothing is known of them.

    Finished stages of the same kind took so many seconds for each unit of their work. Of stages of
    another kind nothing is known.
    """
    seconds_of: dict[str, float] = {}
    work_of: dict[str, float] = {}
    for stage in stages:
        if stage not in left and stage.name in record:
            seconds = record[stage.name]["seconds"]
            seconds_of[stage.kind] = seconds_of.get(stage.kind, 0.0) + seconds
            work_of[stage.kind] = work_of.get(stage.kind, 0.0) + stage.work

    known = [
        seconds_of[stage.kind] / work_of[stage.kind] * stage.work
        for stage in left
        if stage.kind in seconds_of
    ]
    if not known:
        return ""
    minutes = max(1, round(sum(known) / 60))
    if len(known) == len(left):
        return f"about {minutes} min left"
    return f"at least {minutes} min left"


@contextlib.contextmanager
def _timed(record: dict[str, Any], name: str, out: Path) -> Iterator[None]:
    """Notes a stage in stages.json: begun at once; at the end its seconds, and whether it is done.

    A stage that is stopped half-way is not done, but its seconds are added to those of its next
    start.
    """
    before = record.get(name, {}).get("seconds", 0.0)
    start = time.monotonic()
    done = False
    record[name] = {"seconds": before, "done": done}
    write_json(out / "stages.json", record)
    try:
        yield
        done = True
    finally:
        record[name] = {"seconds": round(before + time.monotonic() - start, 1), "done": done}
        # If the stage failed because the disk is full, that error should be seen, not a second one.
        with contextlib.nullcontext() if done else contextlib.suppress(OSError):
            write_json(out / "stages.json", record)


def _folder(stage: Stage) -> str:
    """Returns the first folder of a stage's name.

    Stages with the same one share compiled programs: all evaluations do, trainings of two methods
    do not.
    """
    return stage.name.partition("/")[0]


def _forget_compiled() -> None:
    """Frees the compiled programs of the stages before, which the next ones do not use."""
    import jax

    jax.clear_caches()


def read_record(out: Path) -> dict[str, Any]:
    """Reads stages.json: stage -> its `seconds` and whether it is `done`; empty if no stage ran."""
    return read_json(out / "stages.json") if (out / "stages.json").is_file() else {}


def reserve(out: Path, config: Experiment) -> None:
    """Writes the config into the folder `out`, and refuses a folder that holds another config.

    Fields of `compare.FREE` may differ.

    Raises:
      UsageError: the folder holds a run of another config.
    """
    values = json.loads(json.dumps(to_dict(config)))
    path = out / "config.json"
    old = read_json(path) if path.is_file() else values
    for name, before, now in differences(old, config, FREE):
        raise UsageError(
            f"{out}: is a run with {name}={before!r}, now {name}={now!r}; choose another --out, or"
            " delete it"
        )
    if is_first() and (not path.is_file() or old != values):
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, values)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a file that `write_json` wrote.

    Raises:
      UserError: the file is missing or damaged.
    """
    # If an object of a bucket is replaced after its size was read and before its bytes are, the
    # bytes come cut off. Then it is read again.
    reads = _READS if is_remote(path) else 1
    for reads_left in reversed(range(reads)):
        try:
            values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return values
        except FileNotFoundError:
            raise UserError(
                f"{path}: no such file; finish the run with `apr reproduce --out {path.parents[0]}`"
                " first"
            ) from None
        except ValueError:
            if reads_left:
                time.sleep(_POLL_SECONDS)
    raise UserError(f"{path}: is damaged; delete it and start again")
