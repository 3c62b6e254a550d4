"""Sample the recorded responses of two small models to word problems: 60 of the smol reasoner, 120 of SmolLM2-135M-Instruct.

    python data/grading/sample.py

writes ``sampled.jsonl`` in ``runs/grading``; ``collect.py`` puts them into ``responses.jsonl``. It takes 10 minutes on two cores. SmolLM2
is asked for its final answer in four ways, in turn. The smol reasoner's budget is so small that it does not close every thought.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from toolkit import generate, lm, shipped, store, tasks
from toolkit.generate import Sampling
from toolkit.types import Problem

REASONED, PLAIN = 60, 120
ASKED = (
    "",
    " Reason step by step, and put the final answer within \\boxed{}.",
    " Think step by step, then give the final answer on its own line in the form: #### ANSWER",
    " Think step by step. End with the sentence: The answer is ANSWER.",
)


def asked(problem: Problem, text: str) -> Problem:
    """Return a problem with a sentence added to its question."""
    *before, last = problem.messages
    return replace(problem, messages=(*before, {**last, "content": last["content"] + text}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/grading"))
    out = parser.parse_args().out
    problems = tasks.load("wordproblems", "test", PLAIN, seed=20)
    rows = []
    for name, model, pool, budget in (
        ("smol-reasoner", "smol-reasoner", problems[:REASONED], 64),
        (
            "SmolLM2-135M-Instruct",
            str(shipped.smollm2_path()),
            [asked(p, ASKED[i % len(ASKED)]) for i, p in enumerate(problems)],
            160,
        ),
    ):
        sampling = Sampling(n=1, max_new_tokens=budget, temperature=0.6)
        sampled = generate.rollouts(lm.load(model), pool, sampling, out=out / name)
        rows += [
            {"model": name, "question": p.messages[-1]["content"], "gold": p.answer, "response": r.text, "finish": r.finish}
            for p, r in zip(pool, sampled, strict=True)
        ]
    store.write_rows(rows, out / "sampled.jsonl")


if __name__ == "__main__":
    main()
