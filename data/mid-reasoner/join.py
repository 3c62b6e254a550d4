"""Put the pieces that ``train.py`` saved back together: ``python data/mid-reasoner/join.py PIECES DIRECTORY``.

``DIRECTORY`` is then an ordinary model directory: ``lm.load(DIRECTORY)`` reads it. It must not exist yet.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

NAME = "mid-reasoner"
INDEX = "model.safetensors.index.json"
TRAINING = "training.json"


def join(pieces: Path, directory: Path) -> Path:
    """Write the model directory and return it.

    Raises:
        FileNotFoundError: ``mid-reasoner.json`` or a piece that its index names is missing.
        FileExistsError: the directory exists already.
        ValueError: a piece does not hold the tensors that the index names, or is of another saving.
    """
    if not (pieces / f"{NAME}.json").is_file():
        raise FileNotFoundError(f"{pieces} has no {NAME}.json: give the directory that came back from the machine.")
    if directory.exists():
        raise FileExistsError(f"{directory} exists already: choose another directory.")
    rest = json.loads((pieces / f"{NAME}.json").read_text())
    files: dict[str, str] = rest["files"]
    index = json.loads(files.pop(INDEX))["weight_map"] if INDEX in files else {}
    names = sorted(set(index.values())) or ["model.safetensors"]
    missing = [f"{NAME}-{name}" for name in names if not (pieces / f"{NAME}-{name}").is_file()]
    if missing:
        raise FileNotFoundError(f"{pieces} lacks {', '.join(missing)}: {len(names)} pieces make the model.")
    weights = {}
    for name in names:
        held, saving = load_file(pieces / f"{NAME}-{name}"), str(rest["training"].get("steps", 0))
        with safe_open(pieces / f"{NAME}-{name}", "pt") as stream:
            found = (stream.metadata() or {}).get("saving")
        if found != saving:
            raise ValueError(
                f"{NAME}-{name} was saved after {found} steps, {NAME}.json after {saving}: a saving was cut off. Fetch them again."
            )
        if index and (wrong := set(held) ^ {tensor for tensor, where in index.items() if where == name}):
            raise ValueError(
                f"{NAME}-{name} and the index differ in {sorted(wrong)[0]}: the pieces are of two savings. Fetch them again."
            )
        weights |= held
    made = directory.with_name(f".{directory.name}.{os.getpid()}")
    made.mkdir(parents=True)
    save_file(weights, made / "model.safetensors", metadata={"format": "pt"})
    for name, text in files.items():
        (made / name).write_text(text)
    (made / TRAINING).write_text(json.dumps(rest["training"], indent=1) + "\n")
    made.rename(directory)
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pieces", type=Path, help="directory of the pieces")
    parser.add_argument("directory", type=Path, help="model directory to make")
    asked = parser.parse_args()
    try:
        print(join(asked.pieces, asked.directory))
    except (FileNotFoundError, FileExistsError, ValueError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
