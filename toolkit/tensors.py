"""Read weights however they are stored: on a device, offloaded to CPU or disk (by accelerate), or packed (quantised).

``named`` reads every tensor of a model, ``digests`` hashes them, and ``matrix`` returns the weights of a linear layer as floats. Their
additional memory is small: offloaded tensors are loaded for one module at a time.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)
THREADS = min(8, os.cpu_count() or 1)
"""Number of threads that hash tensors. Each thread copies one tensor at a time to the CPU."""


def is_offloaded(module: nn.Module) -> bool:
    """Return True if a module's tensors (without those of its children) are offloaded.

    Accelerate loads offloaded tensors only while the module runs. At other times they are on the meta device.
    """
    return bool(getattr(getattr(module, "_hf_hook", None), "offload", False))


def is_packed(module: nn.Module) -> bool:
    """Return True if a linear layer is quantised, so that its weights are not stored as one matrix of floating-point numbers."""
    weight: Any = getattr(module, "weight", None)
    plain = type(weight) in (Tensor, nn.Parameter) and type(weight.data) is Tensor
    return not plain or not weight.is_floating_point() or weight.ndim != 2


def storage(model: nn.Module) -> str:
    """Return how a model's weights are stored: ``"quantised"``, ``"offloaded"``, or ``""`` if neither.

    Quantised and offloaded weights cannot be changed in place.
    """
    if getattr(model, "is_quantized", False):
        return "quantised"
    return "offloaded" if any(map(is_offloaded, model.modules())) else ""


def copied(model: Model) -> Model:
    """Return a copy of a model's modules and config. It shares all parameters and buffers (the same memory) with the model."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def rotary(model: nn.Module) -> list[str]:
    """Return the names of the modules that compute rotary position embeddings: those with the buffer ``inv_freq``."""
    return [name for name, module in model.named_modules() if "inv_freq" in dict(module.named_buffers(recurse=False))]


def device(module: nn.Module) -> torch.device:
    """Return the device on which a module computes. If its tensors are offloaded, they are on this device only while the module runs."""
    execution = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return next(module.parameters()).device if execution is None else torch.device(execution)


def upload(values: Tensor, target: torch.device) -> Tensor:
    """Copy a tensor from the CPU to a device, and return the copy. The CPU does not wait until a GPU has finished earlier work."""
    # From pinned memory a GPU copies while the CPU goes on; from other memory, PyTorch waits for the GPU.
    return values.pin_memory().to(target, non_blocking=True) if target.type == "cuda" else values.to(target)


def present(module: nn.Module) -> AbstractContextManager[None]:
    """Return a context manager in which a module's offloaded tensors are on the device that computes with them.

    The tensors of its children are not loaded.
    """
    if not is_offloaded(module):
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)


def named(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and value of every parameter and persistent buffer of a model, and of the scales of quantised layers.

    A tied weight is yielded under each of its names. Use each tensor before you take the next one: the tensors of an offloaded module are
    unloaded again when the iteration goes on.
    """
    for path, module in model.named_modules():
        with present(module):
            yield from _tensors(path, module)


def _tensors(path: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and value of each tensor in a module's state: parameters, persistent buffers, and scales of a quantised layer.

    The tensors of its children are left out.
    """
    saved: dict[str, Any] = {}
    # This is state_dict without children. Quantised layers add their scales to it, which are neither parameters nor buffers.
    module._save_to_state_dict(saved, f"{path}." if path else "", keep_vars=True)
    yield from ((name, value.detach()) for name, value in saved.items() if isinstance(value, Tensor))


def digests(model: nn.Module, known: Mapping[str, str]) -> dict[str, str]:
    """Return a SHA-256 of every tensor that ``named`` yields: name -> hash of shape, dtype and bytes.

    Args:
        known: Name -> hash that is known already. These tensors are not hashed again, and their hashes are returned unchanged.
    """
    # Offloaded tensors are hashed at once, while they are loaded. All others (``lasting``) are hashed in threads afterwards.
    hashes, lasting = dict(known), dict[str, Tensor]()
    for path, module in model.named_modules():
        with present(module):
            own = {name: value for name, value in _tensors(path, module) if name not in hashes}
            if is_offloaded(module):
                hashes |= {name: _digest(value) for name, value in own.items()}
            else:
                lasting |= own
    # A tied weight has several names but one place in memory, and is hashed once.
    places = {name: _place(value) for name, value in lasting.items()}
    distinct = {place: lasting[name] for name, place in places.items()}
    with ThreadPoolExecutor(THREADS) as threads:  # hashing does not hold Python's lock
        computed = dict(zip(distinct, threads.map(_digest, distinct.values()), strict=True))
    return hashes | {name: computed[place] for name, place in places.items()}


def not_finite(model: nn.Module) -> str | None:
    """Return the name of the first floating-point tensor of a model that holds NaN or infinity, or ``None``."""
    # Device -> names of tensors, and whether each is finite, as tensors on the device. They are read at the end, once per device: each read
    # of a number from a GPU waits until the GPU has done all its work.
    checked: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, value in named(model):
        for part in _parts(value):
            if part.is_floating_point() and part.numel():
                # The extremes are NaN if any number is. Unlike torch.isfinite of all numbers, finding them takes no memory.
                extremes = torch.stack(torch.aminmax(part.float() if part.itemsize == 1 else part))
                checked.setdefault(part.device, []).append((name, extremes.isfinite().all()))
    for entries in checked.values():
        names, finite = zip(*entries, strict=True)
        for name, fine in zip(names, torch.stack(finite).tolist(), strict=True):
            if not fine:
                return str(name)
    return None


def shared(one: nn.Module, other: nn.Module) -> set[str]:
    """Return the names of the tensors that two models share: same name, memory, dtype, shape and strides. Offloaded ones are left out."""
    places = [
        {name: _place(v) for path, m in model.named_modules() if not is_offloaded(m) for name, v in _tensors(path, m)}
        for model in (one, other)
    ]
    return {name for name, place in places[0].items() if places[1].get(name) == place}


def _place(value: Tensor) -> Any:
    """Return a key of a tensor. Two tensors with equal keys have the same memory, dtype, shape and strides."""
    parts = _parts(value)
    if len(parts) == 1 and parts[0] is value:
        return value.device, value.data_ptr(), value.dtype, value.shape, value.stride()
    return type(value), tuple(map(_place, parts))


def _digest(value: Tensor) -> str:
    digest = hashlib.sha256()
    for part in _parts(value):
        digest.update(f"{tuple(value.shape)}{tuple(part.shape)}{part.dtype}".encode())
        # A CPU tensor is hashed where it is; any other is copied to the CPU.
        digest.update(part.contiguous().flatten().view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def _parts(value: Tensor) -> list[Tensor]:
    """Return the plain tensors that a tensor consists of: the tensor itself, or the packed numbers and scales of a quantised one."""
    if not hasattr(value, "__tensor_flatten__"):
        return [value.data if type(value) is nn.Parameter else value]
    names, _ = value.__tensor_flatten__()
    return [part for name in names for part in _parts(getattr(value, name))]


@torch.no_grad()
def matrix(linear: Any, like: Tensor) -> Float[Tensor, "d_out d_in"]:
    """Return the weights of a linear layer as a matrix of floating-point numbers.

    The result is a view, and writing to it edits the model. Exception: if the weights are quantised or offloaded, it is a copy. It is then
    computed by running the layer on the unit vectors, which works for every form of storage.

    Args:
        linear: The layer.
        like: Any tensor with the dtype that the layer expects for its inputs.
    """
    if not is_packed(linear) and not is_offloaded(linear):
        return linear.weight.T if is_conv1d(linear) else linear.weight
    units = torch.eye(sizes(linear)[0], dtype=like.dtype, device=device(linear))
    # Calling forward directly runs no hooks, which may be active on the layer now.
    columns, bias = linear.forward(units), linear.forward(units[:1] * 0)
    return (columns - bias).T


@torch.no_grad()
def bias(linear: Any) -> Float[Tensor, " d_out"] | None:
    """Return the bias of a linear layer, or ``None`` if it has none. The result is a copy if the layer is offloaded."""
    value = getattr(linear, "bias", None)
    if value is None or not is_offloaded(linear):
        return value
    with present(linear):
        return linear.bias.detach().clone()


def sizes(linear: Any) -> tuple[int, int]:
    """Return the number of inputs and outputs of a linear layer."""
    if hasattr(linear, "in_features"):
        return int(linear.in_features), int(linear.out_features)
    d_in, d_out = linear.weight.shape if is_conv1d(linear) else linear.weight.shape[::-1]
    return int(d_in), int(d_out)


def is_linear(module: Any) -> bool:
    """Return True if a module looks like a linear layer of any library: it has ``in_features``, or a weight with two axes."""
    return hasattr(module, "in_features") or getattr(getattr(module, "weight", None), "ndim", 0) == 2


def is_conv1d(module: Any) -> bool:
    """Return True if a module is GPT-2's Conv1D, a linear layer that stores its weights as ``[in, out]``."""
    return hasattr(module, "nf")
