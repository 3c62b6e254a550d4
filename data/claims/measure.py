"""Judge the published claims on SmolLM2-135M-Instruct as it is, on a few sums in words: ``python data/claims/measure.py``.

Writes ``problems.jsonl``, ``README.md`` (the text for posting), ``claims.json`` and ``figure.png`` here. Everything is kept in
``runs/claims``, so after a stop the same command goes on; about 10 minutes of CPU time. It is what ``toolkit claims`` does with the settings
below. At temperature 1 the model is incoherent and solves none of the problems, so they are sampled at 0.6.
"""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path

import torch

from toolkit import figures, jobs, shipped, store
from toolkit import lm as lms
from toolkit.tags import ThinkTags

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import publish  # noqa: E402

NAME, COMMAND = "SmolLM2-135M-Instruct", "python data/claims/measure.py"
PROBLEMS = HERE / "problems.jsonl"
SIZES = {"train": 30, "dev": 8, "test": 8}
NAMES, THINGS = ("Tom", "Anna", "Ben", "Mia", "Sam"), ("apples", "books", "coins", "stamps", "pens")


def write_problems() -> None:
    """Write the problems: no sum of two numbers occurs twice."""
    rng = random.Random("claims")
    sums = rng.sample([(a, b) for a in range(2, 21) for b in range(2, 21)], sum(SIZES.values()))
    splits = [split for split, count in SIZES.items() for _ in range(count)]
    rows = []
    for (a, b), split in zip(sums, splits, strict=True):
        who, what = rng.choice(NAMES), rng.choice(THINGS)
        question = f"{who} has {a} {what} and gets {b} more. How many {what} does {who} have now? Explain briefly."
        rows.append({"id": f"{a}+{b}", "question": question, "answer": a + b, "meta": {"split": split}})
    store.write_rows(rows, PROBLEMS)


def plan() -> jobs.ClaimsStudy:
    """Return the settings: few problems, so that it ends in minutes on one core."""
    return jobs.ClaimsStudy(
        jobs.Study(str(PROBLEMS), problems=SIZES["test"], samples=2, max_new_tokens=72, batch_size=64, temperature=0.6),
        tuple(jobs.CLAIMS),
        jobs.EditSettings(share=0.25),
        jobs.Search("needle", instances=8, lengths=(160,), max_new_tokens=24),
        train_problems=SIZES["train"],
    )


CODE = store.code_of("toolkit.jobs.published_claims")


def main() -> None:
    """Measure what is not kept, then write."""
    torch.set_num_threads(1)
    write_problems()
    lm = lms.load(shipped.smollm2_path(), tags=ThinkTags(None, None), device="cpu")
    lm = replace(lm, name=NAME)  # without the path of the file, which differs between machines
    work = publish.work_folder(__file__, CODE, lm.fingerprint)
    found = jobs.claims_report(lm, plan(), work, say=lambda line: print(line, flush=True), command=COMMAND)
    title, *text = (work / "claims.md").read_text().split("\n")
    picture = "![Effects in units of the smallest that matters; grey crosses compare with a random control](figure.png)"
    store.write_text("\n".join([title, "", picture, *text]), HERE / "README.md")
    store.write_json(store.read_json(work / "claims.json"), HERE / "claims.json")
    publish.draw(figures.claimed(found), HERE / "figure.png", 1200, 150 + 26 * len(found))


if __name__ == "__main__":
    main()
