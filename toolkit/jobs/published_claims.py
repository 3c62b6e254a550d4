"""The published claims about thinking length that ``toolkit claims`` judges on one model. ``CLAIMS`` lists the groups of claims.

Each function takes a ``Ground`` and returns claims: the published ones, each with its source, and a comparison with a random control beside
each. All numbers come from functions of other modules; the smallest effects that matter are the constants of ``claims_ground``.

A function raises one of ``UNMEASURABLE`` if its claims cannot be measured on the model and task, such as for lack of short responses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pandas as pd

from toolkit import collect, directions, needles, stats, strengths
from toolkit.claims import Claim
from toolkit.edits import Steering, steering
from toolkit.generate import Sampling
from toolkit.jobs import controls, edit, masking, retrieval, retrieval_claims
from toolkit.jobs.claims_ground import (
    BASE,
    CONTROL,
    Comparison,
    Ground,
    NotMeasuredError,
    assumed_correlation,
    assumed_masked,
    assumed_nats,
    assumed_needles,
    assumed_points,
    assumed_shuffles,
    correlated,
    correlation_claim,
    not_measured,
    within_correlation,
)
from toolkit.jobs.finding import DirectionRecipe, extract_direction, separation
from toolkit.lm import Condition, NoThinkTagsError
from toolkit.methods import efficiency_steering, failed_steps, phase_entropy, thinkedit
from toolkit.tasks import haystack
from toolkit.types import Direction, Rollout

THINKEDIT, EFFICIENCY, RETRIEVAL = "2503.22048 (ThinkEdit)", "2506.15647 (Efficiency Steering)", "2404.15574 (Retrieval Head)"
BETWEEN, PEAR = "2505.00127 (Between Underthinking and Overthinking)", "2510.08026 (PEAR)"
FAILED = "2509.19284 (failed steps)"
UNMEASURABLE = (
    NotMeasuredError, NoThinkTagsError, thinkedit.ClassTooSmallError, efficiency_steering.TooFewPairsError, haystack.HaystackError,
    needles.NeedleError, strengths.TooFewClosedError,
)  # fmt: skip
"""Errors that say that claims cannot be measured on a model and task. Other errors are faults, and stop the command."""
assumed_limit = 0.03  # Efficiency Steering "loses less than 3 points" of accuracy, as a share: ours
assumed_few = 4  # problems with several right responses, fewer of which say nothing on a share of problems: ours


def length_direction(g: Ground) -> list[Claim]:
    """A direction that is computed from some responses predicts the length of others (ThinkEdit).

    The residual stream is averaged over the think positions of each test response that closed its thinking, and projected on the direction,
    at the layer where the responses of the train split are furthest apart. The control is the absolute correlation of random directions.
    """
    v = g.finding.direction
    layer = int(separation(g.lm, g.train, g.plan.edit, g.finding).argmax())
    states = collect.states(g.lm, [r for r in g.base if r.closed], v.kind)
    h, tokens = states.values[:, layer].double(), states.rows["think_tokens"].to_numpy(float)
    seed = g.plan.study.seed
    others = [directions.random_like(v, seed=seed + i) for i in range(assumed_shuffles)]

    def along(direction: Direction) -> stats.Statistic:
        return within_correlation(states.rows, (h @ direction.vector[layer].double()).numpy(), tokens)[0]

    def size(direction: Direction) -> stats.Statistic:
        statistic = along(direction)
        return lambda index: np.abs(statistic(index))

    n = within_correlation(states.rows, tokens, tokens)[1]
    beyond = stats.effect([stats.difference(along(v), size(other)) for other in others], n, seed=seed, seeded=True)
    text = f"the length direction (layer {layer}) predicts the length of other responses"
    return [
        correlation_claim(f"{text} (within a problem)", THINKEDIT, stats.effect([along(v)], n, seed=seed)),
        correlation_claim(f"{text}, better than random directions", CONTROL, beyond.within((-2.0, 1.0))),
    ]


def steered(g: Ground) -> list[Claim]:
    """Adding the length direction lengthens thinking, subtracting it shortens it, and length rises with the strength (ThinkEdit)."""
    v, seed = g.finding.direction, g.plan.study.seed
    low, high = _usable(g, lambda a: steering(v, a), "steering")
    strengths_ = sorted({a for a in (low, low / 2, high / 2, high) if a})
    names = {"the direction": v}
    names |= {f"random direction {i + 1}": directions.random_like(v, seed=seed + i) for i in range(g.plan.edit.draws)}
    random = list(names)[1:]
    acts = {(name, a): steering(d, a) for name, d in names.items() for a in strengths_}
    c = Comparison(g.compare({f"{name} {a:+g}": Condition(g.lm, (act,), note=str(act)) for (name, a), act in acts.items()}), seed)
    found = []
    for a, sign, word in ((high, 1, "longer"), (low, -1, "shorter")):
        if not a:
            continue
        own, noise = [f"the direction {a:+g}"], [f"{name} {a:+g}" for name in random]
        found += [
            c.claim(f"steered {a:+g}: thinks {word}", THINKEDIT, "think_tokens", own, sign=sign),
            c.claim(f"steered {a:+g}: {word} than along random directions", CONTROL, "think_tokens", own, noise, sign=sign),
        ]
    if low:
        own, noise, text = [f"the direction {low:+g}"], [f"{name} {low:+g}" for name in random], f"steered {low:+g}: less accurate"
        found += [
            c.claim(text, THINKEDIT, "accuracy", own, sign=-1),
            c.claim(f"{text} than along random directions", CONTROL, "accuracy", own, noise, sign=-1),
        ]
    rise, *others = (_rise(c, name, strengths_) for name in names)
    n = len(g.tests)
    text = f"length rises with the strength, over {len(strengths_) + 1} strengths"
    beyond = stats.effect([stats.difference(rise, other) for other in others], n, seed=seed, seeded=True)
    return [
        *found,
        correlation_claim(f"{text} (within a problem)", THINKEDIT, stats.effect([rise], n, seed=seed)),
        correlation_claim(f"{text}, more than along random directions", CONTROL, beyond.within((-2.0, 2.0))),
    ]


def _rise(c: Comparison, name: str, strengths_: Sequence[float]) -> stats.Statistic:
    """Return the correlation of strength and think tokens within problems as a statistic, for the direction ``name``."""
    lengths = {0.0: c.outcomes(BASE), **{a: c.outcomes(f"{name} {a:+g}") for a in strengths_}}
    rows = [(i, a, t) for a, o in lengths.items() for i, row in enumerate(o.think_tokens) for t in row]
    table = pd.DataFrame(rows, columns=["problem_id", "strength", "tokens"])
    return within_correlation(table, table["strength"].to_numpy(), table["tokens"].to_numpy())[0]


def _usable(g: Ground, act: Callable[[float], Steering], folder: str) -> tuple[float, float]:
    """Return the strengths to judge, below and above 0, tried on dev problems. One of them may be 0: none is usable on this side."""
    closed = np.mean([r.closed for r in g.train])
    if closed < strengths.assumed_closed:
        raise NotMeasuredError(
            f"{closed:.0%} of the responses end within the token budget, so damage by steering could not be seen: give a larger --max-new-tokens."
        )
    few = g.problems["dev"][: strengths.assumed_handful]
    g.say(f"trying strengths on {len(few)} dev problems")
    fit = strengths.fit(g.lm, act, few, replace(g.plan.study.sampling, n=1), out=g.out / "rollouts" / folder)
    low, high = fit.usable
    low, high = fit.shorter or low, fit.longer or high
    if not (low or high):
        raise NotMeasuredError("no steering strength but 0 is usable: at every other, responses do not end, or they loop.")
    return low, high


def efficiency(g: Ground) -> list[Claim]:
    """Steering along the direction of short correct responses shortens thinking at little loss (Efficiency Steering)."""
    recipe = DirectionRecipe("efficiency")
    v, _ = extract_direction(g.lm, g.train, g.plan.edit, recipe, origin=g.plan.study.origin("train"))
    layers = efficiency_steering.assumed_layers(g.lm.layout.n_layers)
    layer = (layers[len(layers) // 2],)

    def act(direction: Direction, a: float) -> Steering:
        return steering(direction, a, layers=layer, during=efficiency_steering.PUBLISHED_POSITION)

    low, _ = _usable(g, lambda a: act(v, a), "efficiency")
    if not low:
        raise NotMeasuredError(f"no strength below 0 is usable at layer {layer[0]}.")
    seed = g.plan.study.seed
    acts = {"efficient": act(v, low)}
    acts |= {f"random, efficient {i + 1}": act(directions.random_like(v, seed=seed + i), low) for i in range(g.plan.edit.draws)}
    c = Comparison(g.compare({name: Condition(g.lm, (a,), note=str(a)) for name, a in acts.items()}), seed)
    own, *noise = acts
    text = f"Efficiency Steering at layer {layer[0]}"
    return [
        c.claim(f"{text}: shorter", EFFICIENCY, "think_tokens", [own], sign=-1),
        c.claim(f"{text}: loses less than {100 * assumed_limit:.0f} points", EFFICIENCY, "accuracy", [own], beyond=-assumed_limit),
        c.claim(f"{text}: shorter than along random directions", CONTROL, "think_tokens", [own], noise, sign=-1),
    ]


def edited(g: Ground) -> list[Claim]:
    """Editing few heads lengthens thinking and makes short thinking more accurate (ThinkEdit), against random heads and directions."""
    plan, seed, draws = g.finding.plan, g.plan.study.seed, g.plan.edit.draws
    plans = {"edited": plan}
    for kind, draw in (("random heads", controls.random_heads), ("random direction in the heads", controls.random_groups)):
        drawn = controls.random_controls(g.lm, g.finding, plan, draw, draws, seed=seed)
        plans |= {f"{kind} {i + 1}": control for i, control in enumerate(drawn)}
    c = Comparison(g.compare({name: edit.edited(g.lm, p) for name, p in plans.items()}), seed)
    own, heads, along = ["edited"], [n for n in plans if "random heads" in n], [n for n in plans if "random direction" in n]
    text = f"{len(plan.edits)} head{'s' * (len(plan.edits) > 1)} edited"
    return [
        c.claim(f"{text}: thinks longer", THINKEDIT, "think_tokens", own),
        c.claim(f"{text}: its shortest 20 % more accurate", THINKEDIT, "shortest_20", own),
        c.claim(f"{text}: more accurate", THINKEDIT, "accuracy", own),
        c.claim(f"{text}: its shortest 20 % more accurate than with random heads", CONTROL, "shortest_20", own, heads),
        c.claim(f"{text}: longer than with random heads", CONTROL, "think_tokens", own, heads),
        c.claim(f"{text}: longer than with random directions in them", CONTROL, "think_tokens", own, along),
        c.claim(f"{text}: more accurate than with random heads", CONTROL, "accuracy", own, heads),
    ]


def retrieving(g: Ground) -> list[Claim]:
    """Few heads retrieve from the prompt, and masking them harms retrieval and the task more than masking random heads (Retrieval Head)."""
    count = max(2, round(assumed_masked * len(g.lm.layout.all_heads)))
    search = replace(g.plan.search, counts=(count,), draws=g.plan.edit.draws)
    longest = search.max_new_tokens + max(len(h.prompt_ids) for h in search.haystacks(g.lm, "dev"))
    context = g.lm.context
    if context and longest > context:
        raise NotMeasuredError(
            f"prompts that hide a fact ({search.task}) take up to {longest} tokens, the model's context is {context}."
        )
    measured = retrieval.measure_retrieval(g.lm, search, out=g.out / "rollouts" / "haystacks", say=g.say)
    copied = measured.measured["copy, as published"]
    if len(copied.ids) < 4:
        raise NotMeasuredError(f"{len(copied.ids)} responses have a fact to score heads on, 4 needed: give more --instances.")
    scores = retrieval_claims.copy_scores("the model", copied, [search.task] * len(copied.ids))
    claims = [*retrieval_claims.universal(scores), *retrieval_claims.sparse(scores)]
    mask, questions = masking.Mask("copy, as published", count), [h.problem for h in search.haystacks(g.lm, "test")]
    tasks = {
        f"{count} retrieval heads masked, hidden facts ({search.task})": (questions, search, assumed_needles),
        f"{count} retrieval heads masked, {Path(g.plan.study.task).name}": (
            g.tests, replace(search, max_new_tokens=g.plan.study.max_new_tokens), assumed_points,
        ),
    }  # fmt: skip
    for (name, (problems, settings, smallest)), folder in zip(tasks.items(), ("needles", "task"), strict=True):
        g.say(f"masking {count} heads, and {search.draws} times as many random ones: {folder}")
        table = masking.masking_effects(g.lm, measured, settings, problems, [mask], out=g.out / "rollouts" / "masked" / folder)
        row = {str(k): v for k, v in table.iloc[0].to_dict().items() if k not in ("ranking", "op", "during")}
        if not row["accuracy"] + row["lost"] > 0:
            claims.append(not_measured(f"causal: {name}", RETRIEVAL, "the unmasked model solves none of the problems."))
            continue
        claims += [replace(claim, smallest=smallest) for claim in retrieval_claims.causal(name, row)]
    return [replace(claim, source=CONTROL if claim.source == CONTROL else RETRIEVAL) for claim in claims]


def length_and_accuracy(g: Ground) -> list[Claim]:
    """The shortest and the longest response to a problem are wrong more often than a random one; wrong responses are longer.

    The shortest response stands for underthinking, the longest for overthinking (Between Underthinking and Overthinking). The comparison
    with a random response to the same problem is exact: its expected accuracy is the mean over the problem's responses.

    Only responses that end within the token budget count: the others are the longest, and wrong because they are cut off.
    """
    text = "the shortest and the longest responses are wrong more often"
    return [
        *_or_reason(text, BETWEEN, lambda: _by_length(g)),
        *_or_reason("right responses differ much in length", EFFICIENCY, lambda: _twice(g)),
    ]


def _by_length(g: Ground) -> list[Claim]:
    ended = [r for r in g.base if r.closed]
    rows = _rows(ended)
    rows = rows[rows.groupby("problem_id")["correct"].transform("size") > 1]
    if rows["problem_id"].nunique() < 2:
        raise NotMeasuredError(
            f"{len(ended)} of {len(g.base)} responses end within the token budget, and fewer than two problems have two of them: give a "
            "larger --max-new-tokens, or more samples."
        )
    table = rows.groupby("problem_id", sort=False).apply(_ends, include_groups=False)
    seed = g.plan.study.seed
    claims = [
        Claim(
            text=f"the {name} response to a problem is wrong more often than a random one",
            source=BETWEEN,
            estimate=stats.effect([stats.mean_of(table[[name]].to_numpy(float))], len(table), seed=seed).within((-1.0, 1.0)),
            smallest=assumed_points,
            unit="points",
        )
        for name in ("shortest", "longest")
    ]
    pooled = stats.correlation(
        *(values.to_numpy() for values in (rows["think_tokens"], ~rows["correct"], rows["problem_id"])), seed=seed
    )
    claims.append(
        Claim(
            text="wrong responses are longer than right ones (over all problems)",
            source=BETWEEN,
            estimate=pooled,
            smallest=assumed_correlation,
            unit="correlation",
        )
    )
    text = "short thinking is wrong more often"
    return [
        *claims,
        *_or_reason(text, THINKEDIT, lambda: correlated(text, THINKEDIT, rows, "think_tokens", "correct", seed=seed)),
    ]


def _twice(g: Ground) -> list[Claim]:
    """Return the claim that the longest right response to a problem is usually at least twice the shortest."""
    rollouts = [*g.train, *_renamed(g.base)]
    rows = _rows([r for r in rollouts if r.correct and r.closed and r.think_tokens])
    lengths = rows.groupby("problem_id", sort=False)["think_tokens"].agg(["size", "min", "max"])
    # Unlike in ``efficiency_steering.pairs``, problems whose right responses are equally long count: they contradict the claim.
    several = lengths[lengths["size"] > 1]
    if len(several) < assumed_few:
        raise NotMeasuredError(
            f"{len(several)} of {len({r.problem_id for r in rollouts})} problems have two right responses that think and end within the token "
            f"budget, {assumed_few} needed: sample more responses per problem, or more problems."
        )
    twice = (several["max"] >= 2 * several["min"]).to_numpy(float)[:, None]
    share = stats.effect([stats.mean_of(twice)], len(twice), seed=g.plan.study.seed).within((0.0, 1.0))
    text = "the longest right response is at least twice the shortest, in most problems (share)"
    return [Claim(text=text, source=EFFICIENCY, estimate=share, smallest=0.0, unit="points", beyond=0.5)]


def _or_reason(text: str, source: str, measure: Callable[[], list[Claim]]) -> list[Claim]:
    """Return the claims that a function measures, or one claim that says why it could not."""
    try:
        return measure()
    except UNMEASURABLE as reason:
        return [not_measured(text, source, reason)]


def _rows(rollouts: Sequence[Rollout]) -> pd.DataFrame:
    return pd.DataFrame(
        [(r.problem_id, r.think_tokens, bool(r.correct)) for r in rollouts], columns=["problem_id", "think_tokens", "correct"]
    )


def _renamed(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Return rollouts with problem ids that differ from those of another split."""
    return [replace(r, problem_id=f"test: {r.problem_id}") for r in rollouts]


def _ends(rows: pd.DataFrame) -> pd.Series:
    """Return accuracy of a random response minus that of the shortest and of the longest; equally long responses count with their mean."""
    tokens, correct = rows["think_tokens"], rows["correct"].astype(float)
    return pd.Series(
        {
            "shortest": correct.mean() - correct[tokens == tokens.min()].mean(),
            "longest": correct.mean() - correct[tokens == tokens.max()].mean(),
        }
    )


def entropy_claims(g: Ground) -> list[Claim]:
    """Thinking is less certain than answering (for a model with think tags), and longer responses are less certain (PEAR)."""
    rows, seed = phase_entropy.table(g.base), g.plan.study.seed
    claims = []
    both = rows.dropna(subset=["think_entropy", "answer_entropy"])
    if g.lm.tags is not None and g.lm.tags.close is not None and len(both):
        apart = both["think_entropy"] - both["answer_entropy"]
        phases = stats.over_problems(apart.to_numpy(), both["problem_id"].to_numpy(), seed=seed)
        text = "thinking is less certain than answering"
        claims.append(Claim(text=text, source=PEAR, estimate=phases, smallest=assumed_nats, unit="nats"))
    text = "longer responses are less certain"
    return [
        *claims,
        *_or_reason(text, PEAR, lambda: correlated(text, PEAR, rows, "response_tokens", "entropy", seed=seed)),
    ]


def steps_that_fail(g: Ground) -> list[Claim]:
    """A larger share of failed steps goes with wrong answers. Steps are recomputed where the task allows it, else found by cue words."""
    chains = failed_steps.chains(g.lm, g.base, g.tests, failed_steps.fitting)
    rows = failed_steps.table(g.base, chains)
    if not rows["failed"].any():
        raise NotMeasuredError("no step is marked as failed: cue words such as 'that's wrong' do not occur, or no line is wrong.")
    return correlated("failed steps go with wrong answers", FAILED, rows, "fsf", "correct", sign=-1, seed=g.plan.study.seed)


@dataclass(frozen=True)
class Group:
    """A group of claims that are measured together.

    Attributes:
        text: What is claimed, in one line.
        source: Paper.
        measure: Function that measures the claims.
        conditions: Function from the number of random draws to the number of conditions that are sampled on the test problems, besides base.
        tried: True if steering strengths are tried on dev problems first.
        train: True if responses to train problems are sampled for it.
        directed: True if a direction or heads are computed from these responses.
    """

    text: str
    source: str
    measure: Callable[[Ground], list[Claim]]
    conditions: Callable[[int], int] = lambda draws: 0
    tried: bool = False
    train: bool = False
    directed: bool = False


CLAIMS: Mapping[str, Group] = MappingProxyType(
    {
        "length": Group("how length and right answers go together", BETWEEN, length_and_accuracy, train=True),
        "entropy": Group("uncertainty by phase and by length", PEAR, entropy_claims),
        "steps": Group("failed steps go with wrong answers", FAILED, steps_that_fail),
        "direction": Group("one direction predicts length", THINKEDIT, length_direction, train=True, directed=True),
        "steering": Group("steering along it sets length", THINKEDIT, steered, lambda draws: 4 * (1 + draws), True, train=True, directed=True),
        "efficiency": Group("short right responses give a direction that saves tokens", EFFICIENCY, efficiency, lambda draws: 1 + draws, True, train=True, directed=True),
        "edit": Group("editing few heads lengthens thinking", THINKEDIT, edited, lambda draws: 1 + 2 * draws, train=True, directed=True),
        "retrieval": Group("few heads retrieve, and masking them harms", RETRIEVAL, retrieving, lambda draws: 2 + draws),
    }
)  # fmt: skip
"""Name of a group, as for ``toolkit claims --claims`` -> the group."""


def responses(g: Ground) -> dict[str, tuple[int, int]]:
    """Return part of the work -> (largest number of responses to be sampled, token budget of each).

    The parts are ``train`` (if a group needs it), ``base``, the names of the groups of claims, and ``haystacks`` (prompts that hide a fact).
    """
    plan, draws = g.plan, g.plan.edit.draws
    sampling: Sampling = plan.study.sampling
    each, budget = plan.study.problems * sampling.n, sampling.max_new_tokens
    counts = {BASE: (each, budget)}
    if any(CLAIMS[name].train for name in plan.names):
        counts["train"] = ((plan.train_problems or plan.study.problems) * sampling.n, budget)
    for name in plan.names:
        group = CLAIMS[name]
        # Masking answers greedily: one response per problem.
        size = plan.study.problems if name == "retrieval" else each
        tried = strengths.assumed_handful * (1 + 2 * len(strengths.assumed_totals)) if group.tried else 0
        counts[name] = (size * group.conditions(draws) + tried, budget)
    if "retrieval" in plan.names:
        counts["haystacks"] = (plan.search.instances * (3 + draws), plan.search.max_new_tokens)
    return counts
