"""Answer the questions of ``questions.toml`` from the responses of ``sample.py``: ``python data/questions/measure.py``.

Writes ``results.json``, ``figure.png`` and the tables of ``README.md`` here. ``--plan`` writes only the table of questions, with the power that
is expected of them; that table was committed before anything was measured.

A question has one or two effects, each between two conditions and paired by problem. Each has a smallest size that matters, or a limit that it
must exceed. ``claims.Claim.verdict`` judges it by its 95 % interval over problems and seeds. The answer is *yes* if all effects are
reproduced, *no* if one is judged to be absent, contradicted or too small to matter, else *undecided*.

Expected power: ``problem_sd`` and ``seed_sd`` of an effect are the standard deviations of its differences over problems (from pilots on the
dev split, with other seeds of training) and over seeds (a guess).
"""

from __future__ import annotations

import argparse
import math
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy import ndarray
from plotly.subplots import make_subplots

from toolkit import difficulty, report, stats, store
from toolkit.claims import Claim
from toolkit.figures.base import COLOURS, CONTROL, error_bars, styled
from toolkit.metrics import described, with_interval
from toolkit.stats import Estimate

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import publish  # noqa: E402

sampler = publish.script("questions/sample.py")
YES, NO, UNDECIDED = "yes", "no", "undecided"
ANSWERS = {"reproduced": YES, "undecided": UNDECIDED}  # every other verdict is a no
METRICS = {"accuracy": "correct", "think_tokens": "think_tokens"}


@dataclass(frozen=True, kw_only=True)
class Effect:
    """One effect of a question: ``sign`` times (``of`` minus ``minus``), on a task.

    Attributes:
        of: Name of a condition.
        minus: Name of the condition that is subtracted.
        task: Task on whose problems both are judged.
        metric: ``accuracy`` or ``think_tokens``.
        sign: -1 for an effect that a lower value means, such as shorter thinking.
        smallest: Smallest size that matters, tokens or share.
        beyond: Limit that the effect must exceed, such as -0.03: a loss of less than 3 points.
        level: ``""``, or ``hard minus easy``: how much larger the difference is on hard than on easy problems.
        problem_sd: Expected standard deviation of the difference over problems.
        seed_sd: Expected standard deviation over seeds; 0 if nothing is random or trained.
    """

    of: str
    minus: str
    task: str
    metric: str
    sign: int = 1
    smallest: float = 0.0
    beyond: float = 0.0
    level: str = ""
    problem_sd: float
    seed_sd: float

    @property
    def text(self) -> str:
        """The effect in words."""
        first, second = (self.of, self.minus) if self.sign > 0 else (self.minus, self.of)
        return f"{first} minus {second}, {described(self.metric).label}, {self.task}{f', {self.level}' if self.level else ''}"

    def claim(self, estimate: Estimate) -> Claim:
        """Return the effect as a claim with an estimate."""
        unit = "points" if self.metric == "accuracy" else "tokens"
        return Claim(text=self.text, source="", estimate=estimate, smallest=self.smallest, unit=unit, beyond=self.beyond)

    @property
    def expected(self) -> Claim:
        """The effect with the interval that is expected of it, around 0."""
        problems, seeds = sampler.TESTS[self.task], max(sampler.CONDITIONS[name][0] for name in (self.of, self.minus))
        # Hard and easy problems are about a third of the problems each, and their means are subtracted: 3 + 3 times the variance.
        factor = 6 if self.level else 1
        half = stats.half_width(0.05, factor * self.problem_sd**2 / problems, self.seed_sd**2 / seeds, problems, seeds)
        return self.claim(Estimate(0.0, -float(half), float(half)))


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question with its effects, and in words what would change its answer."""

    text: str
    change: str
    effects: tuple[Effect, ...]


def questions() -> list[Question]:
    """Return the questions of ``questions.toml``."""
    content = tomllib.loads("\n".join(store.read_lines(HERE / "questions.toml")))
    return [
        Question(text=q["text"], change=q["change"], effects=tuple(Effect(**e) for e in q["effects"])) for q in content["question"]
    ]


def answer(claims: Sequence[Claim]) -> str:
    """Return the answer by the rule of the module's docstring."""
    answers = [ANSWERS.get(claim.verdict, NO) for claim in claims]
    return NO if NO in answers else UNDECIDED if UNDECIDED in answers else YES


def turning(claims: Sequence[Claim]) -> str:
    """Return the smallest shift of one estimate, with its interval, that would change the answer, in words."""
    shifts = []
    for i, claim in enumerate(claims):
        e, width = claim.estimate, claim.estimate.high - claim.estimate.low
        for size in np.linspace(0, 4 * max(width, abs(e.mean)), 2001)[1:]:
            for shift in (size, -size):
                moved = replace(claim, estimate=Estimate(e.mean + shift, e.low + shift, e.high + shift))
                other = answer([*claims[:i], moved, *claims[i + 1 :]])
                if other != answer(claims):
                    shifts.append((size / width, shift, other, claim))
                    break
            else:
                continue
            break
    if not shifts:
        return "No shift of a single estimate would change it."
    _, shift, other, claim = min(shifts, key=lambda s: s[0])
    scale, unit = (100, "points") if claim.unit == "points" else (1, claim.unit)
    return f"{other}, if *{claim.text}* were {abs(scale * shift):.1f} {unit} {'higher' if shift > 0 else 'lower'}"


@lru_cache
def values(name: str, task: str) -> dict[str, ndarray]:
    """Return accuracy and think tokens of a condition, ``[seeds, problems, samples]``, and the levels, ``[problems]``."""
    found: dict[str, list[ndarray]] = {metric: [] for metric in METRICS}
    for seed in range(sampler.CONDITIONS[name][0]):
        rows = sampler.responses(name, seed)
        rows = rows[rows["task"] == task].sort_values(["problem_id", "sample"])
        for metric, column in METRICS.items():
            found[metric].append(rows[column].to_numpy(float).reshape(-1, sampler.SAMPLES))
    levels = difficulty.levels_of(rows).sort_index().to_numpy(str)
    return {metric: np.array(v) for metric, v in found.items()} | {"levels": levels}


def differences(of: str, minus: str, task: str, metric: str) -> ndarray:
    """Return the paired differences, ``[seeds, problems, samples]``; a condition without seeds is paired with every seed of the other."""
    return values(of, task)[metric] - values(minus, task)[metric]


def estimated(rows: ndarray, task: str, level: str = "", *, seeded: bool = False) -> stats.Effect:
    """Return the mean of ``[seeds, problems, samples]`` with its interval over problems and seeds, for one level or between two."""
    levels = values(sampler.BASE, task)["levels"]

    def of(v: ndarray, name: str) -> stats.Statistic:
        chosen = (levels == name) if name else np.ones(len(levels), bool)
        return stats.mean_where(v, np.repeat(chosen[:, None], v.shape[1], axis=1))

    def statistic(v: ndarray) -> stats.Statistic:
        if level == difficulty.HARDER:
            return stats.difference(of(v, difficulty.LEVELS[-1]), of(v, difficulty.LEVELS[0]))
        return of(v, level)

    return stats.effect([statistic(v) for v in rows], rows.shape[1], seeded=seeded or len(rows) > 1)


def measured(e: Effect) -> Claim:
    """Return the claim of an effect with its estimate."""
    return e.claim(estimated(e.sign * differences(e.of, e.minus, e.task, e.metric), e.task, e.level))


def conditions_of() -> dict[str, Any]:
    """Return accuracy and think tokens of every condition and task, their differences from base, and those by level of difficulty."""
    rows: dict[str, Any] = {}
    for name in sampler.CONDITIONS:
        rows[name] = {}
        for task in sampler.TESTS:
            rows[name][task] = {}
            for metric in METRICS:
                own, minus = values(name, task)[metric], differences(name, sampler.BASE, task, metric)
                by_level = (
                    {}
                    if task != "arithmetic"
                    else {k: bare(estimated(minus, task, k)) for k in (*difficulty.LEVELS, difficulty.HARDER)}
                )
                levels = {} if task != "arithmetic" else {k: bare(estimated(own, task, k)) for k in difficulty.LEVELS}
                whole = {"mean": bare(estimated(own, task)), "minus base": bare(estimated(minus, task))}
                rows[name][task][metric] = {**whole, "by level": levels, "by level, minus base": by_level}
    return rows


def bare(e: Estimate) -> dict[str, float]:
    """Return mean and interval as a mapping for JSON."""
    return {"mean": e.mean, "low": e.low, "high": e.high}


def cell(e: Mapping[str, float], metric: str, sign: str = "") -> str:
    """Return an estimate with its interval as text."""
    return with_interval(e["mean"], e["low"], e["high"], described(metric).unit, sign=sign)


def plan_table() -> str:
    """Return the questions with the size that matters and the power expected, as Markdown."""
    rows = []
    for number, question in enumerate(questions(), 1):
        for i, e in enumerate(question.effects):
            expected, scale = e.expected, 100 if e.metric == "accuracy" else 1
            unit = "points" if e.metric == "accuracy" else "tokens"
            rows.append({
                "question": f"{number}. {question.text}" if i == 0 else "", "effect": e.text,
                "counts if": f"> {scale * e.beyond:g} {unit}" if e.beyond else f">= {scale * e.smallest:g} {unit}",
                "detectable": f"{scale * expected.detectable:.1f} {unit}", "power": f"{100 * expected.power:.0f} %",
            })  # fmt: skip
    said = "\n".join(f"{number}. {question.text} *{question.change}*" for number, question in enumerate(questions(), 1))
    return f"{report.markdown(pd.DataFrame(rows).set_index('question'))}\n\nWhat would change the answers, written before the measurement:\n\n{said}"


def tables(found: Mapping[str, Any]) -> str:
    """Return the answers, the conditions on every task, and the levels of difficulty, as Markdown."""
    rows = [
        {
            "question": f"{number}. {a['question']}" if i == 0 else "", "answer": a["answer"] if i == 0 else "", "effect": e["text"],
            "estimate": e["estimate"], "verdict": e["verdict"], "detectable": e["detectable"], "the answer would be": a["turns"] if i == 0 else "",
        }
        for number, a in enumerate(found["answers"], 1)
        for i, e in enumerate(a["effects"])
    ]  # fmt: skip
    parts = [report.markdown(pd.DataFrame(rows).set_index("question"))]
    for metric in METRICS:
        label = described(metric).label
        whole = {
            name: {task: cell(about[task][metric]["mean"], metric) if name == sampler.BASE else cell(about[task][metric]["minus base"], metric, "+") for task in sampler.TESTS}
            for name, about in found["conditions"].items()
        }  # fmt: skip
        parts.append(report.markdown(pd.DataFrame(whole).T.rename_axis(f"{label}: base, and minus base")))
    for metric in METRICS:
        label = described(metric).label
        levels = {
            name: {
                level: cell(about["arithmetic"][metric]["by level"][level], metric) if name == sampler.BASE and level in difficulty.LEVELS
                else "" if name == sampler.BASE else cell(about["arithmetic"][metric]["by level, minus base"][level], metric, "+")
                for level in (*difficulty.LEVELS, difficulty.HARDER)
            }
            for name, about in found["conditions"].items()
        }  # fmt: skip
        parts.append(
            report.markdown(pd.DataFrame(levels).T.rename_axis(f"arithmetic by difficulty, {label}: base, and minus base"))
        )
    return "\n\n".join(parts)


def figure(found: Mapping[str, Any]) -> go.Figure:
    """Return the differences from base on every task: one panel per metric, one mark per condition and task."""
    drawn = make_subplots(rows=1, cols=2, shared_yaxes=True, subplot_titles=("accuracy, points", "think tokens"))
    names = [name for name in found["conditions"] if name != sampler.BASE]
    for column, metric in enumerate(METRICS, 1):
        scale = 100 if metric == "accuracy" else 1
        for i, task in enumerate(sampler.TESTS):
            es = [found["conditions"][name][task][metric]["minus base"] for name in names]
            mean, low, high = ([scale * e[k] for e in es] for k in ("mean", "low", "high"))
            places = [n + 0.22 * (i - 1) for n in range(len(names))]
            drawn.add_scatter(
                x=mean, y=places, mode="markers", name=task, legendgroup=task, showlegend=column == 1,
                marker={"color": COLOURS[i], "size": 8, "symbol": ["x" if n.startswith("control") else "circle" for n in names]},
                error_x=error_bars(mean, low, high, COLOURS[i]), row=1, col=column,
            )  # fmt: skip
        drawn.add_vline(x=0, line={"color": CONTROL}, row=1, col=column)
    drawn.update_yaxes(tickvals=list(range(len(names))), ticktext=names, automargin=True, autorange="reversed")
    return styled(
        drawn,
        "Conditions minus base on arithmetic and on tasks that nothing was trained on",
        legend={"orientation": "h", "y": -0.12},
    ).update_layout(margin={"t": 90})


def answered() -> list[dict[str, Any]]:
    """Return the answer to every question, with its effects and what would have changed it."""
    rows = []
    for question in questions():
        claims = [measured(e) for e in question.effects]
        effects = [
            {"text": c.text, "estimate": c.row[2], "verdict": c.verdict, "detectable": c.row[4], **bare(c.estimate), "power": None if math.isnan(c.power) else c.power}
            for c in claims
        ]  # fmt: skip
        rows.append({"question": question.text, "answer": answer(claims), "turns": turning(claims), "effects": effects})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer the questions of questions.toml.")
    parser.add_argument("--plan", action="store_true", help="write only the questions and the power expected")
    planned = parser.parse_args().plan
    publish.splice("plan", plan_table(), HERE / "README.md")
    if planned:
        return
    found = {"answers": answered(), "conditions": conditions_of()}
    sizes = {
        "tests": sampler.TESTS,
        "samples": sampler.SAMPLES,
        "seeds": sampler.SEEDS,
        "steps": sampler.STEPS,
        "batch": sampler.BATCH,
    }
    store.write_json(
        {"made_by": store.made_by(sampler.CODE), "sizes": sizes, "fingerprint": sampler.ground().lm.fingerprint, **found},
        HERE / "results.json",
    )
    publish.draw(figure(found), HERE / "figure.png", 1000, 620)
    publish.splice("answers", tables(found), HERE / "README.md")


if __name__ == "__main__":
    main()
