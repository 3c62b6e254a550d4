"""Train a small writer of SQL with the contrastive reward, beside correctness alone: ``python data/text-to-sql/study.py``.

After the contrastive reward for multilingual Text-to-SQL (arXiv 2510.13827). Writes ``results.json`` and the tables in ``README.md`` here.
Models and answers are kept in ``runs/text-to-sql``, so after a stop the same command goes on. About 10 minutes on one core.

The model is made here, with supervised training on questions in both languages of the task ``text_to_sql``. Some of its training queries are
wrong in one word: a third of the English ones, and most of those in the made-up language. So a group of responses to a question in that
language often has no right query, and correctness alone has no gradient there. Every arm goes on from this model with GRPO, once per seed:

- *correctness*: 1 for a query that gives the right rows;
- *contrastive*: plus the similarity of question and query, from an encoder that is tuned on the training pairs;
- *untuned encoder* (control): the same with random word vectors.

Differences from correctness alone are paired by question, with 95 % intervals over questions and seeds.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from toolkit import finetune, report, store
from toolkit.generate import Sampling, rollouts
from toolkit.grpo import recipes
from toolkit.grpo.extras import Extras
from toolkit.grpo.run import MODEL, Run, train
from toolkit.grpo.saved import read_back
from toolkit.judging import contrastive
from toolkit.lm import LM
from toolkit.metrics import with_interval
from toolkit.rewards.text_to_sql import ContrastiveSQL
from toolkit.tasks import text_to_sql
from toolkit.types import Problem

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import publish  # noqa: E402

CODE = store.code_of(
    "toolkit.finetune", "toolkit.generate", "toolkit.grpo.run", "toolkit.grpo.recipes:plain", "toolkit.rewards.correctness",
    "toolkit.rewards.text_to_sql", "toolkit.judging.contrastive", "toolkit.tasks.text_to_sql",
)  # fmt: skip
SEEDS, POOL, TESTED, SAMPLES, LONGEST = (0, 1, 2), 1500, 150, 4, 40
SLIPS = {"en": 0.33, "kesh": 0.85}  # share of wrong queries in the supervised training
FIRST, STEPS, PROBLEMS, GROUP, RATE = 500, 60, 16, 8, 3e-4
SHAPE = {"layers": 2, "d_model": 96, "d_mlp": 192, "heads": 4, "head_dim": 24}
PIECES = r"'\w+'|\d+|[A-Za-z]+(?:-[A-Za-z]+)?|\n|[^\w\s]"
BASE, TUNED, CONTROL = "correctness", "contrastive", "untuned encoder (control)"
ARMS = (BASE, TUNED, CONTROL)
BEFORE = "before GRPO"


def slipped(query: str, columns: Sequence[str], rng: random.Random) -> str:
    """Return a query that is wrong in one word: its sign, its place or a column."""
    if "'" in query and rng.random() < 0.5:
        (place,) = re.findall(r"'(\w+)'", query)
        return query.replace(place, rng.choice([p for p in text_to_sql.PLACES if p != place]))
    if re.search(r" [<>] ", query) and rng.random() < 0.5:
        return query.translate(str.maketrans("<>", "><"))
    column = next((c for c in columns if re.search(rf"\b{c}\b", query)), None)
    if column is None:  # a count, which names no column of numbers
        return query.replace("count(*)", f"sum({rng.choice(columns)})")
    return re.sub(rf"\b{column}\b", rng.choice([c for c in columns if c != column]), query)


@cache
def begun(work: Path) -> tuple[list[Problem], LM]:
    """Return the training problems, and the model that every arm begins with."""
    problems, rng = text_to_sql.load("train", POOL), random.Random("slips")
    texts = []
    for p in problems:
        columns = [c for c in text_to_sql.NUMBERS if re.search(rf"\b{c}\b", p.messages[0]["content"].partition(";")[0])]
        wrong = rng.random() < SLIPS[p.meta["language"]]
        texts.append(f"<think></think>{slipped(p.answer, columns, rng) if wrong else p.answer}")
    prompts = [p.messages[0]["content"] for p in problems]
    start = publish.small_model([*prompts, *texts], PIECES, SHAPE, "small writer of SQL", context=256)
    examples = [finetune.example(start, p, text) for p, text in zip(problems, texts, strict=True)]
    settings = finetune.Settings(steps=FIRST, rate=3e-3)
    return problems, finetune.train(start, examples, settings, work / "first", name="small writer of SQL")


def reward(arm: str, problems: Sequence[Problem], seed: int) -> Any:
    """Return the reward of an arm; correctness alone is the recipe's own."""
    if arm == BASE:
        return None
    pairs = [(p.messages[0]["content"], p.answer) for p in problems]
    trained = {} if arm == TUNED else {"steps": 0}
    return ContrastiveSQL(similarity=contrastive.train(pairs, seed, **trained))


def policy(work: Path, arm: str, seed: int) -> LM:
    """Return the policy of an arm and seed, trained if it is not kept."""
    problems, first = begun(work)
    out = work / f"{store.safe_name(arm)}-{seed}"
    if store.is_whole(out / MODEL):
        return read_back(first, out / MODEL)
    recipe = replace(
        recipes.find("correctness" if arm == BASE else "contrastive_sql").scaled(),
        problems=PROBLEMS, samples=GROUP, max_tokens=LONGEST, learning_rate=RATE,
    )  # fmt: skip
    extras = Extras(reward=reward(arm, problems, seed))
    return train(first, recipe, problems, Run(out, STEPS, seed, save_every=STEPS), extras=extras, resume=True).lm


def measured(work: Path, arm: str, seed: int) -> list[float]:
    """Return the share of right queries to each test question."""
    path = work / f"{store.safe_name(arm)}-{seed}.json"
    if not path.is_file():
        lm = begun(work)[1] if arm == BEFORE else policy(work, arm, seed)
        sampled = rollouts(lm, tests(), Sampling(n=SAMPLES, max_new_tokens=LONGEST, seed=seed), progress=False)
        store.write_json(np.array([r.correct for r in sampled], float).reshape(-1, SAMPLES).mean(1).tolist(), path)
    return store.read_json(path, list[float])


@cache
def tests() -> list[Problem]:
    return text_to_sql.load("test", TESTED)


def results(parts: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return accuracies and differences from correctness alone, in all and per language, with intervals.

    Args:
        parts: Arm -> shares of right queries, ``[seeds, questions]``.
    """
    spoken = np.array([p.meta["language"] for p in tests()])
    groups = {"all": spoken != "", **{name: spoken == name for name in text_to_sql.LANGUAGES}}

    return {
        "accuracy": {arm: {name: publish.estimate(x[:, chosen]) for name, chosen in groups.items()} for arm, x in parts.items()},
        "differences": {
            arm: {name: publish.estimate(x[:, chosen], parts[BASE][:, chosen]) for name, chosen in groups.items()}
            for arm, x in parts.items()
            if arm != BASE
        },
    }


def page(found: dict[str, Any]) -> str:
    """Return the tables of the README."""

    def table(key: str, sign: str) -> pd.DataFrame:
        rows = {
            arm: {name: with_interval(e["mean"], e["low"], e["high"], "share", sign=sign) for name, e in row.items()}
            for arm, row in found[key].items()
        }
        return pd.DataFrame(rows).T

    first = report.markdown(table("accuracy", "").rename_axis("right queries, %"))
    return f"{first}\n\n{report.markdown(table('differences', '+').rename_axis('minus correctness alone, points'))}"


def main() -> None:
    torch.set_num_threads(1)
    work = publish.work_folder(__file__, CODE, scripts=("tiny-reasoner/train.py",))
    found = results({arm: np.array([measured(work, arm, seed) for seed in SEEDS]) for arm in (BEFORE, *ARMS)})
    settings = {"seeds": SEEDS, "pool": POOL, "tested": TESTED, "samples": SAMPLES, "longest": LONGEST, "slips": SLIPS, "first": FIRST,
                "steps": STEPS, "problems": PROBLEMS, "group": GROUP, "rate": RATE, "shape": SHAPE}  # fmt: skip
    store.write_json({"made_by": store.made_by(CODE), "settings": settings, **found}, HERE / "results.json")
    publish.splice("text-to-sql", page(found), HERE / "README.md")


if __name__ == "__main__":
    main()
