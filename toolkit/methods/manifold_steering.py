"""Manifold Steering (Huang et al., NeurIPS 2025), arXiv:2505.22411. A direction is first projected onto the manifold of activations.

Equations. r is the mean activation of long thinking minus that of short thinking, u_i the principal components of the activations of both
classes together, centred, and k the number of components::

    r' = sum over i <= k of (r . u_i) u_i        then scaled to norm 1
    h  <- h - strength (h . r') r'

Published: k = 10, where at least 70 % of the variance is held; one layer (27 of a 28-layer model).

Sources: the abstract, and notes on another author's re-implementation; the authors' repository holds no code.

Deviations: the strength and the exact intervention are not known. Ours is ``steering(v, strength, op="ablate")``, which needs no norm: so
``direction`` keeps the norm of r', and all layers get a direction. Activations are those of ``States``, for example one mean per response.
The paper has no control. Ours is ``direction`` of ``states.shuffled((LONG, SHORT), seed=...)``: the
same construction after the two classes were exchanged at random. ``random_share`` is the null of the re-implementation: the share of r that a random subspace of the same dimension
holds, which is sqrt(k / width) for a r without structure.

Units and signs: + is longer. Cost: one PCA per layer.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from toolkit.collect import States
from toolkit.directions import LONG, SHORT, unpaired_difference
from toolkit.types import Direction

COMPONENTS = 10  # published


def components(states: States, k: int = COMPONENTS, *, pos: str = LONG, neg: str = SHORT) -> Float[Tensor, "layers k width"]:
    """Return the first k principal components of the activations of both classes, per layer, as orthonormal rows.

    Raises:
        ValueError: there are not more than k rows, or k is more than the width.
        KeyError: one of the classes is missing.
    """
    index = np.concatenate([states.of(pos), states.of(neg)])
    values = states.values[torch.from_numpy(index)].double()
    rows, _, width = values.shape
    if not 1 <= k <= min(rows - 1, width):
        raise ValueError(
            f"k={k}: {rows} activations of width {width} have at most {min(rows - 1, width)} components. Choose a smaller k."
        )
    return torch.linalg.svd((values - values.mean(dim=0)).transpose(0, 1), full_matrices=False).Vh[:, :k]


def direction(states: States, k: int = COMPONENTS, *, pos: str = LONG, neg: str = SHORT) -> Direction:
    """Return the difference of means, projected onto the first k principal components, per layer. It is not normalised.

    Args:
        states: Activations of responses with classes, from ``collect.states``.
        k: Number of components.
        pos: Class of long thinking.
        neg: Class of short thinking.

    Raises:
        ValueError, KeyError: as in ``components``.
    """
    r, basis = unpaired_difference(states, pos=pos, neg=neg), components(states, k, pos=pos, neg=neg)
    return replace(r, vector=projected(r.vector, basis), estimator=f"manifold (k={k})")


def projected(r: Float[Tensor, "layers width"], basis: Float[Tensor, "layers k width"]) -> Float[Tensor, "layers width"]:
    """Return the part of each layer's vector in the span of orthonormal rows.

    >>> projected(torch.tensor([[3.0, 4.0]]), torch.tensor([[[0.0, 1.0]]])).tolist()
    [[0.0, 4.0]]
    """
    return torch.einsum("lk,lkd->ld", torch.einsum("ld,lkd->lk", r.to(basis), basis), basis)


def share_inside(states: States, k: int = COMPONENTS, *, pos: str = LONG, neg: str = SHORT) -> Float[Tensor, " layers"]:
    """Return the share of r inside the manifold per layer: norm of the projection of r, divided by the norm of r, 0 to 1.

    Args:
        states: Activations of responses with classes.
        k: Number of components.
        pos: Class of long thinking.
        neg: Class of short thinking.

    Raises:
        ValueError, KeyError: as in ``components``.
    """
    r = unpaired_difference(states, pos=pos, neg=neg)
    return projected(r.vector, components(states, k, pos=pos, neg=neg)).norm(dim=-1) / r.norms


def random_share(states: States, k: int = COMPONENTS, *, seed: int, pos: str = LONG, neg: str = SHORT) -> Float[Tensor, " layers"]:
    """Return the share of r inside a random subspace of dimension k, per layer, 0 to 1: the null of ``share_inside``.

    Args:
        states: Activations of responses with classes.
        k: Dimension of the subspace.
        seed: Random seed.
        pos: Class of long thinking.
        neg: Class of short thinking.
    """
    r = unpaired_difference(states, pos=pos, neg=neg)
    layers, width = r.vector.shape
    noise = torch.randn(layers, width, k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return projected(r.vector, torch.linalg.qr(noise).Q.mT).norm(dim=-1) / r.norms
