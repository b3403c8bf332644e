"""Errors that a user can act on: shown as one line, never as a traceback."""


class UserError(Exception):
    """What went wrong and what to do about it, in one line. Commands print it and exit with code 2."""


class RankError(UserError):
    """A UserError that one process met alone, so that it has to say it itself; the launcher then ends the others."""
