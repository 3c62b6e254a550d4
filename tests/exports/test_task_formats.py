"""Problems as tasks of other tools: the files run on a pretended tool, ask what we ask, and grade as we grade."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
import types
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jinja2
import pytest
import yaml

from toolkit import exports, generate, store, tasks
from toolkit.exports import scoring
from toolkit.exports.base import Settings
from toolkit.generate import Sampling
from toolkit.tags import ThinkTags
from toolkit.types import Problem
from toolkit.vectors import ExportError

TAGS = ThinkTags()
PROBLEMS = [
    *tasks.load("arithmetic", "test", 6),
    Problem("facts", ({"role": "user", "content": "Who? {{x}} 'a' \"b\""},), "Paul Müller", {"grader": "contains"}),
]


def written(name: str, path, problems=PROBLEMS, **settings):
    return exports.find(name).write(None, problems, path, Settings(**{"think": TAGS, "max_new_tokens": 77, **settings}))


def module_at(path, name: str):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- grading -----------------------------------------------------------------------------------------------------

SUM = Problem("sum", ({"role": "user", "content": "7+8=?"},), "15")
CASES = {
    "closed and right": ("<think>7+8=15</think> 15", TAGS, None, (1, 1, 6)),
    "closed and wrong": ("<think>7+8=15</think> 16", TAGS, None, (0, 1, 6)),
    "unclosed, the gold answer in the trace": ("<think>7+8=15", TAGS, None, (0, 0, 6)),
    "opened in the prompt": ("7+8=15</think>15", ThinkTags(None, "</think>"), None, (1, 1, 6)),
    "opened in the prompt, never closed": ("7+8=15", ThinkTags(None, "</think>"), None, (0, 0, 6)),
    "tags lost by the tool": ("7+8=15 15", TAGS, None, (0, 0, 9)),
    "the first closing tag counts": ("<think>1</think>15</think>3", TAGS, None, (0, 1, 1)),
    "text before thinking is no thinking": ("Well, <think>7</think>15", TAGS, None, (1, 1, 1)),
    "no tags": ("so 7+8=15", None, None, (1, 1, 0)),
    "the whole response": ("so 7+8=15", ThinkTags(None, None), None, (1, 1, 9)),
    "separated by the tool": ("15", TAGS, "7+8=15", (1, 1, 6)),
    "separated, but no answer": (" \n", TAGS, "7+8=15", (0, 0, 6)),
}


@pytest.mark.parametrize("case", CASES)
def test_only_the_answer_is_graded(case):
    response, tags, reasoning, expected = CASES[case]
    found = scoring.score(SUM, response, tags, reasoning)
    assert tuple(found[name] for name in ("correct", "closed", "think_characters")) == expected


def test_real_responses_get_the_grade_that_our_loop_gives_them(tiny):
    """At few tokens some responses are unclosed, at temperature 1 some are wrong."""
    problems = tasks.load("arithmetic", "test", 30)
    rollouts = generate.rollouts(tiny, problems, Sampling(4, 1.0, max_new_tokens=40), progress=False)
    by_id = {p.id: p for p in problems}
    found = [
        scoring.score(by_id[r.problem_id], tiny.text(r.token_ids[r.prompt_len :]).replace("<|end|>", ""), TAGS) for r in rollouts
    ]
    assert [bool(row["correct"]) for row in found] == [r.correct for r in rollouts]
    assert [bool(row["closed"]) for row in found] == [r.closed for r in rollouts]
    assert len({(r.correct, r.closed) for r in rollouts}) == 3


# --- Inspect -----------------------------------------------------------------------------------------------------


@dataclass
class Message:
    content: Any
    role: str = ""


@dataclass
class Reasoning:
    reasoning: str


@pytest.fixture
def inspect_ai(monkeypatch):
    """The names that a task file imports of Inspect, as plain records."""

    def record(name):
        return lambda *args, **fields: SimpleNamespace(kind=name, args=args, **fields)

    roles = {
        f"ChatMessage{role.title()}": lambda content, role=role: Message(content, role) for role in ("system", "user", "assistant")
    }
    parts = {
        "inspect_ai": {"Task": record("Task"), "task": lambda function: function},
        "inspect_ai.dataset": {"MemoryDataset": record("MemoryDataset"), "Sample": record("Sample")},
        "inspect_ai.model": {**roles, "ContentReasoning": Reasoning, "GenerateConfig": record("GenerateConfig")},
        "inspect_ai.scorer": {
            "Score": record("Score"), "accuracy": record("accuracy"), "mean": record("mean"), "stderr": record("stderr"),
            "scorer": lambda metrics: lambda function: function,
        },
        "inspect_ai.solver": {"generate": record("generate")},
    }  # fmt: skip
    for name, things in parts.items():
        module = types.ModuleType(name)
        vars(module).update(things)
        monkeypatch.setitem(sys.modules, name, module)


def graded_by_inspect(task, problem_id: str, content, completion: str) -> dict[str, float]:
    state = SimpleNamespace(
        sample_id=problem_id, output=SimpleNamespace(message=SimpleNamespace(content=content), completion=completion)
    )
    return asyncio.run(task.scorer(state, None)).value


def test_an_inspect_task_asks_and_grades_our_problems(tmp_path, inspect_ai):
    asked = (*PROBLEMS, Problem("chat", ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "7+8=?"}), "15"))
    path = written("inspect", tmp_path / "sums", asked)
    task = module_at(path / "task.py", "inspect_task").problems()
    samples = task.dataset.args[0]
    assert [(s.id, s.target, [(m.role, m.content) for m in s.input]) for s in samples] == [
        (p.id, p.answer, [(m["role"], m["content"]) for m in p.messages]) for p in asked
    ]
    assert task.config.max_tokens == 77
    gold = PROBLEMS[0].answer
    right = {"correct": 1.0, "closed": 1.0, "think_characters": 2.0}
    assert graded_by_inspect(task, PROBLEMS[0].id, f"<think>12</think>{gold}", f"<think>12</think>{gold}") == right
    assert graded_by_inspect(task, PROBLEMS[0].id, [Reasoning("12"), Message(gold)], gold) == right
    assert graded_by_inspect(task, PROBLEMS[0].id, f"<think>{gold}", f"<think>{gold}")["correct"] == 0
    assert (
        graded_by_inspect(task, "facts", "<think></think>Paul müller it was", "<think></think>Paul müller it was")["correct"] == 1
    )


# --- lm-evaluation-harness ---------------------------------------------------------------------------------------


def lm_eval_reads(path):
    """The YAML as lm-eval reads it: ``!function task.name`` is a function of the file beside it."""
    module = module_at(path / "task.py", "lm_eval_task")

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: getattr(module, loader.construct_scalar(node).removeprefix("task.")))
    (file,) = path.glob("*.yaml")
    return yaml.load(file.read_text(), Loader)


def test_an_lm_eval_task_asks_and_grades_our_problems(tmp_path):
    config = lm_eval_reads(written("lm-eval", tmp_path / "my sums"))
    docs = list(config["custom_dataset"]()[config["test_split"]])
    assert [doc["id"] for doc in docs] == [p.id for p in PROBLEMS]
    for doc, problem in zip(docs, PROBLEMS, strict=True):
        assert jinja2.Template(config["doc_to_text"]).render(**doc) == problem.messages[0]["content"]
        assert jinja2.Template(config["doc_to_target"]).render(**doc) == problem.answer
        right = config["process_results"](doc, [f"<think>12</think>{problem.answer}"])
        assert right == {"correct": 1.0, "closed": 1.0, "think_characters": 2.0}
        assert config["process_results"](doc, [f"<think>{problem.answer}"])["correct"] == 0
    assert {row["metric"] for row in config["metric_list"]} == set(right)
    assert config["task"] and not set(config["task"]) & set(" /:")
    assert config["generation_kwargs"] == {"until": [], "do_sample": False, "temperature": 0.0, "max_gen_toks": 77}


def test_a_chat_is_no_question_for_lm_eval(tmp_path):
    chat = Problem("chat", ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "7+8=?"}), "15")
    with pytest.raises(ExportError, match="'chat' has messages of system, user, but lm-eval sends exactly one message"):
        written("lm-eval", tmp_path / "x", [*PROBLEMS, chat])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["inspect", "lm-eval"])
def test_the_problems_beside_a_task_are_ours_again(tmp_path, name):
    path = written(name, tmp_path / "x")
    assert store.load_problems(path / "problems.jsonl") == list(PROBLEMS)
    assert json.loads((path / "problems.jsonl").read_text().splitlines()[0])["id"] == PROBLEMS[0].id


@pytest.mark.parametrize("name", ["inspect", "lm-eval"])
@pytest.mark.parametrize("tags", [None, ThinkTags(None, "</think>"), ThinkTags("<'a'>", '"b"\\'), ThinkTags(None, None)], ids=str)
def test_the_tags_arrive_in_the_task(tmp_path, inspect_ai, name, tags):
    path = written(name, tmp_path / "x", think=tags)
    assert tags == module_at(path / "task.py", "any_task").TAGS
