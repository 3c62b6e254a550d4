"""Steering acts exactly where it says: per phase, per row, under KV cache, left padding, batches, beams; and its algebra holds."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

from toolkit import collect, edits, hooks, masks, phases, spans
from toolkit.baselines import Budget, Instruction, SecondLook, Suppress
from toolkit.edits import steering
from toolkit.exits import EarlyExit, RandomExit
from toolkit.generate import Sampling, rollouts
from toolkit.lm import LM, Condition, NoThinkTagsError, ThinkTags
from toolkit.methods import crest
from toolkit.phases import Scope
from toolkit.sites import Site
from toolkit.store import WrongModelError
from toolkit.types import Direction, HeadEdit, Plan, Rollout

SAMPLING = Sampling(n=3, max_new_tokens=26, seed=5, details=True)
SCOPES = {
    "all": Scope(),
    "prompt": Scope(("prompt",)),
    "think": Scope(("think",)),
    "answer": Scope(("answer",)),
    "think+answer": Scope(("think", "answer")),
    "newest": Scope(newest=True),
    "first 4 think tokens": Scope(("think",), until=4),
    "after 4 think tokens": Scope(("think",), first=4),
    "ramp up": Scope(("think",), ramp="up", budget=6),
    "ramp down": Scope(("think", "answer"), ramp="down", budget=6),
}


def direction_of(lm: LM, kind: str = "resid_post", scale: float = 0.5, seed: int = 0) -> Direction:
    vector = scale * torch.randn(lm.layout.n_layers, lm.layout.d_model, generator=torch.Generator().manual_seed(seed))
    return Direction(vector, kind, "think", "by hand", 1, 1, lm.provenance())


@dataclass(frozen=True)
class Script:
    """A rule that opens thinking at once and closes it at a step that differs between rows: rows of one batch fall apart."""

    def __call__(self, lm: LM, reader: spans.Reader, drawn: int):
        (opening,), (closing,) = (lm.tokenizer.encode(t, add_special_tokens=False) for t in (lm.tags.open, lm.tags.close))
        if reader.phase == spans.PROMPT:
            return [opening]
        if reader.phase == spans.THINK and reader.written >= 2 + (sum(reader.tail[:6]) % 9):
            return [closing]
        return [10 + drawn % 90] if drawn in {opening, closing, *lm.eos_ids} else None


def naive_weight(r: Rollout, scope: Scope) -> Tensor:
    """Weight of every position from the finished rollout's spans, re-typed."""
    weight = torch.zeros(len(r.token_ids))
    for t in range(len(r.token_ids)):
        phase, written = "prompt", 0
        if r.think is not None and t >= r.think.start - 1:
            phase, written = "think", t - (r.think.start - 1)
        if r.answer is not None and t >= r.answer.start - 1:
            phase = "answer"
        weight[t] = float(phase in scope.phases)
        if phase == "think":
            if written < scope.first or (scope.until is not None and written >= scope.until):
                weight[t] = 0.0
            if scope.ramp:
                share = min(1.0, written / scope.budget)
                weight[t] *= share if scope.ramp == "up" else 1 - share
        if scope.newest and t < r.prompt_len - 1:
            weight[t] = 0.0
    return weight


def naive_logprobs(lm: LM, r: Rollout, act, scope: Scope) -> Tensor:
    """Log-probabilities of the response from one uncached pass whose residual stream is changed by ``act(h, layer, weight)``."""
    weight = naive_weight(r, scope)
    sites = {Site("resid_post", layer): (lambda h, _, layer=layer: act(h, layer, weight)) for layer in range(lm.layout.n_layers)}
    with hooks.rewrite(lm.layout, sites), torch.inference_mode():
        logits = lm.model(input_ids=torch.tensor([r.token_ids]), use_cache=False).logits[0, r.prompt_len - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(r.token_ids[r.prompt_len :])[:, None])[:, 0]


def forced(r: Rollout) -> Tensor:
    """Which response tokens the script placed: they are certain in the rollout."""
    return torch.tensor(r.logprobs) == 0.0


# --- exactly where it says -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCOPES)
def test_steered_cached_decoding_equals_a_naive_pass_with_the_scope_of_each_row(any_lm, name, problems_of):
    v, scope = direction_of(any_lm), SCOPES[name]
    condition = Condition(any_lm, (steering(v, 0.7, during=scope),), rules=(Script(),))
    found = rollouts(condition, problems_of(3), SAMPLING, progress=False)
    assert len({r.think_tokens for r in found}) > 1  # rows of one batch are in different phases
    for r in found:
        assert r.closed
        naive = naive_logprobs(any_lm, r, lambda h, layer, w: h + 0.7 * w[:, None] * v.vector[layer], scope)
        assert torch.tensor(r.logprobs)[~forced(r)].numpy() == pytest.approx(naive[~forced(r)].numpy(), abs=1e-4)


@pytest.mark.parametrize("op", ["ablate", "clamp"])
@pytest.mark.parametrize("name", ["all", "think"])
def test_ablating_and_clamping_equal_their_formula(any_lm, op, name, problems_of):
    v, scope = direction_of(any_lm), SCOPES[name]
    u = v.unit()
    condition = Condition(any_lm, (steering(v, 1.0, during=scope, op=op, value=2.5),), rules=(Script(),))

    def act(h, layer, w):
        component = (h @ u[layer])[..., None] * u[layer]
        target = 2.5 * u[layer] if op == "clamp" else torch.zeros_like(u[layer])
        return h + w[:, None] * (target - component)

    for r in rollouts(condition, problems_of(2), SAMPLING, progress=False):
        naive = naive_logprobs(any_lm, r, act, scope)
        assert torch.tensor(r.logprobs)[~forced(r)].numpy() == pytest.approx(naive[~forced(r)].numpy(), abs=1e-4)


@pytest.mark.parametrize("name", SCOPES)
def test_teacher_forced_logits_are_steered_like_cached_decoding(llama, name, problems_of):
    act = steering(direction_of(llama), 0.7, during=SCOPES[name])
    for r in rollouts(Condition(llama, (act,), rules=(Script(),)), problems_of(2), SAMPLING, progress=False):
        logp = collect.logits(llama, r, act).log_softmax(-1)
        again = logp.gather(1, torch.tensor(r.token_ids[r.prompt_len :])[:, None])[:, 0]
        assert torch.tensor(r.logprobs)[~forced(r)].numpy() == pytest.approx(again[~forced(r)].numpy(), abs=1e-4)


def common_tags(lm: LM, ids: Tensor, make) -> LM:
    """The model with think tags that it really writes in the output of ``make(ids)``, early and late."""
    written = make(lm, ids)[:, ids.shape[1] :]
    rare = [t for t in written.flatten().tolist() if t >= 10 and t not in ids]
    texts = list(dict.fromkeys(lm.tokenizer.convert_ids_to_tokens(rare)))
    return replace(lm, tags=ThinkTags(texts[0], texts[len(texts) // 2]))


def beams(lm: LM, ids: Tensor, act=None, **more):
    mask = (ids != lm.tokenizer.pad_token_id).long()
    options = {"num_beams": 4, "num_return_sequences": 3, "max_new_tokens": 14, "do_sample": False, "length_penalty": 0.0, **more}
    with act(lm) if act else nullcontext():
        return lm.model.generate(input_ids=ids, attention_mask=mask, eos_token_id=None, pad_token_id=0, **options)


def test_beams_reordered_by_generate_keep_their_phase(any_lm):
    """Scores of Hugging Face's own beam search, left padded, equal a naive pass steered by each returned sequence's phases."""
    ids = torch.randint(10, 103, (2, 9), generator=torch.Generator().manual_seed(3))
    ids[1, :3] = any_lm.tokenizer.pad_token_id
    lm = common_tags(any_lm, ids, beams)
    v, scope = direction_of(lm, scale=0.2), SCOPES["think"]
    out = beams(lm, ids, steering(v, 0.5, during=scope), return_dict_in_generate=True, output_scores=True)
    assert any(phase_changes(lm, row, 9) for row in out.sequences.tolist())
    for i, row in enumerate(out.sequences.tolist()):
        start = 3 * (i // 3 == 1)
        think, answer = spans.spans(lm, row[start:], 9 - start, ended=False)
        r = Rollout(
            "p",
            0,
            tuple(row[start:]),
            9 - start,
            think if think and think.start > 9 - start else None,
            answer if think else None,
            "length",
            "",
            False,
        )
        naive = naive_logprobs(lm, r, lambda h, layer, w: h + 0.5 * w[:, None] * v.vector[layer], scope)
        assert out.sequences_scores[i].item() == pytest.approx(naive.sum().item(), abs=2e-3)


def phase_changes(lm: LM, row: list[int], prompt: int) -> bool:
    return spans.spans(lm, row, prompt, ended=False)[0] is not None


def test_hugging_face_sampling_is_steered_too(llama):
    """Sampling with generate: each step's processed scores equal the steered naive pass."""
    ids = torch.randint(10, 103, (3, 8), generator=torch.Generator().manual_seed(1))
    act, v = steering(direction_of(llama), 0.7), direction_of(llama)
    torch.manual_seed(0)
    with act(llama):
        out = llama.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=6, eos_token_id=None, pad_token_id=0,
            top_k=0, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    for i, row in enumerate(out.sequences.tolist()):
        r = Rollout("p", 0, tuple(row), 8, None, None, "length", "", False)
        naive = naive_logprobs(llama, r, lambda h, layer, w: h + 0.7 * w[:, None] * v.vector[layer], Scope())
        step = torch.stack([x[i] for x in out.logits]).log_softmax(-1).gather(1, torch.tensor(row[8:])[:, None])[:, 0]
        assert step.numpy() == pytest.approx(naive.numpy(), abs=1e-4)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.lists(st.integers(0, 5), min_size=1, max_size=20))
def test_phases_of_any_token_stream_equal_a_walk_along_it(llama, prompt, response):
    """Tokens 0-5 stand for letters and both tags; a batch read in one go, token by token, and by the row reader: all agree."""
    opening, closing = (llama.tokenizer.convert_tokens_to_ids(t) for t in (llama.tags.open, llama.tags.close))
    names = [opening, closing, 20, 21, 22, 23]
    ids, more = ([names[i] for i in part] for part in (prompt, response))
    reader = spans.Reader(llama, ids)
    expected = [(reader.phase, 0)]
    for token in more:
        reader.push(token)
        expected.append((reader.phase, reader.written if reader.phase == spans.THINK else None))
    seen = []
    with phases.track(llama) as tracker, torch.inference_mode():
        cache = DynamicCache(config=llama.model.config)
        llama.model.base_model(input_ids=torch.tensor([ids]), past_key_values=cache)
        assert (tracker.now.phase[0, :-1] == spans.PROMPT).all()
        seen.append((tracker.now.phase[0, -1].item(), 0))
        half = len(more) // 2
        for part in ([token] for token in more[:half]):
            llama.model.base_model(input_ids=torch.tensor([part]), past_key_values=cache)
            seen.append((tracker.now.phase[0, 0].item(), tracker.now.written[0, 0].item()))
        if more[half:]:
            llama.model.base_model(input_ids=torch.tensor([more[half:]]), past_key_values=cache)
            seen += list(zip(tracker.now.phase[0].tolist(), tracker.now.written[0].tolist(), strict=True))
    assert [(p, w if p == spans.THINK else None) for p, w in seen[1:]] == expected[1:]
    assert seen[0][0] == expected[0][0]


def test_a_cache_begun_elsewhere_is_refused_for_phases_and_served_for_all(llama, ids):
    cache = DynamicCache(config=llama.model.config)
    llama.model(input_ids=ids, past_key_values=cache)
    with steering(direction_of(llama), 1.0, during="think")(llama), pytest.raises(ValueError, match="begun outside"):
        llama.model(input_ids=ids[:, :1], past_key_values=cache)
    with steering(direction_of(llama), 1.0)(llama):
        llama.model(input_ids=ids[:, :1], past_key_values=cache)


def test_a_whole_sequence_is_scoped_by_its_last_opening_tag_or_refused(llama, rollout_of):
    r = rollout_of(7)
    act, v = steering(direction_of(llama), 1.0, during="think"), direction_of(llama)
    naive = naive_logprobs(llama, r, lambda h, layer, w: h + w[:, None] * v.vector[layer], SCOPES["think"])
    with act(llama), torch.inference_mode():
        logits = llama.model(input_ids=torch.tensor([r.token_ids]), use_cache=False).logits[0, r.prompt_len - 1 : -1]
    logp = logits.log_softmax(-1).gather(1, torch.tensor(r.token_ids[r.prompt_len :])[:, None])[:, 0]
    assert logp.numpy() == pytest.approx(naive.numpy(), abs=1e-4)
    untagged = replace(llama, tags=ThinkTags(None, None))
    with act(untagged), pytest.raises(ValueError, match=r"collect\.logits"):
        llama.model(input_ids=torch.tensor([r.token_ids]), use_cache=False)


def test_two_scoped_interventions_share_a_pass(llama, problems_of):
    """Thinking and answering steered by two interventions = both phases steered by one."""
    v = direction_of(llama)
    one = Condition(llama, (steering(v, 0.7, during="think+answer"),), rules=(Script(),))
    two = Condition(llama, (steering(v, 0.7, during="think"), steering(v, 0.7, during="answer")), rules=(Script(),))
    both = [rollouts(c, problems_of(3), SAMPLING, progress=False) for c in (one, two)]
    assert [r.token_ids for r in both[0]] == [r.token_ids for r in both[1]]


# --- algebra -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["all", "think", "newest"])
@pytest.mark.parametrize("op", ["add", "ablate", "clamp"])
def test_strength_zero_is_bitwise_the_base_model(any_lm, op, scope, rollout_of):
    act = steering(direction_of(any_lm, scale=50.0), 0.0, op=op, value=3.0, during=scope)
    assert torch.equal(collect.logits(any_lm, rollout_of(9), act), collect.logits(any_lm, rollout_of(9)))


def test_outside_its_scope_a_response_is_bitwise_the_base_models(any_lm, rollout_of):
    """Steering the answer leaves every logit up to the closing tag as it was."""
    r = rollout_of(9)
    steered = collect.logits(any_lm, r, steering(direction_of(any_lm), 5.0, during="answer"))
    base = collect.logits(any_lm, r)
    until = r.answer.start - r.prompt_len
    assert torch.equal(steered[:until], base[:until])
    assert not torch.equal(steered[until:], base[until:])


def test_vector_algebra(llama, rollout_of):
    """2v at a = v at 2a; -v at a = v at -a; v + w at a = both at a."""
    r, v, w = rollout_of(9), direction_of(llama), direction_of(llama, seed=1)

    def scaled(vector, strength):
        return collect.logits(llama, r, steering(replace(v, vector=vector), strength))

    assert torch.allclose(scaled(2 * v.vector, 0.3), scaled(v.vector, 0.6), atol=1e-5)
    assert torch.allclose(scaled(-v.vector, 0.3), scaled(v.vector, -0.3), atol=1e-5)
    with steering(v, 0.3)(llama):
        nested = collect.logits(llama, r, steering(w, 0.3))
    assert torch.allclose(nested, scaled(v.vector + w.vector, 0.3), atol=1e-5)


def test_ablating_twice_is_ablating_once(llama, rollout_of):
    v = direction_of(llama)
    act = steering(v, 1.0, op="ablate")
    once = collect.logits(llama, rollout_of(9), act)
    with act(llama):
        assert torch.allclose(collect.logits(llama, rollout_of(9), act), once, atol=1e-5)


# --- bad input -----------------------------------------------------------------------------------------------


def test_bad_steering_is_refused_before_anything_runs(llama, model_of, tiny):
    v = direction_of(llama)
    nan = v.vector.clone()
    nan[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        steering(replace(v, vector=nan), 1.0)
    with pytest.raises(ValueError, match="not finite"):
        steering(v, float("inf"))
    with pytest.raises(IndexError, match=r"Layer 7 .* 0\.\.2"):
        steering(v, 1.0, layers=(7,))
    with pytest.raises(ValueError, match="Unknown phase 'thinking'"):
        steering(v, 1.0, during="thinking")
    with pytest.raises(ValueError, match="Unknown site"):
        steering(v, 1.0, where="resid")
    with pytest.raises(ValueError, match="op='project'"):
        steering(v, 1.0, op="project")
    with pytest.raises(WrongModelError, match="layers of width"):
        steering(v, 1.0)(tiny)
    other = model_of("mistral")
    with pytest.raises(WrongModelError, match=r"transfer\(direction, lm\)"):
        steering(v, 1.0)(other)
    steering(edits.transfer(v, other), 1.0)(other)
    with pytest.raises(ValueError, match="budget of at least 1"):
        Scope(("think",), ramp="up")
    with pytest.raises(ValueError, match="first < until"):
        Scope(first=4, until=4)
    with pytest.raises(ValueError, match="layers is empty"):
        steering(v, 1.0, layers=[])


@pytest.mark.parametrize("during", ["think", Scope(("think",), ramp="up", budget=4)])
def test_acting_only_while_a_model_thinks_is_refused_if_it_has_no_think_tags(llama, problems_of, during):
    """All of these did nothing, and their results were those of the base model."""
    untagged, scope = replace(llama, tags=None), Scope.parse(during)
    plan = Plan((HeadEdit(1, 0, "scale", 1.0),), None, "by hand", llama.provenance())
    turn = crest.Turn(0, 0, torch.eye(llama.layout.head_dims[0])[0])
    acts = [
        steering(direction_of(llama), 1.0, during=during),
        masks.masking(plan, "zero", during=during),
        Suppress(("w",), scope),
        crest.HeadRotation((turn,), llama.provenance(), during=scope),
    ]
    for act in acts:
        with pytest.raises(NoThinkTagsError, match=r"no think tags.*tags=ThinkTags"), Condition(untagged, (act,)).active():
            pass
    for rule in (Budget(2), SecondLook(), EarlyExit(RandomExit((1.0,), 0))):
        with pytest.raises(NoThinkTagsError, match=r"no closing think tag.*tags=ThinkTags"):
            rollouts(Condition(untagged, rules=(rule,)), problems_of(1), Sampling(max_new_tokens=3), progress=False)


def test_a_model_without_think_tags_is_steered_in_its_answers(llama, rollout_of):
    untagged, r = replace(llama, tags=None), rollout_of(4)
    v = direction_of(llama)
    everywhere, answers = (collect.logits(untagged, r, steering(v, 5.0, during=name)) for name in ("newest", "think+answer"))
    assert torch.equal(everywhere, answers) and not torch.allclose(answers, collect.logits(untagged, r))


# --- baselines -----------------------------------------------------------------------------------------------


def test_a_budget_closes_every_think_span_at_its_size(any_lm, problems_of):
    opened = Condition(any_lm, rules=(Budget(5), Script()))
    for r in rollouts(opened, problems_of(3), SAMPLING, progress=False):
        assert r.think_tokens <= 5 and r.closed
    free = rollouts(Condition(any_lm, rules=(Script(),)), problems_of(3), SAMPLING, progress=False)
    assert max(r.think_tokens for r in free) > 5


def test_a_second_look_replaces_the_first_closing_only(tiny, problems_of):
    condition = Condition(tiny, rules=(SecondLook("wait "),))
    base = rollouts(tiny, problems_of(4), Sampling(max_new_tokens=200), progress=False)
    again = rollouts(condition, problems_of(4), Sampling(max_new_tokens=200), progress=False)
    for before, after in zip(base, again, strict=True):
        if before.closed:
            start = before.think.stop
            assert after.token_ids[:start] == before.token_ids[:start]
            assert tiny.text(after.token_ids[start : start + 5]) == "wait "


def test_a_second_look_counts_its_own_replacements_only(tiny, problems_of):
    """A rule before it places each drawn token of the first three itself; another second look has a count of its own."""

    def echo(lm, reader, drawn):
        return [drawn] if reader.forced < 3 else None

    def said(*rules) -> list[tuple[int, ...]]:
        sampled = rollouts(Condition(tiny, rules=rules), problems_of(4), Sampling(max_new_tokens=200), progress=False)
        return [r.token_ids for r in sampled]

    assert said(echo, SecondLook("wait ", 2)) == said(SecondLook("wait ", 2)) != said(SecondLook("wait ", 1))
    both = said(SecondLook("wait ", 1), SecondLook("hmm ", 1))
    assert all(tiny.text(ids).count("hmm ") == 1 for ids in both if tiny.text(ids).count("wait ")), "each acts once"
    assert any("hmm " in tiny.text(ids) for ids in both)


def test_suppressed_words_are_not_begun_while_thinking(tiny, problems_of):
    sampling = Sampling(n=8, max_new_tokens=200)
    base = rollouts(tiny, problems_of(5), sampling, progress=False)
    quiet = rollouts(Condition(tiny, (Suppress(("w",)),)), problems_of(5), sampling, progress=False)
    assert any("wait" in r.text for r in base)
    assert not any("wait" in r.text for r in quiet)
    with pytest.raises(ValueError, match="first letter"), Suppress(("alternatively",))(tiny):
        pass


def bans(lm: LM, act: Suppress, ids: list[int], *, cached: int) -> list[bool]:
    """Whether the words of ``act`` are banned after each token, with a cache of the first tokens, and the others one by one."""
    word, cache, banned = next(i for i in range(lm.vocab_size) if lm.token_text(i).strip().lower() in act.words), DynamicCache(), []
    with act(lm), torch.inference_mode():
        for start, stop in pairwise([0, *range(cached, len(ids) + 1)]):
            logits = lm.model(input_ids=torch.tensor([ids[start:stop]]), past_key_values=cache, use_cache=True).logits[0]
            banned += (logits[:, word] == -torch.inf).tolist()
    return banned


@pytest.mark.parametrize("after", ["\n\n", "1\n", "+"])
@pytest.mark.parametrize("cached", [1, 40])
def test_words_are_banned_after_a_text_of_several_tokens_and_where_thinking_begins(after, cached, tiny):
    """Also if a line break follows the opening tag, as many templates write it."""
    opened, line = tiny.token_id("<think>"), tiny.token_id("\n")
    prompt = tiny.prompt_ids([{"role": "user", "content": "1+1"}])
    ids = [*prompt, opened, line, *tiny.tokenizer.encode("w1\n\nw+1\n11\n", add_special_tokens=False)]
    start, text = len(prompt), [tiny.text(ids[: i + 1]) for i in range(len(ids))]
    expected = [i >= start and (i <= start + 1 or part.endswith(after)) for i, part in enumerate(text)]
    found = bans(tiny, Suppress(("w",), after=after), ids, cached=min(cached, start))
    assert sum(expected) > 2 and found == expected


def test_after_an_opening_tag_of_several_tokens_words_are_banned_once(tiny):
    """The last token of the tag is no tag by itself."""
    lm = replace(tiny, tags=ThinkTags("1+", "=="))
    ids = [*lm.prompt_ids([{"role": "user", "content": "x"}]), *lm.tokenizer.encode("1+w2+w", add_special_tokens=False)]
    assert lm.token_id("1+") is None
    assert [i - len(ids) for i, banned in enumerate(bans(lm, Suppress(("w",), after="\n"), ids, cached=3)) if banned] == [-5]


def test_without_an_opening_tag_thinking_begins_after_the_header_of_the_turn(tiny):
    lm = replace(tiny, tags=ThinkTags(None, "</think>"))
    prompt = lm.prompt_ids([{"role": "user", "content": "1+1"}])
    banned = bans(
        lm, Suppress(("w",), after="\n"), [*prompt, *lm.tokenizer.encode("w1w", add_special_tokens=False)], cached=len(prompt)
    )
    assert banned == [i == len(prompt) - 1 for i in range(len(banned))]


def test_one_token_that_ends_steps_bans_words_after_it_and_after_the_opening_tag_of_the_tiny_reasoner(tiny, problems_of):
    """As the controls of its board were measured."""
    act, opened, line = Suppress(("w", "1", "2"), after="\n"), tiny.token_id("<think>"), tiny.token_id("\n")
    seen = 0
    for r in rollouts(tiny, problems_of(6), Sampling(max_new_tokens=60), progress=False):
        ids = list(r.token_ids[: r.think.stop])
        banned = bans(tiny, act, ids, cached=r.prompt_len)[r.think.start - 1 :]
        assert banned == [token in (opened, line) for token in ids[r.think.start - 1 :]]
        seen += sum(banned)
    assert seen > 6


def test_a_text_that_the_tokenizer_cannot_write_is_refused(tiny):
    with pytest.raises(ValueError, match="cannot write this text"), Suppress(("w",), after="\u03b1")(tiny):
        pass


def test_an_instruction_changes_the_prompt_and_nothing_else(llama, problems_of):
    (problem,) = problems_of(1)
    (r,) = rollouts(Condition(llama, ask=Instruction("be brief")), [problem], Sampling(max_new_tokens=2), progress=False)
    assert llama.text(r.token_ids[: r.prompt_len]).count(problem.messages[0]["content"] + " be brief") == 1
    with pytest.raises(ValueError, match="no user message"):
        Instruction()([{"role": "system", "content": "x"}])


def test_a_budget_needs_a_closing_tag(llama, problems_of):
    untagged = replace(llama, tags=ThinkTags(None, None))
    with pytest.raises(NoThinkTagsError, match="ThinkTags"):
        rollouts(Condition(untagged, rules=(Budget(0),)), problems_of(1), Sampling(max_new_tokens=3), progress=False)
    with pytest.raises(ValueError, match="expected a budget of 0 or more"):
        Budget(-1)


def test_interventions_are_told_apart_by_every_digit_of_their_numbers(tiny):
    v = direction_of(tiny)
    assert str(steering(v, 2.0)).startswith("steering +2 x ") and str(steering(v, -0.05)).startswith("steering -0.05 x ")
    assert str(steering(v, 0.1234567)) != str(steering(v, 0.1234568))
    assert len({str(steering(v, 1.0, op="clamp", value=value)) for value in (1234567.0, 1234568.0)}) == 2
