"""Target length generation: answer a question in a given number of words. Ruler (arXiv 2409.18943).

A question is followed by "The response should have a word count of 50 words." ("more than 800 words" for the open target). Matches are
counted by ``stats.length_match`` with the published ranges: precise (PM) and flexible (FM).

Deviations: the paper's 2,000 questions come from OpenHermes-2.5, and targets are drawn uniformly. ``target_length_prompts`` takes
any questions; ``load`` uses open questions of ours. ``grade`` calls an answer right if it is a flexible match.

Units: words, as Ruler counts them (``stats.words``), of the answer without the thinking.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import product

from toolkit import stats
from toolkit.stats import LengthMatch, Number
from toolkit.tasks import splits
from toolkit.types import Problem

TARGETS: tuple[Number, ...] = tuple(stats.RULER_PRECISE)  # 10 to 700, and 800 for "more than 800"

_WORDINGS = (
    "What is {} and how does it work?",
    "Explain {} to a curious child.",
    "What should everybody know about {}?",
    "How did people come to understand {}?",
    "Why does {} matter in daily life?",
    "Describe {} and one common misunderstanding about it.",
)
_TOPICS = (
    "photosynthesis", "the water cycle", "a thermostat", "compound interest", "the printing press", "gravity", "a vaccine", "soil",
    "inflation", "the moon's phases", "a rainbow", "bread baking", "the human heart", "recycling", "a compass", "sleep", "thunder",
    "the calendar", "a bicycle", "beekeeping", "the alphabet", "electric current", "a glacier", "migration of birds", "the tides",
    "a lock and key", "map making", "fermentation", "volcanoes", "a sundial", "handwriting", "the immune system", "earthquakes",
    "a telescope", "glass making", "public libraries", "the speed of sound", "a sailing boat", "weather forecasts", "chess",
)  # fmt: skip
QUESTIONS = tuple(wording.format(topic) for wording, topic in product(_WORDINGS, _TOPICS))


def instruction(target: Number) -> str:
    """Return the sentence that sets the target length. 800 is the open target, as in ``toolkit.stats.RULER_PRECISE``.

    >>> instruction(50)
    'The response should have a word count of 50 words.'
    """
    return f"The response should have a word count of {'more than ' * _open(target)}{target:g} words."


def target_length_prompts(questions: Sequence[str], targets: Sequence[Number] = TARGETS, seed: int = 0) -> list[Problem]:
    """Return one problem per question, each with a target drawn uniformly.

    Args:
        targets: Target lengths in words. Targets that Ruler does not have get ranges of +-10 % and +-20 % (``stats.assumed_precise``,
            ``assumed_flexible``).

    Returns:
        Problems whose meta holds ``target_words``, the range of a flexible match as ``low_words`` and ``high_words`` (``None``: open),
        and Ruler's level 0 to 2 as ``difficulty`` (missing for other targets).

    Raises:
        ValueError: no question, no target, or one below 1 word.
    """
    if not questions or not targets or any(t < 1 for t in targets):
        raise ValueError(
            f"{len(questions)} questions, targets={list(targets)}: give at least one of each, and targets of 1 word or more."
        )
    rng = random.Random(f"target_length-{seed}")
    return [problem(question, rng.choice(list(targets))) for question in questions]


def problem(question: str, target: Number) -> Problem:
    """Return the problem of a question with a target length in words; a flexible match is right."""
    low, high = _range(target, precise=False)
    level = next((i for i, members in enumerate(stats.RULER_LEVELS.values()) if target in members), None)
    content = f"{question} {instruction(target)}"
    meta = ({} if level is None else {"difficulty": level}) | {
        "task": "target_length",
        "split": splits.split_of(question),
        "grader": "length",
        "question": question,
        "target_words": target,
        "low_words": low,
        "high_words": None if math.isinf(high) else high,
    }
    return Problem(f"target_length-{splits.digest(content)}", ({"role": "user", "content": content},), f"{target:g}", meta)


def load(split: str = "test", n: int = 20, seed: int = 0, *, targets: Sequence[Number] = TARGETS) -> list[Problem]:
    """Return ``n`` different problems of a split from our questions, the same ones for the same seed. A question is in one split only.

    Raises:
        ValueError: unknown split, bad targets, or more problems than questions and targets give.
    """
    splits.check_split(split)
    rng = random.Random(f"target_length-{split}-{seed}")
    questions = [q for q in QUESTIONS if splits.split_of(q) == split]
    return splits.distinct(lambda: target_length_prompts([rng.choice(questions)], targets, rng.randrange(2**32))[0], n)


def length_match(texts: Sequence[str], problems: Sequence[Problem]) -> dict[str, LengthMatch]:
    """Return Ruler's report on answer texts (without thinking): per target, per level and in total.

    Raises:
        ValueError: no texts, not one text per problem, or problems of another task.
    """
    if other := [p.id for p in problems if "target_words" not in p.meta]:
        raise ValueError(f"{other[0]} has no target length: give problems of target_length_prompts or target_length.load.")
    targets = [p.meta["target_words"] for p in problems]
    precise, flexible = ({t: _range(t, precise=p) for t in targets} for p in (True, False))
    return stats.length_match([stats.words(text) for text in texts], targets, precise=precise, flexible=flexible)


def _open(target: Number) -> bool:
    return math.isinf(_range(target, precise=True)[1])


def _range(target: Number, *, precise: bool) -> tuple[Number, Number]:
    """Return Ruler's range of a target, or for other targets a range around it, in words."""
    table, share = (stats.RULER_PRECISE, stats.assumed_precise) if precise else (stats.RULER_FLEXIBLE, stats.assumed_flexible)
    return table[target] if target in table else stats.ranges_around([target], share)[target]
