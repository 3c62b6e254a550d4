"""A folder that holds a direction in several formats and a model card, for upload to a model hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from toolkit import store
from toolkit.lm import LM
from toolkit.types import Direction
from toolkit.vectors.files import save
from toolkit.vectors.gguf import save_gguf


def save_folder(
    direction: Direction,
    directory: str | Path,
    *,
    lm: LM,
    card: str,
    figures: Mapping[str, str] | None = None,
    drop_layer_0: bool = False,
) -> Path:
    """Write a folder for upload to a model hub and return its path.

    The folder holds ``README.md``, ``direction.safetensors`` and the figures. It also holds ``direction.gguf`` if the direction is at
    ``resid_post`` and has no vector at layer 0 (see ``drop_layer_0``).

    Args:
        direction: The direction; adding it lengthens thinking.
        directory: The folder to write.
        lm: The model that the direction is for.
        card: Text of ``README.md``, the model card; ``report.vector_card`` writes one.
        figures: File name -> content (HTML or SVG) of each figure that the card shows; ``None`` means no figures.
        drop_layer_0: True to write ``direction.gguf`` even if the direction has a vector at layer 0. That file then lacks this vector.

    Raises:
        FileExistsError: the directory is not empty.
        OSError: the folder cannot be written.
        ValueError: the name of a figure is a path, or begins with ``README.``, ``direction.`` or a dot.
        WrongModelError: the direction was made from other weights than those of ``lm``, or its shape does not fit ``lm``.
    """
    if bad := [
        name for name in figures or () if not name or Path(name).name != name or name.startswith(("README.", "direction.", "."))
    ]:
        raise ValueError(f"Figures cannot be called {', '.join(bad)}: give plain file names other than README.* and direction.*.")
    with store.atomic_directory(directory) as partial:
        for name, text in {"README.md": card, **(figures or {})}.items():
            store.write_text(text, partial / name)
        save(direction, partial / "direction.safetensors", lm=lm)
        if direction.kind == "resid_post" and (drop_layer_0 or not direction.vector[0].any()):
            save_gguf(direction, partial / "direction.gguf", lm=lm, drop_layer_0=drop_layer_0)
    return Path(directory)
