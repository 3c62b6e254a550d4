"""Numbers of a batch of rollouts for the log: what one step drew and was paid, and accuracy and length on held-out problems.

Shares are of 1, lengths tokens, entropies nats per token; NaN where there is nothing to average.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy import ndarray

from toolkit import rewards, stats
from toolkit.grpo.advantages import group_std
from toolkit.grpo.draws import Drawn
from toolkit.lm import LM
from toolkit.methods import phase_entropy
from toolkit.rewards import RewardBatch
from toolkit.types import Problem, Rollout

Row = dict[str, Any]


def batch_measures(drawn: Sequence[Drawn], batch: RewardBatch, scored: rewards.Scored) -> dict[str, float]:
    """What one batch of all processes looked like, by name; NaN where there is nothing to average."""
    found = [d.rollout for d in drawn]
    correct, stopped = np.array([r.correct for r in found]), np.array([r.finish == "stop" for r in found])
    tokens, think = (np.array([getattr(r, name) for r in found], float) for name in ("response_tokens", "think_tokens"))
    row = {
        "accuracy": correct.mean(),
        "truncated": 1 - stopped.mean(),
        "closed": np.mean([r.closed for r in found]),
        "tokens": tokens.mean(),
        "tokens/stopped": _mean(tokens[stopped]),
        "tokens/truncated": _mean(tokens[~stopped]),
        "tokens/correct": _mean(tokens[correct]),
        "tokens/wrong": _mean(tokens[~correct]),
        "think_tokens": think.mean(),
        "loops": np.mean([r.finish == "length" and stats.looping(r.token_ids[r.prompt_len :]) for r in found]),
        "answers/most_common": _most_common(found),
        "zero_std": (group_std(scored.values, batch.groups) == 0).mean(),
        **{f"entropy/{phase}": _entropy(found, phase) for phase in ("think", "answer")},
    }
    for name, values in scored.components.items():
        row[f"component/{name}"], row[f"component/{name}/std"] = values.mean(), values.std()
    for mode in {d.mode for d in drawn} - {None}:
        mine = np.array([d.mode == mode for d in drawn])
        row[f"accuracy/{mode}"], row[f"tokens/{mode}"] = correct[mine].mean(), tokens[mine].mean()
    return {name: float(value) for name, value in row.items()}


def _mean(values: ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan


def _entropy(found: Sequence[Rollout], phase: str) -> float:
    """Mean over the tokens of a phase, over all rollouts that kept entropies."""
    values: list[float] = []
    for r in found:
        span = getattr(r, phase)
        if span is not None and r.entropies is not None:
            values += r.entropies[span.start - r.prompt_len : span.stop - r.prompt_len]
    return _mean(np.array(values))


def _most_common(found: Sequence[Rollout]) -> float:
    """Share of the most common answer among the responses that answer."""
    answers = Counter(r.token_ids[r.answer.start : r.answer.stop] for r in found if r.answer is not None)
    return answers.most_common(1)[0][1] / answers.total() if answers else math.nan


def held_out_measures(found: Sequence[Rollout], problems: Sequence[Problem]) -> Row:
    """Accuracy and length on held-out problems; ``_hard`` is the hardest third by ``meta["difficulty"]``, where problems have one."""
    difficulty = {p.id: p.meta.get("difficulty") for p in problems}
    row = {f"held_out/{name}": value for name, value in _means(found).items()}
    if all(isinstance(d, int | float) for d in difficulty.values()):
        hard = np.quantile(list(difficulty.values()), 2 / 3)
        chosen = [r for r in found if difficulty[r.problem_id] >= hard]
        row |= {f"held_out/{name}_hard": value for name, value in _means(chosen).items()}
    return row


def kl_to(given: LM, found: Sequence[Rollout], temperature: float) -> float:
    """KL of the policy that sampled rollouts to the model as it was given: the mean over their tokens of ``log pi - log pi_given``, nats.

    An estimate from samples. Rollouts must carry log-probabilities, of an untruncated softmax at that temperature.
    """
    before = phase_entropy.measured(given, found, temperature=temperature)
    ratios = [np.subtract(r.logprobs or (), b.logprobs or ()) for r, b in zip(found, before, strict=True)]
    return _mean(np.concatenate(ratios))


def _means(found: Sequence[Rollout]) -> Row:
    return {
        "accuracy": float(np.mean([r.correct for r in found])),
        "think_tokens": float(np.mean([r.think_tokens for r in found])),
        "tokens": float(np.mean([r.response_tokens for r in found])),
        "truncated": float(np.mean([r.finish == "length" for r in found])),
        "loops": float(np.mean([r.finish == "length" and stats.looping(r.token_ids[r.prompt_len :]) for r in found])),
    }
