"""Tools that a model may call while it writes a response: a text search, a calculator, a database; or any Python function of yours.

A tool is a Python function with a schema (``Tool``). A ``Toolbox`` holds the tools of a condition and the marks by which a response calls
them: the model writes ``<search>river of Zor</search>``, and ``<result>...</result>`` is put after it. Pass the toolbox as
``Condition(lm, tools=toolbox)`` to sample *episodes*: responses in which tool results stand between spans that the model wrote.

Every tool here is deterministic, and its result is bounded. A call that fails, or takes too long, gets a result that names the reason.
"""

from toolkit.tools.base import Result, Tool, ToolError
from toolkit.tools.calculator import calculate
from toolkit.tools.marks import Call, Marks, Toolbox
from toolkit.tools.search import Search
from toolkit.tools.sql import Database

__all__ = ["Call", "Database", "Marks", "Result", "Search", "Tool", "ToolError", "Toolbox", "calculate"]
