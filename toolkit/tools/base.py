"""A tool: a Python function that a model may call, with limits on its argument, its time and its result."""

from __future__ import annotations

import ctypes
import inspect
import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

CUT = " [cut]"  # end of a result that was longer than the limit

OK, CUT_OFF = "ok", "cut"
FAILED, TIMEOUT, TOO_LONG, WRONG_ARGUMENTS = "failed", "timeout", "argument too long", "wrong arguments"
"""Names of reasons for which a call has no proper result. ``ToolError`` may carry other names, such as "not allowed"."""


class ToolError(ValueError):
    """Raised by a tool if it cannot answer a call. The model gets the name of the reason and the message as the result.

    Args:
        reason: Name of the reason in a few words, such as ``"not allowed"``.
        message: What was wrong.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Result:
    """The result of a call.

    Attributes:
        text: Text that the model gets.
        status: ``"ok"``; ``"cut"`` if the text was longer than the limit; else the name of the reason why the call failed.
    """

    text: str
    status: str = OK


@dataclass(frozen=True)
class Tool:
    """A Python function that a model may call, with its limits. The function takes named arguments and returns a text.

    The function needs type hints, and a docstring with a section ``Args:``, because its schema is made from them. It must be deterministic:
    the same arguments always give the same text. To refuse a call, it raises ``ToolError``.

    >>> def shout(words: str) -> str:
    ...     '''Return the words in capitals.
    ...
    ...     Args:
    ...         words: The words.
    ...     '''
    ...     return words.upper()
    >>> Tool(shout, characters=8).call("hello")
    Result(text='HELLO', status='ok')

    Attributes:
        function: The function.
        seconds: Longest time that a call may take. A time limit depends on the machine, so it is a last resort: a function should limit its
            work by counting.
        characters: Largest number of characters in a result. A longer one is cut and ends with ``CUT``.
        longest_argument: Largest number of characters in the argument of a call.
        identity: Everything that results depend on, as plain data; ``None`` if that is the code and data of the function. Rollouts with other
            tools are not reused. Set it for a function that holds a connection or another value whose behaviour its fields do not determine.
    """

    function: Callable[..., str]
    seconds: float = 5.0
    characters: int = 500
    longest_argument: int = 500
    identity: Any = None

    def __post_init__(self) -> None:
        if not self.seconds > 0 or self.characters <= len(CUT) or self.longest_argument < 1:
            raise ValueError(
                f"seconds={self.seconds}, characters={self.characters}, longest_argument={self.longest_argument}: need a time above 0, more "
                f"than {len(CUT)} characters for a result and at least 1 for an argument."
            )
        if not self.parameters:
            raise ValueError(f"The tool {self.name!r} takes no argument: a call must have at least one.")

    @property
    def name(self) -> str:
        """Name of the function."""
        return self.function.__name__

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the function's parameters, in order."""
        return tuple(inspect.signature(self.function).parameters)

    @cached_property
    def schema(self) -> dict[str, Any]:
        """JSON schema of the function, as chat templates take it (``transformers.utils.get_json_schema``).

        Raises:
            transformers.utils.DocstringParsingException, transformers.utils.TypeHintParsingException: the function lacks a docstring, the
                description of an argument, or a type hint.
        """
        from transformers.utils import get_json_schema

        return get_json_schema(self.function)

    def call(self, argument: str) -> Result:
        """Call the function with an argument that a model wrote, and return the result. It never raises an error of the function.

        If the function has one parameter, it gets the text without blanks at its ends. If it has several, the text must be a JSON object of
        arguments by name.

        Args:
            argument: Text that the model wrote between the marks of the call.
        """
        if len(argument) > self.longest_argument:
            return failure(TOO_LONG, f"{len(argument)} characters, at most {self.longest_argument}")
        try:
            result = within(self.seconds, self.function, self._arguments(argument))
        except ToolError as error:
            return self._bounded(failure(error.reason, str(error)))
        except Exception as error:  # noqa: BLE001  # a function may raise anything; the episode goes on
            return self._bounded(failure(FAILED, f"{type(error).__name__}: {error}"))
        return self._bounded(Result(str(result)))

    def _arguments(self, argument: str) -> Mapping[str, Any]:
        if len(self.parameters) == 1:
            return {self.parameters[0]: argument.strip()}
        expected = f"expected a JSON object with {', '.join(self.parameters)}"
        try:
            named = json.loads(argument)
        except (ValueError, RecursionError) as error:
            raise ToolError(WRONG_ARGUMENTS, expected) from error
        if not isinstance(named, dict):
            raise ToolError(WRONG_ARGUMENTS, expected)
        try:
            inspect.signature(self.function).bind(**named)
        except TypeError as error:
            raise ToolError(WRONG_ARGUMENTS, f"{error}; {expected}") from error
        return named

    def _bounded(self, result: Result) -> Result:
        if len(result.text) <= self.characters:
            return result
        status = CUT_OFF if result.status == OK else result.status
        return Result(result.text[: self.characters - len(CUT)] + CUT, status)


def failure(reason: str, message: str) -> Result:
    """Return the result of a call that failed.

    >>> failure("timeout", "more than 5 s")
    Result(text='error (timeout): more than 5 s', status='timeout')
    """
    return Result(f"error ({reason}): {message}", reason)


class _Stop(BaseException):
    """Raised inside a call that takes too long, to end it."""


def within(seconds: float, function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """Call a function in a thread of its own, and return its result.

    If it takes too long, an exception is raised inside the thread at its next line of Python, which ends an endless loop. A library that
    does not return to Python goes on in the background until this process ends, but the caller does not wait for it.

    Args:
        seconds: Longest time to wait.
        function: The function.
        arguments: Its arguments by name.

    Raises:
        ToolError: the function took too long; the reason is ``"timeout"``.
        Exception: any error that the function raised.
    """
    outcome: list[tuple[bool, Any]] = []

    def work() -> None:
        try:
            outcome.append((True, function(**arguments)))
        except BaseException as error:  # noqa: BLE001  # passed on to the caller below
            outcome.append((False, error))

    thread = threading.Thread(target=work, name=f"tool {getattr(function, '__name__', function)}", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_Stop))
        raise ToolError(TIMEOUT, f"more than {seconds:g} s")
    succeeded, value = outcome[0]
    if succeeded:
        return value
    if isinstance(value, Exception):
        raise value
    raise RuntimeError(f"the tool ended with {type(value).__name__}")  # such as SystemExit
