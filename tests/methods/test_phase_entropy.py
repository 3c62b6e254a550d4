"""Entropies equal the naive softmax and what sampling records; phases are PEAR's; filtering keeps what it says and answers from it."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from families import FAMILIES
from hypothesis import given
from hypothesis import strategies as st

from toolkit import baselines, collect, edits, entropies, evaluate, figures, steps
from toolkit.entropies import NoEntropiesError
from toolkit.generate import Sampling, rollouts
from toolkit.jobs.entropy import entropy_tables
from toolkit.lm import Condition, NoThinkTagsError, ThinkTags
from toolkit.methods import failed_steps, phase_entropy
from toolkit.methods.phase_entropy import DROPS, PhaseMeans
from toolkit.spans import spans
from toolkit.types import Direction, Problem, Rollout, Span


def with_entropies(r: Rollout, seed: int = 0) -> Rollout:
    """Made-up entropies, all different."""
    return replace(r, entropies=tuple(np.random.default_rng(seed).permutation(r.response_tokens) / 10 + 0.05))


def of_lengths(rollout_of, lengths, *, closed: bool = True) -> list[Rollout]:
    return [rollout_of(n, seed=i, prompt=3 + 4 * (i % 3), name=f"p{i}", closed=closed) for i, n in enumerate(lengths)]


@contextmanager
def widest_logits(lm):
    """The largest number of logits any pass returned, by a raw hook."""
    seen = [0]
    handle = lm.model.register_forward_hook(lambda module, args, output: seen.append(output.logits.numel()))
    try:
        yield seen
    finally:
        handle.remove()


# --- entropies -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_entropy_is_the_naive_softmaxs_in_float64(any_lm, rollout_of, temperature):
    """On every family: each rollout alone in one plain pass, against a batch of unequal prompts and responses cut into chunks."""
    found = of_lengths(rollout_of, [3, 29, 11, 0, 18])
    measured = entropies.with_entropies(any_lm, found, temperature=temperature, chunk=5 * 103 * 7)
    for r, m in zip(found, measured, strict=True):
        with torch.inference_mode():
            logits = any_lm.model(input_ids=torch.tensor([r.token_ids])).logits[0, r.prompt_len - 1 : -1].double() / temperature
        p = logits.exp() / logits.exp().sum(dim=-1, keepdim=True)
        assert m.entropies == pytest.approx((-(p * p.log()).sum(dim=-1)).tolist(), abs=1e-5)
        own = p.gather(1, torch.tensor(r.token_ids[r.prompt_len :])[:, None]).log().squeeze(1)
        assert m.logprobs == pytest.approx(own.tolist(), abs=2e-4)
        assert replace(m, entropies=None, logprobs=None) == r


@pytest.mark.parametrize("name", [*FAMILIES, "tiny-reasoner"])
def test_entropies_equal_those_recorded_at_sampling(name, model_of, problems_of):
    lm = model_of(name)
    found = rollouts(lm, problems_of(3), Sampling(n=2, temperature=0.8, max_new_tokens=24, details=True), progress=False)
    bare = [replace(r, entropies=None, logprobs=None) for r in found]
    for r, m in zip(found, entropies.with_entropies(lm, bare, temperature=0.8), strict=True):
        assert m.entropies == pytest.approx(r.entropies, abs=1e-4)
        assert m.logprobs == pytest.approx(r.logprobs, abs=1e-3)


@pytest.mark.parametrize("during", ["all", "think", "answer"])
def test_a_conditions_interventions_act_in_their_phase(llama, rollout_of, during):
    vector = torch.randn(llama.layout.n_layers, llama.layout.d_model, generator=torch.Generator().manual_seed(0))
    direction = Direction(vector, "resid_mid", "think", "by hand", 1, 1, llama.provenance())
    act = edits.steering(direction, 0.5, during=during)
    found = of_lengths(rollout_of, [9, 4, 14])
    base, steered = (
        entropies.with_entropies(llama, found),
        entropies.with_entropies(Condition(llama, (act,)), found, chunk=600),
    )
    for r, b, m in zip(found, base, steered, strict=True):
        logits = collect.logits(llama, r, act).double()
        wanted = torch.special.entr(logits.softmax(-1)).sum(-1)
        assert m.entropies == pytest.approx(wanted.tolist(), abs=1e-4)
        assert m.entropies != pytest.approx(b.entropies, abs=1e-3)


def test_an_intervention_on_the_logits_counts(tiny, problems_of):
    """Suppressed words leave entropy finite, and are out of the distribution."""
    quiet = Condition(tiny, (baselines.Suppress(("=",)),))
    found = rollouts(tiny, problems_of(2), Sampling(max_new_tokens=20, details=True), progress=False)
    changed = entropies.with_entropies(quiet, found)
    assert all(np.isfinite(m.entropies).all() for m in changed)
    assert any(m.entropies != pytest.approx(r.entropies, abs=1e-3) for r, m in zip(found, changed, strict=True))


@pytest.mark.parametrize("chunk", [1, 5 * 103, 3000])
def test_no_more_logits_than_the_chunk_are_ever_held(llama, rollout_of, chunk):
    found = of_lengths(rollout_of, [40, 41, 42, 43, 44])
    with widest_logits(llama) as seen:
        entropies.with_entropies(llama, found, chunk=chunk)
    assert max(seen) <= max(chunk, len(found) * llama.vocab_size)  # at least one position a row


def test_chunks_change_nothing_and_order_is_kept(model_of, rollout_of):
    lm, found = model_of("gemma2"), of_lengths(rollout_of, [30, 2, 17, 0, 5])
    whole = entropies.with_entropies(lm, found)
    assert [r.problem_id for r in whole] == [r.problem_id for r in found]
    for chunk in (1, 1500):
        for a, b in zip(whole, entropies.with_entropies(lm, found, chunk=chunk), strict=True):
            assert a.entropies == pytest.approx(b.entropies, abs=1e-5)
    assert entropies.with_entropies(lm, []) == []


def test_batches_are_halved_when_memory_runs_out(llama, rollout_of, monkeypatch):
    found, tried, scores = of_lengths(rollout_of, [8, 5, 7, 6, 9]), [], entropies._scores

    def hungry(lm, batch, *rest):
        tried.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("made up")
        return scores(lm, batch, *rest)

    wanted = entropies.with_entropies(llama, found)
    monkeypatch.setattr(entropies, "_scores", hungry)
    for a, b in zip(wanted, entropies.with_entropies(llama, found), strict=True):
        assert a.entropies == pytest.approx(b.entropies, abs=1e-5)
    assert max(tried) == 5


def test_positions_stay_within_a_models_learned_ones(model_of, rollout_of):
    """A long prompt with a short response beside a short prompt with a long one, together longer than gpt2's 512 positions."""
    found = [rollout_of(2, prompt=480, name="a"), rollout_of(470, prompt=3, name="b")]
    together, alone = (entropies.with_entropies(model_of("gpt2"), rows) for rows in (found, found[:1]))
    assert together[0].entropies == pytest.approx(alone[0].entropies, abs=1e-5)


def test_what_cannot_be_measured_is_named(llama, rollout_of):
    with pytest.raises(ValueError, match=r"temperature=0\.0.*above 0"):
        entropies.with_entropies(llama, [rollout_of(3)], temperature=0.0)
    for function in (phase_entropy.table, phase_entropy.by_phase, phase_entropy.by_position):
        with pytest.raises(NoEntropiesError, match=r"problem 'p' carries no entropies.*details=True.*with_entropies"):
            function([rollout_of(3)])


# --- phases --------------------------------------------------------------------------------------------------


def golden(entropies: tuple[float, ...], k: int | None) -> Rollout:
    """A response whose closing tag is token k, as in the oracle; ``None``: never closed."""
    n = len(entropies)
    think, answer = (Span(2, 2 + n), None) if k is None else (Span(2, 2 + k), Span(3 + k, 2 + n))
    return Rollout("p", 0, (9,) * (2 + n), 2, think, answer, "stop", "", True, entropies=entropies)


@pytest.mark.parametrize(
    ("entropies", "k", "think", "answer", "reward"),
    [
        ((0.4, 0.6, 9.0, 0.1, 0.3), 2, 0.5, 0.2, 0.7),
        ((0.4, 0.6), None, 0.5, None, 0.5),
        ((0.1, 0.1, 9.0, 0.5), 2, 0.1, 0.5, 1.0),
        ((9.0, 0.5), 0, None, 0.5, 1.0),
    ],
)
def test_golden_values_of_pear(entropies, k, think, answer, reward):
    means = phase_entropy.phase_means(golden(entropies, k))
    assert [means.think, means.answer] == [None if v is None else pytest.approx(v) for v in (think, answer)]
    assert 1.0 - means.penalty() == pytest.approx(reward)


def test_penalty_weighs_the_answer():
    assert PhaseMeans(0.5, 0.2).penalty(alpha=2.0) == pytest.approx(0.1)
    assert PhaseMeans(None, 0.2).penalty() == 0.0


def test_only_the_closing_tag_is_in_no_phase(llama, rollout_of, token):
    """The opening tag the model wrote is thinking, the end of sequence is answer: every other response token is in one phase."""
    r = with_entropies(rollout_of(6))
    means, h = phase_entropy.phase_means(r), np.array(r.entropies)
    tag = r.token_ids[r.prompt_len :].index(token("</think>"))
    assert means.think == pytest.approx(h[:tag].mean()) and means.answer == pytest.approx(h[tag + 1 :].mean())
    total = tag * means.think + h[tag] + (len(h) - tag - 1) * means.answer
    assert total == pytest.approx(h.sum())


def test_without_tags_the_whole_response_is_one_phase(llama, rollout_of):
    r = with_entropies(rollout_of(6))
    for tags in (ThinkTags(None, None), None):
        think, answer = spans(replace(llama, tags=tags), r.token_ids, r.prompt_len, ended=True)
        means = phase_entropy.phase_means(replace(r, think=think, answer=answer))
        whole = pytest.approx(np.mean(r.entropies))
        assert (means.think, means.answer) == ((whole, None) if tags else (None, whole))


def test_phase_table_is_over_problems_and_pairs_within_rollouts(rollout_of):
    found = [with_entropies(r, i) for i, r in enumerate(of_lengths(rollout_of, [4, 9, 14]))]
    found += [with_entropies(replace(found[0], sample=1), 9), with_entropies(rollout_of(5, name="open", closed=False))]
    rows = phase_entropy.by_phase(found).set_index("phase")
    means = [phase_entropy.phase_means(r) for r in found]
    think = [np.mean([means[0].think, means[3].think]), means[1].think, means[2].think, means[4].think]
    gap = [m.think - m.answer for m in means[:4]]
    assert rows.loc["think", "mean"] == pytest.approx(np.mean(think))
    assert rows.loc["think - answer", "mean"] == pytest.approx(np.mean([np.mean([gap[0], gap[3]]), gap[1], gap[2]]))
    assert rows["rollouts"].tolist() == [5, 4, 4]
    assert (rows["low"] <= rows["mean"]).all() and (rows["mean"] <= rows["high"]).all()


# --- positions and steps -------------------------------------------------------------------------------------


def test_entropy_by_position_follows_the_span(rollout_of):
    """Entropy equal to relative position comes back as the diagonal, whatever the lengths."""
    found = []
    for r in of_lengths(rollout_of, [40, 80, 200]):
        h = np.full(r.response_tokens, 9.0)  # tags and answer must not leak in
        n = len(r.think)
        h[r.think.start - r.prompt_len :][:n] = (np.arange(n) + 0.5) / n
        found.append(replace(r, entropies=tuple(h.tolist())))
    rows = phase_entropy.by_position(found, bins=10)
    assert rows["mean"].tolist() == pytest.approx(rows["position"].tolist())
    assert rows["rollouts"].tolist() == [3] * 10


@given(st.integers(1, 40), st.integers(1, 25))
def test_a_token_stands_for_its_share_of_the_span_however_few_there_are(rollout_of, n, bins):
    """Against a fine comb: the entropy of the token that covers each point of the span."""
    r = with_entropies(rollout_of(n))
    h = np.array(r.entropies)[r.think.start - r.prompt_len :][:n]
    points = (np.arange(n * bins) + 0.5) / bins  # in tokens; each bin holds n points
    wanted = h[points.astype(int)].reshape(bins, n).mean(axis=1)
    rows = phase_entropy.by_position([r], bins=bins)
    assert rows["mean"].tolist() == pytest.approx(wanted.tolist())
    assert rows["rollouts"].tolist() == [1] * bins and rows["mean"].mean() == pytest.approx(h.mean())


def test_nothing_to_look_at_is_named(rollout_of):
    silent = with_entropies(rollout_of(0))
    with pytest.raises(NoThinkTagsError, match="None of the 1 rollouts has a think token"):
        phase_entropy.by_position([silent])
    with pytest.raises(NoThinkTagsError, match="None of the 1 rollouts"):
        phase_entropy.by_step([silent], lambda r: [])
    alone = with_entropies(rollout_of(4))
    with pytest.raises(ValueError, match=r"reached in responses to 5 problems, only to 1"):
        phase_entropy.by_step([alone], lambda r: [steps.Step(r.think, "")])
    with pytest.raises(ValueError, match="bins=0"):
        phase_entropy.by_position([silent], bins=0)


def test_step_entropies_sum_to_the_span(tiny, problems_of):
    found = rollouts(tiny, problems_of(4), Sampling(n=2, max_new_tokens=80, details=True), progress=False)
    found = [r for r in found if r.think_tokens]
    rows = phase_entropy.step_entropy(found, lambda r: steps.think_steps(tiny, r))
    for r in found:
        own = rows[(rows["problem_id"] == r.problem_id) & (rows["sample"] == r.sample)]
        h = entropies.entropies_of(r)[r.think.start - r.prompt_len : r.think.stop - r.prompt_len]
        assert own["entropy"].sum() == pytest.approx(h.sum())
        assert own["tokens"].sum() == r.think_tokens
        assert "".join(own["text"]) == tiny.text(r.token_ids[r.think.start : r.think.stop])
    by_step = phase_entropy.by_step(found, lambda r: steps.think_steps(tiny, r), at_least=1)
    first = rows[rows["step"] == 0].groupby("problem_id")["mean"].mean()
    assert by_step.loc[0, "mean"] == pytest.approx(first.mean()) and by_step["step"].tolist()[0] == 1


def test_pooled_and_within_question_correlation_may_differ_in_sign(rollout_of):
    """Harder questions are longer and less certain; within a question the longer response is the surer one."""
    rng, found = np.random.default_rng(0), []
    for i in range(20):
        for s in range(5):
            think = int(10 + 6 * i + rng.integers(0, 12))
            r = replace(rollout_of(think, name=f"p{i}"), sample=s)
            level = 0.1 + 0.3 * i - 0.04 * (think - 10 - 6 * i) + 0.5
            found.append(replace(r, entropies=(level,) * r.response_tokens))
    rows = phase_entropy.correlations(phase_entropy.table(found), times=200).set_index(["scope", "kind"])
    for kind in ("pearson", "spearman"):
        assert rows.loc[("pooled", kind), "low"] > 0.5
        assert rows.loc[("within", kind), "high"] < -0.9
    assert set(rows["problems"]) == {20} and set(rows["rollouts"]) == {100}


# --- entropy filtering ---------------------------------------------------------------------------------------


def parts(r: Rollout, ids: list[int]) -> list[int]:
    """The think tokens kept, after checking what surrounds them."""
    head, tag = list(r.token_ids[: r.think.start]), list(r.token_ids[r.think.stop : r.answer.start])
    assert ids[: len(head)] == head and ids[len(ids) - len(tag) :] == tag
    return ids[len(head) : len(ids) - len(tag)]


@given(st.integers(1, 30), st.floats(0, 1, allow_subnormal=False), st.sampled_from(DROPS))
def test_filtering_keeps_as_many_tokens_as_it_says_in_their_order(rollout_of, n, keep, drop):
    r = with_entropies(rollout_of(n))
    numbered = replace(r, token_ids=(*r.token_ids[: r.think.start], *range(1000, 1000 + n), *r.token_ids[r.think.stop :]))
    kept = parts(numbered, phase_entropy.filtered_prompt(numbered, keep, drop))
    assert len(kept) == round(keep * n)
    assert kept == sorted(set(kept)) and set(kept) <= set(range(1000, 1000 + n))
    h = np.array(r.entropies[r.think.start - r.prompt_len :][:n])
    inside = [i - 1000 for i in kept]
    if drop == "entropy" and 0 < len(kept) < n:
        assert h[inside].max() < np.delete(h, inside).min()
    if drop == "truncate":
        assert inside == list(range(len(kept)))


def test_random_drop_depends_on_the_rollout_and_the_seed_alone(rollout_of):
    a, b = rollout_of(40, name="a"), replace(rollout_of(40, name="a"), sample=1)
    assert phase_entropy.filtered_prompt(a, 0.5, "random") == phase_entropy.filtered_prompt(a, 0.5, "random")
    drawn = {tuple(phase_entropy.filtered_prompt(r, 0.5, "random", seed=s)) for r in (a, b) for s in (0, 1)}
    assert len(drawn) == 4


def closed_rollouts(problems: list[Problem], rollout_of) -> list[Rollout]:
    """Made-up closed rollouts of given problems."""
    return [with_entropies(rollout_of(12 + i, name=p.id, seed=i), i) for i, p in enumerate(problems)]


def test_a_rollout_of_an_unknown_problem_is_named(llama, problems_of, rollout_of):
    """The same error wherever rollouts are matched with their problems."""
    problems = problems_of(3)
    found = closed_rollouts(problems, rollout_of)
    expected = f"1 problems of the rollouts are not among the 2 given, such as {problems[2].id!r}: pass the problems"
    for match in (
        lambda: phase_entropy.filtering_experiment(llama, found, problems[:2]),
        lambda: failed_steps.chains(llama, found, problems[:2]),
        lambda: evaluate.rollout_table(found, problems[:2], llama.tags),
    ):
        with pytest.raises(KeyError, match=expected):
            match()


def test_the_experiment_grades_every_way_and_share(llama, problems_of, rollout_of):
    problems = problems_of(3)
    found = [*closed_rollouts(problems, rollout_of), with_entropies(rollout_of(8, name="p0", closed=False))]
    rows = phase_entropy.filtering_experiment(
        llama, found, problems, keeps=(1.0, 0.5), sampling=Sampling(temperature=0.0, max_new_tokens=5)
    )
    assert len(rows) == len(DROPS) * 2 * 3  # the open one is left out
    assert set(rows["kept_tokens"]) == {12, 13, 14, 6, 7}
    whole = rows[rows["keep"] == 1.0].groupby("problem_id")
    assert (whole["answer_tokens"].nunique() == 1).all() and (whole["correct"].nunique() == 1).all()
    summary = phase_entropy.filtering_summary(rows)
    assert len(summary) == len(DROPS) * 2
    accuracy = rows.groupby(["drop", "keep"])["correct"].mean()
    assert summary["accuracy"].tolist() == pytest.approx(accuracy.tolist())
    assert set(phase_entropy.filtering_effects(rows)["against"]) == {"random", "truncate", "whole"}


def test_dropping_by_entropy_is_compared_with_each_control_response_by_response():
    """Right with the lowest entropies and with the end cut off, by chance in a quarter, and with all of it in half of the problems."""
    right = {"entropy": lambda i: True, "truncate": lambda i: True, "random": lambda i: i < 3, "whole": lambda i: i < 6}
    plan = [(d, 0.5, d) for d in DROPS] + [(d, 1.0, "whole") for d in DROPS]
    rows = pd.DataFrame(
        [(d, keep, f"p{i}", s, 5, right[name](i), 4) for d, keep, name in plan for i in range(12) for s in (0, 1)],
        columns=["drop", "keep", "problem_id", "sample", "kept_tokens", "correct", "answer_tokens"],
    )
    effects = phase_entropy.filtering_effects(rows.sample(frac=1, random_state=0)).set_index("against")
    assert effects["difference"].to_dict() == {"random": 0.75, "truncate": 0.0, "whole": 0.5}
    assert effects.loc["truncate", ["low", "high"]].tolist() == [0.0, 0.0]
    assert 0.3 < effects.loc["random", "low"] < 0.75 < effects.loc["random", "high"] <= 1.0
    assert set(phase_entropy.filtering_effects(rows[rows["keep"] < 1])["against"]) == {"random", "truncate"}


def test_marked_steps_are_compared_within_their_own_responses():
    """Responses differ in level; within each the marked steps lie 0.2 higher. One that has only marked steps does not count."""
    rows = [(f"p{i}", s, step, i + 0.2 * (step == s)) for i in range(6) for s in (0, 1) for step in range(3)]
    table = pd.DataFrame([*rows, ("alone", 0, 0, 99.0)], columns=["problem_id", "sample", "step", "mean"])
    marked = [*(step == s for _, s, step, _ in rows), True]
    found = phase_entropy.by_mark(table, marked).set_index("steps")
    assert found.loc["marked - others", ["mean", "low", "high"]].tolist() == pytest.approx([0.2] * 3)
    assert found.loc["others", "mean"] == pytest.approx(2.5) and set(found["rollouts"]) == {12}
    assert phase_entropy.by_mark(table, [False] * len(table)).empty


def test_what_cannot_be_filtered_is_named(llama, rollout_of, problems_of):
    r = rollout_of(5)
    with pytest.raises(NoEntropiesError):
        phase_entropy.filtered_prompt(r, 0.5)
    with pytest.raises(ValueError, match=r"keep=1\.5, drop='entropy'"):
        phase_entropy.filtered_prompt(r, 1.5)
    never = rollout_of(5, closed=False)
    with pytest.raises(NoThinkTagsError, match="no think span closed by a tag"):
        phase_entropy.filtered_prompt(never, 0.5, "truncate")
    with pytest.raises(NoThinkTagsError, match="None of the 1 rollouts"):
        phase_entropy.filtering_experiment(llama, [never], problems_of(1))
    assert phase_entropy.filterable([r, never, rollout_of(0)]) == [r]
    assert math.isnan(phase_entropy.table([with_entropies(never)])["answer_entropy"][0])


# --- figures -------------------------------------------------------------------------------------------------


def test_figures_show_the_numbers_they_are_given(llama, rollout_of, problems_of):
    problems = problems_of(6)
    found = [replace(r, sample=s) for s in (0, 1) for r in closed_rollouts(problems, rollout_of)]
    rows = phase_entropy.table(found)
    rows["entropy"] += rows["sample"]
    phases = phase_entropy.by_phase(found)
    bars = figures.phase_entropy({"base": phases}).data[0]
    assert list(bars.y) == phases["mean"].tolist()[:2] and list(bars.x) == ["think", "answer"]
    position = phase_entropy.by_position(found, bins=4)
    line = figures.entropy_by_position({"a": position, "b": position}).data
    assert len(line) == 4 and list(line[1].y) == position["mean"].tolist()
    by_step = phase_entropy.by_step(found, lambda r: [steps.Step(r.think, "")])
    assert list(figures.entropy_by_position({"a": by_step}, by="step").data[1].x) == [1]
    found_r = phase_entropy.correlations(rows, times=20)
    pooled, within = figures.correlation(rows, found_r).data
    assert list(pooled.x) == rows["entropy"].tolist()
    assert np.mean(within.x) == pytest.approx(0.0) and np.ptp(within.y) == pytest.approx(0.0)
    summary = phase_entropy.filtering_summary(
        phase_entropy.filtering_experiment(
            llama, found[:6], problems, keeps=(0.5, 1.0), sampling=Sampling(temperature=0.0, max_new_tokens=3)
        )
    )
    lines = figures.entropy_filtering(summary).data
    assert [list(curve.x) for curve in lines] == [[0.5, 1.0]] * 3


def test_a_step_that_is_only_the_result_of_a_tool_has_no_mark():
    rng = np.random.default_rng(0)
    responses = [
        Rollout(p, s, tuple(range(11)), 2, Span(3, 9), Span(10, 11), "stop", "", bool(s), entropies=tuple(rng.random(9).tolist()), results=(Span(5, 7),))
        for p in "ab"
        for s in range(2)
    ]  # fmt: skip
    spans_of_steps = (Span(3, 5), Span(5, 7), Span(7, 9))
    chain = failed_steps.Chain(("x\n", "result\n", "wait\n"), (True, False, False), (False, False, True), spans_of_steps)
    marked = entropy_tables(responses, [chain] * 4).marked.set_index(["mark", "steps"])["mean"]
    h = {(r.problem_id, r.sample): np.array(r.entropies) for r in responses}
    for mark, part in {"failed": slice(1, 3), "re-check": slice(5, 7)}.items():
        other = slice(5, 7) if mark == "failed" else slice(1, 3)
        expected = np.mean([values[part].mean() - values[other].mean() for values in h.values()])
        assert marked.loc[mark, "marked - others"] == pytest.approx(expected)
