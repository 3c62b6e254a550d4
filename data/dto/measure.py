"""Train the tiny reasoner on DTO's preference pairs, beside pairs with swapped labels: ``python data/dto/measure.py``.

Writes ``results.json``, and the table in ``README.md`` here. Responses, pairs and models are kept in ``runs/dto``, so after a stop the same
command goes on. About 6 minutes on one core.

Pairs are made once, from the initial model's responses to training problems. Each arm trains it with SimPO for the same steps, once per seed:

- *DTO*: the optimised response is chosen, the sampled one rejected;
- *swapped labels* (control): the same pairs, with chosen and rejected swapped in half of them, chosen at random.

Differences are paired by problem, with 95 % intervals over problems and seeds. Before training, the initial model answers with the same
seeds.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from toolkit import jobs, preferences, report, store, tasks
from toolkit import lm as lms
from toolkit.generate import Sampling, rollouts
from toolkit.lm import LM
from toolkit.methods.thinking_optimization import DTOSettings
from toolkit.metrics import with_interval
from toolkit.types import Problem

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import publish  # noqa: E402

CODE = store.code_of("toolkit.jobs.dto", "toolkit.preferences", "toolkit.generate", "toolkit.tasks.arithmetic")
PROBLEMS, SAMPLES, TESTS, TEST_SAMPLES, LONGEST, SEEDS = 120, 4, 100, 4, 200, (0, 1, 2)
STEPS, BATCH, RATE = 40, 16, 1e-4
DTO = DTOSettings(probes=4, completions=4, answering=Sampling(max_new_tokens=16))
BEFORE, TRAINED, CONTROL = "before training", "DTO", "DTO, swapped labels (control)"
METRICS = {"accuracy": "share", "think tokens": "tokens", "response tokens": "tokens"}


def answers(lm: LM, problems: list[Problem], seed: int, out: Path) -> dict[str, list[float]]:
    """Return one mean per test problem and metric."""
    sampled = rollouts(lm, problems, Sampling(n=TEST_SAMPLES, max_new_tokens=LONGEST, seed=seed), out=out)
    columns = {"accuracy": "correct", "think tokens": "think_tokens", "response tokens": "response_tokens"}
    return {m: [float(np.mean([getattr(r, c) for r in sampled[i : i + TEST_SAMPLES]])) for i in range(0, len(sampled), TEST_SAMPLES)] for m, c in columns.items()}  # fmt: skip


def results(parts: dict[str, list[dict[str, list[float]]]]) -> dict[str, Any]:
    """Return means of the arms, and differences between them, with intervals.

    Args:
        parts: Arm -> one result of ``answers`` per seed.
    """

    def values(arm: str, metric: str) -> np.ndarray:
        return np.array([part[metric] for part in parts[arm]])

    compared = ((TRAINED, BEFORE), (CONTROL, BEFORE), (TRAINED, CONTROL))
    return {
        "arms": {arm: {m: publish.estimate(values(arm, m), unit=unit) for m, unit in METRICS.items()} for arm in parts},
        "differences": {
            f"{a} minus {b}": {m: publish.estimate(values(a, m), values(b, m), unit=unit) for m, unit in METRICS.items()}
            for a, b in compared
        },
    }


def page(found: dict[str, Any]) -> str:
    """Return the tables of the README."""

    def table(rows: dict[str, Any], sign: str) -> pd.DataFrame:
        return pd.DataFrame(
            {name: {m: with_interval(row[m]["mean"], row[m]["low"], row[m]["high"], unit, sign=sign) for m, unit in METRICS.items()} for name, row in rows.items()}
        ).T  # fmt: skip

    arms = report.markdown(table(found["arms"], "").rename_axis("arm"))
    return f"{arms}\n\n{report.markdown(table(found['differences'], '+').rename_axis('difference'))}"


def main() -> None:
    torch.set_num_threads(1)
    lm = lms.load("tiny-reasoner", device="cpu")
    work = publish.work_folder(__file__, CODE, lm.fingerprint)
    problems, tests = tasks.load("arithmetic", "train", PROBLEMS), tasks.load("arithmetic", "test", TESTS)
    sampling = Sampling(n=SAMPLES, max_new_tokens=LONGEST)
    pairs, table = jobs.make_pairs(lm, problems, sampling, DTO, work / "pairs", segments="lines")
    parts: dict[str, list[dict[str, list[float]]]] = {BEFORE: [], TRAINED: [], CONTROL: []}
    for seed in SEEDS:
        for arm in parts:
            policy = lm
            if arm != BEFORE:
                chosen = pairs if arm == TRAINED else preferences.flipped(pairs, seed=seed)
                settings = preferences.Settings(steps=STEPS, batch=BATCH, rate=RATE, seed=seed)
                policy = preferences.train(lm, chosen, settings, work / f"{store.safe_name(arm)}-{seed}", name=f"{arm} {seed}")
            parts[arm].append(answers(policy, tests, seed, work / f"{store.safe_name(arm)}-{seed}-rollouts"))
    with_path = table[table["path_tokens"].notna()]
    made = {
        "responses": len(table),
        "pairs": len(pairs),
        "from wrong responses": int((~with_path["correct"].astype(bool)).sum()),
        "tokens": float(with_path["tokens"].mean()),
        "path tokens": float(with_path["path_tokens"].mean()),
    }
    settings = {"problems": PROBLEMS, "samples": SAMPLES, "tests": TESTS, "test samples": TEST_SAMPLES, "longest": LONGEST, "seeds": SEEDS,
                "steps": STEPS, "batch": BATCH, "rate": RATE, "probes": DTO.probes, "completions": DTO.completions}  # fmt: skip
    about = {"made_by": store.made_by(CODE), "fingerprint": lm.fingerprint, "settings": settings, "pairs": made}
    found = results(parts)
    store.write_json(about | found, HERE / "results.json")
    publish.splice("dto", page(found), HERE / "README.md")


if __name__ == "__main__":
    main()
