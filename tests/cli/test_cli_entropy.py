"""``toolkit entropy`` and its job: what is written is what the methods measure; what cannot be measured is named with its remedy."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import pandas as pd
import pytest
from typer.testing import CliRunner

from toolkit import cli, jobs, store, tasks
from toolkit.generate import Sampling, rollouts
from toolkit.jobs import EntropySettings, Study
from toolkit.lm import NoThinkTagsError, ThinkTags
from toolkit.methods import failed_steps, phase_entropy
from toolkit.methods.failed_steps import Cues
from toolkit.types import Problem

SIZE = ("-n", 20, "-k", 3, "--max-new-tokens", 160)


def run(*arguments: object):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def said(result) -> str:
    """Everything said, out of the frame that errors are printed in."""
    return " ".join(f"{result.output} {result.exception}".replace("│", " ").split())


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("entropy") / "out"
    result = run("entropy", "-o", folder, *SIZE, "--json")
    assert result.exit_code == 0, result.output
    return folder, json.loads(result.stdout)


@pytest.fixture(scope="module")
def sampled(tiny, tmp_path_factory):
    """Rollouts with entropies at temperature 0.8, as the command line keeps them."""
    folder = tmp_path_factory.mktemp("sampled") / "rollouts"
    arguments = ("--split", "test", "--temperature", 0.8, "--details", "-o", folder)
    assert run("rollouts", *arguments, *SIZE).exit_code == 0
    return folder


def frame(records: list[dict]) -> pd.DataFrame:
    return pd.DataFrame(records)


def test_help_shows_an_example():
    result = run("entropy", "--help")
    assert result.exit_code == 0 and "Example" in result.output and "within problem" in " ".join(result.output.split())


def test_what_is_written_is_what_the_methods_measure(written, tiny):
    folder, found = written
    problems = tasks.load("arithmetic", "test", 20)
    own = rollouts(tiny, problems, Sampling(n=3, max_new_tokens=160, details=True), progress=False)
    rows = phase_entropy.table(own)
    phases = frame(found["phases"]).query("responses == 'all'").drop(columns="responses")
    pd.testing.assert_frame_equal(phases.reset_index(drop=True), phase_entropy.by_phase(own), rtol=1e-4)
    lengths = frame(found["lengths"]).query("x == 'entropy'").drop(columns=["x", "y"])
    pd.testing.assert_frame_equal(lengths.reset_index(drop=True), phase_entropy.correlations(rows), rtol=1e-3)
    effects = phase_entropy.filtering_effects(phase_entropy.filtering_experiment(tiny, own, problems))
    pd.testing.assert_frame_equal(frame(found["effects"]), effects)
    steps = failed_steps.table(own, failed_steps.chains(tiny, own, problems))
    correct = frame(found["correctness"]).set_index("measure").loc["fsf"]
    wanted = failed_steps.correctness_correlations(steps, ["fsf"]).set_index("measure").loc["fsf"]
    pd.testing.assert_frame_equal(correct, wanted)
    gain = frame(found["choices"]).set_index("kept").loc["lowest failed-step fraction", "gain"]
    assert gain == pytest.approx(failed_steps.accuracy_of_lowest(steps)[1].mean)
    assert found["provenance"]["fingerprint"] == tiny.fingerprint
    assert found["provenance"]["notes"] | {"temperature": 1.0, "rollouts": 60, "split": "test"} == found["provenance"]["notes"]
    assert found["overall"][0]["mean"] == pytest.approx(rows["correct"].mean())
    assert store.read_table(folder / "rows.parquet")["fsf"].tolist() == pytest.approx(steps["fsf"].tolist())


def test_right_wrong_and_all_responses_are_told_apart(written):
    _, found = written
    phases = frame(found["phases"]).set_index(["phase", "responses"])["rollouts"]
    assert phases["think", "all"] == phases["think", "right"] + phases["think", "wrong"] == 60
    for table in ("positions", "steps"):
        assert set(frame(found[table])["responses"]) == {"all", "right", "wrong"}
    assert set(frame(found["marked"])["mark"]) <= {"failed", "re-check"}


def test_the_page_holds_every_figure_and_the_transcripts_by_itself(written):
    folder, _ = written
    page = (folder / "report.html").read_text()
    assert page.count("data-figure=") == 7
    assert "The wrong response with the most failed steps, " in page
    assert 1 <= page.count("class='rl-t'") <= 3 and "mean entropy, thinking" in page and "gold" in page
    assert not re.search(r"<(?:link|img|iframe)\b|<script[^>]+src=", page)


def test_given_again_it_goes_on_with_the_rollouts_that_are_there(written):
    folder, found = written
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet") if path.name.startswith("part")}
    result = run("entropy", "-o", folder, *SIZE)
    assert result.exit_code == 0, result.output
    assert "response of lowest think entropy" in said(result)
    assert stamps and stamps == {path: path.stat().st_mtime_ns for path in stamps}
    assert {"out": str(folder), **store.read_json(folder / "entropy.json")} == found


def test_given_rollouts_bring_their_own_temperature(sampled, tmp_path):
    result = run("entropy", "-r", sampled, "-o", tmp_path / "out", *SIZE[:2], "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    own = store.load_rollouts(sampled)
    assert found["provenance"]["notes"]["temperature"] == 0.8
    assert frame(found["phases"])["mean"][0] == pytest.approx(phase_entropy.by_phase(own)["mean"][0])
    assert not (tmp_path / "out" / "rollouts").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--temperature", 0), "temperature=0.0: give one above 0"),
        (("-k", 1), "samples=1: comparing responses within a problem needs at least 2"),
        (("-t", "nonsense"), "nonsense"),
        (("--steps", "guess"), "guess"),
        (
            ("--max-new-tokens", 3),
            "None of the 60 rollouts has a think span closed by a tag, so nothing can be filtered: raise max_new_tokens",
        ),
        (("--think", "<no>,</no>"), "has a step of thinking: load the model with tags="),
    ],
)
def test_what_cannot_be_measured_is_named(arguments, message, tmp_path):
    result = run("entropy", "-o", tmp_path / "out", *SIZE, *arguments)
    assert result.exit_code != 0
    assert message in said(result)
    assert not (tmp_path / "out" / "report.html").exists()


def test_rollouts_that_do_not_fit_are_named(sampled, tmp_path):
    without = tmp_path / "without"
    assert run("rollouts", "--split", "test", "-o", without, *SIZE).exit_code == 0
    foreign = shutil.copytree(sampled, tmp_path / "foreign")
    store.write_json(store.load_header(sampled) | {"fingerprint": "f" * 64, "model": "another"}, foreign / "header.json")
    steered = shutil.copytree(sampled, tmp_path / "steered")
    store.write_json(store.load_header(sampled) | {"interventions": ["steering +2"]}, steered / "header.json")
    for arguments, message in (
        (("-r", tmp_path / "nowhere"), "nowhere/header.json"),
        (("-r", without), "carries no entropies: sample with Sampling(details=True) (toolkit rollouts --details)"),
        (("-r", foreign), "are of another, not of tiny-reasoner as loaded"),
        (("-r", steered), "are of tiny-reasoner under steering +2, not of tiny-reasoner as loaded"),
        (("-r", sampled, "--split", "dev"), "20 problems of the rollouts are not among the 20 given, such as 'arithmetic-"),
        (("-r", sampled, "--temperature", 1), "were sampled at 0.8"),
    ):
        result = run("entropy", "-o", tmp_path / "out", *SIZE[:2], *arguments)
        assert result.exit_code != 0 and message in said(result), message


def test_a_model_that_does_not_mark_its_thinking_is_measured_whole_and_not_filtered(tiny, tmp_path):
    """Whole responses count as thinking: one phase, no filtering, and the page says so."""
    untagged = replace(tiny, tags=ThinkTags(None, None))
    tables = jobs.entropy_report(untagged, Study(problems=6, samples=2, max_new_tokens=100), tmp_path)
    assert tables.filtering is None and tables.effects is None
    assert set(tables.phases["phase"]) == {"think"}
    assert store.read_json(tmp_path / "entropy.json")["filtering"] is None
    page = (tmp_path / "report.html").read_text()
    assert "it cannot answer after shortened thinking" in page and "whole responses count as thinking" in page
    assert "rather than random ones" not in page
    with pytest.raises(NoThinkTagsError, match="has a step of thinking"):
        jobs.entropy_report(replace(tiny, tags=None), Study(problems=3, samples=2, max_new_tokens=60), tmp_path / "none")


def test_a_reader_of_ones_own_marks_the_steps(tiny, tmp_path):
    """Every line with a five fails; problems of another kind are read by cues without being asked for."""

    def fives(problem):
        return Cues(starts=r"(?<=\n)(?=.)", failed="5", review=None, back=None, head=0).reader()

    study = Study(problems=8, samples=2, max_new_tokens=120)
    tables = jobs.entropy_report(tiny, study, tmp_path, settings=EntropySettings(reader_of=fives, keeps=(1.0, 0.5)))
    found = store.load_rollouts(tmp_path / "rollouts")
    lines = [tiny.text(r.token_ids[r.think.start : r.think.stop]).splitlines() for r in found]
    wanted = {(r.problem_id, r.sample): sum("5" in line for line in own) for r, own in zip(found, lines, strict=True)}
    assert {(row.problem_id, row.sample): row.failed for row in tables.rows.itertuples()} == wanted and sum(wanted.values()) > 5
    assert store.read_json(tmp_path / "entropy.json")["provenance"]["notes"]["reader"] == "fives"
    assert set(tables.effects["keep"]) == {0.5}
    other = [Problem(p.id, p.messages, p.answer, {}) for p in tasks.load("arithmetic", "test", 8)]
    assert failed_steps.chains(tiny, found, other, EntropySettings().reader_of)[0].texts


def test_what_never_varies_is_undefined_and_not_a_number_made_up(tiny, tmp_path):
    """All responses wrong: correlation with correctness is null in the file, and the page says undefined."""
    path = tmp_path / "wrong.jsonl"
    problems = [replace(p, answer="1000") for p in tasks.load("arithmetic", "test", 12)]
    store.save_problems(problems, path)
    result = run("entropy", "-t", path, "-n", 6, "-k", 2, "--max-new-tokens", 120, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert all(row["r"] is None for row in found["correctness"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "undefined<br><small>(nothing varies)" in page
    assert "The wrong response with the most failed steps, and the response with the highest think entropy" in page


def test_the_page_calls_no_response_wrong_if_none_is(tiny, tmp_path):
    problems = tasks.load("arithmetic", "test", 12)
    sampled = rollouts(tiny, problems, Sampling(n=2, max_new_tokens=120, details=True), progress=False)
    right = [replace(r, correct=True) for r in sampled]
    jobs.entropy_report(tiny, Study(problems=12, samples=2), tmp_path, rollouts=right)
    page = (tmp_path / "report.html").read_text()
    assert "No response with thinking is wrong: the correct one with the most failed steps, the correct response to" in page
    assert "The wrong response" not in page


@pytest.mark.parametrize("keeps", [(1.0,), (0.5,), (1.0, 1.5), ()])
def test_settings_need_shares_to_compare(keeps):
    with pytest.raises(ValueError, match=r"keeps=.*among them 1 and at least one other"):
        EntropySettings(keeps=keeps)
