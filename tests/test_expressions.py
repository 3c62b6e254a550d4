"""Expressions are compared in a helper process: hostile ones end, in every thread, and no process is left behind."""

import logging
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from toolkit import expressions
from toolkit.tasks.grading import last_number

pytest.importorskip("math_verify", reason="the [tasks] extra")
HOSTILE = r"The answer is \boxed{9^{9^{9^{9}}}}."
posix = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")


@pytest.fixture
def fresh():
    """No helper from another test, and none for the next."""
    expressions._stop_idle()
    yield
    expressions._stop_idle()


@pytest.fixture
def hurried(fresh, monkeypatch):
    monkeypatch.setattr(expressions, "SECONDS", 1)


def runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def ends(pid: int, seconds: float = 30.0) -> bool:
    """Return True if the process ends within some seconds."""
    limit = time.monotonic() + seconds
    while runs(pid) and time.monotonic() < limit:
        time.sleep(0.05)
    return not runs(pid)


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        (r"\frac{1}{2}", "The answer is 0.5.", True),
        ("-5", "It is −5 degrees.", True),
        ("12", r"\boxed{12", False),
        ("12", r"First \boxed{7}, then \boxed{12", False),
        ("5", r"\boxed{\text{There are 5 apples left.}}", True),
        ("5", r"\boxed{\text{There are 15 apples left.}}", False),
        ("5", r"\boxed{\text{There are 5 or 6 apples left.}}", False),
        ("5", r"The answer to question 5 is \boxed{x}.", False),
        ("1250", "Answer: a lot (1,250).", True),
        ("12", "The answer is 8 + 4", False),
        ("12", r"\boxed{3 \cdot 4}", False),
        ("12", r"\boxed{2(2 + 4)}", False),
        ("12", "8 + 4 = 12", True),
        ("x + 12", r"\boxed{12 + x}", True),
        ("3.5", r"\boxed{3\frac{1}{2}}", True),
        ("-320000", r"\boxed{-3.2 \times 10^5}", True),
        ("0.25", r"\boxed{25\%}", True),
        ("-5", r"\boxed{-5}", True),
        ("75", r"\boxed{\text{about .75 of them}}", False),
        ("0.75", r"\boxed{\text{about .75 of them}}", True),
        ("5", r"\boxed{\text{about .5 kg}}", False),
        ("0.5", r"\boxed{\text{about .5 kg}}", True),
        ("-0.5", r"\boxed{\text{about -.5 degrees}}", True),
        (".5", r"\boxed{\text{about 0.5 kg}}", True),
        ("5", r"\boxed{\text{room No.5}}", True),
        ("12", r"\boxed{\text{rooms 1,2}}", False),
        ("34", r"\boxed{\text{3,4 both}}", False),
        ("1,2", r"\boxed{\text{12 apples}}", False),
        ("1234.5", r"\boxed{\text{about 1,234.5 kg}}", True),
        ("1,234.5", r"\boxed{\text{about 1234.5 kg}}", True),
        ("2", r"\boxed{\text{2 or 2.0 kg}}", True),
    ],
)
def test_our_rules_beside_those_of_math_verify(gold, answer, right):
    assert expressions.equal(gold, answer) is right


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("1,234.5 and 12,345,678", ["1,234.5", "12,345,678"]),
        ("1,2 or 3,4567 or 1234,567", ["1", "2", "3", "4567", "1234", "567"]),
        (".75, -.5, $.25, (.1)", [".75", "-.5", ".25", ".1"]),
        ("No.5, wait...6, 7. Then", ["5", "6", "7"]),
        ("12-5 is 7", ["12", "5", "7"]),
        ("version 1.2.3", ["1.2"]),
        ("1,000, 2,000,", ["1,000", "2,000"]),
    ],
)
def test_numbers_are_read_as_they_are_written(text, numbers):
    assert expressions.NUMBER.findall(text) == numbers


@pytest.mark.parametrize("space", [r"\,", r"\:", r"\;", r"\ ", r"{\,}", "~", "\u2009", "\u202f", "\u00a0"])
def test_a_thin_space_between_thousands_is_part_of_the_number(space):
    for text in (rf"\boxed{{10{space}080}}", rf"The answer is $10{space}080$.", rf"\boxed{{10{space}080\,\text{{km}}}}"):
        assert expressions.equal("10080", text) and not expressions.equal("80", text), text
        assert last_number(text) == "10080"
    assert expressions.equal(f"1{space}234{space}567", r"\boxed{1234567}")
    for text in (f"3.141{space}592{space}653", f"5{space}km, 12{space}34", f"1{space}2345", f"(12,{space}345)", "rooms 10 200"):
        assert expressions.plain_numbers(text) == text


@posix
def test_an_endless_expression_is_wrong_and_counted_with_a_log_line(hurried, caplog):
    before = expressions.stopped()
    with caplog.at_level(logging.WARNING):
        assert not expressions.equal("7", HOSTILE)
    assert expressions.stopped() == before + 1
    assert "more than 1 s of CPU time" in caplog.text
    assert f"({before + 1} so far)" in caplog.text
    assert expressions.equal("7", r"\boxed{7}")  # the next one gets a helper that works


@posix
def test_an_endless_expression_ends_in_a_thread_while_others_go_on(hurried):
    before = expressions.stopped()
    with ThreadPoolExecutor(4) as pool:
        graded = list(pool.map(lambda answer: expressions.equal("7", answer), [HOSTILE, "7", HOSTILE, "8", "7.0"]))
    assert graded == [False, True, False, False, True]
    assert expressions.stopped() == before + 2


@posix
def test_a_box_that_takes_forever_to_parse_does_not_parse(hurried):
    assert expressions.parses("2^{3}")
    assert not expressions.parses("(" * 3000 + "7" + ")" * 3000)


@posix
def test_a_helper_that_makes_no_progress_is_killed_after_real_time(fresh, monkeypatch):
    helper = expressions._Helper()
    monkeypatch.setattr(expressions, "WAIT", 0.2)
    expressions._idle.append(helper)
    os.kill(helper.process.pid, signal.SIGSTOP)
    assert not expressions.equal("7", "7")
    assert helper.process.returncode == -signal.SIGKILL


def test_a_helper_that_ended_while_idle_is_replaced(fresh):
    assert expressions.equal("7", "7")
    before, helper = expressions.stopped(), expressions._idle[-1]
    helper.process.kill()
    helper.process.wait()
    assert expressions.equal("7", "7")
    assert expressions.stopped() == before


def test_one_helper_serves_all_requests_of_a_thread(fresh):
    for i in range(5):
        assert expressions.equal(str(i), f"The answer is {i}.")
    assert len(expressions._idle) == 1


@posix
@pytest.mark.parametrize("how", ["sys.exit(0)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_no_helper_outlives_its_process(how):
    code = (
        "import os, signal, sys; from toolkit import expressions; expressions.equal('7', '7'); "
        f"print(expressions._idle[0].process.pid, flush=True); {how}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.stderr == ""
    assert ends(int(done.stdout))


@posix
def test_a_forked_process_starts_a_helper_of_its_own():
    code = (
        "import os; from toolkit import expressions as e; e.equal('7', '7'); before = e._idle[0].process.pid; child = os.fork(); "
        "right = all([e.equal(str(i), str(i)) for i in range(50)]); assert right; now = e._idle[0].process.pid; "
        "assert (now == before) == bool(child); child and os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stderr) == (0, "")


@posix
def test_memory_is_limited(fresh, monkeypatch):
    monkeypatch.setattr(expressions, "MEMORY", 2**24)
    with pytest.raises(expressions.HelperError, match="ended with code"):
        expressions.equal("7", "7")


def test_an_environment_in_which_math_verify_misreads_percentages_is_refused(fresh, tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text(
        "def parse(text, **_): return [text]\ndef verify(gold, answer, **_): return gold == answer\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(expressions.HelperError, match=r"antlr4-python3-runtime==4\.13\.2"):
        expressions.equal("7", "7")
