"""Writing: a text of a given number of words on a subject, with given headings and keywords. After LongWriter-Zero (arXiv 2506.18841).

A prompt reads: "Write a report about the water cycle in about 200 words. Use these headings, each on a line of its own and in this order:
Beginnings, How it works. Mention: rain, clouds." What it requests can be checked by rule, so that length, structure and content give rewards.

Deviations: the paper's prompts are real requests, and a model predicts the range of lengths for each. Here prompts are generated, and the range
is the requested length +-20 % (ours). A text counts as right if its length lies in the range; quality does not count.

Units: words (``stats.words``) of the answer without the thinking.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from toolkit import stats
from toolkit.stats import Number
from toolkit.tasks import splits
from toolkit.types import Problem

WORDS: tuple[Number, ...] = (100, 200, 400, 800, 1600)  # requested lengths: ours
KINDS = ("a report", "a letter", "a guide", "a speech", "a story", "a lesson")
HEADINGS = ("Beginnings", "How it works", "A day with it", "What can go wrong", "Costs", "Open questions", "Outlook")
SUBJECTS = {
    "the water cycle": ("rain", "clouds", "rivers", "ice", "wells", "heat"),
    "bread": ("flour", "yeast", "oven", "salt", "crust", "water"),
    "a bicycle": ("wheels", "chain", "brakes", "balance", "roads", "repair"),
    "beekeeping": ("hive", "honey", "queen", "smoke", "flowers", "winter"),
    "the tides": ("moon", "coast", "harbour", "gravity", "ships", "salt"),
    "a library": ("books", "shelves", "readers", "quiet", "catalogue", "loans"),
    "glass": ("sand", "furnace", "windows", "bottles", "colour", "heat"),
    "the calendar": ("days", "months", "sun", "harvest", "leap", "week"),
    "a telescope": ("lens", "mirror", "stars", "night", "planets", "light"),
    "soil": ("worms", "roots", "rain", "plough", "clay", "harvest"),
    "handwriting": ("pen", "ink", "paper", "school", "letters", "speed"),
    "sleep": ("night", "dreams", "light", "rest", "children", "noise"),
}
"""Subject -> keywords that a prompt may request."""


def problem(rng: random.Random, split: str, lengths: Sequence[Number] = WORDS) -> Problem:
    """Draw random problems until one belongs to ``split``, and return it. Kind and subject decide the split.

    Args:
        rng: Source of every random choice.
        split: ``"train"``, ``"dev"`` or ``"test"``.
        lengths: Numbers of words to request.
    """
    while True:
        kind, subject = rng.choice(KINDS), rng.choice([*SUBJECTS])
        if splits.split_of(f"{kind} {subject}") == split:
            break
    target = rng.choice(list(lengths))
    headings = tuple(sorted(rng.sample(HEADINGS, rng.randint(2, 4)), key=HEADINGS.index))
    keywords = tuple(rng.sample(SUBJECTS[subject], rng.randint(2, 4)))
    low, high = stats.ranges_around([target], stats.assumed_flexible)[target]
    content = (
        f"Write {kind} about {subject} in about {target:g} words. Use these headings, each on a line of its own and in this order: "
        f"{', '.join(headings)}. Mention: {', '.join(keywords)}."
    )
    meta = {
        "task": "writing",
        "split": split,
        "difficulty": len(headings),
        "grader": "length",
        "target_words": target,
        "low_words": low,
        "high_words": high,
        "headings": headings,
        "keywords": keywords,
    }
    return Problem(f"writing-{splits.digest(content)}", ({"role": "user", "content": content},), f"{target:g}", meta)


def load(split: str, n: int = 200, seed: int = 0, *, lengths: Sequence[Number] = WORDS) -> list[Problem]:
    """Return ``n`` different problems of ``split`` ("train", "dev" or "test"). Equal seeds give equal problems.

    Args:
        lengths: Numbers of words to request, at least one, each at least 1.

    Raises:
        ValueError: unknown split, no length or one below 1, or fewer than ``n`` different problems.
    """
    splits.check_split(split)
    if not lengths or any(words < 1 for words in lengths):
        raise ValueError(f"lengths={list(lengths)}: give at least one number of words, each 1 or more.")
    rng = random.Random(f"writing-{split}-{seed}")
    return splits.distinct(lambda: problem(rng, split, lengths), n)
