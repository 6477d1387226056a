"""Where a run's numbers go: metrics.jsonl, TensorBoard and the terminal. docs/metrics.md defines
each of them.

A step's metrics stay on the device until the next step is under way; only then are they fetched, so
the device never waits for the host. `metrics.jsonl` has one line a logged step, also after
interruptions: on resume the lines after the restored step are cut off."""

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, Self, cast

import jax
import tensorboardX
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from apr_jax.errors import LostLease
from apr_jax.io.disk_errors import TolerantStream, disk_errors
from apr_jax.io.lease import Lease
from apr_jax.io.storage import Mirror, as_path, write_text
from apr_jax.io.terminal import Terminal

FILE = "metrics.jsonl"
# Scalars; TensorBoard's thread dies when the disk is full, and a short queue would then stop the
# run.
_QUEUE = 100_000
_SPEED_SECONDS = (
    86_400.0  # The ETA needs two steps within them; rich looks at the last 1,000 steps at most.
)
Numbers = dict[str, float]


class Recorder:
    """Takes the metrics of each step; a context manager.

    Args:
      workdir: of the run.
      start: step that the run goes on from; lines after it are cut.
      steps: of the whole run.
      log_every: steps between lines.
      stage: "sft" or "rl".
      counted: what throughput is measured in, summable metrics: "tokens", "trees".
      shown: metrics shown in the terminal.
      progress: show the bar.
      ceiling: FLOP/s that the machine can do. The metric `flops` of the steps, if there is one, is
        set against it: the rate is logged as `mfu`, the single numbers are not.
      lease: of the workdir, which is checked before each line.
      bounds: of metrics; a step above one is told in a line, and marked by the metric
        `<name>_above` (1, else 0).
    """

    def __init__(
        self,
        workdir: Path,
        start: int,
        steps: int,
        log_every: int,
        stage: str,
        counted: tuple[str, ...],
        shown: tuple[str, ...],
        progress: bool,
        peak: float = 0.0,
        bounds: Mapping[str, float] = MappingProxyType({}),
        lease: Lease | None = None,
    ):
        self._lease = lease
        self._mirror = Mirror(as_path(workdir), (FILE,))
        self._path = self._mirror.local / FILE
        self._bounds = bounds
        self._steps, self._log_every, self._stage = steps, log_every, stage
        self._counted, self._shown = counted, shown
        self._pending: tuple[int, dict[str, Any], bool] | None = None
        self._peak = peak
        self._counts = dict.fromkeys((*counted, "flops"), 0.0)
        self._since = time.perf_counter()
        self._recorded = self._since  # When the pending step was.
        self._writes = jax.process_index() == 0  # All processes have the same numbers.
        if self._writes:
            with disk_errors(self._path):
                cut_lines(self._path, start)
                self._open()
            self._board = tensorboardX.SummaryWriter(
                str(self._mirror.local / "tensorboard"), purge_step=start + 1, max_queue=_QUEUE
            )
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeRemainingColumn(table_column=Column(min_width=7, no_wrap=True)),
            TextColumn("{task.fields[numbers]}"),
            console=Terminal(file=cast(IO[str], TolerantStream(sys.stderr))),
            disable=not (progress and self._writes),
            speed_estimate_period=_SPEED_SECONDS,
        )
        self._task = self._bar.add_task(stage, total=steps, completed=start, numbers="")

    def _open(self) -> None:
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 - closed in __exit__

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        del rest
        self._bar.stop()
        if self._writes:
            self._file.close()
            with suppress(OSError):  # A full disk was told of when metrics.jsonl found it so.
                self._board.close()
        self._mirror.close(push=kind is None or not issubclass(kind, LostLease))

    def record(self, step: int, metrics: dict[str, Any], important: bool = False) -> Numbers | None:
        """Takes the metrics of `step`, scalars on the device or the host, and returns those of the
        step before, fetched.

        Args:
          important: write a line whatever `log_every` says.
        """
        before = self._fetch()
        logged = important or step % self._log_every == 0 or step == self._steps
        self._pending, self._recorded = (step, metrics, logged), time.perf_counter()
        return before

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What happens inside, validation or saving, does not count against the throughput."""
        began = time.perf_counter()
        yield
        spent = time.perf_counter() - began
        self._since += spent
        self._recorded += spent

    def complete(self, step: int, numbers: Numbers) -> None:
        """Adds numbers to the line of `step`, the last one that an earlier start wrote; on disk
        when it returns.
        """
        if not self._writes:
            return
        with disk_errors(self._path):
            self._file.close()
            lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
            line = {"step": step, "stage": self._stage}
            if lines and json.loads(lines[-1])["step"] == step:  # Else someone has deleted it.
                line = json.loads(lines.pop())
            write_text(self._path, "".join([*lines, json.dumps(line | numbers) + "\n"]))
            self._open()
        for name, value in numbers.items():
            self._board.add_scalar(name, value, step)
        self._mirror.push()

    def flush(self) -> Numbers | None:
        """Fetches and writes what is pending; waits for the device. To be called before a save, so
        that no line is missing."""
        numbers = self._fetch()
        if self._writes:
            self._mirror.push()
        return numbers

    def _fetch(self) -> Numbers | None:
        if self._pending is None:
            return None
        step, metrics, logged = self._pending
        self._pending = None
        numbers = {name: float(value) for name, value in jax.device_get(metrics).items()}
        numbers |= self._compare(step, numbers)
        for name in self._counts:
            self._counts[name] += numbers.get(name, 0.0)
        numbers.pop("flops", None)
        if logged:
            # From record to record: with one step always under way on the device, that is the time
            # of a step.
            elapsed = max(self._recorded - self._since, 1e-9)
            numbers |= {
                f"{name}_per_second": self._counts[name] / elapsed
                for name in self._counted
                if self._counts[name]
            }
            if self._counts["flops"]:
                numbers["mfu"] = self._counts["flops"] / elapsed / self._peak
            self._counts, self._since = dict.fromkeys(self._counts, 0.0), self._recorded
            self._write(step, numbers)
        self._bar.update(self._task, completed=step)
        return numbers

    def tell(self, line: str) -> None:
        """A line above the bar; by one process for all."""
        if self._writes:
            self._bar.console.print(line, soft_wrap=True, highlight=False, markup=False)

    def show_text(self, step: int, name: str, text: str) -> None:
        """Text for TensorBoard alone, shown as it is."""
        if not self._writes:
            return
        # As Markdown: what is indented is code.
        self._board.add_text(name, "".join(f"    {line}\n" for line in text.splitlines()), step)

    def _compare(self, step: int, numbers: Numbers) -> Numbers:
        """The marks of metrics that have a bound. NaN is above any."""
        marks = {}
        for name, bound in self._bounds.items():
            if name in numbers:
                above = not numbers[name] <= bound
                marks[f"{name}_above"] = float(above)
                if above:
                    self.tell(f"step {step}: {name} {numbers[name]:.3g} is above {bound:g}")
        return marks

    def _write(self, step: int, numbers: Numbers) -> None:
        if not self._writes:
            return
        # JSON knows no NaN: a bad loss becomes null.
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        if self._lease is not None:
            self._lease.check()
        with disk_errors(self._path):
            self._file.write(json.dumps({"step": step, "stage": self._stage, **finite}) + "\n")
            self._file.flush()
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
        self._mirror.push(seldom=True)
        self._bar.update(self._task, numbers="  ".join(self._say(numbers)))

    def _say(self, numbers: Numbers) -> Iterator[str]:
        """What the terminal shows; a narrow one cuts off the end."""
        for name in self._counted:
            if rate := numbers.get(f"{name}_per_second"):
                yield f"{rate:,.{0 if rate >= 100 else 1}f} {name}/s"
        if "mfu" in numbers:
            yield f"{numbers['mfu']:.0%} of ceiling"
        yield from (f"{name} {numbers[name]:.4g}" for name in self._shown if name in numbers)


def cut_lines(path: Path, step: int) -> None:
    """Drops the lines after `step`, and what follows the first line that a killed run left
    unfinished.
    """
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            at = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            break
        if at > step or not line.endswith("\n"):
            break
        kept.append(line)
    write_text(path, "".join(kept))
