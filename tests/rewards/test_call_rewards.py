"""Rewards of responses with tool calls: against naive versions, printed values of their specification, and what must not matter."""

from __future__ import annotations

import json
import math
import random
import re
import sqlite3
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from batches import every_reward, full_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from toolkit import rewards
from toolkit.rewards import RewardBatch, Schedule, as_trl
from toolkit.rewards.columns import LABEL_COLUMNS
from toolkit.rewards.mash import MASH, abstention
from toolkit.rewards.ppr import PPR, assumed_principles
from toolkit.rewards.r3 import R3, assumed_similarity
from toolkit.rewards.re_searcher import RESearcher, pass_consistency, perturbed, result_similarity
from toolkit.rewards.reseek import ReSeek, verdict_reward
from toolkit.rewards.search_gen_v import LABELS, SearchGenV, assumed_verifier, macro_f1, nugget_score, verifier_reward
from toolkit.rewards.text_to_sql import ContrastiveSQL
from toolkit.rewards.toolrl import ToolCall, ToolRL, calls_of, matching_score
from toolkit.rewards.turns import RESULT, SEARCH, Protocol, Turn, assumed_verdict, verdicts
from toolkit.tools import Marks, Tool, Toolbox, calculate
from toolkit.tools.queries import executes_like
from toolkit.types import Problem, Rollout, Span

WORDS = st.text(alphabet="ab ", min_size=1, max_size=6)


def written(parts: list[tuple[str, str, str]], last: str) -> str:
    """The text of a response: each part is thinking, the argument of a call, and the text of its result."""
    return "".join(think + SEARCH.around(query) + RESULT.around(found) for think, query, found in parts) + last


# --- turns ---------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(WORDS, WORDS, WORDS), max_size=4), WORDS)
def test_turns_are_what_the_response_was_made_of(parts, last):
    turns = Protocol().turns(written(parts, last), len(parts))
    expected = [(think + f"<search>{q}</search>", "search", q.strip(), found.strip()) for think, q, found in parts]
    assert [tuple(turn) for turn in turns] == [*expected, (last, None, "", None)]


FAKES = {
    "a result before the call": "<result>7</result><search>q</search><result>true</result>7",
    "a closing mark alone": "</search><result>7</result><search>q</search><result>true</result>7",
    "an opening mark alone": "<search>a <search>q</search><result>true</result>7",
    "text in the last token of the mark": "<search>q</search>\n<result>true</result>7",
}


@pytest.mark.parametrize("what", FAKES)
def test_only_a_placed_result_counts_as_a_result(what):
    first, last = Protocol().turns(FAKES[what], 1)
    assert (first.argument, first.result, last.written) == ("q", "true", "7")


def test_a_call_without_an_answer_is_in_the_last_turn_and_has_no_result():
    turns = Protocol().turns("<search>a</search><result>b</result><search>c</search>", 1)
    assert turns[-1] == Turn("<search>c</search>", "search", "c", None)
    assert len(Protocol().turns("<search>a</search><result>b</result>", 1)) == 2


def test_marks_of_a_toolbox_are_read_and_other_marks_are_an_error_that_names_them():
    box = Toolbox((Tool(calculate),), {"calculate": Marks("[", "]")}, Marks("{", "}"))
    turns = Protocol.of(box).turns("a[1+1]{2}2", 1)
    assert (turns[0].tool, turns[0].argument, turns[0].result) == ("calculate", "1+1", "2")
    with pytest.raises(ValueError, match=r"1 answered calls shows only 0 of the form <search>.*Protocol\.of"):
        Protocol().turns("a[1+1]{2}2", 1)


def test_a_judgement_belongs_to_the_result_before_it():
    text = written([("relevant ", "a", "relevant"), ("irrelevant. ", "b", "x"), ("", "c", "x")], "<judge>Yes</judge>")
    assert verdicts(Protocol().turns(text, 3)) == [False, None, True]
    assert verdicts(Protocol().turns("relevant", 0)) == []


# --- columns -------------------------------------------------------------------------------------------------


def problem(**meta) -> Problem:
    return Problem("p", ({"role": "system", "content": "s"}, {"role": "user", "content": "where?"}), "Tal", meta)


def rollout(text: str = "Tal", calls: int = 0) -> Rollout:
    results = tuple(Span(2 + 2 * k, 3 + 2 * k) for k in range(calls))
    return Rollout("p", 0, tuple(range(20)), 1, None, Span(1, 20), "stop", text, True, results=results)


def test_labels_of_problems_are_columns_as_they_stand():
    labels = {name: (name, "x") for name in LABEL_COLUMNS}
    batch = RewardBatch.from_rollouts([rollout()] * 2, [problem(**labels)])
    assert {name: batch[name][1] for name in labels} == labels
    assert batch["question"].tolist() == ["where?"] * 2 and batch["gold_answer"].tolist() == ["Tal"] * 2
    assert not LABEL_COLUMNS.keys() & RewardBatch.from_rollouts([rollout()], [problem()]).columns.keys()
    assert "question" not in RewardBatch.from_rollouts([rollout()])


EPISODES = ("ppr", "re_searcher", "reseek", "toolrl")


@pytest.mark.parametrize("name", EPISODES)
def test_a_recorded_episode_is_paid_offline_as_in_trl(name):
    text = "<think>asked: x <search>Zor</search><result>Tal is in Zor</result>relevant.</think>Tal"
    labels = {"gold_documents": ("Tal is in Zor",), "gold_calls": calls_of(["Zor"])}
    reward = rewards.ALL[name].make()
    recorded = Rollout("p", 0, tuple(range(20)), 1, Span(2, 9), Span(10, 20), "stop", text, True, results=(Span(4, 6),))
    offline = rewards.score([recorded], reward, [problem(**labels)])["reward"].tolist()
    completion = [
        {"role": "assistant", "content": "<think>asked: x <search>Zor</search>"},
        {"role": "tool", "content": "<result>Tal is in Zor</result>"},
        {"role": "assistant", "content": "relevant.</think>Tal"},
    ]
    given_ = {"correct": [1], "formatted": [1], "problem_id": ["p"], "answer_text": ["Tal"]}
    rows = {k: [list(v)] for k, v in labels.items()}  # as a dataset has them
    assert as_trl(reward)(["?"], [completion], [list(range(19))], **given_, **rows) == offline
    assert offline[0] > 0


# --- MASH ----------------------------------------------------------------------------------------------------


def test_mash_counts_calls_and_never_tokens():
    reward = MASH(kind="otc", cost="calls")
    batch = RewardBatch.from_columns(correct=[1, 1, 1, 0], calls=[1, 2, 4, 0])
    assert_allclose(reward(batch).values, [1, math.sin(2 * math.pi / 3), math.sin(4 * math.pi / 5), 0])
    assert reward.best == {"problem": 1} and reward.needs == {"correct", "calls"}
    with pytest.raises(ValueError, match="cost='searches'"):
        MASH(cost="searches")


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=12))
def test_scores_of_abstention_are_those_of_scikit_learn(pairs):
    from sklearn.metrics import f1_score

    asked, answerable = np.array(pairs).T
    scores = abstention(asked, answerable)
    assert_allclose(scores["unanswerable"], f1_score(~answerable, asked, zero_division=np.nan))
    assert_allclose(scores["answerable"], f1_score(answerable, ~asked, zero_division=np.nan))


# --- ReSeek --------------------------------------------------------------------------------------------------


def test_always_accepting_pays_only_if_two_thirds_are_useful_and_rejecting_only_if_half_are_useless():
    for share in (0.5, 2 / 3, 0.8):
        accept = share * verdict_reward(True, True) + (1 - share) * verdict_reward(True, False)
        reject = share * verdict_reward(False, True) + (1 - share) * verdict_reward(False, False)
        assert accept == pytest.approx(0.9 * share - 0.6) and reject == pytest.approx(0.3 - 0.6 * share)


JUDGED = st.lists(st.tuples(st.sampled_from(["relevant", "irrelevant", "so"]), st.booleans()), max_size=4)


@given(JUDGED, st.booleans(), st.sampled_from([1.0, 0.9, 0.5]))
def test_reseek_is_the_discounted_sum_of_a_naive_loop(judged, correct, gamma):
    parts = [("", "q", "gold doc here" if useful else "no gold") for _, useful in judged]
    text = "".join(written([part], f" {word} . ") for part, (word, _) in zip(parts, judged, strict=True)) + "7"
    total, steps = 0.0, [0.0]
    for t, (word, useful) in enumerate(judged, start=1):
        step = {("relevant", True): 0.3, ("relevant", False): -0.6, ("irrelevant", True): -0.3, ("irrelevant", False): 0.3}
        steps.append(step.get((word, useful), 0.0))
        total += gamma**t * steps[-1]
    steps[-1] += correct
    total += gamma ** len(judged) * correct
    batch = RewardBatch.from_columns(text=[text], calls=[len(judged)], correct=[correct], gold_documents=[("gold doc", "other")])
    assert_allclose(ReSeek(gamma)(batch).values, [total])
    assert_allclose(ReSeek(gamma).steps(batch)[0], steps)


# --- RE-Searcher ---------------------------------------------------------------------------------------------

GOAL = "<goal>river</goal>"
LADDER = {
    "right": (1, [(GOAL, "q", "gold")], "relevant. 7", 1, 1.2),
    "right without a goal": (1, [("", "q", "gold")], "relevant. 7", 1, 1.0),
    "right without reflection": (1, [(GOAL, "q", "gold")], "7", 1, 0.8),
    "right without search": (1, [], "7", 1, 1.0),
    "right and malformed": (1, [], "7", 0, 0.8),
    "wrong, found": (0, [(GOAL, "q", "gold")], "relevant. 8", 1, 0.5),
    "wrong, found, misjudged": (0, [(GOAL, "q", "gold")], "irrelevant. 8", 1, 0.3),
    "wrong, not found": (0, [(GOAL, "q", "tin")], "irrelevant. 8", 1, 0.4),
    "wrong and malformed, found": (0, [(GOAL, "q", "gold")], "irrelevant. 8", 0, 0.1),
    "half the reflections": (0, [(GOAL, "q", "tin"), ("relevant. " + GOAL, "q", "gold")], "relevant. 8", 1, 0.4),
    "no answer": (0, [(GOAL, "q", "gold")], "irrelevant. ", 0, 0.0),
}


@pytest.mark.parametrize("what", LADDER)
def test_re_searcher_pays_the_ladder_and_the_share_of_right_reflections(what):
    correct, parts, last, formatted, expected = LADDER[what]
    batch = RewardBatch.from_columns(
        text=[written(parts, last)], calls=[len(parts)], correct=[correct], formatted=[formatted], gold_documents=[("gold",)],
        answer_text=["" if what == "no answer" else last],
    )  # fmt: skip
    assert_allclose(RESearcher(weight=0.2)(batch).values, [expected])


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=8))
def test_consistency_over_runs_is_a_count_and_does_not_depend_on_the_order_of_runs(table):
    found = pass_consistency(np.array(table))
    kinds = Counter("always" if all(row) else "mixed" if any(row) else "never" for row in table)
    assert {k: round(v * len(table)) for k, v in found.items() if v} == kinds
    assert found == pass_consistency(np.array(table)[:, ::-1])


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=5), st.integers(0, 50))
def test_a_perturbed_query_differs_in_exactly_one_word(parts, seed):
    changed = perturbed(" ".join(parts), ["a", "b", "c"], seed).split()
    assert len(changed) == len(parts) and sum(x != y for x, y in zip(parts, changed, strict=True)) == 1
    assert changed == perturbed(" ".join(parts), ["a", "b", "c"], seed).split()


def test_similarity_of_results_compares_documents():
    assert result_similarity("x\ny\nz", "z\n x") == pytest.approx(2 / 3) == result_similarity("z\nx", "x\ny\nz")
    assert result_similarity("", "") == 1 and result_similarity("x y", "y x") == 0
    with pytest.raises(ValueError, match="need a word in the query"):
        perturbed(" ", ["a", "b"], 0)


# --- PPR -----------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5), st.booleans())
def test_no_step_of_a_right_response_loses_and_none_of_a_wrong_one_gains(scores, correct):
    text = written([("", "q", "r")] * (len(scores) - 1), "7")
    batch = RewardBatch.from_columns(text=[text], calls=[len(scores) - 1], correct=[correct])
    reward = PPR(principles=lambda turns: scores)
    (steps,) = reward.steps(batch)
    assert steps.tolist() == [p + correct - 1.0 for p in scores]
    assert (steps >= 0).all() if correct else (steps <= 0).all()
    assert_allclose(reward(batch).values, [np.mean(steps)])


def test_the_default_principles_count_repeated_calls_and_empty_results():
    parts = [("", "Zor", "x"), ("", "zor ", "x"), ("", "Ao", "nothing found"), ("", "Bel", "error (timeout): 5 s"), ("", "Zor", "")]
    turns = Protocol().turns(written(parts, "7"), 5)
    assert assumed_principles(turns) == [1.0, 0.5, 0.5, 0.5, 0.0, 1.0]
    assert assumed_principles(Protocol().turns("<search>a</search>", 0)) == [0.0]


# --- ToolRL --------------------------------------------------------------------------------------------------


def naive_toolrl(gold: list[dict], calls: list[dict]) -> float:
    """The released rule with the best of all pairings, where ours pairs greedily."""

    def match(one, other):
        a, b = Counter(one), Counter(other)
        return sum(min(a[k], b[k]) for k in a) / (sum(max(a[k], b[k]) for k in {*a, *b}) or 1) if a or b else 1.0

    largest = 1 + sum(1 + len(g["parameters"]) for g in gold)
    best = 0.0
    for order in permutations(range(len(calls) + len(gold)), len(gold)):
        total = 0.0
        for g, at in zip(gold, order, strict=True):
            if at < len(calls) and calls[at]["name"] == g["name"]:
                p = calls[at]["parameters"]
                total += match(list(g["parameters"]), list(p)) + sum(p.get(k) == v for k, v in g["parameters"].items())
        best = max(best, total)
    return 6 * (match([g["name"] for g in gold], [c["name"] for c in calls]) + best) / largest - 3


CALLS = st.lists(
    st.fixed_dictionaries(
        {"name": st.sampled_from("fg"), "parameters": st.dictionaries(st.sampled_from("xyz"), st.integers(0, 1), max_size=2)}
    ),
    max_size=3,
)


@settings(max_examples=200, deadline=None)
@given(CALLS.filter(len), CALLS)
def test_toolrl_is_the_naive_rule_for_one_right_call_and_never_above_the_best_pairs_for_several(gold, calls):
    found = matching_score([ToolCall(**g) for g in gold], [ToolCall(**c) for c in calls])
    naive = naive_toolrl(gold, calls)
    assert -3 <= found <= naive + 1e-9
    if len(gold) == 1:
        assert found == pytest.approx(naive)
    assert matching_score([ToolCall(**g) for g in gold], [ToolCall(**g) for g in gold[::-1]]) == pytest.approx(3)


def test_toolrl_has_the_printed_values_of_its_specification():
    gold = [ToolCall("f", {"x": 1, "y": 2})]
    found = [
        matching_score(gold, [ToolCall(*c)]) for c in (("f", {"x": 1, "y": 2}), ("f", {"x": 1, "y": 3}), ("f", {"x": 1}), ("h", {}))
    ]
    assert_allclose(found, [3, 1.5, 0.75, -3])
    assert matching_score(gold, []) == -3 and matching_score([], []) == 0 == matching_score([], gold)
    assert matching_score(gold, [ToolCall("f", None)]) == -3


def test_toolrl_reads_parameters_from_json_and_follows_schedules():
    gold = [({"name": "f", "parameters": {"a": 1, "b": "Two"}},)] * 3
    protocol = Protocol({"f": Marks.of("f")})
    arguments = [json.dumps({"a": 1, "b": "two"}), json.dumps({"a": True, "b": "two"}), "1, two"]
    texts = [f"x y <f>{a}</f><result>r</result>7" for a in arguments]

    def paid(step=0, **options):
        columns = dict(text=texts, calls=1, formatted=1, answer_text="7", gold_calls=gold, step=step)
        return ToolRL(parameters={"f": ("a", "b")}, protocol=protocol, **options)(RewardBatch.from_columns(**columns))

    assert_allclose(paid().components["calls"], [3, 1.5, -3])
    assert_allclose(paid(matching="coarse").components["calls"], [3, -3, -3])
    for most in (0.1, 0.2, 0.4, 0.8, 1.6, 1.8, 2.7):  # rounding must not make an exact call a wrong one
        assert_allclose(paid(matching="coarse", most=most).components["calls"], [most, -most, -most])
    assert_allclose(paid(step=30, most=Schedule(1.0, 3.0, 0, 60)).components["calls"], [2, 1, -2])
    scheduled = paid(step=105, length=1.0, target=Schedule(4, 8, 0, 105)).components["length"]
    assert scheduled[0] == pytest.approx(sum(len(part.split()) for part in (f"x y <f>{arguments[0]}</f>",)) / 8)
    assert (paid().components["length"] == 0).all() and (paid().components["format"] == 1).all()


@pytest.mark.parametrize(
    ("text", "positive"),
    [
        ("relevant", True), ("This is not relevant.", False), ("irrelevant", False), ("Is it relevant? <judge>No</judge>", False),
        ("Hardly relevant? <judge>yes</judge>", True),
    ],
)  # fmt: skip
def test_a_judgement_is_read_with_its_sign_and_a_mark_comes_first(text, positive):
    found = assumed_verdict.search(text)
    assert found is not None and any(found.groupdict().get(name) for name in ("yes", "relevant")) is positive


def test_numbers_of_a_nugget_are_compared_as_wholes():
    assert assumed_verifier("5.3", ["3.5"]) == ["not_support"] and assumed_verifier("5", ["-5"]) == ["not_support"]
    assert assumed_verifier("it is -3.5", ["-3.5"]) == ["support"]


# --- Search-Gen-V --------------------------------------------------------------------------------------------

SOME = st.lists(st.sampled_from(LABELS), min_size=1, max_size=8)


@given(SOME.flatmap(lambda g: st.tuples(st.just(g), st.lists(st.sampled_from(LABELS), min_size=len(g), max_size=len(g)))))
def test_f1_of_labels_is_that_of_scikit_learn_where_unused_labels_count_one(pair):
    from sklearn.metrics import f1_score

    gold, found = pair
    per_label = f1_score(gold, found, labels=list(LABELS), average=None, zero_division=1.0)
    unused = [label not in {*gold, *found} for label in LABELS]
    assert macro_f1(found, gold) == pytest.approx(np.where(unused, 1.0, per_label).mean())


def test_a_verifier_is_paid_as_printed_and_nothing_for_a_wrong_number_of_labels():
    s, p, n = LABELS
    assert verifier_reward([s, n, s], [s, n, p]) == pytest.approx(0.4944, abs=5e-5)
    assert verifier_reward([s, n], [s, n]) == pytest.approx(1.0) and verifier_reward([s, n], [s, n], blocks=2) == pytest.approx(0.1)
    assert verifier_reward([s], [s, n]) == 0
    assert verifier_reward([s, n], [s, n], reasoning=0.5, requested=False) == pytest.approx(0.8)


@given(SOME, st.floats(0, 1))
def test_a_nugget_score_is_a_mean_that_grows_with_each_label_and_ignores_order(labels, partial):
    worth = dict(zip(LABELS, (1, partial, 0), strict=True))
    assert nugget_score(labels, partial=partial) == pytest.approx(sum(worth[label] for label in labels) / len(labels))
    assert nugget_score(labels[::-1], partial=partial) == pytest.approx(nugget_score(labels, partial=partial))


def test_the_verifier_is_an_argument_and_must_label_every_nugget():
    batch = RewardBatch.from_columns(answer_text=["the Tal", "Mip"], gold_answer="Tal", nuggets=[("Tal", "Mip", "big Mip")] * 2)
    assert_allclose(SearchGenV()(batch).values, [1, 0])
    assert_allclose(SearchGenV("long", partial=0.25)(batch).values, [1 / 3, (1 + 0.25) / 3])
    assert_allclose(SearchGenV("long", verifier=lambda a, n: ["support"] * len(n))(batch).values, [1, 1])
    with pytest.raises(ValueError, match="1 labels for 3 nuggets"):
        SearchGenV("long", verifier=lambda a, n: ["support"])(batch)
    with pytest.raises(ValueError, match="label 'maybe'"):
        nugget_score(["maybe"])


# --- Text-to-SQL ---------------------------------------------------------------------------------------------

TOWNS = "create table towns (name, people); insert into towns values ('Ao', 3), ('Bei', 5), ('Cy', 3);"
LIKE = {
    "the same query": ("select name from towns where people = 3", True),
    "another way": ("select name from towns where not people > 3", True),
    "other names": ("select name as n from towns where people = 3", True),
    "another order": ("select name from towns where people = 3 order by name desc", True),
    "twice the rows": ("select name from towns where people = 3 union all select name from towns where people = 3", False),
    "fewer rows": ("select name from towns where people = 3 limit 1", False),
    "other columns": ("select name, people from towns where people = 3", False),
    "a deletion": ("delete from towns", False),
    "no query": ("Ao and Cy", False),
    "nothing": ("", False),
    "no end": ("with recursive c(x) as (select 1 union all select x + 1 from c) select x from c order by x", False),
}


@pytest.mark.parametrize("what", LIKE)
def test_a_query_is_right_if_its_rows_are(what):
    query, expected = LIKE[what]
    assert executes_like(query, "select name from towns where people = 3", TOWNS) == expected


def test_the_order_of_rows_matters_only_if_the_right_query_orders_them():
    up, down = (f"select name from towns order by name {way}" for way in ("asc", "desc"))
    assert executes_like(up, up, TOWNS) and not executes_like(down, up, TOWNS)
    assert executes_like(down, f"select name from ({up})", TOWNS)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from(["name", "people", "name, people"]), min_size=2, max_size=2),
    st.lists(st.integers(2, 6), min_size=2, max_size=2),
)
def test_execution_agrees_with_plain_sqlite(columns, limits):
    one, other = (f"select {c} from towns where people < {n}" for c, n in zip(columns, limits, strict=True))
    plain = sqlite3.connect(":memory:")
    plain.executescript(TOWNS)
    same = sorted(plain.execute(one).fetchall()) == sorted(plain.execute(other).fetchall())
    plain.close()
    assert executes_like(one, other, TOWNS) == same


def test_similarity_tells_failing_queries_apart_and_execution_outweighs_it():
    answers = [
        "select name from towns where people = 3",
        "select name from towns where people = 9",
        "select x from y",
        "```sql\nselect 1```",
    ]
    columns = dict(question="name of towns with people 3", gold_sql="select name from towns where people = 3", schema=TOWNS)
    values = ContrastiveSQL()(RewardBatch.from_columns(answer_text=answers, **columns)).values
    assert values[0] > 1 > values[1] > values[2] and (np.diff(values)[:2] < 0).all()
    always = ContrastiveSQL(weight=0.5, similarity=lambda question, query: 1.0)
    assert_allclose(always(RewardBatch.from_columns(answer_text=answers, **columns)).values, [1.5, 0.5, 0.5, 0.5])


# --- R3 ------------------------------------------------------------------------------------------------------


def naive_r3(question: str, text: str) -> float:
    parts = text.split()
    grams = [" ".join(parts[i : i + 3]) for i in range(len(parts) - 2)]
    a, b = Counter(re.findall(r"\w+", question)), Counter(re.findall(r"\w+", text))
    dot = sum(a[w] * b[w] for w in a)
    cosine = dot / math.sqrt(sum(v**2 for v in a.values()) * sum(v**2 for v in b.values())) if a and b else 0.0
    return cosine * len(parts) / 100 * (len(set(grams)) / len(grams) if grams else 1.0)


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=6), st.lists(st.sampled_from("abcd"), max_size=30))
def test_r3_is_the_product_of_a_naive_loop(question, answer):
    batch = RewardBatch.from_columns(question=" ".join(question), answer_text=[" ".join(answer)])
    assert_allclose(R3()(batch).values, [naive_r3(" ".join(question), " ".join(answer))], atol=1e-12)


def test_r3_has_the_printed_values_of_its_specification():
    texts = [" ".join(map(str, range(50))), " ".join(["a", "b", "c"] * 33)]
    reward = R3(similarity=lambda one, other: 0.8)
    assert_allclose(reward(RewardBatch.from_columns(question="q", answer_text=texts)).values, [0.4, 0.8 * 0.99 * 3 / 97])
    closed = R3(open_ended=False, similarity=lambda one, other: 0.8, rescale=lambda v: v / 2)
    assert_allclose(closed(RewardBatch.from_columns(gold_answer="g", answer_text=texts)).values, [0.4, 0.4 * 3 / 97])


def test_a_negative_incentive_pays_short_answers_more_and_never_less_than_nothing():
    batch = RewardBatch.from_columns(question="q", answer_text=["a", "a b c d", "x " * 300])
    values = R3(incentive=-1.0, similarity=lambda one, other: 1.0)(batch).values
    assert_allclose(values[:2], [0.99, 0.96])
    assert values[2] == 0


def test_the_default_similarity_ignores_the_order_of_words_and_is_symmetric():
    parts = ["the", "river", "of", "the", "Zor"]
    shuffled = random.Random(0).sample(parts, len(parts))
    assert assumed_similarity(" ".join(parts), " ".join(shuffled)) == pytest.approx(1)
    assert assumed_similarity("a b", "b c") == assumed_similarity("b c", "a b") == pytest.approx(0.5)


# --- all of them ---------------------------------------------------------------------------------------------

NEW = (*EPISODES, "search_gen_v", "contrastive_sql", "r3")


@pytest.mark.parametrize("name", NEW)
def test_a_reward_pays_in_trl_what_it_pays_for_a_batch(name):
    batch, reward = full_batch([1, 0, 1, 1], [5, 9, 20, 40], "q", seed=3), every_reward()[name]
    rows = {k: [list(v) if isinstance(v, tuple) else v for v in batch[k].tolist()] for k in (*reward.needs, "problem_id")}
    paid = as_trl(reward)(["?"] * 4, list(batch["text"]), [[1]] * 4, **rows)
    assert_allclose(paid, reward(batch).values)


@pytest.mark.parametrize("name", NEW)
def test_a_reward_is_unchanged_by_what_it_does_not_read(name):
    batch = full_batch([1, 0, 1, 1], [5, 9, 20, 40], "q", seed=3)
    reward = every_reward()[name]
    fewer = RewardBatch({k: v for k, v in batch.columns.items() if k in {*reward.needs, "problem_id"}})
    assert_allclose(reward(fewer).values, reward(batch).values)
    for column in sorted(reward.needs):
        with pytest.raises(rewards.MissingColumnError, match=column):
            reward(RewardBatch({k: v for k, v in fewer.columns.items() if k != column}))
