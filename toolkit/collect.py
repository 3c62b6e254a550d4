"""One teacher-forced pass over rollouts -> :class:`~toolkit.types.Moments`, or :class:`States` where examples are needed.

Directions and head contributions need only means, and ``W mean(a) = mean(W a)``. So running sums per class are all
that leaves a forward pass: memory does not grow with the number of examples, and sums add up across shards.
Probes, principal components and resampling need single examples: :func:`states` keeps one row each, and says what that costs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from toolkit import hooks, origins
from toolkit.decode import batches, prefill
from toolkit.lm import LM, Intervention, NoThinkTagsError, halving
from toolkit.sites import WRITTEN, Norm, Site, UnsupportedModelError
from toolkit.types import Moments, Provenance, Rollout

ATTN, MLP = "resid_mid", "resid_post"
BATCH_TOKENS, CPU_TOKENS = 8192, 1024
LOGITS = 2**23  # logits held at a time: 32 MB in fp32

By = Callable[[Rollout], str | None]
"""Class of a rollout, or ``None`` to leave it out."""


@dataclass(frozen=True)
class Positions:
    """Which positions of a rollout are averaged over: a name, and a function to positions in the full sequence."""

    name: str
    of: Callable[[Rollout], Sequence[int]]


def _think(r: Rollout) -> Sequence[int]:
    if r.think is None or not len(r.think):
        return ()
    span = r.think.predictors()
    return range(span.start, span.stop)


THINK = Positions("think", _think)
"""Every position that predicts a think token: ``[start-1, stop-1)``, as in ThinkEdit's released code."""


def step_starts(lm: LM) -> Positions:
    """Positions that predict the first token of a line of thinking (ours): where a model decides what to do next.

    These are the first predictor position and every position of the span whose token ends a line.
    """
    ends_line = {i for i in range(min(lm.vocab_size, len(lm.tokenizer))) if lm.text([i]).endswith("\n")}

    def of(r: Rollout) -> Sequence[int]:
        where = _think(r)
        return [t for i, t in enumerate(where) if i == 0 or r.token_ids[t] in ends_line]

    return Positions("step_starts", of)


def sentence_ends(lm: LM) -> Positions:
    """Positions whose token ends a sentence of thinking, the last one included (ours): where prose stops or goes on.

    Taken one by one (``states(..., each=True)``), the row with ``remaining`` 0 is where a rollout stopped; going on minus stopping is a
    direction of length for models that think in prose, or of response length for models that do not mark their thinking.
    """
    ends = {i for i in range(min(lm.vocab_size, len(lm.tokenizer))) if lm.text([i]).rstrip().endswith((".", "!", "?"))}

    def of(r: Rollout) -> Sequence[int]:
        return [t for t in range(r.think.start, r.think.stop) if r.token_ids[t] in ends] if r.think and r.closed else ()

    return Positions("sentence_ends", of)


def some(positions: Positions, at_most: int, *, seed: int = 0) -> Positions:
    """At most so many of the positions of each rollout, drawn without replacement, in order.

    The draw depends on the seed and the rollout's identity alone: neither on other rollouts nor on batches.
    """
    if at_most < 1:
        raise ValueError(f"at_most={at_most}: need at least one position a rollout.")

    def of(r: Rollout) -> Sequence[int]:
        where = positions.of(r)
        if len(where) <= at_most:
            return where
        return sorted(random.Random(f"{seed}-{r.problem_id}-{r.sample}").sample(list(where), at_most))

    return Positions(f"{at_most} of {positions.name}", of)


@dataclass(frozen=True)
class States:
    """Activations of single examples at one kind of site: what probes, principal components and resampling need.

    Attributes:
        values: ``[rows, layers, width]``, fp32, on the CPU.
        rows: One line per row of ``values``: ``problem_id, sample, label, think_tokens``; if a row is one position also
            ``position`` (think tokens already read there: 0 at the first) and ``remaining`` (think tokens still to come: 1 at
            the last position that predicts one, all of them at the first; NaN if the span never closed).
        kind: Site kind.
        positions: Name of the positions.
    """

    values: Float[Tensor, "rows layers width"]
    rows: pd.DataFrame
    kind: str
    positions: str
    provenance: Provenance

    def take(self, index: Sequence[int] | np.ndarray) -> States:
        """The rows of a mask, or the rows numbered, in the given order."""
        index = np.asarray(index)
        index = np.flatnonzero(index) if index.dtype == bool else index.astype(int)
        return replace(self, values=self.values[torch.from_numpy(index)], rows=self.rows.iloc[index].reset_index(drop=True))

    def of(self, label: str) -> np.ndarray:
        """Indices of the rows of a class. Raises KeyError naming the classes there are."""
        found = np.flatnonzero(self.rows["label"] == label)
        if not len(found):
            raise KeyError(f"No class {label!r} in these states: they hold {', '.join(sorted(self.rows['label'].unique()))}.")
        return found


@dataclass(frozen=True)
class _Example:
    """A rollout with its class and its positions; ``at`` is its place among the examples, in the order given."""

    rollout: Rollout
    label: str
    where: Sequence[int]
    at: int


def moments(
    lm: LM,
    rollouts: Sequence[Rollout],
    by: By,
    *,
    kinds: Sequence[str] = (ATTN, MLP, "z"),
    positions: Positions = THINK,
    second: Sequence[str] = (),
) -> Moments:
    """Mean activations per class, each example weighing 1 (mean over its positions, then over examples).

    Args:
        by: Class of a rollout, or ``None`` to leave it out.
        kinds: Site kinds to average, at every layer. Where a norm follows attention's output, ``z`` brings along ``sites.WRITTEN``,
            which scores of heads need.
        positions: Which positions; an example without any is left out.
        second: Site kinds whose outer products are summed too (``layers * width^2`` numbers each).

    Raises:
        NoThinkTagsError: no rollout has a position to look at.
    """
    return _moments(lm, rollouts, _examples(lm, rollouts, by, positions), kinds, second, positions)


def moments_and_entropies(
    lm: LM,
    rollouts: Sequence[Rollout],
    by: By,
    *,
    kinds: Sequence[str] = (ATTN, MLP, "z"),
    positions: Positions = THINK,
    temperature: float = 1.0,
) -> tuple[Moments, list[Rollout]]:
    """As :func:`moments`, and from the same pass the rollouts with log-probabilities and entropies (nats) of the full softmax.

    Both equal what ``phase_entropy.with_entropies`` gives. Rollouts in no class, or without a position, stay as they are. Only response
    tokens pass the LM head, a few at a time.

    Raises:
        NoThinkTagsError: no rollout has a position to look at.
        ValueError: the temperature is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: entropies need a temperature above 0.")
    examples, found, head = _examples(lm, rollouts, by, positions), list(rollouts), _head(lm)
    places = {id(r): i for i, r in enumerate(rollouts)}

    def read(batch: Sequence[_Example], hidden: Float[Tensor, "batch seq d_model"]) -> None:
        given = [e.rollout for e in batch]
        at = [(row, t) for row, r in enumerate(given) for t in range(r.prompt_len - 1, len(r.token_ids) - 1)]
        rows, where = torch.tensor(at, dtype=torch.long).view(-1, 2).T.to(hidden.device)
        tokens = torch.tensor([t for r in given for t in r.token_ids[r.prompt_len :]], device=hidden.device)
        states, size = hidden[rows, where], max(1, LOGITS // lm.vocab_size)
        parts = [reduced(head(s), t, temperature) for s, t in zip(states.split(size), tokens.split(size), strict=True)]
        logprobs, entropies = torch.cat(parts, dim=1).cpu().tolist() if parts else ([], [])
        ends = [0, *accumulate(r.response_tokens for r in given)]
        for r, start, stop in zip(given, ends, ends[1:], strict=False):
            found[places[id(r)]] = replace(r, logprobs=tuple(logprobs[start:stop]), entropies=tuple(entropies[start:stop]))

    return _moments(lm, rollouts, examples, kinds, (), positions, read), found


def reduced(logits: Float[Tensor, "... vocab"], tokens: Int[Tensor, ...], temperature: float) -> Float[Tensor, "2 ..."]:
    """Log-probability of each token and entropy (nats) of the full softmax it was to be drawn from."""
    logp = torch.log_softmax(logits.float() / temperature, dim=-1)
    chosen = logp.gather(-1, tokens[..., None]).squeeze(-1)
    return torch.stack([chosen, torch.special.entr(logp.exp()).sum(dim=-1)])


@torch.inference_mode()
def _head(lm: LM) -> Callable[[Tensor], Tensor]:
    """From the base model's output to logits. Checked by behaviour: a model may do more there than its LM head."""
    output, cap = lm.model.get_output_embeddings(), getattr(lm.model.config.get_text_config(), "final_logit_softcapping", None)

    def head(hidden: Tensor) -> Tensor:
        logits = output(hidden)
        return torch.tanh(logits / cap) * cap if cap else logits

    ids = torch.arange(min(8, lm.vocab_size), device=lm.device)[None]
    expected, found = lm.model(input_ids=ids).logits, head(lm.model.base_model(input_ids=ids).last_hidden_state)
    if not torch.allclose(found.float(), expected.float(), rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
        raise UnsupportedModelError(
            f"{lm.name} does more than its LM head between its last state and its logits: read entropies with phase_entropy.with_entropies."
        )
    return head


Read = Callable[[Sequence["_Example"], Tensor], None]


def _moments(
    lm: LM,
    rollouts: Sequence[Rollout],
    examples: Sequence[_Example],
    kinds: Sequence[str],
    second: Sequence[str],
    positions: Positions,
    read: Read | None = None,
) -> Moments:
    labels = tuple(sorted({e.label for e in examples}))
    width, layers = lm.layout.width, lm.layout.n_layers
    kinds = (*kinds, lm.layout.writes) if "z" in kinds else kinds
    # fp64 sums: the difference of two long means is small beside either.
    sums = {k: torch.zeros(len(labels), layers, width(k), dtype=torch.float64) for k in kinds}
    outer = {k: torch.zeros(len(labels), layers, width(k), width(k), dtype=torch.float64) for k in second}

    def run(batch: Sequence[_Example]) -> None:
        classes = torch.tensor([[float(e.label == name) for e in batch] for name in labels], device=lm.device)
        pick = _Pick(batch, lm)
        first: dict[str, list[Tensor]] = {kind: [] for kind in sums}
        squares: dict[str, list[Tensor]] = {kind: [] for kind in outer}

        def take(kind: str, value: Tensor) -> None:
            if kind in sums:
                first[kind].append(classes @ pick.means(value))
            if kind in outer:
                chosen, each = pick.rows(value), pick.weights_of(classes)
                squares[kind].append(torch.stack([(w[:, None] * chosen).T @ chosen for w in each]))

        hidden = _forward(lm, pick.ids, (*kinds, *second), take)
        if read is not None:
            read(batch, hidden)
        for total, found in ((sums, first), (outer, squares)):
            for kind, values in found.items():
                total[kind] += torch.stack(values, dim=1).cpu().double()

    _each_batch(lm, examples, "moments", run)
    n = tuple(sum(e.label == name for e in examples) for name in labels)
    # Of all rollouts: those of no class had a part in where the classes end.
    about = lm.provenance(**origins.record(r.problem_id for r in rollouts))
    return Moments(labels, n, positions.name, sums, outer, about)


def states(
    lm: LM,
    rollouts: Sequence[Rollout],
    kind: str,
    *,
    by: By = lambda r: "all",
    positions: Positions = THINK,
    each: bool = False,
) -> States:
    """States of single examples at every layer of one site kind, rows in the order of the rollouts.

    A row is the mean over a rollout's positions, or with ``each`` a single position; :func:`some` bounds how many a rollout
    gives. Memory: ``4 * rows * layers * width`` bytes of CPU memory in the end (1600 rollouts of a 28-layer model of width
    1536: 275 MB of means), and one batch of activations at a time before that.

    Args:
        by: Class of a rollout, or ``None`` to leave it out; by default all are one class.
        positions: Which positions; an example without any is left out.

    Raises:
        NoThinkTagsError: no rollout has a position to look at.
    """
    examples = _examples(lm, rollouts, by, positions)
    ends = [0, *accumulate(len(e.where) if each else 1 for e in examples)]
    values = torch.empty(ends[-1], lm.layout.n_layers, lm.layout.width(kind))

    def run(batch: Sequence[_Example]) -> None:
        pick = _Pick(batch, lm)
        at = torch.cat([torch.arange(ends[e.at], ends[e.at + 1]) for e in batch])
        found: list[Tensor] = []
        _forward(lm, pick.ids, (kind,), lambda kind, value: found.append(pick.rows(value) if each else pick.means(value)))
        values[at] = torch.stack(found, dim=1).cpu()

    _each_batch(lm, examples, "states", run)
    rows = pd.DataFrame([row for e in examples for row in _rows(e, each)])
    about = lm.provenance(**origins.record(r.problem_id for r in rollouts))
    return States(values, rows, kind, positions.name, about)


def _rows(e: _Example, each: bool) -> list[dict]:
    r = e.rollout
    about = {"problem_id": r.problem_id, "sample": r.sample, "label": e.label, "think_tokens": r.think_tokens}
    if not each:
        return [about]
    start = r.think.start if r.think else r.prompt_len
    read = [t + 1 - start for t in e.where]
    return [about | {"position": n, "remaining": float(r.think_tokens - n) if r.closed else float("nan")} for n in read]


def typical_norm(lm: LM, rollouts: Sequence[Rollout], kind: str, *, positions: Positions = THINK) -> Float[Tensor, " layers"]:
    """Root mean square of ``|h|`` over positions, per layer, fp64: the unit of a relative dose. Each example weighs 1.

    Where second moments are at hand, ``directions.typical_norm`` reads the same numbers off them.
    """
    examples = _examples(lm, rollouts, lambda r: "all", positions)
    total = torch.zeros(lm.layout.n_layers, dtype=torch.float64)

    def run(batch: Sequence[_Example]) -> None:
        pick, found = _Pick(batch, lm), list[Tensor]()
        _forward(
            lm, pick.ids, (kind,), lambda kind, value: found.append(pick.means(value.float().square().sum(-1, keepdim=True)).sum())
        )
        total.add_(torch.stack(found).cpu())

    _each_batch(lm, examples, "norms", run)
    return (total / len(examples)).sqrt()


def _examples(lm: LM, rollouts: Sequence[Rollout], by: By, positions: Positions) -> list[_Example]:
    labelled = [(r, label, positions.of(r)) for r in rollouts if (label := by(r)) is not None]
    found = [_Example(*e, at) for at, e in enumerate(e for e in labelled if len(e[2]))]
    if not found:
        raise NoThinkTagsError(
            f"None of the {len(rollouts)} rollouts of {lm.name} has positions {positions.name!r} in a class. "
            "Does the model think between tags? Load it with tags=ThinkTags(...) "
            "(--think 'response' takes the whole response as thinking), or choose other classes."
        )
    return found


def batch_tokens(lm: LM) -> int:
    """Padded tokens of a batch: on a CPU few, since more neither fill it better nor stay in its cache."""
    return min(BATCH_TOKENS, CPU_TOKENS) if lm.device.type == "cpu" else BATCH_TOKENS


def _each_batch(lm: LM, examples: Sequence[_Example], what: str, run: Callable[[Sequence[_Example]], None]) -> None:
    """``run`` on batches of similar length; when memory runs out, on halves."""
    with tqdm(total=len(examples), desc=what, unit="rollout", disable=len(examples) < 64, leave=False) as bar:

        def counted(batch: Sequence[_Example]) -> None:
            run(batch)
            bar.update(len(batch))

        ordered = sorted(examples, key=lambda e: len(e.rollout.token_ids))
        for batch in batches(ordered, lambda e: len(e.rollout.token_ids), batch_tokens(lm)):
            halving(batch, counted)


class _Pick:
    """The chosen positions of a batch: its token ids, and what is taken out of values ``[batch, seq, width]``, in fp32."""

    def __init__(self, batch: Sequence[_Example], lm: LM) -> None:
        self.batch = batch
        self.ids = padded([e.rollout.token_ids for e in batch], lm)
        weights = torch.zeros(len(batch), 1, self.ids.shape[1])
        for row, e in zip(weights, batch, strict=True):
            row[0, e.where if not isinstance(e.where, range) else slice(e.where.start, e.where.stop)] = 1 / len(e.where)
        self.weights = weights.to(lm.device)

    @cached_property
    def flat(self) -> Int[Tensor, " positions"]:
        """Place of every chosen position in the flattened batch."""
        places = [b * self.ids.shape[1] + t for b, e in enumerate(self.batch) for t in e.where]
        return torch.tensor(places, device=self.ids.device)

    def means(self, value: Float[Tensor, "batch seq width"]) -> Float[Tensor, "batch width"]:
        """Each example's mean over its positions. Others weigh 0: no row has to be gathered."""
        return torch.bmm(self.weights, value.float()).squeeze(1)

    def rows(self, value: Float[Tensor, "batch seq width"]) -> Float[Tensor, "positions width"]:
        """The positions one by one."""
        return value.flatten(0, 1)[self.flat].float()

    def weights_of(self, classes: Float[Tensor, "labels batch"]) -> Float[Tensor, "labels positions"]:
        """What each position weighs in the sum over a class."""
        owner = torch.tensor([b for b, e in enumerate(self.batch) for _ in e.where], device=self.ids.device)
        return classes[:, owner] * self.weights.flatten()[self.flat]


@torch.inference_mode()
def _forward(
    lm: LM, ids: Int[Tensor, "batch seq"], kinds: Sequence[str], take: Callable[[str, Tensor], None]
) -> Float[Tensor, "batch seq d_model"]:
    """One pass; ``take(kind, value)`` is given the states ``[batch, seq, width]`` at every layer, in order. Gives what the LM head
    would read."""
    layers = range(lm.layout.n_layers)

    def watch(kind: str) -> Callable[[Tensor], None]:
        return lambda value: take(kind, value)

    def over_norm(norm: Norm | None) -> hooks.Rewrite:
        def look(attn_out: Tensor, z: Tensor) -> Tensor:
            take(WRITTEN, z if norm is None else z.float() / norm.scale(attn_out))
            return attn_out

        return look

    watchers = {Site(kind, layer): watch(kind) for kind in dict.fromkeys(kinds) if kind != WRITTEN for layer in layers}
    scaled = {Site("attn_out", layer): over_norm(lm.layout.norm(layer)) for layer in layers} if WRITTEN in kinds else {}
    with hooks.observe(lm.layout, watchers), hooks.rewrite(lm.layout, scaled):
        # Right padding under a causal mask never reaches a real token, so no mask is needed. No logits either.
        return lm.model.base_model(input_ids=ids, use_cache=False).last_hidden_state


def padded(rows: Sequence[Sequence[int]], lm: LM) -> Int[Tensor, "batch seq"]:
    """Token ids, right padded, on the model's device."""
    tensors = [torch.tensor(row) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=lm.tokenizer.pad_token_id or 0).to(lm.device)


@torch.inference_mode()
def logits(lm: LM, rollout: Rollout, intervention: Intervention | None = None) -> Float[Tensor, "response vocab"]:
    """Teacher-forced logits (fp32) that predict each response token, under an intervention if given.

    One pass over the prompt and one over the response, so that an intervention that acts by phase knows where the prompt ends.
    """
    response = torch.tensor([rollout.token_ids[rollout.prompt_len : -1]], device=lm.device, dtype=torch.long)
    with intervention(lm) if intervention else nullcontext():
        cache, first, _ = prefill(lm, [list(rollout.token_ids[: rollout.prompt_len])])
        if not response.numel():
            return first.float()
        rest = lm.model(input_ids=response, past_key_values=cache, use_cache=True).logits[0]
    return torch.cat([first, rest]).float()
