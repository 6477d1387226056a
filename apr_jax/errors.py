"""Errors that a user can cause and mend. The command line prints their message, no traceback."""


class UserError(Exception):
    """A command failed, for example by a damaged checkpoint or a full disk. Exit status 1."""


class UsageError(UserError):
    """A command was given a wrong flag, file, setting or problem. Exit status 2."""


class DiskError(UserError):
    """Nothing more can be written: the disk is full, read-only, or closed to this user.

    The process ends at once, with exit status 1.
    """


class Stopped(BaseException):
    """The process got SIGTERM, or SIGHUP from a terminal that was closed.

    The exit status is 128 + `number`. It is no `Exception`, so that `except Exception` does not
    catch it.

    Args:
      message: what was saved; empty where the signal is received.
      number: the number of the signal.
    """

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number


class UnknownAnswers(UserError):
    """Too many answers of a batch got no verdict. Exit status 1."""


class LostProcess(UserError):
    """One process of a run of several is lost, so that all of them have to end.

    The process ends at once, with exit status 1.
    """


class LostLease(LostProcess):
    """Another run has taken over the folder in which this one wrote.

    The process ends at once, with exit status 1, and writes nothing more.
    """
