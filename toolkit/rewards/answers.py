r"""Functions that extract the answer from a response's text, and check whether the answer holds a number or a mathematical expression.

Rewards for format or length use these functions.

The text of a response includes its special tokens. The answer is the text after the last closing think tag. If there is no closing tag, it
is the whole text for ``answer_text``; for ``closed_answer_text`` it is "" if thinking was opened. End-of-sequence tokens do not belong to
the answer.
"""

from __future__ import annotations

import re

from toolkit import expressions
from toolkit.expressions import last_boxed

OPEN, CLOSE = "<think>", "</think>"
_ENDS = re.compile(r"(?:\s*<[^<>\s]+>)+\s*$")  # special tokens: <|im_end|>, </s>
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def answer_text(text: str, close: str | None = CLOSE) -> str:
    """Return the answer in a response's text: the text after the last closing think tag, without special tokens at the end.

    >>> answer_text("<think>3+4=7</think>7<|im_end|>")
    '7'

    Args:
        text: Response, special tokens included. Without the closing tag, the whole response is the answer.
        close: Closing think tag of the model that wrote the response. ``None`` if the model has none: the whole response is then the
            answer.
    """
    return _ENDS.sub("", text.rpartition(close)[2] if close else text)


def closed_answer_text(text: str, prompt: str = "", *, open: str | None = OPEN, close: str | None = CLOSE) -> str:
    """Return the answer in a response's text, or "" if thinking was opened and never closed.

    The function uses the first case that applies:

    - The response has a closing tag: the answer is the text after the last one.
    - The prompt ends with the closing tag, which switches thinking off: the whole response is the answer.
    - The response has an opening tag, or the prompt ends with one: thinking was never closed, and the result is "".
    - The model has no opening tag (``open=None``): every response begins with thinking, it was never closed, and the result is "".
    - Otherwise thinking was never opened, and the whole response is the answer.

    If the model has no closing tag (``close=None``), the cases do not apply: the whole response is the answer. Special tokens at the end
    of the response are removed from the answer.

    >>> [closed_answer_text(text) for text in ("<think>3+4=7</think>7", "<think>3+4=7", "7")]
    ['7', '', '7']

    Args:
        text: Response, special tokens included.
        prompt: Prompt as the model reads it. Only a think tag at its end matters.
        open: Opening think tag of the model, or ``None`` if the model has none.
        close: Closing think tag of the model, or ``None`` if the model has none.
    """
    if close is None or close in text or _ends_with(prompt, close):
        return answer_text(text, close)
    return "" if open is None or open in text or _ends_with(prompt, open) else answer_text(text, close)


def _ends_with(prompt: str, tag: str) -> bool:
    """Return True if a prompt ends with a tag, or with a tag and then white space."""
    return prompt.rstrip().endswith(tag.rstrip())


def parses(answer: str) -> bool:
    r"""Return True if the answer has a ``\boxed{}`` whose content parses as mathematics, or has no ``\boxed{}`` but contains a number.

    If there are several boxes, only the last one counts. If the last box is never closed, the result is False.

    Args:
        answer: Answer of a response, from ``answer_text``.

    Raises:
        ImportError: The content of the box is not a plain number, so that math-verify has to parse it, and math-verify is not installed.
        expressions.HelperError: math-verify has to parse the content, and its helper process could not start.
    """
    box = last_boxed(answer)
    if box is None:
        # A box that is never closed does not parse, even if there is a number in it.
        return "\\boxed" not in answer and _NUMBER.search(answer) is not None
    if _NUMBER.fullmatch(box.strip()):
        return True
    return expressions.parses(box)
