"""Columns of the training log: statistics of a training batch and its rewards, and results on held-out problems.

Shares lie between 0 and 1, lengths are in tokens, entropies in nats per token. A group is the set of rollouts of one problem. If there is
nothing to average, a mean is NaN here and ``null`` in the log. Four other sources add columns to the log: TRL (such as ``reward``,
``grad_norm``, ``kl``), ``sampler.Sampler`` (``dynamic/...``), the trainer (``sampler/...``, ``seconds/rollouts``, ``switch_loss``), and
``log.Recorder`` (``step``, ``alarms``).

=========================  ==================================================================================================
column                     meaning
=========================  ==================================================================================================
accuracy                   share of correct responses
truncated                  share of responses that the token limit cut off
closed                     share of responses that closed their think span
tokens                     mean response length
tokens/truncated           mean length of responses that the token limit cut off; ``tokens/stopped``: of all others
tokens/correct, /wrong     mean length of correct responses; the same for wrong ones
think_tokens               mean length of the think span
loops                      share of responses that the token limit cut off in a repeating sequence of tokens (``stats.looping``)
answers/most_common        share of the most common answer among all answers of the batch; equal answers have the same token ids
zero_std                   share of rollouts in groups whose rewards are all equal
entropy/think, /answer     mean entropy of the tokens of think spans; the same for answers
component/NAME             mean of a component of the reward; ``component/NAME/std``: its standard deviation over the batch
accuracy/MODE              accuracy of responses whose prompt requests MODE thinking, ``long`` or ``short``; likewise ``tokens/MODE``
held_out/...               ``accuracy``, ``think_tokens``, ``tokens``, ``truncated``, ``loops`` on held-out problems
held_out/..._hard          the same on the third (or more, with ties) of these problems with the highest ``Problem.meta["difficulty"]``
held_out/recall_low        lowest accuracy over gold answers, if the held-out problems are of few classes (``class_recalls``)
held_out/recall_high       highest accuracy over gold answers, likewise
held_out/kl                ``KL(policy || initial model)`` on held-out problems, nats per token (``kl_to``)
=========================  ==================================================================================================
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import compress
from typing import Any

import numpy as np
from numpy import ndarray

from toolkit import entropies, rewards, stats
from toolkit.grpo.advantages import group_std
from toolkit.grpo.draws import Drawn
from toolkit.lm import LM
from toolkit.rewards import RewardBatch
from toolkit.types import Problem, Rollout

Row = dict[str, Any]
CLASSES, PER_CLASS = 5, 5  # most classes, and fewest held-out problems of each, for which recalls are logged: ours


def batch_measures(drawn: Sequence[Drawn], batch: RewardBatch, scored: rewards.RewardValues) -> dict[str, float]:
    """Return statistics of one training batch as a dict ``{column of the log: value}``.

    The module ``measures`` lists the columns; those that begin with ``held_out/`` are not returned here.

    Args:
        drawn: Rollouts of the batch, of all processes.
        batch: The batch that was passed to the reward, for the same rollouts. Only its field ``groups`` (the group of each rollout) is
            used; a group is the set of rollouts of one problem.
        scored: Rewards of the rollouts and their components.
    """
    rollouts = [d.rollout for d in drawn]
    # ``stopped``: the response ended by itself, with an end-of-sequence token.
    correct, stopped = np.array([r.correct for r in rollouts]), np.array([r.finish == "stop" for r in rollouts])
    tokens, think = (np.array([getattr(r, name) for r in rollouts], float) for name in ("response_tokens", "think_tokens"))
    row = {
        "accuracy": correct.mean(),
        "truncated": 1 - stopped.mean(),
        "closed": np.mean([r.closed for r in rollouts]),
        "tokens": tokens.mean(),
        "tokens/stopped": _mean(tokens[stopped]),
        "tokens/truncated": _mean(tokens[~stopped]),
        "tokens/correct": _mean(tokens[correct]),
        "tokens/wrong": _mean(tokens[~correct]),
        "think_tokens": think.mean(),
        "loops": np.mean([r.finish == "length" and stats.looping(r.token_ids[r.prompt_len :]) for r in rollouts]),
        "answers/most_common": _most_common(rollouts),
        "zero_std": (group_std(scored.values, batch.groups) == 0).mean(),
        **{f"entropy/{phase}": _entropy(rollouts, phase) for phase in ("think", "answer")},
    }
    for name, values in scored.components.items():
        row[f"component/{name}"], row[f"component/{name}/std"] = values.mean(), values.std()
    for mode in {d.mode for d in drawn} - {None}:
        in_mode = np.array([d.mode == mode for d in drawn])
        row[f"accuracy/{mode}"], row[f"tokens/{mode}"] = correct[in_mode].mean(), tokens[in_mode].mean()
    return {name: float(value) for name, value in row.items()}


def _mean(values: ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan


def _entropy(rollouts: Sequence[Rollout], phase: str) -> float:
    """Return the mean entropy over all tokens of a phase, ``"think"`` or ``"answer"``, of the rollouts with recorded entropies.

    Tokens of tool results do not count.
    """
    values: list[float] = []
    for r in rollouts:
        span = getattr(r, phase)
        if span is not None and r.entropies is not None:
            # Entropies begin at the first response token, spans count from the start of the prompt.
            inside = slice(span.start - r.prompt_len, span.stop - r.prompt_len)
            values += compress(r.entropies[inside], r.written[inside])
    return _mean(np.array(values))


def _most_common(rollouts: Sequence[Rollout]) -> float:
    """Return the share of the most common answer among all answers; NaN without answers. Equal answers have the same token ids."""
    answers = Counter(r.token_ids[r.answer.start : r.answer.stop] for r in rollouts if r.answer is not None)
    return answers.most_common(1)[0][1] / answers.total() if answers else math.nan


def held_out_measures(rollouts: Sequence[Rollout], problems: Sequence[Problem]) -> Row:
    """Return results on held-out problems as a dict ``{column of the log: value}``.

    The module ``measures`` lists the columns: all that begin with ``held_out/``, except ``held_out/kl``.

    The columns ``..._hard`` cover the hardest third of the problems: those with the highest number in ``Problem.meta["difficulty"]``. Ties
    may make it more than a third. The columns exist only if every problem has such a number.

    Args:
        rollouts: Rollouts of the policy on the problems.
        problems: Held-out problems.
    """
    difficulty = {p.id: p.meta.get("difficulty") for p in problems}
    row = {f"held_out/{name}": value for name, value in _means(rollouts).items()}
    if all(isinstance(d, int | float) for d in difficulty.values()):
        hard = np.quantile(list(difficulty.values()), 2 / 3)
        chosen = [r for r in rollouts if difficulty[r.problem_id] >= hard]
        row |= {f"held_out/{name}_hard": value for name, value in _means(chosen).items()}
    gold = {p.id: p.answer for p in problems}
    if recalls := class_recalls([r.correct for r in rollouts], [gold[r.problem_id] for r in rollouts]):
        row |= {"held_out/recall_low": min(recalls.values()), "held_out/recall_high": max(recalls.values())}
    return row


def class_recalls(correct: Sequence[bool], gold: Sequence[str]) -> dict[str, float]:
    """Return the accuracy on responses of each gold answer, or ``{}`` if the gold answers are not a few classes.

    They are if there are 2 to 5 different ones, each of 5 responses or more. A policy that always gives one answer is right on one class and
    wrong on all others, however it words the answer.

    >>> class_recalls([True] * 6 + [False] * 5, ["yes"] * 6 + ["no"] * 5)
    {'yes': 1.0, 'no': 0.0}
    """
    counts = Counter(gold)
    if not 2 <= len(counts) <= CLASSES or min(counts.values()) < PER_CLASS:
        return {}
    right = Counter(g for g, c in zip(gold, correct, strict=True) if c)
    return {name: right[name] / n for name, n in counts.items()}


def kl_to(initial: LM, rollouts: Sequence[Rollout], temperature: float) -> float:
    """Return an estimate of ``KL(policy || initial)`` in nats per token.

    It is the mean, over sampled tokens, of the policy's log-probability minus that of the initial model. Tool results are not sampled.

    Args:
        initial: The model before training.
        rollouts: Rollouts of the policy, sampled without top-p and top-k, with recorded log-probabilities.
        temperature: Temperature at which the rollouts were sampled.
    """
    # The same tokens, with log-probabilities under the initial model.
    before = entropies.with_entropies(initial, rollouts, temperature=temperature)
    ratios = [np.subtract(r.logprobs or (), b.logprobs or ()) for r, b in zip(rollouts, before, strict=True)]
    return _mean(np.concatenate([ratio[np.array(r.written, bool)] for ratio, r in zip(ratios, rollouts, strict=True)]))


def _means(rollouts: Sequence[Rollout]) -> Row:
    """Return means over rollouts as a dict with the keys ``accuracy``, ``think_tokens``, ``tokens``, ``truncated`` and ``loops``.

    These are names of ``held_out/...`` columns without that prefix.
    """
    return {
        "accuracy": float(np.mean([r.correct for r in rollouts])),
        "think_tokens": float(np.mean([r.think_tokens for r in rollouts])),
        "tokens": float(np.mean([r.response_tokens for r in rollouts])),
        "truncated": float(np.mean([r.finish == "length" for r in rollouts])),
        "loops": float(np.mean([r.finish == "length" and stats.looping(r.token_ids[r.prompt_len :]) for r in rollouts])),
    }
