"""Tensor algebra on moments: estimators of a length direction, its random control, cosines.

An estimator is a function of :class:`~toolkit.types.Moments`; nothing here runs a model.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from toolkit.types import Direction, Moments

LONG, SHORT = "long", "short"


def mean_difference(moments: Moments, kind: str, *, pos: str = LONG, neg: str = SHORT) -> Direction:
    """Mean of class ``pos`` minus mean of class ``neg``, per layer, un-normalised; + is longer."""
    return _direction(moments, kind, "mean_difference", moments.mean(kind, pos) - moments.mean(kind, neg), (pos, neg))


def whitened(moments: Moments, kind: str, *, shrinkage: float = 0.1, pos: str = LONG, neg: str = SHORT) -> Direction:
    """Linear-discriminant direction: the mean difference multiplied by the inverse within-class covariance (ours).

    Directions in which activations vary a lot for other reasons (content) are turned down. Its length carries no meaning,
    so it is rescaled to the norm of the mean difference, which keeps steering strengths comparable.

    Args:
        shrinkage: Weight of the mean variance on the diagonal, in (0, 1]; ours.
    """
    if not 0 < shrinkage <= 1:
        raise ValueError(f"shrinkage={shrinkage}: need 0 < shrinkage <= 1.")
    delta = moments.mean(kind, pos) - moments.mean(kind, neg)
    covariance = moments.covariance(kind)
    variance = covariance.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[:, None, None]
    eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype)
    vector = torch.linalg.solve((1 - shrinkage) * covariance + shrinkage * variance * eye, delta)
    norm = vector.norm(dim=-1, keepdim=True)
    vector = vector * (delta.norm(dim=-1, keepdim=True) / norm.where(norm > 0, 1.0))
    return _direction(moments, kind, "whitened", vector, (pos, neg))


def random_like(direction: Direction, *, seed: int) -> Direction:
    """A random direction of equal norm in every layer: the control of everything done with ``direction``."""
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(direction.vector.shape, generator=generator, dtype=direction.vector.dtype)
    vector = vector * (direction.norms / vector.norm(dim=-1))[:, None]
    return Direction(
        vector, direction.kind, direction.positions, f"random(seed={seed})", direction.n_pos, direction.n_neg, direction.provenance
    )


def cosine(a: Direction, b: Direction) -> Float[Tensor, " layers"]:
    """Cosine between two directions, per layer."""
    return torch.cosine_similarity(a.vector, b.vector, dim=-1)


def separation(moments: Moments, direction: Direction, *, pos: str = LONG, neg: str = SHORT) -> Float[Tensor, " layers"]:
    """How far the classes lie apart along the direction, per layer, in within-class standard deviations (d').

    Needs second moments of the direction's site. The deviation is that of single positions, not of example means.
    """
    unit = direction.unit()
    gap = ((moments.mean(direction.kind, pos) - moments.mean(direction.kind, neg)) * unit).sum(dim=-1)
    variance = torch.einsum("li,lij,lj->l", unit, moments.covariance(direction.kind), unit)
    return gap / variance.clamp(min=1e-12).sqrt()


def _direction(moments: Moments, kind: str, estimator: str, vector: Tensor, classes: tuple[str, str]) -> Direction:
    pos, neg = (moments.n[moments.index(label)] for label in classes)
    return Direction(vector, kind, moments.positions, estimator, pos, neg, moments.provenance)
