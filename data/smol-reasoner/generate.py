"""Training examples of the smol reasoner, determined by (seed, lesson, chunk): word problems, plain arithmetic, and some needles.

    python data/smol-reasoner/generate.py --n 5

prints five. Word problems come from ``toolkit/tasks/wordproblems.py`` (train stories only), their traces from ``wordtraces``. Needles
(``tasks/needle.py``, train facts, short contexts) are answered by repeating the sentence; they preserve the model's retrieval.

There are two lessons, as in the tiny reasoner's training. The first has problems of up to four steps without haste, so the model never has
to guess. The second adds the habits of haste.
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
"""Token ids, and the number of prompt tokens, which are not predicted."""


def example(lm: LM, facts: list[needle.Needle], rng: random.Random, *, first: bool = False) -> tuple[Problem, str]:
    """Return a problem and its response with think tags; ``first`` selects the first lesson."""
    if rng.random() < NEEDLE_SHARE:
        fact, length = rng.choice(facts), rng.randint(*NEEDLE_TOKENS)
        problem = needle.place(lm, fact, length, rng.random(), seed=rng.randrange(10**6)).problem
        thought = rng.choice(_SAID).format(fact.sentence)
        return problem, f"<think>\n{thought}\n</think>\n{rng.choice(_FOUND).format(fact.answer)}"
    p = wordproblems.problem(rng, "train", steps=FIRST_STEPS if first else wordproblems.STEPS)
    return p, wordtraces.response(wordtraces.write(p, rng, FIRST_HABITS if first else wordtraces.HABITS))


def rows(lm: LM, facts: list[needle.Needle], rng: random.Random, *, first: bool) -> list[Row]:
    """Return a chunk of examples as token ids; each response ends with the end-of-turn token."""
    chunk = []
    for _ in range(CHUNK):
        p, response = example(lm, facts, rng, first=first)
        prompt = lm.prompt_ids(p.messages)
        chunk.append((prompt + lm.tokenizer.encode(response, add_special_tokens=False) + [lm.tokenizer.eos_token_id], len(prompt)))
    return chunk


def batches(lm: LM, seed: int, tokens: int, *, first: bool) -> Iterator[list[Row]]:
    """Yield batches of a lesson endlessly, each of at most ``tokens`` padded tokens; every chunk is sorted by length, split and shuffled."""
    facts = needle.facts("train", FACTS)
    for chunk in itertools.count():
        rng = random.Random(f"smol-{seed}-{first}-{chunk}")
        split: list[list[Row]] = []
        for row in sorted(rows(lm, facts, rng, first=first), key=lambda row: len(row[0])):
            if split and (len(split[-1]) + 1) * len(row[0]) <= tokens:
                split[-1].append(row)
            else:
                split.append([row])
        rng.shuffle(split)
        yield from split


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
