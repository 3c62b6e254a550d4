"""How much of a direction does what: dose-response tables with damage and a random control, targets hit, and the dose to use.

A dose is a strength of steering along a direction. Every table is long, one row a ``direction, strength, metric`` with ``mean, low,
high`` (95 %, bootstrap over problems), so that figures and reports take any of them.
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
assumed_damage = 0.05  # share of responses that may newly fail to close, or loop, before a dose counts as broken: ours
assumed_targets = (0.5, 0.75, 1.0, 1.5, 2.0)  # target lengths as shares of the base's mean: ours
assumed_reference = 48  # rollouts of the base whose perplexity is taken: ours


@dataclass(frozen=True)
class Sweep:
    """What is swept: strengths of every direction, at the same layers and in the same scope.

    Attributes:
        strengths: Strengths; 0 is the base model and always measured.
        layers: Layers steered; ``None`` is all.
        during: Scope of the steering.
        where: Site kind; ``None`` is the direction's own.
        allow_overlap: Judge also on problems that a direction was made from, see ``evaluate.compare``.
    """

    strengths: tuple[float, ...]
    layers: tuple[int, ...] | None = None
    during: Scope = EVERYWHERE
    where: str | None = None
    allow_overlap: bool = False

    def act(self, v: Direction, strength: float) -> Steering:
        """The intervention of one dose."""
        return steering(v, strength, layers=self.layers, where=self.where, during=self.during)


@dataclass(frozen=True)
class Doses:
    """Outcome of a sweep.

    Attributes:
        table: ``direction, strength, metric, mean, low, high``; metrics are :data:`METRICS`, ``think_tokens_q10`` ..., the
            ``perplexity`` of the base's own responses (per token), and ``relative_dose`` (largest over the steered layers).
        report: Every response, as ``evaluate.compare`` gives it; conditions are ``base`` and ``"<direction> <strength>"``.
    """

    table: pd.DataFrame
    report: Report

    def of(self, direction: str, metric: str) -> pd.DataFrame:
        """Rows of one direction and metric by rising strength, indexed by strength."""
        rows = self.table[(self.table["direction"] == direction) & (self.table["metric"] == metric)]
        if rows.empty:
            raise KeyError(f"No rows of {direction!r}, {metric!r}: there are {', '.join(self.table['direction'].unique())}.")
        return rows.sort_values("strength").set_index("strength")


def sweep(
    lm: LM,
    named: Mapping[str, Direction],
    problems: Sequence[Problem],
    sampling: Sampling,
    plan: Sweep,
    *,
    out: str | Path | None = None,
) -> Doses:
    """Sample every direction at every strength on the same problems and random numbers, and measure length, accuracy and damage.

    Put the random control in yourself: ``{"length": v, doses.RANDOM: directions.random_like(v, seed=0)}``.

    Args:
        out: Directory for the rollouts; a sweep that was killed goes on from there.
    """
    strengths = sorted({*plan.strengths, 0.0})
    acts = {(name, a): plan.act(v, a) for name, v in named.items() for a in strengths}
    judged = {"base": Condition(lm)}
    judged |= {_name(name, a): Condition(lm, (act,), note=str(act)) for (name, a), act in acts.items() if a}
    report = evaluate.compare(judged, problems, sampling, out=out, allow_overlap=plan.allow_overlap)
    # The first of the base's responses, as kept, or again from the same streams of random numbers, whatever else was sampled.
    few = problems if out is not None else problems[: math.ceil(assumed_reference / sampling.n)]
    kept = None if out is None else evaluate.rollout_folder(out, "base")
    reference = rollouts(lm, few, sampling, out=kept, progress=False)[:assumed_reference]
    kind = {plan.where or v.kind for v in named.values()}
    typical = {site: collect.typical_norm(lm, reference, site) for site in kind}
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
    """Per-token perplexity of the base's own responses under the steered model, with an interval over responses."""
    loss = []
    for r in reference:
        tokens = torch.tensor(r.token_ids[r.prompt_len :], device=lm.device)
        logp = collect.logits(lm, r, act).log_softmax(-1).gather(1, tokens[:, None])
        loss.append((-logp.sum().item(), len(tokens)))
    total, count = np.array(loss).T
    found = stats.bootstrap(lambda index: np.exp(total[index].sum(axis=1) / count[index].sum(axis=1)), len(loss))
    return found.mean, found.low, found.high


def usable(doses: Doses, direction: str, *, damage: float = assumed_damage) -> tuple[float, float]:
    """Lowest and highest strength around 0 up to which responses still close and do not loop (ours).

    A dose is broken when the share of closed think spans falls, or that of looping responses rises, by more than ``damage``.
    Accuracy is not damage here: it is what shortening may cost.
    """
    closed, looping = (doses.of(direction, metric)["mean"] for metric in ("closed", "looping"))
    whole = (closed >= closed[0.0] - damage) & (looping <= looping[0.0] + damage)
    low = high = 0.0
    for strength in whole.index[whole.index > 0]:
        if not whole[strength]:
            break
        high = strength
    for strength in whole.index[whole.index < 0][::-1]:
        if not whole[strength]:
            break
        low = strength
    return float(low), float(high)


def monotone(doses: Doses, direction: str) -> float:
    """Spearman's correlation of strength and mean think length within the usable range; + is as it should be."""
    low, high = usable(doses, direction)
    lengths = doses.of(direction, "think_tokens")["mean"].loc[low:high]
    return stats.spearman(lengths.index.to_numpy(), lengths.to_numpy())


def targets(doses: Doses, direction: str, shares: Sequence[float] = assumed_targets) -> pd.DataFrame:
    """The strength as a dial, judged by Ruler (arXiv:2409.18943): for each target length the dose whose mean comes nearest, and how
    often single responses hit the target (PM, FM: percent, ranges of +-10 % and +-20 %, ours for tokens), beside the base's hits.

    Columns: ``target, strength, mean, precise, flexible, rmse, base_precise, base_flexible``.
    """
    lengths = doses.of(direction, "think_tokens")["mean"]
    rows = []
    for share in shares:
        target = round(share * lengths[0.0], 1)
        strength = float((lengths - target).abs().idxmin())
        own, base = (_hits(doses.report, name, target) for name in (_name(direction, strength) if strength else "base", "base"))
        rows.append((target, strength, lengths[strength], own.precise, own.flexible, own.rmse, base.precise, base.flexible))
    columns = ["target", "strength", "mean", "precise", "flexible", "rmse", "base_precise", "base_flexible"]
    return pd.DataFrame(rows, columns=columns)


def _hits(report: Report, condition: str, target: float) -> stats.LengthMatch:
    lengths = evaluate.outcomes(report, condition).think_tokens.flatten()
    exact, loose = (stats.ranges_around([target], share) for share in (stats.assumed_precise, stats.assumed_flexible))
    return stats.length_match(lengths, np.full(len(lengths), target), precise=exact, flexible=loose, levels={})["all"]


def choose(
    lm: LM,
    v: Direction,
    problems: Sequence[Problem],
    sampling: Sampling,
    plan: Sweep,
    *,
    max_loss: float = efficiency_steering.assumed_max_loss,
    out: str | Path | None = None,
) -> tuple[efficiency_steering.Choice, pd.DataFrame]:
    """Layer and strength on a dev split: the largest shortening that costs at most ``max_loss`` points (``efficiency_steering.choose``).

    ``plan.layers`` are tried one at a time (default: the middle third). Returns the choice and the table it was made from.

    Raises:
        efficiency_steering.NothingQualifiesError: no dose does; says what the mildest did.
    """
    layers = plan.layers or tuple(efficiency_steering.assumed_layers(lm.layout.n_layers))
    judged = {"base": Condition(lm)}
    doses = [(layer, a) for layer in layers for a in plan.strengths if a]
    for layer, a in doses:
        act = steering(v, a, layers=(layer,), where=plan.where, during=plan.during)
        judged[f"layer {layer} {a:+g}"] = Condition(lm, (act,), note=str(act))
    summary = evaluate.summary(evaluate.compare(judged, problems, sampling, out=out, allow_overlap=plan.allow_overlap)).set_index(
        ["condition", "metric"]
    )["mean"]
    rows = [
        (layer, a, *(summary[c, m] for c in (f"layer {layer} {a:+g}", "base") for m in ("think_tokens", "accuracy")))
        for layer, a in doses
    ]
    table = pd.DataFrame(rows, columns=["layer", "strength", "think_tokens", "accuracy", "base_think_tokens", "base_accuracy"])
    return efficiency_steering.choose(table, max_loss=max_loss), table
