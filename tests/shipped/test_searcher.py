"""Claims about the shipped tiny searcher: its search helps where facts are only in the corpus, and its card shows what was measured."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from toolkit import generate, lm, shipped, stats, store, tasks
from toolkit.generate import Sampling
from toolkit.lm import LM, Condition
from toolkit.tasks import searching
from toolkit.types import Rollout

FOLDER = Path(__file__).parents[2] / "data" / "tiny-searcher"
SAMPLING = Sampling(n=4, max_new_tokens=160)


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tiny_searcher_{name}", FOLDER / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def searcher() -> LM:
    return lm.load("tiny-searcher", device="cpu")


@pytest.fixture(scope="module")
def sampled(searcher) -> dict[str, dict[str, list[Rollout]]]:
    """Place of the facts -> condition -> rollouts of the same questions."""
    judged = script("measure").conditions(searcher)
    questions = {where: searching.load("test", 40, where=where) for where in searching.SHARES}
    return {
        where: {name: generate.rollouts(c, problems, SAMPLING, progress=False) for name, c in judged.items()}
        for where, problems in questions.items()
    }


def gain(rollouts: dict[str, list[Rollout]], other: str, value=lambda r: float(r.correct)) -> stats.Estimate:
    per = [np.array([value(r) for r in rollouts[c]]).reshape(-1, SAMPLING.n) for c in ("with the tool", other)]
    return stats.bootstrap(stats.difference(*map(stats.mean_of, per)), len(per[0]))


def test_every_word_of_questions_and_documents_is_a_token(searcher):
    assert (FOLDER / "model.safetensors").stat().st_size < 5e6
    unknown = searcher.tokenizer.unk_token_id
    texts = [p.messages[0]["content"] for p in tasks.load("searching", "train", 300)] + list(searching.SHIPPED.documents)
    for text in texts:
        ids = searcher.tokenizer.encode(text)
        assert unknown not in ids and searcher.text(ids) == text and len(ids) == len(text.split())


def test_training_files_hold_no_question_about_the_shipped_world():
    assert not searching.SHIPPED.name.startswith("train-")
    assert script("train").build_tokenizer().get_vocab() == lm.load("tiny-searcher", device="cpu").tokenizer.get_vocab()


def test_searching_helps_where_facts_are_only_in_the_corpus_and_random_results_do_not(sampled):
    found = gain(sampled["corpus"], "without")
    assert found.low > 0.15
    assert gain(sampled["corpus"], "with random results").low > 0.15
    right = [np.mean([r.correct for r in sampled["corpus"][c]]) for c in ("without", "with random results")]
    assert max(right) < 0.15, "a guess among twelve values"


def test_searching_costs_tokens_and_gains_nothing_where_facts_are_in_the_weights(sampled):
    rollouts, other = sampled["weights"], "searches replaced by recall"
    assert gain(rollouts, other).low < 0.05
    assert gain(rollouts, other, lambda r: float(r.response_tokens)).low > 5
    assert gain(sampled["corpus"], other).low > 0.15


def test_there_is_room_for_rewards(sampled):
    """Within a question, responses differ in correctness and in calls: a group of GRPO has something to compare."""
    rollouts = [r for found in sampled.values() for r in found["with the tool"]]
    assert all(0.2 < np.mean([r.correct for r in found["with the tool"]]) < 0.99 for found in sampled.values())
    for value in ([r.correct for r in rollouts], [len(r.results) for r in rollouts]):
        groups = np.array(value).reshape(-1, SAMPLING.n)
        assert (groups.max(axis=1) != groups.min(axis=1)).mean() > 0.3
    assert np.mean([r.closed for r in rollouts]) > 0.97
    assert np.mean([r.response_tokens for r in rollouts]) < 80


def test_the_card_shows_the_committed_results(searcher):
    measure, result = script("measure"), store.read_json(FOLDER / "results.json")
    assert result["provenance"]["fingerprint"] == searcher.fingerprint
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name, text in measure.tables(result).items():
        assert f"<!-- {name}: begin -->\n\n{text}\n\n<!-- {name}: end -->" in card


def test_the_model_is_found_by_its_name_in_a_checkout():
    assert shipped.path_of("tiny-searcher") == FOLDER and set(shipped.COMPLETE) == {"tiny-reasoner", "tiny-searcher"}
    assert Condition(lm.load("tiny-searcher", device="cpu"), tools=searching.toolbox()).tools is not None
