"""Compute a length direction, score the attention heads, and choose the heads to edit.

A *length direction* points from short to long thinking in the residual stream, with one vector per layer. Adding it lengthens thinking.
ThinkEdit (arXiv:2503.22048) edits the heads whose outputs point most towards short thinking. The command ``direction`` uses this module.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from toolkit import collect, directions, edits, probes
from toolkit.jobs.study import with_origin
from toolkit.lm import LM
from toolkit.methods import efficiency_steering, thinkedit
from toolkit.types import Direction, HeadScores, Moments, Plan, Rollout

PUBLISHED, OURS = "ThinkEdit, as published", "ThinkEdit (ours)"


NOWHERE: Mapping[str, Any] = {}  # origin of rollouts whose task, split and seed are unknown


@dataclass(frozen=True)
class EditSettings:
    """Settings of ThinkEdit's edit, which removes a direction from the outputs of attention heads, and of its random controls.

    For each edited head, ``W <- (I - strength * v v^T) W``. W holds the columns of W_O that belong to the head. v is the direction's vector
    in the head's layer, scaled to norm 1. A random control edits other heads, or the same heads along the direction between two random
    groups of responses (see ``random_heads`` and ``random_groups``).

    Attributes:
        fraction: Share of all heads to edit, above 0 and at most 1. The heads that write most towards short thinking are edited (see
            ``find_heads``).
        strength: Factor in the edit. 1 removes the component along v from the head's output, 2 reverses its sign.
        share: Share of the rollouts in each length class if no thresholds are set, above 0 and at most 0.5. With 0.2, the fifth of the
            rollouts with the shortest thinking is the short class, and the fifth with the longest thinking is the long class.
        short_below: Threshold in think tokens. Rollouts with fewer than this are the short class. ``None`` uses ``share``; set both
            thresholds or neither.
        long_above: Threshold in think tokens. Rollouts with more than this are the long class. ``None`` uses ``share``.
        seed: Seed of the random controls.
        draws: Number of random controls of each kind, per edit. Use several, since a single one may have a large effect by chance.
    """

    fraction: float = thinkedit.PUBLISHED_FRACTION
    strength: float = 1.0
    share: float = thinkedit.assumed_share
    short_below: float | None = None
    long_above: float | None = None
    seed: int = 0
    draws: int = 3

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1 or not 0 < self.share <= 0.5:
            raise ValueError(f"fraction={self.fraction}, share={self.share}: give 0 < fraction <= 1 and 0 < share <= 0.5.")
        if (self.short_below is None) != (self.long_above is None):
            raise ValueError("Give both short_below and long_above, or neither (then the classes are quantiles).")

    def classes(self, rollouts: Sequence[Rollout]) -> thinkedit.LengthClasses:
        """Return a function that maps a rollout to its length class: ``"short"``, ``"long"``, or ``None`` for neither.

        If the thresholds ``short_below`` and ``long_above`` are set, they define the classes. Otherwise ``share`` does: the thresholds are
        then quantiles of the think lengths of ``rollouts``. A rollout that never closed its thinking is in neither class.

        Raises:
            thinkedit.ClassTooSmallError: fewer than 8 of ``rollouts`` are in one of the classes.
        """
        if self.short_below is not None and self.long_above is not None:
            return thinkedit.length_classes(rollouts, short_below=self.short_below, long_above=self.long_above)
        return thinkedit.quantile_classes(rollouts, share=self.share)


DEMO = EditSettings(fraction=0.06)


@dataclass(frozen=True)
class Finding:
    """Result of ``find_heads``, for one form of ThinkEdit: the length direction, the head scores, and the edit to make.

    Attributes:
        form: Key in ``FORMS`` of the form.
        cells: Sums of activations over random parts of the rollouts with short and with long thinking, for random controls: the classes are
            ``"short 0"``, ``"short 1"`` and so on (see ``random_groups``).
        moments: Sums of activations over the rollouts with short and with long thinking. The attributes below are computed from them.
        direction: Length direction, one vector per layer, used to score the heads; adding it lengthens thinking.
        scores: Score of every head; a positive score means that the head's output points towards short thinking.
        plan: The heads to edit, with the direction to remove from their outputs, ``plan.direction``. The published form removes the length
            direction. Our form sums the outputs of these heads. It removes the mean of this sum over long thinking minus its mean over
            short thinking.
    """

    form: str
    cells: Moments
    moments: Moments
    direction: Direction
    scores: HeadScores
    plan: Plan


METHODS = ("thinkedit", "efficiency", "probe", "pca")


@dataclass(frozen=True)
class DirectionRecipe:
    """Settings for computing a direction of thinking length from activations of the residual stream.

    Attributes:
        method: How the direction is computed. Activations are first averaged over the chosen positions of each rollout.

            * ``thinkedit``: mean activation of rollouts with long thinking minus that of rollouts with short thinking.
            * ``efficiency``: activation of the longest minus that of the shortest correct response to the same problem, averaged over
              problems (Efficiency Steering, arXiv:2506.15647).
            * ``probe``: weight vector of a logistic regression that separates long from short thinking.
            * ``pca``: first principal component of the activations of long and short thinking together, with the sign that points
              towards long thinking.
        site: Where in a layer the residual stream is read: ``resid_mid`` (after attention) or ``resid_post`` (after the block). ``None``
            uses the method's default: ``resid_post`` for ``efficiency``, else ``resid_mid``.
        estimator: For ``thinkedit`` and ``efficiency``: ``mean_difference``, or ``whitened`` (the difference of means, multiplied by the
            inverse of the within-class covariance).
        positions: Positions of a rollout to average over: ``think`` (all that predict a think token) or ``step_starts`` (those that
            predict the first token of a line of thinking).
    """

    method: str = "thinkedit"
    site: str | None = None
    estimator: str = "mean_difference"
    positions: str = "think"

    def __post_init__(self) -> None:
        for value, known in (
            (self.method, METHODS),
            (self.kind, (collect.ATTN, collect.MLP)),
            (self.estimator, tuple(ESTIMATORS)),
            (self.positions, ("think", "step_starts")),
        ):
            if value not in known:
                raise ValueError(f"Unknown value {value!r}: choose one of {', '.join(known)}.")

    @property
    def kind(self) -> str:
        """Site where the residual stream is read: ``site``, or if that is ``None``, the default of ``method``.

        The default is ``resid_post`` for ``efficiency``, and ``resid_mid`` for all other methods.
        """
        return self.site or (collect.MLP if self.method == "efficiency" else collect.ATTN)

    def where(self, lm: LM) -> collect.Positions:
        """Return the positions to average over as ``collect.Positions``, the argument of functions such as ``collect.moments``.

        Args:
            lm: Model whose tokenizer is used to find where lines of thinking start, for ``step_starts``.
        """
        return collect.THINK if self.positions == "think" else collect.step_starts(lm)


ESTIMATORS = {"mean_difference": directions.mean_difference, "whitened": directions.whitened}


"""Name of an estimator -> function that computes a direction from ``Moments`` and a site such as ``"resid_mid"``."""


@dataclass(frozen=True)
class Form:
    """A form of ThinkEdit: how the direction is computed, how heads are scored, and what the edit removes. ``FORMS`` lists the forms.

    Attributes:
        short: Short name, for command line options and files.
        recipe: How the length direction is computed.
        score: Function ``(moments, direction, model)`` that returns the head scores. It receives the sums of activations per class
            (``Moments``) and the length direction. A positive score means that the head's output points towards short thinking.
        removes: Function ``(plan, moments, model)`` that chooses the direction to remove. It receives a plan that removes the length
            direction from the heads with the highest scores. It returns this plan, or one that removes another direction from the same
            heads.
        note: Description of the form in one or two sentences.
    """

    short: str
    recipe: DirectionRecipe
    score: Callable[[Moments, Direction, LM], HeadScores]
    removes: Callable[[Plan, Moments, LM], Plan]
    note: str


def _as_ranked(plan: Plan, moments: Moments, lm: LM) -> Plan:
    return plan


def _as_written(plan: Plan, moments: Moments, lm: LM) -> Plan:
    return edits.with_direction(plan, thinkedit.written_direction(moments, plan.heads, lm))


FORMS: Mapping[str, Form] = MappingProxyType(
    {
        PUBLISHED: Form(
            "published", DirectionRecipe(), thinkedit.head_scores, _as_ranked,
            "As published: difference of means over every position that predicts a think token.",
        ),
        OURS: Form(
            "ours", DirectionRecipe(site=collect.MLP, positions="step_starts"), thinkedit.contrast_scores, _as_written,
            "Only positions where a line of thinking begins, the stream after each block, heads ranked by contrast at its end; removes the "
            "part of the direction that the chosen heads write themselves.",
        ),
    }
)  # fmt: skip


def form_named(short: str) -> str:
    """Return the key in ``FORMS`` of the form with the given short name. Raise ValueError if there is none.

    >>> form_named("ours")
    'ThinkEdit (ours)'
    """
    for name, form in FORMS.items():
        if form.short == short:
            return name
    raise ValueError(f"Unknown form of ThinkEdit {short!r}: choose one of {', '.join(form.short for form in FORMS.values())}.")


def _classes(rollouts: Sequence[Rollout], settings: EditSettings, recipe: DirectionRecipe) -> collect.By:
    """Return a function that maps a rollout to its class, ``"short"``, ``"long"`` or ``None`` for neither.

    If ``recipe.method`` is ``efficiency``, each problem's shortest correct response is in the class short, and its longest correct response
    in the class long (see ``efficiency_steering.pairs``). For all other methods the classes are those of ``settings.classes``.
    """
    return efficiency_steering.pairs(rollouts) if recipe.method == "efficiency" else settings.classes(rollouts)


def _direction(
    lm: LM, rollouts: Sequence[Rollout], settings: EditSettings, recipe: DirectionRecipe, origin: Mapping[str, Any]
) -> Direction:
    """Collect the activations of short and long thinking; return the direction between their means.

    Only for the methods ``thinkedit`` and ``efficiency``, which compare means. The provenance of the direction records ``origin``, the task,
    split and seed of the rollouts.
    """
    by = _classes(rollouts, settings, recipe)
    # Only a whitened direction needs outer products, which take layers * d_model^2 numbers per class.
    second = (recipe.kind,) if recipe.estimator == "whitened" else ()
    moments = collect.moments(lm, rollouts, by, kinds=(recipe.kind,), positions=recipe.where(lm), second=second)
    make = efficiency_steering.direction if recipe.method == "efficiency" else thinkedit.direction
    return make(with_origin(moments, origin), recipe.kind, estimator=ESTIMATORS[recipe.estimator])


PARTS = 8


"""Number of random parts of each length class, of which the groups of random controls consist: ours. Each class has at least 8 rollouts."""


def _in_parts(rollouts: Sequence[Rollout], by: collect.By) -> collect.By:
    """Return a function that maps a rollout to its class and a random part of it, such as ``"long 3"``, or ``None`` for no class.

    The parts of a class differ in size by one rollout at most.
    """
    parts, seen = dict[tuple[str, int], int](), Counter[str]()
    for i in np.random.default_rng(0).permutation(len(rollouts)):
        if label := by(rollouts[i]):
            parts[rollouts[i].problem_id, rollouts[i].sample] = seen[label] % PARTS
            seen[label] += 1

    def part(rollout: Rollout) -> str | None:
        label = by(rollout)
        return f"{label} {parts[rollout.problem_id, rollout.sample]}" if label else None

    return part


def extract_direction(
    lm: LM,
    rollouts: Sequence[Rollout],
    settings: EditSettings = EditSettings(),
    recipe: DirectionRecipe = DirectionRecipe(),
    *,
    origin: Mapping[str, Any] = NOWHERE,
) -> tuple[Direction, pd.DataFrame]:
    """Compute a length direction by the recipe's method, and return it with a table that describes it.

    Adding the direction to the residual stream lengthens thinking.

    Args:
        lm: Model whose activations are read.
        rollouts: Rollouts of ``lm``.
        settings: Its thresholds or ``share`` say which thinking is short and which is long (see ``EditSettings.classes``). The method
            ``efficiency`` ignores them. It compares the longest with the shortest correct response to the same problem, and leaves a
            problem out if the longest has less than twice as many think tokens.
        recipe: Method, site, estimator and positions.
        origin: ``task``, ``split`` and ``seed`` of the rollouts, to be recorded in the direction's provenance.

    Returns:
        The direction, and a table with one row per layer. Some columns exist only for the methods in brackets. Columns:

        * ``norm``: norm of the layer's vector.
        * ``relative``: this norm divided by the root mean square norm of the residual stream at the same layer and site.
        * ``separation`` (``thinkedit``, ``efficiency``): mean projection on the direction in long thinking minus that in short thinking, in
          standard deviations of single positions within a class (d').
        * ``cosine`` (``probe``, ``pca``): cosine of the direction with the difference of class means, long minus short.
        * ``auc`` (``probe``): area under the ROC curve of a probe at this layer that separates the two classes, on held-out problems;
          chance is 0.5.
        * ``auc, shuffled`` (``probe``): the same for a probe that is trained on shuffled labels, as a control.

    Raises:
        thinkedit.ClassTooSmallError: fewer than 8 rollouts are in one of the length classes.
        efficiency_steering.TooFewPairsError: for ``efficiency``, fewer than 8 problems have correct responses that differ enough in length.
    """
    if recipe.method in ("thinkedit", "efficiency"):
        v = _direction(lm, rollouts, settings, recipe, origin)
        measured = collect.spread(lm, rollouts, v, _classes(rollouts, settings, recipe), positions=recipe.where(lm))
        typical, more = measured.typical, {"separation": measured.separation.numpy()}
    else:
        states = with_origin(
            collect.states(lm, rollouts, recipe.kind, by=settings.classes(rollouts), positions=recipe.where(lm)), origin
        )
        v = directions.logistic(states) if recipe.method == "probe" else directions.pca(states)
        typical = collect.typical_norm(lm, rollouts, recipe.kind, positions=recipe.where(lm))
        more = {"cosine": directions.cosine(v, directions.unpaired_difference(states)).numpy()}
        if recipe.method == "probe":
            auc = probes.classify(states).set_index(["metric", "layer"]).loc["auc"]
            more |= {"auc": auc["mean"].to_numpy(), "auc, shuffled": auc["control"].to_numpy()}
    relative = directions.relative_dose(v, 1.0, typical)
    return v, pd.DataFrame({"norm": v.norms.numpy(), "relative": relative.numpy(), **more}).rename_axis("layer")


def find_heads(
    lm: LM, rollouts: Sequence[Rollout], settings: EditSettings, name: str = PUBLISHED, *, origin: Mapping[str, Any] = NOWHERE
) -> Finding:
    """Compute the length direction, score all heads, and choose the heads to edit, by one form of ThinkEdit. The model is not changed.

    Args:
        lm: Model whose heads are scored.
        rollouts: Rollouts of ``lm`` from the train split.
        settings: Share of heads to edit, strength of the edit, and classes of short and long thinking.
        name: Key of the form in ``FORMS``.
        origin: ``task``, ``split`` and ``seed`` of the rollouts, to be recorded in the provenance of the direction and the plan.
    """
    form = FORMS[name]
    by = _in_parts(rollouts, settings.classes(rollouts))
    kinds = tuple(dict.fromkeys((form.recipe.kind, "z")))  # z: head outputs, for the head scores
    cells = with_origin(collect.moments(lm, rollouts, by, kinds=kinds, positions=form.recipe.where(lm)), origin)
    moments = cells.merged({label: label.split()[0] for label in cells.labels})
    v = thinkedit.direction(moments, form.recipe.kind, estimator=ESTIMATORS[form.recipe.estimator])
    scores = form.score(moments, v, lm)
    plan = edits.plan(scores, v, fraction=settings.fraction, strength=settings.strength)
    return Finding(name, cells, moments, v, scores, form.removes(plan, moments, lm))


def separation(
    lm: LM, rollouts: Sequence[Rollout], settings: EditSettings, finding: Finding, name: str = PUBLISHED
) -> Float[Tensor, " layers"]:
    """Return how far apart long and short thinking lie along ``finding.direction``, one number per layer.

    The number is d': the mean projection on the direction in long thinking minus that in short thinking, in standard deviations of single
    positions within a class.

    Args:
        lm: Model that the rollouts were sampled from.
        rollouts: Rollouts that ``find_heads`` used.
        settings: Settings that ``find_heads`` used.
        finding: Result of ``find_heads``.
        name: Key in ``FORMS`` of the form that ``find_heads`` used.
    """
    recipe = FORMS[name].recipe
    by = _classes(rollouts, settings, recipe)
    return collect.spread(lm, rollouts, finding.direction, by, positions=recipe.where(lm)).separation


def replan(lm: LM, finding: Finding, settings: EditSettings, name: str = PUBLISHED) -> Plan:
    """Return a new plan of the edit, with the share of heads and the strength in ``settings``. Head scores are reused; no model runs.

    Args:
        lm: Model from which ``finding`` was computed.
        finding: Result of ``find_heads``.
        settings: Share of heads to edit and strength of the edit. Its length classes are not used.
        name: Key in ``FORMS`` of the form that ``find_heads`` used.
    """
    plan = edits.plan(finding.scores, finding.direction, fraction=settings.fraction, strength=settings.strength)
    return FORMS[name].removes(plan, finding.moments, lm)


def plan_table(finding: Finding) -> pd.DataFrame:
    """Return a table of the heads to edit, highest score first: index ``rank`` (from 0), columns ``layer, head, score, strength``.

    A positive score means that the head's output points towards short thinking. ``strength`` is the factor in the edit of this head. 1
    removes the component along ``finding.plan.direction`` from the head's output; 2 reverses the sign of this component.
    """
    rows = [(e.layer, e.head, float(finding.scores.score[e.layer, e.head]), e.strength) for e in finding.plan.edits]
    return pd.DataFrame(rows, columns=["layer", "head", "score", "strength"]).rename_axis("rank")
