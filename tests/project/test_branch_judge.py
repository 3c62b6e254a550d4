"""The judges of ``data/branch-judge`` begin without knowing which criterion counts, and are rewarded as BR-RM's are."""

from __future__ import annotations

import random

import pytest
from test_readme import ROOT, script

from toolkit.rewards import RewardBatch

judge = script(ROOT / "data/branch-judge/measure.py")
RIGHT = "<think>Criteria: safety\nsafety 1-3</think>\\boxed{2}<|end|>"


def test_demonstrations_judge_under_any_criterion_and_break_one_format_in_ten():
    rng = random.Random(0)
    rows = [(p, judge.judgement(judge.demonstration(p, 2, rng), 2)) for p in judge.pool("train", 1000)]
    kept = [(p, j) for p, j in rows if j.verdict is not None]
    assert all(j.verdict == judge.better(p.meta["scores"], j.criteria[0]) for p, j in kept)
    assert len(kept) / len(rows) == pytest.approx(0.9, abs=0.03)
    assert sum(j.criteria == (judge.COUNTS[p.meta["kind"]],) for p, j in kept) / len(kept) == pytest.approx(1 / 4, abs=0.05)
    assert sum(j.verdict == int(p.answer) for p, j in kept) / len(kept) == pytest.approx(5 / 8, abs=0.05)


@pytest.mark.parametrize(
    ("text", "turns", "expected"),
    [
        (RIGHT, 2, (0, 0)),
        (RIGHT.replace("{2}", "{1}"), 2, (-10, 0)),
        (RIGHT.replace("Criteria: safety\n", ""), 2, (-100, -100)),
        (RIGHT.replace("Criteria: safety", "Criteria: beauty"), 2, (-100, -100)),
        (RIGHT.replace("</think>", ""), 2, (-100, -100)),
        (RIGHT.replace("\\boxed{2}", ""), 2, (-100, -100)),
        (RIGHT.replace("\\boxed{2}", "\\boxed{2} \\boxed{2}"), 2, (-100, -100)),
        ("<think></think>\\boxed{2}<|end|>", 1, (0, 0)),
        ("<think></think>\\boxed{1}<|end|>", 1, (-10, 0)),
        ("<think>\\boxed{2}<|end|>", 1, (-100, -100)),
    ],
)
def test_a_judgement_earns_the_papers_reward_and_the_control_sees_its_format_alone(text, turns, expected):
    batch = RewardBatch.from_columns(text=[text], gold_answer=["2"])
    rewards = (judge.Judging(turns, verdicts)(batch).values.item() for verdicts in (True, False))
    assert tuple(rewards) == expected
