"""What a check says, and how several processes become one line."""

import dataclasses
import socket
import statistics
from typing import Any, Literal

import jax

from apr_jax.train.distributed import merge

# A process is called slow if it takes so many times as long as the others.
_SLOW_FACTOR = 2.0


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
      subject: what was checked.
      level: "ok" or "fault".
      text: what was found, in a line; of a fault, the reason.
      figures: the numbers in the text, for programs.
      facts: what must be the same in all processes of a run, by name.
      seconds: a time that should be about the same in all processes; None if there is none.
    """

    subject: str
    level: Literal["ok", "fault"]
    text: str
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    seconds: float | None = None


def finding_of_all(mine: Finding) -> Finding:
    """Returns what all processes of the run found together, in all of them.

    It is what the first process found, unless another one found a fault, has other facts, or is
    slow. All processes must call it; with one process it costs nothing.

    Args:
      mine: what this process found.
    """
    if jax.process_count() == 1:
        return mine
    entry = {"host": socket.gethostname(), **dataclasses.asdict(mine)}
    gathered = merge({f"{jax.process_index():06}": entry})
    return combine([gathered[index] for index in sorted(gathered)])


def combine(entries: list[dict[str, Any]]) -> Finding:
    """Makes one finding of those of all processes, each with the name of its `host`."""
    hosts = [entry.pop("host") for entry in entries]
    findings = [Finding(**entry) for entry in entries]
    first = findings[0]

    def fault(process: int, text: str) -> Finding:
        text = f"process {process} ({hosts[process]}): {text}"
        return dataclasses.replace(first, level="fault", text=text)

    for process, finding in enumerate(findings):
        if finding.level == "fault":
            return fault(process, finding.text)

    for process, finding in enumerate(findings):
        for name in sorted(first.facts.keys() | finding.facts.keys()):
            own, firsts = finding.facts.get(name), first.facts.get(name)
            if own != firsts:
                return fault(process, f"{name} is {own}, that of process 0 ({hosts[0]}) {firsts}")

    seconds = [finding.seconds for finding in findings if finding.seconds is not None]
    if len(seconds) > 1:
        slowest = max(range(len(seconds)), key=lambda process: seconds[process])
        others = statistics.median(seconds[:slowest] + seconds[slowest + 1 :])
        if seconds[slowest] > _SLOW_FACTOR * others:
            took = f"takes {1000 * seconds[slowest]:.3g} ms, the others {1000 * others:.3g} ms"
            return fault(slowest, f"{took}: its host is busy, or its device is slow")
    return first
