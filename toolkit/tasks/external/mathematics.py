"""Load problems of GSM8K and MATH-500, from the Hugging Face hub or from a local file with the same columns.

Answers are graded by the package math-verify, which ``pip install 'reasoning-length-toolkit[tasks]'`` installs.

Splits: GSM8K's official test set is ``test``; a hash of the question divides its training set into ``train`` and ``dev``. MATH-500 has no
splits; a hash of the problem's id divides it into train, dev and test (``splits.split_by_id``).
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pandas as pd

from toolkit import store
from toolkit.tasks import splits
from toolkit.types import Problem


def gsm8k(split: str = "test", n: int = 200, seed: int = 0, *, path: str | Path | None = None) -> list[Problem]:
    """Return ``n`` random problems from one split of GSM8K; all problems of the split if there are fewer.

    ``meta["difficulty"]`` is the number of calculations in the gold solution.

    Args:
        path: Local jsonl, csv or parquet file to read instead of the hub. For ``split="test"``, it must hold GSM8K's official test set; for
            the other splits, the official training set. Columns: ``question``, and ``answer`` with the gold answer after ``####``.
    """
    splits.check_split(split)
    table = _table(path, "openai/gsm8k", "main", "test" if split == "test" else "train", {"question": str, "answer": str})
    problems = []
    for question, answer in zip(table["question"], table["answer"], strict=True):
        if split == "test" or _half(question) == split:
            gold = answer.split("####")[-1].strip().replace(",", "")
            # GSM8K marks each calculation of a solution, as in "48/2 = <<48/2=24>>24".
            problems.append(_problem("gsm8k", split, question, gold, difficulty=answer.count("<<")))
    return _draw(problems, n, seed)


def math500(split: str = "test", n: int = 200, seed: int = 0, *, path: str | Path | None = None) -> list[Problem]:
    """Return ``n`` random problems from one split of MATH-500; all problems of the split if there are fewer.

    ``meta["difficulty"]`` is MATH's level of difficulty, 1 to 5. The splits are ours, whereas published results are on all 500 problems. To
    test on all of them, write a JSONL file of problems (``tasks.external.files``), each with ``"meta": {"split": "test"}``, and load it
    with ``tasks.load("FILE.jsonl", "test")`` instead of this function.

    Args:
        path: Local jsonl, csv or parquet file to read instead of the hub, with the columns ``problem``, ``answer``, ``level``.
    """
    splits.check_split(split)
    table = _table(path, "HuggingFaceH4/MATH-500", None, "test", {"problem": str, "answer": str | int | float, "level": str | int})
    rows = zip(table["problem"], table["answer"], table["level"], strict=True)
    problems = [_problem("math500", split, q, str(a), difficulty=_level(level)) for q, a, level in rows]
    return _draw([p for p in problems if splits.split_by_id(p.id) == split], n, seed)


def _level(level: object) -> int:
    digits = str(level).removeprefix("Level ").strip()
    if not digits.isdecimal():
        raise ValueError(f"The column level of MATH-500 holds {str(level)[:40]!r}: expected a number, or 'Level' and a number.")
    return int(digits)


def _half(question: str) -> str:
    """Return the split, train or dev, of a question in GSM8K's training set.

    A hash of the question decides, as for other tasks. But questions with a hash for test are put into train.
    """
    return "dev" if splits.split_of(question) == "dev" else "train"


def _problem(task: str, split: str, question: str, answer: str, *, difficulty: int) -> Problem:
    meta = {"task": task, "split": split, "difficulty": difficulty, "grader": "math"}
    return Problem(f"{task}-{splits.digest(question)}", ({"role": "user", "content": question},), answer, meta)


def _draw(problems: list[Problem], n: int, seed: int) -> list[Problem]:
    unique = list({p.id: p for p in problems}.values())
    return random.Random(seed).sample(unique, min(n, len(unique)))


def _table(path: str | Path | None, repo: str, config: str | None, split: str, columns: dict[str, Any]) -> pd.DataFrame:
    if path is not None:
        return store.read_table(path, columns)
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"{repo} comes through datasets: pip install 'reasoning-length-toolkit[tasks]', or pass path=... to a local file."
        ) from error
    return store.checked_table(load_dataset(repo, config, split=split).to_pandas(), columns, repo, "Give path=... to a local file.")
