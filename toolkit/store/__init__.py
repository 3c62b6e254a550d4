"""Saving and loading: the only room that reads or writes files.

Values (directions, scores, moments, plans) are one safetensors file each, with a JSON header that carries their
provenance. Rollouts and report rows are parquet. Every write goes to a temporary name and is renamed when
complete, so a file that exists is whole.
"""

from toolkit.store.checkpoints import copy_files, read_headers
from toolkit.store.errors import DamagedFileError, ForeignFileError, StoreError, WrongModelError
from toolkit.store.files import (
    append_line,
    atomic,
    claimed,
    existing,
    filling,
    jsonable,
    key,
    new_directory,
    read_json,
    read_lines,
    read_rows,
    remove,
    writable,
    write_json,
    write_rows,
    write_text,
)
from toolkit.store.foreign import read_gguf, read_pt, write_gguf
from toolkit.store.rollouts import append_rollouts, load_rollouts, open_rollouts, rollout_table
from toolkit.store.tables import load_problems, read_table, save_problems, save_table
from toolkit.store.values import FORMAT, FORMAT_VERSION, load, read_tensors, save, write_tensors

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "DamagedFileError",
    "ForeignFileError",
    "StoreError",
    "WrongModelError",
    "append_line",
    "append_rollouts",
    "atomic",
    "claimed",
    "copy_files",
    "existing",
    "filling",
    "jsonable",
    "key",
    "load",
    "load_problems",
    "load_rollouts",
    "new_directory",
    "open_rollouts",
    "read_gguf",
    "read_headers",
    "read_json",
    "read_lines",
    "read_pt",
    "read_rows",
    "read_table",
    "read_tensors",
    "remove",
    "rollout_table",
    "save",
    "save_problems",
    "save_table",
    "writable",
    "write_gguf",
    "write_json",
    "write_rows",
    "write_tensors",
    "write_text",
]
