"""A head edit as a GGUF LoRA, for ``llama-server --lora FILE`` (llama.cpp, ``src/llama-adapter.cpp`` and ``convert_lora_to_gguf.py``).

Metadata: ``general.type`` "adapter", ``general.architecture`` that of the base model, ``adapter.type`` "lora", ``adapter.lora.alpha``.
Tensors: ``NAME.lora_a`` ``[r, inputs]`` and ``NAME.lora_b`` ``[outputs, r]`` (shapes in torch's order). NAME is the name of the edited
tensor of the base model. llama.cpp adds ``alpha / r * b a`` to this tensor, with a and b the two tensors above and ``alpha`` from the
metadata; it reads the rank r from the shape of b. Here r = 1 and alpha = 1. All heads of a layer are edited along one direction, so the
change of the layer's output projection has rank 1 for any number of heads. Output projections have the same layout in llama.cpp as in
transformers. (llama.cpp permutes only the rows of Q and K.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from toolkit import store, vectors
from toolkit.exports.base import Settings
from toolkit.lm import LM
from toolkit.store import WrongModelError
from toolkit.types import Plan
from toolkit.vectors import ExportError
from toolkit.vectors.gguf import model_types, plain


def write(lm: LM, plan: Plan, out: Path, settings: Settings) -> Path:
    """Write the plan as a GGUF LoRA. If ``settings.base`` is the base model's GGUF file, names and shapes are checked against it.

    Raises:
        ExportError: the plan has other edits than ``project_out``, or the package gguf has no name for this model or one of its tensors.
        WrongModelError: the plan was made from other weights, or the GGUF file holds another model.
        FileNotFoundError: there is no file ``settings.base``.
        ImportError: the package gguf is not installed.
    """
    changes = vectors.low_rank(lm, plan)
    arch, shapes = store.read_gguf_header(settings.base) if settings.base else (architecture(lm), None)
    names = _names(lm, arch, list(changes))
    if shapes is not None:
        _check_base(lm, arch, names, shapes, str(settings.base))
    tensors: dict[str, Any] = {}
    for layer, (A, B) in changes.items():
        tensors |= {f"{names[layer]}.lora_a": A.cpu().numpy(), f"{names[layer]}.lora_b": B.cpu().numpy()}
    fields: dict[str, str | int | float] = {
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 1.0,
        "general.name": plan.name,
        "toolkit.base_model": plan.provenance.model,
        "toolkit.fingerprint": lm.fingerprint,
    }
    return store.write_gguf(arch, fields, tensors, out)


def architecture(lm: LM) -> str:
    """Return llama.cpp's name of a model's architecture. Raise ExportError if the package gguf has no such name."""
    known = _architectures(lm)
    if not known:
        raise ExportError(
            f"llama.cpp's name for models of type {lm.model.config.model_type!r} is not known here: give the model's GGUF file (--base FILE)."
        )
    return known[0]


def _architectures(lm: LM) -> list[str]:
    """Return the architecture names in the package gguf that fit the model's type; none if it has none."""
    wanted = {plain(name) for name in model_types(lm)}
    return [str(name) for name in _gguf().MODEL_ARCH_NAMES.values() if plain(name) in wanted]


def _names(lm: LM, arch: str, layers: list[int]) -> dict[int, str]:
    """Return the name of the output projection of each layer in a GGUF file of this architecture.

    Raises:
        ExportError: the package gguf does not know the architecture, or gives the projection no name.
    """
    gguf = _gguf()
    known = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    if arch not in known:
        raise ExportError(f"The package gguf does not know the architecture {arch!r}: update it (pip install --upgrade gguf).")
    table = gguf.get_tensor_name_map(known[arch], lm.layout.n_layers)
    modules = {id(module): name for name, module in lm.model.named_modules()}
    names = {}
    for layer in layers:
        module = modules[id(lm.layout.blocks[layer].out)].replace("language_model.", "")
        name = table.get_name(f"{module}.weight", try_suffixes=(".weight",))
        if name is None:
            raise ExportError(
                f"The package gguf has no name for {module} in models of the architecture {arch!r}: merge the edit instead."
            )
        names[layer] = str(name)
    return names


def _check_base(lm: LM, arch: str, names: dict[int, str], shapes: dict[str, tuple[int, ...]], base: str) -> None:
    """Raise WrongModelError if a GGUF file holds another model type than ``lm``, or lacks an edited tensor, or has it in another shape.

    If llama.cpp's name for the model's type is not known, only the tensors are compared.

    Args:
        lm: The model.
        arch: Architecture that the GGUF file names.
        names: Layer -> name of the edited tensor, from ``_names``.
        shapes: Name -> shape of each tensor in the GGUF file.
        base: Path of the GGUF file, for the message.
    """
    known = _architectures(lm)
    if known and arch not in known:
        raise WrongModelError(f"{base} holds a model of architecture {arch!r}, {lm.name} is {lm.model.config.model_type!r}.")
    for layer, name in names.items():
        shape = tuple(lm.layout.W_O(layer).shape)
        if shapes.get(name) != shape:
            raise WrongModelError(
                f"{base} has {name} {shapes.get(name, 'not at all')}, {lm.name} has {shape} there: give the GGUF file of this model."
            )


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError("GGUF files need the package gguf: pip install 'reasoning-length-toolkit[gguf]'.") from error
    return gguf
