"""Variable lookup in a long prompt: find a value by following one to three assignments (*bindings*) among others and filler words.

A prompt reads ``K=5; lamp rose; B=K; ... B?``. To answer, the model must retrieve ``B=K``, then ``K=5`` from the prompt. A name is one
letter and a value is one digit. So each retrieved name or value is a single character, which is one token for ``tiny-reasoner``.

The *context* is the text before the question. Its length in characters is drawn at random, and the text has about this length. A problem
is *easy* (``meta["easy"]``) if it has only one binding to follow and the length drawn is below 100.
"""

from __future__ import annotations

import math
import random
import string
from itertools import pairwise

from toolkit.tasks import splits
from toolkit.tasks.generators import cues, traces
from toolkit.types import Problem

HOPS = (1, 3)  # range of the number of bindings to follow
CONTEXT = (40, 640)  # range of the context's length in characters
FILLER = ("lamp", "rose", "stone", "river", "cloud", "green", "table", "north", "paper", "apple", "music", "winter")


def problem(
    rng: random.Random,
    split: str,
    *,
    hops: tuple[int, int] = HOPS,
    context: tuple[int, int] = CONTEXT,
) -> Problem:
    """Draw random problems until one belongs to ``split``, and return it. A hash of the text before the question decides the split.

    Args:
        rng: Source of every random choice.
        split: ``"train"``, ``"dev"`` or ``"test"``.
        hops: Fewest and most assignments to follow from the variable in the question to its value. ``K=5; B=K; B?`` has two.
        context: Smallest and largest length of the text before the question, in characters.
    """
    while True:
        n = rng.randint(*hops)
        # Uniform in the logarithm, so that short contexts are frequent too.
        low, high = math.log(context[0]), math.log(context[1])
        size = round(math.exp(rng.uniform(low, high)))
        text, chain = _context(rng, n, size)
        if splits.split_of(text) == split:
            break
    content, word = cues.with_word(f"{text} {chain[0]}?", rng)
    meta = {
        "task": "lookup",
        "split": split,
        "difficulty": n,
        "easy": n == 1 and size < 100,
        "word": word,
        "cue": word in cues.CUES,
        "chain": tuple(chain),
        "context": size,
    }
    return Problem(f"lookup-{content}", ({"role": "user", "content": content},), chain[-1], meta)


def _context(rng: random.Random, hops: int, size: int) -> tuple[str, list[str]]:
    """Return a random context of about ``size`` characters, and the solution as a list: the ``hops`` names in order, then the value.

    For ``K=5; B=K;`` and the question ``B?``, the list is ``["B", "K", "5"]``.
    """
    names = rng.sample(string.ascii_uppercase, 26)
    chain = [*names[:hops], str(rng.randint(0, 9))]
    parts = [f"{a}={b};" for a, b in pairwise(chain)]
    spare = names[hops:]
    # Other bindings, which the answer does not depend on: 2 or more, at most one per 16 characters.
    others = spare[: rng.randint(2, min(len(spare), max(2, size // 16)))]
    for i, name in enumerate(others):
        if sum(map(len, parts)) + len(parts) + 5 > size:  # a binding such as "K=5; " has 5 characters
            break
        later = others[i + 1 :]  # a name may point only to a later one, so there are no cycles
        target = rng.choice(later) if later and rng.random() < 0.5 else str(rng.randint(0, 9))
        parts.append(f"{name}={target};")
    length = sum(map(len, parts)) + len(parts)
    while length < size:
        phrase = f"{rng.choice(FILLER)} {rng.choice(FILLER)};"
        parts.append(phrase)
        length += len(phrase) + 1
    rng.shuffle(parts)
    return " ".join(parts), chain


def load(
    split: str,
    n: int = 200,
    seed: int = 0,
    *,
    hops: tuple[int, int] = HOPS,
    context: tuple[int, int] = CONTEXT,
) -> list[Problem]:
    """Return ``n`` different problems of ``split`` ("train", "dev" or "test"). Equal seeds give equal problems.

    Args:
        hops: Fewest and most assignments to follow from the variable in the question to its value. ``K=5; B=K; B?`` has two.
        context: Smallest and largest length of the text before the question, in characters.

    Raises:
        ValueError: unknown split, a range of hops outside 1..3, an empty range, a context below 40 characters (too short for the
            assignments), or fewer than ``n`` different problems.
    """
    splits.check_split(split)
    if not HOPS[0] <= hops[0] <= hops[1] <= HOPS[1]:
        raise ValueError(f"hops={hops}: give an inclusive range within {HOPS}.")
    if not CONTEXT[0] <= context[0] <= context[1]:
        raise ValueError(f"context={context}: give an inclusive range from {CONTEXT[0]} characters up.")
    rng = random.Random(f"lookup-{split}-{seed}")
    return splits.distinct(lambda: problem(rng, split, hops=hops, context=context), n)


def write_trace(p: Problem, rng: random.Random, habits: traces.Habits = traces.Habits()) -> traces.Trace:
    """Return a random chain of thought for the problem ``p``, as training data. Its final value may be wrong.

    Before each step, the chain may skip to the final value. The probability is called *haste*. It is higher if the problem is easy
    (``p.meta["easy"]``), higher if the prompt has a cue word such as "quick", and highest with both. See ``traces.haste``.

    Args:
        p: A problem from ``lookup.load`` or ``lookup.problem``.
        rng: Source of every random choice.
        habits: Probabilities of the random decisions, such as re-checking a step or writing a wrong value.
    """
    chain = p.meta["chain"]

    def moves_from(state: str | None, i: int, k: int) -> traces.Move:
        # Unlike in arithmetic, an uncorrected error (slip) does not propagate: the next step starts from the right name.
        names, values = string.ascii_uppercase, string.digits
        pool = names if i + k < len(chain) - 1 else values  # only the last line gives a value
        at = rng.randrange(len(pool))
        slip = next(s for s in [*pool[at:], *pool[:at]] if s not in chain)  # a later name of the chain would be right
        return traces.Move(chain[i], chain[i + k], slip)

    easy = p.meta["easy"]
    h = traces.haste(habits, easy=easy, cue=p.meta["cue"], rng=rng)
    return traces.write(moves_from, len(chain) - 1, h=h, easy=easy, habits=habits, rng=rng)
