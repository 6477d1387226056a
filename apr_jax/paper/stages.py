"""Stages of a long command, run in their order, each of them once.

The life of a run (OUT is its folder):
1. `reserve` writes OUT/config.json, and refuses a folder that belongs to another config.
2. `run_stages` runs what is not done: a finished stage is noted in OUT/stages.json, with the
   seconds it took, and never runs again, unless what it made is gone or a stage it needs had to run
   again. An unfinished one goes on from its own checkpoint.
So a command of stages can be stopped and started at will.
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
from apr_jax.io.runtime import alone_fails, first_decides, is_first
from apr_jax.io.storage import is_remote, write_text
from apr_jax.io.terminal import Terminal

_LOOK_SECONDS = 2.0
_READS = 5


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
      name: in stages.json and on the screen.
      makes: a file or folder that is there when the stage is done.
      run: does the work, or goes on with it.
      needs: names of stages; when one of them runs again, so does this one.
      kind: stages of one kind take the same time for the same work.
      work: how much there is to do, in any unit of its kind.
      together: by all processes; else by the first one.
    """

    name: str
    makes: Path
    run: Callable[[], object]
    needs: tuple[str, ...] = ()
    kind: str = ""
    work: float = 1.0
    together: bool = False


def run_stages(stages: list[Stage], out: Path, again: tuple[str, ...] = ()) -> None:
    """Runs the stages that are not done, those named `again`, and all that need one that had to run
    again.
    """
    console = Terminal(stderr=True)
    first_decides(lambda: _note_left(stages, out, again))
    record = read_record(out)
    left = [stage for stage in stages if not _is_done(stage, record)]
    for place, stage in enumerate(left):
        if is_first():
            ahead = estimate(left[place:], stages, record)
            number = stages.index(stage) + 1
            console.print(
                f"[bold]stage {number} of {len(stages)}: {stage.name}[/bold] ({ahead})",
                soft_wrap=True,
            )
            with (
                alone_fails() if not stage.together else contextlib.nullcontext(),
                _timed(record, stage.name, out),
            ):
                stage.run()
            console.print(f"stage {stage.name}: done, {record[stage.name]['seconds']:.0f} s")
        elif stage.together:
            stage.run()
        else:
            _wait(stage.name, out)
        if place + 1 < len(left) and _folder(left[place + 1]) != _folder(stage):
            _forget_compiled()


def _note_left(stages: list[Stage], out: Path, again: tuple[str, ...]) -> int:
    """Notes as not done what has to run again, for all processes to read; returns how many stages
    are left.
    """
    record = read_record(out)
    left: set[str] = set()
    for stage in stages:
        done = _is_done(stage, record) and stage.makes.exists()
        if not done or stage.name in again or left & set(stage.needs):
            left.add(stage.name)
    if stale := [name for name in left if record.get(name, {}).get("done", False)]:
        for name in stale:
            record[name]["done"] = False
        write_json(out / "stages.json", record)
    return len(left)


def _is_done(stage: Stage, record: dict[str, Any]) -> bool:
    return bool(record.get(stage.name, {}).get("done", False))


def _wait(name: str, out: Path) -> None:
    """Until the first process has noted that the stage is done.

    If it fails instead, JAX ends this process.
    """
    while not read_record(out).get(name, {}).get("done", False):
        time.sleep(_LOOK_SECONDS)


def estimate(left: list[Stage], stages: list[Stage], record: dict[str, Any]) -> str:
    """How long what is left will take, in words: from the seconds that finished stages of the same
    kind took for their work.
    """
    spent: dict[str, list[float]] = {}
    for stage in stages:
        if stage not in left and stage.name in record:
            seconds, work = spent.setdefault(stage.kind, [0.0, 0.0])
            spent[stage.kind] = [seconds + record[stage.name]["seconds"], work + stage.work]
    known = [
        spent[stage.kind][0] / spent[stage.kind][1] * stage.work
        for stage in left
        if stage.kind in spent
    ]
    unknown = len(left) - len(known)
    parts = (
        [f"about {max(1, round(sum(known) / 60))} min for {len(known)} of them"] if known else []
    )
    parts += [f"{unknown} of a kind that was not timed yet"] if unknown else []
    return f"{len(left)} left: {', '.join(parts)}"


@contextlib.contextmanager
def _timed(record: dict[str, Any], name: str, out: Path) -> Iterator[None]:
    """Notes on disk that a stage was begun, and adds the seconds spent, finished or stopped; only
    one that ended is done.
    """
    before, start = record.get(name, {}).get("seconds", 0.0), time.monotonic()
    done = False
    record[name] = {"seconds": before, "done": done}
    write_json(out / "stages.json", record)
    try:
        yield
        done = True
    finally:
        record[name] = {"seconds": round(before + time.monotonic() - start, 1), "done": done}
        # A full disk has its error already.
        with contextlib.nullcontext() if done else contextlib.suppress(OSError):
            write_json(out / "stages.json", record)


def _folder(stage: Stage) -> str:
    """Stages of one share their compiled programs: evaluations do, trainings of two methods do
    not.
    """
    return stage.name.partition("/")[0]


def _forget_compiled() -> None:
    """Frees the programs of a finished stage: each has its own."""
    import jax

    jax.clear_caches()


def read_record(out: Path) -> dict[str, Any]:
    return read_json(out / "stages.json") if (out / "stages.json").is_file() else {}


def reserve(out: Path, config: Experiment) -> None:
    """Writes the config into the folder; refuses a folder of another one; `compare.FREE` may
    change.
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
    """A file that `write_json` wrote.

    Raises:
      UserError: it is missing or damaged.
    """
    # An object of a bucket that is replaced between asking for its size and reading it comes cut
    # off: it is read again.
    for left in reversed(range(_READS if is_remote(path) else 1)):
        try:
            values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return values
        except FileNotFoundError:
            raise UserError(
                f"{path}: no such file; finish the run with `apr reproduce --out {path.parents[0]}`"
                " first"
            ) from None
        except ValueError:
            if left:
                time.sleep(_LOOK_SECONDS)
    raise UserError(f"{path}: is damaged; delete it and start again")


def write_json(path: Path, values: dict[str, Any]) -> None:
    write_text(path, json.dumps(values, indent=2) + "\n")
