"""Measure CharBench's questions (arXiv 2508.02591) on the smol reasoner, with and without interventions: ``python data/charbench/measure.py``.

Writes ``results.json`` here. Every set of responses is kept in ``runs/charbench``, so after a stop the same command resumes.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from toolkit import edits, generate, jobs, report, stats, store
from toolkit import lm as lms
from toolkit.generate import Sampling
from toolkit.jobs import Arm, masking
from toolkit.jobs.edit import edited
from toolkit.jobs.finding import DEMO, FORMS, OURS
from toolkit.lm import LM, Condition
from toolkit.tasks import characters
from toolkit.tasks.grading import grade
from toolkit.types import Direction, HeadEdit, HeadScores, Plan, Problem

HERE = Path(__file__).parent
RESULTS = HERE.parent / "smol-reasoner" / "results"
sys.path.insert(0, str(HERE.parent))
import publish  # noqa: E402

CODE = store.code_of("toolkit.jobs.axes", "toolkit.tasks.characters", "toolkit.generate")
PROBLEMS, DRAWS, SHUFFLES, SEED = 48, 3, 1000, 0
FRACTION, STRENGTH, MASKED = (
    0.04,
    2.0,
    4,
)  # share of edited heads, steering strength and masked heads, as on the smol reasoner's board
SAMPLING = Sampling(temperature=0.0, max_new_tokens=60, batch_size=24)


def arms_of(lm: LM) -> dict[str, Arm]:
    """Return the interventions of the smol reasoner's board, from its committed scores and direction, each with random controls."""
    form = FORMS[OURS]
    scores = store.load(RESULTS / f"{form.short}-scores.safetensors", HeadScores)
    v = store.load(RESULTS / f"{form.short}-direction.safetensors", Direction)
    top = [row for row in store.read_json(RESULTS / "retrieval.json")["heads"] if row["ranking"] == "write (ours)"][:MASKED]
    retrieval = Plan(
        tuple(HeadEdit(row["layer"], row["head"], "scale", 1.0) for row in top), None, "retrieval heads", lm.provenance(SEED)
    )
    # The direction that is kept is the part that the edited heads write. Other heads write next to nothing along it, so the same edit of them
    # is a weak control: what they write themselves would need the moments, which are not among the committed files.
    edit = edits.plan(scores, v, fraction=FRACTION, strength=DEMO.strength)
    return {
        OURS: Arm(edited(lm, edit), tuple(edited(lm, other) for other in masking.controls(edit, lm, DRAWS, SEED))),
        "steered shorter": jobs.steering_arm(lm, v, -STRENGTH, draws=DRAWS, seed=SEED),
        "retrieval heads masked": jobs.masking_arm(lm, retrieval, draws=DRAWS, seed=SEED),
    }


def answers(condition: Condition, problems: Sequence[Problem], folder: Path) -> pd.DataFrame:
    """Return one row per problem: ``kind, gold, answer`` (the last number of the answer, or NaN), ``correct``."""
    where = folder / store.key([condition.lm.fingerprint, [str(i) for i in condition.during]])
    responses = generate.rollouts(condition, problems, SAMPLING, out=where)
    return pd.DataFrame(
        {"kind": p.meta["kind"], "gold": p.answer, "correct": float(r.correct), "text": condition.lm.text(r.token_ids[r.answer.start :]) if r.answer else ""}
        for p, r in zip(problems, responses, strict=True)
    )  # fmt: skip


def guessing(problems: Sequence[Problem], texts: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return accuracy, by kind of question, if answers are exchanged at random among the questions of a kind: mean and 95 % range."""
    rng, found = np.random.default_rng(SEED), {}
    for kind in characters.KINDS:
        of_kind = [i for i, p in enumerate(problems) if p.meta["kind"] == kind]
        right = np.array([[grade(problems[i], texts[j]) for j in of_kind] for i in of_kind], float)
        drawn = [right[np.arange(len(of_kind)), rng.permutation(len(of_kind))].mean() for _ in range(SHUFFLES)]
        low, high = np.quantile(drawn, [0.025, 0.975])
        found[kind] = {"shuffled": float(np.mean(drawn)), "shuffled_low": float(low), "shuffled_high": float(high)}
    return found


def main() -> None:
    """Measure the conditions that are not kept yet, and write the results."""
    torch.set_num_threads(1)
    lm = lms.load("smol-reasoner", device="cpu", dtype=torch.bfloat16)
    folder = publish.work_folder(__file__, CODE, lm.fingerprint)
    problems = characters.load("test", PROBLEMS, SEED, tokenizer=lm.tokenizer)
    kinds: Mapping[str, list[Problem]] = {"all": problems}
    cells = jobs.measure_axis(
        Condition(lm), arms_of(lm), kinds, lambda condition, items: answers(condition, items, folder)["correct"].to_numpy()
    )
    base = answers(Condition(lm), problems, folder)
    by_kind = [
        {"kind": kind, "n": len(rows), "distinct": int(rows["text"].nunique()), **dict(zip(("accuracy", "low", "high"), (e.mean, e.low, e.high), strict=True))}
        for kind, rows in base.groupby("kind", sort=False)
        for e in [stats.mean_effect(rows["correct"].to_numpy()[None]).within((0.0, 1.0))]
    ]  # fmt: skip
    shuffled = guessing(problems, list(base["text"]))
    found = {
        "problems": PROBLEMS,
        "kinds": [row | shuffled[row["kind"]] for row in by_kind],
        "arms": report.json_records(jobs.level_table(cells)),
        "correlations": report.json_records(characters.feature_correlations(problems, base["correct"].astype(bool).tolist())),
        "made_by": store.made_by(CODE),
        "provenance": lm.provenance(SEED),
    }
    store.write_json(found, HERE / "results.json")


if __name__ == "__main__":
    main()
