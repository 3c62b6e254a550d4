"""ThinkEdit: interpretable weight editing to mitigate overly short thinking (Sun et al., EMNLP 2025), arXiv:2503.22048.

Equations (T_i the think span of response i, states taken at the positions that *predict* its tokens):

    v_l   = mean_{i in long} mean_t r_l(i, t)  -  mean_{i in short} mean_t r_l(i, t)
    c(l,h) = mean_{i in short} < mean_t W_l^h z_l^h(i, t), -v_l / |v_l| >
    W_l^h <- (I - lambda v v^T) W_l^h          for the heads with the highest c, v = v_l / |v_l|

with r_l the residual stream after attention (``resid_mid``, "attn") or after the block (``resid_post``, "mlp").

Deviations: token ids are the sampled ones, never re-tokenised text; spans exclude the tags; ``resid_post`` of the last
layer is taken before the final norm (the released code takes it after); sums are fp64; head size follows W_O. Classes may
be quantiles, since absolute thresholds mean nothing on another model. The paper's models add W_l^h z_l^h to the stream as it is;
in post-norm families it is normalised first, so that each position's z is divided by the scale of that norm, and v goes
through its gain: scores stay what reaches the stream. Ours, and named so: :func:`contrast_scores` and :func:`written_direction`.

Units and signs: lengths in tokens; + is longer; scores in units of the residual stream, higher = pushes shorter.

Cost: one forward pass per rollout (``collect.moments``); everything here is algebra on means, ``W mean(z) = mean(W z)``. It holds
in post-norm families, too: a position's scale belongs to the layer, not to the head, and is divided out before the mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from toolkit import directions
from toolkit.collect import ATTN
from toolkit.directions import LONG, SHORT
from toolkit.lm import LM
from toolkit.types import Direction, HeadScores, Moments, Rollout

PUBLISHED_SHORT, PUBLISHED_LONG = 100.0, 1000.0  # tokens: released generate_response_gsm8k.py
PUBLISHED_FRACTION = 0.04  # of all heads: paper v3/v4 ("~4 %"; the released lists have 3.9 to 6.3 %)
PUBLISHED_STRENGTHS = tuple(i / 100 for i in range(-8, 9))  # steering alphas: released thinking_length_steering
assumed_share = 0.2  # share of rollouts in each quantile class: ours
assumed_min_class = 8  # examples below which a class mean is noise: ours


class ClassTooSmallError(ValueError):
    """A length class has too few examples to average."""


@dataclass(frozen=True)
class LengthClasses:
    """``short``: think length < ``short_below``; ``long``: > ``long_above`` (both strict); the rest is left out.

    Rollouts that never closed their think span, or never opened one, are in no class.
    """

    short_below: float
    long_above: float

    def __call__(self, rollout: Rollout) -> str | None:
        if rollout.think is None or not rollout.closed:
            return None
        if rollout.think_tokens < self.short_below:
            return SHORT
        return LONG if rollout.think_tokens > self.long_above else None


def length_classes(
    rollouts: Sequence[Rollout],
    *,
    short_below: float = PUBLISHED_SHORT,
    long_above: float = PUBLISHED_LONG,
    at_least: int = assumed_min_class,
) -> LengthClasses:
    """Classes by absolute thresholds in tokens, as published.

    Raises:
        ClassTooSmallError: a class has fewer than ``at_least`` rollouts; gives the counts and the quantiles of length.
    """
    if short_below > long_above:
        raise ValueError(f"short_below={short_below} lies above long_above={long_above}: the classes would overlap.")
    return _checked(LengthClasses(short_below, long_above), rollouts, at_least)


def quantile_classes(
    rollouts: Sequence[Rollout], *, share: float = assumed_share, at_least: int = assumed_min_class
) -> LengthClasses:
    """Classes by quantiles of think length: the shortest and the longest ``share`` of the closed rollouts (ours).

    Raises:
        ClassTooSmallError: too few closed rollouts, or too many equal lengths to tell the ends apart.
    """
    if not 0 < share <= 0.5:
        raise ValueError(f"share={share}: need 0 < share <= 0.5.")
    lengths = np.array([r.think_tokens for r in rollouts if r.think is not None and r.closed])
    if not len(lengths):
        raise ClassTooSmallError(f"None of the {len(rollouts)} rollouts has a closed think span.")
    low, high = np.quantile(lengths, [share, 1 - share])
    # Thresholds between two lengths, so that strict inequalities keep the ends.
    return _checked(LengthClasses(float(np.floor(low)) + 0.5, float(np.ceil(high)) - 0.5), rollouts, at_least)


def _checked(classes: LengthClasses, rollouts: Sequence[Rollout], at_least: int) -> LengthClasses:
    labels = [classes(r) for r in rollouts]
    counts = {name: labels.count(name) for name in (SHORT, LONG)}
    if min(counts.values()) < at_least or classes.short_below > classes.long_above + 1:
        lengths = [r.think_tokens for r in rollouts if r.think is not None and r.closed]
        spread = np.quantile(lengths, [0.05, 0.5, 0.95]).round().tolist() if lengths else []
        raise ClassTooSmallError(
            f"{counts[SHORT]} rollouts think less than {classes.short_below:g} tokens, {counts[LONG]} more than "
            f"{classes.long_above:g}; each class needs {at_least}. Of {len(rollouts)} rollouts {len(lengths)} closed their think "
            f"span (5 %, 50 %, 95 % of lengths: {spread}). Use quantile_classes, other thresholds, or more rollouts."
        )
    return classes


Estimator = Callable[[Moments, str], Direction]


def direction(moments: Moments, kind: str = ATTN, *, estimator: Estimator = directions.mean_difference) -> Direction:
    """The length direction v_l per layer; ``kind`` is ``"resid_mid"`` (attn) or ``"resid_post"`` (mlp).

    The published estimator is the difference of means; ``directions.whitened`` is ours.
    """
    return estimator(moments, kind)


def head_scores(moments: Moments, v: Direction, lm: LM) -> HeadScores:
    """c(l, h): how much each head writes towards *short* in short thinking, on average (published form)."""
    return _scores(moments.mean(lm.layout.contribution_kind, SHORT), v, lm, "short_thinking")


def contrast_scores(moments: Moments, v: Direction, lm: LM) -> HeadScores:
    """What each head writes towards short along the *last* layer's direction, in short minus in long thinking (ours).

    What is always written does not count, and all heads are measured where the decision is read: a head's write stays in the
    stream to its end (give v at ``resid_post``), while the direction of an early layer is mostly that of the content there.
    """
    last = replace(v, vector=v.vector[-1:].expand_as(v.vector))
    z = moments.mean(lm.layout.contribution_kind, SHORT) - moments.mean(lm.layout.contribution_kind, LONG)
    return _scores(z, last, lm, "short_thinking_contrast")


def _scores(z: Float[Tensor, "layers z"], v: Direction, lm: LM, method: str) -> HeadScores:
    unit = v.unit()
    score = torch.zeros(lm.layout.n_layers, lm.layout.n_heads, dtype=torch.float64)
    for layer in range(lm.layout.n_layers):
        W_O = lm.layout.W_O(layer).detach()
        towards_short = -unit[layer].to(W_O.device, torch.float32)
        u = lm.layout.to_attn_out(layer, towards_short / towards_short.norm().clamp(min=1e-12)) @ W_O.float()
        score[layer] = (u.double().cpu() * z[layer]).view(lm.layout.n_heads, -1).sum(dim=-1)
    return HeadScores(score, method, "residual stream norm", v.provenance)


def written_direction(moments: Moments, heads: Sequence[tuple[int, int]], lm: LM) -> Direction:
    """The part of the length direction that the given heads write themselves (ours), long minus short, at ``attn_out``:

        u_l = sum_{h of layer l} W_l^h (mean z_long - mean z_short)

    with z over the scale of the norm that follows, where one does: u_l times that norm's gain is what reaches the stream. The full direction also holds what other parts of the network know about length (such as how hard the problem is), which
    tilts it away from what the heads write: removing it then leaves much of their push in place. Layers without a given head
    are zero.
    """
    difference = moments.mean(lm.layout.contribution_kind, LONG) - moments.mean(lm.layout.contribution_kind, SHORT)
    vector = torch.zeros(lm.layout.n_layers, lm.layout.d_model, dtype=torch.float64)
    for layer, head in heads:
        columns = lm.layout.head(head)
        vector[layer] += lm.layout.W_O(layer).detach()[:, columns].cpu().double() @ difference[layer, columns]
    n_pos, n_neg = (moments.n[moments.index(label)] for label in (LONG, SHORT))
    return Direction(vector, "attn_out", moments.positions, "written_by_heads", n_pos, n_neg, moments.provenance)
