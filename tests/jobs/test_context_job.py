"""Measuring by length: right answers' log-probabilities against a loop, tables against means by hand, the command and its files."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from toolkit import cli, jobs
from toolkit import lm as lms
from toolkit.jobs import LengthStudy, context
from toolkit.lm import Condition
from toolkit.methods import giraffe
from toolkit.tasks import lines
from toolkit.tasks.haystack import ContextTooShortError, HaystackError

TINY = LengthStudy((60, 100), "lookup", instances=2, max_new_tokens=30)


def run(*arguments: object):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def by_hand(lm, ids, first):
    """Negative log-probability of each token from ``first`` on, each from its own pass over the tokens before it."""
    with torch.inference_mode():
        return [-float(lm.model(torch.tensor([ids[:p]])).logits[0, -1].log_softmax(-1)[ids[p]]) for p in range(first, len(ids))]


def test_nll_is_the_mean_over_the_response(tiny):
    prompt, response = tiny.prompt_ids([{"role": "user", "content": "K=5; B=K; B?"}]), [5, 40, 41]
    expected = by_hand(tiny, [*prompt, *response], len(prompt))
    assert jobs.nll(Condition(tiny), prompt, response) == pytest.approx(sum(expected) / 3, abs=1e-5)


def test_text_nll_averages_between_edges_whatever_the_size_of_a_piece(tiny, monkeypatch):
    ids = torch.randint(tiny.vocab_size, (30,), generator=torch.Generator().manual_seed(0)).tolist()
    each = [float("nan"), *by_hand(tiny, ids, 1)]
    for piece in (7, 1024):
        monkeypatch.setattr(context, "PIECE", piece)
        near, far = jobs.text_nll(Condition(tiny), ids, [0, 12, 30])
        assert near == pytest.approx(sum(each[1:12]) / 11, abs=1e-5)
        assert far == pytest.approx(sum(each[12:]) / 18, abs=1e-5)


def test_a_right_response_is_graded_right(tiny):
    from toolkit.generate import rollout_from_tokens

    for problem in TINY.problems(tiny, 100):
        ids = tiny.tokenizer(TINY.gold(problem) + "<|end|>", add_special_tokens=False)["input_ids"]
        assert rollout_from_tokens(tiny, problem, tiny.prompt_ids(problem.messages), ids).correct


def test_the_table_has_means_and_paired_differences():
    rows = pd.DataFrame(
        [
            {"condition": c, "length": 9, "problem_id": p, "tokens": 9, "correct": right, "nll": loss, "seconds": 1.0}
            for c, p, right, loss in (("a", "x", 1, 1.0), ("a", "y", 0, 3.0), ("b", "y", 1, 2.0), ("b", "x", 1, 4.0))
        ]
    )
    table = jobs.length_table(rows, base="a").set_index("condition")
    assert table.loc["b", "recall"] == 1 and table.loc["b", "recall_change"] == 0.5
    assert (table.loc["b", "nll_change_low"], table.loc["b", "nll_change_high"]) == (-1, 3)
    assert table.loc["a", "nll_change"] == 0


# --- records ---------------------------------------------------------------------------------------------------------


def test_records_fill_the_length_and_the_asked_one_moves_through_the_prompt(tiny):
    problems = lines.load(tiny, 1000, 4)
    for problem in problems:
        text = problem.messages[0]["content"]
        ids = tiny.prompt_ids(problem.messages)
        assert 1000 - 80 < len(ids) == problem.meta["tokens"] <= 1000
        assert text.count(lines.record(problem.meta["name"], int(problem.answer))) == 1
        assert text.count("REGISTER_CONTENT is <") == problem.meta["records"]
        assert len({line.split(":")[0] for line in text.splitlines() if line.startswith("line ")}) == problem.meta["records"]
    at = [p.messages[0]["content"].index(f"line {p.meta['name']}:") / len(p.messages[0]["content"]) for p in problems]
    assert at == sorted(at) and at[0] < 0.25 and at[-1] > 0.6
    assert lines.load(tiny, 1000, 4) == problems != lines.load(tiny, 1000, 4, seed=1)
    with pytest.raises(ContextTooShortError, match="Two records"):
        lines.load(tiny, 50, 1)
    with pytest.raises(HaystackError, match="no more"):
        lines.load(tiny, 10**6, 1)


def test_needles_are_hidden_at_every_depth_in_prompts_of_the_length_and_the_gold_response_is_the_answer(tiny):
    study = LengthStudy((900,), "needle", instances=10)
    problems = study.problems(tiny, 900)
    assert [p.meta["depth"] for p in problems] == [0.0, 0.25, 0.5, 0.75, 1.0] * 2
    for problem in problems:
        assert 900 - 120 < len(tiny.prompt_ids(problem.messages)) <= 900
        assert study.gold(problem) == problem.answer in problem.messages[0]["content"]


# --- the command -----------------------------------------------------------------------------------------------------


def test_giraffe_saves_a_model_that_loads_and_prints_what_it_writes(tmp_path):
    small = ("giraffe", "-t", "lookup", "--form", "parts", "--trained", 640, "--lengths", "60,100", "-n", 1, "--max-new-tokens", 20)
    result = run(*small, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    printed, written = json.loads(result.stdout), json.loads((tmp_path / "out" / "giraffe.json").read_text())
    assert printed["lengths"] == written["lengths"]
    assert [(r["condition"], r["length"]) for r in printed["lengths"]] == [
        (c, n) for n in (60, 100) for c in ("as trained", "changed")
    ]
    saved, tiny = lms.load(tmp_path / "out" / "model", device="cpu"), lms.load("tiny-reasoner", device="cpu")
    theta, base, _ = giraffe.trained(tiny)
    ours = giraffe.with_frequencies(tiny, giraffe.by_parts(theta, 4.0, 640, base))
    ids = torch.arange(7, 60)[None]
    with torch.inference_mode():
        assert torch.allclose(saved.model(ids).logits, ours.model(ids).logits, atol=1e-5)
    assert saved.model.config.max_position_embeddings == 4 * 4096
    other = run("giraffe", "-t", "lookup", "--form", "linear", "--lengths", "60", "-o", tmp_path / "out")
    assert other.exit_code != 0 and "changed in another way" in str(other.exception)
    again = run(*small, "-o", tmp_path / "out")
    assert again.exit_code == 0 and "by prompt length" in again.output
    assert len(list((tmp_path / "out" / "rows").iterdir())) == 4, "finished lengths are not measured again"
    other = run(*small, "-o", tmp_path / "out", "--think", "<a>,</a>")
    assert other.exit_code == 0, other.output
    assert len(list((tmp_path / "out" / "rows").iterdir())) == 8, "rows depend on the think tags"


@pytest.mark.parametrize("form", jobs.ROTARY_FORMS)
def test_every_form_changes_the_frequencies(form, tiny):
    changed = jobs.stretched(tiny, form, trained=640)
    with torch.inference_mode():
        ids = torch.arange(7, 60)[None]
        assert not torch.allclose(changed.model(ids).logits, tiny.model(ids).logits, atol=1e-3)


def test_help_shows_an_example():
    result = run("giraffe", "--help")
    assert result.exit_code == 0 and "Example" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--lengths", "long"), "give whole numbers"),
        (("--lengths", "0"), "must be at least 1"),
        (("--lengths", "90", "--form", "linear", "--exponent", "1"), "--exponent is not used"),
        (("--lengths", "90", "--form", "linear", "--trained", "9"), "--trained is not used"),
        (("--lengths", "90", "--text", "missing.txt"), "missing.txt"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(arguments, message, monkeypatch, tmp_path):
    monkeypatch.setattr("toolkit.lm.load", lambda *a, **k: pytest.fail("a model was loaded"))
    result = run("giraffe", *arguments, "-o", tmp_path / "out")
    assert result.exit_code != 0
    assert message in " ".join((result.output + str(result.exception)).replace("│", " ").split())


def test_lengths_beyond_the_changed_context_are_refused_before_measuring(tmp_path, tiny):
    changed = jobs.stretched(tiny, "linear", context=100)
    with pytest.raises(ValueError, match="changed model's context"):
        jobs.giraffe_report(tiny, changed, TINY, tmp_path / "out")
