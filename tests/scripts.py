"""Decoding rules that make random models think in steps, so that interventions at the ends of steps have something to act on."""

from __future__ import annotations

from dataclasses import dataclass

from toolkit import spans
from toolkit.lm import LM


@dataclass(frozen=True)
class Steps:
    """A rule that opens thinking at once, ends a step every 3 to 5 tokens, and closes at a step that differs between rows."""

    longest: int = 20

    def __call__(self, lm: LM, reader: spans.Reader, drawn: int):
        (opening,), (closing,), (line,) = (
            lm.tokenizer.encode(t, add_special_tokens=False) for t in (lm.tags.open, lm.tags.close, "\n")
        )
        if reader.phase == spans.PROMPT:
            return [opening]
        salt = sum(reader.ids[:8])
        if reader.phase == spans.THINK and reader.written >= self.longest - salt % 6:
            return [closing]
        if reader.phase == spans.THINK and reader.written % (3 + salt % 3) == 2:
            return [line]
        return [10 + drawn % 90] if drawn in {opening, closing, line, *lm.eos_ids} else None
