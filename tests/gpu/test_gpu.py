"""What runs on a borrowed GPU is rehearsed here on a CPU, at toy size, so that it starts there at the first try."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import ledger
import pytest
from aims import AIMS, STAGES, Aim

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MID = ROOT / "data" / "mid-reasoner"


def script(path: Path):
    """A script of the repository as a module."""
    spec = importlib.util.spec_from_file_location(f"gpu_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    env.pop("PYTHONPATH", None)  # the toolkit need not be installed
    command = [sys.executable, str(HERE / "run.py"), str(out), *options]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)


# --- the rehearsal -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory) -> Path:
    """The report of all stages at toy size."""
    out = tmp_path_factory.mktemp("gpu")
    done = run(out, "--small", "--limit-seconds", "300")
    assert done.returncode == 0, done.stderr
    return out


def test_every_row_is_in_the_report_and_none_fails(rehearsal):
    stages, rows = ledger.read_rows(rehearsal)
    assert list(stages) == list(STAGES) and {row["row"] for row in rows} == {aim.row for aim in AIMS} and len(rows) == len(AIMS)
    assert {row["verdict"] for row in rows} <= {"met", "measured", "absent"}, [
        r for r in rows if r["verdict"] in ("failed", "missed")
    ]
    # What only a GPU can show.
    alone = {
        "waits for the card per decoded token",
        "waits for the card per layer of collect",
        "skewed lengths, over generate_batch",
    }
    assert {row["row"] for row in rows if row["verdict"] == "absent"} == alone
    text = (rehearsal / ledger.PAGE).read_text()
    assert "There was no GPU" in text and all(aim.row in text for aim in AIMS) and "transformers 5" in text
    assert json.loads((rehearsal / ledger.REPORT).read_text())["rows"] == rows


def test_a_rehearsal_of_the_mid_reasoner_comes_back_in_pieces_that_make_a_model(rehearsal, tmp_path):
    pieces = sorted(rehearsal.glob("mid-reasoner-*.safetensors"))
    assert len(pieces) > 2 and all(piece.stat().st_size < 2**20 for piece in pieces)
    joining = script(MID / "join.py")
    made = joining.join(rehearsal, tmp_path / "mid")
    training = json.loads((made / "training.json").read_text())
    assert training["tokens"] > 0 and training["final_loss"] < 5 and 4 < training["seconds"] < 60
    from toolkit import lm as lms

    lm = lms.load(made, device="cpu")
    assert lm.layout.n_heads * lm.layout.head_dims[0] != lm.layout.d_model and lm.tags
    with pytest.raises(FileExistsError, match="exists already"):
        joining.join(rehearsal, made)


def test_a_missing_piece_or_one_of_another_saving_is_refused(rehearsal, tmp_path):
    from safetensors.torch import load_file, save_file

    joining, copy = script(MID / "join.py"), tmp_path / "pieces"
    copy.mkdir()
    for file in rehearsal.glob("mid-reasoner*"):
        (copy / file.name).write_bytes(file.read_bytes())
    first = sorted(copy.glob("*.safetensors"))[0]
    whole = load_file(first)
    steps = str(json.loads((copy / "mid-reasoner.json").read_text())["training"]["steps"])
    for weights, saving, why in (
        ({f"other.{name}": value for name, value in whole.items()}, steps, "two savings"),
        (whole, "1000000", "after 1000000 steps"),
    ):
        save_file(weights, first, {"format": "pt", "saving": saving})
        with pytest.raises(ValueError, match=why):
            joining.join(copy, tmp_path / "a")
    first.unlink()
    with pytest.raises(FileNotFoundError, match=first.name):
        joining.join(copy, tmp_path / "b")
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()
    with pytest.raises(FileNotFoundError, match=r"has no mid-reasoner\.json"):
        joining.join(tmp_path, tmp_path / "c")


# --- the mid reasoner's data and size ------------------------------------------------------------------------


@cache
def mid():
    return script(MID / "train.py")


def test_characters_are_encoded_as_by_the_tokenizer():
    tokenizer = mid().recipe().build_tokenizer()
    for text in ("<|user|>17+5=? quick<|end|><|assistant|><think>17+5=22\nwait ok</think>22<|end|>", "a<think", "é<|pad|>", ""):
        assert mid().characters().encode(text) == tokenizer.encode(text)


def test_packed_batches_hold_the_rows_of_the_tiny_reasoners_recipe():
    settings = mid().Settings(chunk=32, batch_tokens=512)
    import argparse
    from dataclasses import asdict

    tiny = mid().recipe()
    for done in (0.01, 0.1, 0.5):
        expected = tiny.chunk(tiny.build_tokenizer(), 0, 3, argparse.Namespace(**asdict(settings)), done)
        for batch, (ids, predicted) in zip(expected, mid().make(settings, 3, done), strict=True):
            for (tokens, flags), row, wanted in zip(batch, ids, predicted, strict=True):
                assert row[: len(tokens)].tolist() == tokens and wanted[: len(tokens)].tolist() == list(map(int, flags))
                assert not row[len(tokens) :].any() and not wanted[len(tokens) :].any()


def test_the_loss_is_that_of_the_tiny_reasoners_recipe():
    import torch

    settings = mid().Settings(layers=2, d_model=32, d_mlp=48, heads=4, head_dim=16, chunk=16, batch_tokens=512)
    model, tiny = mid().build(settings, torch.device("cpu")), mid().recipe()
    packed = mid().make(settings, 0, 0.5)[0]
    ids, predicted = (torch.from_numpy(part) for part in packed)
    batch = [(row.tolist(), flags.bool().tolist()) for row, flags in zip(ids, predicted, strict=True)]
    theirs = tiny.build_model(settings, model.config.vocab_size)  # with the norms of transformers
    theirs.load_state_dict(model.state_dict())
    assert mid().loss_of(model, ids.long(), predicted).item() == pytest.approx(tiny.loss_of(theirs, batch)[0].item(), rel=1e-5)
    # As on a GPU: under autocast, which must find a kernel for every mixture of types.
    half = mid().loss_of(model, ids.long(), predicted, half=True)
    half.backward()
    assert half.item() == pytest.approx(mid().loss_of(model, ids.long(), predicted).item(), rel=2e-2)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_layers_that_cannot_be_compiled_or_change_the_logits_run_as_they_are(monkeypatch):
    import torch

    settings = mid().Settings(layers=2, d_model=32, d_mlp=48, heads=4, head_dim=16, chunk=16, batch_tokens=512)
    ids, predicted = (torch.from_numpy(part) for part in mid().make(settings, 0, 0.5)[0])
    first = (ids.long(), predicted)

    def broken(layer, **_):
        raise RuntimeError("no compiler")

    def wrong(layer, **_):
        layer._compiled_call_impl = lambda x, *args, **kwargs: 3 * x

    for compile_, why in ((broken, "no: RuntimeError: no compiler"), (wrong, "no: ValueError: the logits differ")):
        model = mid().build(settings, torch.device("cpu"))
        before = mid().loss_of(model, *first).item()
        monkeypatch.setattr(torch.nn.Module, "compile", compile_)
        assert mid().compiled(model, first).startswith(why)
        assert mid().loss_of(model, *first).item() == before and all(p.grad is None for p in model.parameters())


def test_a_training_ends_at_its_tokens_its_seconds_or_its_deadline_whatever_is_first():
    for settings, deadline, tokens, done in (
        (mid().Settings(tokens=100, seconds=1e6), 1e6, 50, 0.5),
        (mid().Settings(tokens=100, seconds=1e-9), 1e6, 50, 1.0),
        (mid().Settings(tokens=100, seconds=float("inf")), -5, 50, 1.0),  # compiling took all the time
    ):
        progress = mid().Progress(settings, tokens)
        assert progress.done == 0.5  # before the clock starts
        progress.begin(time.monotonic() + deadline)
        time.sleep(0.01)
        assert progress.done == pytest.approx(done, abs=1e-3)


def test_the_mid_reasoner_has_the_size_that_the_aims_ask_for_and_fits_through_the_door():
    import torch

    settings = mid().Settings()
    with torch.device("meta"):
        weights = mid().build(settings, torch.device("meta")).num_parameters()
    assert 20e6 <= weights <= 60e6 and settings.layers * settings.heads >= 100 and settings.d_model >= 512
    # 64 MiB and 8 files come back: the pieces, mid-reasoner.json, report.json, report.md and rows.jsonl.
    assert 2 * weights < 58 * 2**20 and -(-2 * weights // 15_000_000) + 4 <= 8


# --- the ledger ----------------------------------------------------------------------------------------------

MADE_UP = (Aim("right", "good", "a", "<= 1"), Aim("right", "bad", "b", "<= 1"), Aim("right", "half", "c"), Aim("right", "half", "d"),
           Aim("right", "none", "e"), Aim("right", "moved", "f"), Aim("right", "missed", "h", ">= 2"))  # fmt: skip


def test_a_check_that_fails_becomes_a_red_row_with_its_traceback_and_does_not_stop_the_others(tmp_path):
    seen: list[int] = []

    def written() -> None:
        rows = json.loads((tmp_path / ledger.REPORT).read_text())["rows"] if (tmp_path / ledger.REPORT).exists() else []
        seen.append(len(rows))
        assert not rows or "| a | 0.5 |" in (tmp_path / ledger.PAGE).read_text()

    def good(_):
        written()
        return {"a": (0.5, "a | note")}

    def bad(_):
        written()
        raise RuntimeError("something broke")

    def half(_):
        written()
        yield "c", 1.0
        raise ValueError("after the first row")

    def none(_):
        written()
        try:
            raise ModuleNotFoundError("No module named 'trl'", name="trl")
        except ImportError as error:
            raise ImportError("Training needs TRL") from error

    def moved(_):
        written()
        raise ModuleNotFoundError("No module named 'trl.models'", name="trl.models")  # TRL is there and has changed

    checks = {"good": good, "bad": bad, "half": half, "none": none, "moved": moved, "missed": lambda _: {"h": float("nan")}}
    ledger.Ledger(tmp_path, "right", small=True, limit=60, aims=MADE_UP).run(checks, None)
    _, rows = ledger.read_rows(tmp_path)
    assert {row["row"]: row["verdict"] for row in rows} == {
        "a": "met", "b": "failed", "c": "measured", "d": "failed", "e": "absent", "f": "failed", "h": "missed",
    }  # fmt: skip
    assert seen == [0, 1, 2, 4, 5]  # rows that the report held when each check began
    text = (tmp_path / ledger.PAGE).read_text()
    assert "RuntimeError: something broke" in text and "ValueError: after the first row" in text and "trl is not installed" in text
    assert "| b |  | <= 1 | **failed** |" in text


def test_the_time_limit_stops_a_check_and_those_after_it_are_not_run(tmp_path):
    aims, ran = (Aim("right", "slow", "a"), Aim("right", "late", "b")), []

    def slow(_):
        try:
            time.sleep(60)
        except Exception:  # noqa: BLE001
            ran.append("the end of time was taken for an error")
        return {"a": 1.0}

    began = time.monotonic()
    ledger.Ledger(tmp_path, "right", small=True, limit=0.5, aims=aims).run(
        {"slow": slow, "late": lambda _: ran.append("late")}, None
    )
    assert time.monotonic() - began < 20 and not ran
    assert [row["verdict"] for row in ledger.read_rows(tmp_path)[1]] == ["not run", "not run"]


def test_a_number_is_judged_by_its_reach_and_speed_only_on_a_card(tmp_path):
    assert [Aim("fast", "c", "r", reach).met(2.0) for reach in ("<= 2", ">= 2", "== 2", "<= 1", ">= 3", "== 1")] == [True] * 3 + [
        False
    ] * 3
    assert not any(Aim("fast", "c", "r", reach).met(float("nan")) for reach in ("<= 2", ">= 2", "== 2"))
    aims = (Aim("fast", "c", "speed", "<= 1", on_card=True), Aim("fast", "c", "number", "<= 1"))
    book = ledger.Ledger(tmp_path, "fast", small=True, limit=60, aims=aims)
    for judged, verdict in ((False, "measured"), (True, "missed")):
        book.judged = judged
        book.run({"c": lambda _: {"speed": 2.0, "number": 2.0}}, None)
        assert {r["row"]: r["verdict"] for r in ledger.read_rows(tmp_path)[1]} == {"speed": verdict, "number": "missed"}


def test_a_stage_that_crashes_leaves_red_rows_and_what_it_measured(tmp_path):
    book = ledger.Ledger(tmp_path, "train", small=True, limit=60)
    book.run(dict.fromkeys((aim.check for aim in AIMS), lambda _: {"d_model": 64.0}), None)
    with (tmp_path / ledger.ROWS).open("a") as stream:
        stream.write('{"stage": "train", "row": "cut')  # killed in the middle of a line
    ledger.missing_rows(tmp_path, "right", "the process ended with status -11")
    _, rows = ledger.read_rows(tmp_path)
    assert [r["value"] for r in rows if r["row"] == "d_model"] == [64.0]
    assert {r["why"] for r in rows if r["stage"] == "right"} == {"the process ended with status -11"}
    assert "status -11" in (tmp_path / ledger.PAGE).read_text()


def test_a_stage_that_hangs_is_killed_and_its_rows_are_red(tmp_path, monkeypatch, capsys):
    runner = script(HERE / "run.py")
    monkeypatch.setattr(runner, "GRACE", 0.1)
    runner.apart(tmp_path, "right", small=True, limit=0.01)
    rows = ledger.read_rows(tmp_path)[1]
    assert {row["verdict"] for row in rows} == {"failed"} and len(rows) == sum(aim.stage == "right" for aim in AIMS)
    assert "was killed" in (tmp_path / ledger.PAGE).read_text() and "was killed" in capsys.readouterr().out


def test_every_check_of_the_aims_is_a_function_and_every_reach_of_the_issue_is_a_row():
    for stage in STAGES:
        named = set(re.findall(r'^    "(\w+)": ', (HERE / f"stage_{stage}.py").read_text().partition("CHECKS")[2], re.MULTILINE))
        inline = re.findall(r'"(\w+)": \w+[,}]', (HERE / f"stage_{stage}.py").read_text().partition("CHECKS")[2])
        assert {aim.check for aim in AIMS if aim.stage == stage} == named | set(inline)
    assert len({aim.row for aim in AIMS}) == len(AIMS)
    reaches = {aim.row: aim.reach for aim in AIMS}
    assert reaches["1.5B, captured step over the limit"] == "<= 2" and reaches["1.5B, captured tokens/s over generate"] == ">= 8"
    assert reaches["1.5B, steered over plain, time"] == "<= 1.03" and reaches["collect over a bare forward, time"] == "<= 1.05"
    assert (
        reaches["retrieval at 32k over eager, time"] == "<= 0.2"
        and reaches["GRPO step, 16 x 8, LoRA, over TRL's, time"] == "<= 0.5"
    )
    assert reaches["8k-token completions, 1.5B, one step's peak memory (GB)"] == "<= 24"


# --- the command for the borrowed machine --------------------------------------------------------------------


def test_the_command_for_the_borrowed_machine_is_short_enough_and_names_every_stage():
    text = (HERE / "README.md").read_text()
    (command,) = re.findall(r"```text\n(.*?)```", text, re.DOTALL)
    assert len(command) <= 2000 and "tests/gpu/card.sh" in command
    assert sum(STAGES.values()) <= 580  # one call may take 600 s


def test_the_script_for_the_borrowed_machine_runs_and_leaves_at_most_eight_small_files(tmp_path):
    """Here with a stand-in for ``run.py`` that writes as many files as it may."""
    pretended = tmp_path / "python3"
    pretended.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\ntouch "$OUT/report.md"\nexit 0\n')
    pretended.chmod(0o755)
    out = tmp_path / "out"
    out.mkdir()
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "OUT": str(out)}
    done = subprocess.run(["bash", str(HERE / "card.sh")], env=env, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls").read_text()
    assert "tests/gpu/run.py" in calls and len(list(out.iterdir())) <= 8
