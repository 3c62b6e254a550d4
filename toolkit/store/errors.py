"""Exceptions about files. The command line prints their messages without a traceback, in one line."""


class StoreError(ValueError):
    """A file cannot be used. The subclasses give the reason: another program wrote it, it is damaged, or it is from another model."""


class ForeignFileError(StoreError):
    """The file was not written by this toolkit, or holds another type of value than expected (such as a plan, not a direction)."""


class DamagedFileError(StoreError):
    """The file is truncated, or its content does not have the expected format."""


class WrongModelError(StoreError):
    """A value (a direction, plan, rollouts, ...), from a file or in memory, was made with another model, other problems or settings."""


class DiskFullError(OSError):
    """There is not enough disk space for a file. No partial file is left."""
