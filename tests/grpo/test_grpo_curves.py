"""Learning curves: the figures, the live one, and the committed sweep, which is of the shipped model and the recipes as they are."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from toolkit import figures, store
from toolkit.grpo import curves, recipes
from toolkit.grpo.plan import TrainingPlan
from toolkit.grpo.recipe import with_defaults
from toolkit.jobs import grpo as jobs

FOLDER = Path(__file__).parents[2] / "data" / "grpo"


def log(values, steps=None) -> pd.DataFrame:
    return pd.DataFrame({"step": steps or range(len(values)), "held_out/accuracy": values})


@pytest.mark.parametrize("place", [0, 1, 7, 12, None])
def test_every_trained_model_has_a_marker_of_its_own_wherever_base_is(place):
    """None: a table without base. The other models look the same in all five tables."""
    names = [f"model {i}" for i in range(12)]
    order = names if place is None else [*names[:place], "base", *names[place:]]
    rows = [{"name": name, "think_tokens": i, "accuracy": 0.5} for i, name in enumerate(order)]
    ends = {f"{column}_{end}": 0.5 for column in ("think_tokens", "accuracy") for end in ("low", "high")}
    figure = figures.length_against_accuracy(pd.DataFrame(rows).assign(**ends))
    looks = {trace.name: (trace.marker.symbol, trace.marker.color) for trace in figure.data}
    assert looks.pop("base", ("x", "black")) == ("x", "black")
    assert list(looks) == names and len(set(looks.values())) == 12
    colours = figures.base.COLOURS
    assert [looks[name] for name in names] == [("circle", c) for c in colours] + [
        ("square", c) for c in colours[: 12 - len(colours)]
    ]


def test_seeds_are_drawn_as_their_mean_and_range_over_the_steps_they_share():
    first, second = log([0.2, None, 0.6]), log([0.4, 0.5, 0.8])
    figure = figures.learning_curves({"a": [first, second], "b": log([0.1, 0.2, 0.3])}, ["held_out/accuracy"])
    lines = {trace.name: trace for trace in figure.data if trace.showlegend}
    assert list(lines["a"].x) == [0, 2] and lines["a"].y == pytest.approx((0.3, 0.7))
    (band,) = (trace for trace in figure.data if trace.fill == "toself")
    assert band.y == pytest.approx((0.4, 0.8, 0.6, 0.2))


def test_a_metric_that_no_log_has_leaves_its_panel_empty():
    assert not figures.learning_curves({"a": log([0.1])}, ["kl"]).data


def test_the_live_figure_is_shown_once_and_then_updated(monkeypatch):
    from toolkit import widgets

    shown, updates = [], []
    handle = SimpleNamespace(update=lambda picture, raw: updates.append(picture))
    monkeypatch.setattr("IPython.display.display", lambda picture, raw, display_id: shown.append(picture) or handle)
    live = widgets.live(every=2, metrics=["accuracy"])
    for step in range(1, 6):
        state = SimpleNamespace(global_step=step, max_steps=5, is_world_process_zero=True)
        live.on_log(None, state, None, {"loss": 0.0, "accuracy": step / 10})
    assert len(shown) == 1 and len(updates) == 2  # steps 2, 4 and the last
    (newest,) = updates[-1].values()
    assert newest["data"][0]["y"] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


@pytest.fixture(scope="module")
def committed():
    return {file: store.read_rows(file) for file in sorted(FOLDER.glob("*-seed*.jsonl"))}


def test_every_committed_curve_is_of_the_shipped_model_and_of_its_recipe_as_it_is_now(committed, tiny):
    assert committed
    for file, rows in committed.items():
        about = rows[0]
        now = json.loads(json.dumps(recipes.find(about["recipe"]["name"]).scaled(), default=store.jsonable))
        assert about["fingerprint"] == tiny.fingerprint, file
        assert with_defaults(about["recipe"]) == now or about["stale"], file
        assert file.name == f"{about['recipe']['name']}-seed{about['seed']}.jsonl"
        assert file.stat().st_size < 2**20


@pytest.mark.parametrize("rows", [[], [{"kind": "about", "seed": 0}], [{"kind": "about", "recipe": {"name": "pear"}, "seed": 0}]])
def test_a_sweep_names_a_kept_curve_that_is_none(rows, tiny, tmp_path):
    store.write_rows(rows, tmp_path / "pear-seed0.jsonl")
    with pytest.raises(store.DamagedFileError, match=r"pear-seed0\.jsonl"):
        jobs.sweep(tiny, [(recipes.find("pear"), 0)], TrainingPlan(), out=tmp_path, runs=tmp_path / "runs", say=print)


def test_a_stale_curve_says_why_and_its_recipe_is_listed_where_one_looks(committed):
    told = (FOLDER / "README.md").read_text()
    for file, rows in committed.items():
        name, why = rows[0]["recipe"]["name"], rows[0].get("stale")
        assert (f"| {name} | {why} |" in told) if why else f"| {name} |" not in told, file


def test_every_committed_curve_has_every_step_and_the_same_comparison_with_base(committed):
    base = []
    for file, rows in committed.items():
        steps = [row["step"] for row in rows if row["kind"] == "step"]
        assert steps == list(range(len(steps))) and len(steps) > 50, file
        base += [
            row["mean"] for row in rows if row["kind"] == "test" and row["condition"] == "base" and row["metric"] == "accuracy"
        ]
    assert len(set(np.round(base, 12))) == 2  # all problems, hard ones


def test_paired_differences_are_those_of_the_means_with_intervals_around_them(committed):
    table = curves.against(FOLDER).set_index(["name", "seed", "metric"])
    _, tests = curves.read(FOLDER)
    means = curves.after_training(tests).set_index(["name", "seed"])
    for name in ("hapo", "pear"):
        row = table.loc[name, 0, "think_tokens"]
        assert row["difference"] == pytest.approx(
            means.loc[(name, 0), "think_tokens"] - means.loc["correctness", "think_tokens"].mean()
        )
        assert row["low"] < row["difference"] < row["high"]
    assert table.loc["correctness"]["difference"].groupby("metric").mean().to_numpy() == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(FileNotFoundError, match="No learning curve of nonsense"):
        curves.against(FOLDER, "nonsense")


def test_the_naive_penalty_loses_accuracy_and_correctness_gains_it(committed):
    _, tests = curves.read(FOLDER)
    for problems in ("all", "hard"):
        table = curves.after_training(tests, problems).set_index("name")
        assert (table.loc[["length_penalty"], "accuracy_difference_high"] < 0).all()
        assert (table.loc[["length_penalty"], "think_tokens_difference_high"] < 0).all()
        assert (table.loc[["correctness"], "accuracy_difference_low"] > 0).all()
    figure = figures.length_against_accuracy(curves.after_training(tests))
    assert {trace.name for trace in figure.data} == set(tests["name"])
