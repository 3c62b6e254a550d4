"""Cutting a failed branch: the contexts are the steps without it, the control is as long and did not fail, and the effect is paired."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit import lm, tasks
from toolkit.generate import Sampling, rollouts
from toolkit.methods import failed_branches, failed_steps
from toolkit.steps import Step
from toolkit.types import Rollout, Span

FLAGS = st.lists(st.booleans(), max_size=12)


def made_up(failed: list[bool]) -> tuple[Rollout, list[Step]]:
    """A prompt of 3 tokens, an opening tag, then steps of 1, 2, 3, 1, 2, 3 .. tokens with different ids."""
    sizes = [1 + i % 3 for i in range(len(failed))]
    starts = 4 + np.cumsum([0, *sizes])
    steps = [Step(Span(int(a), int(a) + n), f"step {i}") for i, (a, n) in enumerate(zip(starts[:-1], sizes, strict=True))]
    ids = tuple(range(int(starts[-1]) + 2))
    think = Span(4, int(starts[-1])) if failed else None
    return Rollout("p", 0, ids, 3, think, None, "stop", "", False), steps


@given(FLAGS)
def test_branches_are_the_runs_of_failed_steps(failed):
    found = failed_branches.branches(failed)
    assert sorted(i for branch in found for i in branch) == [i for i, f in enumerate(failed) if f]
    assert all(not failed[a] for branch in found for a in (branch.start - 1, branch.stop) if 0 <= a < len(failed))


@given(FLAGS, st.sampled_from(["first", "last"]), st.integers(0, 5))
def test_each_context_is_the_prompt_and_the_steps_that_are_not_left_out(failed, which, seed):
    rollout, steps = made_up(failed)
    cut = failed_branches.cut(rollout, steps, failed, which=which, seed=seed)
    found = failed_branches.branches(failed)
    if cut is None:
        at = found[0 if which == "first" else -1] if found else range(0)
        fits = [a for a in range(at.start) if a + len(at) <= at.start and not any(failed[a : a + len(at)])]
        assert not found or not fits, "a branch is left out only if no other run of steps before it is as long"
        return
    assert cut.branch == found[0 if which == "first" else -1]
    assert len(cut.other) == len(cut.branch) and not any(failed[i] for i in cut.other) and cut.other.stop <= cut.branch.start
    for form, left_out in {"kept": [], "removed": [*cut.branch], "control": [*cut.other]}.items():
        wanted = [0, 1, 2, 3]
        for i in range(cut.branch.stop):
            if i not in left_out:
                wanted += range(steps[i].span.start, steps[i].span.stop)
        assert cut.context(form) == wanted


def test_the_control_is_drawn_from_all_runs_and_the_seed_decides():
    rollout, steps = made_up([False] * 6 + [True])
    drawn = {failed_branches.cut(rollout, steps, [False] * 6 + [True], seed=s).other for s in range(60)}
    assert drawn == {range(i, i + 1) for i in range(6)}


def test_bad_arguments_are_refused():
    rollout, steps = made_up([False, True])
    with pytest.raises(ValueError, match="2 steps, 1 flags"):
        failed_branches.cut(rollout, steps, [True])
    with pytest.raises(ValueError, match="which='middle'"):
        failed_branches.cut(rollout, steps, [False, True], which="middle")


def test_the_effect_is_the_mean_paired_difference_over_problems():
    rng = np.random.default_rng(0)
    rows = pd.DataFrame(
        [
            (f"p{i}", s, form, rng.random() / 4 + (form == "removed") / 2, 1.0)
            for i in range(12)
            for s in range(1 + i % 2)
            for form in failed_branches.FORMS
        ],
        columns=["problem_id", "sample", "form", "accuracy", "tokens"],
    )
    by_form = {form: part.set_index(["problem_id", "sample"])["accuracy"] for form, part in rows.groupby("form")}
    by_problem = (by_form["removed"] - by_form["kept"]).groupby("problem_id").mean()
    found = failed_branches.effect(rows.sample(frac=1, random_state=0))
    assert found.mean == pytest.approx(by_problem.mean(), abs=1e-12) and found.low > 0.3
    assert failed_branches.effect(rows, "control").low < 0 < failed_branches.effect(rows, "control").high
    assert failed_branches.effect(rows, column="tokens").mean == 0


def test_on_the_tiny_reasoner_a_wrong_line_misleads_and_a_removed_one_does_not():
    """Lines are made wrong here, so that the cause is known: the model goes on from the wrong total."""
    reasoner = lm.load("tiny-reasoner")
    problems = tasks.load("arithmetic", "dev", n=80)
    found = rollouts(reasoner, problems, Sampling(n=1, max_new_tokens=120), progress=False)
    cuts = []
    for r, chain in zip(found, failed_steps.chains(reasoner, found, problems), strict=True):
        if r.correct and len(chain.texts) > 2 and not any(chain.failed) and not any(chain.review):
            ids, last = list(r.token_ids), chain.steps[1]
            digit = last.span.stop - 2  # the last digit of the second line, before its line break
            old = reasoner.text(ids[digit : digit + 1])
            ids[digit] = reasoner.tokenizer.encode(str((int(old) + 3) % 10))[0]
            wrong = replace(r, token_ids=tuple(ids))
            read = failed_steps.chain(reasoner, wrong, failed_steps.arithmetic())
            assert read.failed[:2] == (False, True)
            cuts.append(failed_branches.cut(wrong, read.steps[:2], read.failed[:2]))
    assert len(cuts) > 5 and all(cuts)
    rows = failed_branches.continued(reasoner, cuts, problems, Sampling(n=2, max_new_tokens=120))
    assert len(rows) == 3 * len(cuts)
    assert failed_branches.effect(rows).mean > 0.3
    assert failed_branches.effect(rows, "removed", "control").mean > 0.3
    (kept,) = failed_branches.continued(reasoner, cuts[:1], problems, Sampling(n=2, max_new_tokens=120)).query("form == 'kept'")[
        "accuracy"
    ]
    assert kept == rows["accuracy"][0], "a cut's continuations do not depend on the other cuts"
