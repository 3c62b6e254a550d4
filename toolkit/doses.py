"""Dose-response of steering along a direction: length, accuracy and damage by strength, target lengths, and the choice of a dose.

A dose is a strength of steering. Every table is long: one row per ``direction, strength, metric`` with ``mean, low, high`` (95 %,
bootstrap over problems), the format that figures and reports take.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from toolkit import collect, directions, evaluate, stats
from toolkit.edits import Steering, steering
from toolkit.generate import Sampling, rollouts
from toolkit.lm import LM, Condition
from toolkit.methods import efficiency_steering
from toolkit.metrics import Judge
from toolkit.phases import EVERYWHERE, Scope
from toolkit.types import Direction, Problem, Report, Rollout

METRICS = ("think_tokens", "accuracy", "closed", "looping")
QUANTILES = ("think_tokens_q10", "think_tokens_q50", "think_tokens_q90")
RANDOM = "random direction"
assumed_damage = 0.05  # additional share of responses that never close or that loop, above which a dose counts as broken: ours
assumed_targets = (0.5, 0.75, 1.0, 1.5, 2.0)  # target lengths as shares of the base's mean: ours
assumed_reference = 48  # number of base rollouts whose perplexity is measured: ours


@dataclass(frozen=True)
class DoseSweep:
    """Strengths, layers and scope of a dose-response sweep.

    Attributes:
        strengths: Strengths; 0 is the base model, which is always measured.
        layers: Layers to steer; ``None`` means all.
        during: Scope of the steering.
        where: Site kind; ``None`` means that of the direction.
        allow_overlap: Also evaluate on problems that a direction was made from, see ``evaluate.compare``.
    """

    strengths: tuple[float, ...]
    layers: tuple[int, ...] | None = None
    during: Scope = EVERYWHERE
    where: str | None = None
    allow_overlap: bool = False

    def act(self, v: Direction, strength: float) -> Steering:
        """Return the intervention of one dose."""
        return steering(v, strength, layers=self.layers, where=self.where, during=self.during)


@dataclass(frozen=True)
class Doses:
    """Results of a sweep.

    Attributes:
        table: Columns ``direction, strength, metric, mean, low, high``. Metrics are ``METRICS``, ``QUANTILES``, the
            ``perplexity`` per token of the base's responses, and ``relative_dose`` (the largest over the steered layers).
        report: Every response, from ``evaluate.compare``; conditions are ``base`` and ``"<direction> <strength>"``.
    """

    table: pd.DataFrame
    report: Report

    def curve(self, direction: str, metric: str) -> pd.DataFrame:
        """Return the rows of one direction and metric, indexed by strength in ascending order."""
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
    """Sample every direction at every strength on the same problems and random numbers; measure length, accuracy and damage.

    Add a random control yourself: ``{"length": v, doses.RANDOM: directions.random_like(v, seed=0)}``.

    Args:
        named: Directions by name.
        plan: Strengths, layers and scope.
        out: Directory for the rollouts; a sweep that was stopped resumes from it.
    """
    strengths = sorted({*plan.strengths, 0.0})
    acts = {(name, a): plan.act(v, a) for name, v in named.items() for a in strengths}
    conditions = {"base": Condition(lm)}
    conditions |= {_name(name, a): Condition(lm, (act,), note=str(act)) for (name, a), act in acts.items() if a}
    report = evaluate.compare(conditions, problems, sampling, out=out, allow_overlap=plan.allow_overlap)
    # The base's first responses: read from ``out``, or sampled again, which gives the same responses.
    few = problems if out is not None else problems[: math.ceil(assumed_reference / sampling.n)]
    base_folder = None if out is None else evaluate.rollout_folder(out, "base")
    reference = rollouts(lm, few, sampling, out=base_folder, progress=False)[:assumed_reference]
    kinds = {plan.where or v.kind for v in named.values()}
    typical = {kind: collect.typical_norm(lm, reference, kind) for kind in kinds}
    rows = []
    for (name, a), act in tqdm(acts.items(), desc="doses", leave=False):
        condition = _name(name, a) if a else "base"
        steered = list(range(lm.layout.n_layers)) if act.layers is None else list(act.layers)
        dose = directions.relative_dose(named[name], a, typical[act.site])[steered].max().item()
        rows += [(name, a, *row) for row in _measured(report, condition)]
        rows += [
            (name, a, "perplexity", *_perplexity(lm, reference, act if a else None)),
            (name, a, "relative_dose", dose, dose, dose),
        ]
    return Doses(pd.DataFrame(rows, columns=["direction", "strength", "metric", "mean", "low", "high"]), report)


def _name(direction: str, strength: float) -> str:
    return f"{direction} {strength:+g}"


def _measured(report: Report, condition: str) -> list[tuple[str, float, float, float]]:
    outcomes = evaluate.outcomes(report, condition)
    judged = Judge.against(outcomes, (*METRICS, *QUANTILES)).effects([outcomes])
    return [(name, e.estimate.mean, e.estimate.low, e.estimate.high) for name, e in judged.items()]


@torch.inference_mode()
def _perplexity(lm: LM, reference: Sequence[Rollout], act: Steering | None) -> tuple[float, float, float]:
    """Perplexity per token of the base's responses under the steered model, with an interval over responses."""
    loss = []
    for r in reference:
        tokens = torch.tensor(r.token_ids[r.prompt_len :], device=lm.device)
        logp = collect.logits(lm, r, act).log_softmax(-1).gather(1, tokens[:, None])
        loss.append((-logp.sum().item(), len(tokens)))
    total, count = np.array(loss).T
    estimate = stats.bootstrap(lambda index: np.exp(total[index].sum(axis=1) / count[index].sum(axis=1)), len(loss))
    return estimate.mean, estimate.low, estimate.high


def usable_range(doses: Doses, direction: str, *, damage: float = assumed_damage) -> tuple[float, float]:
    """Return the lowest and the highest strength around 0 at which responses still close their thinking and do not loop (ours).

    A dose is broken if the share of closed think spans falls, or the share of looping responses rises, by more than ``damage``.
    Accuracy does not count as damage here, since shortening may cost accuracy.
    """
    closed, looping = (doses.curve(direction, metric)["mean"] for metric in ("closed", "looping"))
    intact = (closed >= closed[0.0] - damage) & (looping <= looping[0.0] + damage)
    low = high = 0.0
    # Walk outwards from 0 and stop at the first broken dose on each side.
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
    """Return Spearman's correlation of strength and mean think length within the usable range; expected to be positive."""
    low, high = usable_range(doses, direction)
    lengths = doses.curve(direction, "think_tokens")["mean"].loc[low:high]
    return stats.spearman(lengths.index.to_numpy(), lengths.to_numpy())


def targets(doses: Doses, direction: str, shares: Sequence[float] = assumed_targets) -> pd.DataFrame:
    """Return for each target length the strength whose mean length is closest, scored as in Ruler (arXiv 2409.18943).

    ``precise`` and ``flexible`` are Ruler's PM and FM: percent of responses within 10 % and 20 % of the target (ranges ours, for tokens).
    ``base_precise`` and ``base_flexible`` are the same for the base model.

    Args:
        shares: Target lengths as shares of the base's mean think length.

    Returns:
        Columns ``target`` (tokens), ``strength, mean, precise, flexible, rmse, base_precise, base_flexible``.
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
    """Choose layer and strength on dev problems: the largest shortening that loses at most ``max_loss`` points of accuracy.

    Args:
        problems: Dev problems.
        plan: Strengths to try; its layers are tried one at a time (default: the middle third).
        max_loss: Largest accepted loss of accuracy, in points.
        out: Directory to keep the rollouts in.

    Returns:
        The choice (see ``efficiency_steering.choose``), and the table it was made from.

    Raises:
        efficiency_steering.NothingQualifiesError: every dose loses more; the message reports the mildest dose.
    """
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
