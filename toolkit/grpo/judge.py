"""Conciseness judge: a linear head on hidden states of the initial model that scores how concise a response is.

The reward CRF (conciseness reward function, arXiv 2511.09158) needs such scores. The head is trained once, before the first training step,
then frozen. Its training data are responses of the initial model to some training problems. From pairs of correct responses to the same
problem, the head (``rewards.conciseness``) learns to give the shorter one the higher score. It then scores every response of the run. The
head is saved in the run's directory, so that a resumed run uses the same one.

``train_on_planted`` trains a head on generated pairs instead: arithmetic with and without planted re-checks and restatements
(``tasks.generators.redundant``). Pass it to a run in ``Extras(columns={"conciseness": judge})``.

The head's features are the hidden states after the last block, averaged over the positions that predict the response. Cost: one forward
pass of the initial model per response.

Deviations: the paper's judge is a 3B language model, fine-tuned on judgements of a 72B model (see ``rewards.conciseness``). The features
are our choice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from toolkit import collect, generate, rewards, store
from toolkit.collect import Positions
from toolkit.generate import Sampling
from toolkit.grpo.draws import Drawn
from toolkit.grpo.extras import Extras
from toolkit.grpo.recipes import Recipe
from toolkit.lm import LM
from toolkit.rewards import RewardBatch, conciseness
from toolkit.rewards.conciseness import ConcisenessHead
from toolkit.tasks.generators.redundant import Chain
from toolkit.types import Problem, Rollout

COLUMN, FILE = "conciseness", "conciseness.json"
HEAD = {"weight": list[float], "centre": float, "spread": float}  # fields of the file that holds the head, and their types
assumed_problems, assumed_samples = 64, 8  # problems, and responses per problem, on which the head is trained: ours

# The positions that predict the response: from the last token of the prompt to the last but one of the response.
RESPONSE = Positions("response", lambda r: range(r.prompt_len - 1, len(r.token_ids) - 1))


def mean_states(lm: LM, rollouts: Sequence[Rollout]) -> np.ndarray:
    """Return one feature vector per rollout, ``[n, d_model]``: the mean hidden state after the last block.

    The mean runs over the positions that predict the response's tokens: from the last token of the prompt to the last but one token of the
    response. Every response must have at least one token.
    """
    return collect.states(lm, rollouts, "resid_post", positions=RESPONSE).values[:, lm.layout.n_layers - 1].numpy()


@dataclass(frozen=True)
class ConcisenessJudge:
    """Callable object that scores how concise responses are: ``judge(rollouts)`` returns one score in [0.1, 1] per rollout.

    A more concise response scores higher; an empty one gets 0.1. The scores are the column ``conciseness`` that rewards such as CRF read.
    They are computed from each response's mean hidden state (see ``mean_states``).

    Attributes:
        lm: The initial model of the training run, which computes the hidden states.
        head: Linear head that turns mean hidden states into scores.
    """

    lm: LM
    head: ConcisenessHead

    def __call__(self, drawn: Sequence[Drawn]) -> list[float]:
        scores = np.full(len(drawn), conciseness.LOWEST)
        nonempty = [i for i, d in enumerate(drawn) if d.rollout.response_tokens]
        if nonempty:
            scores[nonempty] = self.head.score(mean_states(self.lm, [drawn[i].rollout for i in nonempty]))
        return scores.tolist()


def train_judge(lm: LM, problems: Sequence[Problem], sampling: Sampling) -> ConcisenessJudge:
    """Train a conciseness judge on responses that are sampled from ``lm``, and return the judge.

    A conciseness judge scores how concise a response is. It is a linear head on the mean hidden state of ``lm``. The training data are
    pairs of correct responses to the same problem. In each pair, the longer response is at least 1.25 times as long as the shorter one
    (``rewards.conciseness.assumed_ratio``); all such pairs are used. The judge learns to give the shorter one the higher score.

    Args:
        lm: The model before training, from which the GRPO run starts. Its weights are not changed.
        problems: Problems to sample responses to.
        sampling: Sampling settings. ``n`` (samples per problem) must be at least 2, or there are no pairs.

    Raises:
        NoPairsError: there is no such pair.
    """
    rollouts = [r for r in generate.rollouts(lm, problems, sampling, progress=False) if r.response_tokens]
    pairs = conciseness.pairs_by_length(RewardBatch.from_rollouts(rollouts))
    return ConcisenessJudge(lm, conciseness.fit(mean_states(lm, rollouts), pairs))


def chain_states(lm: LM, chains: Sequence[Chain]) -> np.ndarray:
    """Return one feature vector per generated chain of thought, as ``mean_states`` does for rollouts, ``[n, d_model]``."""
    rollouts = [
        generate.rollout_from_tokens(
            lm, c.problem, lm.prompt_ids(c.problem.messages), lm.tokenizer(c.text, add_special_tokens=False)["input_ids"]
        )
        for c in chains
    ]
    return mean_states(lm, rollouts)


def train_on_planted(lm: LM, pairs: Sequence[tuple[Chain, Chain]], *, reverse: Sequence[bool] = ()) -> ConcisenessJudge:
    """Train a conciseness judge on pairs of a concise and a redundant chain of thought, and return the judge.

    Args:
        lm: Model whose hidden states the judge reads.
        pairs: Pairs ``(concise, redundant)``, from ``tasks.generators.redundant.pairs``.
        reverse: True for each pair whose label is to be wrong; by default none. Shuffled labels make a control.

    Raises:
        NoPairsError: there is no pair.
    """
    rows = np.arange(2 * len(pairs)).reshape(-1, 2)
    flip = np.asarray(reverse or [False] * len(pairs), bool)
    rows = np.where(flip[:, None], rows[:, ::-1], rows)
    if not len(rows):
        raise conciseness.NoPairsError("No pairs of chains: give at least one, from tasks.generators.redundant.pairs.")
    return ConcisenessJudge(lm, conciseness.fit(chain_states(lm, [chain for pair in pairs for chain in pair]), rows))


def read_head(lm: LM, path: Path) -> ConcisenessHead:
    """Return a conciseness judge's head, read from the file ``path``: the linear layer that turns hidden states into scores.

    Raises:
        store.DamagedFileError: the file is damaged, the head does not have one weight per dimension of ``lm``'s residual stream, or its
            ``spread`` (the standard deviation by which logits are divided) is not above 0.
    """
    remedy = "Remove it: a new head is then trained."
    head = ConcisenessHead.from_state_dict(store.read_json(path, HEAD, remedy=remedy))
    if len(head.weight) != lm.layout.d_model or head.spread <= 0:
        raise store.DamagedFileError(
            f"{path} has {len(head.weight)} weights and spread {head.spread:g}: {lm.name} needs {lm.layout.d_model} weights and a spread "
            f"above 0. {remedy}"
        )
    return head


def with_judge(
    lm: LM, recipe: Recipe, problems: Sequence[Problem], extras: Extras, out: Path, seed: int, say: Callable[[str], None]
) -> Extras:
    """Return ``extras`` with a conciseness judge added to its ``columns``, if the reward needs one.

    A conciseness judge is a function that scores how concise a response is (see ``ConcisenessJudge``). The reward needs one if it reads the
    column ``conciseness`` and ``extras.columns`` has no function for it. Otherwise ``extras`` is returned unchanged.

    The judge's linear head is read from the run's directory if a head is saved there. Otherwise one is trained and saved.

    Args:
        lm: The initial model.
        recipe: Recipe of the run; ``extras.reward``, if set, replaces its reward.
        problems: Training problems; a new head is trained on 8 responses to each of the first 64.
        extras: Parts of the run that the recipe does not set.
        out: The run's directory.
        seed: Seed for sampling the responses on which a new head is trained.
        say: Called with one line of progress before a head is trained.
    """
    reward: Any = extras.reward or rewards.ALL[recipe.reward].make(**recipe.options)
    if COLUMN not in reward.needs or COLUMN in extras.columns:
        return extras
    if (out / FILE).is_file():
        judge = ConcisenessJudge(lm, read_head(lm, out / FILE))
    else:
        say(
            f"{reward.name} needs a conciseness judge: training one on {assumed_samples} answers to each of {len(problems[:assumed_problems])} training problems"
        )
        judge = train_judge(lm, problems[:assumed_problems], Sampling(assumed_samples, max_new_tokens=recipe.max_tokens, seed=seed))
        store.write_json(judge.head.state_dict(), out / FILE)
    return replace(extras, columns={**extras.columns, COLUMN: judge})
