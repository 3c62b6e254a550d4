"""Compare mathematical expressions with the package math-verify, in a helper process that has limits on time and memory.

A model can write an expression that takes hours to evaluate, such as ``9^{9^{9^{9}}}``. math-verify has a time limit of its own, but it
relies on a signal. Python handles signals only in the main thread, and a signal cannot interrupt one long operation on large numbers. So
expressions are evaluated in a helper process, which the operating system ends when it exceeds a limit. This works from every thread.

* The time limit counts CPU time, so a result does not depend on the load of the machine. In addition, the helper is killed after ``WAIT``
  seconds of real time. On Windows, which has no limit on CPU time, this is the only limit.
* If an expression exceeds a limit, it counts as unequal (or unparsable). A warning is logged, with the number of such cases so far
  (``stopped``).
* A comparison uses an idle helper or starts a new one. So there are at most as many helpers as threads that compare at the same time.
* A helper ends when its standard input is closed, at the latest when this process ends.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

SECONDS = 5  # CPU time per request, the limit that math-verify sets by default to each of its parts (ours for the whole)
WAIT = 120.0  # real time per request, in seconds, and for the start of a helper
MEMORY = 4 * 2**30  # address space of a helper, in bytes
# Whole numbers in groups of three, decimal numbers, and those that begin with a point. A minus after a number is no sign: "12-5" ends in 5.
# Commas elsewhere separate numbers ("rooms 1,2"). A point after a letter or a point begins no number ("No.5", "...5").
NUMBER = re.compile(r"(?<!\d)(?<!\d\.)-?(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|(?<![\w.])\.\d+)")
# A number in groups of three with LaTeX's spaces (\, \: \; "\ " ~) or spaces of Unicode that do not break a line. A group after a decimal
# point begins no number. A plain blank is left alone: in "rooms 10 200" it separates two numbers.
_SPACE = r"(?:\{?\\[,:; ]\}?|~|[\u00a0\u2009\u202f])"
_SPACED = re.compile(
    rf"(?<![\d.])(?<!\d\\[,:; ])(?<!\d\{{\\[,:; ]\}})(?<!\d[~\u00a0\u2009\u202f])\d{{1,3}}(?:{_SPACE}\d{{3}})+(?!\d)"
)
log = logging.getLogger(__name__)
_idle: list[_Helper] = []  # helpers that wait for a request
_counting = threading.Lock()
_stopped = 0


class HelperError(RuntimeError):
    """The helper process could not start, or math-verify reads expressions wrongly in this environment."""


def equal(gold: str, answer: str) -> bool:
    r"""Return True if math-verify finds the expression in ``answer`` equal to the gold answer.

    Of several expressions in an answer, math-verify chooses one: the last in ``\boxed{}``, else the one after words such as "the answer
    is", else the last one. The toolkit adds four rules:

    - An answer whose last ``\boxed{}`` is never closed is wrong: it was cut off, and the number in the box may be incomplete.
    - If the gold answer is a number, an answer that is a sum, or a product of whole numbers, is wrong: ``8 + 4`` repeats a problem without
      solving it.
    - The minus sign of Unicode is read as ``-``, and thin spaces in a number are left out (see ``plain_numbers``).
    - If the gold answer is a number and math-verify finds only words, the number in the last box (without a box: in the whole answer) is
      compared, if there is exactly one. So ``\boxed{\text{5 apples}}`` is 5.

    Args:
        gold: Gold answer as LaTeX without ``$``, such as ``\frac{1}{2}``.
        answer: Text of the answer, words included.

    Raises:
        ImportError: math-verify is not installed.
        HelperError: the helper process could not start, or math-verify reads expressions wrongly in this environment.

    >>> equal(r"\frac{1}{2}", "The answer is 0.5.")
    True
    """
    if "\\boxed{" in answer and last_boxed(answer) is None:
        return False
    return _ask("equal", *(plain_numbers(text) for text in (gold, answer)))


def plain_numbers(text: str) -> str:
    r"""Return a text with ``-`` for the minus sign of Unicode, and without the thin spaces in numbers of several groups of three digits.

    >>> plain_numbers(r"10\,080 km or 5\,km")
    '10080 km or 5\\,km'
    """
    return _SPACED.sub(lambda number: re.sub(_SPACE, "", number[0]), text.replace("−", "-"))


def parses(latex: str) -> bool:
    r"""Return True if math-verify can parse ``\boxed{latex}``. It raises the errors that ``equal`` raises.

    >>> parses(r"\frac{1}{2}"), parses(r"\frac{1")
    (True, False)
    """
    return _ask("parses", latex)


def last_boxed(answer: str) -> str | None:
    r"""Return the content of the last ``\boxed{}``; ``None`` if the text has no box, or if the last box is never closed.

    >>> last_boxed(r"so \boxed{\frac{1}{2}}")
    '\\frac{1}{2}'
    """
    start = answer.rfind("\\boxed{")
    depth = 0  # number of open braces; back at 0 where the box closes
    for i in range(start + len("\\boxed"), len(answer)) if start >= 0 else ():
        depth += (answer[i] == "{") - (answer[i] == "}")
        if not depth:
            return answer[start + len("\\boxed{") : i]
    return None


def stopped() -> int:
    """Return the number of calls of ``equal`` and ``parses`` in this process that returned False because a limit was exceeded."""
    return _stopped


def _ask(*request: str) -> bool:
    global _stopped
    if find_spec("math_verify") is None:
        raise ImportError("Comparing expressions needs math-verify: pip install 'reasoning-length-toolkit[tasks]'.")
    helper, reply = _free_helper(), None
    try:
        reply = helper.ask(request)
    finally:  # also after Ctrl-C: a helper that still owes a reply must not get another request
        if reply is None:
            helper.stop()
        else:
            _idle.append(helper)
    if isinstance(reply, str):
        log.warning("math-verify failed on an expression, which counts as wrong: %r: %s", request[-1][-80:], reply)
        return False
    if reply is None:
        with _counting:
            _stopped += 1
        log.warning(
            "An expression took more than %d s of CPU time or too much memory and counts as wrong (%d so far): %r",
            SECONDS, _stopped, request[-1][-80:],
        )  # fmt: skip
        return False
    return reply


def _free_helper() -> _Helper:
    """Return an idle helper that still runs, or a new one. (The system may have killed an idle helper when memory was short.)"""
    while True:
        try:
            helper = _idle.pop()
        except IndexError:
            return _Helper()
        if helper.process.poll() is None:
            return helper
        helper.stop()


class _Helper:
    """A helper process that answers one request at a time.

    Raises:
        HelperError: the process ended before it was ready, or was not ready after ``WAIT`` seconds; or math-verify misreads percentages.
    """

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", f"from toolkit.expressions import _serve; _serve({SECONDS}, {MEMORY})"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # antlr prints there what it cannot parse
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path if isinstance(path, str))},
        )
        works = self._read()
        if not works:
            code = self.stop()
            raise HelperError(
                "math-verify does not read 25\\% as 0.25 here, so its verdicts would be wrong. This happens with antlr4-python3-runtime 4.11, "
                "which lm-eval[math] requires: pip install antlr4-python3-runtime==4.13.2, or use an environment without lm-eval[math]."
                if works is False
                else f"The helper process that compares expressions ended with code {code} before it was ready. To see why: "
                f"{sys.executable} -c 'import math_verify'"
            )

    def ask(self, request: tuple[str, ...]) -> Any:
        """Send a request and return its reply: a verdict, or the text of an error. Return ``None`` if the helper ended instead."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return None
        return self._read()

    def stop(self) -> int:
        """End the process if it still runs. Return its exit code: if a signal ended it, the negative number of this signal."""
        self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:  # of the rest of a request that the helper did not read
                continue
        return self.process.wait()

    def _read(self) -> Any:
        assert self.process.stdout is not None
        guard = threading.Timer(WAIT, self.process.kill)
        guard.daemon = True
        guard.start()
        try:
            line = self.process.stdout.readline()
        finally:
            guard.cancel()
        return json.loads(line) if line.endswith(b"\n") else None


def _stop_idle() -> None:
    while _idle:
        _idle.pop().stop()


def _forget_idle() -> None:
    """Remove the parent's idle helpers from the list of a forked process, because only the parent may use them."""
    for helper in _idle:
        helper.process.returncode = 0  # the process is no child of this one, so there is nothing to wait for
    _idle.clear()


atexit.register(_stop_idle)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_idle)


def _serve(seconds: int, memory: int) -> None:
    """Run as a helper process: answer requests from standard input, one JSON list per line, until standard input is closed.

    Args:
        seconds: Limit on CPU time per request.
        memory: Limit on the address space, in bytes.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks; this one ends with it
    logging.disable()
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # antlr prints to standard output
    handlers: dict[str, Callable[..., bool]] = {"equal": _equal, "parses": _parses}
    _limit("RLIMIT_AS", memory)
    _limit("RLIMIT_CORE", 0)  # a process that reaches its limit leaves no core file
    reply: Any = _equal(r"25\%", "0.25") and _parses("2")  # imports math-verify, and tries its parser
    while True:
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()
        line = sys.stdin.buffer.readline()
        if not line:
            return
        _limit_time(seconds)
        kind, *texts = json.loads(line)
        try:
            reply = handlers[kind](*texts)
        except MemoryError:
            return  # a limit, like one that the system ends this process at
        except Exception as error:  # noqa: BLE001  # math-verify and sympy raise many kinds
            reply = f"{type(error).__name__}: {str(error)[:200]}"


def _equal(gold: str, answer: str) -> bool:
    from math_verify import verify

    values, number = _parsed(answer), NUMBER.fullmatch(gold)
    if number and any(_is_unsolved(value) for value in values):
        return False
    # A gold answer such as \frac{1}{2} parses only inside a mathematics environment.
    if verify(_parsed(f"${gold}$"), values, timeout_seconds=None):
        return True
    return number is not None and _only_number(values, answer) == float(gold.replace(",", ""))


def _is_unsolved(value: Any) -> bool:
    """Return True for a sum (``8 + 4``) and for a product of whole numbers (``2 * 3``). Return False for fractions and ``3.2 * 10**5``.

    Args:
        value: Result of math-verify's parser: a sympy expression, or a text.
    """
    from sympy import Add, Expr

    if not isinstance(value, Expr):
        return False
    factors = value.args if value.is_Mul else ()
    return value.has(Add) or (len(factors) > 1 and all(f.is_Integer and abs(f) != 1 for f in factors))


def _only_number(values: list[Any], answer: str) -> float | None:
    """Return the only number in the last ``\\boxed{}`` of an answer, or in the whole answer if it has no box.

    Return ``None`` if there are several numbers or none, or if math-verify found more than words.

    Args:
        values: What math-verify found in the answer, from ``_parsed(answer)``.
        answer: Text of the answer.
    """
    from sympy import Symbol

    box = last_boxed(answer)
    numbers = {float(number.replace(",", "")) for number in NUMBER.findall(answer if box is None else box)}
    return numbers.pop() if len(numbers) == 1 and all(isinstance(value, str | Symbol) for value in values) else None


def _parses(latex: str) -> bool:
    return bool(_parsed(f"\\boxed{{{latex}}}", fallback_mode="no_fallback"))


def _parsed(text: str, **options: Any) -> list[Any]:
    from math_verify import parse

    return parse(text, parsing_timeout=None, **options)


def _limit_time(seconds: int) -> None:
    """Let the system end this process after it has used ``seconds`` to ``seconds + 1`` more CPU time. No effect on Windows."""
    used = sum(os.times()[:2])
    _limit("RLIMIT_CPU", int(used) + 1 + seconds)


def _limit(name: str, value: int) -> None:
    """Set a resource limit of this process, capped at its hard limit. No effect if the system lacks it (Windows; memory on macOS)."""
    try:
        import resource
    except ImportError:
        return
    kind = getattr(resource, name)
    _, hard = resource.getrlimit(kind)
    with suppress(OSError, ValueError):
        resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))
