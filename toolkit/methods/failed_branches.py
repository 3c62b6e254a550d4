"""What characterizes effective reasoning? The intervention that cuts a failed branch and goes on (2025), arXiv:2509.19284.

``failed_steps`` marks the failed steps of a chain of thought. This module tests whether they *cause* wrong answers. A *failed branch* is a
run of failed steps that no other step interrupts. The chain of thought is cut after the branch, and the model writes the rest anew, from
each of three contexts:

    kept     prompt, steps 1 .. b                              branch: steps a .. b
    removed  prompt, steps 1 .. a-1
    control  prompt, steps 1 .. b without b - a + 1 consecutive steps that did not fail, chosen at random

    effect of the branch = accuracy(removed) - accuracy(kept)          effect of any cut = accuracy(control) - accuracy(kept)

If failed steps mislead the model, the first effect is positive. It exceeds the second if removing text alone is not the reason.

The other intervention of the paper, to select the response with the lowest failed-step fraction, is ``failed_steps.accuracy_of_lowest``.

Deviations:

* In the paper a language model draws a graph of the steps, and a branch may hold steps that depend on a failed one. Here a branch holds only
  the steps that are marked as failed; the marks are an argument.
* The paper also replaces the branch with a summary. Here nothing replaces it.
* The control is ours. A branch with no equally long run of other steps before it has no control, and is left out.
* The paper tests the first and the last branch of a chain. Which responses it takes we could not read: here the caller chooses.

Units and signs: accuracies from 0 to 1, effects from -1 to 1; lengths in tokens. Cost: three times ``sampling.n`` continuations per branch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import pandas as pd

from toolkit import generate, stats
from toolkit.generate import Sampling
from toolkit.lm import LM, Condition
from toolkit.steps import Step
from toolkit.types import Problem, Rollout, problems_by_id

FORMS = ("kept", "removed", "control")


def branches(failed: Sequence[bool]) -> list[range]:
    """Return the failed branches of a chain of thought, in order: the longest runs of failed steps, as ranges of step indices from 0.

    >>> branches([False, True, True, False, True])
    [range(1, 3), range(4, 5)]

    Args:
        failed: For each step, True if it failed.
    """
    runs = [[i for i, _ in run] for is_failed, run in groupby(enumerate(failed), lambda pair: bool(pair[1])) if is_failed]
    return [range(run[0], run[-1] + 1) for run in runs]


@dataclass(frozen=True)
class Cut:
    """A chain of thought that is cut after a failed branch, with the contexts from which it can go on.

    Attributes:
        rollout: The response with the chain of thought.
        steps: Its steps up to the end of the branch.
        branch: Indices of the steps of the failed branch, which are the last ones.
        other: Indices of as many consecutive steps that did not fail, for the control.
    """

    rollout: Rollout
    steps: tuple[Step, ...]
    branch: range
    other: range

    def context(self, form: str) -> list[int]:
        """Return the token ids to go on from: prompt and steps, without the branch if the form is ``"removed"``.

        Args:
            form: ``"kept"`` (all steps), ``"removed"`` (without the failed branch) or ``"control"`` (without the other steps).

        Raises:
            KeyError: Another form.
        """
        left_out = {"kept": range(0), "removed": self.branch, "control": self.other}[form]
        ids = self.rollout.token_ids
        kept = (step for i, step in enumerate(self.steps) if i not in left_out)
        return [*ids[: self.steps[0].span.start], *(t for step in kept for t in ids[step.span.start : step.span.stop])]


def cut(rollout: Rollout, steps: Sequence[Step], failed: Sequence[bool], *, which: str = "last", seed: int = 0) -> Cut | None:
    """Return the chain of thought of a rollout, cut after its first or last failed branch; ``None`` if it has none, or no control.

    Args:
        rollout: The rollout.
        steps: Steps of its thinking, from ``steps.think_steps`` or ``failed_steps.Chain.steps``.
        failed: For each step, True if it failed.
        which: Branch to cut after: ``"first"`` or ``"last"``.
        seed: Seed of the choice of the control's steps. It also depends on the problem and the sample.

    Raises:
        ValueError: ``steps`` and ``failed`` have different lengths, or ``which`` is unknown.
    """
    if len(steps) != len(failed) or which not in ("first", "last"):
        raise ValueError(
            f"{len(steps)} steps, {len(failed)} flags, which={which!r}: need one flag per step, and which='first' or 'last'."
        )
    found = branches(failed)
    if not found:
        return None
    branch = found[0 if which == "first" else -1]
    starts = [a for a in range(branch.start - len(branch) + 1) if not any(failed[a : a + len(branch)])]
    if not starts:
        return None
    start = random.Random(f"{rollout.problem_id}-{rollout.sample}-{which}-{seed}").choice(starts)
    return Cut(rollout, tuple(steps[: branch.stop]), branch, range(start, start + len(branch)))


def continued(target: LM | Condition, cuts: Sequence[Cut], problems: Sequence[Problem], sampling: Sampling) -> pd.DataFrame:
    """Let the model go on from the three contexts of every cut chain of thought. Return a table with one row per cut and form.

    Columns: ``problem_id, sample`` (of the rollout that was cut); ``form`` (``"kept"``, ``"removed"`` or ``"control"``); ``accuracy`` (share
    of correct continuations, 0 to 1); ``tokens`` (their mean length, in tokens). The forms of one cut have the same random numbers.

    Args:
        target: Model, or model with interventions, that goes on.
        cuts: From ``cut``, at least one.
        problems: Problems. That of every cut must be among them.
        sampling: How continuations are sampled; ``n`` of them per form.

    Raises:
        KeyError: The problem of a cut is not among the problems.
        ValueError: No cuts.
    """
    by_id = problems_by_id(problems, [c.rollout for c in cuts])
    contexts = [(by_id[c.rollout.problem_id], c.context(form)) for c in cuts for form in FORMS]
    sampled = generate.continuations(target, contexts, sampling)
    rows = []
    for i, (c, form) in enumerate((c, form) for c in cuts for form in FORMS):
        own = sampled[i * sampling.n : (i + 1) * sampling.n]
        accuracy, tokens = np.mean([r.correct for r in own]), np.mean([r.response_tokens for r in own])
        rows.append((c.rollout.problem_id, c.rollout.sample, form, float(accuracy), float(tokens)))
    return pd.DataFrame(rows, columns=["problem_id", "sample", "form", "accuracy", "tokens"])


def effect(
    rows: pd.DataFrame, form: str = "removed", minus: str = "kept", *, column: str = "accuracy", seed: int = 0
) -> stats.Estimate:
    """Return the mean difference between two forms of context, paired by cut, with a 95 % interval over problems.

    Args:
        rows: From ``continued``.
        form: Form whose values count with a plus sign.
        minus: Form whose values are subtracted.
        column: ``"accuracy"`` or ``"tokens"``.
        seed: Seed of the bootstrap.
    """
    wide = rows.pivot(index=["problem_id", "sample"], columns="form", values=column)
    problems = wide.index.get_level_values("problem_id").to_numpy(str)
    return stats.over_problems((wide[form] - wide[minus]).to_numpy(float), problems, seed=seed)
