"""Run batches that may not fit into memory: in halves, if it runs out, with the size that fits remembered."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch


class FittingSize:
    """Runs batches, in halves if memory runs out, and remembers the size that fits for the batches that follow.

    Args:
        size: Function from a batch to a number that grows with the memory that the batch takes, such as its padded tokens. The default is
            the number of rows.
    """

    def __init__(self, size: Callable[[Sequence[Any]], int] = len) -> None:
        self.size = size
        self.most: int | None = None  # largest size that may fit; None: memory has not run out yet

    def run(self, rows: Sequence[Any], run: Callable[[Sequence[Any]], None]) -> None:
        """Call ``run(rows)``. If memory runs out, call it on each half of the rows instead, and so on down to single rows.

        Later calls cut their rows to the size that remained, so a batch that is too large fails once and not again for every batch.

        After a call that ran out of memory, ``run`` is called again with the same rows. So it must store its results only at its end, when
        it can no longer run out of memory.
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
    """Give back the memory of tensors that are no longer used, also of those that refer to each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def out_of_memory(error: BaseException) -> bool:
    """Return True if an error says that memory ran out, on a GPU or on the CPU, whose allocator raises a plain RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    texts = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")  # plain RuntimeErrors
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
