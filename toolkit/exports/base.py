"""Common parts of the writers of all formats: settings, checks of a direction, and the file that describes the export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from toolkit import __version__, edits, exports, store
from toolkit.lm import LM
from toolkit.tags import ThinkTags
from toolkit.types import Direction
from toolkit.vectors import ExportError

ABOUT = "about.json"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of an export. Each format reads some of them (``exports.Format.options``).

    Attributes:
        strength: Steering strength; positive lengthens thinking, negative shortens it.
        layers: Layers to steer; ``None`` means all.
        during: Positions to steer: ``"all"``, ``"newest"`` (the prompt's last position and every response token), or phases such as
            ``"think"``.
        drop_layer_0: True to leave out the vector of layer 0, which GGUF cannot hold. False raises an error if that vector is not zero.
        doses: Directory that ``toolkit dose`` wrote; its numbers go into the model card. ``None`` writes a card without numbers.
        base: The base model in the other tool: a GGUF file, or, for Ollama, the name of a model in Ollama. ``None`` if unknown.
        think: Think tags by which the other tool tells thinking from answer in responses to the exported problems. ``None`` means that the
            whole response is the answer.
        max_new_tokens: Token budget of a response to an exported problem.
    """

    strength: float = 1.0
    layers: tuple[int, ...] | None = None
    during: str = "all"
    drop_layer_0: bool = False
    doses: Path | None = None
    base: str | None = None
    think: ThinkTags | None = None
    max_new_tokens: int = 1024


def check(direction: Direction, settings: Settings, name: str) -> Direction:
    """Check that a format can express this steering. Return the direction with zeros in all layers that are not steered.

    No model is needed, so a command can call this before it loads one.

    Args:
        direction: The direction to export.
        settings: Layers, positions and strength.
        name: Name of the format.

    Raises:
        ExportError: the format steers at the output of a block, but the direction was measured at another site; the format cannot express
            the positions; it cannot hold the direction's vector of layer 0 (unless ``drop_layer_0``); the direction is zero in all chosen
            layers; or the strength is 0.
        ValueError: the direction or the strength is infinite or NaN, or a phase is unknown.
        IndexError: a layer does not exist.
    """
    row = exports.find(name)
    edits.steering(direction, settings.strength, layers=settings.layers, during=settings.during)  # checks all of them
    if settings.during not in row.during and "phases" not in row.during:
        raise ExportError(
            f"{name} cannot say during={settings.during!r}: it knows only {' and '.join(row.during)}. Steering at other positions is another "
            "intervention, so measure it with `toolkit dose` before you export it with one of these, or use our own loop."
        )
    if direction.kind != "resid_post" and name != "safetensors":
        raise ExportError(
            f"{name} adds a vector to the output of a block, but this direction was made at {direction.kind}, and would act differently "
            "there. Make it at resid_post (toolkit direction --site resid_post), or export it as safetensors."
        )
    if not settings.strength:
        raise ExportError("strength=0 steers nothing: give another strength.")
    chosen = list(range(len(direction.vector)) if settings.layers is None else settings.layers)
    if "drop_layer_0" in row.options and 0 in chosen and direction.vector[0].any() and not settings.drop_layer_0:
        raise ExportError(
            f"The direction has a vector in layer 0, but GGUF control vectors start at layer 1. Choose --layers 1-{len(direction.vector) - 1}, "
            "or leave it out with --drop-layer-0; the other layers then act without it."
        )
    vector = torch.zeros_like(direction.vector)
    vector[chosen] = direction.vector[chosen]
    if not vector.any():
        raise ExportError(f"The direction is zero in all chosen layers ({', '.join(map(str, chosen))}): choose others.")
    return replace(direction, vector=vector)


def steered(lm: LM, direction: Direction, settings: Settings, name: str) -> Direction:
    """Check that the direction is for ``lm``, then return ``check(direction, settings, name)``.

    Raises:
        ExportError, ValueError, IndexError: as in ``check``.
        WrongModelError: the direction was made from other weights, or its shape does not fit the model.
    """
    edits.check_direction(direction, lm)
    return check(direction, settings, name)


def rows(direction: Direction) -> dict[int, Float[Tensor, " d_model"]]:
    """Return the vectors of a direction that are not zero, as a dict layer -> vector, in fp32 on the CPU.

    Raises:
        ExportError: a vector is too large for fp32.
    """
    single = direction.vector.detach().float().cpu()
    if not torch.isfinite(single).all():
        raise ExportError("A vector of this direction is too large for fp32.")
    return {layer: row.clone() for layer, row in enumerate(single) if row.any()}


def about(lm: LM, name: str, settings: Settings, direction: Direction, use: str) -> Mapping[str, Any]:
    """Return the content of ``about.json``: facts about the exported direction and its model, and instructions for use.

    Args:
        lm: The model that the direction is for.
        name: Name of the format.
        settings: Strength, layers and positions.
        direction: The exported direction, from ``steered``: zero in all layers that are not steered.
        use: Instructions for the use of the files.
    """
    row, p = exports.find(name), direction.provenance
    return {
        "format": name,
        "read_by": row.reader,
        "followed": row.followed,
        "checked": row.checked,
        "base_model": p.model,
        "revision": p.revision,
        "fingerprint": lm.fingerprint,
        "site": "output of block (resid_post), layers counted from 0",
        "layers": list(rows(direction)),
        "during": settings.during,
        "strength": settings.strength,
        "sign": "a positive strength lengthens thinking",
        "method": direction.estimator,
        "use": use,
        "tool": f"reasoning-length-toolkit {__version__}",
    }


def request(out: Path, body: Mapping[str, Any], notes: Mapping[str, Any]) -> None:
    """Write ``request.json`` and ``about.json`` into the directory ``out``.

    Args:
        out: The directory.
        body: Content of ``request.json``: entries that a user adds to a request to the server, so that it steers.
        notes: Content of ``about.json``, from ``about``.
    """
    store.write_json(body, out / "request.json")
    store.write_json(notes, out / ABOUT)
