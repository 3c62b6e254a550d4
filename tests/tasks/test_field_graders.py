"""The toolkit's graders beside those of lm-eval and lighteval, on the recorded responses of data/grading."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

pytest.importorskip("math_verify", reason="the [tasks] extra")
HERE = Path(__file__).parents[2] / "data/grading"


def script(name):
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


compare, others, written = script("compare"), script("others"), script("written")


@pytest.fixture(scope="module")
def responses():
    return compare.responses()


@pytest.fixture(scope="module")
def verdicts():
    return compare.recorded()


def test_there_are_300_responses_and_every_tool_graded_each(responses, verdicts):
    assert len(responses) == 300
    assert [
        (r["style"], r["format"], r["gold"], r["right"], r["response"]) for r in responses.values() if r["source"] == "written"
    ] == list(written.ROWS)
    whole = {i for i, row in responses.items() if row["format"] == written.G}
    assert len(verdicts) == 9
    for grader, column in verdicts.items():
        assert set(column) == (whole if "gsm8k" in grader or grader == "toolkit number" else set(responses)), grader


def test_the_toolkit_still_gives_the_recorded_verdicts(responses, verdicts):
    for i, row in responses.items():
        for grader, verdict in compare.ours(row).items():
            assert verdict == verdicts[f"toolkit {grader}"][i], (grader, row)


def test_a_verdict_on_another_response_or_format_or_gold_answer_is_graded_again():
    rows = [{"id": f"{i}", "format": "gsm8k", "gold": "4", "response": "<think></think>4"} for i in range(5)]
    lines = [f"{json.dumps({'id': row['id'], 'graded': others.graded(row), 'grader': True})}\n" for row in rows]
    assert others.current(lines, rows) == {row["id"]: line for row, line in zip(rows, lines, strict=True)}
    lines[3] = lines[3].rstrip("\n")  # what a killed process left
    lines[4] = f"{json.dumps({'id': '4', 'grader': True})}\n"  # of a version that wrote no hash
    for row, (name, other) in zip(rows, {"format": "math", "gold": "5", "response": "<think></think>5"}.items(), strict=False):
        row[name] = other
    assert others.current(lines, rows) == {}


def test_the_hash_of_a_graded_response_is_no_verdict(monkeypatch, tmp_path):
    monkeypatch.setattr(compare, "HERE", tmp_path)
    for tool in ("toolkit", *compare.TOOLS):
        (tmp_path / f"{tool}.jsonl").write_text('{"id": "000", "graded": "0123456789ab", "grader": true}\n')
    assert compare.recorded() == {f"{tool} grader": {"000": True} for tool in ("toolkit", *compare.TOOLS)}


def test_every_disagreement_has_exactly_one_explanation_and_nothing_else_has_one(verdicts):
    assert sorted(compare.explained()) == sorted(compare.disagreements(verdicts))
    assert {entry["right"] for entry in compare.explanations()} <= set(compare.RIGHT)


def test_the_tables_are_made_from_the_recorded_verdicts(verdicts):
    page = (HERE / "README.md").read_text()
    for name, text in (
        ("agreement", compare.agreement(verdicts)),
        ("causes", compare.causes()),
        ("misread", compare.misread(verdicts)),
    ):
        assert f"<!-- {name}: begin -->\n\n{text}\n\n<!-- {name}: end -->" in page


CHECKS = {
    "The thought is never closed": lambda text: "<think>" in text and "</think>" not in text,
    "The grader accepts only the form `####": lambda text: "####" not in text,
    "The grader accepts only the sentence `Final Answer": lambda text: "I hope it is correct" not in text,
    "The response was cut off inside": lambda text: re.search(r"\\boxed\{[^}]*$", text),
    "The regular expression takes `$.`": lambda text: text.endswith("$."),
    "The minus sign is the one of Unicode": lambda text: "−" in text,
}
"""Beginning of a cause -> what must hold of each response of this cause."""


@pytest.mark.parametrize("cause", CHECKS)
def test_a_cause_that_can_be_checked_holds_of_its_responses(cause, responses):
    (entry,) = [entry for entry in compare.explanations() if entry["cause"].startswith(cause)]
    for i in {i for ids in entry["cases"].values() for i in ids}:
        assert CHECKS[cause](responses[i]["response"]), responses[i]


def test_verdicts_are_those_of_math_verify_but_for_our_four_rules(responses, verdicts):
    from math_verify import parse, verify

    from toolkit.rewards.answers import closed_answer_text

    differing = set()
    for i, row in responses.items():
        answer = closed_answer_text(row["response"])
        plain = verify(parse(f"${row['gold']}$", parsing_timeout=None), parse(answer, parsing_timeout=None), timeout_seconds=None)
        if plain != verdicts["toolkit math"][i]:
            differing.add(i)
    # Two sums that are not solved, a sentence in a box, a number in brackets, a minus sign of Unicode, a box that is cut off.
    assert differing == {"114", "152", "189", "235", "252", "299"}
