"""Dose-response curves of steering: length, accuracy and damage as functions of strength, and the choice of a strength.

A *dose* is a steering strength. A *sweep* steers a model along several directions at several strengths and measures its responses.
*Damage* is a side effect of steering: more responses than without steering never close their thinking, or more of them end in a loop.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from toolkit import collect, directions, entropies, evaluate, stats
from toolkit.edits import Steering, steering
from toolkit.generate import Sampling, rollouts
from toolkit.lm import LM, Condition, check_thinking
from toolkit.methods import efficiency_steering
from toolkit.metrics import Judge
from toolkit.phases import EVERYWHERE, Scope
from toolkit.positions import THINK, Positions
from toolkit.progress import stage
from toolkit.types import Direction, Problem, Report, Rollout

METRICS = ("think_tokens", "accuracy", "closed", "looping")
QUANTILES = ("think_tokens_q10", "think_tokens_q50", "think_tokens_q90")
RANDOM = "random direction"  # name of a random control among the directions of a sweep
# Tolerated rise, compared with base, of the share of responses that never close their thinking, and of the share that end in a loop: ours.
assumed_damage = 0.05
assumed_targets = (0.5, 0.75, 1.0, 1.5, 2.0)  # target lengths, as multiples of the base model's mean think length: ours
assumed_reference = 48  # number of base rollouts whose perplexity is measured: ours
RESPONSE = Positions("response", lambda r: range(r.prompt_len - 1, len(r.token_ids) - 1))
"""All positions that predict a token of the response; used for responses without thinking."""


@dataclass(frozen=True)
class DoseSweep:
    """Settings of a dose-response sweep.

    Attributes:
        strengths: Steering strengths. The base model (strength 0) is always measured too.
        layers: Layers to steer; ``None`` means all.
        during: Positions at which to steer, as a ``phases.Scope``. ``Scope.parse`` makes one from text such as ``"think"``. Default: all
            positions.
        where: Site in each layer at which to steer, such as ``"resid_post"`` (after the block). ``None`` means the site at which the
            direction was measured.
        allow_overlap: True to allow evaluation on problems from whose rollouts a direction was computed; False raises an error for such
            problems.
    """

    strengths: tuple[float, ...]
    layers: tuple[int, ...] | None = None
    during: Scope = EVERYWHERE
    where: str | None = None
    allow_overlap: bool = False

    def act(self, v: Direction, strength: float) -> Steering:
        """Return the intervention that steers along ``v`` with a given strength, with the sweep's layers, positions and site."""
        return steering(v, strength, layers=self.layers, where=self.where, during=self.during)


@dataclass(frozen=True)
class Doses:
    """Results of a sweep.

    Attributes:
        table: One row per direction, strength and metric. Columns: ``direction, strength, metric, mean, low, high``. ``low`` and ``high``
            are the ends of a 95 % bootstrap interval over problems. Metrics:

            * ``think_tokens``: mean number of think tokens of a response; ``think_tokens_q10``, ``_q50``, ``_q90``: 10 %, 50 % and 90 %
              quantiles of this number over responses.
            * ``accuracy``, ``closed``, ``looping``: shares (0 to 1) of responses that are correct, that close their think span, and that
              end in a loop.
            * ``perplexity``: perplexity per token of base's responses under the steered model. The interval is over responses.
            * ``relative_dose``: norm of the added vector divided by the root mean square norm of the activations at the same layer; the
              largest such ratio over all steered layers. It has no interval (``low = mean = high``).
        report: Report of ``evaluate.compare``, with every response. Conditions are ``base`` and, for example, ``"length +0.5"`` (the
            direction named ``length`` with strength 0.5).
    """

    table: pd.DataFrame
    report: Report

    def curve(self, direction: str, metric: str) -> pd.DataFrame:
        """Return the rows of one direction and metric, with strength as the index, ascending. Raise KeyError if there are none."""
        rows = self.table[(self.table["direction"] == direction) & (self.table["metric"] == metric)]
        if rows.empty:
            raise KeyError(f"No rows of {direction!r}, {metric!r}: there are {', '.join(self.table['direction'].unique())}.")
        return rows.sort_values("strength").set_index("strength")


def sweep(
    lm: LM,
    named: Mapping[str, Direction],
    problems: Sequence[Problem],
    sampling: Sampling,
    plan: DoseSweep,
    *,
    out: str | Path | None = None,
) -> Doses:
    """Steer a model along every direction at every strength, and return measurements of its responses (see ``Doses``).

    All conditions use the same problems and the same random numbers. As a control, add a random direction to ``named``:
    ``{"length": v, doses.RANDOM: directions.random_like(v, seed=0)}``. ``doses.RANDOM`` is its usual name, ``"random direction"``.

    Args:
        lm: The base model.
        named: Directions by name.
        problems: Problems that the model answers.
        sampling: Sampling settings.
        plan: Strengths, layers and positions of steering.
        out: Directory for the rollouts; repeat the call to resume a sweep that was stopped. ``None`` saves nothing.

    Raises:
        NoThinkTagsError: the model marks no thinking (see ``lm.check_thinking``).
    """
    check_thinking(lm)
    strengths = sorted({*plan.strengths, 0.0})
    acts = {(name, a): plan.act(v, a) for name, v in named.items() for a in strengths}
    conditions = {"base": Condition(lm)}
    conditions |= {_name(name, a): Condition(lm, (act,), note=str(act)) for (name, a), act in acts.items() if a}
    report = evaluate.compare(conditions, problems, sampling, out=out, allow_overlap=plan.allow_overlap)
    # The base model's first responses, for perplexity: read from ``out``, or sampled again, which gives the same responses.
    few = problems if out is not None else problems[: math.ceil(assumed_reference / sampling.n)]
    base_folder = None if out is None else evaluate.rollout_folder(out, "base")
    reference = rollouts(lm, few, sampling, out=base_folder, progress=False)[:assumed_reference]
    kinds = {plan.where or v.kind for v in named.values()}
    typical = {kind: typical_norms(lm, reference, kind) for kind in kinds}
    rows = []
    with stage("perplexity", len(acts), "dose") as bar:
        for (name, a), act in acts.items():
            condition = _name(name, a) if a else "base"
            steered = list(range(lm.layout.n_layers)) if act.layers is None else list(act.layers)
            dose = (
                directions.relative_dose(named[name], a, typical[act.site])[steered].max().item()
            )  # the layer that is changed most
            rows += [(name, a, *row) for row in _measured(report, condition)]
            rows += [
                (name, a, "perplexity", *_perplexity(lm, reference, act if a else None)),
                (name, a, "relative_dose", dose, dose, dose),
            ]
            bar.update()
    return Doses(pd.DataFrame(rows, columns=["direction", "strength", "metric", "mean", "low", "high"]), report)


def _name(direction: str, strength: float) -> str:
    return f"{direction} {strength:+g}"


def _measured(report: Report, condition: str) -> list[tuple[str, float, float, float]]:
    outcomes = evaluate.outcomes(report, condition)
    judged = Judge.against(outcomes, (*METRICS, *QUANTILES)).effects([outcomes])
    return [(name, e.estimate.mean, e.estimate.low, e.estimate.high) for name, e in judged.items()]


def _perplexity(lm: LM, reference: Sequence[Rollout], act: Steering | None) -> tuple[float, float, float]:
    """Return the perplexity per token of given responses under a steered model, as ``(mean, low, high)``.

    Args:
        lm: The base model.
        reference: Responses of the base model.
        act: Steering; ``None`` measures the base model itself.

    Returns:
        The perplexity over all tokens together, and the ends of its 95 % bootstrap interval over responses.
    """
    scored = entropies.with_entropies(Condition(lm, () if act is None else (act,)), reference)
    total = np.array([-sum(r.logprobs or ()) for r in scored])  # of each response
    count = np.array([r.response_tokens for r in scored])
    estimate = stats.bootstrap(lambda index: np.exp(total[index].sum(axis=1) / count[index].sum(axis=1)), len(scored))
    return estimate.mean, estimate.low, estimate.high


def typical_norms(lm: LM, base: Sequence[Rollout], site: str) -> Float[Tensor, " layers"]:
    """Return the typical norm of the activations per layer, over the think positions; over whole responses if none of them thinks.

    Args:
        lm: The model.
        base: Responses of the base model.
        site: Kind of site, such as ``"resid_mid"``.
    """
    thinks = any(len(THINK.of(r)) for r in base)
    return collect.typical_norm(lm, base, site, positions=THINK if thinks else RESPONSE)


def usable_range(doses: Doses, direction: str, *, damage: float = assumed_damage) -> tuple[float, float]:
    """Return the usable range of strengths as ``(lowest, highest)``: the range around 0 in which steering does no damage (our definition).

    A strength does damage in either of two cases. The share of responses that close their think span is more than ``damage`` below that of
    base. Or the share of responses that end in a loop is more than ``damage`` above that of base. A loss of accuracy alone is not damage,
    since shorter thinking may cost accuracy.

    On each side of 0, the range ends at the last measured strength before the first one that does damage.

    Args:
        doses: Results of a sweep.
        direction: Name of the direction.
        damage: Largest tolerated change of either share; 0.05 is 5 percentage points.
    """
    shares = pd.DataFrame({metric: doses.curve(direction, metric)["mean"] for metric in ("closed", "looping")})
    return range_around_zero(shares.apply(lambda row: is_intact(row, shares.loc[0.0], damage=damage), axis=1))


def is_intact(
    steered: Mapping[str, Any] | pd.Series, base: Mapping[str, Any] | pd.Series, *, damage: float = assumed_damage
) -> bool:
    """Return True if steering does no damage (see ``usable_range``).

    Args:
        steered: ``closed`` and ``looping``: shares of the responses under steering, 0 to 1.
        base: The same shares of the responses of base.
        damage: Largest tolerated change of either share.
    """
    return bool(steered["closed"] >= base["closed"] - damage and steered["looping"] <= base["looping"] + damage)


def range_around_zero(intact: pd.Series) -> tuple[float, float]:
    """Return the range around 0 as ``(lowest, highest)`` that ends, on each side, at the last strength before the first damaged one.

    Args:
        intact: Whether a strength does no damage, with strengths as the index, ascending.
    """
    low = high = 0.0
    # Go outwards from 0 and stop at the first damaged strength on each side.
    for strength in intact.index[intact.index > 0]:
        if not intact[strength]:
            break
        high = strength
    for strength in intact.index[intact.index < 0][::-1]:
        if not intact[strength]:
            break
        low = strength
    return float(low), float(high)


def monotonicity(doses: Doses, direction: str) -> float:
    """Return Spearman's rank correlation between strength and mean think length within the usable range (see ``usable_range``).

    It is 1 if thinking becomes longer with every increase of strength, -1 if it becomes shorter with every increase.

    Args:
        doses: Results of a sweep.
        direction: Name of the direction.
    """
    low, high = usable_range(doses, direction)
    lengths = doses.curve(direction, "think_tokens")["mean"].loc[low:high]
    return stats.spearman(lengths.index.to_numpy(), lengths.to_numpy())


def targets(doses: Doses, direction: str, shares: Sequence[float] = assumed_targets) -> pd.DataFrame:
    """Return a table with the best strength for each target length: the one whose mean think length is closest to the target.

    All strengths that the sweep measured are considered, even those that do damage (see ``usable_range``). The table also says how close
    single responses come to the target.

    Args:
        doses: Results of a sweep.
        direction: Name of the direction.
        shares: Target lengths, as multiples of the base model's mean think length.

    Returns:
        One row per target. Columns:

        * ``target``: target length, think tokens.
        * ``strength``: the chosen strength; ``mean``: mean number of think tokens at that strength.
        * ``precise``, ``flexible``: percentage of responses whose think length is within 10 % and within 20 % of the target. Ruler
          (arXiv:2409.18943) calls such percentages PM (precise match) and FM (flexible match); 10 % and 20 % are our choice.
        * ``rmse``: root mean square of think length minus target, think tokens.
        * ``base_precise``, ``base_flexible``: the same percentages for the responses of the base model.
    """
    lengths = doses.curve(direction, "think_tokens")["mean"]
    rows = []
    for share in shares:
        target = round(share * lengths[0.0], 1)
        strength = float((lengths - target).abs().idxmin())
        steered = _name(direction, strength) if strength else "base"
        hits, base = (_hits(doses.report, name, target) for name in (steered, "base"))
        rows.append((target, strength, lengths[strength], hits.precise, hits.flexible, hits.rmse, base.precise, base.flexible))
    columns = ["target", "strength", "mean", "precise", "flexible", "rmse", "base_precise", "base_flexible"]
    return pd.DataFrame(rows, columns=columns)


def _hits(report: Report, condition: str, target: float) -> stats.LengthMatch:
    lengths = evaluate.outcomes(report, condition).think_tokens.flatten()
    exact, loose = (stats.ranges_around([target], share) for share in (stats.assumed_precise, stats.assumed_flexible))
    return stats.length_match(lengths, np.full(len(lengths), target), precise=exact, flexible=loose, levels={})["all"]


def choose_dose(
    lm: LM,
    v: Direction,
    problems: Sequence[Problem],
    sampling: Sampling,
    plan: DoseSweep,
    *,
    max_loss: float = efficiency_steering.assumed_max_loss,
    out: str | Path | None = None,
) -> tuple[efficiency_steering.Choice, pd.DataFrame]:
    """Choose the layer and the strength that shorten thinking most while accuracy falls by at most ``max_loss`` percentage points.

    Each layer of ``plan`` is steered alone, at each strength of ``plan``. The effect of the choice is overestimated, since it is the best
    of many. Measure it again on the test split.

    Args:
        lm: The base model.
        v: Direction to steer along.
        problems: Problems of the dev split.
        sampling: Sampling settings.
        plan: Strengths and layers to try. ``plan.layers=None`` tries the middle third of the layers.
        max_loss: Largest accepted loss of accuracy, in percentage points.
        out: Directory for the rollouts; repeat the call to resume. ``None`` saves nothing.

    Returns:
        The choice (``efficiency_steering.Choice``), and the table of all measurements. The table has one row per layer and strength, with
        the columns ``layer, strength, think_tokens, accuracy, base_think_tokens, base_accuracy``. Columns with ``base_`` are measured
        without steering. Token numbers are means per response; accuracies are shares, 0 to 1.

    Raises:
        efficiency_steering.NothingQualifiesError: no combination of layer and strength shortens thinking at an accepted loss.
        NoThinkTagsError: the model marks no thinking (see ``lm.check_thinking``).
    """
    check_thinking(lm)
    layers = plan.layers or tuple(efficiency_steering.assumed_layers(lm.layout.n_layers))
    conditions = {"base": Condition(lm)}
    doses = [(layer, a) for layer in layers for a in plan.strengths if a]
    for layer, a in doses:
        act = steering(v, a, layers=(layer,), where=plan.where, during=plan.during)
        conditions[f"layer {layer} {a:+g}"] = Condition(lm, (act,), note=str(act))
    report = evaluate.compare(conditions, problems, sampling, out=out, allow_overlap=plan.allow_overlap)
    summary = evaluate.summary(report).set_index(["condition", "metric"])["mean"]
    rows = [
        (layer, a, *(summary[c, m] for c in (f"layer {layer} {a:+g}", "base") for m in ("think_tokens", "accuracy")))
        for layer, a in doses
    ]
    table = pd.DataFrame(rows, columns=["layer", "strength", "think_tokens", "accuracy", "base_think_tokens", "base_accuracy"])
    return efficiency_steering.choose(table, max_loss=max_loss), table
