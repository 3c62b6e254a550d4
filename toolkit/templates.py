"""Check chat templates before they are used, list their switches (variables such as ``enable_thinking``), and fix the date they print.

A chat template is a program that comes with a checkpoint. Jinja's sandbox prevents it from reading files and running Python. But it may
still loop forever or write gigabytes of text. So ``check`` first renders the template in a *trial*: a separate process with limits on time
and memory. This file is also the script that the trial runs, so it may import only jinja2 and the standard library.
"""

from __future__ import annotations

import json
import re
import string
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import datetime
from functools import cache
from itertools import product
from typing import Any

from jinja2 import TemplateError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

QUESTION = "12+3=?"
CONVERSATIONS = (
    [{"role": "user", "content": QUESTION}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}],
    [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "15"}, {"role": "user", "content": "And one more?"}],
    [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "15"}],
)
# Values of add_generation_prompt to try: both are used later, and the template may loop endlessly for only one of them.
OPENED = (True, False)
SECONDS, BYTES, CHARACTERS = 3, 2**30, 200_000
"""Limits for rendering a template in a separate process: seconds of CPU time, bytes of memory, characters in a rendered prompt."""
WALL = 15.0  # limit of a trial in seconds of wall-clock time; on a busy machine a trial takes longer than its CPU time
RESERVED = frozenset(("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "raise_exception"))
"""Variables that transformers sets when it renders a template. They are not switches (variables that a user may set)."""
CLOCK = "strftime_now"
"""Function of transformers by which a template prints the current date. It is a switch here: its value is the date to print instead."""
DATE = "2026-01-01"
"""Date that templates print unless the user sets another one. It never changes, so prompts do not depend on the day: a stopped run can
resume after midnight, and conditions that are sampled on different days get the same prompts."""


class TemplateProblem(ValueError):
    """A chat template cannot be used, or it does not read a variable that the user has set, such as ``enable_thinking``."""


class _Generation(Extension):
    """Jinja extension for the tag ``{% generation %}`` of transformers, which marks the assistant's text and does not change the output."""

    tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """Return a Jinja environment with the settings, filters and functions that transformers uses for chat templates."""

    def refuse(message: str) -> None:
        raise TemplateError(message)

    extensions = ["jinja2.ext.loopcontrols", _Generation]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = lambda value, **kwargs: json.dumps(value, ensure_ascii=False)
    environment.globals |= {"raise_exception": refuse, CLOCK: lambda form: form}
    return environment


def check(template: str, tokens: Mapping[str, str], switches: Mapping[str, Any]) -> None:
    """Check that a chat template can render a test question within limits on time and memory, and that it reads all ``switches``.

    Args:
        template: Text of the template.
        tokens: Special tokens: name, such as ``eos_token`` -> text.
        switches: Variables to set in the template: name -> value, such as ``{"enable_thinking": False}``. The template must read them all.

    Raises:
        TemplateProblem: the template is not valid Jinja, raises an error, leaves out the question, needs too much time or memory, or does
            not read one of ``switches``; or the date to print (``strftime_now``) is no date.
    """
    dated = with_date(template, switches[CLOCK]) if CLOCK in switches else template
    _try(dated, json.dumps([dict(tokens), without_date(switches)], sort_keys=True, default=str))
    known = variables(template, tokens)
    if unknown := sorted({*switches} - known):
        listed = f"It reads {', '.join(sorted(known))}." if known else "It reads none."
        raise TemplateProblem(f"the chat template does not read the switch {unknown[0]!r}. {listed}"[:300])


def variables(template: str, tokens: Iterable[str] = ()) -> frozenset[str]:
    """Return the names of a template's switches: variables that it reads and that neither transformers nor the tokenizer sets.

    ``strftime_now`` is one of them if the template prints the current date.

    Args:
        template: Text of the template.
        tokens: Names of special tokens, which do not count as switches.

    >>> sorted(variables("{{ bos_token }}{% if enable_thinking %}{{ messages[0].content }}{% endif %}"))
    ['enable_thinking']
    """
    environment = _environment()
    del environment.globals[CLOCK]  # else Jinja counts it as known
    names = meta.find_undeclared_variables(environment.parse(template))
    reserved = RESERVED | {*environment.globals} | {*tokens}
    return frozenset(name for name in names if name not in reserved and not name.endswith("_token"))


def without_date(switches: Mapping[str, Any]) -> dict[str, Any]:
    """Return the switches that are passed to a template by name: all but the date, which ``with_date`` writes into the template."""
    return {name: value for name, value in switches.items() if name != CLOCK}


def with_date(template: str, date: Any) -> str:
    """Return a chat template that prints a given date wherever ``template`` prints the current one. Nothing else changes.

    Args:
        template: Text of the template.
        date: The date, as ``"2026-11-27"``. The time is midnight, unless it is given too: ``"2026-11-27T13:45"``.

    Raises:
        TemplateProblem: ``date`` is no date.

    >>> _environment().from_string(with_date("{{ strftime_now('%d %b %Y') }}", "2026-11-27")).render()
    '27 Nov 2026'
    """
    try:
        when = datetime.fromisoformat(date)
    except (TypeError, ValueError) as error:
        raise TemplateProblem(f'the date to print is {CLOCK}={date!r}, expected a date such as "2026-11-27"') from error
    # transformers turns every value that it passes to a template into plain data, so the function must be a part of the template. A
    # directive of strftime is a letter after "%" or "%-"; those that this system does not know stand for themselves.
    directives = {f"%{dash}{letter}": when.strftime(f"%{dash}{letter}") for dash in ("-", "") for letter in string.ascii_letters}
    known = [[directive, text] for directive, text in directives.items() if "%" not in text]
    macro = (
        f"{{% macro {CLOCK}(form) %}}{{% set filled = namespace(text=form) %}}{{% for directive, text in {json.dumps(known)} %}}"
        "{% set filled.text = filled.text.replace(directive, text) %}{% endfor %}{{ filled.text }}{% endmacro %}"
    )
    return f"{macro}\n{template}"  # Jinja drops the line break after a block, so the prompt begins as before


@cache
def _try(template: str, arguments: str) -> None:
    """Render a template in a new process with limits on time and memory. Raise TemplateProblem if this fails.

    Args:
        template: Text of the template.
        arguments: ``[tokens, switches]`` of ``check`` as JSON text. Results of this function are cached by its arguments, and a dict could
            not be a key of the cache.
    """
    # -P keeps the folder of this file out of the import path: some of its modules have the name of one in the standard library (types).
    command = [sys.executable, "-P", __file__]
    try:
        done = subprocess.run(
            command, input=json.dumps([template, *json.loads(arguments)]), capture_output=True, text=True, timeout=WALL, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise TemplateProblem(f"the chat template does not finish within {WALL:g} seconds on one question") from error
    if done.returncode < 0:  # killed by a signal, which is how the system enforces the limit on CPU time
        raise TemplateProblem(f"the chat template does not finish within {SECONDS} seconds of CPU time on one question")
    if done.returncode:
        reason = re.sub(r"\s+", " ", done.stderr.strip().rpartition("\n")[2])[:200]
        raise TemplateProblem(f"the chat template cannot be used: {reason}")


def _limit() -> None:
    try:
        import resource
    except ImportError:  # on Windows only the wall-clock limit applies
        return
    for kind, most in ((resource.RLIMIT_AS, BYTES), (resource.RLIMIT_CPU, SECONDS)):
        with suppress(ValueError, OSError):  # macOS does not limit memory
            resource.setrlimit(kind, (most, most))


def _trial() -> None:
    """Read a template from standard input and render it, within limits on time and memory.

    If this fails, print the reason on standard error and exit with code 1.
    """
    template, tokens, switches = json.loads(sys.stdin.read())
    _limit()
    try:
        compiled = _environment().from_string(template)
        for number, (messages, opened) in enumerate(product(CONVERSATIONS, OPENED)):
            try:
                context = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": opened}
                text = compiled.render(**{**tokens, **switches, **context})
            except Exception as error:
                if number == 0 or isinstance(error, MemoryError):
                    raise
                continue  # some templates refuse a conversation on purpose, for example a system prompt
            if len(text) > CHARACTERS:
                raise SystemExit(f"it makes a prompt of {len(text)} characters from one question, more than {CHARACTERS}")
            if QUESTION not in text and opened:
                raise SystemExit("it leaves out the user's question")
    except MemoryError as error:
        raise SystemExit(f"it needs more than {BYTES / 2**30:g} GB of memory") from error
    except SystemExit:
        raise
    except BaseException as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error


if __name__ == "__main__":
    _trial()
