"""DTO: where a trajectory could have stopped, the path that does, and the pairs it makes."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from toolkit import generate, lm, steps, tasks
from toolkit.generate import Sampling
from toolkit.lm import NoThinkTagsError
from toolkit.methods import thinking_optimization as dto
from toolkit.methods.thinking_optimization import DTOSettings

HOW = DTOSettings(split=steps.lines, probes=4, completions=4, answering=Sampling(max_new_tokens=16))


@pytest.fixture(scope="module")
def reasoner():
    return lm.load("tiny-reasoner")


@pytest.fixture(scope="module")
def problems():
    return tasks.load("arithmetic", "train", n=16)


@pytest.fixture(scope="module")
def found(reasoner, problems):
    return generate.rollouts(reasoner, problems, Sampling(n=2, max_new_tokens=150))


@pytest.fixture(scope="module")
def better(reasoner, problems, found):
    return dto.optimise(reasoner, found, problems, HOW)


def test_an_answer_that_is_cut_off_is_never_preferred(reasoner, problems, found):
    short = replace(HOW, answering=Sampling(max_new_tokens=1), probes=1)  # a digit, but not the end of the response
    assert all(o.path is None for o in dto.optimise(reasoner, found, problems, short))


def test_segments_together_are_the_thinking(reasoner, found):
    for r in found:
        own = dto.segments(reasoner, r, steps.lines)
        spans = [step.span for step in own]
        assert not spans or (spans[0].start, spans[-1].stop) == (r.think.start, r.think.stop)
        assert all(a.stop == b.start for a, b in pairwise(spans))


def test_cue_words_begin_segments():
    text = "First 2+2=4. Wait, is it? Alternatively count. Await nothing."
    assert [text[a:b].split()[0] for a, b in steps.step_ranges(text, steps.at_cues(dto.assumed_cues))] == [
        "First",
        "Wait,",
        "Alternatively",
    ]


def test_probing_says_how_often_an_answer_would_be_right_now(better, found):
    shares = [o.shares for o in better if o.shares]
    assert all(len(o.shares) == len(o.segments) for o in better if o.shares) and shares
    last, first = np.mean([s[-1] for s in shares]), np.mean([s[0] for s in shares])
    right = np.mean([o.original.correct for o in better if o.shares])
    assert abs(last - right) < 0.15, "after all of its thinking a trajectory answers as it did"
    assert first < last - 0.2, "after its first line it cannot yet know"


def test_exits_are_the_segments_above_the_threshold():
    assert dto.exits([0.25, 0.5, 0.75, 0.5, 1.0], 0.5) == [2, 4]
    assert dto.exits([], 0.5) == []


def test_a_path_is_right_and_shorter_or_mends_a_wrong_trajectory(better):
    paths = [o for o in better if o.path]
    assert paths, "no trajectory could be optimised"
    for o in paths:
        assert o.path.correct and o.path.problem_id == o.original.problem_id
        assert not o.original.correct or o.path.response_tokens < o.original.response_tokens
        assert o.shares[o.cut] > HOW.threshold and o.path.closed


def test_a_path_is_made_of_segments_of_its_trajectory_in_order(better):
    for o in better:
        if o.path:
            kept = [i for i in range(o.cut + 1) if i not in o.dropped]
            wanted = [t for i in kept for t in o.original.token_ids[o.segments[i].span.start : o.segments[i].span.stop]]
            assert list(o.path.token_ids[o.path.think.start : o.path.think.stop]) == wanted
            assert o.path.token_ids[: o.path.prompt_len] == o.original.token_ids[: o.original.prompt_len]


def test_the_opening_and_the_last_segment_are_never_dropped_even_by_a_quick_decode_alone(reasoner, problems, found, better):
    alone = dto.optimise(reasoner, found, problems, replace(HOW, tolerance=math.inf))
    inner = [o for o in alone if o.path and o.cut > 1]
    assert any(o.dropped == tuple(range(1, o.cut)) for o in inner), "the quick decode alone drops every inner segment somewhere"
    assert all({0, o.cut}.isdisjoint(o.dropped) for o in (*alone, *better))


def test_a_better_path_keeps_the_steps_and_loses_the_checks(reasoner, better):
    """Dropped are lines such as "wait 3+4=7 ok"; each kept line of the tiny reasoner goes on from the result of the one before it."""
    lines = {id(o): [reasoner.text(o.original.token_ids[s.span.start : s.span.stop]) for s in o.segments] for o in better}
    dropped = [lines[id(o)][i] for o in better for i in o.dropped]
    kept = [lines[id(o)][i] for o in better if o.path for i in range(1, o.cut) if i not in o.dropped]
    assert len(dropped) > 3 and len(kept) > 10
    assert np.mean([line.startswith("wait") for line in dropped]) > 0.7
    assert not any(line.startswith("wait") for line in kept)


def test_what_a_segment_contributes_is_the_likelihood_that_a_later_one_loses_without_it(reasoner, problems, better):
    o = next(o for o in better if o.path and o.cut > 2 and not o.dropped)
    work, r, at = dto._working(reasoner, [o.original], problems, HOW), o.original, 1

    def by_hand(kept) -> list[float]:
        found, ids = [], list(r.token_ids[: o.segments[0].span.start])
        for j in kept:
            own = list(r.token_ids[o.segments[j].span.start : o.segments[j].span.stop])
            with torch.no_grad():
                logp = reasoner.model(torch.tensor([ids + own])).logits[0].log_softmax(-1)
            if j > at:
                found.append(np.mean([logp[len(ids) + i - 1, t].item() for i, t in enumerate(own)]))
            ids += own
        return found

    whole = list(range(o.cut + 1))
    without = [j for j in whole if j != at]
    assert dto._likelihoods(work, o, whole, at) == pytest.approx(by_hand(whole), abs=1e-4)
    assert dto._likelihoods(work, o, without, at) == pytest.approx(by_hand(without), abs=1e-4)
    falls = max(b - a for b, a in zip(by_hand(whole), by_hand(without), strict=True))
    assert falls > 0.1 and dto._contributes(work, o, at)
    assert not dto._contributes(dto._working(reasoner, [r], problems, replace(HOW, tolerance=falls + 0.01)), o, at)


def test_trajectories_of_one_segment_are_left_alone(reasoner, problems, found):
    (o,) = dto.optimise(reasoner, found[:1], problems, replace(HOW, split=lambda text: [0]))
    assert len(o.segments) == 1 and not o.shares and o.path is None


def test_an_unreachable_threshold_leaves_no_path(reasoner, problems, found):
    wrong = [replace(p, answer="12345") for p in problems]
    assert all(o.path is None and max(o.shares, default=0) == 0 for o in dto.optimise(reasoner, found[:4], wrong, HOW))


def test_a_text_can_lead_to_the_answer_instead_of_the_bare_tag(reasoner, problems, found):
    close = reasoner.tags.close
    said = dto.probe(reasoner, found[:6], problems, replace(HOW, exit=close))
    bare = dto.probe(reasoner, found[:6], problems, HOW)
    assert [o.shares for o in said] == [o.shares for o in bare]
    (told,) = dto.probe(reasoner, found[:1], problems, replace(HOW, exit=close + problems[0].answer))
    assert np.mean(told.shares) > 0.7, "what the text already says of the answer counts"


def test_pairs_are_what_trl_asks_for(reasoner, better):
    rows = dto.pairs(reasoner, better)
    assert list(rows) == ["problem_id", "prompt", "chosen", "rejected"] and len(rows) == sum(o.path is not None for o in better)
    assert (rows["chosen"] != rows["rejected"]).all()
    table = dto.table(better)
    assert len(table) == len(better) and table["path_tokens"].notna().sum() == len(rows)


def test_the_recipe_trains_on_the_pairs(reasoner, better, tmp_path):
    datasets, cpo = pytest.importorskip("datasets"), pytest.importorskip("trl.experimental.cpo")
    args = cpo.CPOConfig(
        str(tmp_path), loss_type="simpo", cpo_alpha=0.0, simpo_gamma=0.5, beta=2.0, max_steps=2, per_device_train_batch_size=4,
        learning_rate=1e-3, report_to=[], use_cpu=True, save_strategy="no", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    data = datasets.Dataset.from_pandas(dto.pairs(reasoner, better)[["prompt", "chosen", "rejected"]])
    trainer = cpo.CPOTrainer(copy.deepcopy(reasoner.model), args, train_dataset=data, processing_class=reasoner.tokenizer)
    learnt = {(tuple(row["chosen_input_ids"]), tuple(row["rejected_input_ids"])) for row in trainer.train_dataset}
    meant = {(o.path.token_ids, o.original.token_ids) for o in better if o.path and o.original.finish == "stop"}
    assert meant and meant <= learnt, "TRL trains on the very tokens: read again from text, none is lost or added"
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 2 and np.isfinite(losses).all()


def test_bad_settings_and_models_without_tags_are_refused(reasoner, problems, found):
    with pytest.raises(ValueError, match="threshold=1"):
        DTOSettings(threshold=1.0)
    with pytest.raises(KeyError, match="not among the 1 given"):
        dto.probe(reasoner, found, problems[1:2], HOW)
    with pytest.raises(NoThinkTagsError, match="exit="):
        dto.probe(replace(reasoner, tags=None), found, problems, HOW)


def test_completions_are_drawn_independently_of_the_probes_that_chose_their_segment(reasoner, problems, found, monkeypatch):
    seeds: dict[str | None, set[int]] = {}
    continuations = generate.continuations

    def seen(condition, inputs, sampling):
        seeds.setdefault("greedy" if sampling.temperature == 0 else str(sampling.n), set()).add(sampling.seed)
        return continuations(condition, inputs, sampling)

    monkeypatch.setattr(generate, "continuations", seen)
    dto.optimise(reasoner, found[:4], problems, replace(HOW, probes=3, completions=5))
    assert seeds["3"] == {HOW.answering.seed} and seeds["5"] == {HOW.answering.seed + 1}
