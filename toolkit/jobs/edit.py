"""Find a length direction and the heads that write it, edit the heads, and compare with controls.

For the commands ``thinkedit`` and ``direction``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from toolkit import collect, directions, edits, evaluate, probes, report, store, tensors, vectors
from toolkit.edits import steering
from toolkit.jobs.study import Say, Study, with_origin
from toolkit.lm import LM, Condition
from toolkit.methods import efficiency_steering, thinkedit
from toolkit.types import Direction, HeadScores, Moments, Plan, Report, Rollout

PUBLISHED, OURS = "ThinkEdit, as published", "ThinkEdit (ours)"
NOWHERE: Mapping[str, Any] = {}  # origin of rollouts whose task, split and seed are unknown


@dataclass(frozen=True)
class EditSettings:
    """Settings of a head edit and of its random controls.

    The edit is ThinkEdit's: ``W <- (I - strength * v v^T) W``, with W the part of W_O that belongs to the head and v the unit vector of
    the direction to remove.

    Attributes:
        fraction: Share of all heads to edit, above 0 and at most 1.
        strength: Factor in the edit. 1 removes the component along v from the head's output, 2 reverses its sign.
        share: Share of the rollouts in each length class if no thresholds are set, above 0 and at most 0.5. With 0.2, the fifth of the
            rollouts with the shortest thinking is the short class, and the fifth with the longest thinking is the long class.
        short_below: Rollouts with fewer think tokens are the short class. ``None`` uses ``share``; set both thresholds or neither.
        long_above: Rollouts with more think tokens are the long class. ``None`` uses ``share``.
        seed: Seed of the random controls.
        draws: Number of random directions per edit, each a control. Use several, since a single one may have a large effect by chance.
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
        """Return a function from a rollout to its length class, ``"short"``, ``"long"``, or ``None`` for neither.

        The thresholds define the classes if they are set. Otherwise the classes are quantiles of the think lengths in ``rollouts``. A
        rollout whose thinking was never closed is in neither class.

        Raises:
            thinkedit.ClassTooSmallError: a class has fewer than 8 rollouts.
        """
        if self.short_below is not None and self.long_above is not None:
            return thinkedit.length_classes(rollouts, short_below=self.short_below, long_above=self.long_above)
        return thinkedit.quantile_classes(rollouts, share=self.share)


@dataclass(frozen=True)
class Finding:
    """Length direction, head scores and planned edit, as ``find_heads`` computes them for one form of ThinkEdit.

    Attributes:
        moments: Activations averaged per length class; everything else is computed from them.
        direction: Length direction by which the heads are ranked, one vector per layer; adding it lengthens thinking.
        scores: Score of every head; + means that the head writes towards short thinking.
        plan: Heads to edit, and in ``plan.direction`` the direction that the edit removes from their output. The published form removes
            the length direction; our form removes only the part of it that these heads write.
    """

    moments: Moments
    direction: Direction
    scores: HeadScores
    plan: Plan


METHODS = ("thinkedit", "efficiency", "probe", "pca")


@dataclass(frozen=True)
class DirectionRecipe:
    """Settings for computing a direction of thinking length from activations of the residual stream.

    Attributes:
        method: ``thinkedit``: mean of long minus mean of short thinking. ``efficiency``: longest minus shortest correct response to a
            problem, averaged over problems. ``probe``: normal of a logistic probe between short and long thinking. ``pca``: first
            principal component of short and long thinking together.
        site: Where in a layer the residual stream is read: ``resid_mid`` (after attention) or ``resid_post`` (after the block). ``None``
            uses the method's default: ``resid_post`` for ``efficiency``, else ``resid_mid``.
        estimator: For ``thinkedit`` and ``efficiency``: ``mean_difference``, or ``whitened`` (the difference of means, multiplied by the
            inverse of the within-class covariance).
        positions: Positions to average over: ``think`` (all that predict a think token) or ``step_starts`` (where a line of thinking
            begins).
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
        """Site where the residual stream is read, ``resid_mid`` or ``resid_post``: ``site`` if it is set, else the method's default."""
        return self.site or (collect.MLP if self.method == "efficiency" else collect.ATTN)

    def where(self, lm: LM) -> collect.Positions:
        """Return the positions to average over, for the functions of ``collect``. Line starts are found with the tokenizer of ``lm``."""
        return collect.THINK if self.positions == "think" else collect.step_starts(lm)


ESTIMATORS = {"mean_difference": directions.mean_difference, "whitened": directions.whitened}
"""Name of an estimator -> function that computes a direction from ``Moments`` and a site such as ``"resid_mid"``."""


@dataclass(frozen=True)
class Form:
    """A form of ThinkEdit. To add one, add an entry to ``FORMS``.

    Attributes:
        short: Short name, for command line options and files.
        recipe: How the length direction is computed.
        score: Function ``(moments, direction, model)`` that returns the head scores; + means that a head writes towards short thinking.
        removes: Function ``(plan, moments, model)`` that returns the plan with its final direction, which the edit removes. The plan that
            is passed in removes the whole length direction.
        note: Description in one or two sentences.
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
    """Return the classes that a method compares: shortest and longest correct response for ``efficiency``, else the length classes."""
    return efficiency_steering.pairs(rollouts) if recipe.method == "efficiency" else settings.classes(rollouts)


def _direction(
    lm: LM, rollouts: Sequence[Rollout], settings: EditSettings, recipe: DirectionRecipe, origin: Mapping[str, Any]
) -> tuple[Moments, Direction]:
    """Return moments and direction for the methods that compare means, ``thinkedit`` and ``efficiency``."""
    by, kinds = _classes(rollouts, settings, recipe), tuple(dict.fromkeys((recipe.kind, "z")))
    # Only a whitened direction needs outer products, which take layers * d_model^2 numbers per class.
    second = (recipe.kind,) if recipe.estimator == "whitened" else ()
    moments = with_origin(collect.moments(lm, rollouts, by, kinds=kinds, positions=recipe.where(lm), second=second), origin)
    make = efficiency_steering.direction if recipe.method == "efficiency" else thinkedit.direction
    return moments, make(moments, recipe.kind, estimator=ESTIMATORS[recipe.estimator])


def extract_direction(
    lm: LM,
    rollouts: Sequence[Rollout],
    settings: EditSettings = EditSettings(),
    recipe: DirectionRecipe = DirectionRecipe(),
    *,
    origin: Mapping[str, Any] = NOWHERE,
) -> tuple[Direction, pd.DataFrame]:
    """Compute a direction of thinking length by any method, and describe it layer by layer. Adding the direction lengthens thinking.

    Args:
        lm: Model whose activations are read.
        rollouts: Rollouts of ``lm``.
        settings: Thresholds or quantiles of the length classes. The method ``efficiency`` ignores them: it compares responses to the same
            problem.
        recipe: Method, site, estimator and positions.
        origin: ``task``, ``split`` and ``seed`` of the rollouts, to be recorded in the direction's provenance.

    Returns:
        The direction, and a table with one row per layer. Columns:

        * ``norm``: norm of the direction.
        * ``relative``: norm of the direction, divided by the root mean square norm of the residual stream at that layer and site.
        * ``separation`` (``thinkedit``, ``efficiency``): distance between the class means along the direction, long minus short, in
          standard deviations of single positions within a class (d').
        * ``cosine`` (``probe``, ``pca``): cosine of the direction with the difference of class means, long minus short.
        * ``auc`` (``probe``): area under the ROC curve of a probe of this layer for short thinking, on held-out problems; chance is 0.5.
        * ``auc, shuffled`` (``probe``): the same for shuffled labels, as a control.
    """
    if recipe.method in ("thinkedit", "efficiency"):
        _, v = _direction(lm, rollouts, settings, recipe, origin)
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
    """Return length direction, head scores and planned edit of one form of ThinkEdit.

    Args:
        lm: Model to find the heads of.
        rollouts: Rollouts of ``lm`` from the train split.
        settings: Share of heads, strength and length classes.
        name: Key of the form in ``FORMS``.
        origin: ``task``, ``split`` and ``seed`` of the rollouts, to be recorded in the provenance of the direction and the plan.
    """
    form = FORMS[name]
    moments, v = _direction(lm, rollouts, settings, form.recipe, origin)
    scores = form.score(moments, v, lm)
    plan = edits.plan(scores, v, fraction=settings.fraction, strength=settings.strength)
    return Finding(moments, v, scores, form.removes(plan, moments, lm))


def separation(
    lm: LM, rollouts: Sequence[Rollout], settings: EditSettings, finding: Finding, name: str = PUBLISHED
) -> Float[Tensor, " layers"]:
    """Return d' between long and short thinking along the length direction of a finding, one number per layer.

    d' is the mean projection on the direction in long thinking minus that in short thinking, in standard deviations of single positions
    within a class.

    Args:
        lm: Model that the rollouts are from.
        rollouts: Rollouts that ``find_heads`` used.
        settings: Settings that ``find_heads`` used.
        finding: Result of ``find_heads``.
        name: Key in ``FORMS`` of the form that ``find_heads`` used.
    """
    recipe = FORMS[name].recipe
    by = _classes(rollouts, settings, recipe)
    return collect.spread(lm, rollouts, finding.direction, by, positions=recipe.where(lm)).separation


def replan(lm: LM, finding: Finding, settings: EditSettings, name: str = PUBLISHED) -> Plan:
    """Return a new plan for a different share of heads or a different strength. The head scores are reused, so no model runs.

    Args:
        lm: Model that the finding is from.
        finding: Result of ``find_heads``.
        settings: Share of heads and strength of the new plan.
        name: Key in ``FORMS`` of the form that ``find_heads`` used.
    """
    plan = edits.plan(finding.scores, finding.direction, fraction=settings.fraction, strength=settings.strength)
    return FORMS[name].removes(plan, finding.moments, lm)


def plan_table(finding: Finding) -> pd.DataFrame:
    """Return a table of the heads to edit, highest score first: index ``rank`` (from 0), columns ``layer, head, score, strength``."""
    rows = [(e.layer, e.head, float(finding.scores.score[e.layer, e.head]), e.strength) for e in finding.plan.edits]
    return pd.DataFrame(rows, columns=["layer", "head", "score", "strength"]).rename_axis("rank")


def edit_conditions(lm: LM, findings: Mapping[str, Finding], settings: EditSettings = EditSettings()) -> dict[str, Condition]:
    """Return the conditions to compare, as name -> condition: base, the edited models, and random controls of each edit.

    An edit with the name NAME has two kinds of controls. ``NAME: random heads`` edits other heads of the same layers, chosen at random.
    ``NAME: random direction 1``, ``2``, ... edit the same heads, but remove random directions that these heads can write.

    Args:
        lm: The base model.
        findings: Name of the edit -> result of ``find_heads``.
        settings: Seed of the controls, and number of random directions per edit.
    """
    result = {"base": Condition(lm, note="unchanged")}
    for at, (name, f) in enumerate(findings.items()):
        plans = {name: f.plan, f"{name}: random heads": edits.random_heads(f.plan, lm.layout, seed=settings.seed)}
        for draw in range(settings.draws):
            # Two forms may edit the same heads, so each form gets its own random directions.
            noise = edits.random_written(f.plan, lm.layout, seed=settings.seed + at * settings.draws + draw)
            plans[f"{name}: random direction {draw + 1}"] = edits.with_direction(f.plan, noise)
        result |= {label: edited(lm, plan) for label, plan in plans.items()}
    return result


def edited(lm: LM, plan: Plan) -> Condition:
    """Return the model as edited by a plan: in its weights or, if they are quantised or offloaded, at run time."""
    if tensors.storage(lm.model):
        return Condition(lm, (edits.RuntimeEdit(plan),), note=plan.name)
    return Condition(edits.apply(lm, plan), note=plan.name)


def edit_and_measure(
    lm: LM, finding: Finding, study: Study, settings: EditSettings, *, out: Path | None = None, say: Say = lambda text: None
) -> tuple[pd.DataFrame, Report]:
    """Compare base, the edited model and random controls on the study's test problems.

    Args:
        lm: The base model.
        finding: Result of ``find_heads``; its plan is the edit.
        study: Task, numbers of problems and samples, and seed.
        settings: Seed of the controls, and number of random directions.
        out: Directory for rollouts, ``report.json`` and ``rows.parquet``; ``None`` writes nothing.
        say: Function that is called with one line of progress at a time.

    Returns:
        The table of ``evaluate.summary`` (one row per condition and metric), and the report with every response.
    """
    say(f"measuring base, edited model and random controls on the test split of {study.task}")
    measured = evaluate.compare(
        edit_conditions(lm, {"edited": finding}, settings), study.load("test", lm), study.sampling, out=out and out / "rollouts" / "test",
        allow_overlap=study.allow_overlap,
    )  # fmt: skip
    summary = evaluate.summary(measured, seed=study.seed) if out is None else report.write(out, measured, seed=study.seed)
    return summary, measured


def is_saved(lm: LM, finding: Finding, directory: str | Path) -> bool:
    """Return True if a directory already holds what ``save_edited`` would write, False if the directory is empty or missing.

    Raises:
        FileExistsError: the directory holds something else.
        DamagedFileError: the file ``edit.json`` in it is damaged.
    """
    if not Path(directory).is_dir() or not any(Path(directory).iterdir()):
        return False
    about = Path(directory) / "edit.json"
    remedy = "Choose another directory, or remove it first."
    expected = _fingerprint(lm, finding.plan)
    if not about.is_file() or store.read_json(about, {"fingerprint": str}, remedy=remedy)["fingerprint"] != expected:
        raise FileExistsError(f"{directory} is not empty and holds another model. {remedy}")
    return True


def _fingerprint(lm: LM, plan: Plan) -> str:
    """Return the fingerprint of the edited weights; without them, a hash of the weights and the plan."""
    condition = edited(lm, plan)
    return store.key([lm.fingerprint, str(condition.during[0])]) if condition.during else condition.lm.fingerprint


def save_edited(lm: LM, finding: Finding, measured: Report, summary: pd.DataFrame, directory: str | Path) -> Path:
    """Apply the finding's plan to ``lm``, save the edited model as a Hugging Face directory, and return the directory's path.

    If the weights of ``lm`` are quantised or offloaded, an adapter of rank 1 is saved instead of the model (``vectors.save_adapter``). Beside
    the model or adapter, the directory holds ``edit.json`` (plan, norms of the edited weights before and after, hashes of both models'
    weights), ``direction.safetensors``, and a model card on the edit and its measured effects. If saving fails, no directory is left
    behind.

    Args:
        lm: The base model; it is not changed.
        finding: Result of ``find_heads``.
        measured: Report that ``edit_and_measure`` returned.
        summary: Table that ``edit_and_measure`` returned, for the card.
        directory: Directory to write, new or empty.
    """
    condition = edited(lm, finding.plan)
    norms = [] if condition.during else edits.column_norms(lm, condition.lm, finding.plan)
    about = {"plan": finding.plan, "norms": norms, "parent": lm.fingerprint, "fingerprint": _fingerprint(lm, finding.plan)}
    card = report.model_card(
        lm.name, finding.plan, plan_table(finding), report.headline_table(summary), on=report.judged_on(measured)
    )
    with store.atomic_directory(directory) as partial:
        if condition.during:
            vectors.save_adapter(lm, finding.plan, partial)
        else:
            condition.lm.save(partial)
        store.write_json(about, partial / "edit.json")
        store.save(finding.direction, partial / "direction.safetensors")
        store.write_text(card, partial / "README.md")
    return Path(directory)


STRENGTHS = tuple(
    3 * i / 8 for i in range(-4, 5)
)  # steering strengths of the demo; 1 adds the whole difference, long minus short: ours
DOSE = 0.5  # steering strength of ``steering_conditions``: ours


DEMO = EditSettings(fraction=0.06)
"""Settings of the demo: 6 % of the heads are edited, which are two of the tiny reasoner's 32. ThinkEdit's authors edited 3.9 to 6.3 %."""


def steering_conditions(lm: LM, v: Direction, settings: EditSettings) -> dict[str, Condition]:
    """Return three conditions that steer a model at every position, as name -> condition.

    ``steered shorter`` and ``steered longer`` add -0.5 and +0.5 times the direction; ``steered randomly`` adds +0.5 times a random
    direction of equal norm, as a control.

    Args:
        lm: Model to steer.
        v: Direction of thinking length; adding it lengthens thinking.
        settings: Its ``seed`` is the seed of the random direction.
    """
    noise = directions.random_like(v, seed=settings.seed)
    doses = {"steered shorter": (v, -DOSE), "steered longer": (v, DOSE), "steered randomly": (noise, DOSE)}
    return {name: Condition(lm, (steering(d, a),), note=str(steering(d, a))) for name, (d, a) in doses.items()}
