"""Exceptions about files. Commands print them as one line."""


class StoreError(ValueError):
    """A file cannot be used: another program wrote it, it is damaged, or it was made from another model."""


class ForeignFileError(StoreError):
    """The file was not written by this toolkit, or holds another kind of value than expected."""


class DamagedFileError(StoreError):
    """The file is truncated, or its content does not have the expected format."""


class WrongModelError(StoreError):
    """The saved value or rollouts were made with another model, or with other problems or settings."""


class DiskFullError(OSError):
    """There is not enough disk space for a file. No partial file is left."""
