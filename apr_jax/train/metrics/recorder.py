"""Where a run's numbers go: metrics.jsonl, a tracker if there is one, and the terminal.

docs/metrics.md defines each metric. The metrics of a step stay on the device until the next step is
under way, and are fetched only then, so the device never waits for the host. `metrics.jsonl` has
one line for each logged step, also after interruptions: when a run is resumed, the lines after the
restored step are cut off.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, Self, cast

import jax
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.table import Column

from apr_jax.errors import LostLease
from apr_jax.io.disk_errors import TolerantStream, disk_errors
from apr_jax.io.json_files import json_line
from apr_jax.io.lease import Lease
from apr_jax.io.stage_line import Bars
from apr_jax.io.storage import Mirror, as_path, write_text
from apr_jax.io.terminal import Terminal
from apr_jax.train.metrics.trackers import WANDB_FILE, Tracker

FILE = "metrics.jsonl"
# Seconds over which the bar measures its speed; the remaining time needs two steps within them.
# Rich looks at the last 1,000 steps at most.
_SPEED_SECONDS = 86_400.0
Numbers = dict[str, float]


class Recorder:
    """Takes the metrics of each step; a context manager.

    Args:
      workdir: folder of the run.
      start: step from which the run goes on; later lines are cut off.
      steps: steps of the whole run.
      log_every: steps between lines.
      stage: "sft" or "rl".
      counted: summable metrics whose throughput is measured: "tokens", "trees".
      shown: metrics that the terminal shows.
      progress: whether the terminal shows a progress bar.
      peak: FLOP/s that the machine can do. If the steps have the metric `flops`, its rate as a
        share of the peak is logged as `mfu` in place of the metric itself.
      bounds: metric -> its bound. A step above a bound is reported in a line, and marked by the
        metric `<name>_above`: 1, else 0.
      lease: lease of the workdir, which is checked before each line.
      open_tracker: opens the tracker that gets a copy of all lines; it is given the folder of the
        run, on this machine, and `start`. By default there is none.
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
        open_tracker: Callable[[Path, int], Tracker] = lambda folder, start: Tracker(),
    ):
        self._lease = lease
        self._mirror = Mirror(as_path(workdir), (FILE, WANDB_FILE))
        self._path = self._mirror.local / FILE
        self._bounds = bounds
        self._steps = steps
        self._log_every = log_every
        self._stage = stage
        self._counted = counted
        self._shown = shown
        self._peak = peak

        # The last step: its number, its metrics, and whether they get a line.
        self._pending: tuple[int, dict[str, Any], bool] | None = None
        self._counts = dict.fromkeys((*counted, "flops"), 0.0)  # Since the last line.
        self._since = time.perf_counter()  # Time of the last line.
        self._recorded = self._since  # Time at which the pending step was recorded.

        self._writes = jax.process_index() == 0  # All processes have the same numbers.
        if self._writes:
            with disk_errors(self._path):
                cut_lines(self._path, start)
                self._open()
            self._tracker = open_tracker(self._mirror.local, start)
        self._bar = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeRemainingColumn(table_column=Column(min_width=7, no_wrap=True)),
            TextColumn("{task.fields[numbers]}"),
            console=Terminal(file=cast(IO[str], TolerantStream(sys.stderr))),
            shown=progress and self._writes,
            words="numbers",
            speed_estimate_period=_SPEED_SECONDS,
        )
        self._task = self._bar.add_task(stage, total=steps, completed=start, numbers="")

    def _open(self) -> None:
        """Opens metrics.jsonl at its end."""
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 - closed in __exit__

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        del rest
        self._bar.stop()
        if self._writes:
            self._file.close()
            self._tracker.close()
        self._mirror.close(push=kind is None or not issubclass(kind, LostLease))

    def record(self, step: int, metrics: dict[str, Any], important: bool = False) -> Numbers | None:
        """Takes the metrics of `step`, and returns those of the step before, fetched.

        Args:
          step: number of the step.
          metrics: scalars on the device or the host.
          important: whether the step gets a line whatever `log_every` says.
        """
        numbers_before = self._fetch()
        logged = important or step % self._log_every == 0 or step == self._steps
        self._pending = (step, metrics, logged)
        self._recorded = time.perf_counter()
        return numbers_before

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Keeps what happens inside, validation or saving, out of the throughput."""
        began = time.perf_counter()
        yield
        spent = time.perf_counter() - began
        self._since += spent
        self._recorded += spent

    def complete(self, step: int, numbers: Numbers) -> None:
        """Adds numbers to the line of `step`, the last one that an earlier start wrote.

        They are on disk when it returns.
        """
        if not self._writes:
            return
        with disk_errors(self._path):
            self._file.close()
            lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
            line = {"step": step, "stage": self._stage}
            # Unless somebody has deleted it, the line is there.
            if lines and json.loads(lines[-1])["step"] == step:
                line = json.loads(lines.pop())
            write_text(self._path, "".join([*lines, json_line(line | numbers)]))
            self._open()
        self._tracker.numbers(step, numbers)
        self._mirror.push()

    def flush(self) -> Numbers | None:
        """Fetches and writes the pending step; waits for the device.

        It is to be called before a save, so that no line is missing.
        """
        numbers = self._fetch()
        if self._writes:
            self._mirror.push()
        return numbers

    def _fetch(self) -> Numbers | None:
        """Fetches the metrics of the pending step and writes its line, if it gets one."""
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
            numbers |= self._rates()
            self._counts = dict.fromkeys(self._counts, 0.0)
            self._since = self._recorded
            self._write(step, numbers)
        self._bar.update(self._task, completed=step)
        return numbers

    def _rates(self) -> Numbers:
        """Returns throughput and `mfu` since the last line.

        The time is that from record to record. With one step always under way on the device, that
        is the time of a step.
        """
        elapsed = max(self._recorded - self._since, 1e-9)
        rates = {}
        for name in self._counted:
            if self._counts[name]:
                rates[f"{name}_per_second"] = self._counts[name] / elapsed
        if self._counts["flops"]:
            rates["mfu"] = self._counts["flops"] / elapsed / self._peak
        return rates

    def tell(self, line: str) -> None:
        """Prints a line above the bar; one process does it for all."""
        if self._writes:
            self._bar.console.print(line, soft_wrap=True, highlight=False, markup=False)

    def show_text(self, step: int, name: str, text: str) -> None:
        """Gives a text to the tracker, which shows it as it is."""
        if self._writes:
            self._tracker.text(step, name, text)

    def _compare(self, step: int, numbers: Numbers) -> Numbers:
        """Returns the marks of the metrics that have a bound, and reports those above it."""
        marks = {}
        for name, bound in self._bounds.items():
            if name not in numbers:
                continue
            is_above = not numbers[name] <= bound  # NaN counts as above any bound.
            marks[f"{name}_above"] = float(is_above)
            if is_above:
                self.tell(f"step {step}: {name} {numbers[name]:.3g} is above {bound:g}")
        return marks

    def _write(self, step: int, numbers: Numbers) -> None:
        """Writes the line of a step, and shows it to the tracker."""
        if not self._writes:
            return
        # JSON has no NaN, so a loss that is NaN becomes null.
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        if self._lease is not None:
            self._lease.check()
        with disk_errors(self._path):
            self._file.write(json_line({"step": step, "stage": self._stage, **finite}))
            self._file.flush()
            self._tracker.numbers(step, numbers)
        self._mirror.push(seldom=True)
        self._bar.update(self._task, numbers="  ".join(self._say(numbers)))

    def _say(self, numbers: Numbers) -> Iterator[str]:
        """Yields what the terminal shows, the most important first.

        A narrow terminal cuts off the rest.
        """
        for name in self._counted:
            rate = numbers.get(f"{name}_per_second")
            if rate:
                decimals = 0 if rate >= 100 else 1
                yield f"{rate:,.{decimals}f} {name}/s"
        if "mfu" in numbers:
            yield f"{numbers['mfu']:.0%} mfu"
        for name in self._shown:
            if name in numbers:
                yield f"{name} {numbers[name]:.4g}"


def cut_lines(path: Path, step: int) -> None:
    """Cuts off the lines after `step`, and all that follows the first line that is not whole.

    A killed run may leave such a line.
    """
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            line_step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            break
        if line_step > step or not line.endswith("\n"):
            break
        kept.append(line)
    write_text(path, "".join(kept))
