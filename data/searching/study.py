"""Train each reward of tool calls on the tiny searcher, beside correctness alone: ``python data/searching/study.py``.

Writes ``results.json`` and ``figure.png`` (accuracy against calls and against tokens) here, and the tables in ``README.md`` if it has their
marks. Policies and episodes are kept in ``runs/searching``, so after a stop the same command goes on.

Each arm trains the same model for the same steps with the same problems, once per seed. Differences are arm minus correctness alone, paired
by problem and seed, with 95 % intervals over problems and seeds. The control adds noise to correctness, as large as the judgements of
ReSeek, and drawn anew for every response. Abstention is measured as MASH does it: the tool is taken away, and a response that asks for it abstains.

``--rehearse`` runs every part at one step with the tiny reasoner on arithmetic, where no tool is called; it shows that the script runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from toolkit import figures, report, store, tasks
from toolkit import lm as lms
from toolkit.generate import Sampling, rollouts
from toolkit.grpo import recipes
from toolkit.grpo.extras import Extras
from toolkit.grpo.recipes import Recipe
from toolkit.grpo.run import MODEL, Run, train
from toolkit.grpo.saved import read_back
from toolkit.lm import LM, Condition
from toolkit.metrics import with_interval
from toolkit.rewards import ALL, Reward, RewardBatch, RewardValues, WeightedSum
from toolkit.rewards.mash import abstention
from toolkit.rewards.re_searcher import pass_consistency
from toolkit.rewards.toolrl import calls_of
from toolkit.tools import Toolbox
from toolkit.types import Problem

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import publish  # noqa: E402

STEPS, SEEDS, POOL, TESTS, SAMPLES, LONGEST, RATE = 60, (0, 1, 2), 512, 200, 4, 200, 3e-4
CODE = store.code_of(
    "toolkit.grpo.run", "toolkit.generate", "toolkit.tools", "toolkit.tasks.searching", "toolkit.grpo.recipes:plain", "toolkit.grpo.recipes:mash",
    "toolkit.grpo.recipes:ppr", "toolkit.rewards.combine", "toolkit.rewards.correctness", "toolkit.rewards.mash", "toolkit.rewards.reseek",
    "toolkit.rewards.re_searcher", "toolkit.rewards.ppr", "toolkit.rewards.toolrl", "toolkit.rewards.search_gen_v", "toolkit.rewards.r3",
)  # fmt: skip
BASE, CONTROL = "correctness", "correctness + noise (control)"


@dataclass(frozen=True)
class Noise:
    """A number from -0.3 to 0.3, drawn at random for every response, whatever it says. Equal seeds and steps give equal numbers."""

    seed: int

    name: ClassVar[str] = "noise"
    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, batch: RewardBatch) -> RewardValues:
        return RewardValues.sum(noise=np.random.default_rng([self.seed, batch.step]).uniform(-0.3, 0.3, len(batch)))


def beside(other: Reward) -> WeightedSum:
    """Return correctness plus another reward, which does not see the answer itself."""
    return WeightedSum(((1.0, ALL["correctness"].make()), (1.0, other)))


ARMS: dict[str, tuple[str, Callable[[int], Any]]] = {
    BASE: ("correctness", lambda seed: ALL["correctness"].make()),
    CONTROL: ("correctness", lambda seed: beside(Noise(seed))),
    "MASH": ("mash", lambda seed: ALL["mash"].make(cost="calls")),
    "ReSeek": ("reseek", lambda seed: ALL["reseek"].make()),
    "RE-Searcher": ("re_searcher", lambda seed: ALL["re_searcher"].make()),
    "PPR + ReNorm": ("ppr", lambda seed: ALL["ppr"].make()),
    "correctness + ToolRL": ("toolrl", lambda seed: beside(ALL["toolrl"].make())),
    "Search-Gen-V": ("search_gen_v", lambda seed: ALL["search_gen_v"].make()),
    "correctness + R3": ("r3", lambda seed: beside(ALL["r3"].make())),
}
"""Name -> recipe, and function from the seed to the reward. Only the control depends on the seed."""


@dataclass(frozen=True)
class Ground:
    """The model, tools and problems of a study.

    Attributes:
        lm: The initial model.
        tools: The toolbox.
        problems: Training problems.
        tests: Test problems.
        steps: Optimizer steps per policy.
        seeds: Seeds of the policies.
        work: Folder for policies and episodes.
    """

    lm: LM
    tools: Toolbox | None
    problems: list[Problem]
    tests: list[Problem]
    steps: int
    seeds: tuple[int, ...]
    work: Path


def labelled(problems: Sequence[Problem]) -> list[Problem]:
    """Return the problems with the label ``gold_calls``, made from ``gold_queries``."""
    return [replace(p, meta={**p.meta, "gold_calls": calls_of(p.meta["gold_queries"])}) for p in problems]


def searching() -> Ground:
    """Return the ground of the study: the tiny searcher and its task."""
    lm = lms.load("tiny-searcher", device="cpu")
    problems, tests = (labelled(tasks.load("searching", split, n)) for split, n in (("train", POOL), ("test", TESTS)))
    work = publish.work_folder(__file__, CODE, lm.fingerprint)
    return Ground(lm, tasks.searching.toolbox(), problems, tests, STEPS, SEEDS, work)  # type: ignore[attr-defined]


def rehearsal() -> Ground:
    """Return a small ground without tools, on which the script can be tried."""
    lm = lms.load(lms.TINY_REASONER, device="cpu")
    labels: dict[str, Any] = {"gold_queries": (), "gold_documents": ()}
    kinds = ("weights", "corpus")
    problems, tests = (
        labelled(
            [replace(p, meta={**p.meta, **labels, "where": kinds[i % 2]}) for i, p in enumerate(tasks.load("arithmetic", split, 8))]
        )
        for split in ("train", "test")
    )
    work = publish.work_folder(__file__, CODE, [lm.fingerprint, "rehearsal"])
    return Ground(lm, None, problems, tests, 1, (0, 1), work)


def sized(recipe: Recipe, ground: Ground) -> Recipe:
    """Return a recipe with the numbers of this study."""
    small = {} if ground.steps > 1 else {"problems": 4, "samples": 4}
    return replace(recipe.scaled(), max_tokens=LONGEST, learning_rate=RATE, **small)


def policy(ground: Ground, arm: str, seed: int) -> LM:
    """Return the policy of an arm and seed, trained if it is not kept."""
    name, reward = ARMS[arm]
    folder = ground.work / f"{store.safe_name(arm)}-{seed}"
    if store.is_whole(folder / MODEL):
        return read_back(ground.lm, folder / MODEL)
    extras = Extras(reward=reward(seed), tools=ground.tools)
    run = Run(folder, ground.steps, seed, save_every=20, micro_batch=16)
    return train(ground.lm, sized(recipes.find(name), ground), ground.problems, run, extras=extras, resume=True).lm


def measured(ground: Ground, arm: str, seed: int) -> dict[str, list[Any]]:
    """Return one number per test problem and metric, for a policy with its tools, and its scores of abstention without them."""
    path = ground.work / f"{store.safe_name(arm)}-{seed}.json"
    if path.is_file():
        return store.read_json(path, dict[str, list[Any]])
    lm = policy(ground, arm, seed) if arm != "before training" else ground.lm
    sampling = Sampling(n=SAMPLES, max_new_tokens=LONGEST, seed=seed)
    episodes = rollouts(Condition(lm, tools=ground.tools), ground.tests, sampling, progress=False)
    table = pd.DataFrame(
        {
            "problem": [r.problem_id for r in episodes],
            "accuracy": [float(r.correct) for r in episodes],
            "calls": [len(r.results) for r in episodes],
            "tokens": [r.written_tokens for r in episodes],
        }
    )
    means = table.groupby("problem", sort=False).mean().loc[[p.id for p in ground.tests]]
    without = rollouts(lm, ground.tests, sampling, progress=False)
    marks = [ground.tools.marks_of(tool).open for tool in ground.tools.tools] if ground.tools else []
    where = {p.id: p.meta["where"] for p in ground.tests}
    asked = np.array([any(mark in r.text for mark in marks) for r in without])
    known = np.array([where[r.problem_id] == "weights" for r in without])
    runs = table["accuracy"].to_numpy(bool).reshape(len(ground.tests), SAMPLES)
    found = {name: means[name].tolist() for name in METRICS}
    found |= {"where": [p.meta["where"] for p in ground.tests], "abstention": [abstention(asked, known)["mean"]]}
    found |= {"mixed": [pass_consistency(runs)["mixed"]]}
    store.write_json(found, path)
    return found


METRICS = {"accuracy": "share", "calls": "calls", "tokens": "tokens"}
ONCE = ("abstention", "mixed")


def results(parts: dict[str, list[dict[str, list[Any]]]]) -> dict[str, Any]:
    """Return means of every arm and differences from correctness alone, with intervals.

    Args:
        parts: Arm -> one result of ``measured`` per seed.
    """

    def rows(arm: str, metric: str, where: str | None = None) -> np.ndarray:
        return np.array([[v for v, w in zip(p[metric], p["where"], strict=True) if where in (None, w)] for p in parts[arm]], float)

    kinds = sorted({w for p in parts[BASE] for w in p["where"]})
    found: dict[str, Any] = {"arms": {}, "differences": {}}
    for arm in parts:
        whole = {metric: publish.estimate(rows(arm, metric), unit=unit) for metric, unit in METRICS.items()}
        by_kind = {
            f"{metric}, {kind}": publish.estimate(rows(arm, metric, kind), unit=unit)
            for metric, unit in METRICS.items()
            for kind in kinds
        }
        once = {name: [p[name][0] for p in parts[arm]] for name in ONCE}
        found["arms"][arm] = {**whole, **by_kind, **once}
        if arm != BASE:
            found["differences"][arm] = {m: publish.estimate(rows(arm, m), rows(BASE, m), unit=unit) for m, unit in METRICS.items()}
    return found


def page(found: dict[str, Any]) -> str:
    """Return the table of the README."""
    lines = {
        arm: {m: with_interval(*(row[m][k] for k in ("mean", "low", "high")), unit, sign="+") for m, unit in METRICS.items()}
        for arm, row in found["differences"].items()
    }
    return report.markdown(pd.DataFrame.from_dict(lines, orient="index").rename_axis("arm minus correctness"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="run every part at one step, and write nothing here")
    rehearse = parser.parse_args().rehearse
    ground = rehearsal() if rehearse else searching()
    arms = ("before training", *ARMS)
    found = results({arm: [measured(ground, arm, seed) for seed in ground.seeds] for arm in arms})
    table = page(found)
    print(table)
    drawn = figures.price_of_accuracy(found["arms"], base=BASE, controls=("before training", CONTROL))
    if rehearse:
        return
    settings = {"steps": STEPS, "seeds": SEEDS, "pool": POOL, "tests": TESTS, "samples": SAMPLES, "longest": LONGEST, "rate": RATE}
    store.write_json({"made_by": store.made_by(CODE), "settings": settings, **found}, HERE / "results.json")
    publish.draw(drawn, HERE / "figure.png", 900, 420)
    if (HERE / "README.md").is_file():
        publish.splice("searching", table, HERE / "README.md")


if __name__ == "__main__":
    main()
