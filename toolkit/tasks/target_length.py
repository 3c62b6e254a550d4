"""Target length: answer a question in a given number of words. After Ruler (arXiv 2409.18943).

A question is followed by "The response should have a word count of 50 words." The target 800 is *open*: the prompt asks for "more than 800
words". An answer matches if its length lies in a range around the target. The paper gives two ranges per target: a narrow one for a precise
match (PM) and a wide one for a flexible match (FM). ``length_match`` returns the rates of both kinds of match.

Deviations: the paper draws its 2,000 questions from OpenHermes-2.5. ``target_length_prompts`` takes any questions; ``load`` uses
open-ended questions that we wrote. When a rollout is graded, a flexible match counts as a right answer.

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
    """Return the sentence that sets the target length; for the open target 800 it says "more than 800 words".

    >>> instruction(50)
    'The response should have a word count of 50 words.'
    """
    return f"The response should have a word count of {'more than ' * _open(target)}{target:g} words."


def target_length_prompts(questions: Sequence[str], targets: Sequence[Number] = TARGETS, seed: int = 0) -> list[Problem]:
    """Return one problem per question, each with a target length drawn uniformly from ``targets``.

    Args:
        questions: Questions to ask.
        targets: Target lengths in words.
        seed: Seed of the draws.

    Returns:
        The problems. ``meta["target_words"]`` is the target. An answer counts as right if it has more than ``meta["low_words"]`` words and
        at most ``meta["high_words"]`` (``None``: no upper limit). This is the range of Ruler (arXiv 2409.18943) for a flexible match; for
        a target that Ruler does not have, it is the target +-20 % (our choice). ``meta["difficulty"]`` is Ruler's level of the target: 0
        for up to 80 words, 1 for up to 500, 2 above. It is missing for targets that Ruler does not have.

    Raises:
        ValueError: no question, no target, or a target below 1 word.
    """
    if not questions or not targets or any(t < 1 for t in targets):
        raise ValueError(
            f"{len(questions)} questions, targets={list(targets)}: give at least one of each, and targets of 1 word or more."
        )
    rng = random.Random(f"target_length-{seed}")
    return [problem(question, rng.choice(list(targets))) for question in questions]


def problem(question: str, target: Number) -> Problem:
    """Return the problem of answering ``question`` in ``target`` words.

    An answer is right if its number of words is near the target. For the targets of the Ruler paper (arXiv 2409.18943), the number must lie
    in the range that the paper calls a flexible match; for any other target, within 20 % of the target.
    """
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
    """Return ``n`` different problems of a split: open-ended questions (``QUESTIONS``), each with a random target length.

    Equal seeds give equal problems. All problems with the same question are in one split, whatever their targets.

    Args:
        targets: Target lengths in words. Default: Ruler's, from 10 to 700 words, and "more than 800 words".

    Raises:
        ValueError: unknown split, no target, a target below 1 word, or fewer than ``n`` combinations of question and target.
    """
    splits.check_split(split)
    rng = random.Random(f"target_length-{split}-{seed}")
    questions = [q for q in QUESTIONS if splits.split_of(q) == split]
    return splits.distinct(lambda: target_length_prompts([rng.choice(questions)], targets, rng.randrange(2**32))[0], n)


def length_match(texts: Sequence[str], problems: Sequence[Problem]) -> dict[str, LengthMatch]:
    """Return scores of how well the lengths of answers match their targets, as Ruler (arXiv 2409.18943) reports them.

    Args:
        texts: The answer to each problem, without the thinking.

    Returns:
        Scores by name: one per target (``"10"``, ..., ``">800"``), one per group of targets that Ruler calls a level (``"level 0"``: up to
        80 words; ``"level 1"``: up to 500; ``"level 2"``: above), and ``"all"``. Each LengthMatch holds the percentages of answers in the
        narrow range of their target (precise match), in its wide range (flexible match) and with exactly the target length. It also holds
        the root mean square of length minus target, in words.

    Raises:
        ValueError: no texts, different numbers of texts and problems, or problems of another task.
    """
    if other := [p.id for p in problems if "target_words" not in p.meta]:
        raise ValueError(f"{other[0]} has no target length: give problems of target_length_prompts or target_length.load.")
    targets = [p.meta["target_words"] for p in problems]
    precise, flexible = ({t: _range(t, precise=p) for t in targets} for p in (True, False))
    return stats.length_match([stats.words(text) for text in texts], targets, precise=precise, flexible=flexible)


def _open(target: Number) -> bool:  # True if the target has no upper limit: 800 only
    return math.isinf(_range(target, precise=True)[1])


def _range(target: Number, *, precise: bool) -> tuple[Number, Number]:
    """Return the range of matching lengths in words: the lower end is excluded, the upper end included.

    Args:
        precise: If True, return Ruler's narrow range (precise match), or target +-10 % if Ruler does not have the target. If False, return
            its wide range (flexible match), or target +-20 %.
    """
    table, share = (stats.RULER_PRECISE, stats.assumed_precise) if precise else (stats.RULER_FLEXIBLE, stats.assumed_flexible)
    return table[target] if target in table else stats.ranges_around([target], share)[target]
