r"""The text of a response's answer, and whether it parses: what format rewards and rewards of the answer's length look at.

A response is known as text with its special tokens kept. Its answer is what follows the last closing think tag of its model, and all
of it where there is none; end-of-sequence tokens do not belong to it.
"""

from __future__ import annotations

import re

CLOSE = "</think>"
_ENDS = re.compile(r"(?:\s*<[^<>\s]+>)+\s*$")  # special tokens: <|im_end|>, </s>
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def answer_text(text: str, close: str | None = CLOSE) -> str:
    """The answer's text; ``close`` is the closing think tag of the model that wrote it, ``None`` if it has none."""
    return _ENDS.sub("", text.rpartition(close)[2] if close else text)


def parses(answer: str) -> bool:
    r"""Whether an answer can be extracted and read: the content of its last ``\boxed{}``, which has to parse as mathematics, or, without
    a box, any number.

    Raises:
        ImportError: a box holds more than a number, and math-verify is not installed.
    """
    box = last_boxed(answer)
    if box is None:
        return "\\boxed" not in answer and _NUMBER.search(answer) is not None
    if _NUMBER.fullmatch(box.strip()):
        return True
    try:
        from math_verify import parse
    except ImportError as error:
        raise ImportError("Reading boxed answers needs math-verify: pip install 'reasoning-length-toolkit[tasks]'.") from error
    return bool(parse(f"\\boxed{{{box}}}", fallback_mode="no_fallback", parsing_timeout=None))


def last_boxed(answer: str) -> str | None:
    r"""The content of the last ``\boxed{}``; ``None`` without one, or if it is never closed."""
    start = answer.rfind("\\boxed{")
    depth = 0
    for i in range(start + len("\\boxed"), len(answer)) if start >= 0 else ():
        depth += (answer[i] == "{") - (answer[i] == "}")
        if not depth:
            return answer[start + len("\\boxed{") : i]
    return None
