"""A pretended GPU: tensors that compute on the CPU, call themselves ``cuda``, and count what would make the CPU wait for the GPU.

``pretended(lm)`` copies a model to it. Inside, code that asks for ``tensor.device`` takes the way that it would take on a GPU. These calls
are counted, because on a GPU each of them waits until all work queued so far is done:

- a number read by Python: ``item``, ``tolist``, ``bool``, ``int``, ``float``, an index; ``numpy``; ``torch.equal``, ``torch.allclose``;
- a copy to the CPU: ``cpu``, ``to("cpu")``;
- a copy from ordinary CPU memory: ``to("cuda")``, ``torch.tensor(numbers, device="cuda")``, an index by a list (PyTorch waits after it); a
  copy with ``non_blocking=True`` from pinned memory does not wait;
- a result whose size depends on values: ``nonzero``, ``torch.where`` of one argument, ``masked_select``, an index by a mask, ``unique``,
  ``repeat_interleave`` by a tensor.

An operation on tensors of both devices is an error, as on a GPU.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_flatten, tree_map

from toolkit.lm import LM

CUDA = torch.device("cuda", 0)
READS = {
    "item", "tolist", "numpy", "nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "equal", "allclose",
    "__bool__", "__int__", "__float__", "__index__", "__contains__", "is_nonzero", "__array__",
}  # fmt: skip


class Card(Tensor):
    """A tensor on the pretended GPU. Its numbers are in CPU memory."""


def on_card(value: Tensor) -> Tensor:
    return value.detach().as_subclass(Card) if not isinstance(value, Card) else value


def plain(value: Any) -> Any:
    return value.as_subclass(Tensor) if isinstance(value, Card) else value


def is_cuda(device: Any) -> bool:
    return device is not None and not isinstance(device, int) and torch.device(device).type == "cuda"


class Counting(TorchFunctionMode):
    """Sees every call of PyTorch's functions. ``waits`` counts, by name, the calls that would wait for the GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), (resolve_name(func) or str(func)).rpartition(".")[2]
        owner = getattr(func, "__self__", None)
        if name == "__get__" and args and isinstance(args[0], Card):
            attribute = getattr(owner, "__name__", "")
            if attribute == "device":
                return CUDA
            if attribute == "is_cuda":
                return True
            if attribute == "is_cpu":
                return False
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        here = any(isinstance(t, Card) for t in tensors)
        target, asked = self._target(name, args, kwargs)
        if here and self._reads(name, args):
            self.waits[name] += 1
            args, kwargs = tree_map(plain, (args, kwargs))
            return tree_map(lambda t: on_card(t) if isinstance(t, Tensor) else t, func(*args, **kwargs)) if name in {
                "nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "__getitem__", "__setitem__", "where", "repeat_interleave",
            } else func(*args, **kwargs)  # fmt: skip
        if name == "pin_memory":
            return args[0]
        if name == "copy_" and isinstance(args[0], Card) != isinstance(args[1], Card):
            self.waits[name] += not kwargs.get("non_blocking", False)
            return func(*args, **kwargs)
        if target == "cpu" and here and name in {"to", "cpu"}:
            self.waits[name] += 1
            return func(*tree_map(plain, args), **tree_map(plain, kwargs))
        if target == "cuda":
            copies = not here and name in {"to", "cuda", "tensor", "as_tensor"} and not kwargs.get("non_blocking", False)
            kwargs = {key: "cpu" if key == "device" else value for key, value in kwargs.items()}
            args = tuple("cpu" if asked is not None and value is asked else value for value in args)
            result = func(*args, **kwargs)
            if copies and result.numel():
                self.waits[name] += 1
            return tree_map(lambda t: on_card(t) if isinstance(t, Tensor) else t, result)
        if (
            here
            and any(not isinstance(t, Card) and t.ndim > 0 for t in tensors)
            and name not in {"__get__", "__set__", "as_subclass", "set_"}
        ):
            raise RuntimeError(f"{name} mixes tensors on the CPU and on the pretended GPU")
        return func(*args, **kwargs)

    @staticmethod
    def _target(name: str, args: Any, kwargs: Any) -> tuple[str | None, Any]:
        """Kind of device that a call asks for, if any, and the positional argument that asks for it."""
        if "device" in kwargs:
            device = kwargs["device"]
            return (None if device is None else "cuda" if is_cuda(device) else "cpu"), None
        if name == "cpu":
            return "cpu", None
        if name == "to":
            for value in args[1:]:
                if isinstance(value, torch.device | str):
                    return ("cuda" if is_cuda(value) else "cpu"), value
                if isinstance(value, Card):
                    return "cuda", None
        return None, None

    @staticmethod
    def _reads(name: str, args: Any) -> bool:
        if name in READS:
            return True
        if name == "where":
            return len(args) == 1
        if name == "repeat_interleave":
            return len(args) > 1 and isinstance(args[1], Tensor)
        if name in {"__getitem__", "__setitem__"}:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(i, list) for i in index):
                return True
            masks = [i for i in index if isinstance(i, Tensor) and i.dtype == torch.bool]
            # A mask that only selects where to write one number is a masked_fill.
            return bool(masks) and not (name == "__setitem__" and not isinstance(args[2], Tensor))
        return False


@contextmanager
def pretended(lm: LM) -> Iterator[tuple[LM, Counter[str]]]:
    """Yield a copy of the model on the pretended GPU, and the counter of waits."""
    model = copy.deepcopy(lm.model)
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = torch.nn.Parameter(on_card(value.data), requires_grad=False)
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = on_card(value)
    from toolkit import sites

    there = replace(lm, model=model, layout=sites.find(model))
    there.__dict__.update(
        {name: getattr(lm, name) for name in ("eos_ids", "caches_keys", "gated_layers", "digests", "fingerprint")}
    )
    mode = Counting()
    with mode:
        yield there, mode.waits
