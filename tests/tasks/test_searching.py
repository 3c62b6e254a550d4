"""Questions whose facts are in weights, in a corpus or in neither: gold answers read from the documents, episodes without and with mistakes."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import fields, replace
from itertools import combinations

import pytest

from toolkit import tasks
from toolkit.tasks import grading, searching, splits
from toolkit.tasks.generators import cues, searches, worlds
from toolkit.types import Problem

FLAWLESS = searches.Habits(**{f.name: 0.0 for f in fields(searches.Habits)})
RELATION = {word: relation for relation, both in worlds.WORDS.items() for word in both}


def told(world: worlds.World) -> dict[tuple[str, str], str]:
    """The facts as a reader of the documents would list them."""
    rows = (re.fullmatch(r"(\w+ \w+) (\w+) is ([\w ]+)", document) for document in world.documents)
    return {(row[1], RELATION[row[2]]): row[3] for row in rows if row}


def answer_of(p: Problem, facts: dict[tuple[str, str], str]) -> str:
    """The answer to a question, found by reading the question and the documents."""
    words = [w for w in re.findall(r"\w+", p.messages[0]["content"]) if w not in (*cues.CUES, *cues.NEUTRAL)]
    person = " ".join(w for w in words if w in worlds.FIRST or w in worlds.LAST)
    asked = [RELATION[w] for w in words if w in RELATION]
    for relation in sorted(asked, key=lambda r: len(asked) == 2 and r != "teacher"):
        person = facts.get((person, relation), searching.UNKNOWN)
    return person


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    return tasks.load("searching", "test", 200)


def test_gold_answers_are_those_in_the_documents(problems):
    facts = told(searching.SHIPPED)
    assert len(facts) == len(searching.SHIPPED.documents)
    assert all(answer_of(p, facts) == p.answer for p in problems)
    assert Counter(p.meta["hops"] for p in problems).keys() == {1, 2}


def test_facts_in_the_weights_are_the_same_in_every_world_and_others_only_by_chance():
    one, other = (told(worlds.World(name)) for name in ("one", "other"))
    lasting = {step: value for step, value in worlds.familiar().items() if value is not None}
    assert len(lasting) > 150 and all(one[step] == other[step] == value for step, value in lasting.items())
    both = [step for step in one.keys() & other.keys() - lasting.keys() if step[1] != "teacher"]
    assert len(both) > 100 and sum(one[step] == other[step] for step in both) / len(both) < 0.2


def test_where_tells_which_questions_another_world_answers_alike():
    """Those answered by the weights have the same answer in a world with other documents; of the others, chance alone does."""
    facts = told(worlds.World("another"))
    same = {where: [answer_of(p, facts) == p.answer for p in searching.load("dev", 150, where=where)] for where in searching.SHARES}
    assert all(same["weights"]) and sum(same["corpus"]) / len(same["corpus"]) < 0.2


def test_gold_queries_find_their_documents_and_the_words_of_the_question_often_do_not(problems):
    search, missed = searching.corpus(), []
    for p in problems:
        for query, document in zip(p.meta["gold_queries"], p.meta["gold_documents"], strict=True):
            assert document in search.search(query).split("\n")
        if p.meta["where"] == "corpus" and p.meta["hops"] == 1:
            query = f"{p.meta['person']} {p.meta['words'][0]}"
            missed.append(p.meta["gold_documents"][0] not in search.search(query).split("\n"))
    assert 0.1 < sum(missed) / len(missed) < 0.5


def test_fields_agree_with_one_another(problems):
    for p in problems:
        m = p.meta
        assert m["answerable"] == (m["where"] != "neither") == (p.answer != searching.UNKNOWN)
        assert m["needed_calls"] == sum(source != "weights" for source in m["sources"])
        assert (m["needed_calls"] == 0) == (m["where"] == "weights")
        assert len(m["gold_documents"]) == len(m["gold_queries"]) == sum(source != "neither" for source in m["sources"])
        assert m["cue"] == any(word in cues.CUES for word in p.messages[0]["content"].split())


def test_no_fact_that_must_be_searched_for_decides_questions_of_two_splits():
    def key(p: Problem) -> str:
        question = p.messages[0]["content"].replace(p.meta["word"], "").strip() if p.meta["word"] else p.messages[0]["content"]
        if p.meta["where"] == "weights":
            return question
        facts = told(searching.SHIPPED)
        person, steps = p.meta["person"], []
        for relation, source in zip(p.meta["relations"], p.meta["sources"], strict=False):
            steps.append((person, relation, source))
            person = facts.get((person, relation), "")
        return str([step for step in steps if step[2] != "weights"][-1])

    keys = {split: {key(p) for seed in (0, 1) for p in searching.load(split, 150, seed)} for split in splits.SPLITS}
    assert not any(keys[a] & keys[b] for a, b in combinations(keys, 2))


def test_kinds_of_questions_are_asked_in_the_stated_shares():
    rng = random.Random(0)
    drawn = Counter(searching.problem(rng, "train").meta["where"] for _ in range(800))
    assert {where: drawn[where] / 800 for where in drawn} == pytest.approx(searching.SHARES, abs=0.06)
    assert {p.meta["where"] for p in searching.load("test", 20, where="neither")} == {"neither"}
    with pytest.raises(ValueError, match="where='mind': choose one of weights, corpus, neither"):
        searching.load("test", 3, where="mind")


def test_an_answer_of_several_words_is_not_exact():
    p = Problem("p", ({"role": "user", "content": "?"},), "oslo", {"grader": "exact"})
    assert [grading.grade(p, text) for text in ("oslo", " Oslo.", "oslo rome", "unknown oslo", "rome", "")] == [
        True,
        True,
        *[False] * 4,
    ]
    assert grading.grade(replace(p, answer="tal bor"), "tal bor") and not grading.grade(replace(p, answer="tal bor"), "bor tal")


# --- synthetic episodes --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def writer() -> searches.Writer:
    world = worlds.World("tests")
    return searches.Writer(world, searching.corpus(world).search, FLAWLESS)


def episodes(writer: searches.Writer, n: int = 150) -> list[tuple[Problem, searches.Episode]]:
    rng = random.Random(0)
    drawn = (searching.problem(rng, "train", world=writer.world) for _ in range(n))
    return [(p, writer.write(p, rng)) for p in drawn]


def text_of(episode: searches.Episode) -> str:
    return " ".join(text for text, _ in episode.pieces)


def test_an_episode_without_mistakes_is_right_and_searches_only_where_it_must(writer):
    for p, episode in episodes(writer):
        assert episode.answer == p.answer
        assert p.meta["needed_calls"] <= episode.calls <= 2 * p.meta["needed_calls"]
        assert (episode.calls == 0) == (p.meta["where"] == "weights")


def test_results_in_an_episode_are_those_of_the_search_and_judgements_are_true(writer):
    for p, episode in episodes(writer, 120):
        text = text_of(episode)
        found = re.findall(
            r"<search> (.*?) </search> <result>(.*?)</result> (relevant|irrelevant) (?:: (.*?) )?\.", text, re.DOTALL
        )
        assert len(found) == episode.calls and episode.calls <= searching.MAX_CALLS
        for query, result, verdict, document in found:
            assert result == writer.search(query)
            if verdict == "relevant":
                assert document in p.meta["gold_documents"]
            else:
                assert not set(p.meta["gold_documents"][-1:]) & set(result.split("\n")) or p.meta["hops"] == 2


@pytest.mark.parametrize(
    ("habit", "sign"),
    [("oversearch", "<search>"), ("invent", "i know"), ("sloppy", "<search>"), ("trust", " relevant :"), ("give_up", "not found"), ("no_tool", "no answer")],
)  # fmt: skip
def test_each_mistake_shows_in_episodes(writer, habit, sign):
    clumsy = replace(writer, habits=replace(FLAWLESS, **{habit: 1.0}))
    plain, changed = episodes(writer), episodes(clumsy)
    count = [sum(text_of(episode).count(sign) for _, episode in made) for made in (plain, changed)]
    assert count[1] > 1.2 * count[0]
    if habit not in ("oversearch", "sloppy"):
        right = [sum(p.answer == episode.answer for p, episode in made) for made in (plain, changed)]
        assert right[1] < right[0] == len(plain)


def test_no_more_searches_than_the_tool_answers(writer):
    clumsy = replace(writer, habits=replace(FLAWLESS, oversearch=1.0, oversearch_hasty=1.0, sloppy=1.0, again=1.0, overlook=0.5))
    calls = [episode.calls for _, episode in episodes(clumsy, 400)]
    assert max(calls) == searching.MAX_CALLS == searching.toolbox().max_calls


def test_judging_drills_are_judged_without_mistakes_whatever_the_habits(writer):
    clumsy = replace(writer, habits=replace(FLAWLESS, trust=1.0, overlook=1.0))
    facts, verdicts = told(writer.world), Counter()
    for seed in range(40):
        text = text_of(clumsy.judging_drill(random.Random(seed)))
        pattern = r"so (\w+ \w+) (\w+) \. <search> .*? </search> <result>(.*?)</result> (relevant|irrelevant)"
        for person, word, result, verdict in re.findall(pattern, text, re.DOTALL):
            value = facts.get((person, RELATION[word]))
            stated = any(f"{person} {w} is {value}" in result.split("\n") for w in worlds.WORDS[RELATION[word]])
            assert (verdict == "relevant") == stated
            verdicts[verdict] += 1
    assert sum(verdicts.values()) == 160 and min(verdicts.values()) > 40


def test_recall_drills_remember_lasting_facts_and_search_for_all_others(writer):
    lasting, seen = worlds.familiar(), Counter()
    for seed in range(40):
        text = text_of(writer.recall_drill(random.Random(seed)))
        for person, word, rest in re.findall(r"so (\w+ \w+) (\w+) \. (.*?)(?= so |$)", text):
            value = lasting.get((person, RELATION[word]))
            assert rest == (f"<search> {person} {word} </search>" if value is None else f"i know {person} {word} is {value} .")
            seen[value is None] += 1
    assert sum(seen.values()) == 320 and min(seen.values()) > 80


def test_an_opening_remembers_what_lasts_and_searches_for_all_else(writer):
    rng, lasting = random.Random(1), worlds.familiar()
    for where in searching.SHARES:
        for _ in range(30):
            p = searching.problem(rng, "train", world=writer.world, where=where)
            person, word = p.meta["person"], p.meta["words"][0]
            value = lasting.get((person, p.meta["relations"][0]))
            search, memory = f"<search> {person} {word} </search>", f"i know {person} {word} is {value} ."
            assert writer.opening(p) == (search if value is None else memory)
