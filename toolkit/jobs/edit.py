"""Compute a length direction, edit the attention heads whose outputs oppose it, and compare the edit with random controls.

A *length direction* points from short to long thinking in the residual stream, with one vector per layer. Adding it lengthens thinking.
ThinkEdit (arXiv:2503.22048) edits the heads whose outputs point most towards short thinking. The commands ``thinkedit`` and ``direction``
use this module.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from toolkit import collect, directions, edits, evaluate, probes, report, store, tensors, vectors
from toolkit.edits import steering
from toolkit.engines import OWN_LOOP, Engine
from toolkit.jobs.study import Say, Study, with_origin
from toolkit.lm import LM, Condition
from toolkit.methods import efficiency_steering, thinkedit
from toolkit.types import Direction, HeadScores, Moments, Plan, Report, Rollout

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


def random_heads(lm: LM, finding: Finding, like: Plan, *, seed: int) -> Plan:
    """Return a control for the choice of heads: the same form of ThinkEdit with random other heads of the same layers.

    If the form removes what the edited heads write, what the random heads write themselves is removed from them. The direction of the edited
    heads would be next to nothing of their output.

    Args:
        lm: The base model.
        finding: Result of ``find_heads``.
        like: The plan for which a control is wanted: ``finding.plan``, or one with another strength or number of heads.
        seed: Seed of the random choice.

    Raises:
        ValueError: the plan edits more than half of all heads.
    """
    return FORMS[finding.form].removes(edits.random_heads(like, lm.layout, seed=seed), finding.moments, lm)


def random_groups(lm: LM, finding: Finding, like: Plan, *, seed: int) -> Plan:
    """Return a control for the direction: the same heads, and the direction between two random groups of responses.

    Each group has half of the responses with short thinking and half of those with long thinking, so their difference does not depend on
    length. It is computed as the length direction is. The outputs of the heads vary along it as much as they vary by chance, which a
    vector drawn at random from all that the heads can write does not give: it would remove a fraction of what the edit removes.

    Args:
        lm: The base model.
        finding: Result of ``find_heads``.
        like: The plan for which a control is wanted, as in ``random_heads``.
        seed: Seed of the groups.
    """
    form, rng = FORMS[finding.form], np.random.default_rng(seed)
    groups: dict[str, str] = {}
    for label in (thinkedit.SHORT, thinkedit.LONG):
        parts = rng.permutation([part for part in finding.cells.labels if part.split()[0] == label])
        groups |= {str(part): (thinkedit.SHORT, thinkedit.LONG)[2 * i < len(parts)] for i, part in enumerate(parts)}
    moments = finding.cells.merged(groups)
    v = thinkedit.direction(moments, form.recipe.kind, estimator=ESTIMATORS[form.recipe.estimator])
    plan = form.removes(edits.with_direction(like, v), moments, lm)
    return replace(plan, name=f"random groups (seed {seed}) for: {like.name}")


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


def edit_conditions(lm: LM, findings: Mapping[str, Finding], settings: EditSettings = EditSettings()) -> dict[str, Condition]:
    """Return a dict from name to condition: base, the edited models, and random controls of each edit.

    An edit with the name NAME has two kinds of controls. ``NAME: random heads 1``, ``2``, ... make the same edit on other heads of the same
    layers (see ``random_heads``). ``NAME: random direction 1``, ``2``, ... edit the same heads, along directions between random groups of
    responses (see ``random_groups``).

    Args:
        lm: The base model.
        findings: Name of the edit -> result of ``find_heads``.
        settings: Seed of the controls, and number of controls of each kind per edit.
    """
    result = {"base": Condition(lm, note="unchanged")}
    for name, f in findings.items():
        plans = {name: f.plan}
        for kind, draw in (("heads", random_heads), ("direction", random_groups)):
            drawn = random_controls(lm, f, f.plan, draw, settings.draws, seed=settings.seed)
            plans |= {f"{name}: random {kind} {i + 1}": plan for i, plan in enumerate(drawn)}
        result |= {label: edited(lm, plan) for label, plan in plans.items()}
    return result


def random_controls(lm: LM, finding: Finding, like: Plan, draw: Callable[..., Plan], draws: int, *, seed: int) -> list[Plan]:
    """Return up to ``draws`` different random controls of an edit (see ``edits.different_draws``).

    Args:
        lm: The base model.
        finding: Result of ``find_heads``.
        like: The plan for which controls are wanted.
        draw: ``random_heads`` or ``random_groups``.
        draws: Number of controls.
        seed: Seed of the first draw; the others have the next seeds.
    """
    return edits.different_draws(lambda at: draw(lm, finding, like, seed=at), draws, seed=seed)


def edited(lm: LM, plan: Plan) -> Condition:
    """Return the edited model as a condition.

    The condition holds a model with changed weights. If the weights are quantised or offloaded, it holds ``lm`` and an intervention that
    makes the same change in every forward pass.

    Args:
        lm: The base model; it is not changed.
        plan: Heads to edit, strength of each edit, and the direction to remove from their outputs.
    """
    if tensors.storage(lm.model):
        return Condition(lm, (edits.RuntimeEdit(plan),), note=plan.name)
    return Condition(edits.apply(lm, plan), note=plan.name)


def edit_and_measure(
    lm: LM,
    finding: Finding,
    study: Study,
    settings: EditSettings,
    *,
    engine: Engine = OWN_LOOP,
    out: Path | None = None,
    say: Say = lambda text: None,
) -> tuple[pd.DataFrame, Report]:
    """Compare base, the edited model and random controls on the study's test problems.

    Args:
        lm: The base model.
        finding: Result of ``find_heads``; its plan is the edit.
        study: Task, numbers of problems and samples, and seed.
        settings: Seed of the controls, and number of controls of each kind.
        engine: Program that samples the tokens.
        out: Directory for rollouts, ``report.json`` and ``rows.parquet``; ``None`` writes nothing.
        say: Function that is called with one line of progress at a time.

    Returns:
        The table of ``evaluate.summary`` (one row per condition and metric), and the report with every response.
    """
    say(f"measuring base, edited model and random controls on the test split of {study.task}")
    measured = evaluate.compare(
        edit_conditions(lm, {"edited": finding}, settings), study.load("test", lm), study.sampling, engine=engine,
        out=out and out / "rollouts" / "test",
        allow_overlap=study.allow_overlap,
    )  # fmt: skip
    summary = evaluate.summary(measured, seed=study.seed) if out is None else report.write(out, measured, seed=study.seed)
    return summary, measured


def is_saved(lm: LM, finding: Finding, directory: str | Path) -> bool:
    """Return True if ``save_edited`` has already saved this edit in a directory, False if the directory is empty or missing.

    ``edit.json`` in the directory records a hash of the edited weights. It is compared with the hash for the edit in ``finding``.

    Raises:
        FileExistsError: the directory holds another model, or other files.
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
    """Return a hash of the edited model: the fingerprint of its weights.

    Quantised or offloaded weights cannot be edited. The hash is then that of the unchanged weights together with the plan.
    """
    condition = edited(lm, plan)
    return store.key([lm.fingerprint, str(condition.during[0])]) if condition.during else condition.lm.fingerprint


def save_edited(lm: LM, finding: Finding, measured: Report, summary: pd.DataFrame, directory: str | Path) -> Path:
    """Save an edited copy of ``lm`` as a Hugging Face directory, and return the directory's path.

    If the weights of ``lm`` are quantised or offloaded, a PEFT adapter of rank 1 is saved instead (see ``vectors.save_adapter``). The
    directory also holds:

    * ``edit.json``: the plan, hashes of the base and of the edited weights, and for each edited head the norm of its columns of W_O before
      and after the edit (not for an adapter).
    * ``direction.safetensors``: the length direction, ``finding.direction``.
    * ``plan.safetensors``: the plan, ``finding.plan``, for ``toolkit export --plan``.
    * ``README.md``: model card with the edited heads and the measured effects.

    If saving fails, no directory is left behind.

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
        store.save(finding.plan, partial / "plan.safetensors")
        store.write_text(card, partial / "README.md")
    return Path(directory)


# Steering strengths of the demo, from -1.5 to 1.5: ours. Strength 1 adds the whole direction, long minus short thinking.
STRENGTHS = tuple(3 * i / 8 for i in range(-4, 5))
DOSE = 0.5  # steering strength of ``steering_conditions``: ours


DEMO = EditSettings(fraction=0.06)
"""Settings of the demo. 6 % of the heads are edited: 2 of the 32 heads of the tiny reasoner. ThinkEdit's authors edited 3.9 to 6.3 %."""


def steering_conditions(lm: LM, v: Direction, settings: EditSettings) -> dict[str, Condition]:
    """Return a dict from name to condition, with three conditions that steer a model in all layers at every position.

    ``steered shorter`` and ``steered longer`` add -0.5 and +0.5 times the direction; ``steered randomly`` adds +0.5 times a random
    direction of equal norm, as a control.

    Args:
        lm: Model to steer.
        v: Length direction; adding it lengthens thinking.
        settings: Its ``seed`` is the seed of the random direction. Its other fields are not used.
    """
    noise = directions.random_like(v, seed=settings.seed)
    doses = {"steered shorter": (v, -DOSE), "steered longer": (v, DOSE), "steered randomly": (noise, DOSE)}
    return {name: Condition(lm, (steering(d, a),), note=str(steering(d, a))) for name, (d, a) in doses.items()}
