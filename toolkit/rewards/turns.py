"""The turns of a response with tool calls: the texts that the model wrote, each with the call that ends it and the result of the call.

A response with k answered calls has k + 1 turns. The last one has no result; it holds the answer, or a call that was not answered.

Turns are read from the response's text and its number of answered calls (the columns ``text`` and ``calls``), so rewards see the same turns
in training, in TRL and on recorded episodes. A result counts only where one was placed, directly after an answered call. Text that merely
looks like a result, written by the model, stays part of the turn.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from toolkit.rewards.batch import RewardBatch
from toolkit.tools import Marks, Toolbox

assumed_verdict = re.compile(
    r"<(?P<mark>judge|reflect)>\s*(?:(?P<yes>yes|true)|no|false)\s*</(?P=mark)>"
    r"|\b(?:not\s+relevant|irrelevant|(?P<relevant>relevant))\b(?!.*<(?:judge|reflect)>)",
    re.IGNORECASE | re.DOTALL,
)
"""Pattern of a judgement of a result: ``<judge>Yes</judge>``, or without such a mark the word relevant or irrelevant. The words are ours.

It is positive if one of the pattern's groups named ``yes`` and ``relevant`` matches.
"""


SEARCH, RESULT = Marks.of("search"), Marks.of("result")


class Turn(NamedTuple):
    """One turn of a response.

    Attributes:
        written: Text that the model wrote, up to and including the call that ends the turn.
        tool: Name of the tool that is called; ``None`` if the turn ends without a call.
        argument: Text between the marks of the call, without blanks at its ends; "" without a call.
        result: Text between the marks of the result, without blanks at its ends; ``None`` if there is no result.
    """

    written: str
    tool: str | None = None
    argument: str = ""
    result: str | None = None


@dataclass(frozen=True)
class Protocol:
    """The marks of calls and results by which turns are read.

    >>> Protocol().turns("<search>Zor</search><result>Tal</result>Tal", 1)[0].result
    'Tal'

    Attributes:
        calls: Tool name -> marks of its calls.
        result: Marks of a result.
    """

    calls: Mapping[str, Marks] = field(default_factory=lambda: {"search": SEARCH})
    result: Marks = RESULT

    @classmethod
    def of(cls, tools: Toolbox) -> Protocol:
        """Return the protocol of a toolbox: the texts around the calls of each tool, and around results."""
        return cls({tool.name: tools.marks_of(tool) for tool in tools.tools}, tools.result)

    def turns(self, text: str, calls: int) -> tuple[Turn, ...]:
        """Return the turns of a response, one more than it has answered calls.

        Args:
            text: Text of the response, special tokens and results included.
            calls: Number of calls that were answered.

        Raises:
            ValueError: the text holds fewer calls with results than ``calls``, because the marks are others.
        """
        turns, start = list[Turn](), 0
        while len(turns) < calls:
            call = self._call(text, start)
            opened = text.find(self.result.open, call[0]) if call else -1
            closed = text.find(self.result.close, opened) if opened >= 0 else -1
            if call is None or closed < 0:
                names = ", ".join(f"{m.open}...{m.close}" for m in self.calls.values())
                raise ValueError(
                    f"A response with {calls} answered calls shows only {len(turns)} of the form {names} with a result "
                    f"{self.result.open}...{self.result.close}: {text[start : start + 80]!r}. Pass the marks of its toolbox: "
                    "protocol=Protocol.of(toolbox)."
                )
            stop, tool, argument = call
            result = text[opened + len(self.result.open) : closed].strip()
            turns.append(Turn(text[start:stop], tool, argument, result))
            start = closed + len(self.result.close)
        last = self._call(text, start)
        return (*turns, Turn(text[start:], *(last[1:] if last else ())))

    def _call(self, text: str, start: int) -> tuple[int, str, str] | None:
        """Return end, tool and argument of the first call from ``start`` on: it begins at the last opening mark before its closing mark."""
        found = []
        for tool, marks in self.calls.items():
            opened = text.find(marks.open, start)
            stop = text.find(marks.close, opened + len(marks.open)) if opened >= 0 else -1
            if stop >= 0:
                opened = text.rfind(marks.open, start, stop)
                found.append((stop + len(marks.close), tool, text[opened + len(marks.open) : stop].strip()))
        return min(found, default=None)

    def of_batch(self, batch: RewardBatch) -> list[tuple[Turn, ...]]:
        """Return the turns of each response of a batch, from its columns ``text`` and ``calls``."""
        return [self.turns(text, int(calls)) for text, calls in zip(batch["text"], batch["calls"], strict=True)]


def verdicts(turns: Sequence[Turn], pattern: re.Pattern[str] = assumed_verdict) -> list[bool | None]:
    """Return the model's judgement of each result: True if it finds the result useful, False if not, ``None`` without a judgement.

    A judgement of a result is the first match of the pattern in the turn that follows it.

    >>> verdicts(Protocol().turns("<search>a</search><result>b</result>irrelevant. <search>c</search><result>d</result>d", 2))
    [False, None]

    Args:
        turns: Turns of a response.
        pattern: Pattern of a judgement. It is positive if a group named ``yes`` or ``relevant`` matches.
    """
    matches = [pattern.search(turn.written) for turn in turns[1:]]
    return [None if m is None else bool(m.groupdict().get("yes") or m.groupdict().get("relevant")) for m in matches]


def words(text: str) -> list[str]:
    """Return the words of a text in lower case: runs of letters, digits and underscores."""
    return re.findall(r"\w+", text.lower())


def assumed_usefulness(result: str, documents: Sequence[str]) -> float:
    """Return 1 if a result holds one of the documents, else 0 (ours). Only words are compared, in their order.

    >>> assumed_usefulness("the river of Zor is Tal.", ["river of zor"])
    1.0

    Args:
        result: Text of a result.
        documents: Documents that are needed.
    """
    line = " ".join(["", *words(result), ""])
    return float(any(" ".join(["", *words(document), ""]) in line for document in documents if words(document)))
