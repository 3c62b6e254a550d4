"""The reward model of CRF (arXiv 2511.09158) in training: a head on the states of the model as it was given, trained once, then frozen.

Before the first step the given model answers some training problems; pairs of right answers to one problem teach the head
(``rewards.conciseness``), and it scores every response of the run. It is kept in the run's directory, so that a resumed run is judged
by the same head.

Deviations: the paper's judge is a 3B language model fine-tuned on what a 72B one said; see ``rewards.conciseness``. States are those of
the last block, averaged over the positions that predict the response (ours). Cost: one forward pass of each response.
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
from toolkit.grpo.recipes import Recipe
from toolkit.grpo.trainer import Extras
from toolkit.lm import LM
from toolkit.rewards import RewardBatch, conciseness
from toolkit.rewards.conciseness import ConcisenessHead
from toolkit.types import Problem, Rollout

COLUMN, FILE = "conciseness", "conciseness.json"
HEAD = {"weight": list[float], "centre": float, "spread": float}
assumed_problems, assumed_samples = 64, 8  # what the head learns from: ours

RESPONSE = Positions("response", lambda r: range(r.prompt_len - 1, len(r.token_ids) - 1))


def mean_states(lm: LM, found: Sequence[Rollout]) -> np.ndarray:
    """States of the last block averaged over each response, ``[n, d]``; every response has a token."""
    return collect.states(lm, found, "resid_post", positions=RESPONSE).values[:, lm.layout.n_layers - 1].numpy()


@dataclass(frozen=True)
class ConcisenessJudge:
    """Scores responses; a supplier of the column ``conciseness``. An empty response gets the least score."""

    lm: LM
    head: ConcisenessHead

    def __call__(self, drawn: Sequence[Drawn]) -> list[float]:
        scores = np.full(len(drawn), conciseness.LOWEST)
        some = [i for i, d in enumerate(drawn) if d.rollout.response_tokens]
        if some:
            scores[some] = self.head.score(mean_states(self.lm, [drawn[i].rollout for i in some]))
        return scores.tolist()


def train_judge(lm: LM, problems: Sequence[Problem], sampling: Sampling) -> ConcisenessJudge:
    """A judge that learnt from the model's own right answers. Raises NoPairsError if no two to one problem differ enough in length."""
    found = [r for r in generate.rollouts(lm, problems, sampling, progress=False) if r.response_tokens]
    pairs = conciseness.pairs_by_length(RewardBatch.of(found))
    return ConcisenessJudge(lm, conciseness.fit(mean_states(lm, found), pairs))


def read_head(lm: LM, path: Path) -> ConcisenessHead:
    """The head in a run's directory. Raises store.DamagedFileError if it is not one for ``lm``."""
    remedy = "Remove it: a new one is trained."
    head = ConcisenessHead.of(store.read_json(path, HEAD, remedy=remedy))
    if len(head.weight) != lm.layout.d_model or head.spread <= 0:
        raise store.DamagedFileError(
            f"{path} has {len(head.weight)} weights and spread {head.spread:g}: {lm.name} needs {lm.layout.d_model}, and more than 0. {remedy}"
        )
    return head


def with_judge(
    lm: LM, recipe: Recipe, problems: Sequence[Problem], extras: Extras, out: Path, seed: int, say: Callable[[str], None]
) -> Extras:
    """The extras with a judge, where the reward needs one and nobody supplies it: the one of ``out``, else a new one, left there."""
    reward: Any = extras.reward or rewards.ALL[recipe.reward].make(**recipe.options)
    if COLUMN not in reward.needs or COLUMN in extras.columns:
        return extras
    if (out / FILE).is_file():
        judge = ConcisenessJudge(lm, read_head(lm, out / FILE))
    else:
        say(
            f"{reward.name} needs a judge of conciseness: training one on {assumed_samples} answers to each of some training problems"
        )
        judge = train_judge(lm, problems[:assumed_problems], Sampling(assumed_samples, max_new_tokens=recipe.max_tokens, seed=seed))
        store.write_json(judge.head.state_dict(), out / FILE)
    return replace(extras, columns={**extras.columns, COLUMN: judge})
