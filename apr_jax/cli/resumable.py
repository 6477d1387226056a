"""What a command says when it is interrupted, if the same command can go on later."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from apr_jax.errors import Stopped, UserError


class Interrupted(UserError):
    """Ctrl-C was pressed; the message says what was saved. Exit status 130."""


@contextmanager
def resumable(saved: str | Callable[[], str]) -> Iterator[None]:
    """Adds to Ctrl-C, SIGTERM and SIGHUP what was saved, and that the same command goes on later.

    Args:
      saved: says what was saved. A function is called when the interruption comes.

    Raises:
      Interrupted: Ctrl-C was pressed.
      Stopped: another signal came.
    """
    try:
        yield
    except (KeyboardInterrupt, Stopped) as interruption:
        what = saved if isinstance(saved, str) else saved()
        advice = f"{what}; the same command goes on from there"
        if isinstance(interruption, Stopped):
            name = signal.Signals(interruption.number).name
            raise Stopped(f"stopped by {name}; {advice}", interruption.number) from None
        raise Interrupted(f"interrupted; {advice}") from None
