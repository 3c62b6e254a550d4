"""Measures of episodes are those of their responses, sampled once; the direction of calling separates episodes by their calls."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from toolkit import collect, directions, figures, generate, jobs, lm, tasks
from toolkit.generate import Sampling
from toolkit.jobs import searching
from toolkit.types import Span

SAMPLING = Sampling(n=2, max_new_tokens=80, seed=3)


@pytest.fixture(scope="module")
def searcher():
    return lm.load("tiny-searcher", device="cpu")


@pytest.fixture(scope="module")
def problems():
    return tasks.load("searching", "test", n=6)


def test_every_measure_is_the_mean_of_the_same_responses(searcher, problems, monkeypatch):
    base = lm.Condition(searcher, tools=tasks.searching.toolbox())
    episodes = generate.rollouts(base, problems, SAMPLING, progress=False)
    calls = []
    sample = generate.rollouts
    monkeypatch.setattr(generate, "rollouts", lambda *a, **k: calls.append(a) or sample(*a, **k))
    measured = {name: measure(base, problems) for name, measure in jobs.episode_measures(SAMPLING).items()}
    assert len(calls) == 1
    for name, of in (
        ("calls", lambda r: r.text.count("<result>")),
        ("tokens", lambda r: len(r.token_ids) - r.prompt_len - sum(s.stop - s.start for s in r.results)),
        ("accuracy", lambda r: float(r.correct)),
    ):
        for at, problem in enumerate(problems):
            assert measured[name][at] == np.mean([of(r) for r in episodes if r.problem_id == problem.id]), name
    assert measured["calls"].sum() > 0


def test_an_arm_with_tools_calls_them_and_its_controls_too(searcher, problems):
    direction = directions.random_like(jobs.calls_direction(searcher, _episodes(searcher, problems)), seed=0)
    arm = jobs.steering_arm(searcher, direction, 0.0, draws=2)
    equipped = jobs.with_tools(arm, tasks.searching.toolbox())
    measure = jobs.episode_measures(SAMPLING)["calls"]
    assert measure(arm.treated, problems).sum() == 0
    base = measure(lm.Condition(searcher, tools=tasks.searching.toolbox()), problems)
    for condition in (equipped.treated, *equipped.controls):
        assert measure(condition, problems).tolist() == base.tolist(), "a strength of 0 changes nothing"


def _episodes(searcher, problems):
    base = lm.Condition(searcher, tools=tasks.searching.toolbox())
    return generate.rollouts(base, problems, Sampling(n=16, max_new_tokens=120, seed=0), progress=False)


def test_episodes_with_many_calls_lie_further_along_the_direction_of_calling(searcher, problems):
    """On other problems than those the direction is from."""
    direction = jobs.calls_direction(searcher, _episodes(searcher, problems))
    others = _episodes(searcher, tasks.load("searching", "dev", n=6))
    states = collect.states(searcher, others, "resid_post", by=lambda r: "many" if len(r.results) > 1 else "few")
    along = (states.values * direction.unit()[None]).sum(-1).numpy()
    many = (states.rows["label"] == "many").to_numpy()
    assert (along[many].mean(0) > along[~many].mean(0)).all()


def test_too_few_episodes_of_a_kind_are_refused_with_the_counts(searcher, problems):
    episodes = _episodes(searcher, problems)
    silent = [replace(r, results=()) for r in episodes]
    with pytest.raises(ValueError, match="'many calls': 0, 'no call': 96"):
        jobs.calls_direction(searcher, silent)
    assert searching.EPISODES["calls"][1](replace(episodes[0], results=(Span(1, 2), Span(3, 4)))) == 2


def test_the_figure_of_prices_shows_every_arm_in_both_panels_and_names_it():
    def e(mean):
        return {"mean": mean, "low": mean - 0.01, "high": mean + 0.02}

    arms = {f"arm {i}": {"accuracy": e(0.5 + 0.05 * i), "calls": e(1 + i / 4), "tokens": e(20.0 - i)} for i in range(4)}
    figure = figures.price_of_accuracy(arms, base="arm 0", controls=("arm 3",))
    for axis, price in (("x", "calls"), ("x2", "tokens")):
        drawn = {t.name: (t.x[0], t.y[0], t.marker.color) for t in figure.data if t.xaxis == axis}
        assert {name: values[:2] for name, values in drawn.items()} == {
            name: (row[price]["mean"], row["accuracy"]["mean"]) for name, row in arms.items()
        }
        assert len({colour for *_, colour in drawn.values()}) == 4
        named = {a.name: (a.x, a.y) for a in figure.layout.annotations if a.xref == axis}
        assert named == {name: values[:2] for name, values in drawn.items()}
