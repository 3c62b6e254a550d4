"""A recorder that stands in for CUDA graphs: it repeats the operations of a function on the same tensors, on the CPU.

As in a CUDA graph, nothing of Python runs when a recording is repeated: numbers that Python computed while recording are frozen, and
every operation reads and writes the memory that it had then. So a step that keeps anything outside its tensors gives wrong logits here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")  # a CUDA graph cannot hold these


class Tape(TorchDispatchMode):
    """Notes every operation with its arguments and result."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple, dict, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result

    @property
    def names(self) -> list[str]:
        """Name of each operation, with the shapes of the tensors that go into it."""
        return [
            f"{func} {[tuple(t.shape) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]}"
            for func, args, kwargs, _ in self.operations
        ]

    def repeat(self) -> None:
        for func, args, kwargs, result in self.operations:
            for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():  # neither a view nor changed in place
                    old.copy_(new)


class Recorder:
    """A ``recording.Recorder``. ``counts`` holds how often it recorded, and how often a recording was repeated."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        with Tape() as tape:
            result = run()
        assert not (bad := [name for name in tape.names if any(read in name for read in READS)]), bad
        self.counts["recorded"] += 1

        def repeat() -> None:
            self.counts["repeated"] += 1
            with torch.inference_mode():
                tape.repeat()

        return repeat, result
