r"""Train a judge in two turns, as BR-RM does, against one that judges in one turn: ``python data/branch-judge/measure.py``.

Writes ``results.json``, ``figure.png`` and the tables of ``README.md`` here. Models and measurements are kept in ``runs/branch-judge``, so
after a stop the same command goes on; about 10 minutes of CPU time.

The task: a prompt names the kind of a question, and how good two responses are under each of four criteria::

    medicine : accuracy 4-3 , safety 1-3 , completeness 2-4 , clarity 4-2

The kind decides which criterion counts, here safety, so the second response is better; a judge is not told this. A judge in two turns branches
first: it names a criterion, and copies its values. Then it rethinks, and gives its verdict. A judge in one turn gives its verdict at once::

    <think>Criteria: safety
    safety 1-3</think>\boxed{2}                                      <think></think>\boxed{2}

A small model from scratch first learns to copy values, then one of the two forms. Its examples judge under a criterion drawn at random, so
their verdicts are right in five of eight pairs; one in ten breaks the format. GRPO then has to find out which criterion counts, from the
reward of the verdict alone: 0, -10 or -100, with the gate on the format of both turns, and leave-one-out advantages. Arms: two turns; one turn;
and two controls in two turns, a reward for the format alone and rewards dealt out at random among the responses of a group.

Deviations from BR-RM: both turns are one response, with the closing tag between them in place of a second request. There is no KL term.
Kinds, criteria and values are made up; responses are not read.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch

from toolkit import finetune, report, store
from toolkit.figures.base import styled
from toolkit.generate import Sampling, rollouts
from toolkit.grpo import recipes
from toolkit.grpo.extras import Extras
from toolkit.grpo.log import LOG
from toolkit.grpo.run import MODEL, Run, train
from toolkit.grpo.saved import read_back
from toolkit.lm import LM
from toolkit.methods import branch_rethink as br
from toolkit.metrics import with_interval
from toolkit.rewards import Reward, RewardBatch, RewardValues
from toolkit.rewards.answers import CLOSE, OPEN, answer_text
from toolkit.tasks import splits
from toolkit.types import Problem

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import publish  # noqa: E402

LESSON, FIRST, BATCH, RATE, POOL = 300, 400, 64, 3e-3, 12000  # the judges before GRPO: steps of copying, then of judging
REINFORCED, GRPO_RATE, SEEDS, TESTS, SAMPLES = 60, 3e-4, (0, 1, 2), 150, 2
SHAPE = {"layers": 2, "d_model": 64, "d_mlp": 128, "heads": 4, "head_dim": 16}
LONGEST, CONTEXT, BROKEN = 14, 48, 0.1  # tokens of a response and of a sequence; share of broken judgements before GRPO
COUNTS = {
    "fact": "accuracy", "date": "accuracy", "medicine": "safety", "advice": "safety", "list": "completeness", "plan": "completeness",
    "lesson": "clarity", "letter": "clarity",
}  # kind of question -> the criterion that counts  # fmt: skip
CRITERIA = tuple(dict.fromkeys(COUNTS.values()))
VALUES = range(1, 5)
PIECES = r"\\boxed\{\d\}|Criteria:|\d-\d|\w+|[^\w\s]|\n"
BEFORE_TWO, TWO, FORMAT, SHUFFLED = "two turns, before GRPO", "two turns", "format alone (control)", "shuffled rewards (control)"
BEFORE_ONE, ONE = "one turn, before GRPO", "one turn"
STARTS = {TWO: BEFORE_TWO, ONE: BEFORE_ONE, FORMAT: BEFORE_TWO, SHUFFLED: BEFORE_TWO}
ARMS = (BEFORE_TWO, BEFORE_ONE, *STARTS)
COLOURS = {TWO: "#1f77b4", FORMAT: "#2ca02c", SHUFFLED: "#ff7f0e", ONE: "#d62728"}
UNITS = {"right": "share", "format": "share", "criterion": "share", "fits": "share", "tokens": "tokens"}
HEADS = {
    "right": "right", "format": "format kept", "criterion": "names the criterion that counts", "fits": "verdict fits its criterion",
    "tokens": "tokens",
}  # fmt: skip
CODE = store.code_of(
    "toolkit.finetune", "toolkit.methods.branch_rethink", "toolkit.grpo.run", "toolkit.grpo.recipes:plain", "toolkit.rewards.correctness",
    "toolkit.rewards.answers", "toolkit.generate", "toolkit.tasks.splits",
)  # fmt: skip


# --- the task ------------------------------------------------------------------------------------------------


def better(scores: Mapping[str, tuple[int, int]], criterion: str) -> int:
    """Return the number of the response that is better under a criterion, 1 or 2."""
    first, second = scores[criterion]
    return 1 if first > second else 2


@cache
def pool(split: str, n: int, seed: int = 0) -> list[Problem]:
    """Return n different prompts of a split. Under each criterion the two responses have different values."""
    rng = random.Random(f"branch-judge-{split}-{seed}")

    def draw() -> Problem:
        while True:
            kind = rng.choice([*COUNTS])
            scores = {c: tuple(rng.sample(VALUES, 2)) for c in CRITERIA}
            content = f"{kind} : " + " , ".join(f"{c} {a}-{b}" for c, (a, b) in scores.items())
            if splits.split_of(content) == split:
                meta = {"task": "branch-judge", "split": split, "kind": kind, "scores": scores}
                return Problem(f"branch-judge-{splits.digest(content)}", ({"role": "user", "content": content},), f"{better(scores, COUNTS[kind])}", meta)  # fmt: skip

    return splits.distinct(draw, n)


def copied(p: Problem, rng: random.Random) -> str:
    """Return the values under every criterion, in random order: a dense lesson in copying, without a verdict."""
    scores = p.meta["scores"]
    return OPEN + " ".join(f"{c} {scores[c][0]}-{scores[c][1]}" for c in rng.sample(CRITERIA, len(CRITERIA)))


def demonstration(p: Problem, turns: int, rng: random.Random) -> str:
    """Return a judgement under a criterion drawn at random, in one or two turns. One in ten breaks the format."""
    scores, criterion = p.meta["scores"], rng.choice(CRITERIA)
    first, second = scores[criterion]
    box = f"\\boxed{{{better(scores, criterion)}}}"
    named = f"Criteria: {criterion}\n" if turns == 2 else ""
    issues = f"{criterion} {first}-{second}" if turns == 2 else ""
    if rng.random() < BROKEN:
        named, box = rng.choice([("", box), (named, ""), (named, f"{box} {box}")]) if turns == 2 else ("", rng.choice(["", f"{box} {box}"]))  # fmt: skip
    return f"{OPEN}{named}{issues}{CLOSE}{box}"


def judgement(text: str, turns: int) -> br.Judgement:
    """Return the judgement that a response holds. In one turn, only the verdict has a format."""
    branch, closed, _ = text.partition(CLOSE)
    branch, rethink = branch.replace(OPEN, "").strip(), answer_text(text)
    criteria = br.chosen_criteria(branch, CRITERIA) if turns == 2 else ()
    return br.Judgement(branch, rethink, criteria, br.verdict(rethink) if closed and criteria is not None else None)


@dataclass(frozen=True)
class Judging:
    """BR-RM's reward of judgements: 0 if right, -10 if wrong, -100 if the format of a turn is broken.

    Attributes:
        turns: Turns of a judgement, 1 or 2.
        verdicts: False to reward the format alone: 0 if it is kept, -100 if not.
    """

    turns: int
    verdicts: bool = True

    name: ClassVar[str] = "branch_rethink"
    needs: ClassVar[frozenset[str]] = frozenset({"text", "gold_answer"})

    def __call__(self, batch: RewardBatch) -> RewardValues:
        rows = [(judgement(text, self.turns), int(gold)) for text, gold in zip(batch["text"], batch["gold_answer"], strict=True)]
        # With the verdict itself as the right one, only the format is left.
        return RewardValues.sum(judgement=np.array([br.reward(j, gold if self.verdicts else j.verdict or 1) for j, gold in rows]))


# --- training and measuring ----------------------------------------------------------------------------------


def turns_of(arm: str) -> int:
    """Return the number of turns in which an arm judges."""
    return 2 if STARTS.get(arm, arm) == BEFORE_TWO else 1


@cache
def begun(turns: int, work: Path) -> LM:
    """Return the judge before GRPO, trained if it is not kept. Both judges learn from the same reader, and from the same prompts."""
    rng, lm = random.Random(f"branch-judge-{turns}"), reader(work)
    examples = [finetune.example(lm, p, demonstration(p, turns, rng)) for p in pool("train", POOL, 100)]
    settings = finetune.Settings(steps=FIRST, batch=BATCH, rate=RATE)
    return finetune.train(lm, examples, settings, work / f"first-{turns}", name=f"judge in {turns}")


@cache
def reader(work: Path) -> LM:
    """Return a model that has learnt to copy the values of all criteria, in random order, trained if it is not kept."""
    rng, prompts = random.Random("branch-judge"), pool("train", POOL, 100)
    texts = [p.messages[0]["content"] for p in prompts] + [demonstration(p, 2, rng) for p in prompts]
    start = publish.small_model(texts, PIECES, SHAPE, "reader", context=CONTEXT)
    settings = finetune.Settings(steps=LESSON, batch=BATCH, rate=RATE)
    examples = [finetune.example(start, p, copied(p, rng)) for p in prompts]
    return finetune.train(start, examples, settings, work / "reader", name="reader")


def reward_of(arm: str, seed: int) -> Reward:
    """Return the reward that an arm is trained with."""
    plain = Judging(turns_of(arm), verdicts=arm != FORMAT)
    return publish.Shuffled(plain, seed) if arm == SHUFFLED else plain


def folder_of(arm: str, seed: int, work: Path) -> Path:
    """Return the directory of the GRPO run of an arm and seed."""
    return work / f"{store.safe_name(arm)}-{seed}"


def policy(arm: str, seed: int, work: Path) -> LM:
    """Return the judge of an arm and seed, trained if it is not kept."""
    lm, folder = begun(turns_of(arm), work), folder_of(arm, seed, work)
    if arm not in STARTS:
        return lm
    if store.is_whole(folder / MODEL):
        return read_back(lm, folder / MODEL)
    recipe = replace(
        recipes.find("correctness"), name="br_rm", paper="2510.23596", advantage="leave_one_out", problems=8, samples=8,
        max_tokens=LONGEST, learning_rate=GRPO_RATE,
    )  # fmt: skip
    run = Run(folder, REINFORCED, seed, evaluate_every=0, micro_batch=64)
    return train(lm, recipe, pool("train", 2000, seed), run, extras=Extras(reward=reward_of(arm, seed)), resume=True).lm


def measured(arm: str, seed: int, work: Path) -> dict[str, list[float]]:
    """Return one number per test prompt and metric, and the share of right verdicts at each step of training.

    While training, the toolkit's general grader decides, whatever the format of the judgement.
    """
    path = work / f"{store.safe_name(arm)}-{seed}.json"
    if path.is_file():
        return store.read_json(path, dict[str, list[float]])
    lm, tests, turns = policy(arm, seed, work), pool("test", TESTS), turns_of(arm)
    sampled = rollouts(lm, tests, Sampling(n=SAMPLES, max_new_tokens=LONGEST, seed=seed), progress=False)
    by_id, rows = {p.id: p for p in tests}, []
    for r in sampled:
        p, found = by_id[r.problem_id], judgement(r.text, turns)
        row = {
            "problem": p.id,
            "right": found.verdict == int(p.answer),
            "format": found.verdict is not None,
            "tokens": r.response_tokens,
        }
        if turns == 2:  # a broken format names nothing, and fits nothing
            named = (found.criteria or ("",))[0]
            row["criterion"] = found.criteria == (COUNTS[p.meta["kind"]],)
            row["fits"] = named in CRITERIA and found.verdict == better(p.meta["scores"], named)
        rows.append(row)
    means = pd.DataFrame(rows).astype({"right": float, "format": float}).groupby("problem", sort=False).mean()
    values = {name: means[name].astype(float).tolist() for name in means}
    if arm in STARTS:
        log = pd.read_json(folder_of(arm, seed, work) / LOG, lines=True)
        values["curve"] = log["accuracy"].iloc[1:].astype(float).tolist()  # row 0 is the model before training
    store.write_json(values, path)
    return values


# --- results -------------------------------------------------------------------------------------------------


def results(parts: Mapping[str, list[dict[str, list[float]]]]) -> dict[str, Any]:
    """Return every metric of each arm, the differences between arms, and the curves of training."""
    found: dict[str, Any] = {"arms": {}, "differences": {}, "curves": {}}
    for arm, ps in parts.items():
        found["arms"][arm] = {m: publish.estimate([p[m] for p in ps], unit=UNITS[m]) for m in UNITS if m in ps[0]}
        if arm in STARTS:
            found["curves"][arm] = np.mean([p["curve"] for p in ps], axis=0).round(4).tolist()
    pairs = [(TWO, BEFORE_TWO), (TWO, FORMAT), (TWO, SHUFFLED), (ONE, BEFORE_ONE), (TWO, ONE), (FORMAT, BEFORE_TWO)]
    for a, b in pairs:
        shared = [m for m in UNITS if m in parts[a][0] and m in parts[b][0]]
        found["differences"][f"{a} minus {b}"] = {
            m: publish.estimate([p[m] for p in parts[a]], [p[m] for p in parts[b]], unit=UNITS[m]) for m in shared
        }
    return found


def tables(found: Mapping[str, Any]) -> str:
    """Return the results as Markdown tables."""

    def frame(rows: Mapping[str, Any], label: str, sign: str = "") -> pd.DataFrame:
        def cell(e: Mapping[str, float], unit: str) -> str:
            return with_interval(e["mean"], e["low"], e["high"], unit, sign=sign)

        cells = {name: {HEADS[m]: cell(e, UNITS[m]) for m, e in row.items()} for name, row in rows.items()}
        return pd.DataFrame(cells).T[[HEADS[m] for m in UNITS]].fillna("").rename_axis(label)

    frames = (frame(found["arms"], "arm"), frame(found["differences"], "difference, points", "+"))
    return "\n\n".join(map(report.markdown, frames))


def figure(found: Mapping[str, Any]) -> go.Figure:
    """Return the share of right verdicts by the general grader while training, mean over seeds and five steps."""
    drawn = go.Figure()
    for arm, curve in found["curves"].items():
        smooth = 100 * pd.Series(curve).rolling(5, min_periods=1).mean()
        drawn.add_scatter(x=np.arange(1, len(curve) + 1), y=smooth, name=arm, mode="lines", line={"color": COLOURS[arm]})
    drawn.update_xaxes(title="steps of GRPO").update_yaxes(title="right verdicts, %", range=[40, 102])
    return styled(drawn, "Right verdicts by the general grader, whatever the format, while training")


def main() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    work = publish.work_folder(__file__, CODE, scripts=("tiny-reasoner/train.py",))
    found = results({arm: [measured(arm, seed, work) for seed in SEEDS] for arm in ARMS})
    sizes = {
        "lesson": LESSON, "first": FIRST, "batch": BATCH, "rate": RATE, "pool": POOL, "reinforced": REINFORCED, "grpo rate": GRPO_RATE, "seeds": SEEDS,
        "tests": TESTS, "samples": SAMPLES, "model": SHAPE, "broken": BROKEN,
    }  # fmt: skip
    store.write_json({"made_by": store.made_by(CODE), "sizes": sizes, **found}, HERE / "results.json")
    publish.draw(figure(found), HERE / "figure.png", 800, 420)
    publish.splice("branch-judge", tables(found), HERE / "README.md")


if __name__ == "__main__":
    main()
