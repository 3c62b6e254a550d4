"""Exceptions about files. Commands print them as one line."""


class StoreError(ValueError):
    """A file cannot be used: it is foreign, damaged, or was made from another model."""


class ForeignFileError(StoreError):
    """The file was not written by this toolkit, or holds another kind of value than expected."""


class DamagedFileError(StoreError):
    """The file is truncated, or its content does not have the format that its name says."""


class WrongModelError(StoreError):
    """The value was made from other weights than those of the model at hand."""


class DiskFullError(OSError):
    """There is not enough disk space for a file. No partial file is left."""
