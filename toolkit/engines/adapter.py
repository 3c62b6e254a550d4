"""Save the difference between two models as a PEFT LoRA adapter, so that a server can load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from toolkit import adapters, store
from toolkit.engines.base import EngineError
from toolkit.lm import LM
from toolkit.tensors import is_conv1d

LARGEST = 64  # largest rank of an adapter that is made here
SPARE = 8  # singular values that are computed beyond LARGEST, which makes those up to LARGEST more accurate
POWERS = 4  # power iterations of the randomised SVD
# Largest part of a weight's change that the adapter may miss. Rounding an edited weight to half precision adds noise of full rank.
MISSED = {torch.float32: 1e-3, torch.float64: 1e-3}
MISSED_IN_HALF = 0.2


@torch.inference_mode()
def save_difference(base: LM, changed: LM, directory: str | Path) -> Path:
    """Save the weights of ``changed`` minus those of ``base`` as a LoRA adapter, and return its directory.

    If the directory already holds a complete adapter, nothing is computed, and that adapter is not compared with the models. Every changed
    weight must be the matrix of a linear layer. Its change is approximated by a truncated SVD. The rank is the smallest whose relative
    error in the Frobenius norm is at most 0.001 (fp32) or 0.2 (half precision, where rounding adds noise of full rank). All weights then
    get the largest of these ranks, because servers expect one rank.

    Args:
        base: The base model.
        changed: The same model with edited or trained weights.
        directory: Directory of the adapter.

    Raises:
        EngineError: no weight changed, a weight changed that is not the matrix of a linear layer, or a change needs a rank above
            ``LARGEST`` (64).
        FileExistsError: the directory is not empty and holds no complete adapter.
    """
    if store.is_whole(Path(directory)):
        return Path(directory)
    before, after = dict(base.model.named_parameters()), dict(changed.model.named_parameters())
    names = [name for name, digest in changed.digests.items() if base.digests.get(name) != digest]
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    transposed = False
    for name in names:
        path, _, kind = name.rpartition(".")
        module = base.model.get_submodule(path)
        if kind != "weight" or not (isinstance(module, nn.Linear) or is_conv1d(module)):
            raise EngineError(
                f"{changed.name} changes {name}, which no adapter can hold: save it (lm.save) and serve that directory."
            )
        transposed = is_conv1d(module)
        change = after[name].float() - before[name].float()
        factors[path] = _factors(change.T if transposed else change, name, after[name].dtype)
    if not factors:
        raise EngineError(f"{changed.name} has the weights of {base.name}: there is nothing to load as an adapter.")
    tensors, config = adapters.as_lora(factors, base=base.name, revision=base.revision, transposed=transposed)
    try:
        _write(directory, tensors, config, changed)
    except FileExistsError:
        if not store.is_whole(Path(directory)):  # else another process has just written the same
            raise
    return Path(directory)


def _write(directory: str | Path, tensors: dict[str, Tensor], config: dict[str, Any], changed: LM) -> None:
    with store.atomic_directory(directory) as partial:
        store.write_tensors(tensors, {"format": "pt", "fingerprint": changed.fingerprint}, partial / "adapter_model.safetensors")
        store.write_json(config, partial / "adapter_config.json")


def _factors(change: Tensor, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return ``A [rank, in]`` and ``B [out, rank]`` of the LoRA adapter: ``B @ A`` is close to ``change [out, in]``.

    Args:
        change: Changed weight minus base weight.
        name: Name of the weight, for messages.
        dtype: Dtype of the changed weight. It sets the allowed error.

    Raises:
        EngineError: the rank would be above ``LARGEST``.
    """
    share = MISSED.get(dtype, MISSED_IN_HALF)
    U, S, V, rest = _largest_singular(change.cpu() if change.device.type == "mps" else change)  # mps has no fp64
    rank = _rank(S, rest, share)
    if rank > LARGEST and rest:  # the exact singular vectors may need a smaller rank
        U, S, V = torch.linalg.svd(change.cpu(), full_matrices=False)
        rank = _rank(S, 0.0, share)
    if rank > LARGEST:
        raise EngineError(
            f"The change of {name} has rank {rank}, more than the {LARGEST} that are loaded as an adapter: save the model (lm.save) and serve "
            "that directory."
        )
    return (S[:rank, None] * V[:rank]).cpu(), U[:, :rank].cpu()


def _largest_singular(change: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """Return the largest ``LARGEST + SPARE`` singular values S of a matrix, with U and V, and the norm of ``change - U diag(S) V``.

    They come from a randomised SVD (arXiv:0909.4061), on the matrix's device. It is much faster than the full SVD, which small matrices get.
    """
    few = LARGEST + SPARE
    if min(change.shape) <= few:
        return *torch.linalg.svd(change, full_matrices=False), 0.0
    # Q: orthonormal columns that span almost all of the change's columns.
    Q = torch.randn(change.shape[1], few, generator=torch.Generator().manual_seed(0)).to(change)
    for power in range(POWERS + 1):
        Q = torch.linalg.qr(change @ (torch.linalg.qr(change.T @ Q).Q if power else Q)).Q
    projected = Q.T @ change
    U, S, V = torch.linalg.svd(projected, full_matrices=False)
    # Not |change|^2 - sum of S^2: in fp32, rounding would hide a difference of a millionth.
    rest = torch.linalg.vector_norm(change - Q @ projected, dtype=torch.float64)
    return Q @ U, S, V, float(rest)


def _rank(S: Tensor, rest: float, share: float) -> int:
    """Return the smallest rank, at least 1, at which a truncated SVD misses at most a share of a matrix, in the Frobenius norm.

    Args:
        S: Largest singular values of the matrix, descending.
        rest: Norm of the part of the matrix that these singular values leave out.
        share: Largest share of the norm of the whole matrix that may be missed.
    """
    squares = S.cpu().double().square()
    missed = (squares.flip(0).cumsum(0).flip(0) + rest**2).sqrt()  # missed[k]: with rank k
    return max(1, int((missed > share * missed[0]).sum()))
