"""All checks of `apr check`, one after the other, on all processes of the run."""

import dataclasses
from collections.abc import Callable, Iterator

import jax

from apr_jax.check.engine import check_engine
from apr_jax.check.findings import Finding, finding_of_all
from apr_jax.check.gradients import check_gradients
from apr_jax.check.machine import check_devices, check_versions
from apr_jax.check.speed import check_decode_step, check_training_step
from apr_jax.errors import LostProcess
from apr_jax.io.terminal import one_line

_MOST = 300  # Characters of the reason why a check could not be done.


def check_device() -> Iterator[Finding]:
    """Yields the findings of all processes, each as soon as it is known.

    Raises:
      LostProcess: a check failed in this process, while others may wait for it.
    """
    for subjects, check in _CHECKS:
        yield from map(finding_of_all, _findings(subjects, check))


def _one(check: Callable[[], Finding]) -> Callable[[], Iterator[Finding]]:
    """Makes a check that yields its only finding."""

    def run() -> Iterator[Finding]:
        yield check()

    return run


# Each check, with the subjects of its findings.
_CHECKS: tuple[tuple[tuple[str, ...], Callable[[], Iterator[Finding]]], ...] = (
    (("versions",), _one(check_versions)),
    (("devices",), _one(check_devices)),
    (("engine",), _one(check_engine)),
    (("rescoring", "gradient"), check_gradients),
    (("training step",), _one(check_training_step)),
    (("decode step",), _one(check_decode_step)),
)


def _findings(
    subjects: tuple[str, ...], check: Callable[[], Iterator[Finding]]
) -> Iterator[Finding]:
    """Yields what a check finds. If it cannot be done, that is a fault with the reason."""
    done = 0
    try:
        for finding in check():
            done += 1
            yield finding
    except Exception as error:  # Whatever does not work here is what the user wants to know.
        reason = one_line(f"{type(error).__name__}: {error}", _MOST)
        if jax.process_count() > 1:
            raise LostProcess(
                f"process {jax.process_index()}, {subjects[done]}: {reason}"
            ) from error
        yield Finding(subjects[done], "fault", reason)


def to_json(findings: list[Finding]) -> list[dict[str, object]]:
    """Returns the findings for programs."""
    kept = ("subject", "level", "text", "figures")
    return [
        {name: value for name, value in dataclasses.asdict(finding).items() if name in kept}
        for finding in findings
    ]
