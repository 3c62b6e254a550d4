"""Collect activations in one teacher-forced pass over rollouts: sums per class (``moments``) or single examples (``states``).

An example is one rollout; its class is a label such as "long" or "short".

- ``moments`` stores only sums per class, so its memory does not grow with the number of examples. This is enough for directions. It is
  also enough for the mean of a head's contribution to the residual stream. This contribution is a linear function of an activation, so
  its mean is the same function of the mean activation.
- ``states`` stores one row per example or per position. Probes, principal components and resampling need this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from toolkit import origins
from toolkit.decode import check_growth, prefill
from toolkit.lm import LM, Intervention
from toolkit.passes import Example, Picker, batch_tokens, each_batch, examples_of, forward, pad_right
from toolkit.positions import THINK, By, Positions, sample_positions, sentence_ends, step_starts
from toolkit.sites import UnsupportedModelError
from toolkit.types import LONG, SHORT, Direction, Moments, Provenance, Rollout

__all__ = [
    "ATTN", "LOGITS", "MLP", "THINK", "By", "Positions", "States", "batch_tokens", "logits",
    "logprobs_and_entropies", "moments", "moments_and_entropies", "pad_right", "sample_positions", "sentence_ends", "states", "step_starts",
    "typical_norm",
]  # fmt: skip

ATTN, MLP = "resid_mid", "resid_post"  # ThinkEdit calls these two site kinds "attn" and "mlp"
ON_DEVICE = 2**32  # sums of outer products that take more bytes than this are held on the CPU, not on the model's device
LOGITS = 2**23  # largest number of logits (tokens x vocabulary) in memory at a time: 32 MB in fp32


@dataclass(frozen=True)
class States:
    """Activations of single rollouts, or of single positions of them, at one kind of site in every layer.

    Attributes:
        values: ``[rows, layers, width]``, fp32, on the CPU. If the width of ``z`` differs between layers, narrower layers are padded with
            0.
        rows: Table with one row per row of ``values``, and these columns:

            - ``problem_id``, ``sample``: problem id and sample index of the rollout.
            - ``label``: class of the rollout.
            - ``think_tokens``: length of its think span.
            - ``position`` (only if each row is a single position): number of think tokens up to and including this position. So it is 0 at
              the position that predicts the first think token, and ``think_tokens`` from the last think token on. Without a think span,
              response tokens are counted.
            - ``remaining`` (only if each row is a single position): number of think tokens after this position, so 0 in the answer; NaN if
              thinking was never closed, or there is no think span.
        kind: Kind of site, such as ``"resid_post"``.
        positions: Name of the positions that were collected, such as ``"think"``.
        provenance: Model and settings that the activations are from.
    """

    values: Float[Tensor, "rows layers width"]
    rows: pd.DataFrame
    kind: str
    positions: str
    provenance: Provenance

    def take(self, index: Sequence[int] | np.ndarray) -> States:
        """Return a new ``States`` with only some of the rows.

        Args:
            index: A boolean mask over the rows, or row indices in the desired order.
        """
        index = np.asarray(index)
        index = np.flatnonzero(index) if index.dtype == bool else index.astype(int)
        return replace(self, values=self.values[torch.from_numpy(index)], rows=self.rows.iloc[index].reset_index(drop=True))

    def of(self, label: str) -> np.ndarray:
        """Return the indices of the rows of class ``label``. Raise KeyError if there is no such row."""
        index = np.flatnonzero(self.rows["label"] == label)
        if not len(index):
            raise KeyError(f"No class {label!r} in these states: choose one of {', '.join(sorted(self.rows['label'].unique()))}.")
        return index

    def shuffled(self, labels: Sequence[str], *, seed: int) -> States:
        """Return a new ``States`` in which the rows of some classes exchange their labels at random: a control for what separates them.

        A difference of class means after this is random, but it lies where the activations vary. A random vector of the whole space does not:
        removing its component changes almost nothing.

        Args:
            labels: The classes whose rows exchange labels. Other rows keep theirs.
            seed: Random seed.
        """
        label = self.rows["label"].to_numpy(copy=True)
        among = np.flatnonzero(self.rows["label"].isin(labels))
        label[among] = np.random.default_rng(seed).permutation(label[among])
        return replace(self, rows=self.rows.assign(label=label))


def moments(
    lm: LM,
    rollouts: Sequence[Rollout],
    by: By,
    *,
    kinds: Sequence[str] = (ATTN, MLP, "z"),
    positions: Positions = THINK,
    second: Sequence[str] = (),
) -> Moments:
    """Return sums of activations per class of rollouts, from which class means are computed (see ``Moments``).

    Each rollout has weight 1: its activations are first averaged over its positions.

    Args:
        by: Function from a rollout to its class, such as "long". It returns ``None`` to leave the rollout out.
        kinds: Site kinds to collect, at every layer. Default: ``"resid_mid"``, ``"resid_post"`` and ``"z"``. If a model has a norm between
            ``W_O`` and the residual stream, ``types.Z_OVER_NORM`` is collected whenever ``"z"`` is. Head scores of such a model need it.
        positions: Positions of a rollout to average over (see the module ``positions``). Default: those that predict the think tokens. A
            rollout without such a position is left out.
        second: Those of ``kinds`` for which outer products of activations are summed too (``Moments.outer``). Covariances need these sums,
            which take ``layers * width^2`` fp64 numbers per class and kind.

    Raises:
        ValueError: a kind in ``second`` is not in ``kinds``.
        NoThinkTagsError: no rollout has both a class and a position.
    """
    return _moments(lm, rollouts, examples_of(lm, rollouts, by, positions), kinds, second, positions)


def moments_and_entropies(
    lm: LM,
    rollouts: Sequence[Rollout],
    by: By,
    *,
    kinds: Sequence[str] = (ATTN, MLP, "z"),
    positions: Positions = THINK,
    temperature: float = 1.0,
) -> tuple[Moments, list[Rollout]]:
    """Return two things from one pass: sums of activations per class, and all rollouts with log-probabilities and entropies (nats).

    The sums are those of the function ``moments``, without outer products. Log-probabilities and entropies are those of the softmax over
    the whole vocabulary, and equal those of ``entropies.with_entropies``. Rollouts that have no class or no chosen position are returned
    unchanged. To save memory, logits are computed for response tokens only, and in parts.

    Args:
        by: Function from a rollout to its class, such as "long". It returns ``None`` to leave the rollout out of the moments.
        kinds: Site kinds to collect, at every layer. Default: ``"resid_mid"``, ``"resid_post"`` and ``"z"``; see ``moments``.
        positions: Positions of a rollout to average activations over. Default: those that predict the think tokens.
        temperature: Temperature of the softmax.

    Raises:
        NoThinkTagsError: no rollout has both a class and a position.
        ValueError: the temperature is not positive.
        UnsupportedModelError: the model does not compute its logits from its last hidden states by the LM head and soft-capping alone.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: entropies need a temperature above 0.")
    examples, measured, head = examples_of(lm, rollouts, by, positions), list(rollouts), lm_head(lm)
    # Indices of each rollout object, by identity: two rollouts may be equal, and one may be in the list twice.
    places: dict[int, list[int]] = {}
    for i, r in enumerate(rollouts):
        places.setdefault(id(r), []).append(i)

    def read(batch: Sequence[Example], hidden: Float[Tensor, "batch seq d_model"]) -> None:
        chosen = [e.rollout for e in batch]
        # Last hidden states that predict response tokens, of all rollouts of the batch, one after the other: [tokens, d_model].
        at = [(row, t) for row, r in enumerate(chosen) for t in range(r.prompt_len - 1, len(r.token_ids) - 1)]
        rows, where = torch.tensor(at, dtype=torch.long).view(-1, 2).T.to(hidden.device)
        tokens = torch.tensor([t for r in chosen for t in r.token_ids[r.prompt_len :]], device=hidden.device)
        states, size = hidden[rows, where], max(1, LOGITS // lm.vocab_size)
        parts = [
            logprobs_and_entropies(head(s), t, temperature) for s, t in zip(states.split(size), tokens.split(size), strict=True)
        ]
        logprobs, entropies = torch.cat(parts, dim=1).cpu().tolist() if parts else ([], [])
        # Split the results by rollout again.
        ends = [0, *accumulate(r.response_tokens for r in chosen)]
        for r, start, stop in zip(chosen, ends, ends[1:], strict=False):
            with_scores = replace(r, logprobs=tuple(logprobs[start:stop]), entropies=tuple(entropies[start:stop]))
            for i in places[id(r)]:
                measured[i] = with_scores

    return _moments(lm, rollouts, examples, kinds, (), positions, read), measured


def logprobs_and_entropies(
    logits: Float[Tensor, "... vocab"], tokens: Int[Tensor, ...], temperature: float
) -> Float[Tensor, "2 ..."]:
    """Return log-probabilities and entropies of tokens as one tensor.

    Each token is predicted by the softmax of its logits, divided by the temperature. Index 0 of the first axis holds the natural
    log-probability of each token under this softmax. Index 1 holds the entropy of this softmax, in nats.

    Args:
        logits: The logits that predict each token.
        tokens: Token ids.
        temperature: Temperature of the softmax.

    >>> logits, tokens = torch.tensor([[0.0, 0.0]]), torch.tensor([1])
    >>> logprobs_and_entropies(logits, tokens, 1.0).tolist()  # two equally likely tokens: -ln 2 and ln 2
    [[-0.6931471824645996], [0.6931471824645996]]
    """
    logp = torch.log_softmax(logits.float() / temperature, dim=-1)
    chosen = logp.gather(-1, tokens[..., None]).squeeze(-1)
    return torch.stack([chosen, torch.special.entr(logp.exp()).sum(dim=-1)])


@torch.inference_mode()
def lm_head(lm: LM) -> Callable[[Tensor], Tensor]:
    """Return a function that computes logits from last hidden states: the LM head, then soft-capping if the config has it.

    Raises:
        UnsupportedModelError: on a test input, its logits differ from the model's, so the model computes something else as well.
    """
    output, cap = lm.model.get_output_embeddings(), getattr(lm.model.config.get_text_config(), "final_logit_softcapping", None)

    def head(hidden: Tensor) -> Tensor:
        logits = output(hidden).to(hidden.device)  # the LM head may be on another device
        return torch.tanh(logits / cap) * cap if cap else logits

    ids = torch.arange(min(8, lm.vocab_size), device=lm.device)[None]
    expected, actual = lm.model(input_ids=ids).logits.float(), head(lm.body(input_ids=ids).last_hidden_state)
    if not torch.allclose(actual.to(expected), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
        raise UnsupportedModelError(
            f"{lm.name} does more than apply its LM head between its last state and its logits: so the toolkit cannot compute its logits from states. For entropies use entropies.with_entropies."
        )
    return head


Read = Callable[[Sequence[Example], Tensor], None]
"""Function ``read(batch, hidden)`` that is called after the pass over each batch. ``hidden`` is the model's last hidden states, from which
it computes its logits: ``[batch, seq, d_model]``."""


def _moments(
    lm: LM,
    rollouts: Sequence[Rollout],
    examples: Sequence[Example],
    kinds: Sequence[str],
    second: Sequence[str],
    positions: Positions,
    read: Read | None = None,
) -> Moments:
    labels = tuple(sorted({e.label for e in examples}))
    width, layers = lm.layout.width, lm.layout.n_layers
    kinds = (*kinds, lm.layout.contribution_kind) if "z" in kinds else kinds
    if missing := [kind for kind in second if kind not in kinds]:  # before the pass, which takes long
        raise ValueError(
            f"second={tuple(second)}: outer products of {missing[0]!r} need its sums too, but kinds is {tuple(kinds)}. Add it to kinds."
        )
    # fp64 sums: the difference of two class means is small compared with the means.
    sums = {k: torch.zeros(len(labels), layers, width(k), dtype=torch.float64) for k in kinds}
    # Outer products are added up on the device: copying them to the CPU after every batch would take longer than the pass. If they take
    # too much memory there, or the device has no fp64 (mps), they are added up on the CPU. size: their bytes, 8 per fp64 number.
    size = 8 * len(labels) * layers * sum(width(k) ** 2 for k in second)
    place = "cpu" if lm.device.type == "mps" or size > ON_DEVICE else lm.device
    outer = {k: torch.zeros(len(labels), layers, width(k), width(k), dtype=torch.float64, device=place) for k in second}

    def run(batch: Sequence[Example]) -> None:
        # classes: [labels, batch], 1 where an example is of a class, so that ``classes @ means`` sums the examples of each class.
        classes = torch.tensor([[float(e.label == name) for e in batch] for name in labels], device=lm.device)
        pick = Picker(batch, lm)
        first, squares = (
            {kind: torch.zeros(total.shape, device=lm.device) for kind, total in totals.items()} for totals in (sums, outer)
        )

        # Called once per site while the pass runs, layer by layer. Only sums are stored. A layer with fewer or smaller heads has a narrower
        # ``z``, so only its first ``size`` columns are written.
        def take(kind: str, layer: int, value: Tensor) -> None:
            size = value.shape[-1]
            if kind in sums:
                first[kind][:, layer, :size] = classes.to(value.device) @ pick.means(value)
            if kind in outer:
                states, weights = pick.rows(value), pick.weights_of(classes.to(value.device))
                squares[kind][:, layer, :size, :size] = torch.stack([(w[:, None] * states).T @ states for w in weights])

        hidden = forward(lm, pick.ids, (*kinds, *second), take)
        if read is not None:
            read(batch, hidden)
        # A batch that runs out of memory is run again in halves. So add to the totals only at the end, when no memory is needed any more.
        ready = [
            (total[kind], values.to(total[kind].device))
            for total, batch_sums in ((sums, first), (outer, squares))
            for kind, values in batch_sums.items()
        ]
        for total_of_kind, values in ready:
            total_of_kind.add_(values)  # fp32 into fp64, in place: no fp64 copy of ``values`` is made

    each_batch(lm, examples, "moments", run)
    n = tuple(sum(e.label == name for e in examples) for name in labels)
    # The record lists the problems of all rollouts, also of those without a class: all of them set the thresholds between the classes.
    about = lm.provenance(**origins.record(r.problem_id for r in rollouts))
    return Moments(labels, n, positions.name, sums, {kind: values.cpu() for kind, values in outer.items()}, about)


def states(
    lm: LM,
    rollouts: Sequence[Rollout],
    kind: str,
    *,
    by: By = lambda r: "all",
    positions: Positions = THINK,
    each: bool = False,
) -> States:
    """Return activations at one kind of site in every layer: one row per rollout (a mean over positions), or one row per position.

    Rows are in the order of the rollouts. The result takes ``4 * rows * layers * width`` bytes of CPU memory (1600 rollouts of a 28-layer
    model of width 1536: 275 MB). On top of that, only the activations of one batch are in memory at any time.

    Args:
        kind: Kind of site, such as ``"resid_post"``.
        by: Function from a rollout to its class, such as "long". It returns ``None`` to leave the rollout out. By default all rollouts are
            of class "all".
        positions: Positions of a rollout to read. Default: those that predict the think tokens. A rollout without such a position is left
            out. To limit the number of positions per rollout, use ``positions.sample_positions``.
        each: True for one row per position. False for one row per rollout: the mean over its positions.

    Raises:
        NoThinkTagsError: no rollout has both a class and a position.
    """
    examples = examples_of(lm, rollouts, by, positions)
    ends = [0, *accumulate(len(e.where) if each else 1 for e in examples)]  # rows of example i: ends[i] to ends[i + 1]
    values = torch.empty(ends[-1], lm.layout.n_layers, lm.layout.width(kind))

    def run(batch: Sequence[Example]) -> None:
        pick = Picker(batch, lm)
        at = torch.cat([torch.arange(ends[e.at], ends[e.at + 1]) for e in batch])
        layers = torch.zeros(len(at), *values.shape[1:], device=lm.device)

        def take(kind: str, layer: int, value: Tensor) -> None:
            layers[:, layer, : value.shape[-1]] = pick.rows(value) if each else pick.means(value)

        forward(lm, pick.ids, (kind,), take)
        values[at] = layers.cpu()

    each_batch(lm, examples, "states", run)
    rows = pd.DataFrame([row for e in examples for row in _rows(e, each)])
    about = lm.provenance(**origins.record(r.problem_id for r in rollouts))
    return States(values, rows, kind, positions.name, about)


def _rows(e: Example, each: bool) -> list[dict]:
    r = e.rollout
    facts = {"problem_id": r.problem_id, "sample": r.sample, "label": e.label, "think_tokens": r.think_tokens}
    if not each:
        return [facts]
    start = r.think.start if r.think else r.prompt_len  # without a think span, positions are counted from the start of the response
    # Tokens of tool results are not thinking, so they count neither before nor after a position.
    written = [t + 1 - start - sum(max(0, min(s.stop, t + 1) - max(s.start, start)) for s in r.results) for t in e.where]
    known = r.closed and r.think is not None
    read = [max(0, min(n, r.think_tokens) if r.think is not None else n) for n in written]
    return [facts | {"position": n, "remaining": float(r.think_tokens - n) if known else float("nan")} for n in read]


def typical_norm(lm: LM, rollouts: Sequence[Rollout], kind: str, *, positions: Positions = THINK) -> Float[Tensor, " layers"]:
    """Return the typical norm of the activations h per layer: the root mean square of ``|h|`` over positions, fp64.

    Each rollout has weight 1, divided equally among its positions. Steering doses are measured in typical norms: the relative dose of an
    added vector is its norm divided by the typical norm. ``directions.typical_norm`` computes the typical norm without a forward pass,
    from the result of ``moments(..., second=(kind,))``.

    Args:
        kind: Kind of site, such as ``"resid_post"``.
        positions: Positions of a rollout to read. Default: those that predict the think tokens. A rollout without such a position is left
            out.

    Raises:
        NoThinkTagsError: no rollout has a position.
    """
    examples = examples_of(lm, rollouts, lambda r: "all", positions)
    total = torch.zeros(lm.layout.n_layers, dtype=torch.float64)

    def run(batch: Sequence[Example]) -> None:
        pick, squares = Picker(batch, lm), torch.zeros(lm.layout.n_layers, device=lm.device)

        def take(kind: str, layer: int, value: Tensor) -> None:
            squares[layer] = pick.means(value.float().square().sum(-1, keepdim=True)).sum()

        forward(lm, pick.ids, (kind,), take)
        total.add_(squares.cpu())

    each_batch(lm, examples, "norms", run)
    return (total / len(examples)).sqrt()


@dataclass(frozen=True)
class Spread:
    """Result of ``spread``: the size of the activations h at one kind of site, and how well a direction separates two classes of rollouts.

    Both are given per layer, in fp64.

    Attributes:
        typical: Root mean square of ``|h|`` over positions, as in ``typical_norm``.
        separation: d' (d-prime) of the projections of h on the direction: the mean of the class ``pos`` minus that of the class ``neg``,
            divided by the within-class standard deviation over single positions, pooled over all classes. ``pos`` and ``neg`` are
            arguments of ``spread``, by default long and short thinking.
    """

    typical: Float[Tensor, " layers"]
    separation: Float[Tensor, " layers"]


def spread(
    lm: LM,
    rollouts: Sequence[Rollout],
    direction: Direction,
    by: By,
    *,
    positions: Positions = THINK,
    pos: str = LONG,
    neg: str = SHORT,
) -> Spread:
    """Return the typical norm of the activations, and the separation d' of two classes along a direction, per layer.

    ``Spread`` defines both numbers. This function runs one pass over the rollouts, and needs little memory, since it stores only sums of
    projections and norms. ``directions.separation`` computes the same d' without a pass, from ``Moments`` with outer products. The outer
    products take ``layers * d_model^2`` numbers per class.

    Args:
        direction: The direction to project on. Activations are read at the direction's kind of site.
        by: Function from a rollout to its class, such as "long". It returns ``None`` to leave the rollout out.
        positions: Positions of a rollout to read. Each rollout has weight 1, divided equally among its positions. Default: those that
            predict the think tokens.
        pos: One of the two classes, by default "long". d' is positive if its mean is the larger one.
        neg: The other class, by default "short".

    Raises:
        NoThinkTagsError: no rollout has both a class and a position.
        KeyError: one of the two classes has no rollout.
    """
    examples = examples_of(lm, rollouts, by, positions)
    labels = sorted({e.label for e in examples})
    if missing := {pos, neg} - {*labels}:
        raise KeyError(f"No rollout of class {missing.pop()!r}: the classes are {', '.join(labels)}.")
    unit = direction.unit().to(lm.device, torch.float32)
    # Sums over the examples of each class, in each layer, of three numbers: the projection, its square, and the squared norm.
    total = torch.zeros(3, len(labels), lm.layout.n_layers, dtype=torch.float64)

    def run(batch: Sequence[Example]) -> None:
        pick, sums = Picker(batch, lm), torch.zeros(3, len(labels), lm.layout.n_layers, device=lm.device)
        classes = torch.tensor([[float(e.label == name) for e in batch] for name in labels], device=lm.device)

        def take(kind: str, layer: int, value: Tensor) -> None:
            along = value.float() @ unit[layer].to(value.device)
            parts = torch.stack([along, along.square(), value.float().square().sum(dim=-1)], dim=-1)
            sums[:, :, layer] = (classes.to(value.device) @ pick.means(parts)).T

        forward(lm, pick.ids, (direction.kind,), take)
        total.add_(sums.cpu())

    each_batch(lm, examples, "spread", run)
    n = torch.tensor([sum(e.label == name for e in examples) for name in labels], dtype=torch.float64)
    means = total[0] / n[:, None]  # mean projection of each class, [labels, layers]
    # Within-class variance, pooled over all classes: (sum of squares - n * mean^2) / n.
    variance = (total[1].sum(dim=0) - (n[:, None] * means.square()).sum(dim=0)) / n.sum()
    gap = means[labels.index(pos)] - means[labels.index(neg)]
    # The clamp avoids a division by 0 in layers where the direction is 0.
    return Spread((total[2].sum(dim=0) / n.sum()).sqrt(), gap / variance.clamp(min=1e-12).sqrt())


@torch.inference_mode()
def logits(lm: LM, rollout: Rollout, intervention: Intervention | None = None) -> Float[Tensor, "response vocab"]:
    """Return the logits (fp32) that predict each response token, teacher-forced.

    Row i predicts response token i. As in sampling, the prompt is run in a first pass, and the response after it. Interventions that act
    only during thinking or only during the answer need this order: they assume that the first pass is the prompt.

    Args:
        intervention: Intervention that acts in both passes; ``None`` for the model alone.

    Raises:
        UnsupportedModelError: the response crosses the length at which the model's rotary frequencies change (``LM.frequency_limit``).
    """
    check_growth(
        lm, [(rollout.prompt_len, len(rollout.token_ids) - 1)], "Give a response of at most {limit} tokens, prompt included."
    )
    # The last token predicts nothing in the response, so it is not run.
    response = torch.tensor([rollout.token_ids[rollout.prompt_len : -1]], device=lm.device, dtype=torch.long)
    with intervention(lm) if intervention else nullcontext():
        cache, first, _ = prefill(lm, [list(rollout.token_ids[: rollout.prompt_len])])
        if not response.numel():
            return first.float()
        rest = lm.model(input_ids=response, past_key_values=cache, use_cache=True).logits[0]
    return torch.cat([first, rest]).float()
