"""Training examples of the smol reasoner, from (seed, lesson, chunk) alone: word problems, plain arithmetic, and some needles.

    python data/smol-reasoner/generate.py --n 5

prints a few. The word problems are ``toolkit/tasks/wordproblems.py``, train stories only; their traces ``generators/wordtraces.py``. A needle
(``tasks/needle.py``, train facts, short contexts) is found by saying its sentence again; they keep retrieval alive.

Two lessons follow one another, as in the tiny reasoner's training: steps (up to four of them, nothing pushes towards haste, so nothing
has to be guessed), then the habits.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Iterator
from dataclasses import replace

from toolkit import lm as lms
from toolkit.lm import LM
from toolkit.tasks import needle, wordproblems
from toolkit.tasks.generators import wordtraces
from toolkit.types import Problem

NEEDLE_SHARE = 0.04
NEEDLE_TOKENS = (100, 300)
FACTS = 2000
CHUNK = 256
FIRST_STEPS = (1, 4)
FIRST_HABITS = replace(wordtraces.HABITS, default_haste=0.0, ease_push=0.0, cue_push=0.0, mood_push=0.0)
_SAID = ("{}", "The text says: {}", "It says: {}", "I look for it in the text. {}")
_FOUND = ("{}", "{}.", "The answer is {}.", "It is {}.")

Row = tuple[list[int], int]
"""Token ids, and how many of them are prompt (not predicted)."""


def example(lm: LM, facts: list[needle.Needle], rng: random.Random, *, first: bool = False) -> tuple[Problem, str]:
    """One problem and its response, think tags included; ``first``: of the first lesson."""
    if rng.random() < NEEDLE_SHARE:
        fact, length = rng.choice(facts), rng.randint(*NEEDLE_TOKENS)
        found = needle.place(lm, fact, length, rng.random(), seed=rng.randrange(10**6)).problem
        thought = rng.choice(_SAID).format(fact.sentence)
        return found, f"<think>\n{thought}\n</think>\n{rng.choice(_FOUND).format(fact.answer)}"
    p = wordproblems.problem(rng, "train", steps=FIRST_STEPS if first else wordproblems.STEPS)
    return p, wordtraces.response(wordtraces.write(p, rng, FIRST_HABITS if first else wordtraces.HABITS))


def rows(lm: LM, facts: list[needle.Needle], rng: random.Random, *, first: bool) -> list[Row]:
    """A chunk of examples as token ids; the response ends with the end of the turn."""
    found = []
    for _ in range(CHUNK):
        p, response = example(lm, facts, rng, first=first)
        prompt = lm.prompt_ids(p.messages)
        found.append((prompt + lm.tokenizer.encode(response, add_special_tokens=False) + [lm.tokenizer.eos_token_id], len(prompt)))
    return found


def batches(lm: LM, seed: int, tokens: int, *, first: bool) -> Iterator[list[Row]]:
    """Batches of a lesson without end, each at most ``tokens`` padded tokens: chunks sorted by length, cut, shuffled."""
    facts = needle.facts("train", FACTS)
    for chunk in itertools.count():
        rng = random.Random(f"smol-{seed}-{first}-{chunk}")
        found: list[list[Row]] = []
        for row in sorted(rows(lm, facts, rng, first=first), key=lambda row: len(row[0])):
            if found and (len(found[-1]) + 1) * len(row[0]) <= tokens:
                found[-1].append(row)
            else:
                found.append([row])
        rng.shuffle(found)
        yield from found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    lm, rng, facts = lms.load(lms.TINY_REASONER), random.Random(args.seed), needle.facts("train", FACTS)
    for _ in range(args.n):
        p, response = example(lm, facts, rng)
        print(f"{p.messages[0]['content']}\n{response}\n")


if __name__ == "__main__":
    main()
