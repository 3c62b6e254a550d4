"""Tool calls in the toolkit's own loop: ``Calls`` finds a call in one response, runs the tool and gives the result's tokens to place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from toolkit.engines.base import CannotSampleError, Response
from toolkit.lm import LM
from toolkit.spans import Reader
from toolkit.tools import Toolbox
from toolkit.types import Span


class Calls:
    """The tool calls of one response while it is written.

    A response with calls is an *episode*: segments that the model writes, each up to the closing mark of a call, and after each call its
    result. The tokens of a result are placed one per decoding step, so the responses that are decoded beside this one need not wait.

    An episode ends at a call that is not answered: one beyond ``Toolbox.max_calls``, or one whose result does not fit into the token limit.

    Attributes:
        results: For each result, the pair (start, stop) of token indices in the response.
        cut: Number of tokens at which the response ends, if it ends at a call that was not answered; else ``None``.
    """

    def __init__(self, lm: LM, tools: Toolbox, budget: int) -> None:
        self.lm, self.tools, self.budget = lm, tools, budget
        self.results: list[tuple[int, int]] = []
        self.cut: int | None = None
        self.segment: list[int] = []  # tokens that the model has written since the last result
        self.length = 0  # tokens of the response so far
        self.left = 0  # tokens of a result that are still to be placed
        self.over = False  # an end-of-sequence token was written; a GPU may decode the row a few steps further

    def placing(self) -> bool:
        """Return True if the next token of the response belongs to a result, and count that token."""
        if not self.left:
            return False
        self.left, self.length = self.left - 1, self.length + 1
        return True

    def after(self, token: int, reader: Reader) -> list[int]:
        """Add a token that the model wrote. Return the tokens to place after it: those of a result, if the token ends a call; else none.

        If the episode ends with this call, that is an end-of-sequence token, which ``finished`` removes.

        Args:
            token: The token.
            reader: Reader of the response; the token is not pushed yet.
        """
        self.over = self.over or token in self.lm.eos_ids or self.cut is not None or self.length >= self.budget
        if self.over:
            return []
        self.segment.append(token)
        self.length += 1
        tool = next((tool for tool in self.tools.tools if reader.ends(token, self.tools.marks_of(tool).close)), None)
        call = self.tools.call_in(self.lm.text(self.segment), tool) if tool else None
        if call is None:
            return []
        ids = [] if len(self.results) == self.tools.max_calls else self._tokens(self.tools.answer(call, self._reserved())[1])
        if not ids or self.length + len(ids) > self.budget:
            self.cut = self.length
            return [i for i in sorted(self.lm.eos_ids) if i < self.lm.vocab_size][:1]
        self.results.append((self.length, self.length + len(ids)))
        self.segment, self.left = [], len(ids)
        return ids

    def _tokens(self, text: str) -> list[int]:
        ids: Sequence[int] = self.lm.tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[assignment]  # of one text
        return [i for i in ids if i not in self.lm.eos_ids]

    def _reserved(self) -> list[str]:
        # Texts that would change the course of a response if a result contained them.
        tags = [tag for tag in (self.lm.tags.open, self.lm.tags.close) if tag] if self.lm.tags else []
        return [*tags, *map(str, self.lm.tokenizer.all_special_tokens)]

    def finished(self, response: Response) -> Response:
        """Return the complete response with its results. The log-probability of a result's token is 0, since it was not drawn.

        Args:
            response: All tokens that were decoded.
        """
        stop = len(response.tokens) if self.cut is None else self.cut
        logprobs = None if response.logprobs is None else list(response.logprobs[:stop])
        for start, end in self.results:
            if logprobs is not None:
                logprobs[start:end] = [0.0] * (end - start)
        return replace(
            response,
            tokens=response.tokens[:stop],
            finish=response.finish if self.cut is None else "length",
            logprobs=logprobs,
            entropies=None if response.entropies is None else response.entropies[:stop],
            results=tuple(Span(start, end) for start, end in self.results),
        )


def check_tools(lm: LM, tools: Toolbox) -> None:
    """Check that the marks of a toolbox can be told from the think tags of a model and do not end its responses.

    Raises:
        CannotSampleError: a mark is a think tag, or the closing mark of a call is an end-of-sequence token.
    """
    tags = {tag for tag in (lm.tags.open, lm.tags.close) if tag} if lm.tags else set()
    marks = (*map(tools.marks_of, tools.tools), tools.result)
    if both := tags & {text for pair in marks for text in (pair.open, pair.close)}:
        raise CannotSampleError(
            f"{min(both)!r} is a think tag of {lm.name} and a mark of its tools: choose other marks (Toolbox.marks)."
        )
    for tool in tools.tools:
        close = tools.marks_of(tool).close
        if lm.token_id(close) in lm.eos_ids:
            raise CannotSampleError(
                f"{close!r}, the end of a call of {tool.name}, is an end-of-sequence token of {lm.name}, so no call would be answered. "
                "Training in TRL with tools.trl.for_trl adds it: remove its id "
                f"({lm.token_id(close)}) from eos_token_id in generation_config.json and load the model again."
            )
