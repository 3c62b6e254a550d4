"""The Curious Case of Factual (Mis)Alignment between LLMs' Short- and Long-Form Answers (SLAQ), arXiv:2510.11218.

A fact is asked about in a short question, and in a long question that joins m short ones (``tasks.slaq``). It is *aligned* if both answers
are right or both are wrong. The paper finds which components of the model contribute to each answer, measures how similar these components
are between the two forms, and predicts alignment from the similarities. Effects of the position in a long answer are in
``methods/slaq_positions.py``.

Equations. L is the mean log-odds ``log(p / (1 - p))`` of the tokens of the right answer, in nats per token. c(t) is the output of component c at position
t of the sequence, and g_c(t) the gradient of L with respect to it. A component is an attention head (its part of ``z``), an MLP (its
output) or a neuron (an input of the MLP's last projection)::

    attribution(c) = sum_t <c(t), g_c(t)>            first-order estimate of the drop of L if c is set to 0 at all positions
    ablation(c)    = L - L[c = 0]                    the exact drop, one run per component
    minimal set    = the fewest components whose positive attributions sum to a share of all positive attributions

The six similarities of two attributions a and b (a+ = max(a, 0); S: minimal set; T: the components with the largest absolute attribution,
``assumed_top`` of all)::

    jaccard     |S_a & S_b| / |S_a or S_b|         overlap   |S_a & S_b| / min(|S_a|, |S_b|)
    weighted    sum min(a+, b+) / sum max(a+, b+)  top       |T_a & T_b| / |T|
    cosine      <a, b> / (|a| |b|)                 spearman  rank correlation

Log-odds are used because the gradient of a log-probability vanishes where the model is certain.

Deviations: the paper's way to attribute, its size of minimal sets and its six similarities were not found; those here are ours
(``assumed_...``). Both forms are attributed on the right answer, not on the model's own. The predictor is a logistic regression,
cross-validated by pair, beside predictors fitted to shuffled labels.

Units and signs: attributions are in nats per answer token; positive means that the component raises the odds of the right answer.
Similarities are at most 1.

Cost: ``attribute`` needs one forward pass per sequence and one backward pass per answer in it. ``ablation`` needs one forward pass per
component. The gradient is exact only for small changes; setting a whole MLP to 0 is not one. So compare with ``ablation`` on your model.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy import ndarray
from torch import Tensor, nn

from toolkit import hooks, probes, stats, tensors
from toolkit.directions import logistic_model
from toolkit.lm import LM
from toolkit.probes import Protocol
from toolkit.sites import Site, UnsupportedModelError
from toolkit.stats import Estimate
from toolkit.types import Span

assumed_share = 0.5  # share of all positive attribution that a minimal set covers: ours
assumed_top = 0.1  # share of all components that the similarity ``top`` compares: ours
SIMILARITIES = ("jaccard", "overlap", "weighted", "top", "cosine", "spearman")


@dataclass(frozen=True)
class Attribution:
    """Contribution of every component to the log-odds of one answer, in nats per answer token, on the CPU.

    Attributes:
        heads: Attention heads, ``[layers, heads]``; NaN for heads that do not exist.
        mlps: MLPs, ``[layers]``.
        neurons: Neurons, ``[layers, width of the MLP]``; ``None`` from ``ablation``.
        log_odds: Log-odds of the answer, mean over its tokens.
    """

    heads: Float[Tensor, "layers heads"]
    mlps: Float[Tensor, " layers"]
    neurons: Float[Tensor, "layers width"] | None
    log_odds: float

    @property
    def components(self) -> Float[ndarray, " components"]:
        """Attributions of heads and MLPs in one vector: all existing heads, layer by layer, then all MLPs. Neurons are not included."""
        return torch.cat([self.heads[~self.heads.isnan()], self.mlps]).double().numpy()


# --- components ----------------------------------------------------------------------------------------------


def attribute(lm: LM, ids: Sequence[int], answers: Sequence[Span]) -> list[Attribution]:
    """Return the attribution of every head, MLP and neuron to each of several answers in one sequence, by gradient times activation.

    Args:
        lm: The model.
        ids: Token ids of prompt and response.
        answers: Token span of each answer. All positions before an answer count, also earlier answers.

    Raises:
        ValueError: an answer is empty, or not inside the sequence after its first token.
        UnsupportedModelError: the MLP has no projection to the residual stream among its children, as in mixtures of experts.
    """
    _check(ids, answers)
    layout, layers = lm.layout, range(lm.layout.n_layers)
    downs = {layer: _down_projection(lm, layer) for layer in layers}
    kept: dict[Site | int, tuple[Tensor, Tensor]] = {}  # site, or layer for its neurons -> value and the zeros added to it

    def probe(key: Site | int) -> hooks.Rewrite:
        def fn(value: Tensor, inputs: Tensor) -> Tensor:
            # The gradient of the added zeros is that of the value. It exists even if no weight of the model requires a gradient.
            added = torch.zeros_like(value, requires_grad=True)
            kept[key] = (value.detach(), added)
            return value + added

        return fn

    sites = [*(Site("z", layer) for layer in layout.attention_layers), *(Site("mlp_out", layer) for layer in layers)]
    with torch.enable_grad(), ExitStack() as stack:
        stack.enter_context(hooks.rewrite(layout, {site: probe(site) for site in sites}))
        stack.enter_context(hooks.rewrite_inputs({downs[layer]: probe(layer) for layer in layers}))
        targets = _log_odds(lm, torch.tensor([list(ids)], device=lm.device), answers)[0]
        keys = list(kept)
        gradients = [torch.autograd.grad(t, [kept[key][1] for key in keys], retain_graph=True) for t in targets]
    made = []
    for target, gradient in zip(targets, gradients, strict=True):
        # Position and entry: their product summed over positions, one number per entry of the site.
        by_entry = {key: (kept[key][0].float() * g.float())[0].sum(dim=0) for key, g in zip(keys, gradient, strict=True)}
        heads = layout.table(
            {layer: layout.by_head(layer, by_entry[Site("z", layer)]).sum(dim=-1) for layer in layout.attention_layers}
        )
        mlps = torch.stack([by_entry[Site("mlp_out", layer)].sum() for layer in layers]).cpu()
        neurons = nn.utils.rnn.pad_sequence([by_entry[layer].cpu() for layer in layers], batch_first=True)
        made.append(Attribution(heads, mlps, neurons, float(target.detach())))
    return made


@torch.inference_mode()
def ablation(lm: LM, ids: Sequence[int], answer: Span) -> Attribution:
    """Return the exact drop of an answer's log-odds when each head or MLP is set to 0 at all positions.

    Arguments and errors are those of ``attribute``, for one answer. The result has no neurons.
    """
    _check(ids, [answer])
    layout, row = lm.layout, torch.tensor([list(ids)], device=lm.device)
    whole = float(_log_odds(lm, row, [answer])[0, 0])
    heads, mlps = {}, torch.zeros(layout.n_layers)
    for layer in range(layout.n_layers):
        count = layout.heads[layer]

        def without_heads(z: Tensor, inputs: Tensor, layer: int = layer, count: int = count) -> Tensor:
            cut = z.clone()
            for head in range(count):  # row ``head`` of the batch loses this head
                cut[head, :, layout.head(layer, head)] = 0
            return cut

        def without_mlp(value: Tensor, inputs: Tensor) -> Tensor:
            return torch.cat([value[:-1], torch.zeros_like(value[-1:])])  # the last row loses the MLP

        rewrites: dict[Site, hooks.Rewrite] = {Site("mlp_out", layer): without_mlp}
        if count:
            rewrites[Site("z", layer)] = without_heads
        with hooks.rewrite(layout, rewrites):
            drops = whole - _log_odds(lm, row.expand(count + 1, -1), [answer])[:, 0]
        heads[layer], mlps[layer] = drops[:-1], drops[-1]
    return Attribution(layout.table({layer: drop for layer, drop in heads.items() if len(drop)}), mlps, None, whole)


def _log_odds(lm: LM, ids: Tensor, answers: Sequence[Span]) -> Float[Tensor, "batch answers"]:
    """Return the log-odds of each answer, mean over its tokens, for each row of token ids."""
    logits, means = lm.model(ids, use_cache=False).logits, []
    for span in answers:
        before, tokens = logits[:, span.start - 1 : span.stop - 1].float(), ids[:, span.start : span.stop, None]
        # log(p / (1 - p)) = logit of the token - log sum exp of all other logits
        others = before.scatter(2, tokens, -torch.inf).logsumexp(dim=-1)
        means.append((before.gather(2, tokens)[..., 0] - others).mean(dim=1))
    return torch.stack(means, dim=1)


def _check(ids: Sequence[int], answers: Sequence[Span]) -> None:
    for span in answers:
        if not len(span) or span.start < 1 or span.stop > len(ids):
            raise ValueError(
                f"The answer is at [{span.start}, {span.stop}) of {len(ids)} tokens: need at least one token, after the first."
            )


def _down_projection(lm: LM, layer: int) -> nn.Module:
    """Return the last projection of a layer's MLP, whose inputs are the neurons."""
    children = [m for m in lm.layout.blocks[layer].mlp.children() if tensors.is_linear(m)]
    readers = [m for m in children if tensors.sizes(m)[1] == lm.layout.d_model]
    if not readers:
        raise UnsupportedModelError(
            f"{lm.name}: the MLP of layer {layer} has no linear layer to the residual stream among its children, so its neurons cannot be "
            "attributed. Mixtures of experts are not supported."
        )
    return readers[-1]


# --- similarity ----------------------------------------------------------------------------------------------


def minimal_set(attribution: Float[ndarray, " components"], share: float = assumed_share) -> Bool[ndarray, " components"]:
    """Return a mask of the fewest components whose positive attributions sum to at least ``share`` of all positive attributions.

    It is empty if no attribution is positive.

    >>> minimal_set(np.array([5.0, 3.0, -9.0, 2.0]), 0.6).tolist()
    [True, True, False, False]
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share}: give a number above 0, at most 1.")
    positive = np.maximum(attribution, 0.0)
    order = np.argsort(-positive, kind="stable")
    before = np.concatenate([[0.0], positive[order].cumsum()[:-1]])  # sum of all larger ones
    mask = np.zeros(len(attribution), bool)
    mask[order] = (before < share * positive.sum() * (1 - 1e-12)) & (positive[order] > 0)
    return mask


def similarity(a: Float[ndarray, " components"], b: Float[ndarray, " _"]) -> dict[str, float]:
    """Return the six similarities of two attributions (``SIMILARITIES``; the module docstring defines them). Undefined ones are 0.

    Raises:
        ValueError: the attributions have different lengths, or fewer than two components.
    """
    if a.shape != b.shape or len(a) < 2:
        raise ValueError(f"Attributions of {a.shape} and {b.shape} components: need the same components, at least two.")
    s, t = minimal_set(a), minimal_set(b)
    count = max(1, round(assumed_top * len(a)))
    tops = [set(np.argsort(-abs(x), kind="stable")[:count].tolist()) for x in (a, b)]
    p, q = np.maximum(a, 0.0), np.maximum(b, 0.0)
    ranks = stats.spearman(a, b)
    values = {
        "jaccard": _ratio(float((s & t).sum()), float((s | t).sum())),
        "overlap": _ratio(float((s & t).sum()), float(min(s.sum(), t.sum()))),
        "weighted": _ratio(float(np.minimum(p, q).sum()), float(np.maximum(p, q).sum())),
        "top": len(tops[0] & tops[1]) / count,
        "cosine": _ratio(float(a @ b), float(np.linalg.norm(a) * np.linalg.norm(b))),
        "spearman": 0.0 if np.isnan(ranks) else ranks,
    }
    return {name: float(values[name]) for name in SIMILARITIES}


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def similarities(short: Attribution, long: Attribution) -> dict[str, float]:
    """Return the six similarities of the heads and MLPs of two attributions, and then those of their neurons: twelve numbers.

    The keys are the names in ``SIMILARITIES`` after ``"components "`` and ``"neurons "``.

    Raises:
        ValueError: an attribution has no neurons (``ablation``), or they are of different models.
    """
    if short.neurons is None or long.neurons is None:
        raise ValueError("An attribution has no neurons: make both with attribute, not with ablation.")
    parts = {
        "components": (short.components, long.components),
        "neurons": tuple(x.neurons.flatten().double().numpy() for x in (short, long) if x.neurons is not None),
    }
    return {f"{part} {name}": value for part, (a, b) in parts.items() for name, value in similarity(a, b).items()}


# --- prediction ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """How well features predict whether facts are aligned, on pairs that the predictor was not fitted to. A share is from 0 to 1.

    Attributes:
        auc: Area under the ROC curve, with a 95 % interval over pairs. Chance is 0.5.
        accuracy: Balanced accuracy, with a 95 % interval over pairs. Chance is 0.5.
        shuffled: AUC of predictors that were fitted to shuffled labels and scored on them, mean over the shuffles.
        above: ``auc`` minus ``shuffled``, with a 95 % interval over pairs.
        p: Share of the shuffles whose AUC is at least as high as ``auc`` (``stats.permutation_p``).
        aligned: Share of the facts that are aligned.
    """

    auc: Estimate
    accuracy: Estimate
    shuffled: float
    above: Estimate
    p: float
    aligned: float


def predict_alignment(
    features: Float[ndarray, "pairs facts features"],
    aligned: Bool[ndarray, "_ _"],
    *,
    shuffles: int = 20,
    protocol: Protocol = Protocol(),
) -> Prediction:
    """Fit a logistic regression from features to alignment, cross-validated by pair, and compare it with shuffled labels.

    Args:
        features: Such as the ``similarities`` of each fact's two attributions.
        aligned: Whether both answers about the fact are right, or both are wrong, ``[pairs, facts]``.
        shuffles: Number of controls. Each exchanges the labels between pairs, and within them.
        protocol: Folds, penalty, and seed.

    Raises:
        ValueError: features and labels have different numbers of pairs or facts.
        probes.TooFewProblemsError: too few pairs, or all facts of a class are in a single fold.
    """
    if features.ndim != 3 or features.shape[:2] != aligned.shape:
        raise ValueError(
            f"Features {features.shape}, labels {aligned.shape}: expected [pairs, facts, features] and [pairs, facts]."
        )
    pairs, facts = aligned.shape
    if pairs < protocol.folds:
        raise probes.TooFewProblemsError(f"{pairs} pairs, {protocol.folds} folds: measure more pairs, or use fewer folds.")
    x, group, rng = features.reshape(pairs * facts, -1), np.repeat(np.arange(pairs), facts), np.random.default_rng(protocol.seed)

    def margins(labels: ndarray) -> ndarray:
        return probes.out_of_fold(x, labels.ravel(), group, logistic_model, protocol).reshape(pairs, facts)

    def scored(metric: probes.Metric) -> stats.Statistic:
        return lambda index: np.array([metric(aligned[row].ravel(), predicted[row].ravel()) for row in index])

    predicted = margins(aligned)
    control = []
    for _ in range(shuffles):
        labels = rng.permuted(aligned[rng.permutation(pairs)], axis=1)
        control.append(stats.auc(labels.ravel(), margins(labels).ravel()))
    shuffled = float(np.mean(control))
    # A resample in which all facts are aligned, or none, has no AUC: it is left out.
    auc, accuracy = (
        stats.bootstrap(scored(metric), pairs, seed=protocol.seed, times=protocol.times)
        for metric in (stats.auc, lambda truth, margin: stats.balanced_accuracy(truth, margin > 0))
    )
    above = Estimate(auc.mean - shuffled, auc.low - shuffled, auc.high - shuffled)
    return Prediction(auc, accuracy, shuffled, above, stats.permutation_p(np.array(control) >= auc.mean), float(aligned.mean()))
