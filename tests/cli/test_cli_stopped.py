"""Ctrl-C and SIGTERM: one line that says what is kept and where, the right exit code, and the same command goes on."""

from __future__ import annotations

import os
import re
import signal
import sys

import pytest

from toolkit import cli, store
from toolkit.engines import loop

SIZE = ("-n", "4", "-k", "2", "--max-new-tokens", "40", "--batch-size", "2")
LARGER = ("-n", "24", "-k", "2", "--max-new-tokens", "40", "--batch-size", "16", "--share", "0.4")
COMMANDS = {
    "rollouts": (("-o", "out"), "out"),
    "thinkedit": (("-m", "tiny-reasoner", "-o", "out"), "out.work/rollouts/train"),  # a class needs 8 rollouts
    "compare": (("base=tiny-reasoner", "again=tiny-reasoner", "-o", "out"), "out/rollouts/base, condition 1 of 2"),
    "entropy": (("-o", "out"), "out/rollouts"),
}


@pytest.fixture
def handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def main(monkeypatch, *arguments: str) -> int:
    """Exit code of the command line, as the shell sees it."""
    monkeypatch.setattr(sys, "argv", ["toolkit", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code or 0


@pytest.mark.parametrize(
    ("command", "number"),
    [("rollouts", signal.SIGINT), ("thinkedit", signal.SIGTERM), ("compare", signal.SIGTERM), ("entropy", signal.SIGINT)],
)
def test_a_stopped_command_says_what_is_kept_and_goes_on_when_given_again(command, number, tmp_path, monkeypatch, capsys, handlers):
    monkeypatch.chdir(tmp_path)
    arguments, where = COMMANDS[command]
    arguments = (*arguments, *(LARGER if command == "thinkedit" else SIZE))
    kept, every = (32, 48) if command == "thinkedit" else (4, 8)
    decode, begun = loop._decode, []

    def until(*args, **kwargs):
        begun.append(args[1])
        if len(begun) == 3:
            os.kill(os.getpid(), number)
        return decode(*args, **kwargs)

    monkeypatch.setattr(loop, "_decode", until)
    assert main(monkeypatch, command, *arguments) == 128 + number
    printed = " ".join(capsys.readouterr().err.split())
    assert (
        f"Stopped: {kept} of {every} kept in {where}; run the same command again to resume." in printed
        and "Traceback" not in printed
    )
    folder = where.partition(",")[0]
    assert len(store.load_rollouts(folder)) == kept
    monkeypatch.setattr(loop, "_decode", decode)
    assert main(monkeypatch, command, *arguments) == 0
    assert f"reusing {kept} of {every} rollouts kept in {folder}" in " ".join(capsys.readouterr().err.split())
    assert len(store.load_rollouts(folder)) == every


def test_what_steer_and_compare_sample_is_kept_without_being_asked(tmp_path, monkeypatch, capsys, handlers):
    monkeypatch.chdir(tmp_path)
    command = ("compare", "base=tiny-reasoner", "again=tiny-reasoner", *SIZE)
    assert main(monkeypatch, *command) == 0
    monkeypatch.setattr(loop, "_decode", lambda *a, **k: pytest.fail("sampled again"))
    assert main(monkeypatch, *command) == 0
    assert re.search(
        r"Open runs/compare/\w+/report\.html; rollouts and numbers are beside it", " ".join(capsys.readouterr().out.split())
    )


def test_what_other_problems_or_switches_decide_is_kept_elsewhere(tmp_path, monkeypatch, capsys, handlers):
    """The default folder is named by the problems themselves: a file that was changed is another one."""
    monkeypatch.chdir(tmp_path)
    folders = []
    for question in ("1+2=?", "2+2=?"):
        row = {"id": "p", "question": question, "answer": "3", "meta": {"split": "test"}}
        store.write_rows([row], tmp_path / "p.jsonl")
        assert main(monkeypatch, "compare", "base=tiny-reasoner", "again=tiny-reasoner", "-t", "p.jsonl", *SIZE) == 0
        folders.append({path.name for path in (tmp_path / "runs" / "compare").iterdir()})
    assert [len(names) for names in folders] == [1, 2]
