"""Chat templates: tried in a process with limits before they are used, and the switches that they read.

A chat template is a program that comes with a checkpoint. Jinja's sandbox keeps it from files and from Python, but not from looping or
from building gigabytes of text. So :func:`check` first renders it in a process of its own, with limits on time and memory, as it will be used. That process
runs this file as a script, so nothing but jinja2 may be imported here.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from itertools import product
from typing import Any

from jinja2 import TemplateError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

SAID = "12+3=?"
CONVERSATIONS = (
    [{"role": "user", "content": SAID}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": SAID}],
    [{"role": "user", "content": SAID}, {"role": "assistant", "content": "15"}, {"role": "user", "content": "And one more?"}],
    [{"role": "user", "content": SAID}, {"role": "assistant", "content": "15"}],
)
OPENED = (True, False)  # values of add_generation_prompt, both of which are used later: a branch may loop for one alone
SECONDS, BYTES, CHARACTERS = 3, 2**30, 200_000
"""Limits of a trial: seconds of computing, bytes of memory, characters of a rendered prompt."""
WALL = 15.0  # seconds; a machine under load needs more than it computes
GIVEN = frozenset(
    ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "raise_exception", "strftime_now")
)
"""What transformers itself hands to a template."""


class TemplateProblem(ValueError):
    """A chat template cannot be used, or does not read a switch that was set."""


class _Generation(Extension):
    """The block ``{% generation %}`` of transformers, which marks text and adds none."""

    tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """The environment in which transformers renders chat templates."""

    def refuse(message: str) -> None:
        raise TemplateError(message)

    extensions = ["jinja2.ext.loopcontrols", _Generation]
    found = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    found.filters["tojson"] = lambda value, **kwargs: json.dumps(value, ensure_ascii=False)
    found.globals |= {"raise_exception": refuse, "strftime_now": lambda form: form}
    return found


def check(template: str, tokens: Mapping[str, str], switches: Mapping[str, Any]) -> None:
    """Raise unless a template renders a user's question within limits, and reads every switch.

    Args:
        tokens: Special tokens by name, such as ``eos_token``.
        switches: Values of variables of the template, such as ``{"enable_thinking": False}``.

    Raises:
        TemplateProblem: it is no template, fails, leaves out the question, or asks for too much time or memory; or a switch is not
            among the variables that it reads.
    """
    _try(template, json.dumps([dict(tokens), dict(switches)], sort_keys=True, default=str))
    known = variables(template, tokens)
    if unknown := sorted({*switches} - known):
        listed = f"It reads {', '.join(sorted(known))}." if known else "It reads none."
        raise TemplateProblem(f"the chat template does not read the switch {unknown[0]!r}. {listed}"[:300])


def variables(template: str, tokens: Iterable[str] = ()) -> frozenset[str]:
    """Names of the variables that a template reads and that are nobody's but the user's to set."""
    environment = _environment()
    read = meta.find_undeclared_variables(environment.parse(template))
    ours = GIVEN | {*environment.globals} | {*tokens}
    return frozenset(name for name in read if name not in ours and not name.endswith("_token"))


@cache
def _try(template: str, given: str) -> None:
    # -P: the folder of this file holds modules with names of the standard library.
    command = [sys.executable, "-P", __file__]
    try:
        done = subprocess.run(
            command, input=json.dumps([template, *json.loads(given)]), capture_output=True, text=True, timeout=WALL, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise TemplateProblem(f"the chat template does not finish within {WALL:g} seconds on one question") from error
    if done.returncode < 0:
        raise TemplateProblem(f"the chat template does not finish within {SECONDS} seconds of computing on one question")
    if done.returncode:
        reason = re.sub(r"\s+", " ", done.stderr.strip().rpartition("\n")[2])[:200]
        raise TemplateProblem(f"the chat template cannot be used: {reason}")


def _limit() -> None:
    try:
        import resource
    except ImportError:  # Windows has the limit of time alone
        return
    for kind, most in ((resource.RLIMIT_AS, BYTES), (resource.RLIMIT_CPU, SECONDS)):
        with suppress(ValueError, OSError):  # macOS does not limit memory
            resource.setrlimit(kind, (most, most))


def _trial() -> None:
    """What runs in the process with limits: exit code 0, or the reason on the standard error."""
    template, tokens, switches = json.loads(sys.stdin.read())
    _limit()
    try:
        compiled = _environment().from_string(template)
        for number, (messages, opened) in enumerate(product(CONVERSATIONS, OPENED)):
            try:
                shown = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": opened}
                text = compiled.render(**{**tokens, **switches, **shown})
            except Exception as error:
                if number == 0 or isinstance(error, MemoryError):
                    raise
                continue  # a system prompt, for one, is refused by some on purpose
            if len(text) > CHARACTERS:
                raise SystemExit(f"it makes {len(text)} characters of one question")
            if SAID not in text and opened:
                raise SystemExit("it leaves out what the user says")
    except MemoryError as error:
        raise SystemExit(f"it asks for more than {BYTES / 2**30:g} GB of memory") from error
    except SystemExit:
        raise
    except BaseException as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error


if __name__ == "__main__":
    _trial()
