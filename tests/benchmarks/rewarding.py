"""Rewards: rows per second on 10,000 saved rollouts, beside TRL's own cosine and soft overlong punishment."""

from __future__ import annotations

import random

import numpy as np
from clock import QUICK, Row, median, ratio, start, turns, write
from models import by_parity
from trl.rewards import get_cosine_scaled_reward, get_soft_overlong_punishment

from toolkit import rewards
from toolkit.rewards import RewardBatch
from toolkit.rewards.cosine import Cosine
from toolkit.rewards.overlong import Overlong
from toolkit.types import Rollout, Span

N = 10_000
CLOSED_FORM = (
    "correctness", "length_penalty", "truncation", "think_prune", "cosine", "overlong", "arora_zanette", "kimi", "grpo_lambda", "dler",
    "da_dler", "laser", "slpo", "pear", "sar", "l1_exact", "l1_max",
)  # fmt: skip


def saved() -> list[Rollout]:
    """1,250 problems x 8 responses of up to 300 tokens, with entropies."""
    draw, found = random.Random(0), []
    for i in range(N):
        n = 20 + int(draw.expovariate(1 / 60)) % 280
        numbers = tuple(draw.random() for _ in range(n))
        stop = 10 + n
        found.append(
            Rollout(f"p{i // 8}", i % 8, tuple(range(stop)), 10, Span(11, stop - 6), Span(stop - 5, stop - 1), "stop", "", bool(draw.getrandbits(1)),
                    numbers, numbers)
        )  # fmt: skip
    return found


def main() -> None:
    start()
    found = saved()
    batch = RewardBatch.from_rollouts(found, split="eval").with_columns(budget=np.full(N, 100), logprob_without=np.zeros(N))
    ids = [list(r.token_ids[r.prompt_len :]) for r in found]
    right = np.array([by_parity(r) == "long" for r in found])
    overlong = get_soft_overlong_punishment(200, 50)
    rows = []
    ours = Overlong(200, 50)(batch).components["overlong"]
    expected = np.array(overlong(completion_ids=ids))
    assert np.allclose(ours, expected, rtol=1e-12), "overlong"
    text = [[{"role": "assistant", "content": r"$\boxed{4}$"}] for _ in found]
    cosine = get_cosine_scaled_reward(max_len=200)
    solution = ["$4$" if r else "$5$" for r in right]
    few = slice(0, 100 if QUICK else 2000)  # it parses and compares mathematics: slow
    paid = np.array(cosine(completions=text[few], solution=solution[few], completion_ids=ids[few]), dtype=float)
    mine = Cosine(200)(batch).values
    same = np.allclose(mine[few], paid, rtol=1e-9)
    assert same, (mine[few][:5], paid[:5])
    told = "equal values for every row"
    seconds = turns(
        {
            "ours overlong": lambda: Overlong(200, 50)(batch),
            "TRL overlong": lambda: overlong(completion_ids=ids),
            "ours cosine": lambda: Cosine(200)(batch),
        }
    )
    slow = turns({"TRL cosine": lambda: cosine(completions=text[few], solution=solution[few], completion_ids=ids[few])}, 3)[
        "TRL cosine"
    ]
    values = ratio(seconds["TRL overlong"], seconds["ours overlong"])
    rows.append(Row("rewards: times faster than TRL's soft overlong punishment", *values, None, told, "numpy on columns; TRL loops over rows",
                    f"{N / median(seconds['ours overlong']):.2e} rows/s, TRL {N / median(seconds['TRL overlong']):.2e}"))  # fmt: skip
    each = median(slow) / len(paid) * N / median(seconds["ours cosine"])
    rows.append(Row("rewards: times faster than TRL's cosine reward", each, None, None, told,
                    "numpy on columns; most of TRL's time is grading, which rollouts did once before",
                    f"{N / median(seconds['ours cosine']):.2e} rows/s, TRL {len(paid) / median(slow):.2e}"))  # fmt: skip
    made, missing = {}, []
    for name in CLOSED_FORM:
        if name not in rewards.ALL:
            missing.append(name)
            continue
        reward = rewards.ALL[name].make()
        made[name] = lambda reward=reward: reward(batch)
    speeds = {name: [N / s / 1e6 for s in took] for name, took in turns(made).items()}
    slowest = min(speeds, key=lambda name: median(speeds[name]))
    low, high = np.quantile(speeds[slowest], [0.25, 0.75]).tolist()
    rows.insert(0, Row("rewards: slowest closed-form reward, million rows per second", median(speeds[slowest]), (low, high), ">= 1",
                       "tests/rewards/test_rewards.py", f"{slowest}: sorting rows into groups; of {len(speeds)} rewards the median reaches {median([median(s) for s in speeds.values()]):.0f}"
                       + (f"; missing: {missing}" if missing else "")))  # fmt: skip
    columns = turns({"columns": lambda: RewardBatch.from_rollouts(found, split="eval")}, 3)["columns"]
    rows.append(
        Row(
            "rewards: columns made from rollouts, million rows per second",
            N / median(columns) / 1e6,
            None,
            None,
            "",
            "Python objects, one by one",
        )
    )
    write("rewards", rows)


if __name__ == "__main__":
    main()
