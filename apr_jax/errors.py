"""Errors that a user can cause and mend. The command line prints their message, never a traceback."""


class UserError(Exception):
    """Something failed: a damaged checkpoint, a full disk. Exit status 1."""


class UsageError(UserError):
    """Something was asked for in a wrong way: a bad flag, file or problem. Exit status 2."""


class FullDisk(UserError):
    """Nothing more can be written. Exit status 1, at once."""


class Stopped(BaseException):
    """SIGTERM, or SIGHUP of a terminal that is closed. Exit status 128 + `number`. No `except Exception` keeps it.

    Args:
      message: what was saved; empty where it is raised.
      number: of the signal.
    """

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number


class UnknownAnswers(UserError):
    """Too many answers of a batch are without a verdict. Exit status 1."""


class LostProcess(UserError):
    """This or another process of a run of several is lost, and with it all of them. Exit status 1, at once."""
