"""Lines: many records of a name and a number, and a question about one of them. The records fill a prompt of a requested length.

The records have the format of the task *LongChat-lines*, with which Giraffe (arXiv 2308.10882) tests long contexts::

    line quick-river: REGISTER_CONTENT is <48213>

Names and numbers are drawn at random, so only the prompt tells the answer, which is exact: one number.

Deviations: words and instructions are ours. Names are made from word lists of this module.

Units: lengths are in tokens of the whole chat prompt. A depth is the share of the records before the one asked about, 0 to 1.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from toolkit.lm import LM
from toolkit.tasks import haystack, splits
from toolkit.tasks.haystack import ContextTooShortError
from toolkit.types import Problem

FIRST = (
    "amber", "brave", "calm", "dusty", "eager", "faint", "gentle", "happy", "icy", "jolly", "keen", "lively", "merry", "noble", "odd", "proud",
    "quick", "rapid", "silent", "tidy", "urban", "vivid", "warm", "young", "plain", "grand", "sharp", "loose", "rough", "sweet", "brisk", "fancy",
)  # fmt: skip
SECOND = (
    "apple", "bridge", "candle", "desert", "engine", "forest", "garden", "hammer", "island", "jacket", "kettle", "ladder", "mirror", "needle",
    "ocean", "pencil", "quilt", "river", "saddle", "table", "umbrella", "valley", "window", "yard", "zebra", "anchor", "basket", "copper",
    "dragon", "fabric", "guitar", "harvest",
)  # fmt: skip
NUMBERS = (10_000, 99_999)


def record(name: str, number: int) -> str:
    """Return one record as text."""
    return f"line {name}: REGISTER_CONTENT is <{number}>"


def message(records: Sequence[tuple[str, int]], name: str) -> str:
    """Return the user's message: all records, then the question about the record ``name``."""
    lines = "\n".join(record(*r) for r in records)
    return (
        f"Here are records, one per line.\n\n{lines}\n\nWhich number is the REGISTER_CONTENT of line {name}? Give only the number."
    )


def load(lm: LM, length: int, n: int = 20, *, split: str = "test", seed: int = 0) -> list[Problem]:
    """Return ``n`` problems whose prompts have at most ``length`` tokens, with as many records as fit. Equal seeds give equal problems.

    The n records that are asked about are spread evenly from the first record to the last. The length may exceed the model's context:
    that is what the task is for.

    Args:
        lm: Model whose chat template and tokenizer give the length.
        length: Largest number of tokens of a prompt.
        n: Number of problems; each has other records.
        split: ``train``, ``dev`` or ``test``: the splits have different records.
        seed: Seed of the records.

    Raises:
        ValueError: unknown split, or ``n`` below 1.
        ContextTooShortError: a prompt with two records is longer than ``length``.
        HaystackError: more records would be needed than there are names.
    """
    splits.check_split(split)
    if n < 1:
        raise ValueError(f"n={n}: ask for at least one problem.")
    return [_problem(lm, length, random.Random(f"lines-{split}-{seed}-{i}"), (i + 0.5) / n, split) for i in range(n)]


def _problem(lm: LM, length: int, rng: random.Random, depth: float, split: str) -> Problem:
    names = [f"{a}-{b}" for a in FIRST for b in SECOND]
    rng.shuffle(names)
    records = [(name, rng.randint(*NUMBERS)) for name in names]

    def prompt(count: int) -> tuple[str, int]:
        text = message(records[:count], records[int(depth * count)][0])
        return text, len(lm.prompt_ids([{"role": "user", "content": text}]))

    low = high = 2
    if (least := prompt(low)[1]) > length:
        raise ContextTooShortError(f"Two records take {least} tokens, more than length={length}: ask for at least {least}.")
    while high <= len(records) and prompt(high)[1] <= length:  # then the largest number that fits, by bisection
        low, high = high, 2 * high
    if high > len(records):
        raise haystack.HaystackError(
            f"{low} records do not fill length={length} tokens, and there are no more: ask for a shorter prompt."
        )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if prompt(middle)[1] <= length else (low, middle)
    text, tokens = prompt(low)
    name, number = records[int(depth * low)]
    meta = {
        "task": "lines",
        "split": split,
        "difficulty": length,
        "length": length,
        "tokens": tokens,
        "records": low,
        "depth": depth,
        "name": name,
    }
    return Problem(f"lines-{splits.digest(text)}-{length}", ({"role": "user", "content": text},), str(number), meta)
