"""Instructions with constraints: answer a question within a number of words, with given words, in a given form.

A prompt is an open question (those of ``target_length``) and two to four sentences, each of which states one constraint
(``toolkit.constraints``). An answer is right if it meets all constraints; whether it answers the question is not checked. ``write`` makes
answers that break chosen constraints and meet all others.

The task feeds the reward ``ace_rl`` (arXiv:2509.04903), whose paper takes its instructions from a corpus. Ours are generated.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from itertools import pairwise

from toolkit.constraints import LENGTH, Constraint
from toolkit.tasks import splits
from toolkit.tasks.target_length import QUESTIONS
from toolkit.types import Problem

WORDS = (
    "river", "winter", "copper", "window", "garden", "bridge", "feather", "lantern", "meadow", "pepper", "saddle", "thread",
    "violin", "walnut", "anchor", "basket", "candle", "desert", "engine", "harbour",
)  # fmt: skip
ENDINGS = ("thank you.", "that is all.", "good luck.")
FILLER = ("this", "is", "one", "more", "plain", "part", "of", "the", "text", "and", "it", "goes", "on")
LENGTHS = (20, 60)  # words: range of the bounds
COUNT = (2, 4)  # constraints per instruction


def constraints(rng: random.Random, count: int) -> tuple[Constraint, ...]:
    """Return random constraints that one text can meet together, the first of which is a length.

    Args:
        rng: Source of every random choice.
        count: Number of constraints, 1 to 6.
    """
    low = rng.randint(*LENGTHS)
    kind = rng.choice(sorted(LENGTH))
    length = Constraint(kind, (str(low), str(low + 15)) if kind == "between" else (str(low),))
    wanted, unwanted = rng.sample(WORDS, 2)
    form = Constraint(rng.choice(["paragraphs", "bullets"]), (str(rng.randint(2, 4)),))
    manner = rng.choice([Constraint("no_commas", ("commas",)), Constraint("lower_case", ("lower case",))])
    others = [
        Constraint("mention", (wanted,)), Constraint("avoid", (unwanted,)), Constraint("end", (rng.choice(ENDINGS),)), form, manner,
    ]  # fmt: skip
    return (length, *rng.sample(others, count - 1))


def write(wanted: Sequence[Constraint], broken: Collection[str] = ()) -> str:
    """Return a text that breaks the constraints of the kinds ``broken`` and meets all others of ``wanted``.

    Args:
        wanted: Constraints that ``constraints`` made, at most one of each kind.
        broken: Kinds to break.
    """
    by_kind = {c.kind: c.arguments for c in wanted}
    kept = {kind: args for kind, args in by_kind.items() if kind not in broken}
    body = [word.lower() for word in kept.get("mention", ())]
    body += [args[0] for kind, args in by_kind.items() if kind == "avoid" and kind in broken]
    ending = kept["end"][0].split() if "end" in kept else ["so", "it", "ends"]
    n = _words(by_kind, broken) - len(ending)
    body = (body + [FILLER[i % len(FILLER)] for i in range(max(n, len(body)))])[: max(n, len(body))]
    if "lower_case" in broken:
        body[-1] = body[-1].upper()
    if "no_commas" in broken:
        body[-1] += ","
    words = [*body, *ending]
    parts = int(by_kind.get("paragraphs", by_kind.get("bullets", ("1",)))[0]) + ("paragraphs" in broken or "bullets" in broken)
    edges = [len(words) * i // parts for i in range(parts + 1)]
    chunks = [" ".join(words[a:b]) for a, b in pairwise(edges)]
    return "\n".join(f"- {c}" for c in chunks) if "bullets" in by_kind else "\n\n".join(chunks)


def _words(by_kind: dict[str, tuple[str, ...]], broken: Collection[str]) -> int:
    """Return the number of words of a text that meets, or breaks, the length constraint."""
    ((kind, bounds),) = [(kind, [int(a) for a in args]) for kind, args in by_kind.items() if kind in LENGTH]
    if kind in broken:
        return bounds[0] - 5 if kind == "at_least" else bounds[-1] + 5
    return bounds[0] + 3 if kind != "at_most" else bounds[0] - 3


def load(split: str = "test", n: int = 200, seed: int = 0) -> list[Problem]:
    """Return ``n`` different problems of ``split`` ("train", "dev" or "test"). Equal seeds give equal problems.

    All problems with the same question are in one split. The gold answer is a text that meets all constraints, not the only one.

    Raises:
        ValueError: unknown split, or fewer than ``n`` different problems.
    """
    splits.check_split(split)
    rng = random.Random(f"instructions-{split}-{seed}")
    questions = [q for q in QUESTIONS if splits.split_of(q) == split]

    def draw() -> Problem:
        chosen = constraints(rng, rng.randint(*COUNT))
        content = " ".join([rng.choice(questions), *(c.phrase for c in chosen)])
        meta = {
            "task": "instructions",
            "split": split,
            "difficulty": len(chosen),
            "grader": "constraints",
            "instruction": content,
        }
        return Problem(f"instructions-{splits.digest(content)}", ({"role": "user", "content": content},), write(chosen), meta)

    return splits.distinct(draw, n)
