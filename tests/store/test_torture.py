"""Killed at any file operation or moment, a command given again finishes with what it would have written: small; all of it is ``make torture``."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torture

from toolkit import cli

SCRIPT = Path(__file__).parents[1] / "torture.py"


def test_killed_commands_go_on_lose_nothing_change_nothing_and_leave_no_litter(tmp_path):
    report = tmp_path / "torture.json"
    run = [sys.executable, str(SCRIPT), "--kills", "6", "--only", "rollouts,direction", "--report", str(report)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout[-3000:]}{done.stderr[-3000:]}"
    figures = json.loads(report.read_text())
    assert figures["kills"] >= 6 and set(figures["kills_by_command"]) == {"rollouts", "direction"}
    assert [figures[kind] for kind in ("stuck", "lost", "different", "litter")] == [0, 0, 0, 0]


# --- the harness itself sees what it looks for -------------------------------------------------------------------


def test_a_kill_at_the_first_file_operation_leaves_nothing_written(tmp_path):
    def work() -> int:
        torture.watch_operations(str(tmp_path), lambda n: torture.die())
        (tmp_path / "x").write_text("never")
        return 0

    status, _ = torture.forked(work, tmp_path.parent / "log")
    assert status == -9 and not (tmp_path / "x").exists()


def test_a_process_that_hangs_is_reported_as_stuck(tmp_path):
    def work() -> int:
        import time

        time.sleep(60)
        return 0

    status, seconds = torture.forked(work, tmp_path / "log", timeout=0.5)
    assert status == 1000 and seconds < 10


@pytest.mark.parametrize(
    ("name", "one", "other", "same"),
    [
        ("a.json", '{"x": 1, "step_time": 2}', '{"step_time": 3, "x": 1}', True),
        ("a.json", '{"x": 1}', '{"x": 2}', False),
        (
            "a.json",
            '{"updates": 1, "tokens/stopped": 2, "sometimes": 3}',
            '{"updates": 2, "tokens/stopped": 2, "sometimes": 3}',
            False,
        ),
        (
            "a.json",
            '{"seconds/rollouts": 1, "train_runtime": 2, "made": "2026-11-27T02:38:30"}',
            '{"made": "2026-11-27T02:38:31"}',
            True,
        ),
        ("a.jsonl", '{"x": 1}\n{"x": 2}\n', '{"x": 1}\n', False),
        ("a.txt", "made 2026-11-27T02:38:30", "made 2026-11-27T02:38:31", True),
    ],
)
def test_files_are_compared_by_what_they_mean_and_not_by_their_timings(tmp_path, name, one, other, same):
    digests = []
    for text in (one, other):
        (tmp_path / name).write_text(text)
        digests.append(torture.digest(tmp_path / name))
    assert (digests[0] == digests[1]) is same


def test_a_picture_is_not_read_but_has_to_be_there(tmp_path):
    (tmp_path / "report.html").write_text("one")
    assert torture.contents(tmp_path, (".html",)) == {"report.html": "skipped"}


def test_every_command_that_writes_is_killed():
    registered = {c.name or c.callback.__name__.replace("_", "-") for c in cli.app.registered_commands}
    assert {spec.args[0] for spec in torture.COMMANDS.values()} == registered - {"check", "push"}  # they write nothing here


@pytest.mark.parametrize(
    ("code", "kinds"),
    [("raise SystemExit(1)", ["stuck"]), ("import time; time.sleep(9)", ["stuck"]), ("open('out/x', 'w').write('1')", [])],
)
def test_a_command_that_fails_before_it_was_to_die_is_stuck_and_not_finished(tmp_path, monkeypatch, code, kinds):
    """Also where an earlier process said that it had finished."""

    def command(args, folder, kill=None):
        def work() -> int:
            (folder / "out").mkdir(exist_ok=True)
            os.chdir(folder)
            print("finished: this run is finished", flush=True)
            torture.die() if kill and kill.operation == 1 else exec(code)
            return 0

        return work

    monkeypatch.setattr(torture, "command", command)
    whole = torture.Reference({"x": torture.hashlib.sha256(b'"1"').hexdigest()[:16]}, 0.1, 1)
    tally, rng = torture.Tally(), random.Random(1)
    for _ in range(2):
        torture.trial(tmp_path, "x", torture.Command((), timeout=1.0), whole, rng, tally)
    assert {fault["kind"] for fault in tally.faults} == set(kinds)


def test_steps_policies_and_points_that_are_made_twice_are_seen(tmp_path):
    aside, work = tmp_path / torture.ASIDE, tmp_path / "work"
    state, about = work / "out" / "checkpoint-1" / "toolkit.json", work / "out" / "about.json"

    def keep() -> int:
        from toolkit import store
        from toolkit.grpo import saved

        saved.save_policy = lambda *args: None
        torture.note_what_is_kept(aside)
        for path in (state, about, work / "out" / "other.json"):
            store.write_json({}, path)
        return int(saved.save_policy(None, None, work / "out") is not None)

    for times in (1, 2):
        assert torture.forked(keep, tmp_path / "log")[0] == 0, (tmp_path / "log").read_text()
        assert len(torture.made_twice(work)) == (0 if times == 1 else 3)


def test_leftover_temporary_files_are_seen_and_not_compared(tmp_path):
    (tmp_path / ".x.json.1.partial").write_text("half")
    assert torture.litter(tmp_path) == [".x.json.1.partial"]
    assert torture.contents(tmp_path, ()) == {}
