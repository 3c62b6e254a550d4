"""Word problems: what is told is what is computed, splits share no sentence, traces are wrong exactly where they say so."""

from __future__ import annotations

import random
import re
from dataclasses import fields
from itertools import combinations

import pytest

from toolkit import tasks
from toolkit.tasks import grading, splits, wordproblems
from toolkit.tasks.generators import stories, traces, wordtraces
from toolkit.tasks.generators.stories import STORIES, Story
from toolkit.tasks.wordproblems import Step, unmarked

CLUMSY = traces.Habits(slip_easy=0.4, slip_hard=0.4, wait_calm=0.5, wait_hasty=0.3, cue_push=0.3)
HASTY = traces.Habits(default_haste=0.3, continue_share=0.9, slip_easy=0.0, slip_hard=0.0)
EQUATION = re.compile(r"([\d(][\d ()]*[-+*/][-\d ()+*/]*[\d)]) (?:=|is) (\d+)")
KINDS = ("begin", "gain", "gains", "loss", "losses", "double", "half", "ask", "share", "price", "aside")


def sentences(story: Story, kind: str) -> tuple[str, ...]:
    found = getattr(story, kind)
    return (found,) if isinstance(found, str) else found


def pattern(sentence: str) -> re.Pattern[str]:
    """What a sentence may look like once it is told."""
    plain = re.escape(unmarked(sentence)[0])
    for name in ("n", "a", "b"):
        plain = plain.replace(rf"\{{{name}\}}", rf"(?P<{name}>\d+)")
    return re.compile(re.sub(r"\\\{(\w+)\\\}", lambda m: r"[a-z ]+" if m[1] == "things" else r"[A-Za-z]+", plain))


def read(text: str, story: Story) -> int:
    """The answer to a story, by a reader who knows its sentences and nothing of how it was made up."""
    total, at = None, 0
    known = [(kind, pattern(sentence)) for kind in KINDS for sentence in sentences(story, kind)]
    while at < len(text):
        matches = [(kind, m) for kind, regex in known if (m := regex.match(text, at))]
        found = [(kind, m) for kind, m in matches if (kind == "begin") == (total is None)]
        assert len({kind for kind, _ in found}) == 1, (text[at:], found)
        kind, match = max(found, key=lambda pair: pair[1].end())
        number = {name: int(value) for name, value in match.groupdict().items()}
        match kind:
            case "begin":
                total = number["n"]
            case "gain" | "loss":
                total += number["n"] if kind == "gain" else -number["n"]
            case "gains" | "losses":
                total += number["a"] * number["b"] * (1 if kind == "gains" else -1)
            case "double" | "price":
                total *= 2 if kind == "double" else number["n"]
            case "half" | "share":
                by = 2 if kind == "half" else number["n"]
                assert total % by == 0
                total //= by
        at = match.end() + 1
    return total


def inner(p) -> str:
    """A problem's text without the phrase around it."""
    before, after = p.meta["phrase"].split("{}")
    text = p.messages[0]["content"]
    assert text.startswith(before) and text.endswith(after)
    return text[len(before) : len(text) - len(after)]


# --- problems ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", splits.SPLITS)
def test_a_naive_reader_of_the_sentences_finds_the_gold_answer(split):
    read_as = {"plain": 0, "story": 0}
    for p in wordproblems.load(split, 500, seed=3):
        if p.meta["story"] == "plain":
            (expression,) = re.findall(r"\d[\d +*-]*\d|\d+", inner(p))
            assert p.answer == str(eval(expression))
            read_as["plain"] += 1
        else:
            assert p.answer == str(read(inner(p), STORIES[p.meta["story"]])), p
            read_as["story"] += 1
    assert min(read_as.values()) > 50


@pytest.mark.parametrize("split", splits.SPLITS)
def test_steps_follow_from_one_another_and_stay_in_range(split):
    for p in wordproblems.load(split, 400, seed=1):
        steps = p.meta["steps"]
        assert len(steps) == p.meta["difficulty"]
        assert p.answer == str(steps[-1].result) and not steps[-1].apart
        state = None
        for i, step in enumerate(steps):
            assert step.result == eval(str(step)) and 0 <= step.result <= wordproblems.LARGEST
            if i and steps[i - 1].apart:
                assert step.right == steps[i - 1].result
            if not step.apart:
                assert state is None or step.left == state
                state = step.result
        assert p.meta["easy"] == (len(steps) <= 2 and max(map(int, re.findall(r"\d+", p.messages[0]["content"]))) <= 12)


def test_needed_ranges_hold_the_quantities_in_the_order_they_are_told_and_no_other_number():
    for p in wordproblems.load("train", 400, seed=2):
        text, steps = p.messages[0]["content"], p.meta["steps"]
        told = [text[a:b] for a, b in p.meta["needed"]]
        used: list[list[int]] = []
        if p.meta["story"] != "plain" or steps[0].op != "*":
            used.append([steps[1 if steps[0].apart else 0].left])
        for i, step in enumerate(steps):
            if step.apart or (i == 0 and p.meta["story"] == "plain" and step.op == "*"):
                used.append(sorted([step.left, step.right]))  # "4 pens to each of 3 friends" tells the pair the other way round
            elif not (i and steps[i - 1].apart):
                used.append([step.right])
        numbers, at = [int(t) if t.isdigit() else 2 for t in told], 0
        for wanted in used:
            size = len(wanted)
            assert sorted(numbers[at : at + size]) == wanted, (text, told, used)
            at += size
        assert at == len(numbers)
        others = [m.span() for m in re.finditer(r"\d+", text) if m.span() not in p.meta["needed"]]
        assert len(others) <= 1, "at most the one number that is not needed"


def test_brackets_are_removed_and_their_ranges_kept():
    text, ranges = unmarked("[ab] c [d]e")
    assert (text, [text[a:b] for a, b in ranges]) == ("ab c de", ["ab", "d"])
    assert unmarked("none") == ("none", ())


def test_no_sentence_of_one_split_is_in_another():
    found = {
        split: {s for story in STORIES.values() if story.split == split for kind in KINDS for s in sentences(story, kind)}
        | set(stories.PLAIN[split])
        for split in splits.SPLITS
    }
    for a, b in combinations(found, 2):
        assert not found[a] & found[b], (a, b)
    assert {story.split for story in STORIES.values()} == set(splits.SPLITS)


def test_every_sentence_marks_its_numbers_and_only_an_aside_has_none_marked():
    for story in STORIES.values():
        assert {f.name for f in fields(story)} == {"split", "things", *KINDS}
        for kind in KINDS:
            for sentence in sentences(story, kind):
                wanted = {"ask": 0, "aside": 0, "gains": 2, "losses": 2}.get(kind, 1)
                assert len(re.findall(r"\[[^\]]+\]", sentence)) == wanted, sentence
                assert re.findall(r"\{[nab]\}", re.sub(r"\[[^\]]*\]", "", sentence)) == (["{n}"] if kind == "aside" else [])


def test_problems_come_from_the_stories_of_their_split_only():
    for split in splits.SPLITS:
        told = {p.meta["story"] for p in tasks.load("wordproblems", split, 200)} - {"plain"}
        assert told == {name for name, story in STORIES.items() if story.split == split}


def test_the_same_seed_gives_the_same_problems_and_another_seed_others():
    first = tasks.load("wordproblems", "dev", 40, 0)
    assert first == tasks.load("wordproblems", "dev", 40, 0)
    assert {p.id for p in first} != {p.id for p in tasks.load("wordproblems", "dev", 40, 1)}
    assert len({p.id for p in first}) == 40


def test_a_problem_never_changes():
    """Recorded once: results on these problems are published."""
    content = [(p.messages[0]["content"], p.answer) for p in wordproblems.load("test", 2, seed=0)]
    assert content == [
        ("How much is 4 + 5 - 4? Thank you!", "5"),
        (
            "In the morning a parking lot holds 12 bikes. During a concert the number of bikes doubles. At noon 3 bikes leave. 6 of the bikes are towed. Later 9 more arrive. In each of 3 hours 4 bikes arrive. How many bikes stand there now? A short reply will do.",
            "36",
        ),
    ]


@pytest.mark.parametrize("steps", [(1, 1), (6, 6), (2, 4)])
def test_difficulty_is_the_number_of_steps(steps):
    found = {p.meta["difficulty"] for p in wordproblems.load("train", 60, steps=steps)}
    assert found == set(range(steps[0], steps[1] + 1))


@pytest.mark.parametrize("steps", [(0, 3), (1, 7), (4, 2)])
def test_a_range_outside_the_steps_is_refused(steps):
    with pytest.raises(ValueError, match="give an inclusive range within"):
        wordproblems.load("test", 4, steps=steps)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="Unknown split 'validation': choose one of train, dev, test"):
        wordproblems.load("validation", 4)


def test_a_hurried_phrase_is_what_meta_calls_a_cue():
    found = wordproblems.load("test", 300)
    for p in found:
        assert p.meta["cue"] == (p.meta["phrase"] in stories.HURRIED)
        assert p.meta["phrase"] in (*stories.HURRIED, *stories.UNHURRIED, "{}")
    assert sum(p.meta["cue"] for p in found) / 300 == pytest.approx(wordproblems.HURRIED_SHARE, abs=0.07)


# --- traces --------------------------------------------------------------------------------------------------


def written(habits: traces.Habits, n: int = 300):
    rng = random.Random(4)
    return [(p, wordtraces.write(p, rng, habits)) for p in wordproblems.load("train", n, seed=6)]


def equations(line: str) -> list[tuple[str, int]]:
    return [(left, int(right)) for left, right in EQUATION.findall(line)]


@pytest.mark.parametrize("habits", [wordtraces.HABITS, CLUMSY, HASTY], ids=["usual", "clumsy", "hasty"])
def test_every_equation_is_right_but_for_declared_slips_which_the_next_line_mends(habits):
    slips = 0
    for _, trace in written(habits):
        lines = trace.text.split("\n")
        for i, line in enumerate(lines):
            wrong = [(left, right) for left, right in equations(line) if eval(left) != right]
            assert bool(wrong) == (i in trace.failed_lines), (line, trace)
            if wrong:
                (slipped,) = wrong
                ((expression, mended),) = equations(lines[i + 1])
                assert expression == slipped[0] and mended == eval(expression) != slipped[1]
                slips += 1
    assert slips > 30 if habits is CLUMSY else slips < 30


def test_every_trace_concludes_the_gold_answer_and_ends_on_it():
    for habits in (wordtraces.HABITS, CLUMSY, HASTY):
        for p, trace in written(habits):
            assert grading.grade(p, trace.conclusion)
            assert re.findall(r"\d+", trace.text.split("\n")[-1]), trace.text
            assert p.answer in re.findall(r"\d+", trace.text.split("\n")[-1])


def test_every_number_of_a_calm_trace_is_told_or_computed():
    for p, trace in written(
        traces.Habits(default_haste=0.0, ease_push=0.0, cue_push=0.0, mood_push=0.0, slip_easy=0.0, slip_hard=0.0)
    ):
        told = {int(v) for v in re.findall(r"\d+", p.messages[0]["content"])} | {2}
        told |= {step.result for step in p.meta["steps"]}
        assert {int(v) for v in re.findall(r"\d+", trace.text)} <= told
        said = {e for line in trace.text.split("\n") for e, _ in equations(line)}
        assert said == {str(step) for step in p.meta["steps"]}, "every step is there"


def test_steps_taken_together_are_one_right_expression():
    for p in wordproblems.load("train", 300, seed=8):
        steps = p.meta["steps"]
        for i in range(len(steps)):
            for j in range(i + 1, len(steps) + 1):
                if j == i + 1 or not steps[j - 1].apart:
                    assert eval(wordtraces.expression(steps[i:j])) == steps[j - 1].result
    taken = [Step("+", 2, 3, 5), Step("*", 4, 5, 20, apart=True), Step("+", 5, 20, 25), Step("/", 25, 5, 5)]
    assert wordtraces.expression(taken) == "(2 + 3 + 4 * 5) / 5"
    assert wordtraces.expression(taken[1:3]) == "5 + 4 * 5"


def test_haste_shortens_and_comes_from_phrases_and_ease():
    found = written(wordtraces.HABITS, 1500)

    def mean(test) -> float:
        lengths = [len(trace.text) for p, trace in found if p.meta["difficulty"] >= 3 and test(p, trace)]
        assert len(lengths) > 30
        return sum(lengths) / len(lengths)

    assert mean(lambda p, t: p.meta["cue"]) < 0.6 * mean(lambda p, t: not p.meta["cue"])
    easy = [t.haste for p, t in found if p.meta["easy"] and not p.meta["cue"]]
    hard = [t.haste for p, t in found if not p.meta["easy"] and not p.meta["cue"]]
    assert sum(easy) / len(easy) > 2 * sum(hard) / len(hard)


def test_every_style_occurs_and_step_by_step_is_the_default():
    found = [t for p, t in written(wordtraces.HABITS, 1500) if not p.meta["cue"] and not p.meta["easy"]]
    calm = sum(t.haste == wordtraces.HABITS.default_haste for t in found)
    assert calm > 0.85 * len(found)
    assert 0.02 < sum(bool(t.failed_lines) for t in found) / len(found) < 0.25
    assert 0.1 < sum(t.waits > len(t.failed_lines) for t in found) / len(found) < 0.6


def test_no_first_word_gives_a_style_away():
    """Most wordings of a skip begin as steps do, those of a mended slip as those of a passed check."""

    def first(wordings) -> list[str]:
        return [w.split()[0] for w in wordings]

    steps = {w for wordings in wordtraces._STEP.values() for w in first(wordings)} | set(first(wordtraces._SEVERAL))
    skips = first(wordtraces._SKIP)
    assert sum(w in steps for w in skips) >= 0.6 * len(skips)
    mends, checks = first(wordtraces._MEND), first(wordtraces._CHECK)
    assert sum(w in mends for w in checks) >= 0.5 * len(checks)
    assert min(map(len, (skips, mends, checks))) >= 4


def test_a_response_has_its_thinking_between_tags_and_its_answer_after_them():
    p, trace = written(wordtraces.HABITS, 1)[0]
    before, _, after = wordtraces.response(trace).partition("\n</think>\n")
    assert before == f"<think>\n{trace.text}" and after == trace.conclusion
    assert grading.grade(p, after)


def test_slips_are_wrong_whole_numbers():
    rng = random.Random(0)
    for result in range(100):
        for _ in range(50):
            slip = wordtraces._slip(rng, result)
            assert slip != result and slip >= 0
