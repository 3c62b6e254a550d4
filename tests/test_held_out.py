"""Held out means it: splits are a function of ids, what a thing was made from is recorded in it, and it is not judged on that."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from toolkit import cli, collect, directions, edits, evaluate, origins, report, store, tasks, vectors
from toolkit import lm as lms
from toolkit.edits import steering
from toolkit.exits import EarlyExit
from toolkit.generate import Sampling, rollouts
from toolkit.lm import Condition
from toolkit.methods.crest import HeadRotation, Turn
from toolkit.methods.exit_probe import ExitProbe
from toolkit.patching import patch
from toolkit.types import Direction, HeadEdit, Plan, Problem

FEW = ("--max-new-tokens", 150)


def run(*arguments: object):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def said(result) -> str:
    return " ".join(f"{result.output} {result.exception}".replace("│", " ").split())


def asked(n: int, **meta: object) -> list[Problem]:
    return [replace(p, id=f"q{i}", meta=meta) for i, p in enumerate(tasks.arithmetic.load("train", n))]


@pytest.fixture
def mine(tmp_path):
    return store.save_problems(asked(90), tmp_path / "mine.jsonl")


# --- splits --------------------------------------------------------------------------------------------------


def test_no_problem_of_a_file_is_in_two_splits_and_every_one_is_in_one(mine):
    own = [p.id for split in ("train", "dev", "test") for p in tasks.load(str(mine), split)]
    assert sorted(own) == sorted(p.id for p in asked(90))


def test_lines_added_or_reordered_move_no_problem_to_another_split(mine, tmp_path):
    more = asked(120)
    random.Random(0).shuffle(more)
    other = store.save_problems(more, tmp_path / "more.jsonl")
    for split in ("train", "dev", "test"):
        before, after = ({p.id for p in tasks.load(str(path), split, 999)} for path in (mine, other))
        assert before == after & {p.id for p in asked(90)}


def test_problems_without_ids_keep_their_split_when_lines_move(tmp_path):
    lines = [json.dumps({"question": f"{i}+1=?", "answer": i + 1}) for i in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.jsonl").write_text("\n".join(reversed(lines)))
    a, b = ({p.id for p in tasks.load(str(tmp_path / f"{name}.jsonl"), "test", 99)} for name in "ab")
    assert a == b and 0 < len(a) < 40


def test_a_split_that_every_line_names_is_honoured_and_one_that_only_some_name_is_an_error(tmp_path):
    own = [*asked(4, split="train"), *(replace(p, id=f"v{p.id}") for p in asked(3, split="validation"))]
    path = store.save_problems(own, tmp_path / "p.jsonl")
    assert [p.id for p in tasks.load(str(path), "validation")] == ["vq0", "vq1", "vq2"]
    with pytest.raises(ValueError, match=r"no problem of split 'test': it has train 4, validation 3"):
        tasks.load(str(path), "test")
    store.save_problems([*own, *(replace(p, id=f"n{p.id}") for p in asked(1))], path)
    with pytest.raises(ValueError, match=r"problem 'nq0' has meta\.split None.*every line, or on none"):
        tasks.load(str(path), "train")


def test_an_unknown_split_is_an_error_before_any_work(mine, tmp_path, monkeypatch):
    monkeypatch.setattr(lms, "load", lambda *a, **k: pytest.fail("a model was loaded"))
    for task in (mine, "arithmetic", "math500"):
        result = run("rollouts", "-t", task, "--split", "foo", "-o", tmp_path / "out")
        assert result.exit_code != 0 and "Unknown split 'foo': choose one of train, dev, test" in said(result)
    assert not (tmp_path / "out").exists()


def test_a_split_with_fewer_problems_than_asked_says_how_many_there_are(mine, caplog):
    found = tasks.load(str(mine), "dev", 50)
    assert f"mine.jsonl has {len(found)} problems of split dev, fewer than the 50 requested" in caplog.text


# --- what a thing was made from ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def train(tiny):
    return tasks.load("arithmetic", "train", 6)


@pytest.fixture(scope="module")
def moments(tiny, train):
    found = rollouts(tiny, train, Sampling(n=2, max_new_tokens=60), progress=False)
    return [collect.moments(tiny, part, lambda r: "long" if r.sample else "short") for part in (found[:6], found[6:])]


def hashes(problems) -> list[str]:
    return sorted(origins.digest(p.id) for p in problems)


def test_a_sum_of_moments_and_what_is_made_of_it_record_the_problems_of_both(moments, train, tmp_path):
    v = directions.mean_difference(moments[0] + moments[1], "resid_mid")
    assert v.provenance.notes["problem_ids"] == hashes(train)
    again = store.load(store.save(v, tmp_path / "v.safetensors"), Direction)
    assert origins.record_in(again.provenance.notes) == origins.record_in(v.provenance.notes)


def direction_of(lm, problems) -> Direction:
    v = torch.randn(lm.layout.n_layers, lm.layout.d_model, generator=torch.Generator().manual_seed(0))
    return Direction(
        v, "resid_mid", "think", "by hand", 1, 1, lm.provenance(**origins.record((p.id for p in problems), split="train"))
    )


def edited(lm, problems):
    return edits.apply(lm, Plan((HeadEdit(1, 2, "project_out", 1.0),), direction_of(lm, problems), "one head", lm.provenance()))


def test_an_edited_checkpoint_knows_its_problems_when_it_is_loaded_again(tiny, train, tmp_path):
    saved = edited(tiny, train).save(tmp_path / "edited")
    again = lms.load(saved, device="cpu")
    assert [one["problem_ids"] for one in again.made_from] == [hashes(train)]
    other = tasks.load("arithmetic", "train", 2, 5)
    assert [one["problem_ids"] for one in edited(again, other).made_from] == [hashes(train), hashes(other)]


def adapter_of(lm, problems, path):
    plan = Plan((HeadEdit(1, 2, "project_out", 1.0),), direction_of(lm, problems), "one head", lm.provenance())
    return vectors.save_adapter(lm, plan, path)


def test_a_loaded_adapter_knows_its_problems_and_those_of_its_base(tiny, train, tmp_path):
    pytest.importorskip("peft")
    other = tasks.load("arithmetic", "train", 2, 5)
    base = lms.load(edited(tiny, other).save(tmp_path / "base"), device="cpu")
    again = lms.load(adapter_of(base, train, tmp_path / "adapter"), device="cpu")
    assert [one["problem_ids"] for one in again.made_from] == [hashes(other), hashes(train)]
    with pytest.raises(evaluate.OverlapError):
        evaluate.check_held_out({"adapted": Condition(again)}, train)


def test_a_merged_and_a_baked_model_know_the_problems_of_what_changed_them(tiny, train, model_of, tmp_path):
    trained = edited(tiny, train)
    gpt2 = model_of("gpt2")
    baked = vectors.bake(gpt2, direction_of(gpt2, train), 0.1)
    for name, made in {"merged": edits.selective_merge(tiny, trained), "baked": baked}.items():
        again = lms.load(made.save(tmp_path / name), device="cpu")
        with pytest.raises(evaluate.OverlapError):
            evaluate.check_held_out({name: Condition(again)}, train)


@pytest.mark.parametrize("how", ["edited", "steered"])
def test_nothing_is_judged_on_the_problems_it_was_made_from(how, tiny, train):
    other = tasks.load("arithmetic", "test", 3)
    made = edited(tiny, train) if how == "edited" else Condition(tiny, (steering(direction_of(tiny, train), 0.1),))
    few, judged = Sampling(max_new_tokens=8), {"base": tiny, how: made}
    with pytest.raises(evaluate.OverlapError, match=f"'{how}' was made from 2 of the 5 problems.*'arithmetic-.*allow_overlap"):
        evaluate.compare(judged, [*other, *train[:2]], few, progress=False)
    held_out = evaluate.compare(judged, other, few, progress=False)
    assert (
        report.judged_on(held_out)
        == "Held-out problems: 3 problems of arithmetic (test). The conditions were made from 6 problems (train), none of them among these 3."
    )
    allowed = evaluate.compare(judged, [*other, *train[:2]], few, allow_overlap=True, progress=False)
    assert report.judged_on(allowed).startswith("NOT held out: 5 problems of arithmetic (test+train).")
    assert allowed.conditions[how]["overlap"] == 2 and allowed.conditions["base"]["overlap"] == 0


@pytest.mark.parametrize("how", ["rotated", "donor", "rule"])
def test_problems_are_found_in_every_part_of_a_condition(how, tiny, train):
    v = direction_of(tiny, train)
    turn = Turn(1, 2, torch.nn.functional.one_hot(torch.tensor(0), tiny.layout.head_dims[1]).float())
    probe = ExitProbe((0.0,) * tiny.layout.d_model, 0.0, v.provenance)
    made = {
        "rotated": Condition(tiny, (HeadRotation((turn,), v.provenance, ends="\n"),)),
        "donor": Condition(tiny, (patch(Condition(tiny, (steering(v, 0.1),)), [(0, 0)]),)),
        "rule": Condition(tiny, rules=(EarlyExit(probe, "\n"),)),
    }
    with pytest.raises(evaluate.OverlapError, match=f"'{how}' was made from"):
        evaluate.check_held_out({how: made[how]}, train)


# --- from one end to the other -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """Rollouts of the train split of a file of one's own."""
    folder = tmp_path_factory.mktemp("own")
    path = store.save_problems(asked(60), folder / "mine.jsonl")
    assert run("rollouts", "-t", path, "-n", 30, "-k", 2, *FEW, "-o", folder / "r").exit_code == 0
    return folder / "r", path


def test_the_header_tells_task_split_sampling_and_how_many_were_asked_for(sampled):
    folder, path = sampled
    header = store.load_header(folder)
    assert (header["task"], header["split"], header["seed"]) == (str(path), "train", 0)
    assert header["rollouts"] == len(store.load_rollouts(folder)) and header["sampling"]["n"] == 2


def test_thinkedit_judges_the_test_split_of_the_task_that_the_rollouts_are_of(sampled, tmp_path, monkeypatch):
    folder, path = sampled
    made_from, test = ({p.id for p in tasks.load(str(path), split, 30)} for split in ("train", "test"))
    target = tmp_path / "edited"
    command = ("thinkedit", "-m", "tiny-reasoner", "--rollouts", folder, "-n", 30, "-k", 2, *FEW, "--share", 0.4, "-o", target)
    result = run(*command)
    assert result.exit_code == 0, said(result)
    rows = store.read_table(tmp_path / "edited.work" / "rows.parquet")
    assert set(rows["problem_id"]) == test and not test & made_from
    card = " ".join((target / "README.md").read_text().split())
    sentence = f"Held-out problems: {len(test)} problems of mine.jsonl (test). The conditions were made from {len(made_from)} problems of mine.jsonl (train, seed 0), none of them among these {len(test)}."
    assert sentence in card and sentence in said(result)
    notes = store.load(target / "direction.safetensors", Direction).provenance.notes
    assert (notes["task"], notes["split"], notes["seed"]) == ("mine.jsonl", "train", 0)
    # Finished and given again, it samples nothing and says what it reuses.
    from toolkit.engines import loop

    monkeypatch.setattr(loop, "_decode", lambda *a: pytest.fail("sampled again"))
    before = {file: file.stat().st_mtime_ns for file in target.iterdir()}
    again = run(*command)
    assert again.exit_code == 0 and "already holds exactly this edited model" in said(again) and "reusing" in said(again)
    assert before == {file: file.stat().st_mtime_ns for file in target.iterdir()}
    other = run(*command, "--strength", 0.5)
    assert isinstance(other.exception, FileExistsError) and "holds another model" in said(other)
    # And no other command judges it on what it was made from.
    compared = run("compare", "base=tiny-reasoner", f"edited={target}", "-t", path, "--split", "train", "-o", tmp_path / "c")
    assert isinstance(compared.exception, evaluate.OverlapError) and "'edited' was made from" in said(compared)


def test_a_direction_is_never_judged_on_the_problems_it_was_made_from(sampled, tmp_path):
    folder, _ = sampled
    vector = tmp_path / "v.safetensors"
    result = run("direction", "-r", folder, "--share", 0.4, "-o", vector)
    assert result.exit_code == 0 and "(train, seed 0)" in said(result)
    own = store.save_problems([replace(p, meta={"split": "dev"}) for p in asked(60)], tmp_path / "same.jsonl")
    command = ("dose", "-v", vector, "-t", own, "-a", "1", "-n", 4, "-k", 1, *FEW, "-o", tmp_path / "d")
    result = run(*command)
    assert isinstance(result.exception, evaluate.OverlapError), said(result)
    result = run(*command, "--allow-overlap")
    assert result.exit_code == 0, said(result)
    assert "NOT held out" in (tmp_path / "d" / "report.html").read_text()


def test_a_part_of_a_run_is_refused_unless_it_is_asked_for(sampled, tmp_path):
    folder, _ = sampled
    part = tmp_path / "part"
    store.write_json(store.load_header(folder) | {"rollouts": 4800}, part / "header.json")
    there = store.load_rollouts(folder)
    store.append_rollouts(there, part)
    for command in (
        ("direction", "-o", tmp_path / "v.safetensors"),
        ("thinkedit", "-m", "tiny-reasoner", "--dry-run", "-o", tmp_path / "e"),
        ("heads", "-o", tmp_path / "h"),
        ("entropy", "-o", tmp_path / "n"),
    ):
        result = run(*command, "--rollouts", part)
        assert result.exit_code != 0
        assert f"holds {len(there)} of 4,800 rollouts: the run was stopped" in said(result), command
    assert run("direction", "-o", tmp_path / "v.safetensors", "--share", 0.4, "-r", part, "--partial").exit_code == 0
    notes = store.load(tmp_path / "v.safetensors", Direction).provenance.notes
    assert notes["rollouts"] == f"{len(there)} of 4,800 rollouts"


def test_rollouts_of_another_model_are_refused_before_the_work(sampled, tmp_path, monkeypatch):
    folder, _ = sampled
    foreign = tmp_path / "foreign"
    store.write_json(store.load_header(folder) | {"fingerprint": "f" * 64, "model": "another"}, foreign / "header.json")
    store.append_rollouts(store.load_rollouts(folder), foreign)
    monkeypatch.setattr(collect, "moments", lambda *a, **k: pytest.fail("work was done"))
    for command in (("direction",), ("thinkedit", "-m", "tiny-reasoner"), ("entropy",)):
        result = run(*command, "--rollouts", foreign, "-o", tmp_path / f"out-{command[0]}")
        assert isinstance(result.exception, store.WrongModelError) and "are of another, not of tiny-reasoner as loaded" in said(
            result
        )


def test_every_generated_task_has_splits_without_a_problem_in_common():
    for name in (
        "tiny",
        "countdown",
        "wordproblems",
        "running_sum",
        "characters",
        "slaq",
        "target_length",
        "writing",
        "threading",
        "ranking",
        "searching",
    ):
        n = 12
        own = Counter(p.id for split in ("train", "dev", "test") for p in {p.id: p for p in tasks.load(name, split, n)}.values())
        assert max(own.values()) == 1, name
