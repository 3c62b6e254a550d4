"""Word problems of 1 to 6 steps in short English sentences, and plain arithmetic, for the shipped model ``smol-reasoner``.

A story begins with a number of things, events change this number, and a question ends the story. Every step is one operation on whole
numbers from 1 to 40. To keep problems within reach of a small model, the numbers that are added or subtracted are small: at most 9, or a
product of at most 4 * 5, such as 3 * 4 for three bags of four.

Each story and each wording of plain arithmetic (``generators/stories.py``) belongs to one split. So no sentence of a test problem occurs in
training. Only names, and phrases around a problem such as "Be brief.", occur in all splits. The expressions of plain arithmetic are not
divided among the splits, since the shipped model was trained on them as they are. Short ones occur in several: of 62 plain problems among
200 test problems, 18 have an expression that also occurs in 60,000 draws for training.

``meta["steps"]`` holds the solution. ``meta["needed"]`` holds the character ranges of the quantities that the solution uses, in the order
of the prompt. A problem is *easy* (``meta["easy"]``) if it has at most two steps and no number above 12 in its text.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from toolkit.tasks import splits
from toolkit.tasks.generators import stories
from toolkit.tasks.generators.stories import STORIES, Story
from toolkit.types import Problem

STEPS = (1, 6)  # operations per problem
LARGEST, START, CHANGE = 40, 20, 9  # largest total, largest first number, largest number added or subtracted
EASY = 12  # largest number in an easy problem
# Shares of problems: plain arithmetic; stories with a number that is not needed; stories that end in a division or multiplication.
PLAIN_SHARE, ASIDE_SHARE, FINAL_SHARE = 0.2, 0.2, 0.3
HURRIED_SHARE, UNHURRIED_SHARE = 0.25, 0.35  # shares of problems with a phrase that asks for haste, and with another phrase
_MARKED = re.compile(r"\[([^\]]*)\]")


@dataclass(frozen=True)
class Step:
    """One operation and its result: ``left op right = result``.

    Attributes:
        apart: True for a side computation, whose result is the right operand of the next step. False for a step that gives the new total.
            For example, "three bags of four more pens" take two steps: 3 * 4 = 12 (``apart``), and then 12 are added to the total.
    """

    op: str
    left: int
    right: int
    result: int
    apart: bool = False

    def __str__(self) -> str:
        return f"{self.left} {self.op} {self.right}"


@dataclass
class _Telling:
    """A problem under construction: its sentences, its steps and the current total."""

    sentences: list[str]
    steps: list[Step]
    total: int

    def take(self, sentence: str, *steps: Step) -> None:  # add an event; its last step gives the new total
        self.sentences.append(sentence)
        self.steps += steps
        self.total = steps[-1].result


def problem(rng: random.Random, split: str, *, steps: tuple[int, int] = STEPS) -> Problem:
    """Draw one random problem of ``split``, made from a story or a wording that belongs to this split.

    Args:
        rng: Source of every random choice.
        split: ``"train"``, ``"dev"`` or ``"test"``.
        steps: Fewest and most operations that the solution takes.
    """
    n = rng.randint(*steps)
    small = n <= 2 and rng.random() < 0.5  # begin with a number of at most EASY, so that the problem is often easy
    if rng.random() < PLAIN_SHARE:
        name, text, solution, things = "plain", *_plain(rng, split, n, small), ""
    else:
        name = rng.choice([key for key, story in STORIES.items() if story.split == split])
        text, solution, things = _story(rng, STORIES[name], n, small)
    around, hurried = _around(rng)
    marked = around.format(text)
    content, needed = unmarked(marked)
    numbers = [int(v) for v in re.findall(r"\d+", content)]
    meta = {
        "task": "wordproblems",
        "split": split,
        "difficulty": n,
        "easy": n <= 2 and max(numbers) <= EASY,
        "cue": hurried,
        "phrase": around,
        "story": name,
        "things": things,
        "steps": tuple(solution),
        "needed": needed,
    }
    answer = str(solution[-1].result)
    return Problem(f"wordproblems-{splits.digest(content)}", ({"role": "user", "content": content},), answer, meta)


def load(split: str, n: int = 200, seed: int = 0, *, steps: tuple[int, int] = STEPS) -> list[Problem]:
    """Return ``n`` different problems of ``split`` ("train", "dev" or "test"). Equal seeds give equal problems.

    Args:
        steps: Fewest and most operations that the solution of a problem takes.

    Raises:
        ValueError: unknown split, a range of steps outside 1..6, an empty range, or fewer than ``n`` different problems.
    """
    splits.check_split(split)
    low, high = steps
    if not STEPS[0] <= low <= high <= STEPS[1]:
        raise ValueError(f"steps={steps}: give an inclusive range within {STEPS}.")
    rng = random.Random(f"wordproblems-{split}-{seed}")
    return splits.distinct(lambda: problem(rng, split, steps=steps), n)


def unmarked(text: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Remove the square brackets from a text. Return the new text, and the character ranges ``(start, stop)`` in it that were in brackets.

    >>> unmarked("Ann has [3] pens.")
    ('Ann has 3 pens.', ((8, 9),))
    """
    plain, ranges, at = "", [], 0
    for mark in _MARKED.finditer(text):
        plain += text[at : mark.start()]
        ranges.append((len(plain), len(plain) + len(mark[1])))
        plain += mark[1]
        at = mark.end()
    return plain + text[at:], tuple(ranges)


def _around(rng: random.Random) -> tuple[str, bool]:
    """Return a random phrase to put around a problem, and a flag: True if it asks for haste, which shortens thinking.

    ``{}`` in the phrase marks the place of the problem. The result ``"{}"`` means no phrase.
    """
    u = rng.random()
    if u < HURRIED_SHARE:
        return rng.choice(stories.HURRIED), True
    return (rng.choice(stories.UNHURRIED) if u < HURRIED_SHARE + UNHURRIED_SHARE else "{}"), False


def _plain(rng: random.Random, split: str, n: int, small: bool) -> tuple[str, list[Step]]:
    """Return the text of a problem of ``n`` steps in plain arithmetic, with its numbers in brackets, and its solution.

    The steps are additions and subtractions. In 30 % of the problems, the first step is a product instead.

    Args:
        n: Number of steps.
        small: If True, the first number is at most ``EASY`` (12). (The factors of a product are at most 6 in any case.)
    """
    first = rng.randint(1, EASY if small else START)
    telling, marked = _Telling([], [], first), f"[{first}]"
    if rng.random() < 0.3:
        a, b = rng.randint(2, 6), rng.randint(2, 6)
        telling.take("", Step("*", a, b, a * b))
        marked = f"[{a}] * [{b}]"
    while len(telling.steps) < n:
        step = _gain(rng, telling.total) if rng.random() < 0.5 else _loss(rng, telling.total)
        if step:
            telling.take("", step)
            marked += f" {step.op} [{step.right}]"
    return rng.choice(stories.PLAIN[split]).format(marked), telling.steps


def _story(rng: random.Random, story: Story, n: int, small: bool) -> tuple[str, list[Step], str]:
    """Return a story of ``n`` steps: its text with the needed quantities in brackets, its solution, and the things that it counts.

    Args:
        small: If True, the first number is at most ``EASY`` (12).
    """
    who, him = (rng.choice(stories.SHE), "her") if rng.random() < 0.5 else (rng.choice(stories.HE), "him")
    he, his = ("she", "her") if him == "her" else ("he", "his")
    friend = rng.choice([name for name in (*stories.HE, *stories.SHE) if name != who])
    names = {"who": who, "friend": friend, "him": him, "he": he, "his": his, "He": he.capitalize(), "His": his.capitalize()}
    names["things"] = rng.choice(story.things)
    while True:  # until the story has exactly n steps
        start = rng.randint(2, EASY if small else START)
        telling = _Telling([rng.choice(story.begin).format(n=start, **names)], [], start)
        unused = {kind: list(getattr(story, kind)) for kind in ("gain", "gains", "loss", "losses")}
        unused |= {"double": [story.double], "half": [story.half]}
        ending = rng.choice(("share", "price")) if rng.random() < FINAL_SHARE and n > 1 else "ask"
        events = n - (ending != "ask")
        for _ in range(8 * n):  # more tries than events, since an event may not fit
            if len(telling.steps) < events:
                _happen(rng, telling, unused, events - len(telling.steps), names)
        question = _end(rng, telling, story, ending, names)
        if question and len(telling.steps) == n:
            break
    if rng.random() < ASIDE_SHARE:
        telling.sentences.insert(1, story.aside.format(n=rng.randint(6, EASY), **names))
    return " ".join([*telling.sentences, question]), telling.steps, names["things"]


def _happen(rng: random.Random, telling: _Telling, unused: dict[str, list[str]], steps_left: int, names: dict[str, str]) -> None:
    """Add one random event to the story, such as a loss of some things.

    Add nothing if all sentences for this kind of event are used, if it takes more than ``steps_left`` steps, or if the new total would not
    be a whole number from 1 to 40.

    Args:
        unused: Kind of event -> its sentences that the story has not used yet.
        steps_left: Largest number of steps that the event may have.
        names: Values for the fields of a sentence that are not numbers, such as ``{who}``.
    """
    kind = rng.choices(list(unused), (4, 2, 4, 1.5, 1, 1))[0]  # weights of gain, gains, loss, losses, double, half: our choice
    if not unused[kind]:
        return
    total, numbers = telling.total, {}
    steps: list[Step] = []
    match kind:
        case "gain" | "loss":
            step = (_gain if kind == "gain" else _loss)(rng, total)
            steps, numbers = [step] if step else [], {"n": step.right if step else 0}
        case "gains" | "losses":
            a, b = rng.randint(2, 4), rng.randint(2, 5)
            after = total + a * b if kind == "gains" else total - a * b
            # Two steps: the product, then the change of the total.
            if steps_left >= 2 and 0 < after <= LARGEST:
                steps = [Step("*", a, b, a * b, apart=True), Step("+" if kind == "gains" else "-", total, a * b, after)]
                numbers = {"a": a, "b": b}
        case "double":
            steps = [Step("*", total, 2, 2 * total)] if 2 * total <= LARGEST else []
        case "half":
            steps = [Step("/", total, 2, total // 2)] if total % 2 == 0 else []
    if steps:
        sentence = rng.choice(unused[kind])
        unused[kind].remove(sentence)
        telling.take(sentence.format(**numbers, **names), *steps)


def _end(rng: random.Random, telling: _Telling, story: Story, ending: str, names: dict[str, str]) -> str | None:
    """Return the question that ends a story. Add the step that the question asks for to ``telling``, if it asks for one.

    Args:
        ending: ``"ask"``: ask for the total, which is no step. ``"share"``: divide the total. ``"price"``: multiply it.
        names: Values for the fields of a sentence that are not numbers, such as ``{who}``.

    Returns:
        The question. ``None`` if no number from 2 to 9 fits. For ``"share"``, it must divide the total and be smaller than it. For
        ``"price"``, the product must be at most 40.
    """
    if ending == "ask":
        return rng.choice(story.ask).format(**names)
    total = telling.total
    fits = [n for n in range(2, 10) if (total % n == 0 and n < total if ending == "share" else n * total <= LARGEST)]
    if not fits:
        return None
    n = rng.choice(fits)
    step = Step("/", total, n, total // n) if ending == "share" else Step("*", total, n, n * total)
    telling.steps.append(step)
    return (story.share if ending == "share" else story.price).format(n=n, **names)


def _gain(rng: random.Random, total: int) -> Step | None:
    n = rng.randint(2, CHANGE)
    return Step("+", total, n, total + n) if total + n <= LARGEST else None


def _loss(rng: random.Random, total: int) -> Step | None:
    n = rng.randint(2, CHANGE)
    return Step("-", total, n, total - n) if n < total else None
