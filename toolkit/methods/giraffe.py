"""Giraffe: adventures in expanding context lengths in LLMs (Pal et al., 2023), arXiv:2308.10882.

Rotary position embeddings rotate the i-th pair of a query's or key's entries by the angle ``position * theta_i``. The method changes only
the frequencies theta_i, so that a model can read texts longer than those it was trained on. No weight changes.

Equations, with d the number of rotated entries of a head, i = 0 .. d/2 - 1, c the trained context in tokens, s the scale (the factor by
which the context grows) and k an exponent of at least 0::

    theta_i = base^(-2i / d)                                          trained frequencies, radians per token
    linear:     theta_i / s                                           the same as dividing positions by s
    power:      theta_i * (1 - i / (d/2))^k
    truncated:  theta_i                 where theta_i >= t,           t = 2 pi / c
                2 pi / (16 c)           where t/8 <= theta_i < t
                0                       where theta_i < t/8
    by parts:   theta_i * (r_i + (1 - r_i) / s)                       r_i falls from 1 to 0 between two indices (NTK by parts)

The paper also has randomised positions for training: cumulative sums of numbers from U(0, 2), rescaled to the length of the text.

In *by parts*, r_i is 1 for pairs that make more than 32 full turns within c tokens, and 0 for pairs that make less than one. Between these,
r_i is linear in i.

Frequencies are saved in the model's config, in the field ``rope_parameters``, which transformers reads. Its entry ``rope_type`` is
``"linear"`` for *linear*, and ``"yarn"`` for *by parts*. It is ``"longrope"`` for *power* and *truncated*, since a list of factors, one per
frequency, belongs to this type. So a saved model gives the same results in transformers.

Types ``"yarn"`` and ``"longrope"`` can also multiply the attention logits by a factor. Here the entry ``attention_factor`` sets it to 1.
Other tools may ignore this entry (SGLang does, according to its source). So before you use another tool, compare its log-probabilities with
those of transformers. A frequency of 0 is saved as the trained frequency times ``ZERO`` (1e-30).

Deviations: the paper finetunes after the change, except in its zero-shot experiments; here nothing is trained. The paper takes *by parts*
from a discussion that it cites; the two limits (1 and 32 turns) are those of YaRN.

Units and signs: positions and contexts in tokens, frequencies in radians per token.

Cost: none at run time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from toolkit import lm as lms
from toolkit import tensors
from toolkit.lm import LM
from toolkit.sites import UnsupportedModelError

TURNS = (1, 32)  # by parts: pairs that turn less often within the context are interpolated, those that turn more often are kept
ZERO = 1e-30  # what a frequency of 0 is saved as, relative to the trained one: it never turns within any context
NEAREST, FARTHEST = 8, 16  # truncated: frequencies below t / 8 become 0; those from there to t become t / 16


def frequencies(dim: int, base: float = 10000.0) -> Float[Tensor, " pairs"]:
    """Return the trained frequencies ``base^(-2i / dim)``, in radians per token.

    Args:
        dim: Number of rotated entries of a head.
        base: Base of the powers (``rope_theta`` in configs).

    >>> frequencies(4).tolist()
    [1.0, 0.009999999776482582]
    """
    return base ** -(torch.arange(0, dim, 2).float() / dim)


def linear(theta: Float[Tensor, " pairs"], scale: float) -> Float[Tensor, " pairs"]:
    """Return the frequencies ``theta`` divided by ``scale``. Position p then gets the angles that position ``p / scale`` had before."""
    return theta / _positive(scale, "scale")


def power(theta: Float[Tensor, " pairs"], k: float) -> Float[Tensor, " pairs"]:
    """Return the frequencies ``theta``, with entry i of n multiplied by ``(1 - i / n)^k``.

    Low frequencies (large i) shrink more than high ones. ``k`` is at least 0; ``k=0`` changes nothing.

    >>> power(torch.ones(2), 1.0).tolist()
    [1.0, 0.5]
    """
    if k < 0:
        raise ValueError(f"k={k}: the power basis needs an exponent of at least 0.")
    return theta * (1 - torch.arange(len(theta)) / len(theta)) ** k


def truncated(theta: Float[Tensor, " pairs"], context: int) -> Float[Tensor, " pairs"]:
    """Return the frequencies, with those replaced that make less than one full turn within the trained context.

    With ``t = 2 pi / context``: frequencies from t/8 to t become t/16, and those below t/8 become 0. In the example, 21 of 32 frequencies
    are unchanged, and 4 become 0.

    Args:
        theta: Trained frequencies.
        context: Trained context, in tokens.

    >>> counts = truncated(frequencies(64), 2048)
    >>> int((counts == frequencies(64)).sum()), int((counts == 0).sum())
    (21, 4)
    """
    turn = 2 * math.pi / _positive(float(context), "context")
    kept = theta.where(theta >= turn, torch.full_like(theta, turn / FARTHEST))
    return kept.where(theta >= turn / NEAREST, torch.zeros_like(theta))


def by_parts(theta: Float[Tensor, " pairs"], scale: float, context: int, base: float = 10000.0) -> Float[Tensor, " pairs"]:
    """Return the frequencies, with low ones divided by ``scale``, high ones unchanged, and a gradual transition between them.

    For the exact formula see *by parts* in the module docstring.

    Args:
        theta: Trained frequencies.
        scale: Factor by which the context grows.
        context: Trained context, in tokens.
        base: Base of the trained frequencies.
    """
    dim = 2 * len(theta)

    def index(turns: int) -> float:  # the pair that turns this often within the context
        return dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(base))

    first, last = max(math.floor(index(TURNS[1])), 0), min(math.ceil(index(TURNS[0])), dim - 1)
    kept = 1 - ((torch.arange(len(theta)) - first) / max(last - first, 1e-3)).clamp(0, 1)
    return theta * (kept + (1 - kept) / _positive(scale, "scale"))


def random_positions(length: int, *, seed: int) -> Float[Tensor, " length"]:
    """Return random increasing positions for one training text, from 0 to ``length - 1``.

    They are cumulative sums of random numbers from U(0, 2). The sums are shifted to begin at 0, and rescaled to end at ``length - 1``. Pass
    them to a model as ``position_ids``. Use another seed for every text.
    """
    steps = 2 * torch.rand(length, generator=torch.Generator().manual_seed(seed))
    positions = steps.cumsum(0) - steps[0]
    return positions * (length - 1) / positions[-1] if length > 1 else positions


def trained(lm: LM) -> tuple[Float[Tensor, " pairs"], float, int]:
    """Return the model's trained frequencies, their base, and its trained context in tokens.

    Raises:
        UnsupportedModelError: the model has no rotary position embeddings, its layers have different frequencies, or its frequencies were
            already changed.
    """
    config = lm.model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, Mapping) or "rope_theta" not in rope:
        kind = "different ones for different layers" if isinstance(rope, Mapping) and rope else "none"
        raise UnsupportedModelError(
            f"{lm.name} cannot get other rotary frequencies: expected one set for all layers, found {kind}."
        )
    if rope.get("rope_type", "default") != "default":
        raise UnsupportedModelError(
            f"{lm.name} has rotary frequencies of type {rope['rope_type']!r}, which were changed already: give the model as it was trained."
        )
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dim = int(size * rope.get("partial_rotary_factor", 1.0))
    return frequencies(dim, rope["rope_theta"]), float(rope["rope_theta"]), int(config.max_position_embeddings)


def with_frequencies(lm: LM, theta: Float[Tensor, " pairs"], *, context: int | None = None) -> LM:
    """Return a copy of a model with other rotary frequencies. All weights are shared with ``lm``.

    Args:
        lm: The model, as it was trained.
        theta: New frequencies in radians per token, such as from ``power`` or ``truncated``.
        context: Largest number of tokens of a text for the new model (``max_position_embeddings``). ``None`` keeps that of ``lm``.

    Raises:
        UnsupportedModelError: as in ``trained``.
        ValueError: the number of frequencies differs from the model's, or a frequency is negative or not finite.
    """
    before, base, window = trained(lm)
    if theta.shape != before.shape or not bool(torch.isfinite(theta).all()) or bool((theta < 0).any()):
        raise ValueError(f"{len(theta)} frequencies {theta.tolist()[:4]}...: expected {len(before)}, none of them negative.")
    factors = (before / theta.where(theta > 0, before * ZERO)).tolist()
    fields = {
        "rope_type": "longrope",
        "short_factor": factors,
        "long_factor": factors,
        "attention_factor": 1.0,
        "factor": max(1.0, (context or lm.context or window) / window),  # no effect beside the last
        "original_max_position_embeddings": window,
    }
    return _changed(lm, fields, base, context, f"{lm.name} with other rotary frequencies")


def with_linear(lm: LM, scale: float, *, context: int | None = None) -> LM:
    """Return a copy of a model whose frequencies are divided by ``scale`` (see ``linear``).

    Args:
        lm: The model, as it was trained.
        scale: Factor by which the context grows; above 0.
        context: As in ``with_frequencies``.

    Raises:
        UnsupportedModelError: as in ``trained``.
        ValueError: ``scale`` is not a positive number.
    """
    _, base, _ = trained(lm)
    fields = {"rope_type": "linear", "factor": _positive(scale, "scale")}
    return _changed(lm, fields, base, context, f"{lm.name}, positions divided by {scale:g}")


def with_parts(lm: LM, scale: float, *, context: int | None = None) -> LM:
    """Return a copy of a model with the frequencies of ``by_parts`` for this ``scale``.

    Args:
        lm: The model, as it was trained.
        scale: Factor by which the context grows; above 0.
        context: As in ``with_frequencies``.

    Raises:
        UnsupportedModelError: as in ``trained``.
        ValueError: ``scale`` is not a positive number.
    """
    _, base, window = trained(lm)
    fields = {
        "rope_type": "yarn",
        "factor": _positive(scale, "scale"),
        "attention_factor": 1.0,
        "beta_fast": TURNS[1],
        "beta_slow": TURNS[0],
        "original_max_position_embeddings": window,
    }
    return _changed(lm, fields, base, context, f"{lm.name}, low frequencies divided by {scale:g}")


def _changed(lm: LM, fields: Mapping[str, Any], base: float, context: int | None, name: str) -> LM:
    """Return a copy of a model with other ``rope_parameters`` in its config. The rotary modules are new; all weights are shared.

    Args:
        lm: The model.
        fields: New entries of ``rope_parameters``.
        base: Base of the trained frequencies (entry ``rope_theta``).
        context: As in ``with_frequencies``.
        name: Name of the copy.
    """
    model = tensors.copied(lm.model)
    config = model.config.get_text_config()
    old = dict(config.rope_parameters)
    config.rope_parameters = {**{k: v for k, v in old.items() if k != "rope_type"}, "rope_theta": base, **fields}
    if context is not None:
        config.max_position_embeddings = context
    for path in tensors.rotary(model):
        parent, _, attribute = path.rpartition(".")
        module = model.get_submodule(path)
        setattr(model.get_submodule(parent), attribute, type(module)(config=config).to(lm.device))
    return lms.child(lm, model, name)


def _positive(value: float, name: str) -> float:
    if not value > 0 or not math.isfinite(value):
        raise ValueError(f"{name}={value}: expected a positive number.")
    return value
