"""What is wrong with a file, as exceptions that commands print in one line."""


class StoreError(ValueError):
    """A file cannot be used: foreign, damaged, or made from another model."""


class ForeignFileError(StoreError):
    """The file was not written by this toolkit, or holds another kind of value."""


class DamagedFileError(StoreError):
    """The file is truncated or not readable as what its name says."""


class WrongModelError(StoreError):
    """The artifact was made from other weights than the model it is to be used with."""


class DiskFullError(OSError):
    """There is no room for a file; nothing of it was left."""
