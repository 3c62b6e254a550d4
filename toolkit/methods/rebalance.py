"""ReBalance: steering whose strength follows the confidence of the steps so far (ICLR 2026), arXiv:2603.12372.

The *certainty* of a token is the largest probability of the distribution that it was drawn from, at temperature 1 and before top-p. Equations,
for step t of thinking, which ends with a split token::

    c_t = mean certainty of the step's tokens without the split token
    v_t = (c_t - c_{t-1})^2 / 4                                   0 for the first step: ours; steps without tokens are passed over
    F   = a + b tanh( k (c - mid) )                               F(q25) = -1.00, F(q75) = .01
    F  <- F + over (-2.0 - F) + under (.1 - F)
    over  = sigmoid( s_c (q25 - c) ) sigmoid( s_v (v - q75v) )    low confidence that varies: overthinking
    under = sigmoid( s_c (c - q75) ) sigmoid( s_v (q25v - v) )    high confidence that does not
    h  <- h + scale F(c_t, v_t) d      at the input of one layer, at the split token only

with s = 1200 over the distance of the two quantiles. d is the mean hidden state of overthinking steps minus that of confident ones, not
normalised. A step is *over* if it has a word such as "wait" or c < q25, *under* if it has none and c > q75; all others are left out.

Sources: the released code, which differs from the paper (there F is a sign times a bound times tanh, and d a unit vector).

Deviations:

* ``a``, ``b`` and ``mid`` follow from the two values of F with ``mid`` between the quantiles; k is not known: ours is 2 / (q75 - q25).
* How the gates join F is not known: ours is the second formula. The published quantiles are those of one model and temperature, so
  ``levels`` measures them on responses. ``PUBLISHED`` holds the published ones.
* Words count as whole words: "but" is not found in "distribute". Whether the code does so is not known.
* The hidden state of a step is read at the split token before it, which predicts its first token, since that is where d is added.
* ``best_layer`` is the code's rule: PCA to 64 components, then ridge (alpha 1), on confidence. R^2 on held-out problems is ours.

Units and signs: certainties are probabilities; + is longer, and F is negative for uncertain steps, which shortens thinking. Random control:
``directions.random_like(d, seed=...)``. Cost: a softmax per step of decoding. A pass over a whole sequence is replayed token by token, since
its strengths depend on its own logits.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from toolkit import collect, directions, hooks, identity, passes, phases, probes, stats, steering, steps
from toolkit.certainty import certainty_of, step_confidence
from toolkit.lm import LM
from toolkit.positions import Positions
from toolkit.probes import Protocol
from toolkit.sites import Site
from toolkit.spans import THINK
from toolkit.step_states import Mark, ends_step, states_at
from toolkit.types import Direction, Rollout

OVER, UNDER = "over", "under"
WORDS = ("wait", "but", "alternatively")  # three of the code's 27 words; the others are not known to us
F_LOW, F_HIGH, GATE_OVER, GATE_UNDER, SLOPE = -1.0, 0.01, -2.0, 0.1, 1200.0  # published (code)
assumed_steepness = 1.0  # k in units of 2 / (q75 - q25): ours
SITE = "resid_pre"  # the input of the layer, as in the code
EVERY = Positions("every think token", lambda r: range(r.think.start - 1, r.think.stop - 1) if r.think and len(r.think) else ())


@dataclass(frozen=True)
class Levels:
    """Quantiles of the confidence c of steps and of its variance v, between which the strength moves.

    Attributes:
        low: 25 % quantile of c.
        high: 75 % quantile of c.
        low_variance: 25 % quantile of v.
        high_variance: 75 % quantile of v.
    """

    low: float
    high: float
    low_variance: float
    high_variance: float

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1 or not 0 <= self.low_variance < self.high_variance:
            raise ValueError(
                f"{self}: need 0 <= low < high <= 1 and 0 <= low_variance < high_variance. Are all steps equally certain?"
            )


PUBLISHED = Levels(0.65, 0.90, 5e-4, 0.01)


def strength(c: Float[Tensor, "*n"], v: Float[Tensor, "*n"], levels: Levels) -> Float[Tensor, "*n"]:
    """Return F(c, v), the factor on the direction. It is negative for uncertain steps.

    >>> [round(float(strength(torch.tensor(c), torch.tensor(0.005), PUBLISHED)), 2) for c in (0.65, 0.90)]
    [-1.0, 0.01]

    Args:
        c: Confidence of the step, 0 to 1.
        v: Variance of the confidence, 0 to 0.25.
        levels: Quantiles of both.
    """
    middle, half = (levels.low + levels.high) / 2, (levels.high - levels.low) / 2
    b = (F_HIGH - F_LOW) / 2 / math.tanh(assumed_steepness)
    f = (F_LOW + F_HIGH) / 2 + b * torch.tanh(assumed_steepness * (c - middle) / half)
    s_c, s_v = SLOPE / (2 * half), SLOPE / (levels.high_variance - levels.low_variance)
    over = torch.sigmoid(s_c * (levels.low - c)) * torch.sigmoid(s_v * (v - levels.high_variance))
    under = torch.sigmoid(s_c * (c - levels.high)) * torch.sigmoid(s_v * (levels.low_variance - v))
    return f + over * (GATE_OVER - f) + under * (GATE_UNDER - f)


# --- offline: confidences, levels, direction ------------------------------------------------------------------


def confidences(lm: LM, rollouts: Sequence[Rollout], ends: str = "\n\n") -> pd.DataFrame:
    """Return one row per step of thinking that ends with a split token, with its confidence.

    Columns: ``problem_id, sample, step`` (from 0), ``position`` (of the token before the step), ``confidence``, ``variance`` (v) and
    ``text``. Steps without another token than the split token are left out.

    Args:
        lm: The model, which sampled the responses.
        rollouts: Responses with a think span.
        ends: Text with which a step ends.

    Raises:
        ValueError: no token ends with this text, or no step of the responses does.
        NoThinkTagsError: no response thinks.
    """
    table, head = ends_step(lm, ends), collect.lm_head(lm)
    certain: dict[int, list[float]] = {}

    def run(batch: Sequence[passes.Example]) -> None:
        pick = passes.Picker(batch, lm)
        hidden = passes.forward(lm, pick.ids, (), lambda *_: None)
        states, size = hidden.flatten(0, 1)[pick.flat.to(hidden.device)], max(1, collect.LOGITS // lm.vocab_size)
        values = torch.cat([head(part).float().softmax(dim=-1).amax(dim=-1) for part in states.split(size)]).cpu()
        for example, part in zip(batch, values.split([len(e.where) for e in batch]), strict=True):
            certain[id(example.rollout)] = part.tolist()

    passes.each_batch(lm, passes.examples_of(lm, rollouts, lambda r: "all", EVERY), "confidences", run)
    rows: list[dict[str, Any]] = []
    for r in rollouts:
        if r.think is None or id(r) not in certain:
            continue
        start, step, before = r.think.start, 0, None
        for i in range(r.think.start, r.think.stop):
            if not table[r.token_ids[i]]:
                continue
            # The certainty of the token at i is that of the prediction at i - 1, entry i - think.start.
            if chosen := certain[id(r)][start - r.think.start : i - r.think.start]:
                c = float(np.mean(chosen))
                v = 0.0 if before is None else (c - before) ** 2 / 4
                facts = {"problem_id": r.problem_id, "sample": r.sample, "step": step, "position": start - 1}
                rows.append({**facts, "confidence": c, "variance": v, "text": lm.text(r.token_ids[start : i + 1])})
                before, step = c, step + 1
            start = i + 1
    if not rows:
        raise ValueError(f"No step of {len(rollouts)} responses ends with {ends!r}: give the text with which their steps end.")
    return pd.DataFrame(rows)


def levels(measured: pd.DataFrame) -> Levels:
    """Return the quantiles of confidence and variance over steps. The first step of a response has no variance.

    Args:
        measured: From ``confidences``.

    Raises:
        ValueError: two quantiles are equal, so a strength could not move between them; or no response has two steps.
    """
    low, high = np.quantile(measured["confidence"], [0.25, 0.75])
    varied = measured.loc[measured["step"] > 0, "variance"]
    if varied.empty:
        raise ValueError("No response has two steps, so confidence has no variance: use longer responses.")
    return Levels(float(low), float(high), *map(float, np.quantile(varied, [0.25, 0.75])))


def direction(
    lm: LM, rollouts: Sequence[Rollout], measured: pd.DataFrame, limits: Levels, *, words: Sequence[str] = WORDS
) -> Direction:
    """Return the mean hidden state before overthinking steps minus that before confident steps, per layer, at the layer's input.

    Args:
        lm: The model.
        rollouts: The responses of ``measured``.
        measured: From ``confidences``.
        limits: From ``levels``.
        words: Words that make a step overthinking, in lower case.

    Raises:
        KeyError: no step is overthinking, or none is confident.
    """
    text, c = measured["text"].str.lower(), measured["confidence"]
    pattern = steps.whole_words(words)
    worded = text.map(lambda step: bool(pattern.search(step)))
    name = np.where(worded | (c < limits.low), OVER, np.where(c > limits.high, UNDER, ""))
    states = states_at(lm, rollouts, SITE, _marks(rollouts, measured, name.tolist()))
    return directions.unpaired_difference(states, pos=OVER, neg=UNDER)


def _marks(rollouts: Sequence[Rollout], measured: pd.DataFrame, labels: Sequence[str]) -> list[list[Mark]]:
    """Return the marks of each response: the steps of ``measured`` that have a label, which is not ""."""
    marks: dict[tuple[str, int], list[Mark]] = {}
    columns = (measured[name] for name in ("problem_id", "sample", "position", "step"))
    for problem, sample, at, n, label in zip(*columns, labels, strict=True):
        if label:
            marks.setdefault((problem, sample), []).append((at, n, label))
    return [marks.get((r.problem_id, r.sample), []) for r in rollouts]


def best_layer(lm: LM, rollouts: Sequence[Rollout], measured: pd.DataFrame, protocol: Protocol = Protocol()) -> int:
    """Return the layer from whose input PCA and ridge predict the confidence of a step best, by R^2 on held-out problems.

    Args:
        lm: The model.
        rollouts: The responses of ``measured``.
        measured: From ``confidences``.
        protocol: Settings of the cross-validation.

    Raises:
        TooFewProblemsError: there are fewer problems than folds.
    """
    states = states_at(lm, rollouts, SITE, _marks(rollouts, measured, ["all"] * len(measured)))
    keyed = measured.set_index(["problem_id", "sample", "step"])["confidence"]
    wanted = keyed.loc[list(zip(*(states.rows[name] for name in ("problem_id", "sample", "step")), strict=True))].to_numpy()
    problems = states.rows["problem_id"].to_numpy()
    if len(np.unique(problems)) < protocol.folds:
        raise probes.TooFewProblemsError(f"{len(np.unique(problems))} problems are too few for {protocol.folds} folds.")
    fits = []
    for layer in range(states.values.shape[1]):
        predicted = probes.out_of_fold(states.values[:, layer].numpy(), wanted, problems, _ridge, protocol)
        fits.append(stats.r_squared(wanted, predicted))
    return int(np.argmax(fits))


def _ridge(examples: int, penalty: float) -> Any:
    from sklearn.decomposition import PCA
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline

    return make_pipeline(PCA(min(64, examples - 1)), Ridge(alpha=1.0))


# --- online ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Confident:
    """Intervention that steers with a strength that follows confidence. Pass it in ``Condition.during``, before other interventions.

    Attributes:
        direction: From ``direction``; measured at the input of layers.
        layer: Layer at whose input it acts.
        limits: Quantiles of confidence and variance.
        scale: Factor on the strength; the code's is 1.
        ends: Text with which a step ends.
    """

    direction: Direction
    layer: int
    limits: Levels
    scale: float = 1.0
    ends: str = "\n\n"

    def __post_init__(self) -> None:
        if self.direction.kind != SITE or not math.isfinite(self.scale):
            raise ValueError(
                f"A direction at {self.direction.kind!r}, scale={self.scale}: need one at {SITE!r}, and a finite scale."
            )
        if not 0 <= self.layer < len(self.direction.vector):
            raise IndexError(f"Layer {self.layer} does not exist: the direction has layers 0..{len(self.direction.vector) - 1}.")

    def __str__(self) -> str:
        v = steering.in_words(self.direction)
        scale = identity.format_exact(self.scale)
        return f"{scale} x confidence x {v}, input of layer {self.layer}, after {self.ends!r}, {self.limits}"

    def __call__(self, lm: LM) -> AbstractContextManager[None]:
        """Return a context manager inside which ``lm`` is steered.

        Raises:
            WrongModelError: the direction is another model's, see ``steering.check_direction``.
            NoThinkTagsError: ``lm`` has no think tags, so no step could be steered.
        """
        steering.check_direction(self.direction, lm)
        phases.check_tags(phases.THINKING, lm)
        return self._acting(lm)

    @contextmanager
    def _acting(self, lm: LM) -> Iterator[None]:
        with ExitStack() as stack:
            run = _Run(self, lm)
            stack.enter_context(hooks.before_passes(lm.body, run.take))
            # Before the tracker: a replay runs passes of its own, after which the tracker must see the pass itself.
            stack.enter_context(hooks.around_passes(lm.body, run.before, run.after))
            run.tracker = stack.enter_context(phases.track(lm))
            stack.enter_context(hooks.rewrite(lm.layout, {Site(SITE, self.layer): run.rewrite}))
            stack.enter_context(hooks.rewrite_logits(lm.model, run.logits))
            yield


class _Run:
    """State of one context of ``Confident``: the current pass, and the strengths in it."""

    tracker: phases.Tracker

    def __init__(self, act: Confident, lm: LM) -> None:
        self.act, self.lm, self.table = act, lm, ends_step(lm, act.ends).to(lm.device)
        self.vector = act.direction.vector[act.layer].float().to(lm.device)
        self.given: Mapping[str, Any] = {}
        self.ids: Tensor | None = None
        self.cache: Any = None
        self.replayed: tuple[Tensor, Any] | None = None  # strengths of a pass that was replayed, and the cache of the replay

    def take(self, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Keep the named arguments of the pass that begins."""
        self.given = kwargs

    def before(self, ids: Tensor | None, cache: Any) -> None:
        if ids is None:
            raise ValueError("Steps are read off token ids: pass input_ids, not inputs_embeds.")
        past = 0 if cache is None else cache.get_seq_length()
        if (past and (layer := certainty_of(cache)) is None) or (past and layer.get_seq_length() != past):
            raise hooks.UnknownPastError(
                "The confidence of the steps in this KV cache is unknown: run the prompt inside the same context, with the LM head."
            )
        single = cache is not None and (past == 0 or ids.shape[1] == 1)
        replayed = None if single else self._replay(ids, cache)
        self.ids, self.cache, self.replayed = ids, cache, replayed

    @torch.no_grad()
    def _replay(self, ids: Int[Tensor, "batch seq"], cache: Any) -> tuple[Tensor, Any]:
        """Return the strengths at several tokens, and the cache of a replay: they are run one by one, as in decoding."""
        own = DynamicCache(config=self.lm.model.config) if cache is None else copy.deepcopy(cache)
        mask, positions, past, found = self.given.get("attention_mask"), self.given.get("position_ids"), own.get_seq_length(), []
        with hooks.unwatched():
            for t in range(ids.shape[1]):
                self.lm.model(
                    input_ids=ids[:, t : t + 1],
                    attention_mask=None if mask is None else mask[:, : past + t + 1],
                    position_ids=None if positions is None else positions[:, t : t + 1],
                    past_key_values=own,
                    use_cache=True,
                )
                found.append(self.now)
        return torch.cat(found, dim=1), own

    def rewrite(self, value: Tensor, inputs: Tensor) -> Tensor:
        self.now = self.replayed[0] if self.replayed is not None else self._strengths(value)
        if not self.now.any():
            return value
        return (value + self.act.scale * self.now[..., None].to(value.device) * self.vector.to(value.device)).to(value.dtype)

    def _strengths(self, value: Tensor) -> Float[Tensor, "batch seq"]:
        assert self.ids is not None
        none = torch.zeros(self.ids.shape, device=self.ids.device)
        layer = certainty_of(self.cache)
        if layer is None:  # a prompt
            return none
        c, v, count = step_confidence(layer.keys[:, 0, :, 0], layer.values[:, 0, :, 0])
        acts = (self._part()[:, 0] == 2) & (count > 0)
        return torch.where(acts, strength(c, v, self.act.limits), 0.0)[:, None]

    def _part(self) -> Float[Tensor, "rows 1"]:
        """Return the part of the newest token: a think token is one that follows a position in the think phase."""
        history = phases.history_of(self.cache)
        assert history is not None and history.values is not None and self.ids is not None
        # The tracker may have added the newest position already: then the one before it is the second to last.
        before = history.values[:, 0, -1 if history.get_seq_length() < self.length else -2, 0]
        thinks = (before == THINK) & (self.tracker.now.phase[:, -1] == THINK)
        return (thinks * (1 + self.table[self.ids[:, -1]]))[:, None]

    @property
    def length(self) -> int:
        """Number of positions at the end of this pass."""
        assert self.ids is not None
        layer = certainty_of(self.cache)
        return self.ids.shape[1] + (0 if layer is None else layer.get_seq_length())

    def after(self, ids: Tensor, cache: Any) -> None:
        if self.replayed is not None and cache is not None and self.cache is not None:
            layer, new = certainty_of(self.replayed[1]), ids.shape[1]
            certainty_of(cache, make=True).update(layer.keys[:, :, -new:], layer.values[:, :, -new:])

    def logits(self, logits: Tensor) -> Tensor:
        if self.replayed is not None or self.cache is None:
            return logits
        assert self.ids is not None
        certainty = torch.zeros(self.ids.shape, device=self.ids.device)
        part = torch.zeros_like(certainty)
        certainty[:, -1] = logits[:, -1].float().softmax(dim=-1).amax(dim=-1).to(certainty.device)
        if certainty_of(self.cache) is not None:
            part[:, -1:] = self._part()
        certainty_of(self.cache, make=True).update(certainty[:, None, :, None], part[:, None, :, None])
        return logits
