"""Causal claims about the shipped tiny reasoner: what pushes it towards short thinking, and what carries the push."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch

from toolkit import attention, collect, edits, evaluate, generate, hooks, jobs, needles, tasks
from toolkit.generate import Sampling
from toolkit.jobs import controls
from toolkit.jobs.masking import Mask
from toolkit.jobs.retrieval import RetrievalMeasurement
from toolkit.lm import LM
from toolkit.methods import retrieval_heads, thinkedit
from toolkit.sites import Site
from toolkit.types import Plan, Rollout, Span

PAIRS = {"quick": "today", "brief": "hello", "hurry": "today"}  # a cue word and a neutral word of equal length


@pytest.fixture(scope="module")
def responses(tiny: LM) -> list[Rollout]:
    return generate.rollouts(tiny, tasks.load("arithmetic", "train", 100), Sampling(n=8, max_new_tokens=300), progress=False)


@pytest.fixture(scope="module")
def finding(tiny: LM, responses) -> jobs.Finding:
    return jobs.find_heads(tiny, responses, jobs.DEMO, jobs.OURS)


@pytest.fixture(scope="module")
def twins(tiny: LM) -> list[tuple[list[int], list[int]]]:
    """Prompts with a cue word up to the opening think tag, and the same with a neutral word."""
    (think,) = tiny.tokenizer.encode("<think>")
    found = []
    for p in tasks.arithmetic.load("dev", 150, operands=(4, 7)):
        if (word := p.meta["word"]) in PAIRS:
            content = p.messages[0]["content"]
            both = (content, content.replace(word, PAIRS[word]))
            found.append(tuple([*tiny.prompt_ids([{"role": "user", "content": c}]), think] for c in both))
    return found[:24]


def p_skip(lm: LM, ids: list[int]) -> float:
    """Probability of skipping straight to the answer."""
    logits = lm.model(input_ids=torch.tensor([ids])).logits[0, -1]
    return torch.softmax(logits, -1)[lm.tokenizer.encode("=")[0]].item()


def with_head_of(value, inputs, *, source, columns):
    patched = value.clone()
    patched[:, -1, columns] = source[:, -1, columns]
    return patched


@torch.inference_mode()
def test_the_heads_found_carry_the_push_of_the_cue(tiny, twins, finding):
    """Patched in from the neutral twin, each edited head undoes a third of the push or more, both together most of it; of the
    other heads of their layers none undoes as much."""
    sites = [Site("z", layer) for layer in range(tiny.layout.n_layers)]
    cue = neutral = together = 0.0
    alone = torch.zeros(tiny.layout.n_layers, tiny.layout.n_heads)
    for cued, plain in twins:
        with hooks.record(tiny.layout, sites) as seen:
            neutral += p_skip(tiny, plain)
        cue += p_skip(tiny, cued)
        patch = {
            (layer, head): partial(with_head_of, source=seen[Site("z", layer)], columns=tiny.layout.head(layer, head))
            for layer in range(tiny.layout.n_layers)
            for head in range(tiny.layout.n_heads)
        }
        for (layer, head), fn in patch.items():
            with hooks.rewrite(tiny.layout, {Site("z", layer): fn}):
                alone[layer, head] += p_skip(tiny, cued)
        with hooks.rewrite(tiny.layout, {Site("z", layer): patch[layer, head] for layer, head in finding.plan.heads}):
            together += p_skip(tiny, cued)
    assert cue > 3 * neutral
    undone = (cue - alone) / (cue - neutral)
    found = dict(finding.plan.heads)
    assert len(found) == 2, "one in each of two layers"
    assert (cue - together) / (cue - neutral) > 0.6
    for layer, head in found.items():
        assert undone[layer, head] > 0.3
        assert undone[layer, head] == undone[layer].max()


def test_the_edit_lengthens_thinking_and_random_heads_do_not(tiny, finding):
    judged = {
        "base": tiny,
        "edited": edits.apply(tiny, finding.plan),
        "heads": edits.apply(tiny, controls.random_heads(tiny, finding, finding.plan, seed=0)),
    }
    report = evaluate.compare(judged, tasks.load("arithmetic", "test", 80), Sampling(n=6, max_new_tokens=300), progress=False)
    rows = evaluate.summary(report).set_index(["condition", "metric"])
    for metric in ("think_tokens", "shortest_20", "accuracy"):
        assert rows.loc[("edited", metric), "difference_low"] > 0
        assert rows.loc[("heads", metric), "difference_high"] < rows.loc[("edited", metric), "difference"] / 2


def removed(tiny: LM, plan: Plan, responses: Sequence[Rollout]) -> float:
    """Root mean square of what a plan removes from the outputs of its heads where lines of thinking begin."""
    z = collect.states(tiny, responses, "z", positions=collect.step_starts(tiny)).values.double()
    total = 0.0
    for layer, head in plan.heads:
        columns, W_O = tiny.layout.head(layer, head), tiny.layout.W_O(layer).detach().double()
        unit = edits.unit_at(tiny.layout, plan, layer, torch.device("cpu")).double()
        total += float((z[:, layer, columns] @ W_O[:, columns].T @ unit).pow(2).mean())
    return math.sqrt(total)


def test_random_controls_of_an_edit_remove_more_than_a_direction_that_is_no_control_does(tiny, finding, responses):
    """The direction of the edited heads is next to nothing of other heads' outputs, and so is a vector drawn from all they can write."""
    plan, layout, some, seeds = finding.plan, tiny.layout, responses[:200], range(3)
    sizes = {
        name: [removed(tiny, draw(seed), some) for seed in seeds]
        for name, draw in {
            "random groups": lambda s: controls.random_groups(tiny, finding, plan, seed=s),
            "random vector": lambda s: edits.with_direction(plan, edits.random_written(plan, layout, seed=s)),
            "random heads": lambda s: controls.random_heads(tiny, finding, plan, seed=s),
            "random heads, direction of the edited": lambda s: edits.random_heads(plan, layout, seed=s),
        }.items()
    }
    assert min(sizes["random groups"]) > max(sizes["random vector"])
    assert sum(sizes["random groups"]) > 1.5 * removed(tiny, plan, some)  # of three draws: half of the edit on average
    assert min(sizes["random heads"]) > 2 * max(sizes["random heads, direction of the edited"])


def test_the_direction_between_random_groups_does_not_depend_on_length(tiny, finding):
    """A vector added to every activation of long thinking moves the length direction, but not that between random groups."""
    cells = replace(finding.cells, n=(10,) * len(finding.cells.n))
    added = 10.0 * torch.tensor([label.startswith("long") for label in cells.labels])[:, None, None]
    longer = replace(cells, sums={kind: sums + added for kind, sums in cells.sums.items()})
    before, after = (replace(finding, cells=c) for c in (cells, longer))
    for seed in range(3):
        first, second = (controls.random_groups(tiny, f, f.plan, seed=seed).direction.vector for f in (before, after))
        assert torch.allclose(first, second, atol=1e-9) and first.any()
    classes = {label: label.split()[0] for label in cells.labels}
    gaps = [thinkedit.direction(c.merged(classes), "resid_post").vector for c in (cells, longer)]
    assert torch.allclose(gaps[1] - gaps[0], torch.ones(()).double())


def test_a_random_written_direction_lies_in_what_the_heads_can_write(tiny, finding):
    plan = finding.plan
    first, again, other = (edits.random_written(plan, tiny.layout, seed=s) for s in (0, 0, 1))
    assert torch.equal(first.vector, again.vector) and not torch.equal(first.vector, other.vector)
    for layer, head in plan.heads:
        W_h = tiny.layout.W_O(layer).detach()[:, tiny.layout.head(layer, head)].double()
        fitted = W_h @ torch.linalg.lstsq(W_h, first.vector[layer]).solution
        assert torch.allclose(fitted, first.vector[layer], atol=1e-8)
    edited = {layer for layer, _ in plan.heads}
    assert not first.vector[[i for i in range(tiny.layout.n_layers) if i not in edited]].any()


SEARCH = jobs.Search(instances=60, draws=2)


@pytest.fixture(scope="module")
def looked(tiny) -> RetrievalMeasurement:
    return jobs.measure_retrieval(tiny, SEARCH)


def test_masking_the_heads_that_write_what_is_looked_up_breaks_lookup_and_random_heads_of_their_layers_do_not(tiny, looked):
    """Found by what they write towards the emitted token, with the whole binding as needle; judged on other problems."""
    problems = tasks.lookup.load("test", 60)
    forms = [Mask("write (ours)", 4, "zero", "all"), Mask("write (ours)", 4, "uniform", "newest")]
    for _, row in jobs.masking_effects(tiny, looked, SEARCH, problems, forms).iterrows():
        assert row["lost_low"] > 0.3
        assert row["more_than_random_low"] > 0.3
        assert row["random_high"] > row["accuracy"] + row["lost"] - 0.05, "random heads leave the base's accuracy"


def test_the_published_copy_score_is_blind_to_a_value_read_from_the_next_token(tiny, looked):
    """The heads of layer 1 that look a value up attend to the token after it, so none of the published top heads matters."""
    writers = looked.scores["write (ours)"].ranked()[:2]
    offsets = torch.zeros(3)
    answered = [e for e in needles.examples(looked.haystacks, looked.rollouts, whole=False) if e.rollout.correct]
    for example in answered[:20]:
        r, value = example.rollout, example.needle.start
        emitted = next(i for i in range(r.prompt_len, len(r.token_ids)) if r.token_ids[i] == r.token_ids[value])
        weights = attention.rows(tiny, r.token_ids, Span(emitted - 1, emitted))
        offsets += sum(weights[layer, head, 0, value - 1 : value + 2] for layer, head in writers) / len(writers) / 20
    assert offsets[2] > 0.8 > 0.1 > offsets[:2].max()
    copied = looked.scores["copy, as published"]
    assert max(float(copied.score[h]) for h in writers) < retrieval_heads.PUBLISHED_THRESHOLD
    row = jobs.masking_effects(tiny, looked, SEARCH, tasks.lookup.load("test", 60), [Mask("copy, as published", 4)]).iloc[0]
    assert row["lost_high"] < 0.1
