"""Why do conditions of the board think longer or shorter, and how much of that is one direction or two heads? ``python data/why/measure.py``.

Writes ``results.json``, figures and the tables in ``README.md`` here. Policies are trained by ``train.py`` (about 10 minutes on an idle core),
answers are kept in ``runs/why``, so after a stop the same command goes on. ``--without-training`` measures only what needs no policy; what
is not measured yet is named in the tables.

*Reasons*: for single conditions, ``toolkit.jobs.why`` says which heads changed, along which directions, and in which steps; and how much of
the change is undone if only the two heads with the largest effects are put back to base. Controls: random heads of the same layers.

*Parts*: one recipe, the naive length penalty, trains every weight, one vector per layer, two heads, or two random heads (control), from three
seeds each. The trained vector is compared with the found length direction (``jobs.trained_vector``); controls are random directions.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch

from toolkit import edits, figures, report, store, tasks
from toolkit.figures.base import COLOURS, CONTROL, error_bars, styled
from toolkit.generate import Sampling, rollouts
from toolkit.jobs import WhySettings, find_reasons, trained_vector
from toolkit.jobs.finding import DirectionRecipe, EditSettings, extract_direction
from toolkit.jobs.verdicts import of_reasons
from toolkit.lm import Condition
from toolkit.metrics import with_interval

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import publish  # noqa: E402

trainer = publish.script("why/train.py")
DEV, TEST, SAMPLING, SETTINGS = 30, 60, Sampling(n=2, max_new_tokens=200), WhySettings(pairs=30)
JUDGED, JUDGING = 80, Sampling(n=2, max_new_tokens=200)
METRICS = {"tokens": "tokens", "right": "share"}
EDITED = "ThinkEdit (ours)"
CODE = store.code_of(
    "toolkit.jobs.why", "toolkit.jobs.trained_vector", "toolkit.jobs.finding", "toolkit.grpo.policies", "toolkit.grpo.parts",
    "toolkit.grpo.recipes:plain", "toolkit.grpo.recipes:laser_d", "toolkit.grpo.recipes:hapo", "toolkit.grpo.recipes:grpo_lambda",
    "toolkit.grpo.recipes:surrogate", "toolkit.rewards.correctness", "toolkit.rewards.laser", "toolkit.rewards.hapo", "toolkit.rewards.grpo_lambda",
    "toolkit.rewards.surrogate", "toolkit.tasks.arithmetic",
)  # fmt: skip
"""Key of the code that this script and ``train.py`` use."""


def direction() -> Any:
    """Return the length direction of base at the output of the blocks, where vectors are trained."""
    return extract_direction(trainer.base(), trainer.responses(), EditSettings(), DirectionRecipe(site="resid_post"))[0]


def free() -> dict[str, Callable[[], Condition]]:
    """Return the conditions that need no training."""
    return {EDITED: lambda: Condition(edits.apply(trainer.base(), trainer.finding().plan))}


def trained() -> dict[str, Callable[[], Condition]]:
    """Return the trained conditions: the worst two policies of the board, and the best three."""
    recipes = {"naive length penalty": lambda: trainer.RECIPE, **trainer.WORST, **trainer.BEST}
    return {name: lambda make=make: as_condition(trainer.trained(make(), 0).policy) for name, make in recipes.items()}


def as_condition(policy: Any) -> Condition:
    """Return a trained policy as a condition."""
    return policy if isinstance(policy, Condition) else Condition(policy)


def reasons(name: str, make: Callable[[], Condition], work: Path) -> dict[str, Any]:
    """Return the tables and the verdict for one condition, computed if they are not kept. Draws its figure."""
    path = work / f"{store.safe_name(name)}.json"
    if not path.is_file():
        problems = {"dev": tasks.load("arithmetic", "dev", DEV), "test": tasks.load("arithmetic", "test", TEST)}
        found = find_reasons(
            Condition(trainer.base()), make(), direction(), problems, SAMPLING, SETTINGS, out=work / store.safe_name(name)
        )
        store.write_json({k: report.json_records(t) for k, t in found.tables.items()}, path)
    kept = {k: pd.DataFrame(rows) for k, rows in store.read_json(path, {}).items()}
    tables = {k: table.where(table.notna(), np.nan).infer_objects() for k, table in kept.items()}  # JSON has None for NaN
    publish.draw(figures.reasons(tables, f"Why: {name}"), HERE / f"{store.safe_name(name)}.png", 1000, 640)
    return {"verdict": of_reasons(tables), "tables": {k: report.json_records(t) for k, t in tables.items()}}


def judged(name: str, condition: Condition, work: Path) -> dict[str, list[float]]:
    """Return one number per test problem and metric."""
    path = work / f"judged-{store.safe_name(name)}.json"
    if not path.is_file():
        sampled = rollouts(condition, tasks.load("arithmetic", "test", JUDGED), JUDGING)
        table = pd.DataFrame({"problem": r.problem_id, "right": r.correct, "tokens": r.think_tokens} for r in sampled)
        means = table.groupby("problem", sort=False).mean()
        store.write_json({m: means[m].astype(float).tolist() for m in METRICS}, path)
    return store.read_json(path, dict[str, list[float]])


def compared(work: Path, seeds: tuple[int, ...]) -> dict[str, Any]:
    """Return what each trained part changes, and what the trained vector and the found direction explain of one another."""
    lm, arms = trainer.base(), (trainer.ALL, trainer.VECTOR, trainer.HEADS, trainer.RANDOM)
    base = judged("base", Condition(lm), work)
    values = {arm: [judged(f"{arm}-{s}", as_condition(trainer.policy(arm, s).policy), work) for s in seeds] for arm in arms}
    rows: dict[str, Any] = {"base": {m: publish.estimate([base[m]], unit=unit) for m, unit in METRICS.items()}}
    for arm, by_seed in values.items():
        rows[arm] = {m: publish.estimate([v[m] for v in by_seed], unit=unit) for m, unit in METRICS.items()}
        against = {m: [base[m]] * len(by_seed) for m in METRICS}
        rows[arm]["minus base"] = {m: publish.estimate([v[m] for v in by_seed], against[m], unit=u) for m, u in METRICS.items()}
        if arm != trainer.RANDOM:
            control = {m: [v[m] for v in values[trainer.RANDOM]] for m in METRICS}
            rows[arm]["minus two random heads"] = {
                m: publish.estimate([v[m] for v in by_seed], control[m], unit=u) for m, u in METRICS.items()
            }
        rows[arm]["rate"] = trainer.rate(arm)
    d = lm.layout
    size = trainer.HEADS, trainer.RANDOM
    rows[trainer.ALL]["parameters"] = sum(p.numel() for p in lm.model.parameters())
    rows[trainer.VECTOR]["parameters"] = d.n_layers * d.d_model
    rows |= {arm: {**rows[arm], "parameters": 2 * d.d_model * d.head_dim} for arm in size}
    act = trainer.policy(trainer.VECTOR, 0).policy.during[0]
    problems = tasks.load("arithmetic", "test", TEST)
    table = trained_vector.explained(lm, act, direction(), problems, SAMPLING, out=work / "explained")
    return {"seeds": seeds, "arms": rows, "explained": report.json_records(table)}


def reason_table(found: Mapping[str, Any]) -> str:
    """Return one row per condition: change of length and accuracy, the two heads, and the share of the change that they make."""
    rows = {}
    for name, about in found.items():
        undo = pd.DataFrame(about["tables"]["undo"]).set_index(["heads", "way", "measure"])
        row = {}
        for measure, unit, label in (("think_tokens", "tokens", "tokens"), ("correct", "share", "points")):
            whole = undo.loc["whole change", "", measure]
            row[f"change, {label}"] = with_interval(whole["change"], whole["change_low"], whole["change_high"], unit, sign="+")
        row["two heads"] = undo.loc["top", "alone", "correct"]["which"]
        for way in ("put back", "alone"):
            for heads in ("top", "random"):
                rs = undo[[h.startswith(heads) and (w, m) == (way, "think_tokens") for h, w, m in undo.index]]
                row[f"{'two heads' if heads == 'top' else 'random heads'} {way}, tokens"] = "; ".join(
                    with_interval(r["change"], r["change_low"], r["change_high"], "tokens", sign="+") for _, r in rs.iterrows()
                )
        rows[name] = row
    said = "\n".join(f"- *{name}*: {' '.join(about['verdict'])}" for name, about in found.items())
    return f"{report.markdown(pd.DataFrame(rows).T.rename_axis('condition'))}\n\n{said}"


def part_tables(found: Mapping[str, Any]) -> str:
    """Return the tables of the trained parts, and of the trained vector beside the found direction."""

    def cell(e: Mapping[str, float], metric: str, sign: str = "") -> str:
        return with_interval(e["mean"], e["low"], e["high"], METRICS[metric], sign=sign)

    rows = {}
    for arm, about in found["arms"].items():
        row = {"parameters": f"{about['parameters']:,}" if "parameters" in about else "", "tokens": cell(about["tokens"], "tokens")}
        row["right, %"] = cell(about["right"], "right")
        for other in ("minus base", "minus two random heads"):
            row[f"tokens {other}"] = cell(about[other]["tokens"], "tokens", "+") if other in about else ""
        rows[arm] = row
    explained = pd.DataFrame(found["explained"]).set_index(["whole", "part"])
    lines = {
        f"{whole}, {part}": {
            "cosine": f"{e['cosine']:.2f}",
            "effect, tokens": with_interval(e["effect"], e["effect_low"], e["effect_high"], "tokens", sign="+"),
            "right, %": f"{100 * e['accuracy']:.1f}",
        }
        for (whole, part), e in explained.iterrows()
    }
    frames = pd.DataFrame(rows).T.rename_axis("trained part"), pd.DataFrame(lines).T.rename_axis("added direction")
    few = "One seed: intervals are over problems only." if len(found["seeds"]) == 1 else f"Seeds: {len(found['seeds'])}."
    return "\n\n".join([few, *map(report.markdown, frames)])


def part_figure(found: Mapping[str, Any]) -> go.Figure:
    """Return the change in length against the number of trained parameters, one mark per part."""
    drawn = go.Figure()
    arms = [arm for arm in found["arms"] if arm != "base"]
    for arm, colour in zip(arms, (*COLOURS[:3], CONTROL), strict=True):
        e, size = found["arms"][arm]["minus base"]["tokens"], found["arms"][arm]["parameters"]
        bars = error_bars([e["mean"]], [e["low"]], [e["high"]], colour)
        drawn.add_scatter(x=[size], y=[e["mean"]], error_y=bars, name=arm, mode="markers", marker={"size": 11, "color": colour})
    drawn.update_xaxes(title="trained parameters", type="log").update_yaxes(title="think tokens minus base", rangemode="tozero")
    return styled(drawn, "What a length penalty does through parts of the model")


def written(found: Mapping[str, Any], fingerprint: str) -> None:
    """Write the results so far: ``results.json``, the figure of the parts, and the tables of ``README.md``."""
    missing = "Not measured yet: run the command without `--without-training`."
    publish.splice("reasons", reason_table(found["reasons"]), HERE / "README.md")
    publish.splice("parts", part_tables(found["parts"]) if "parts" in found else missing, HERE / "README.md")
    if "parts" in found:
        publish.draw(part_figure(found["parts"]), HERE / "parts.png", 800, 420)
    sizes = {
        "dev": DEV, "test": TEST, "samples": SAMPLING.n, "pairs": SETTINGS.pairs, "draws": SETTINGS.draws, "steps": trainer.STEPS,
        "batch": trainer.BATCH,
    }  # fmt: skip
    store.write_json({"made_by": store.made_by(CODE), "sizes": sizes, "fingerprint": fingerprint, **found}, HERE / "results.json")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure why conditions think longer or shorter.")
    parser.add_argument("--without-training", action="store_true", help="measure only what needs no trained policy")
    parser.add_argument("--seeds", type=int, default=len(trainer.SEEDS), help="number of seeds of the trained parts")
    options = parser.parse_args()
    seeds = trainer.SEEDS[: options.seeds]
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    fingerprint = trainer.base().fingerprint
    work, found = publish.work_folder(__file__, CODE, fingerprint, scripts=("why/train.py",)), {"reasons": {}}
    for name, make in (free() | ({} if options.without_training else trained())).items():
        if name in trainer.BEST and "parts" not in found:
            found["parts"] = compared(work, seeds)
        found["reasons"][name] = reasons(name, make, work)
        written(found, fingerprint)  # after each part, since all of them take time


if __name__ == "__main__":
    main()
