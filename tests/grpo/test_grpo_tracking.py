"""Trackers get the log, and only if one is named: the same names, values and steps; a resumed run goes on in the same run."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
import types
from contextvars import ContextVar
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from transformers import TrainerCallback
from typer.testing import CliRunner

from toolkit import cli, tasks
from toolkit.board.ground import QUICK, Ground, adjust_sizes
from toolkit.generate import Sampling
from toolkit.grpo import log, parts, policies, recipes, run, tracking
from toolkit.grpo.extras import Extras
from toolkit.grpo.plan import TrainingPlan
from toolkit.grpo.run import Run, train

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="session")
def easy():
    return tasks.arithmetic.load("train", 24, operands=(2, 4))


@pytest.fixture
def small():
    return replace(recipes.plain("correctness"), problems=2, samples=4, max_tokens=48, learning_rate=1e-3)


class Fake:
    """What a tracker was told: one entry per run that was opened."""

    def __init__(self) -> None:
        self.runs: list[dict] = []

    def open(self, **about):
        self.runs.append({"about": about, "sent": [], "closed": False})
        return self

    init = open

    def define_metric(self, name, step_metric):
        self.runs[-1]["chart"] = (name, step_metric)

    def finish(self):
        self.runs[-1]["closed"] = True

    close = finish

    def flush(self):
        pass

    @property
    def sent(self) -> list[tuple[int, str, float]]:
        return [entry for opened in self.runs for entry in opened["sent"]]


class FakeTrackio(Fake):
    def init(self, **about):
        print("* Trackio metrics logged to a database")
        return self.open(**about)

    def log(self, values, step):
        self.runs[-1]["sent"] += [(step, name, value) for name, value in values.items()]


class FakeWandb(Fake):
    def log(self, values):
        self.runs[-1]["sent"] += [(values["step"], name, value) for name, value in values.items() if name != "step"]


class FakeTensorBoard(Fake):
    def SummaryWriter(self, folder, purge_step):
        return self.open(folder=folder, purge_step=purge_step)

    def add_scalar(self, name, value, step):
        self.runs[-1]["sent"].append((step, name, value))


def module_of(name):
    """Return an empty module that looks installed."""
    module = types.ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    return module


@pytest.fixture
def fakes(monkeypatch):
    """Fake modules of all trackers, by name."""
    made = {"trackio": FakeTrackio(), "wandb": FakeWandb(), "tensorboard": FakeTensorBoard()}
    for name, fake in made.items():
        module = module_of(name)
        for attribute in ("init", "log", "finish", "SummaryWriter"):
            setattr(module, attribute, getattr(fake, attribute, None))
        module.run, module.context_vars = (
            None,
            types.SimpleNamespace(current_run=ContextVar("run", default=None)),
        )  # TRL reads these
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, module)
    monkeypatch.setitem(sys.modules, "tensorboard", module_of("tensorboard"))
    return made


class Kill(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def numbers_of(rows):
    return [(row["step"], name, value) for row in rows for name, value in tracking.numbers(row).items()]


def plan_of(out, **settings):
    held_out = tuple(tasks.arithmetic.load("dev", 4, operands=(2, 4)))
    sampling = Sampling(n=2, max_new_tokens=48)
    return Run(out, **{"steps": 3, "save_every": 2, "evaluate_every": 2, "held_out": held_out, "evaluate": sampling, **settings})


def logged(out):
    """Return every number in a run's log, as ``(step, name, value)``."""
    return numbers_of(log.read(out / log.LOG))


@pytest.mark.parametrize("tracker", tracking.TRACKERS)
def test_a_tracker_gets_every_number_of_the_log_and_the_name_of_the_directory(tiny, easy, small, tmp_path, fakes, capsys, tracker):
    out = tmp_path / "my-run"
    train(tiny, small, easy, plan_of(out), extras=Extras(track=tracker))
    (opened,) = fakes[tracker].runs
    assert opened["sent"] == logged(out)
    wanted = {(0, "held_out/accuracy"), (1, "reward"), (2, "held_out/accuracy"), (3, "loss"), (3, "held_out/think_tokens")}
    assert wanted <= {(step, name) for step, name, _ in opened["sent"]}
    assert all(math.isfinite(value) for _, _, value in opened["sent"])
    assert opened["about"].get("name", "my-run").startswith("my-run")
    assert opened["about"].get("folder", str(out)) == str(out)
    assert opened["closed"]
    assert capsys.readouterr().out == ""  # standard output is for results
    assert not any(other.runs for name, other in fakes.items() if name != tracker)


def test_nothing_is_sent_unless_a_tracker_is_named(tiny, easy, small, tmp_path, fakes):
    plan = plan_of(tmp_path / "run", steps=1)
    assert run.arguments(tiny, small, plan).report_to == []  # whatever is installed: transformers' own callbacks stay away, too
    train(tiny, small, easy, plan)
    assert not any(fake.runs for fake in fakes.values())
    assert not (tmp_path / "run" / tracking.MARK).exists()


@pytest.mark.parametrize("tracker", tracking.TRACKERS)
def test_a_resumed_run_goes_on_in_the_same_run_of_the_tracker(tiny, easy, small, tmp_path, fakes, tracker):
    out = tmp_path / "my-run"
    with pytest.raises(KeyboardInterrupt):
        train(tiny, small, easy, plan_of(out, steps=4), extras=Extras(track=tracker, callbacks=(Kill(4),)))
    train(tiny, small, easy, plan_of(out, steps=4), extras=Extras(track=tracker), resume=True)
    before, after = fakes[tracker].runs
    assert before["closed"] and after["closed"]
    first, second = before["about"], after["about"]
    if tracker == "tensorboard":
        assert first == {"folder": str(out), "purge_step": 0} and second == {"folder": str(out), "purge_step": 3}
    elif tracker == "trackio":
        assert first["name"].startswith("my-run-") and second["name"] == first["name"]
        assert (first["resume"], second["resume"]) == ("never", "allow")
    else:
        assert first == second and len(first["id"]) == 16 and first["resume"] == "allow"
        assert before["chart"] == after["chart"] == ("*", "step")
    assert {step for step, _, _ in before["sent"]} == {0, 1, 2, 3} and {step for step, _, _ in after["sent"]} == {3, 4}
    # Step 3 was sent twice. Its times differ; everything else is equal, and all of it is the log.
    timed = {name for _, name, _ in before["sent"] if "time" in name or "seconds" in name}
    sent = {(step, name): value for step, name, value in fakes[tracker].sent}
    again = {(s, n): v for s, n, v in before["sent"] if s == 3 and n not in timed}
    assert again and all(sent[at] == value for at, value in again.items())
    assert sent == {(step, name): value for step, name, value in logged(out)}


def test_a_new_run_in_another_directory_of_the_same_name_is_another_run(tmp_path, fakes):
    for parent in ("a", "b"):
        (tmp_path / parent / "run").mkdir(parents=True)
        for tracker in ("trackio", "wandb"):
            with tracking.opened(tracker, tmp_path / parent / "run", 0) as note:
                note({"step": 0, "reward": 1.0})
    assert [opened["about"]["resume"] for opened in fakes["trackio"].runs] == ["never", "never"]
    assert len({opened["about"]["name"] for opened in fakes["trackio"].runs}) == 2  # trackio finds runs by their names
    assert len({opened["about"]["id"] for opened in fakes["wandb"].runs}) == 2


@pytest.mark.parametrize("tracker", tracking.TRACKERS)
def test_a_tracker_that_fails_is_warned_about_once_and_the_run_goes_on(tracker, tmp_path, fakes, caplog, monkeypatch):
    (tmp_path / "run").mkdir()
    with tracking.opened(tracker, tmp_path / "run", 0) as note:
        note({"step": 0, "reward": 1.0})
        monkeypatch.setattr(tracking, "numbers", lambda row: 1 / 0)
        note({"step": 1, "reward": 1.0})
        note({"step": 2, "reward": 1.0})
    assert [f"{tracker} gets no more of this run" in record.message for record in caplog.records] == [True]


def test_the_last_step_of_an_adapter_is_sent_again_with_the_results_of_the_saved_model(tiny, easy, small, tmp_path, fakes):
    out = tmp_path / "run"
    train(tiny, small, easy, plan_of(out, steps=1), extras=Extras(track="tensorboard", train=parts.adapter(4)))
    sent = fakes["tensorboard"].sent
    assert [step for step, name, _ in sent if name == "held_out/accuracy"] == [0, 1, 1]
    assert {(step, name): value for step, name, value in sent} == {(step, name): value for step, name, value in logged(out)}


def test_a_tracker_is_closed_when_training_fails(tmp_path, fakes):
    with pytest.raises(ZeroDivisionError), tracking.opened("tensorboard", tmp_path, 0):
        raise ZeroDivisionError
    assert fakes["tensorboard"].runs[0]["closed"]


# --- refused before any work ----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["grpo", "board"])
@pytest.mark.parametrize("tracker", tracking.TRACKERS)
def test_a_tracker_that_cannot_be_imported_is_refused_before_any_work(command, tracker, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, tracker, None)
    monkeypatch.setattr(f"toolkit.cli.{command}.load_model", lambda *_: pytest.fail("the model was loaded"))
    result = CliRunner().invoke(cli.app, [command, "--track", tracker, "--out", str(tmp_path / "run")])
    assert result.exit_code == 1
    message = str(result.exception)
    assert f"needs the package {tracker}" in message and "pip install 'reasoning-length-toolkit[track]'" in message
    assert not (tmp_path / "run" / log.LOG).exists()


@pytest.mark.parametrize("make", [Extras, TrainingPlan])
def test_an_unknown_tracker_is_refused_with_the_names_of_the_known_ones(make):
    with pytest.raises(ValueError, match="Unknown tracker 'mlflow': choose one of trackio, wandb, tensorboard"):
        make(track="mlflow")


def test_transformers_own_way_to_report_is_refused_and_the_option_named(tmp_path):
    with pytest.raises(ValueError, match=r"report_to cannot be set for TRL alone.*--track"):
        run.check_free(["report_to"])


# --- a tracker changes no result --------------------------------------------------------------------------------


def test_a_tracker_is_in_no_key_and_reaches_every_policy(tiny, tmp_path, fakes):
    plain, tracked = (adjust_sizes(QUICK, {"track": name}, {}, tiny=True) for name in (None, "wandb"))
    assert (plain.training.track, tracked.training.track) == (None, "wandb")
    assert Ground(tiny, plain, tmp_path).identity == Ground(tiny, tracked, tmp_path).identity
    assert plain.training.identity == tracked.training.identity
    assert policies._extras(tracked.training, None).track == "wandb"


# --- the real ones ----------------------------------------------------------------------------------------------

ROWS = [
    {"step": 0, "held_out/accuracy": 0.25},
    {"step": 1, "reward": 0.5, "tokens/wrong": None, "alarms": ["loops"]},
    {"step": 2, "reward": 1},
]


def send_with_a_break(tracker, out):
    """Send the rows; the last one first by a run that is killed, then by the run that goes on."""
    out.mkdir()
    for rows, first in ((ROWS, 0), (ROWS[2:], 2)):
        with tracking.opened(tracker, out, first) as note:
            for row in rows:
                note(row)
        time.sleep(1.1)  # wandb names a directory by the second


def wandb_records(path):
    """Read a file of wandb: LevelDB's log format after a header of 7 bytes, each record a message of protobuf."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # the rest of a block
            at += 32768 - at % 32768
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a full record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


@pytest.mark.slow
def test_the_real_wandb_keeps_the_log_in_one_run_on_this_machine(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the [track] extra")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    send_with_a_break("wandb", tmp_path / "my-run")
    files = sorted((tmp_path / "my-run" / "wandb").glob("offline-run-*/run-*.wandb"))
    records = [record for file in files for record in wandb_records(file)]
    assert {(r.run.display_name, r.run.project) for r in records if r.HasField("run")} == {("my-run", tracking.PROJECT)}
    assert len({r.run.run_id for r in records if r.HasField("run")}) == 1
    rows = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in r.history.item}
        for r in records
        if r.HasField("history")
    ]
    sent = [
        (row["step"], name, value) for row in rows for name, value in row.items() if name != "step" and not name.startswith("_")
    ]
    assert sent == [*numbers_of(ROWS), *numbers_of(ROWS[2:])]


def test_the_real_tensorboard_shows_the_log_with_each_step_once(tmp_path):
    pytest.importorskip("tensorboard", reason="the [track] extra")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    send_with_a_break("tensorboard", tmp_path / "my-run")
    events = EventAccumulator(str(tmp_path / "my-run")).Reload()
    shown = [(e.step, name, e.value) for name in events.Tags()["scalars"] for e in events.Scalars(name)]
    assert sorted(shown) == sorted(numbers_of(ROWS))


def test_the_real_trackio_keeps_the_log_in_one_run_on_this_machine(tmp_path):
    pytest.importorskip("trackio", reason="the [track] extra")
    # Its database lies where TRACKIO_DIR says when it is imported.
    code = (
        "import json, sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import test_grpo_tracking as t; "
        "from toolkit.grpo import tracking; t.send_with_a_break('trackio', Path(sys.argv[2])); "
        "from trackio.sqlite_storage import SQLiteStorage as S; runs = S.get_runs(tracking.PROJECT); "
        "print(json.dumps([runs, S.get_logs(tracking.PROJECT, 'my-run')]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path / "my-run")],
        env={**os.environ, "TRACKIO_DIR": str(tmp_path / "database")}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    runs, rows = json.loads(done.stdout)
    assert runs == ["my-run"]
    sent = [(row["step"], name, value) for row in rows for name, value in row.items() if name not in ("step", "timestamp")]
    assert sorted(sent) == sorted([*numbers_of(ROWS), *numbers_of(ROWS[2:])])
