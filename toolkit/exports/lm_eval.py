"""A task for lm-evaluation-harness (lm-eval 0.4.13): a YAML file, Python functions, and the problems beside them.

The functions import this toolkit for grading, so both must be installed:
``lm_eval --include_path DIRECTORY --tasks NAME --apply_chat_template --model hf --model_args pretrained=MODEL``. Metrics: ``correct``,
``closed`` (1 if thinking was closed, else 0) and ``think_characters`` (number of characters of thinking).

lm-eval's chat templates take one question, so the prompt of a problem must be a single user message.

In some tokenizers, the think tags are special tokens. lm-eval's ``hf`` models remove special tokens from the text of a response. Thinking
and answer then cannot be told apart, so ``closed`` is 0 and every response counts as wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toolkit import store
from toolkit.exports.base import Settings
from toolkit.types import Problem
from toolkit.vectors import ExportError

PROBLEMS = "problems.jsonl"
CONFIG = """task: {name}
custom_dataset: !function task.dataset
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
process_results: !function task.results
generation_kwargs:
  until: []
  do_sample: false
  temperature: 0.0
  max_gen_toks: {max_new_tokens}
metric_list:
  - metric: correct
    aggregation: mean
    higher_is_better: true
  - metric: closed
    aggregation: mean
    higher_is_better: true
  - metric: think_characters
    aggregation: mean
    higher_is_better: false
metadata:
  version: 1.0
"""
PROGRAM = '''"""Functions of the task {name}, graded by reasoning-length-toolkit."""

from pathlib import Path

from datasets import Dataset
from toolkit.exports.scoring import read, score
from toolkit.tags import ThinkTags

PROBLEMS = read(Path(__file__).parent / {problems!r})
TAGS = {tags}


def dataset(**settings):
    """Return the questions and gold answers."""
    docs = [{{"id": p.id, "question": p.messages[0]["content"], "answer": p.answer}} for p in PROBLEMS.values()]
    return {{"test": Dataset.from_list(docs)}}


def results(doc, responses):
    """Return the metrics of one response."""
    return score(PROBLEMS[doc["id"]], responses[0], TAGS)
'''


def write(lm: Any, problems: Sequence[Problem], out: Path, settings: Settings) -> Path:
    """Write the problems as an lm-eval task into the directory ``out``, and return ``out``. The task has the directory's name.

    ``lm`` is not used.

    Raises:
        ExportError: a problem's prompt is not a single user message.
    """
    for problem in problems:
        if [message["role"] for message in problem.messages] != ["user"]:
            roles = ", ".join(message["role"] for message in problem.messages)
            raise ExportError(
                f"Problem {problem.id[:40]!r} has messages of {roles}, but lm-eval sends exactly one message of the user: use the format inspect instead."
            )
    name = store.safe_name(out.name)
    tags = settings.think and f"ThinkTags({settings.think.open!r}, {settings.think.close!r})"
    with store.atomic_directory(out) as partial:
        store.save_problems(problems, partial / PROBLEMS)
        store.write_text(PROGRAM.format(name=name, problems=PROBLEMS, tags=tags), partial / "task.py")
        store.write_text(CONFIG.format(name=name, max_new_tokens=settings.max_new_tokens), partial / f"{name}.yaml")
    return out
