"""Helping processes end with the one that started them, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from toolkit import processes
from toolkit.cli import board as command

PARENT = """
import subprocess, time
from toolkit import processes
real = subprocess.Popen
subprocess.Popen = lambda args: real([*args[:2], FIRST + args[2], *args[3:]])
print(processes.start_helper("import sys, time; print(sys.argv[1], flush=True); time.sleep(60)", ["started"]).pid, flush=True)
time.sleep(60)
"""
ELSEWHERE = "import sys; sys.platform = 'elsewhere'; "  # what a helper runs first, so that Linux does not help it


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("first", ["", ELSEWHERE], ids=["Linux", "elsewhere"])
def test_a_helper_ends_with_its_parent_however_that_ends(how, first):
    code = PARENT.replace("FIRST", repr(first))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        said = {parent.stdout.readline().strip() for _ in range(2)}
        (pid,) = (int(text) for text in said - {"started"})
        assert is_running(pid)
        parent.send_signal(how)
    deadline = time.monotonic() + 5
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(pid)


def test_the_helpers_of_a_board_are_such_processes(monkeypatch):
    started, real = [], subprocess.Popen
    monkeypatch.setattr(
        processes.subprocess, "Popen", lambda arguments: started.append(arguments) or real([sys.executable, "-c", ""])
    )
    monkeypatch.setattr(sys, "argv", ["toolkit", "board", "--jobs", "2"])
    command._helper().wait()
    assert f"end_with({os.getpid()})" in started[0][2] and started[0][-1] == command.WORKER
