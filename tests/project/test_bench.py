"""The benchmark suite on a machine that lacks packages or has a GPU: what can be shown of it on a CPU."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "tests" / "benchmarks"


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tmp_path, monkeypatch) -> Any:
    """The suite, which writes into a directory of the test."""
    suite = script("run")
    monkeypatch.setattr(suite, "OUT", tmp_path)
    return suite


def test_a_package_that_is_missing_is_absent_from_the_versions(run, monkeypatch):
    def version(name: str) -> str:
        if name in ("transformer-lens", "nnsight", "trl"):
            raise PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(run, "version", version)
    found = run.versions()
    assert found["transformer-lens"] == found["nnsight"] == found["trl"] == "absent" and found["torch"] == "1"


def test_a_group_that_lacks_a_package_is_absent_and_any_other_error_is_a_failure(run):
    absent = run.unmeasured("grpo", "Traceback ...\nModuleNotFoundError: No module named 'trl'\n")
    assert absent["gate"] == "absent: trl is not installed" and absent["reached"] is None
    for said in ("ValueError: x\n", "ModuleNotFoundError: No module named 'trl.models'\n", ""):
        failed = run.unmeasured("grpo", said)
        assert failed["gate"].startswith("FAILED") and failed["reached"] is False


def test_the_report_is_written_after_every_group_and_one_group_runs_at_a_time(run, tmp_path, monkeypatch):
    seen: list[list[str]] = []
    running: list[str] = []

    def pretended(command, **_):
        group = next(g for g, file in run.GROUPS.items() if file in command[-1])
        assert not running and "taskset" not in command
        running.append(group)
        report = tmp_path / "report.json"
        seen.append([row["name"] for row in json.loads(report.read_text())["rows"]] if report.exists() else [])
        row = {"name": group, "ratio": 1.0, "spread": None, "reach": None, "reached": None, "gate": "", "bound_by": "", "note": ""}
        (tmp_path / f"{group}.json").write_text(json.dumps([row]))
        running.remove(group)
        return subprocess.CompletedProcess(command, group == "edit", "", "ValueError: broken")

    monkeypatch.setattr(run, "machine", lambda device: {"device": device})  # it runs a command of its own
    monkeypatch.setattr(run.subprocess, "run", pretended)
    asked = argparse.Namespace(device="cpu", keep=False)
    failed = run.measured_by(["edit", "collect", "grpo"], tmp_path, {}, [None], lambda f: run.write_report(asked, tmp_path, f))
    assert [len(names) for names in seen] == [0, 1, 2] and list(failed) == ["edit"]
    rows = run.write_report(asked, tmp_path, failed)["rows"]
    assert [row["gate"] for row in rows] == ["FAILED: ValueError: broken", "", ""]
    assert "FAILED" in (tmp_path / "report.md").read_text()


@dataclass
class Event:
    """An average of PyTorch's profiler."""

    key: str
    device_type: Any
    self_device_time_total: float
    self_cpu_time_total: float = 0.0


def test_the_time_of_a_kernel_is_counted_once(monkeypatch):
    clock = script("clock")
    monkeypatch.setattr(clock, "DEVICE", torch.device("cuda"))
    kinds = torch.autograd.DeviceType
    events = [Event("aten::mm", kinds.CPU, 3e6), Event("nvjet_gemm", kinds.CUDA, 3e6), Event("aten::add", kinds.CPU, 1e6)]
    totals, own = clock.split(events)
    assert own == 4.0 and totals["matrix products"] == 3.0


def test_a_script_in_our_own_interpreter_finds_a_toolkit_that_is_not_installed(monkeypatch):
    clock, seen = script("clock"), {}

    def pretended(command, *, env, **_):
        seen[command[0]] = env["PYTHONPATH"]
        return subprocess.CompletedProcess(command, 0, "{}\n", "")

    monkeypatch.setattr(clock.subprocess, "run", pretended)
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    clock.apart("memory.py", "collect", "1")
    clock.apart("peers.py", python="/another/python")
    assert seen == {sys.executable: "/somewhere", "/another/python": ""}


def test_make_bench_installs_nothing_for_a_gpu():
    command = ["make", "--dry-run", "--no-print-directory", "-C", str(ROOT), "bench", "VENV=/nowhere", "BENCH=/nowhere/bench"]
    on_gpu = subprocess.run([*command, "DEVICE=cuda"], capture_output=True, text=True, check=True).stdout
    assert "pip" not in on_gpu and "run.py" in on_gpu and "--device cuda" in on_gpu
    assert "pip" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
