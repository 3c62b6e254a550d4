"""Going on from token ids: the same draws as from the prompt they are, each prompt by itself, spans as in any response."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from toolkit import baselines, tasks
from toolkit.generate import Sampling, continuations, rollouts
from toolkit.lm import Condition, ThinkTags
from toolkit.methods import phase_entropy
from toolkit.spans import ANSWER, PROMPT
from toolkit.types import Problem, Rollout

SAMPLING = Sampling(n=2, max_new_tokens=24, seed=5, details=True)


def starts(problems: list[Problem], rollout_of) -> list[tuple[Problem, list[int]]]:
    """Beginnings of made-up rollouts, of unequal length."""
    made = [rollout_of(12 + i, name=p.id, seed=i) for i, p in enumerate(problems)]
    return [(p, list(r.token_ids[: 6 + 3 * i])) for i, (p, r) in enumerate(zip(problems, made, strict=True))]


def response(r: Rollout) -> tuple[int, ...]:
    return r.token_ids[r.prompt_len :]


def close_to(found: Rollout, wanted: Rollout) -> bool:
    """Equal, but for the rounding of log-probabilities and entropies in batches of another width."""
    assert found.entropies == pytest.approx(wanted.entropies, abs=1e-4)
    return replace(found, logprobs=None, entropies=None) == replace(wanted, logprobs=None, entropies=None)


def test_going_on_from_a_prompts_own_tokens_is_sampling_from_the_prompt(any_lm, problems_of):
    """Same seed, problem and sample: the same rollout, spans, grade and entropies included."""
    problems = problems_of(4)
    wanted = rollouts(any_lm, problems, SAMPLING, progress=False)
    found = continuations(any_lm, [(p, any_lm.prompt_ids(p.messages)) for p in problems], SAMPLING)
    assert all(close_to(f, w) for f, w in zip(found, wanted, strict=True))


def test_prompts_neither_depend_on_their_order_nor_on_one_another(llama, problems_of, rollout_of):
    asked = starts(problems_of(5), rollout_of)
    wanted = [continuations(llama, [one], SAMPLING) for one in asked]
    order = list(range(5))
    random.Random(0).shuffle(order)
    found = continuations(llama, [asked[i] for i in order], replace(SAMPLING, batch_size=3))
    for place, i in enumerate(order):
        assert all(close_to(f, w) for f, w in zip(found[2 * place : 2 * place + 2], wanted[i], strict=True))


def test_prompts_of_one_problem_share_their_random_numbers(llama, problems_of, rollout_of):
    """Two prompts of a problem may both be given; equal ones are answered equally, sample by sample."""
    (problem, ids), (_, others) = starts(problems_of(2), rollout_of)
    found = continuations(llama, [(problem, ids), (problem, others), (problem, ids)], SAMPLING)
    assert [(r.problem_id, r.sample, r.prompt_len) for r in found] == [
        (problem.id, s, len(i)) for i in (ids, others, ids) for s in (0, 1)
    ]
    assert [response(r) for r in found[:2]] == [response(r) for r in found[4:]]
    assert response(found[0]) != response(found[1])


def test_tokens_are_those_of_a_plain_greedy_loop(llama, problems_of, rollout_of):
    """Without a cache, prompts of unequal length in one batch."""
    asked = starts(problems_of(3), rollout_of)
    found = continuations(llama, asked, Sampling(n=2, temperature=0.0, max_new_tokens=6))
    assert [(r.problem_id, r.sample) for r in found] == [(p.id, s) for p, _ in asked for s in (0, 1)]
    for (_, prompt), r in zip(asked, found[::2], strict=True):
        ids = list(prompt)
        for _ in range(6):
            ids.append(int(llama.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in llama.eos_ids:
                break
        assert list(r.token_ids) == ids and r.prompt_len == len(prompt)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "tiny-reasoner"])
def test_after_all_of_its_thinking_a_model_answers_as_it_went_on(name, model_of, problems_of, token):
    """Greedy rollouts, forced to think and to close: from all of their thinking the same answer follows."""
    lm, problems = model_of(name), problems_of(4)

    def opens(lm, reader, drawn):
        return [token("<think>")] if reader.phase == PROMPT and not reader.forced else None

    greedy = Sampling(temperature=0.0, max_new_tokens=30)
    forced = Condition(lm, rules=(opens, baselines.Budget(9)))
    found = phase_entropy.filterable(rollouts(forced, problems, greedy, progress=False))
    assert found
    by_id = {p.id: p for p in problems}
    asked = [(by_id[r.problem_id], phase_entropy.filtered_prompt(r, 1.0, "truncate")) for r in found]
    for r, a in zip(found, continuations(lm, asked, greedy), strict=True):
        own = r.token_ids[r.answer.start :]
        assert response(a)[: len(own)] == own
        assert a.prompt_len == r.answer.start and a.problem_id == r.problem_id and a.think_tokens == 0
        if r.finish == "stop":
            assert (a.finish, a.correct) == ("stop", r.correct)


@pytest.mark.parametrize("opens", ["<think>", None])
def test_after_a_closing_tag_the_response_is_answer_also_where_no_tag_opens_thinking(opens, tiny):
    """Thinking that starts with the response has been closed all the same, for spans, grades and interventions alike."""
    lm, (problem,) = replace(tiny, tags=ThinkTags(opens, "</think>")), tasks.load("arithmetic", "test", 1)
    ids = [*lm.prompt_ids(problem.messages), *lm.tokenizer.encode(f"<think>={problem.answer}\n</think>", add_special_tokens=False)]
    phases = []

    def looks(lm, reader, drawn):
        phases.append(reader.phase)

    (r,) = continuations(Condition(lm, rules=(looks,)), [(problem, ids)], Sampling(temperature=0.0, max_new_tokens=12))
    assert r.closed and r.think_tokens == 0 and r.answer.start == len(ids)
    assert r.correct
    assert set(phases) == {ANSWER}


def test_what_was_asked_in_other_words_stays_as_given_and_rules_act(tiny, problems_of):
    """A condition's change of the prompt cannot change tokens; what it forbids stays forbidden."""
    problem = problems_of(1)[0]
    ids = tiny.prompt_ids(problem.messages)
    plain = continuations(tiny, [(problem, ids)], SAMPLING)
    asked = continuations(Condition(tiny, ask=baselines.Instruction("hurry")), [(problem, ids)], SAMPLING)
    quiet = continuations(Condition(tiny, (baselines.Suppress(("+",)),)), [(problem, ids)], SAMPLING)
    assert asked == plain
    assert all("+" in r.text for r in plain) and not any("+" in r.text for r in quiet)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], r"'p0' cannot go on from token ids \[\]: give some, each in 0\.\.102"),
        ([5, 103, -1], r"\[103, -1\]"),
        ([5] * 510, "longest prompt has 510 tokens.*max_new_tokens=24.*context of 512"),
    ],
)
def test_ids_that_cannot_be_gone_on_from_are_named(ids, message, llama, problems_of):
    with pytest.raises(ValueError, match=message):
        continuations(llama, [(problems_of(1)[0], ids)], SAMPLING)
    with pytest.raises(ValueError, match="list is empty"):
        continuations(llama, [], SAMPLING)
