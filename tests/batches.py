"""Batches for reward tests: columns with sensible values, and one setting of every reward in ``rewards.ALL``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from toolkit import rewards
from toolkit.rewards import RewardBatch
from toolkit.rewards.columns import object_array
from toolkit.rewards.laser_targets import TargetSettings
from toolkit.stats import ranges_around


def batch_of(correct: Sequence[int], tokens: Sequence[int], problem_id: Sequence | str = "q", **more: Any) -> RewardBatch:
    """A batch with the columns that follow from correctness and length; others by name."""
    n, step, split = len(tokens), more.pop("step", 0), more.pop("split", "train")
    ids = [problem_id] * n if isinstance(problem_id, str) else problem_id
    columns = {
        "problem_id": object_array(ids),
        "correct": np.array(correct, bool),
        "tokens": np.array(tokens, np.int64),
        "closed": np.ones(n, bool),
        "think_closed": np.ones(n, bool),
        "formatted": np.ones(n, bool),
        "finish": object_array(["stop"] * n),
        "answer_text": object_array(["7"] * n),
    }
    return RewardBatch(columns, step, split).with_columns(**more)


def full_batch(
    correct: Sequence[int], tokens: Sequence[int], problem_id: Sequence | str, seed: int = 0, **more: Any
) -> RewardBatch:
    """A batch with every column that any reward needs, the further ones drawn at random."""
    n, random = len(tokens), np.random.default_rng(seed)
    ids = object_array(tuple(random.integers(0, 5, length).tolist()) for length in tokens)
    calls = random.integers(0, 4, n)
    columns = {
        "token_ids": ids,
        "text": object_array(episode(int(k), random) for k in calls),
        "calls": calls,
        "question": "the river of zor",
        "gold_answer": "7",
        "gold_documents": object_array([("doc 1", "doc 2")] * n),
        "gold_calls": object_array([({"name": "search", "parameters": {"query": "a 1"}},)] * n),
        "nuggets": object_array([("12", "7")] * n),
        "relevance": object_array([(0, 3, 1)] * n),
        "rule_confidence": random.random(n),
        "model_score": random.normal(size=n),
        "schema": "create table t (a); insert into t values (7);",
        "gold_sql": "select a from t",
        "headings": object_array([("so 12 and 7", "end")] * n),
        "keywords": object_array([("12", "unsure")] * n),
        "low_words": np.full(n, 2),
        "high_words": np.full(n, 3),
        "think_tokens": np.maximum(0, np.array(tokens) - 3),
        "logprob": -random.random(n),
        "logprob_without": -2 * random.random(n),
        "think_entropy": np.where(random.random(n) < 0.1, np.nan, random.random(n)),
        "answer_entropy": np.where(random.random(n) < 0.1, np.nan, random.random(n)),
        "conciseness": random.uniform(0.1, 1.0, n),
        "mode": object_array(random.choice(["long", "short"], n).tolist()),
        "budget": random.choice([20, 50], n),
        "target_tokens": random.choice([30, 80], n),
        "low_tokens": np.full(n, 20),
        "high_tokens": np.full(n, 40),
        "formatted": random.random(n) < 0.8,
        "closed": random.random(n) < 0.9,
        "answer_text": object_array(random.choice(["7", "so 12 and 7", "unsure"], n).tolist()),
        "finish": object_array(random.choice(["stop", "length"], n).tolist()),
        "think_closed": random.random(n) < 0.9,
    }
    return batch_of(correct, tokens, problem_id, **{**columns, **more})


def episode(calls: int, random: np.random.Generator) -> str:
    """A response with calls, results and judgements drawn at random."""
    parts = [
        f"asked: x <search>a {random.integers(3)}</search><result>doc {random.integers(4)}</result>"
        f"{random.choice(['relevant', 'irrelevant', 'so'])}. "
        for _ in range(calls)
    ]
    return f"<think>{''.join(parts)}</think>7"


def every_reward() -> dict[str, Any]:
    """One of each, fresh, in the size of the lengths of these tests (0 to 200 tokens)."""
    sizes: dict[str, dict[str, Any]] = {
        "length_penalty": {"longest": 100},
        "truncation": {"target": 50},
        "think_prune": {"stages": (80, 50), "every": 2},
        "alp": {"beta": 0.001},
        "cosine": {"longest": 100},
        "dot": {"alpha": 1.0, "margin": 4},
        "overlong": {"longest": 100, "cache": 40},
        "dler": {"target": 50, "kept": 0.1},
        "da_dler": {"tiers": ((0.0, 80), (0.5, 40))},
        "laser": {"target": 50},
        "laser_d": {"targets": TargetSettings(20, 10, 100, every=2)},
        "laser_de": {"targets": TargetSettings(20, 10, 100, every=2)},
        "longwriter": {"longest": 150},
        "longwriter_zero": {"longest": 150},
        "surrogate": {"longest": 100},
        "mash": {"block": 16},
        "ruler": {"ranges": ranges_around([30, 80], 0.2), "unit": "tokens"},
    }
    return {name: entry.make(**sizes.get(name, {})) for name, entry in rewards.ALL.items()}
