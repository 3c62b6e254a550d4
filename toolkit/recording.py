"""Record the operations of a function on tensors once, then repeat the recording instead of calling the function.

On a GPU, a recording is a CUDA graph, which launches all operations at once. This saves time, because a decoding step of a large model is
about 2,000 small operations: the CPU takes longer to launch them than the GPU to compute them.

Not tested on a GPU. The tests use a recorder on the CPU in place of the CUDA graph.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from toolkit.memory import release

log = logging.getLogger(__name__)

EAGER_CALLS = 16  # calls without a recording before the first one: recording takes about as long as this number of calls
WARM_UP = 3  # calls on a side stream directly before a recording, as PyTorch's documentation of CUDA graphs asks for
TOLERANCE = {
    torch.float32: 1e-3,
    torch.float16: 2e-2,
    torch.bfloat16: 5e-2,
}  # of the recorded result, relative to its largest number

Run = Callable[[], Tensor]
"""A function whose inputs and outputs are tensors with fixed addresses in memory. Its next call may overwrite the returned tensor."""

Recorder = Callable[[Run], tuple[Callable[[], None], Tensor]]
"""``record(run) -> (repeat, result)``: records the operations of ``run()`` without running them.

``repeat()`` runs the recorded operations on the same tensors, with their current values, and writes the result into ``result``."""


class RecordingError(RuntimeError):
    """A recording of a function gives another result than a call of the function.

    ``Repeated`` raises and catches this error itself: it then logs a warning and runs the function without a recording.
    """


def recorder_for(device: torch.device) -> Recorder | None:
    """Return the recorder for a device: ``cuda_graph`` on a CUDA device, ``None`` on others."""
    return cuda_graph if device.type == "cuda" else None


def cuda_graph(run: Run) -> tuple[Callable[[], None], Tensor]:
    """Record a function as a CUDA graph, and return ``(repeat, result)`` as a ``Recorder`` does. Untested on a GPU."""
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            result = run()
    finally:  # after an error, PyTorch may leave the stream of the recording as the current one
        torch.cuda.set_stream(current)
    return graph.replay, result


class Repeated:
    """Runs a function many times: in the first calls the function itself, later its recording.

    Before a recording is used, its result is compared with that of the function. If they differ by more than ``TOLERANCE``, or if the
    function cannot be recorded, a warning is logged and every call runs the function itself.

    Args:
        run: The function, see ``Run``.
        state: All tensors that ``run`` both reads and changes. To make and check the recording, the function is run several times. These
            tensors are restored, so that all these runs together change them only once.
        record: The recorder, from ``recorder_for``; ``None`` runs the function itself at every call.
        after: Number of calls that run the function itself before it is recorded.
    """

    def __init__(self, run: Run, state: Sequence[Tensor], record: Recorder | None, *, after: int = EAGER_CALLS) -> None:
        self.run, self.state, self.record, self.after = run, list(state), record, after
        self.recorded: tuple[Callable[[], None], Tensor] | None = None
        self.calls = 0

    def __call__(self) -> Tensor:
        """Run the function or its recording, and return the result. The next call may overwrite the returned tensor."""
        if self.recorded is not None:
            repeat, result = self.recorded
            repeat()
            return result
        self.calls += 1
        return self.run() if self.record is None or self.calls <= self.after else self._recorded(self.record)

    def _recorded(self, record: Recorder) -> Tensor:
        """Record the function, check the recording, and return the result of one call."""
        before = [value.clone() for value in self.state]

        def restore() -> None:
            for value, old in zip(self.state, before, strict=True):
                value.copy_(old)

        try:
            self._warm_up(restore)
            recorded = record(self.run)
            restore()
            recorded[0]()
            repeated = recorded[1].clone()
            restore()
            result = self.run()
            _check_same(repeated, result)
        except RuntimeError as error:  # also if memory runs out: a recording needs more than the step itself
            log.warning(
                "A decoding step could not be recorded, so steps are slower (%s: %s)", type(error).__name__, str(error)[:200]
            )
            self.record = None
        if self.record is None:  # outside the handler: the traceback there keeps the tensors of the failed call alive
            release()
            restore()
            return self.run()
        self.recorded = recorded
        return result

    def _warm_up(self, restore: Callable[[], None]) -> None:
        # Libraries set themselves up at their first call on a stream, which must not happen while a graph is recorded.
        if self.state[0].device.type != "cuda":
            return
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self.run()
                restore()
        current.wait_stream(side)


def _check_same(repeated: Tensor, result: Tensor) -> None:
    finite = result.isfinite()  # a suppressed token has the logit -inf
    largest = result.where(finite, 0).abs().max().float()
    apart = (repeated.float() - result.float()).where(finite, 0).abs().max()
    if not torch.equal(finite, repeated.isfinite()) or apart > TOLERANCE.get(result.dtype, 1e-3) * largest:
        raise RecordingError(f"the recorded step deviates by {float(apart):.2g}, of logits up to {float(largest):.2g}")
