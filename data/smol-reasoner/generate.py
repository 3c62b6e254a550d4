"""Training examples of the smol reasoner, from (seed, chunk) alone: word problems, plain arithmetic, and some needles.

    python data/smol-reasoner/generate.py --n 5

prints a few. The word problems are ``toolkit/tasks/wordproblems.py``, train stories only; their traces ``wordtraces.py``. A needle
(``tasks/needle.py``, train facts, short contexts) is found by saying its sentence again; they keep retrieval alive.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator

from toolkit import lm as lms
from toolkit.lm import LM
from toolkit.tasks import needle, wordproblems, wordtraces
from toolkit.types import Problem

NEEDLE_SHARE = 0.04
NEEDLE_TOKENS = (100, 300)
FACTS = 2000
_SAID = ("{}", "The text says: {}", "It says: {}", "I look for it in the text. {}")
_FOUND = ("{}", "{}.", "The answer is {}.", "It is {}.")

Row = tuple[list[int], int]
"""Token ids, and how many of them are prompt (not predicted)."""


def example(lm: LM, facts: list[needle.Needle], rng: random.Random) -> tuple[Problem, str]:
    """One problem and its response, think tags included."""
    if rng.random() < NEEDLE_SHARE:
        fact, length = rng.choice(facts), rng.randint(*NEEDLE_TOKENS)
        found = needle.place(lm, fact, length, rng.random(), seed=rng.randrange(10**6)).problem
        thought = rng.choice(_SAID).format(fact.sentence)
        return found, f"<think>\n{thought}\n</think>\n{rng.choice(_FOUND).format(fact.answer)}"
    p = wordproblems.problem(rng, "train")
    return p, wordtraces.response(wordtraces.write(p, rng))


def rows(lm: LM, seed: int, chunk: int, n: int, facts: list[needle.Needle]) -> list[Row]:
    """The ``chunk``-th chunk of ``n`` examples as token ids; the response ends with the end of the turn."""
    rng, found = random.Random(f"smol-{seed}-{chunk}"), []
    for _ in range(n):
        p, response = example(lm, facts, rng)
        prompt = lm.prompt_ids(p.messages)
        found.append((prompt + lm.tokenizer.encode(response, add_special_tokens=False) + [lm.tokenizer.eos_token_id], len(prompt)))
    return found


def batches(lm: LM, seed: int, tokens: int, *, size: int = 256) -> Iterator[list[Row]]:
    """Batches without end, each at most ``tokens`` padded tokens: chunks of ``size`` examples sorted by length, cut, shuffled."""
    facts, chunk = needle.facts("train", FACTS), 0
    while True:
        found: list[list[Row]] = []
        for row in sorted(rows(lm, seed, chunk, size, facts), key=lambda row: len(row[0])):
            if found and (len(found[-1]) + 1) * len(row[0]) <= tokens:
                found[-1].append(row)
            else:
                found.append([row])
        random.Random(f"order-{seed}-{chunk}").shuffle(found)
        yield from found
        chunk += 1


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
