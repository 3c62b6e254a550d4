"""Find a direction and heads, edit, prove: what ``demo``, ``thinkedit`` and ``direction`` do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd

from toolkit import collect, directions, doses, edits, evaluate, figures, probes, report, store
from toolkit.edits import steering
from toolkit.jobs.study import Say, Study, extraction_rollouts, noted
from toolkit.lm import LM, Condition
from toolkit.methods import efficiency_steering, thinkedit
from toolkit.report import Section
from toolkit.types import Direction, HeadScores, Moments, Plan, Report, Rollout

PUBLISHED, OURS = "ThinkEdit", "ThinkEdit (ours)"
NOWHERE: Mapping[str, Any] = {}  # an origin of which nothing is known but the problems


@dataclass(frozen=True)
class Settings:
    """How the heads are found.

    Attributes:
        fraction: Share of heads edited.
        strength: lambda of the edit.
        share: Share of rollouts in each quantile class, unless absolute thresholds are given.
        short_below: Absolute threshold in tokens, or ``None``.
        long_above: Absolute threshold in tokens, or ``None``.
        seed: Seed of the random controls.
        draws: Random directions drawn as controls of each edit; one alone may be lucky or unlucky.
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
            raise ValueError(f"fraction={self.fraction}, share={self.share}: need 0 < fraction <= 1 and 0 < share <= 0.5.")
        if (self.short_below is None) != (self.long_above is None):
            raise ValueError("Give both short_below and long_above, or neither (then the classes are quantiles).")

    def classes(self, found: Sequence[Rollout]) -> thinkedit.LengthClasses:
        """Absolute classes if both thresholds are given, else quantiles. Errors as in ``thinkedit``."""
        if self.short_below is not None and self.long_above is not None:
            return thinkedit.length_classes(found, short_below=self.short_below, long_above=self.long_above)
        return thinkedit.quantile_classes(found, share=self.share)


@dataclass(frozen=True)
class Finding:
    """What one form of the method found in a model: the direction that ranks the heads, their scores, and the edit.

    ``plan.direction`` is what the edit removes: the same direction as published, the heads' own part of it in ours.
    """

    moments: Moments
    direction: Direction
    scores: HeadScores
    plan: Plan


METHODS = ("thinkedit", "efficiency", "probe", "pca")


@dataclass(frozen=True)
class Recipe:
    """How a direction is made, all by name.

    Attributes:
        method: ``thinkedit`` (long minus short thinking), ``efficiency`` (longest minus shortest correct response of a problem),
            ``probe`` (normal of a logistic probe of short against long) or ``pca`` (first principal component of both).
        site: Site kind; ``None`` is the method's own: ``resid_post`` for efficiency, else ``resid_mid``.
        estimator: Of thinkedit and efficiency: ``mean_difference`` or ``whitened``.
        positions: ``think`` or ``step_starts``.
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
                raise ValueError(f"{value!r} is not known: choose one of {', '.join(known)}.")

    @property
    def kind(self) -> str:
        """The site kind, the method's own if none was given."""
        return self.site or (collect.MLP if self.method == "efficiency" else collect.ATTN)

    def where(self, lm: LM) -> collect.Positions:
        """The positions averaged over."""
        return collect.THINK if self.positions == "think" else collect.step_starts(lm)


ESTIMATORS = {"mean_difference": directions.mean_difference, "whitened": directions.whitened}


@dataclass(frozen=True)
class Form:
    """A form of ThinkEdit. Another one is another value in :data:`FORMS`.

    Attributes:
        short: Its name in options and files.
        recipe: How its direction is made.
        score: Ranks the heads; + writes towards short thinking.
        removes: Returns the plan with the direction that its heads are to lose.
        note: One sentence.
    """

    short: str
    recipe: Recipe
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
            "published", Recipe(), thinkedit.head_scores, _as_ranked,
            "As published: difference of means over every position that predicts a think token.",
        ),
        OURS: Form(
            "ours", Recipe(site=collect.MLP, positions="step_starts"), thinkedit.contrast_scores, _as_written,
            "Only positions where a line of thinking begins, the stream after each block, heads ranked by contrast at its end; removes the "
            "part of the direction that the chosen heads write themselves.",
        ),
    }
)  # fmt: skip


def form_named(short: str) -> str:
    """Return the key in :data:`FORMS` of a form's short name. Raises ValueError that lists the short names."""
    for name, known in FORMS.items():
        if known.short == short:
            return name
    raise ValueError(f"{short!r} is no form of ThinkEdit: choose one of {', '.join(known.short for known in FORMS.values())}.")


def _direction(
    lm: LM, found: Sequence[Rollout], settings: Settings, recipe: Recipe, origin: Mapping[str, Any]
) -> tuple[Moments, Direction]:
    by = efficiency_steering.pairs(found) if recipe.method == "efficiency" else settings.classes(found)
    kinds = tuple(dict.fromkeys((recipe.kind, "z")))
    moments = noted(collect.moments(lm, found, by, kinds=kinds, positions=recipe.where(lm), second=(recipe.kind,)), origin)
    make = efficiency_steering.direction if recipe.method == "efficiency" else thinkedit.direction
    return moments, make(moments, recipe.kind, estimator=ESTIMATORS[recipe.estimator])


def extract(
    lm: LM,
    found: Sequence[Rollout],
    settings: Settings = Settings(),
    recipe: Recipe = Recipe(),
    *,
    origin: Mapping[str, Any] = NOWHERE,
) -> tuple[Direction, pd.DataFrame]:
    """A direction by any method, and a table of its layers; ``origin`` (see ``jobs.study``) goes into its provenance.

    Columns: ``norm``; ``relative``, the norm over that of the stream there (the relative dose of strength 1); ``separation`` of the
    classes along it, in within-class deviations of a position, or for methods over single examples ``cosine`` to the difference of
    means; for the probe also its held-out ``auc`` and that with shuffled labels.
    """
    if recipe.method in ("thinkedit", "efficiency"):
        moments, v = _direction(lm, found, settings, recipe, origin)
        typical = directions.typical_norm(moments, recipe.kind)
        more = {"separation": directions.separation(moments, v).numpy()}
    else:
        states = noted(collect.states(lm, found, recipe.kind, by=settings.classes(found), positions=recipe.where(lm)), origin)
        v = directions.logistic(states) if recipe.method == "probe" else directions.pca(states)
        typical = collect.typical_norm(lm, found, recipe.kind, positions=recipe.where(lm))
        more = {"cosine": directions.cosine(v, directions.unpaired_difference(states)).numpy()}
        if recipe.method == "probe":
            told = probes.classify(states).set_index(["metric", "layer"]).loc["auc"]
            more |= {"auc": told["mean"].to_numpy(), "auc, shuffled": told["control"].to_numpy()}
    relative = directions.relative_dose(v, 1.0, typical)
    return v, pd.DataFrame({"norm": v.norms.numpy(), "relative": relative.numpy(), **more}).rename_axis("layer")


def find(
    lm: LM, found: Sequence[Rollout], settings: Settings, name: str = PUBLISHED, *, origin: Mapping[str, Any] = NOWHERE
) -> Finding:
    """Return direction, head scores and plan in one of :data:`FORMS`, from the same rollouts.

    Args:
        name: Key of the form.
        origin: Goes into their provenance, see ``jobs.study``.
    """
    form = FORMS[name]
    moments, v = _direction(lm, found, settings, form.recipe, origin)
    scores = form.score(moments, v, lm)
    plan = edits.plan(scores, v, fraction=settings.fraction, strength=settings.strength)
    return Finding(moments, v, scores, form.removes(plan, moments, lm))


def planned(lm: LM, finding: Finding, settings: Settings, name: str = PUBLISHED) -> Plan:
    """The plan of the same finding with another share of heads or strength; nothing is measured again."""
    plan = edits.plan(finding.scores, finding.direction, fraction=settings.fraction, strength=settings.strength)
    return FORMS[name].removes(plan, finding.moments, lm)


def plan_table(finding: Finding) -> pd.DataFrame:
    """The heads of a plan with their scores, highest first."""
    rows = [(e.layer, e.head, float(finding.scores.score[e.layer, e.head]), e.strength) for e in finding.plan.edits]
    return pd.DataFrame(rows, columns=["layer", "head", "score", "strength"]).rename_axis("rank")


def conditions(lm: LM, findings: Mapping[str, Finding], settings: Settings = Settings()) -> dict[str, Condition]:
    """Base, each edited model, and its controls: random heads of the same layers, and the same heads with a random direction
    of those they can write (``edits.random_written``)."""
    judged = {"base": Condition(lm, note="as it is")}
    for at, (name, f) in enumerate(findings.items()):
        plans = {name: f.plan, f"{name}: random heads": edits.random_heads(f.plan, lm.layout, seed=settings.seed)}
        for draw in range(settings.draws):
            # Two forms may edit the same heads: each gets draws of its own.
            noise = edits.random_written(f.plan, lm.layout, seed=settings.seed + at * settings.draws + draw)
            plans[f"{name}: random direction {draw + 1}"] = edits.with_direction(f.plan, noise)
        judged |= {what: Condition(edits.apply(lm, plan), note=plan.name) for what, plan in plans.items()}
    return judged


def edit_and_measure(
    lm: LM, finding: Finding, study: Study, settings: Settings, *, out: Path | None = None, say: Say = lambda text: None
) -> tuple[pd.DataFrame, Report]:
    """Compare base, edited and both random controls on the study's test problems; ``out`` keeps rollouts, ``report.json`` and
    ``rows.parquet``."""
    say(f"measuring base, edited model and random controls on the test split of {study.task}")
    measured = evaluate.compare(
        conditions(lm, {"edited": finding}, settings), study.load("test", lm), study.sampling, out=out and out / "rollouts" / "test",
        allow_overlap=study.allow_overlap,
    )  # fmt: skip
    summary = evaluate.summary(measured, seed=study.seed) if out is None else report.write(out, measured, seed=study.seed)
    return summary, measured


def is_saved(lm: LM, finding: Finding, directory: str | Path) -> bool:
    """Whether a directory holds this very edit already.

    Raises:
        FileExistsError: it holds something else.
        DamagedFileError: its ``edit.json`` does not say what it holds.
    """
    if not Path(directory).is_dir() or not any(Path(directory).iterdir()):
        return False
    about = Path(directory) / "edit.json"
    edited = edits.apply(lm, finding.plan).fingerprint
    remedy = "Choose another directory, or remove it first."
    if not about.is_file() or store.read_json(about, {"fingerprint": str}, remedy=remedy)["fingerprint"] != edited:
        raise FileExistsError(f"{directory} is not empty and holds another model. {remedy}")
    return True


def save_edited(lm: LM, finding: Finding, measured: Report, summary: pd.DataFrame, directory: str | Path) -> Path:
    """Save the edited model as a Hugging Face directory with ``edit.json`` and a model card that says what was done and measured; all
    of it or nothing."""
    edited = edits.apply(lm, finding.plan)
    norms = edits.column_norms(lm, edited, finding.plan)
    about = {"plan": finding.plan, "norms": norms, "parent": lm.fingerprint, "fingerprint": edited.fingerprint}
    card = report.model_card(lm.name, finding.plan, plan_table(finding), report.board(summary), on=report.judged_on(measured))
    with store.atomic_directory(directory) as partial:
        edited.save(partial)
        store.write_json(about, partial / "edit.json")
        store.save(finding.direction, partial / "direction.safetensors")
        store.write_text(card, partial / "README.md")
    return Path(directory)


STRENGTHS = tuple(3 * i / 8 for i in range(-4, 5))  # of the heads' own direction, 1 being the difference between the classes: ours
DOSE = 0.5  # of the same: ours


DEMO = Settings(fraction=0.06)
"""Two of the tiny reasoner's 32 heads; the published lists hold 3.9 to 6.3 % of the heads."""


def demo(lm: LM, study: Study, directory: str | Path, *, settings: Settings = DEMO, say: Say = lambda text: None) -> pd.DataFrame:
    """The main job: find the direction and the heads, edit, save, steer, compare with controls, write everything down.

    The edited checkpoint and the steering are our form of the method; the report shows the published one beside it.
    Writes into ``directory``: ``rollouts/``, ``direction.safetensors``, ``heads.json``, ``edited/``, ``report.json``,
    ``rows.parquet`` and ``report.html``; given again after a stop, finished rollouts are kept. Returns the summary table.
    """
    out = store.writable(directory)
    found = extraction_rollouts(lm, study, out=out / "rollouts" / "train", say=say)
    say("averaging activations: directions and head scores")
    findings = {name: find(lm, found, settings, name, origin=study.origin("train")) for name in FORMS}
    saved = is_saved(lm, findings[OURS], out / "edited")  # before the long part: another model there is an error
    v = findings[OURS].plan.direction or findings[OURS].direction
    store.save(findings[OURS].direction, out / "direction.safetensors")
    heads = {name: {"scores": f.scores, "edited": plan_table(f).reset_index().to_dict("records")} for name, f in findings.items()}
    store.write_json(heads, out / "heads.json")
    say("comparing base, edits, steering and random controls on held-out problems")
    judged = conditions(lm, findings, settings) | steered(lm, v, settings)
    measured = evaluate.compare(judged, study.load("test", lm), study.sampling, out=out / "rollouts" / "test")
    summary = report.write(out, measured, seed=study.seed, settings=settings)
    if not saved:
        save_edited(lm, findings[OURS], measured, summary, out / "edited")
    say("dose-response of steering")
    both = {"length direction": v, doses.RANDOM: directions.random_like(v, seed=settings.seed)}
    few = study.load("dev", lm)[: max(40, study.problems // 4)]
    swept = doses.sweep(lm, both, few, replace(study.sampling, n=4), doses.Sweep(STRENGTHS), out=out / "rollouts" / "doses")
    store.write_json(swept.table.to_dict("records"), out / "doses.json")
    table = report.board(summary)
    report.page(
        f"Editing the thinking length of {lm.name}",
        _intro(study, measured),
        table,
        _sections(findings, found, settings, summary, swept),
        out / "report.html",
    )
    return summary


def steered(lm: LM, v: Direction, settings: Settings) -> dict[str, Condition]:
    """Steering along a direction, shorter and longer, and along its random control."""
    noise = directions.random_like(v, seed=settings.seed)
    doses = {"steered shorter": (v, -DOSE), "steered longer": (v, DOSE), "steered randomly": (noise, DOSE)}
    return {name: Condition(lm, (steering(d, a),), note=str(steering(d, a))) for name, (d, a) in doses.items()}


def _intro(study: Study, measured: Report) -> str:
    return (
        f"{report.judged_on(measured)} {study.samples} samples each at temperature 1, the same random numbers for every "
        "model. Each cell: the mean and, in brackets, the paired difference to base with its 95 % bootstrap interval over problems."
    )


def _sections(
    findings: Mapping[str, Finding], found: Sequence[Rollout], settings: Settings, summary: pd.DataFrame, swept: doses.Doses
) -> list[Section]:
    apart = {name: directions.separation(f.moments, f.direction).tolist() for name, f in findings.items()}
    maps = tuple(
        figures.head_scores(f.scores, f.plan).update_layout(title_text=f"{name}: head scores; outlined: edited")
        for name, f in findings.items()
    )
    return [
        Section(
            "How long it thinks",
            "Rollouts the direction is found on, by length class.",
            (figures.length_distribution(found, settings.classes(found)),),
        ),
        Section(
            "Where length shows",
            "How far long and short thinking lie apart along each direction, in within-class standard deviations of a position.",
            (figures.by_layer(apart, "Separation of long and short thinking", "d'"),),
        ),
        Section("Which heads write it", "High: the head writes towards short in short thinking.", maps),
        Section(
            "What the edit does",
            "Where an interval crosses zero, no effect is detectable at this size. Random controls edit other heads of the same layers, or the same heads along random directions of those they can write.",
            tuple(figures.differences(summary, m) for m in ("accuracy", "shortest_20", "shortest_20_same", "think_tokens")),
        ),
        Section("Accuracy against length", "Every condition with 95 % intervals both ways.", (figures.length_accuracy(summary),)),
        Section(
            "Steering",
            "The heads' own part of the length direction, added at every position, against a random one of equal norm. Strength 1 is the difference between long and short thinking.",
            (figures.dose_response(swept.table), figures.damage(swept.table)),
        ),
    ]
