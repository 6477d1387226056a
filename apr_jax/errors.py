"""Errors that a user can cause and mend. The command line prints their message, never a traceback."""


class UserError(Exception):
    """Something failed: a damaged checkpoint, a full disk. Exit status 1."""


class UsageError(UserError):
    """Something was asked for in a wrong way: a bad flag, file or problem. Exit status 2."""


class FullDisk(UserError):
    """Nothing more can be written. Exit status 1, at once."""


class LostProcess(UserError):
    """This or another process of a run of several is lost, and with it all of them. Exit status 1, at once."""
