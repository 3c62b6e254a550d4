"""Save and load files. All other packages of the toolkit read and write files with these functions.

Model weights are an exception: the modules ``checkpoints`` and ``adapters`` read and write them with transformers and peft.

| content | format |
|---|---|
| ``Direction``, ``HeadScores``, ``Moments``, ``Plan`` (classes of ``toolkit.types``) | one safetensors file each, with a JSON header |
| rollouts | a directory of parquet files, with a JSON header |
| tables | parquet |
| problems | JSON lines, one problem per line |

A header says how the content was made: model, settings, problems. Tables and problems have none. Every file is written under a temporary
name and renamed when it is complete, so a file under its final name is complete. Only ``append_line`` changes a file in place.
"""

from toolkit.store.checkpoints import copy_files, read_headers
from toolkit.store.code import BEFORE_HASHES, MADE_BY, RECORD, Basis, code_of, made_by, modules_of, records, sources
from toolkit.store.errors import DamagedFileError, DiskFullError, ForeignFileError, StoreError, WrongModelError
from toolkit.store.files import (
    append_line,
    atomic,
    atomic_directory,
    existing_file,
    is_whole,
    jsonable,
    key,
    locked,
    move,
    new_directory,
    read_json,
    read_lines,
    read_rows,
    remove,
    safe_name,
    tidy,
    writable,
    write_json,
    write_rows,
    write_text,
)
from toolkit.store.foreign import read_gguf, read_gguf_header, read_pt, write_gguf, write_pt
from toolkit.store.hints import checked
from toolkit.store.rollouts import (
    append_rollouts,
    count_rollouts,
    load_header,
    load_rollouts,
    open_rollouts,
    replace_rollouts,
    rollout_table,
    sampling_lock,
)
from toolkit.store.tables import checked_table, load_problems, read_table, save_problems, save_table
from toolkit.store.values import FORMAT, FORMAT_VERSION, load, read_tensors, save, write_tensors

__all__ = [
    "BEFORE_HASHES",
    "FORMAT",
    "FORMAT_VERSION",
    "MADE_BY",
    "RECORD",
    "Basis",
    "DamagedFileError",
    "DiskFullError",
    "ForeignFileError",
    "StoreError",
    "WrongModelError",
    "append_line",
    "append_rollouts",
    "atomic",
    "atomic_directory",
    "checked",
    "checked_table",
    "code_of",
    "copy_files",
    "count_rollouts",
    "existing_file",
    "is_whole",
    "jsonable",
    "key",
    "load",
    "load_header",
    "load_problems",
    "load_rollouts",
    "locked",
    "made_by",
    "modules_of",
    "move",
    "new_directory",
    "open_rollouts",
    "read_gguf",
    "read_gguf_header",
    "read_headers",
    "read_json",
    "read_lines",
    "read_pt",
    "read_rows",
    "read_table",
    "read_tensors",
    "records",
    "remove",
    "replace_rollouts",
    "rollout_table",
    "safe_name",
    "sampling_lock",
    "save",
    "save_problems",
    "save_table",
    "sources",
    "tidy",
    "writable",
    "write_gguf",
    "write_json",
    "write_pt",
    "write_rows",
    "write_tensors",
    "write_text",
]
