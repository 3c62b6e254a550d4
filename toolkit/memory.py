"""Run batches that may not fit into memory. If memory runs out, a batch is halved, and later batches are cut to a size that fits."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch


class FittingSize:
    """Runs batches, halves them if memory runs out, and remembers the size that fits for later batches.

    Args:
        size: Function that returns the size of a batch: a number that grows with the memory that the batch takes, such as its number of
            tokens with padding. The default is the number of rows.
    """

    def __init__(self, size: Callable[[Sequence[Any]], int] = len) -> None:
        self.size = size
        self.most: int | None = None  # largest size that may fit; None: memory has not run out yet

    def run(self, rows: Sequence[Any], run: Callable[[Sequence[Any]], None]) -> None:
        """Call ``run(rows)``. If memory runs out, call it on each half of the rows instead, and so on down to single rows.

        The size of the largest half is remembered. Later calls halve a batch that is larger before they run it, so that memory does not run
        out again for every batch.

        The function ``run`` is called again with rows for which it ran out of memory. So it must store its results only at its end, when it
        can no longer run out of memory; or leave out the rows whose results it has stored.
        """
        if len(rows) > 1 and self.most is not None and self.size(rows) > self.most:
            self._halves(rows, run)
            return
        try:
            run(rows)
            return
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if len(rows) == 1 or not out_of_memory(error):
                raise
        # Outside the handler: the traceback there keeps the tensors of the failed call alive.
        release()
        self.most = max(self.size(half) for half in _halves(rows))
        self._halves(rows, run)

    def _halves(self, rows: Sequence[Any], run: Callable[[Sequence[Any]], None]) -> None:
        for half in _halves(rows):
            self.run(half, run)


def _halves(rows: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    return rows[: len(rows) // 2], rows[len(rows) // 2 :]


def release() -> None:
    """Free the memory of unused tensors, including those in reference cycles, and empty PyTorch's cache on a GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def out_of_memory(error: BaseException) -> bool:
    """Return True if an error says that memory ran out, on a GPU or the CPU. (PyTorch's CPU allocator raises a plain RuntimeError.)"""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    texts = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")  # plain RuntimeErrors
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
