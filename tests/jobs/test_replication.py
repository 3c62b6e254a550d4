"""Plans of replications: every plan passes a dry run without a model, wrong settings are refused with their place, and the tiny one runs."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from toolkit import cli, collect, edits, evaluate, generate, jobs, store
from toolkit.cli import replicate as command
from toolkit.jobs import controls, replication
from toolkit.jobs.finding import Finding
from toolkit.jobs.replication_plan import Published
from toolkit.types import Direction, HeadEdit, HeadScores, Plan, Rollout, Span

PLANS = Path(__file__).parents[2] / "plans"
TINY = PLANS / "tiny-reasoner.toml"
SMALLER = {"problems = 40": "problems = 12", "problems = 10": "problems = 3", "samples = 4": "samples = 3", "max_new_tokens = 120": "max_new_tokens = 60",
           "max_new_tokens = 200": "max_new_tokens = 60", "share = 0.2": "share = 0.3"}  # fmt: skip


def run(*arguments: object):
    return CliRunner().invoke(cli.app, ["replicate", *(str(a) for a in arguments)], env={"COLUMNS": "160"})


def said(result) -> str:
    return " ".join(f"{result.output} {result.exception}".replace("│", " ").split())


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """The plan of the tiny reasoner with fewer problems."""
    text = TINY.read_text()
    for old, new in SMALLER.items():
        assert old in text
        text = text.replace(old, new)
    path = tmp_path_factory.mktemp("plan") / "small.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted(PLANS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_plan_passes_a_dry_run_without_a_model_or_a_download(path, monkeypatch):
    monkeypatch.setattr(command, "load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    monkeypatch.setattr("toolkit.tasks.load", lambda *a, **k: pytest.fail("problems were loaded"))
    result = run(path, "--dry-run")
    assert result.exit_code == 0, said(result)
    plan = jobs.read_plan(path)
    for text in (plan.title, plan.model.id, f"{plan.edited_heads} of", "hours", "memory", *plan.deviations, plan.untested):
        assert " ".join(text.split()) in said(result)
    assert (path.stem in (PLANS / "README.md").read_text()) and ("Untested" in said(result)) == bool(plan.untested)
    if plan.model.id != "tiny-reasoner":
        assert "never run with the model" in plan.untested


def test_numbers_that_were_not_found_are_said_to_be_so():
    for path in PLANS.glob("*.toml"):
        plan = jobs.read_plan(path)
        table = jobs.published_table(plan)
        missing = [p for p in plan.published if p.base is None or p.edited is None]
        assert missing and all(p.note for p in missing)
        assert (table[["base", "edited"]] == "NOT FOUND").to_numpy().sum() == sum(
            (p.base is None) + (p.edited is None) for p in missing
        )


def test_the_plan_of_the_distilled_model_has_the_papers_settings():
    plan = jobs.read_plan(PLANS / "deepseek-r1-distill-qwen-1.5b.toml")
    assert plan.edited_heads == 20  # of 336, as in the released list
    assert (plan.edit.short_below, plan.edit.long_above, plan.edit.strength) == (100, 1000, 1)
    assert (plan.train.problems, plan.train.samples, plan.train.max_new_tokens) == (2000, 1, 4096)
    assert {(t.label, t.samples, t.max_new_tokens) for t in plan.tests} == {("gsm8k", 10, 16384), ("math500", 10, 16384)}


def test_steps_add_up_to_responses_tokens_hours_and_memory_by_hand():
    plan = jobs.read_plan(TINY)
    table = jobs.replication_steps(plan)
    first = table.loc["compare 8 conditions: arithmetic"]
    assert first["responses"] == 40 * 4 * 8 and first["tokens"] == 40 * 4 * 8 * 20
    assert first["hours"] == pytest.approx(40 * 4 * 8 * 20 / plan.run.sampled_per_second / 3600)
    cache = 2 * 4 * 32 * 4 * 4  # keys and values, 4 heads of 32 numbers, 4 layers, 4 bytes
    assert first["memory_gb"] == pytest.approx((1.1 * 0.8e6 * 4 + 160 * 120 * cache) / 1e9)
    math = jobs.replication_steps(jobs.read_plan(PLANS / "qwen3-1.7b.toml")).loc["compare 8 conditions: math500"]
    assert math["responses"] == 500 * 10 * 8  # three splits of 500 problems together


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("fraction = 0.06", "fractoin = 0.06", r"\[edit\] has the unknown setting 'fractoin'"),
        ("fraction = 0.06", "fraction = 1.5", r"\[edit\]: fraction=1.5"),
        ('form = "published"', 'form = "third"', "Unknown form of ThinkEdit 'third'"),
        ("samples = 4", "samples = 0", r"\[train\]: n=0"),
        ("samples = 4", 'samples = "four"', "samples is 'four', expected a whole number"),
        ('task = "arithmetic"', 'task = "arithmatic"', "Unknown task 'arithmatic'"),
        ('splits = ["test"]', 'splits = ["train"]', "the edit is made from split train of the same task"),
        ('dtype = "float32"', 'dtype = "int3"', "dtype 'int3': choose one of float32"),
        ('test = "arithmetic"', 'test = "gsm8k"', "published numbers of 'gsm8k', which is no test"),
        ('metric = "accuracy"', 'metric = "think_tokens"', "choose one of accuracy"),
        ("mean_tokens = 20.0", "mean_tokens = 900.0", "at most max_new_tokens=120"),
        ("draws = 3", "draws = 2", "fewer than three random draws"),
        ("[run]", "[ran]", r"\[run\] is missing"),
        ("seed = 0", "seed", "is not TOML"),
    ],
)
def test_a_wrong_setting_is_refused_with_its_place(old, new, message, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    text = TINY.read_text()
    assert old in text
    (tmp_path / "plan.toml").write_text(text.replace(old, new, 1))
    with pytest.raises(store.DamagedFileError, match=message):
        jobs.read_plan(tmp_path / "plan.toml")
    assert run(tmp_path / "plan.toml", "-o", tmp_path / "out").exit_code != 0 and not (tmp_path / "out").exists()


def test_a_run_needs_a_directory_and_a_plan_that_exists(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    assert "--out is missing" in said(run(TINY))
    assert "nothing.toml" in said(run(tmp_path / "nothing.toml", "--dry-run"))
    assert "--device is not used with --dry-run" in said(run(TINY, "--dry-run", "--device", "cpu"))


def test_another_model_than_the_plans_is_refused(tiny, tmp_path):
    plan = jobs.read_plan(TINY)
    with pytest.raises(ValueError, match="4 layers with 8 heads, but the plan says 28 with 8"):
        jobs.replicate(tiny, replace(plan, model=replace(plan.model, layers=28)), tmp_path)


def test_a_test_whose_problems_cannot_be_loaded_is_refused_before_anything_is_sampled(tiny, tmp_path, monkeypatch):
    def load(task, split, *arguments, **options):
        if task == "running_sum":
            raise ImportError("the data set is missing")
        return []

    monkeypatch.setattr(replication, "load", load)
    monkeypatch.setattr(generate, "rollouts", lambda *a, **k: pytest.fail("responses were sampled"))
    with pytest.raises(ImportError, match="the data set is missing"):
        jobs.replicate(tiny, jobs.read_plan(TINY), tmp_path)


@pytest.fixture(scope="module")
def replicated(small, tmp_path_factory):
    out = tmp_path_factory.mktemp("replicated") / "out"
    result = run(small, "-o", out)
    assert result.exit_code == 0, said(result)
    return out, result


def test_the_plan_of_the_tiny_reasoner_runs_to_a_report_beside_the_paper(replicated, small):
    out, result = replicated
    kept = store.read_json(out / "replication.json")
    assert kept["beside"][0]["paper, base"] == "NOT FOUND" and kept["beside"][0]["agrees"] == "NOT FOUND"
    assert len(kept["edited"]) == jobs.read_plan(small).edited_heads == 2
    sources = [claim["from"] for claim in kept["claims"]]
    assert len(sources) == 2 * 9 and sources.count("control") == 2 * 6
    assert not any("not judged" in claim["verdict"] for claim in kept["claims"])
    for name in ("report.html", "report.md"):
        text = (out / name).read_text()
        assert re.search(r"NOT(<br><small>| )FOUND", text) and "random heads" in text
    assert "edited" in {path.name for path in out.iterdir()} and re.search(r"Of 0\s+published\s+changes", said(result))


def test_given_again_nothing_is_sampled_and_the_numbers_are_the_same(replicated, small, monkeypatch):
    out, _ = replicated
    before = store.read_json(out / "replication.json")
    monkeypatch.setattr(generate, "_sample", lambda *a, **k: pytest.fail("sampled again"))
    result = run(small, "-o", out)
    assert result.exit_code == 0, said(result)
    after = store.read_json(out / "replication.json")
    assert [after[k] for k in ("beside", "claims", "edited")] == [before[k] for k in ("beside", "claims", "edited")]


def test_the_conditions_are_base_the_edit_and_different_draws_of_each_control(replicated, small, tiny):
    out, _ = replicated
    plan = jobs.read_plan(small)
    sampling = plan.train.sampling(0, plan.run.batch_size)
    rollouts = generate.rollouts(tiny, replication.problems_of(plan.train, 0), sampling, progress=False)
    finding = jobs.find_heads(tiny, rollouts, plan.edit.settings(0))
    conditions = replication.conditions_of(tiny, finding, plan)
    assert len(conditions) == plan.conditions == 8
    assert len({c.lm.fingerprint for c in conditions.values()}) == 8
    folders = {path.parent.name for path in (out / "rollouts" / "arithmetic").rglob("header.json")}
    assert folders == {evaluate.rollout_folder(out, name).name for name in conditions}


def test_draws_of_random_heads_are_different_even_if_seeds_choose_equal_ones(tiny):
    vector = torch.randn(tiny.layout.n_layers, tiny.layout.d_model, generator=torch.Generator().manual_seed(0))
    direction = Direction(vector, "attn_out", "all", "made up", 0, 0, tiny.provenance())
    one = Plan((HeadEdit(0, 1, "project_out", 1.0),), direction, "one head", tiny.provenance())
    assert len({edits.random_heads(one, tiny.layout, seed=seed).heads[0] for seed in range(7)}) < 7
    response = Rollout("q", 0, (9,) * 8, 2, Span(3, 5), Span(6, 8), "stop", "", correct=True)
    scores = HeadScores(tiny.layout.table({}), "made up", "nats", tiny.provenance())
    moments = collect.moments(tiny, [response], lambda r: "all", kinds=("resid_mid",))
    finding = Finding(jobs.PUBLISHED, moments, moments, direction, scores, one)
    drawn = controls.random_controls(tiny, finding, one, controls.random_heads, 7, seed=0)
    assert {p.heads[0] for p in drawn} == {(0, head) for head in range(8) if head != 1}
    assert len(controls.random_controls(tiny, finding, one, controls.random_heads, 8, seed=0)) == 7, "no more are left"


def measured_change(low: float) -> pd.DataFrame:
    return pd.DataFrame(
        [("base", "accuracy", 0.6, 0.5, 0.7, 0.0, 0.0, 0.0), ("edited", "accuracy", 0.64, 0.5, 0.7, 0.04, low, 0.07)],
        columns=["condition", "metric", "mean", "low", "high", "difference", "difference_low", "difference_high"],
    )


def test_an_interval_that_holds_the_papers_change_and_no_change_decides_nothing():
    summary = {"arithmetic": measured_change(-0.02)}
    for edited, agrees in ((65.0, "undecided"), (60.0, "undecided"), (70.0, "no")):
        table = replication.beside([Published("arithmetic", "accuracy", "v3", 60.0, edited)], summary)
        assert table["agrees"].tolist() == [agrees]


def test_a_published_change_agrees_if_it_lies_in_the_measured_interval():
    """Published numbers are in percent, measured ones are shares."""
    summary = measured_change(0.01)
    for edited, agrees in ((65.0, "yes"), (70.0, "no"), (60.5, "no")):
        table = replication.beside([Published("arithmetic", "accuracy", "v3", 60.0, edited)], {"arithmetic": summary})
        assert table["agrees"].tolist() == [agrees] and table["paper, change"].tolist() == [f"{edited - 60:+.2f}"]
        assert table["change"].tolist() == ["+4.0 [+1.0, +7.0]"]
