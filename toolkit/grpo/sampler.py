"""Sample the responses of a training batch from the weights in training, on all processes.

A group is the set of responses to one problem; each process samples whole groups. If the recipe says so, prompts state a token budget or
request a *mode*, long or short thinking (see ``draws``). A recipe may also replace groups whose rewards are all equal (dynamic sampling).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import gather_object
from numpy import ndarray
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel
from trl.models import unwrap_model_for_generation

from toolkit import generate, tensors
from toolkit.generate import Sampling
from toolkit.grpo import draws
from toolkit.grpo.draws import Drawn, budget_prompt, prompted_messages
from toolkit.grpo.recipes import Recipe
from toolkit.lm import LM, Condition
from toolkit.rewards.written import mean, own
from toolkit.tools import Toolbox
from toolkit.types import Ask, Problem, Rollout

Messages = Sequence[Mapping[str, str]]
MONITOR = len(draws.MODES)  # ``stream`` (see ``draws.seed_of``) of the monitoring set; the numbers below it are used for the modes


@dataclass(frozen=True)
class PolicyView:
    """The parts of a trainer that sampling needs.

    Attributes:
        lm: The model that was given to the trainer. Its tokenizer, think tags and template are used; the current weights come from
            ``weights``.
        recipe: Recipe of the run.
        args: TRL's config.
        problems: Problem id -> training problem.
        needs: Names of the columns that the reward reads.
        accelerator: The trainer's ``accelerate.Accelerator``.
        step: Function that returns the number of optimizer steps done so far.
        weights: Function that returns the model in training.
        generating: Function that returns a context manager. The manager yields the model for generation: without the wrappers of
            accelerate, under the autocast of training.
        rewards: Function ``(rollouts of all processes, rollouts of this process) -> rewards [n]``, one for each rollout of all processes.
            A call does not change the state of a reward that has one, such as HAPO's. Each process computes ``Extras.columns`` only for its
            own rollouts.
        tools: Tools that responses may call, or ``None``.
        log_probs: Function ``(token ids, attention mask, width) -> log-probabilities [rows, width]`` of the response tokens, in nats. Each
            row of token ids is a prompt, padded on the left, and a response, padded on the right. ``width`` is the length of the longest
            response.
    """

    lm: LM
    recipe: Recipe
    args: Any
    problems: Mapping[str, Problem]
    needs: frozenset[str]
    tools: Toolbox | None
    accelerator: Any
    step: Callable[[], int]
    weights: Callable[[], Any]
    generating: Callable[[], AbstractContextManager[Any]]
    rewards: Callable[[Sequence[Drawn], Sequence[Drawn]], ndarray]
    log_probs: Callable[[Tensor, Tensor, int], Tensor]


def view_of(trainer: Any) -> PolicyView:
    """Return the parts of a trainer that sampling needs."""

    def rewards(drawn: Sequence[Drawn], local: Sequence[Drawn]) -> ndarray:
        return trainer.reward(trainer.batch_of(drawn, local, trainer.state.global_step, "eval")).values

    return PolicyView(
        lm=trainer.origin,  # the LM that the trainer was made with
        recipe=trainer.recipe,
        args=trainer.args,
        problems=trainer.problems,
        needs=frozenset(trainer.reward.needs),
        tools=trainer.extras.tools,
        accelerator=trainer.accelerator,
        step=lambda: trainer.state.global_step,
        weights=lambda: trainer.model,
        generating=lambda: _generating(trainer),
        rewards=rewards,
        log_probs=lambda ids, mask, keep: trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, keep)[0],
    )


@contextmanager
def _generating(trainer: Any) -> Iterator[Any]:
    """Return a context manager that yields the model for generation: without accelerate's wrappers, under the autocast of training."""
    # Both calls that gather sharded weights do nothing here, since sharding is refused (``checks.check_unsharded``).
    gathered = {"gather_deepspeed3_params": trainer.args.ds3_gather_for_generation}
    with (
        unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator, **gathered) as model,
        trainer._dist.summon_full_params(trainer.model_wrapped, recurse=False),
        trainer.accelerator.autocast(),  # as in training; entered once for all decoding steps, so that weights are cast once
    ):
        yield model


class Sampler:
    """Object that samples the responses of training batches from the model in training.

    Attributes:
        policy: A view of the trainer with what sampling needs: the model in training, the recipe, and more.
        metrics: Columns of the log about the newest batch. With dynamic sampling these are ``dynamic/groups_drawn`` (number of groups
            sampled), ``dynamic/rounds`` (number of rounds of sampling) and ``dynamic/filled`` (share of the batch, 0 to 1, that had to be
            filled with groups of equal rewards). The trainer adds ``seconds/rollouts``, the time that sampling took.
    """

    def __init__(self, policy: PolicyView) -> None:
        self.policy = policy
        self.metrics: dict[str, float] = {}

    def draw(self, ids: Sequence[str]) -> list[Drawn]:
        """Sample and return the rollouts of this process's part of a batch. Rollouts of one problem are adjacent.

        With dynamic sampling, groups of other problems may replace groups of the requested ones.

        Args:
            ids: Problem ids, one per response that this process must sample. A problem with G responses has its id G times in a row.

        Raises:
            ValueError: a weight is NaN or infinite.
        """
        policy = self.policy
        if (name := tensors.not_finite(policy.weights())) is not None:
            raise ValueError(f"After step {policy.step()} weight {name} holds NaN or infinity: lower the learning rate.")
        # One id per group: the first of each ``num_generations``.
        groups = self._groups([policy.problems[i] for i in ids[:: policy.args.num_generations]])
        if policy.recipe.dynamic is not None:
            groups = self._refilled(groups)
        return [d for group in groups for d in group]

    def rollouts(self, problems: Sequence[Problem], sampling: Sampling, ask: Ask | None = None) -> list[Rollout]:
        """Sample and return rollouts of the model in training. It is set to evaluation mode (no dropout) while it samples.

        Args:
            problems: Problems to answer.
            sampling: Sampling settings.
            ask: Function that changes the prompts; ``None`` leaves them unchanged.
        """
        if not problems:
            return []
        training = self.policy.weights().training
        with self.policy.generating() as model:
            model.eval()
            lm = replace(self.policy.lm, model=base_model(model))
            try:
                return generate.rollouts(Condition(lm, ask=ask, tools=self.policy.tools), problems, sampling, progress=False)
            finally:
                model.train(training)

    def monitoring_rollouts(self, problems: int, samples: int) -> list[Rollout]:
        """Sample rollouts on the monitoring set, split over the processes, and return those of all processes.

        The monitoring set is a random set of training problems, the same in every step of a run. These rollouts are not trained on;
        they only measure the model. LASER-D, for example, sets its target lengths from them.

        Args:
            problems: Number of problems in the set.
            samples: Number of responses per problem.
        """
        policy = self.policy
        chosen = draws.more_problems(list(policy.problems.values()), set(), problems, policy.args.seed)
        local = chosen[policy.accelerator.process_index :: policy.accelerator.num_processes]
        return list(gather_object(self.rollouts(local, self._sampling(MONITOR, samples))))

    def _sampling(self, stream: int, n: int) -> Sampling:
        a = self.policy.args
        seed = draws.seed_of(a.seed, self.policy.step(), stream)
        # A ``top_k`` of 0 or less means no limit. ``details`` records log-probabilities and entropies.
        return Sampling(
            n, float(a.temperature), float(a.top_p), max(int(a.top_k), 0), a.max_completion_length, seed=seed, details=True
        )

    def _groups(self, problems: Sequence[Problem]) -> list[list[Drawn]]:
        """Sample on this process, and return one group (the responses to one problem) per problem.

        ``_prompted`` samples the groups. If the reward reads the column ``logprob_without``, this method adds it: the mean log-probability
        of a response without the question.
        """
        groups = self._prompted(problems)
        return [self._with_prior(group) for group in groups] if "logprob_without" in self.policy.needs else groups

    def _prompted(self, problems: Sequence[Problem]) -> list[list[Drawn]]:
        """Sample on this process, with the recipe's texts in the prompts. Return one group (the responses to one problem) per problem.

        If the recipe has a ``curriculum``, prompts state its token budget. If it has ``modes``, half of a group's prompts request long
        thinking and half short thinking. ``Drawn.logprob_without`` is not set here.
        """
        policy, samples = self.policy, self.policy.args.num_generations
        if policy.recipe.modes is None:
            ask, budget = budget_prompt(policy.recipe.curriculum, policy.step())
            rollouts = self.rollouts(problems, self._sampling(0, samples), ask)
            drawn = [Drawn(r, prompted_messages(policy.problems[r.problem_id], ask), budget) for r in rollouts]
            return [drawn[i : i + samples] for i in range(0, len(drawn), samples)]
        half = samples // 2  # responses per problem and mode; samples 0 to half - 1 are long, the rest short
        groups: list[list[Drawn]] = [[] for _ in problems]
        for stream, mode in enumerate(draws.MODES):
            ask = policy.recipe.modes.ask(mode)
            rollouts = draws.renumbered(self.rollouts(problems, self._sampling(stream, half), ask), stream * half)
            for i, r in enumerate(rollouts):
                groups[i // half].append(Drawn(r, prompted_messages(policy.problems[r.problem_id], ask), mode=mode))
        return groups

    def _refilled(self, groups: list[list[Drawn]]) -> list[list[Drawn]]:
        """Replace groups whose rewards are all equal by groups of other problems, and return this process's part of the new batch.

        All processes call this together: their groups form one batch, and each samples a part of the new groups. ``draws.Dynamic`` limits
        how many are sampled.

        Args:
            groups: This process's part of the batch, one list of rollouts per problem.
        """
        policy, rule = self.policy, self.policy.recipe.dynamic
        assert rule is not None
        here, world = policy.accelerator.process_index, policy.accelerator.num_processes
        pool: list[list[Drawn]] = list(gather_object(groups))
        wanted, rounds = len(pool), 1
        pool, dropped = self._drop_uniform(pool, [], wanted)
        while len(pool) < wanted and rounds < rule.rounds:
            # Every process chooses the same problems, and samples its part of them. The seed below only chooses problems. Its third
            # argument, the round, may equal that of a mode, but no response repeats: the seeds of responses also depend on the problem.
            seen = {group[0].rollout.problem_id for group in (*pool, *dropped)}
            seed = draws.seed_of(policy.args.seed, policy.step(), rounds)
            more = draws.more_problems(list(policy.problems.values()), seen, rule.next_round(len(pool), len(seen), wanted), seed)
            if not more:
                break
            sampled = {group[0].rollout.problem_id: group for group in gather_object(self._groups(more[here::world]))}
            pool, dropped = self._drop_uniform([*pool, *(sampled[p.id] for p in more)], dropped, wanted)
            rounds += 1
        self.metrics = {
            "dynamic/groups_drawn": len(pool) + len(dropped),
            "dynamic/rounds": rounds,
            "dynamic/filled": max(0, wanted - len(pool)) / wanted,
        }
        # If too few groups remain, dropped ones fill the batch. Every process takes an equal part.
        share = wanted // world
        return [*pool, *dropped][:wanted][here * share : (here + 1) * share]

    def _drop_uniform(
        self, pool: list[list[Drawn]], dropped: list[list[Drawn]], wanted: int
    ) -> tuple[list[list[Drawn]], list[list[Drawn]]]:
        """Drop groups whose rewards are all equal. Return ``(pool, dropped)``: the groups that remain, and all dropped groups.

        The first ``wanted`` groups of ``pool`` are the batch; only their rewards are computed. If some groups are dropped, later groups of
        ``pool`` take their places, as far as there are any. The rewards of the new batch are then all computed again, since a reward may
        compare the groups of a batch. This repeats until no group is dropped or the pool is empty. The state of a reward that changes
        during training, such as HAPO's, stays the same.

        Args:
            pool: Groups of all processes, one list of rollouts per problem.
            dropped: Groups that earlier calls dropped; the second return value contains them too.
            wanted: Number of groups in a batch.
        """
        policy, rule = self.policy, self.policy.recipe.dynamic
        assert rule is not None
        here, world = policy.accelerator.process_index, policy.accelerator.num_processes
        while batch := pool[:wanted]:
            # ``local`` is the part of the batch for which this process computes columns of the reward.
            rows = [d for group in batch for d in group]
            local = rows[len(rows) * here // world : len(rows) * (here + 1) // world]
            values = policy.rewards(rows, local)
            keeps = [rule.keeps(part) for part in np.split(values, np.cumsum([len(group) for group in batch])[:-1])]
            if all(keeps):
                break
            dropped = [*dropped, *(group for group, keep in zip(batch, keeps, strict=True) if not keep)]
            pool = [*(group for group, keep in zip(batch, keeps, strict=True) if keep), *pool[wanted:]]
        return pool, dropped

    def _with_prior(self, group: list[Drawn]) -> list[Drawn]:
        """Return the group with ``logprob_without`` set: the mean log-probability of each response without the question.

        The mean runs over the tokens that the model wrote, as in the column ``logprob``. The reward SAR compares the two.
        """
        means = self._mean_logprobs([without_question(d.prompt) for d in group], [d.rollout for d in group])
        return [replace(d, logprob_without=mean) for d, mean in zip(group, means, strict=True)]

    @torch.no_grad()
    def _mean_logprobs(self, prompts: Sequence[Messages], rollouts: Sequence[Rollout]) -> list[float]:
        """Return the mean log-probability (nats per token) of each response given a prompt, over the tokens that the model wrote.

        Tokens of tool results are read, but not part of the mean. It is NaN if the response is empty.

        Args:
            prompts: Chat messages of each prompt, instead of the rollout's own.
            rollouts: Rollouts whose responses are scored.
        """
        policy = self.policy
        ids = [policy.lm.prompt_ids(p) for p in prompts]
        responses = [list(r.token_ids[r.prompt_len :]) for r in rollouts]
        left, width, pad = max(map(len, ids)), max(map(len, responses)), policy.lm.tokenizer.pad_token_id
        rows, mask = [], []
        for p, r in zip(ids, responses, strict=True):
            before, after = left - len(p), width - len(r)  # numbers of padding tokens
            rows.append([pad] * before + p + r + [pad] * after)
            mask.append([0] * before + [1] * (len(p) + len(r)) + [0] * after)
        device = policy.accelerator.device
        logps = policy.log_probs(torch.tensor(rows, device=device), torch.tensor(mask, device=device), width)
        return [mean(own(r, row[: r.response_tokens].tolist())) for row, r in zip(logps, rollouts, strict=True)]


def base_model(model: Any) -> PreTrainedModel:
    """Return the model without peft's wrapper; LoRA adapters stay inside its layers."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


def without_question(messages: Messages) -> list[Mapping[str, str]]:
    """Return the messages of a chat with the content of all user messages removed; a system prompt stays."""
    return [{**m, "content": ""} if m["role"] == "user" else m for m in messages]
