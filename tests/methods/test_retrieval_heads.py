"""Retrieval scores against naive loops over full attention on every family, a hand-built case, and the form of the released files."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from families import family

from toolkit import attention, edits, hooks, masks
from toolkit.lm import LM, Condition
from toolkit.methods import retrieval_heads as rh
from toolkit.needles import Example, NeedleError
from toolkit.types import HeadScores, Rollout, Span


def example_of(prompt: list[int], response: list[int], needle: Span, *, name: str = "p", **more) -> Example:
    rollout = Rollout(name, 0, (*prompt, *response), len(prompt), None, None, "stop", "", True)
    return Example(rollout, needle, **more)


def random_examples(n: int = 4) -> list[Example]:
    """Few distinct tokens, so that heads hit by chance; prompts and responses of other lengths; needles with repeated tokens."""
    found = []
    for i in range(n):
        rng = random.Random(i)
        prompt = [rng.randrange(10, 22) for _ in range(24 + 3 * i)]
        start = 3 + 2 * i if i < 2 else len(prompt) - 13  # beyond a sliding window, and within
        needle = Span(start, start + 7)
        response = [rng.choice(prompt[needle.start : needle.stop]) for _ in range(9 + i)] + [rng.randrange(10, 22)] * 2
        control = None if i == 1 else (*prompt[:start], *[rng.randrange(30, 40) for _ in range(7)], *prompt[start + 7 :])
        query = None if i == 2 else Span(len(prompt) - 6, len(prompt) - 2)
        emitted = Span(len(prompt) + 1, len(prompt) + 8) if i == 3 else None
        found.append(example_of(prompt, response, needle, name=f"e{i}", control=control, query=query, emitted=emitted))
    return found


# --- oracle --------------------------------------------------------------------------------------------------


@torch.no_grad()
def run(lm: LM, ids: tuple[int, ...]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """All attention ``[layers, heads, T, T]`` and all values ``[kv_heads, T, head_dim]`` of one sequence, nothing forgotten."""
    from transformers import DynamicCache

    own, cache = lm.model.config._attn_implementation, DynamicCache()
    lm.model.set_attn_implementation("eager")
    try:
        out = lm.model(torch.tensor([ids]), output_attentions=True, past_key_values=cache, use_cache=True)
    finally:
        lm.model.set_attn_implementation(own)
    return torch.stack(out.attentions)[:, 0].float(), [layer.values[0] for layer in cache.layers]


@torch.no_grad()
def behind_the_norm(lm: LM, ids: tuple[int, ...]) -> list[torch.Tensor]:
    """What a head's output is multiplied by on its way to the stream, ``[T, d_model]`` per layer: ones unless a norm follows."""
    found, handles = [torch.ones(len(ids), lm.layout.d_model) for _ in lm.layout.blocks], []
    for layer, block in enumerate(lm.layout.blocks):
        norm = block.post_attention_norm
        if norm is not None:
            gain = norm.weight.detach() + (0.0 if "Olmo2" in type(norm).__name__ else 1.0)

            def keep(module, args, output, layer=layer, gain=gain) -> None:
                found[layer] = gain / args[0][0].pow(2).mean(dim=-1, keepdim=True).sqrt()

            handles.append(norm.register_forward_hook(keep))
    lm.model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return found


def naive(lm: LM, e: Example) -> dict[str, torch.Tensor]:
    """Every metric of one example by loops over layers, heads and tokens."""
    ids, prompt_len = e.rollout.token_ids, e.rollout.prompt_len
    (a, values), behind = run(lm, ids), behind_the_norm(lm, ids)
    away = run(lm, (*e.control, *ids[prompt_len:]))[0] if e.control else None
    emitted = e.emitted if e.emitted is not None else Span(prompt_len, len(ids))
    inside = range(e.needle.start, e.needle.stop)
    k = {ids[j] for j in inside}
    rest = {ids[j] for j in range(prompt_len) if j not in inside}
    W_U = lm.model.get_output_embeddings().weight.detach()
    found = {m: torch.full((lm.layout.n_layers, lm.layout.n_heads), math.nan, dtype=torch.float64) for m in rh.METRICS}
    for layer in range(lm.layout.n_layers):
        W_O = lm.layout.W_O(layer).detach()
        for head in range(lm.layout.n_heads):
            sets: dict[str, set[int]] = {m: set() for m in rh.COPY_METRICS}
            mass, no_needle, writes = [], [], []
            for p in range(emitted.start, emitted.stop):
                t, w = p - 1, ids[p]
                row = a[layer, head, t, : t + 1]
                mass.append(sum(row[j].item() for j in inside))
                if away is not None:
                    no_needle.append(sum(away[layer, head, t, j].item() for j in inside))
                if w not in k:
                    continue
                top = max(range(t + 1), key=lambda j: row[j].item())
                if top in inside and ids[top] == w:
                    sets["copy"].add(w)
                    if w not in rest:
                        sets["copy_unseen"].add(w)
                    if ids[top - 1] != ids[t]:
                        sets["copy_new"].add(w)
                top = max(range(1, t + 1), key=lambda j: row[j].item())
                if top in inside and ids[top] == w:
                    sets["copy_no_sink"].add(w)
                best = max(inside, key=lambda j: row[j].item())
                v = values[layer][head // (lm.layout.n_heads // len(values[layer])), best]
                u = W_U[w] - W_U.mean(dim=0)
                writes.append(row[best].item() * ((behind[layer][t] * (W_O[:, lm.layout.head(layer, head)] @ v)) @ u).item())
            for m, copied in sets.items():
                size = len(k - rest) if m == "copy_unseen" else len(k)
                found[m][layer, head] = len(copied) / size if size else math.nan
            found["mass"][layer, head] = sum(mass) / len(mass)
            if away is not None:
                found["contrast"][layer, head] = sum(mass) / len(mass) - sum(no_needle) / len(no_needle)
            if e.query is not None:
                rows = [sum(a[layer, head, t, j].item() for j in inside) for t in range(e.query.start, e.query.stop)]
                found["query"][layer, head] = sum(rows) / len(rows)
            found["write"][layer, head] = sum(writes) / len(writes) if writes else 0.0
    return found


# --- scores --------------------------------------------------------------------------------------------------


def test_all_metrics_equal_naive_loops_over_full_attention(any_lm, monkeypatch):
    """Batched with other lengths, in groups, a few queries at a time."""
    monkeypatch.setattr(rh, "GROUP_SIZE", 3)
    monkeypatch.setattr(attention, "ROW_NUMBERS", 3 * 4 * 40 * 4)
    examples = random_examples()
    measured = rh.measure(any_lm, examples)
    for i, e in enumerate(examples):
        for metric, want in naive(any_lm, e).items():
            got = measured.values[metric][i]
            assert torch.allclose(got, want, atol=1e-5 * max(1.0, want.nan_to_num().abs().max().item()), equal_nan=True), (
                i,
                metric,
            )
    assert any(measured.values["copy"].flatten() > 0), "the examples must give heads something to copy"


def test_order_and_parts_do_not_matter(llama):
    examples = random_examples()
    whole = rh.measure(llama, examples)
    parts = rh.measure(llama, examples[:1]) + rh.measure(llama, examples[1:])
    back = rh.measure(llama, examples[::-1])
    for metric in rh.METRICS:
        assert torch.allclose(whole.values[metric], parts.values[metric], atol=1e-5, equal_nan=True)
        assert torch.allclose(whole.values[metric], back.values[metric].flip(0), atol=1e-5, equal_nan=True)
    assert whole.ids == parts.ids == back.ids[::-1] == ("e0", "e1", "e2", "e3")
    assert whole.success == parts.success


# The prompt: 9 | 20 21 22 23 is the needle at 3..6 | 21 again at 8. The response says 20 21 22 22, then 50.
PROMPT, NEEDLE = [9, 30, 31, 20, 21, 22, 23, 32, 21, 33], Span(3, 7)
RESPONSE = [20, 21, 22, 22, 50]
# Which key each head attends most, at the positions that emit the response: a head and what it ought to score.
HEADS = {
    (0, 0): (
        [3, 4, 5, 5, 0],
        {"copy": 3 / 4, "copy_new": 1 / 4 + 1 / 4, "copy_unseen": 2 / 3, "mass": 4 / 5},
    ),  # copies; once 22 22
    (0, 1): ([3, 8, 7, 7, 0], {"copy": 1 / 4, "copy_new": 1 / 4, "copy_unseen": 1 / 3, "mass": 1 / 5}),  # 21 elsewhere: no copy
    (1, 2): ([4, 4, 5, 4, 3], {"copy": 2 / 4, "copy_new": 0.0, "copy_unseen": 1 / 3, "mass": 1.0}),  # an induction head
    (2, 3): ([0, 0, 0, 0, 0], {"copy": 0.0, "copy_new": 0.0, "copy_unseen": 0.0, "mass": 0.0}),  # the sink
}


def attending_by_hand(lm: LM, share: float = 1.0):
    """Weights written by hand: ``share`` on the key named in HEADS, the rest on position 0; heads not named attend to position 0."""

    def fn(layer, attend, query, key, value):
        output, weights = attend(query, key, value)
        if weights is not None:
            weights = torch.zeros_like(weights)
            weights[..., 0] = 1.0
            for (at, head), (keys, _) in HEADS.items():
                if at == layer:
                    for q, k in enumerate(keys):
                        weights[0, head, q, 0] = 1 - share
                        weights[0, head, q, k] += share
        return output, weights

    return hooks.wrap_attention(lm.layout, fn)


def test_one_head_copies_and_others_do_not(llama):
    with attending_by_hand(llama):
        measured = rh.measure(llama, [example_of(PROMPT, RESPONSE, NEEDLE)])
    for (layer, head), (_, expected) in HEADS.items():
        for metric, value in expected.items():
            assert measured.values[metric][0, layer, head].item() == pytest.approx(value), (layer, head, metric)
    copy = measured.values["copy"][0].clone()
    for layer, head in HEADS:
        copy[layer, head] = 0.0
    assert not copy.any(), "no other head copies"
    assert rh.heads(rh.scores(measured)) == [(0, 0), (1, 2), (0, 1)]
    assert rh.heads(rh.scores(measured), above=0.5) == [(0, 0)]


def test_a_token_copied_twice_counts_once(llama):
    """The released code would give 4 / 4 here: 22 is emitted, and copied, twice."""
    with attending_by_hand(llama):
        assert rh.measure(llama, [example_of(PROMPT, RESPONSE, NEEDLE)]).values["copy"][0, 0, 0] == 3 / 4


def test_a_sink_hides_copies_that_show_without_it(llama):
    with attending_by_hand(llama, share=0.4):
        measured = rh.measure(llama, [example_of(PROMPT, RESPONSE, NEEDLE)])
        assert measured.values["copy"][0, 0, 0] == 0
        assert measured.values["copy_no_sink"][0, 0, 0] == 3 / 4
        none = rh.measure(llama, [example_of(PROMPT, RESPONSE, NEEDLE)], sinks=0)
    assert not none.values["copy_no_sink"].any()


def test_a_needle_whose_every_token_occurs_elsewhere_has_no_unseen_score(llama):
    measured = rh.measure(llama, [example_of([20, 21, 5, 20, 21, 6], [20], Span(3, 5))])
    assert measured.values["copy_unseen"].isnan().all()
    with pytest.raises(ValueError, match=r"No example has a 'copy_unseen' score \(all\): of 1, 0 succeeded"):
        rh.scores(measured, "copy_unseen")


def test_success_is_recall_above_a_half_or_what_the_user_says(llama):
    half, more = example_of(PROMPT, [20, 21, 50], NEEDLE), example_of(PROMPT, RESPONSE, NEEDLE)
    assert (rh.needle_recalled(half), rh.needle_recalled(more)) == (False, True)
    assert rh.needle_recalled(half, above=0.4)
    measured = rh.measure(llama, [half, more])
    assert measured.success == (False, True)
    assert torch.equal(rh.scores(measured, "mass", when="success").score, measured.values["mass"][1])
    assert torch.equal(rh.scores(measured, "mass").score, measured.values["mass"].mean(dim=0))
    assert rh.measure(llama, [half, more], success=lambda e: e.rollout.correct).success == (True, True)


def test_activation_frequency_counts_examples_with_a_copy(llama):
    measured = rh.measure(llama, random_examples())
    want = sum((measured.values["copy"][i] > 0).double() for i in range(4)) / 4
    assert torch.equal(rh.activation_frequency(measured).score, want)


def test_masked_heads_are_the_best_and_their_control_is_others(llama):
    found = rh.scores(rh.measure(llama, random_examples()), "mass")
    plan = rh.mask_plan(found, 2)
    assert plan.heads == found.ranked()[:2]
    control = edits.random_heads(plan, llama.layout, seed=0)
    assert not {*plan.heads} & {*control.heads}
    assert sorted(layer for layer, _ in plan.heads) == sorted(layer for layer, _ in control.heads)
    ids = torch.tensor([PROMPT])
    with torch.no_grad(), Condition(llama, (masks.masking(plan, "zero", during="all"),)).active():
        masked = llama.model(ids).logits
    with torch.no_grad():
        assert torch.allclose(masked, edits.apply(llama, plan).model(ids).logits, atol=1e-3)
    assert rh.mask_plan(found, 0).heads == []
    with pytest.raises(ValueError, match="count=13: the model has 12 heads"):
        rh.mask_plan(found, 13)


# --- aggregate statistics ------------------------------------------------------------------------------------


def made_up(n: int = 40, layers: int = 4, heads: int = 8, seed: int = 0) -> dict[str, list[float]]:
    """A file of the released form: most heads silent, a few always active, one score above 1 as in Qwen1.5-14B's."""
    rng = random.Random(seed)
    lists = {}
    for i in range(layers):
        for j in range(heads):
            kind = rng.random()
            level = 0.0 if kind < 0.6 else 0.05 if kind < 0.9 else 0.7
            lists[f"{i}-{j}"] = [min(1.0, level * (0.5 + rng.random())) if rng.random() < 0.9 else 0.0 for _ in range(n)]
    lists["1-2"] = [0.9] * (n - 1) + [1.65]
    for values in lists.values():
        values[3] = 0.0
    lists["3-0"] = [0.2] * n
    return lists


def test_statistics_of_a_file_equal_counts_by_hand():
    lists = made_up()
    got = rh.statistics(rh.from_lists(lists))
    means = {key: sum(values) / len(values) for key, values in lists.items()}
    active = {key: sum(v > 0 for v in values) / len(values) for key, values in lists.items()}
    assert got == {
        "examples": 40,
        "retrieval": sum(m > 0.1 for m in means.values()),
        "share_retrieval": pytest.approx(sum(m > 0.1 for m in means.values()) / 32),
        "share_strong": pytest.approx(sum(m > 0.5 for m in means.values()) / 32),
        "share_zero": pytest.approx(sum(m == 0 for m in means.values()) / 32),
        "always": sum(a == 1 for a in active.values()),
        "often": sum(a > 0.95 for a in active.values()),
        "silent_examples": sum(all(values[i] == 0 for values in lists.values()) for i in range(40)),
        "above_1": 1,
    }
    assert got["always"] >= 1 and 0 < got["share_zero"] < 1 and 0 < got["share_strong"] < got["share_retrieval"]


def test_silent_examples_are_found():
    copy = torch.zeros(3, 2, 2)
    copy[1, 0, 1] = 0.5
    assert rh.statistics(copy)["silent_examples"] == 2


def test_files_make_the_round_trip():
    lists = made_up()
    assert rh.to_lists(rh.from_lists(lists)) == lists
    wide = {f"{i}-{j}": [float(i), float(j)] for j in range(11) for i in range(2)}
    assert rh.from_lists(wide)[1, 1, 10] == 10, "heads are ordered as numbers, not as text"


def test_files_that_are_not_whole_are_refused():
    lists = made_up()
    with pytest.raises(ValueError, match=r"missing \[\(2, 3\)\]"):
        rh.from_lists({key: values for key, values in lists.items() if key != "2-3"})
    with pytest.raises(ValueError, match=r"of other length \['2-3'\]"):
        rh.from_lists(lists | {"2-3": [0.1]})
    with pytest.raises(ValueError, match="empty"):
        rh.from_lists({})


def test_overlap_counts_shared_top_heads(provenance):
    def scored(*values: int) -> HeadScores:
        return HeadScores(torch.tensor([values[:3], values[3:]], dtype=torch.float32), "m", "share", provenance)

    a, b = scored(6, 5, 4, 3, 2, 1), scored(6, 5, 0, 0, 2, 1)
    assert [rh.overlap(a, b, n) for n in (1, 2, 3, 6)] == [1.0, 1.0, pytest.approx(2 / 3), 1.0]
    with pytest.raises(ValueError, match="count=7"):
        rh.overlap(a, b, 7)


def test_stability_grows_to_one_with_all_examples():
    copy = rh.from_lists(made_up())
    few, many = rh.stability(copy, 1, 6, seed=1), rh.stability(copy, 30, 6, seed=1)
    assert 0 < few <= many <= rh.stability(copy, 40, 6) == 1.0
    assert rh.stability(copy, 5, 6, seed=2) == rh.stability(copy, 5, 6, seed=2)
    with pytest.raises(ValueError, match="n=41 of 40 examples"):
        rh.stability(copy, 41, 6)


# --- bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"needle": Span(8, 11)}, r"Example 'p': the needle is \[8, 11\), the prompt has 10 tokens"),
        ({"needle": Span(4, 4)}, r"the needle is \[4, 4\).*need at least one token, inside the prompt"),
        ({"query": Span(9, 12)}, r"the query is \[9, 12\)"),
        ({"emitted": Span(9, 12)}, r"the emitted tokens are \[9, 12\), the response is \[10, 15\)"),
        ({"emitted": Span(12, 12)}, "need at least one token, inside the response"),
        ({"response": []}, r"inside the response.*max_new_tokens > 0"),
        ({"control": (1, 2, 3)}, "the control has 3 tokens, the prompt 10: need the same length"),
    ],
)
def test_bad_examples_are_refused(more, message):
    with pytest.raises(NeedleError, match=message):
        example_of(PROMPT, more.pop("response", RESPONSE), more.pop("needle", NEEDLE), **more)


def test_nothing_to_measure_and_too_long_a_context_are_refused(llama):
    with pytest.raises(ValueError, match="No examples to measure heads on"):
        rh.measure(llama, [])
    with pytest.raises(ValueError, match="more than the 512 of tiny llama's context"):
        rh.measure(llama, [example_of([5] * 600, [6], Span(3, 9))])


def test_wrong_names_and_other_models_are_refused(llama, model_of):
    measured = rh.measure(llama, random_examples(1))
    with pytest.raises(KeyError, match="No metric 'mas': choose from copy, copy_no_sink"):
        rh.scores(measured, "mas")
    with pytest.raises(ValueError, match="when='won': choose 'all' or 'success'"):
        rh.scores(measured, when="won")
    with pytest.raises(ValueError, match="do not belong together: tiny llama and tiny qwen2"):
        _ = measured + rh.measure(model_of("qwen2"), random_examples(1))
    failed = replace(measured, success=(False,))
    with pytest.raises(ValueError, match=r"No example has a 'copy' score \(success\)"):
        rh.scores(failed, when="success")


def test_half_precision_gives_the_same_heads_of_mass():
    """bf16 weights: rows are fp32 numbers all the same, and close to the fp32 model's."""
    examples = random_examples(2)
    half, whole = (rh.measure(family("llama", dtype=d), examples).values["mass"] for d in (torch.bfloat16, torch.float32))
    assert torch.allclose(half, whole, atol=0.1)
