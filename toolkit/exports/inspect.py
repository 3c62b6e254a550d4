"""A task for Inspect (inspect-ai 0.3.285): a Python file with one ``@task``, and the problems beside it.

The file imports this toolkit for grading, so both must be installed: ``inspect eval DIRECTORY/task.py --model PROVIDER/MODEL``. For
some providers, Inspect returns thinking separately from the answer (``ContentReasoning``); otherwise the think tags in the text separate
them. Scores: ``correct``, ``closed`` (1 if thinking was closed, else 0) and ``think_characters`` (number of characters of thinking).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toolkit import store
from toolkit.exports.base import Settings
from toolkit.types import Problem

PROBLEMS = "problems.jsonl"
PROGRAM = '''"""Problems graded by reasoning-length-toolkit: inspect eval task.py --model PROVIDER/MODEL."""

from pathlib import Path

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ChatMessageAssistant, ChatMessageSystem, ChatMessageUser, ContentReasoning, GenerateConfig
from inspect_ai.scorer import Score, accuracy, mean, scorer, stderr
from inspect_ai.solver import generate
from toolkit.exports.scoring import read, score
from toolkit.tags import ThinkTags

PROBLEMS = read(Path(__file__).parent / {problems!r})
TAGS = {tags}
ROLES = {{"system": ChatMessageSystem, "user": ChatMessageUser, "assistant": ChatMessageAssistant}}


@scorer(
    metrics={{
        "correct": [accuracy(), stderr()],
        "closed": [mean()],
        "think_characters": [mean()],
    }}
)
def graded():
    async def grade(state, target):
        content = state.output.message.content
        parts = content if isinstance(content, list) else []
        reasoning = "".join(part.reasoning for part in parts if isinstance(part, ContentReasoning))
        text = state.output.completion
        return Score(value=score(PROBLEMS[str(state.sample_id)], text, TAGS, reasoning or None), answer=text)

    return grade


@task
def problems():
    samples = [
        Sample(input=[ROLES[m["role"]](content=m["content"]) for m in p.messages], target=p.answer, id=p.id)
        for p in PROBLEMS.values()
    ]
    return Task(
        dataset=MemoryDataset(samples, name={name!r}),
        solver=generate(),
        scorer=graded(),
        config=GenerateConfig(max_tokens={max_new_tokens}),
    )
'''


def write(lm: Any, problems: Sequence[Problem], out: Path, settings: Settings) -> Path:
    """Write the directory ``out`` with ``task.py`` and ``problems.jsonl``."""
    tags = settings.think and f"ThinkTags({settings.think.open!r}, {settings.think.close!r})"
    program = PROGRAM.format(problems=PROBLEMS, tags=tags, name=out.name, max_new_tokens=settings.max_new_tokens)
    with store.atomic_directory(out) as partial:
        store.save_problems(problems, partial / PROBLEMS)
        store.write_text(program, partial / "task.py")
    return out
