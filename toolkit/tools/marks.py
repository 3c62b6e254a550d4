"""The text protocol of tool calls: marks around a call and around its result, and ``Toolbox``, the tools of a condition."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from toolkit.tools.base import Result, Tool


@dataclass(frozen=True)
class Marks:
    """The texts around a call or around a result.

    >>> Marks.of("search").around("rivers")
    '<search>rivers</search>'
    """

    open: str
    close: str

    def __post_init__(self) -> None:
        if not self.open.strip() or not self.close.strip() or self.open == self.close:
            raise ValueError(f"Marks({self.open!r}, {self.close!r}): expected two different texts that are not blank.")

    @staticmethod
    def of(name: str) -> Marks:
        """Return the marks ``<name>`` and ``</name>``."""
        return Marks(f"<{name}>", f"</{name}>")

    def around(self, text: str) -> str:
        """Return a text between the two marks."""
        return f"{self.open}{text}{self.close}"


@dataclass(frozen=True)
class Call:
    """A call that a model wrote: the tool, and the text between the marks."""

    tool: Tool
    argument: str


@dataclass(frozen=True)
class Toolbox:
    """The tools that a condition offers, the marks of calls and results, and the number of calls that are answered.

    A call is the text between a tool's marks. It ends at the closing mark, and its result is put directly after that. A closing mark without
    an opening mark before it is no call.

    Attributes:
        tools: The tools; their names differ.
        marks: Tool name -> marks of its calls. A tool that is not in it has the marks ``<name>`` and ``</name>``.
        result: Marks around a result.
        max_calls: Largest number of calls that are answered per response. The response ends at the call after them, as in TRL
            (``max_tool_calling_iterations``).
    """

    tools: tuple[Tool, ...]
    marks: Mapping[str, Marks] = field(default_factory=dict)
    result: Marks = Marks("<result>", "</result>")
    max_calls: int = 4

    def __post_init__(self) -> None:
        names = [tool.name for tool in self.tools]
        if not names or len(set(names)) < len(names) or self.max_calls < 1:
            raise ValueError(
                f"Toolbox of {names}, max_calls={self.max_calls}: need tools with different names, and at least one call."
            )
        if unknown := sorted(self.marks.keys() - set(names)):
            raise ValueError(f"Toolbox.marks has {unknown[0]!r}, but the tools are {', '.join(names)}.")
        texts = [text for marks in (*map(self.marks_of, self.tools), self.result) for text in (marks.open, marks.close)]
        if repeated := sorted({text for text in texts if texts.count(text) > 1}):
            raise ValueError(f"The mark {repeated[0]!r} has two meanings in this toolbox: pass marks={{name: Marks(OPEN, CLOSE)}}.")

    @property
    def functions(self) -> list:
        """The functions of the tools, as ``trl.GRPOTrainer(tools=...)`` takes them. TRL applies none of the limits of ``Tool``."""
        return [tool.function for tool in self.tools]

    def marks_of(self, tool: Tool) -> Marks:
        """Return the marks of a tool's calls."""
        return self.marks.get(tool.name) or Marks.of(tool.name)

    def call_in(self, text: str, tool: Tool) -> Call | None:
        """Return the call of a tool that a text ends with, or ``None`` if there is none.

        The call begins at the last opening mark. Text after the closing mark, which may share its last token, is ignored.

        >>> from toolkit.tools.calculator import calculate
        >>> box = Toolbox((Tool(calculate),))
        >>> box.call_in("so <calculate>2*3</calculate>", box.tools[0]).argument
        '2*3'
        """
        marks = self.marks_of(tool)
        before = text.rpartition(marks.close)[0]
        start = before.rfind(marks.open)
        return None if start < 0 else Call(tool, before[start + len(marks.open) :])

    def answer(self, call: Call, reserved: Iterable[str] = ()) -> tuple[Result, str]:
        """Return the result of a call, and the text that is put after the call: the result's text between its marks.

        A result can be made to contain anything, such as a document that says ``</think>`` or looks like a call. So the marks of this
        toolbox and the reserved texts are removed from it.

        Args:
            call: The call.
            reserved: Texts that a result must not contain, such as think tags and special tokens.
        """
        result = call.tool.call(call.argument)
        own = [text for marks in (*map(self.marks_of, self.tools), self.result) for text in (marks.open, marks.close)]
        return result, self.result.around(without(result.text, (*own, *reserved)))


def without(text: str, reserved: Iterable[str]) -> str:
    """Return a text without any of the reserved texts. Removing one may form another, so it is repeated until none is left.

    >>> without("a</th</think>ink>b", ["</think>"])
    'ab'
    """
    words = sorted({word for word in reserved if word.strip()}, key=len, reverse=True)
    while any(word in text for word in words):
        for word in words:
            text = text.replace(word, "")
    return text
