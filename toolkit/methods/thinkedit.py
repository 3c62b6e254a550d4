"""ThinkEdit: interpretable weight editing to mitigate overly short thinking (Sun et al., EMNLP 2025), arXiv:2503.22048.

Equations (i: response; t: the positions that *predict* the think tokens of i; long, short: classes of responses with long and with short
thinking; e_l = v_l / |v_l|):

    v_l   = mean_{i in long} mean_t r_l(i, t)  -  mean_{i in short} mean_t r_l(i, t)         length direction of layer l
    c(l,h) = mean_{i in short} < mean_t W_l^h z_l^h(i, t), -e_l >                            score of head h of layer l
    W_l^h <- (I - lambda e_l e_l^T) W_l^h                                                    edit of the heads with the highest c

r_l is the residual stream after attention (``resid_mid``, "attn" in the released code) or after the block (``resid_post``, "mlp"). z_l^h is
the output of a head before W_O, W_l^h the head's part of W_O, and lambda the strength of the edit.

Deviations:

* Activations are read at the sampled token ids; the released code tokenizes the text of the response again. Think spans exclude the tags.
* ``resid_post`` of the last layer is taken before the final norm; the released code takes it after.
* Sums over responses are accumulated in fp64.
* Classes may also be set by quantiles of the length, since thresholds in tokens do not transfer between models.
* In the paper's models, W_l^h z_l^h is added to the residual stream directly. Post-norm families (such as Gemma 2) have a norm between W_O
  and the stream: it divides by a root mean square and multiplies by a gain. There, z is divided by this root mean square at each position,
  and the gain is included in the scores. So scores measure what is added to the stream.
* ``contrast_scores`` and ``written_direction`` are not in the paper.

Units and signs: lengths are numbers of think tokens. Adding v makes thinking longer. Scores are in units of the residual stream; a higher
score means that the head writes more towards shorter thinking.

Cost: one forward pass per rollout (``collect.moments``), which collects means over rollouts. The functions here run no model: the mean of z
is enough, since ``W mean(z) = mean(W z)``. This also holds in post-norm families, because z is divided before the mean is taken.
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

PUBLISHED_SHORT, PUBLISHED_LONG = 100.0, 1000.0  # thresholds in think tokens: released generate_response_gsm8k.py
PUBLISHED_FRACTION = 0.04  # share of all heads that is edited: paper v3/v4 ("~4 %"; the released lists have 3.9 to 6.3 %)
PUBLISHED_STRENGTHS = tuple(i / 100 for i in range(-8, 9))  # steering strengths (alpha): released thinking_length_steering
assumed_share = 0.2  # share of rollouts in each quantile class: ours
assumed_min_class = 8  # smallest number of rollouts in a class: ours


class ClassTooSmallError(ValueError):
    """There are too few rollouts with short thinking, or too few with long thinking.

    ``length_classes`` and ``quantile_classes`` raise it if a class has fewer rollouts than their argument ``at_least``.

    With ``quantile_classes``, the reason may be that many rollouts have the same length. If both quantiles are equal to that length, all
    these rollouts count as short, and few or none are left for the long class.
    """


@dataclass(frozen=True)
class LengthClasses:
    """Two classes of rollouts, with short and with long thinking, by thresholds on the number of think tokens.

    A ``LengthClasses`` can be called with a rollout, to give its class: ``"short"``, ``"long"``, or ``None`` for lengths in between. The
    class is also ``None`` if the think span was never opened, was never closed or is empty: an empty span has no position at which
    activations could be read.

    Attributes:
        short_below: A rollout is short if it has fewer than this many think tokens.
        long_above: A rollout is long if it has more than this many think tokens.
    """

    short_below: float
    long_above: float

    def __call__(self, rollout: Rollout) -> str | None:
        if not _thinks(rollout):
            return None
        if rollout.think_tokens < self.short_below:
            return SHORT
        return LONG if rollout.think_tokens > self.long_above else None


def _thinks(rollout: Rollout) -> bool:
    """Return True if a rollout has a think span that is closed and not empty."""
    return rollout.closed and rollout.think_tokens > 0


def length_classes(
    rollouts: Sequence[Rollout],
    *,
    short_below: float = PUBLISHED_SHORT,
    long_above: float = PUBLISHED_LONG,
    at_least: int = assumed_min_class,
) -> LengthClasses:
    """Return length classes with given thresholds; the defaults, 100 and 1000 think tokens, are those of ThinkEdit.

    >>> from toolkit.types import Span
    >>> def rollout(n):  # n think tokens
    ...     return Rollout("q", n, (0,) * (n + 3), 1, Span(1, n + 1), Span(n + 2, n + 3), "stop", "", correct=True)
    >>> rollouts = [rollout(n) for n in (20, 50, 400, 1200, 2000)]
    >>> classes = length_classes(rollouts, at_least=2)
    >>> [classes(r) for r in rollouts]
    ['short', 'short', None, 'long', 'long']

    Args:
        rollouts: The rollouts to classify. They do not change the thresholds; only the sizes of the classes are checked on them.
        short_below: A rollout is short if it has fewer than this many think tokens.
        long_above: A rollout is long if it has more than this many think tokens.
        at_least: Smallest allowed number of rollouts per class.

    Raises:
        ClassTooSmallError: A class has fewer than ``at_least`` rollouts; the message gives counts and quantiles of the length.
        ValueError: ``short_below`` is above ``long_above``, so the classes would overlap.
    """
    if short_below > long_above:
        raise ValueError(f"short_below={short_below} lies above long_above={long_above}: the classes would overlap.")
    return _checked(LengthClasses(short_below, long_above), rollouts, at_least)


def quantile_classes(
    rollouts: Sequence[Rollout], *, share: float = assumed_share, at_least: int = assumed_min_class
) -> LengthClasses:
    """Return length classes whose thresholds are quantiles of the length (ours, not ThinkEdit's).

    With ``share=0.1``, for example, the short class is the 10 % of the rollouts with the shortest thinking, and the long class the 10 %
    with the longest. Only rollouts with a closed think span that is not empty are considered.

    Args:
        rollouts: The rollouts to classify; their lengths set the thresholds.
        share: Share of the rollouts in each class, above 0 and at most 0.5. Rollouts whose length equals the quantile all belong to the
            class, so it can be larger.
        at_least: Smallest allowed number of rollouts per class.

    Raises:
        ClassTooSmallError: A class has fewer than ``at_least`` rollouts. Either too few rollouts have a closed think span that is not empty,
            or so many have the same length that few are left for the long class.
        ValueError: ``share`` is out of range.
    """
    if not 0 < share <= 0.5:
        raise ValueError(f"share={share}: need 0 < share <= 0.5.")
    lengths = np.array([r.think_tokens for r in rollouts if _thinks(r)])
    if not len(lengths):
        raise ClassTooSmallError(
            f"None of the {len(rollouts)} rollouts has a closed think span with thinking in it{_and_empty(rollouts)}."
        )
    low, high = np.quantile(lengths, [share, 1 - share])
    # Thresholds half a token beyond whole lengths, so that the strict inequalities include the quantiles themselves.
    return _checked(LengthClasses(float(np.floor(low)) + 0.5, float(np.ceil(high)) - 0.5), rollouts, at_least)


def check_enough(rollouts: int, *, at_least: int = assumed_min_class) -> None:
    """Check, before sampling, that so many rollouts can fill both length classes. Call it with the number of rollouts to sample.

    Args:
        rollouts: Number of rollouts.
        at_least: Smallest allowed number of rollouts per class.

    Raises:
        ClassTooSmallError: There are fewer rollouts than the two classes need, whatever their lengths.
    """
    if rollouts < 2 * at_least:
        raise ClassTooSmallError(
            f"{rollouts} rollouts (problems x samples) are too few: the classes of short and of long thinking need {at_least} each, so "
            f"{2 * at_least} at least. Use more problems or samples (--problems, --samples)."
        )


def _checked(classes: LengthClasses, rollouts: Sequence[Rollout], at_least: int) -> LengthClasses:
    """Return the classes unchanged. Raise ClassTooSmallError if one has fewer than ``at_least`` rollouts.

    The error is also raised if the thresholds overlap by more than one token.
    """
    labels = [classes(r) for r in rollouts]
    counts = {name: labels.count(name) for name in (SHORT, LONG)}
    # The thresholds of quantile_classes lie half a token beyond whole lengths. For two equal quantiles they overlap by 1, which is allowed:
    # rollouts of that length then count as short.
    if min(counts.values()) < at_least or classes.short_below > classes.long_above + 1:
        lengths = [r.think_tokens for r in rollouts if _thinks(r)]
        spread = np.quantile(lengths, [0.05, 0.5, 0.95]).round().tolist() if lengths else []
        raise ClassTooSmallError(
            f"{counts[SHORT]} rollouts think less than {classes.short_below:g} tokens and {counts[LONG]} more than "
            f"{classes.long_above:g}; each class needs {at_least}. Of {len(rollouts)} rollouts, {len(lengths)} thought and closed their "
            f"think span{_and_empty(rollouts)} (5 %, 50 %, 95 % quantiles of lengths: {spread}). Use more rollouts (problems, samples), other "
            "thresholds (short_below, long_above), or larger shares of the "
            "lengths (quantile_classes(share=); --share of toolkit thinkedit and toolkit direction)."
        )
    return classes


def _and_empty(rollouts: Sequence[Rollout]) -> str:
    """Return a note on the rollouts whose think span is closed but empty; ``""`` if there are none."""
    empty = sum(r.closed and r.think is not None and not r.think_tokens for r in rollouts)
    return f", while {empty} closed an empty one, which gives no activations" if empty else ""


Estimator = Callable[[Moments, str], Direction]
"""Function ``(moments, kind) -> direction``, such as ``directions.mean_difference``.

The moments hold mean activations in long and in short thinking. The kind, such as ``"resid_mid"``, says where activations are read. The
direction has one vector per layer.
"""


def direction(moments: Moments, kind: str = ATTN, *, estimator: Estimator = directions.mean_difference) -> Direction:
    """Return the length direction of each layer: the mean residual stream of long thinking minus that of short thinking.

    The direction is a vector ``[d_model]`` per layer; adding it makes thinking longer. Each response is first averaged over the positions
    that the moments were collected at, by default those that predict its think tokens.

    Args:
        moments: Mean activations of the classes ``long`` and ``short``, from ``collect.moments(lm, rollouts, by=classes)``. The classes are
            from ``length_classes`` or ``quantile_classes``.
        kind: Where the residual stream is read: ``"resid_mid"`` (after attention) or ``"resid_post"`` (after the block).
        estimator: Function that computes the direction from ``moments`` and ``kind``. Default: the difference of means, as in ThinkEdit;
            ``directions.whitened`` is ours.
    """
    return estimator(moments, kind)


def head_scores(moments: Moments, v: Direction, lm: LM) -> HeadScores:
    """Return ThinkEdit's score of each attention head: how strongly it writes towards *shorter* thinking in responses with short thinking.

    The score is a dot product of two vectors. The first is the mean of what the head adds to the residual stream: first over the positions
    of each response, by default those that predict think tokens, then over the responses with short thinking. The second is the unit vector
    along -v, where v is the length direction of the head's layer. The score is in units of the residual stream. It is positive if the head
    writes towards shorter thinking.

    Args:
        moments: Mean activations of the class ``short``, including the heads' outputs ``z``, from ``collect.moments``. Its argument
            ``positions`` sets the positions.
        v: Length direction, from ``direction``, usually at ``resid_mid``; adding it makes thinking longer.
        lm: The model that the moments were collected from.
    """
    return _scores(moments.mean(lm.layout.contribution_kind, SHORT), v, lm, "short_thinking")


def contrast_scores(moments: Moments, v: Direction, lm: LM) -> HeadScores:
    """Return our score of each attention head: how much more it writes towards shorter thinking in short than in long thinking.

    ThinkEdit's score (``head_scores``) projects a head's mean output in short thinking on the negative length direction of the head's own
    layer. Our score differs in two ways:

    1. It uses the head's mean output in short thinking minus that in long thinking. This removes output that does not depend on the length.
    2. It projects the outputs of all heads on the negative direction of the *last* layer. A head's output stays in the residual stream to
       the end, where the next token is decided. The direction of an early layer mostly reflects content at that layer.

    The score is in units of the residual stream.

    Args:
        moments: Mean activations of the classes ``short`` and ``long`` (responses with short and with long thinking), including the heads'
            outputs ``z``, from ``collect.moments``.
        v: Length direction at ``resid_post``, from ``direction``; adding it makes thinking longer. Only its last layer is used.
        lm: The model that the moments were collected from.
    """
    last = replace(v, vector=v.vector[-1:].expand_as(v.vector))
    z = moments.mean(lm.layout.contribution_kind, SHORT) - moments.mean(lm.layout.contribution_kind, LONG)
    return _scores(z, last, lm, "short_thinking_contrast")


def _scores(z: Float[Tensor, "layers z"], v: Direction, lm: LM, method: str) -> HeadScores:
    """Return one score per head: its mean contribution to the residual stream, projected on the unit vector along -v at its layer.

    Args:
        z: For each layer, the mean of the concatenated outputs of its heads (before W_O), or a difference of two such means.
        v: Length direction; adding it makes thinking longer, so -v stands for shorter thinking.
        lm: The model that z and v come from.
        method: Name of the score, stored with it.
    """
    unit = v.unit()
    scores = {}
    for layer in lm.layout.attention_layers:
        W_O = lm.layout.W_O(layer).detach()
        towards_short = -unit[layer].to(W_O.device, torch.float32)
        # <W_O z, -v> = <W_O^T (-v), z>: one matrix product per layer serves all its heads. The division restores norm 1 in fp32; the
        # clamp avoids 0 / 0 for a zero direction. z[layer] is as wide as the widest layer: only its first len(u) entries are real.
        u = lm.layout.to_attn_out(layer, towards_short / towards_short.norm().clamp(min=1e-12)) @ W_O.float()
        scores[layer] = lm.layout.by_head(layer, u.double().cpu() * z[layer, : len(u)]).sum(dim=-1)
    return HeadScores(lm.layout.table(scores), method, "residual-stream units", v.provenance, lm.layout.absent)


def written_direction(moments: Moments, heads: Sequence[tuple[int, int]], lm: LM) -> Direction:
    """Return the part of the length direction that the given heads write (ours, not in ThinkEdit).

    At layer l it is the vector u_l:

        u_l = sum of W_l^h (mean z_long^h - mean z_short^h) over the given heads h of layer l

    z^h is the output of head h before W_O, and W_l^h the head's part of W_O. The means are over the responses with long and with short
    thinking. u_l is zero in layers without any of the heads.

    u_l belongs to the site ``attn_out``, the output of W_O. In most models this output is added to the residual stream directly. In
    post-norm families (such as Gemma 2) a norm comes between, which divides by a root mean square and multiplies by a gain. There,
    ``moments`` hold z already divided, so the heads add u_l times the gain to the stream.

    The full length direction (``direction``) also contains what other parts of the network write, such as information on the difficulty of
    the problem. So it is not parallel to u_l. An edit that removes the full direction leaves much of what the heads write along u_l.

    Args:
        moments: Mean activations of the classes ``short`` and ``long``, including the heads' outputs ``z``, from ``collect.moments``.
        heads: Heads as pairs ``(layer, head)``.
        lm: The model that the moments were collected from.
    """
    difference = moments.mean(lm.layout.contribution_kind, LONG) - moments.mean(lm.layout.contribution_kind, SHORT)
    vector = torch.zeros(lm.layout.n_layers, lm.layout.d_model, dtype=torch.float64)
    for layer, head in heads:
        columns = lm.layout.head(layer, head)
        vector[layer] += lm.layout.W_O(layer).detach()[:, columns].cpu().double() @ difference[layer, columns]
    n_pos, n_neg = (moments.n[moments.index(label)] for label in (LONG, SHORT))
    return Direction(vector, "attn_out", moments.positions, "written_by_heads", n_pos, n_neg, moments.provenance)
