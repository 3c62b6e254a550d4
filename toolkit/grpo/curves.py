"""Read and tabulate the learning curves of a sweep over recipes and seeds. A curve is a small file, one per trained policy.

A *recipe* holds the training settings of one method, such as its reward (see ``recipes``).

The files are in the repository's folder ``data/grpo``. A file holds one JSON object per line. The field ``kind`` of a line is one of:

* ``about`` (first line, once): recipe, seed, model and hashes of the code.
* ``step``: one row of the training log.
* ``test``: one metric of the policy, or of the base model, on the test problems.
* ``outcomes`` (once): the policy's accuracy and think tokens on every test problem.

The test problems are chains of additions and subtractions (task ``arithmetic``). Test results exist for ``all`` of them, and for the
``hard`` ones, which have the most operands (``toolkit.jobs.grpo.HARD``).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from toolkit import stats, store

IN_CURVE: dict[str, dict[str, Any]] = {
    "about": {"recipe": {"name": str}, "seed": int},
    "step": {"step": int},
    "test": {"problems": str, "condition": str, "metric": str, "mean": float, "low": float, "high": float},
    "outcomes": {"problem_id": list[str], "accuracy": list[float], "think_tokens": list[float]},
}
"""Kind of line in a curve file (its field ``kind``) -> the required fields of such a line, with their types.

A nested dict gives the fields of a nested object. Further fields are allowed.
"""
CURVE = (
    "step", "accuracy", "think_tokens", "tokens", "truncated", "zero_std", "entropy/think", "entropy/answer", "reward", "grad_norm",
    "answers/most_common", "step_time", "alarms",
)  # fmt: skip
"""Columns of the training log that are copied into a curve file. All ``held_out/...`` and ``component/...`` columns are copied too.

The module ``measures`` says what most columns mean. ``reward``, ``grad_norm`` and ``step_time`` (seconds per step) come from TRL;
``alarms`` is described in the module ``log``.
"""


def steps(log: pd.DataFrame) -> list[dict[str, Any]]:
    """Convert a training log (``run.Trained.log``) to lines of a curve file: return one dict per row of the log.

    A dict holds the columns in ``CURVE`` and all ``held_out/...`` and ``component/...`` columns, rounded to four significant digits.
    Missing values are left out. The caller must add the entry ``kind="step"``.
    """
    chosen = [c for c in log.columns if c in CURVE or c.startswith(("held_out/", "component/"))]
    rows = log[chosen].to_dict("records")
    # ``v == v`` is False for NaN.
    short = ({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return [{k: v for k, v in row.items() if v is not None and v == v} for row in short]


def lines(file: Path) -> list[dict[str, Any]]:
    """Return the lines of one curve file as dicts. The entry ``kind`` is ``about``, ``step``, ``test`` or ``outcomes``.

    Raises:
        store.DamagedFileError: a line lacks a required field or has one of the wrong type, or the file does not have these lines: one
            ``about`` line, which comes first; at least one ``step`` and one ``test`` line; and one ``outcomes`` line, whose lists have
            equal lengths. The message says what is wrong.
    """
    remedy = "Remove the file and run its sweep.py again."
    rows = store.read_rows(file, {"kind": Literal["about", "step", "test", "outcomes"]})
    for number, row in enumerate(rows, 1):
        store.checked(row, IN_CURVE[row["kind"]], f"{file}, line {number}", remedy)
        if row["kind"] == "step":
            numbers = {name: value for name, value in row.items() if name != "kind"}
            store.checked(numbers, Mapping[str, float | list[str] | None], f"{file}, line {number}", remedy)
    kinds = [row["kind"] for row in rows]
    # Stands in for missing outcomes, so that the error below is the one about kinds of lines.
    empty: dict[str, list] = {name: [] for name in IN_CURVE["outcomes"]}
    outcomes = next((row for row in rows if row["kind"] == "outcomes"), empty)
    if kinds[:1] != ["about"] or kinds.count("about") > 1 or kinds.count("outcomes") != 1 or not {"step", "test"} < set(kinds):
        raise store.DamagedFileError(
            f"{file} holds {len(rows)} lines: expected first one of kind 'about', then 'step', 'test' and one 'outcomes'. {remedy}"
        )
    if len({len(outcomes[name]) for name in IN_CURVE["outcomes"]}) > 1:
        raise store.DamagedFileError(f"{file}: its outcomes have columns of different lengths. {remedy}")
    return rows


def read(folder: Path) -> tuple[dict[str, list[pd.DataFrame]], pd.DataFrame]:
    """Return the training logs and the test results of all curve files in a folder.

    Returns:
        A pair ``(logs, tests)``. ``logs`` maps each recipe's name to its training logs, one table per seed. ``tests`` is a table of test
        results, one row per policy (or base model), metric and set of problems. Its columns:

        * ``name``: the recipe, or ``base`` for the base model.
        * ``seed``: the policy's training seed; -1 for the base model.
        * ``problems``: ``all`` test problems, or the ``hard`` ones, which have the most operands.
        * ``metric``: ``accuracy``, ``think_tokens``, ``closed`` (share of responses that closed their think span) or ``looping`` (share of
          responses that end in a loop).
        * ``mean``: the metric's mean over the problems; ``low``, ``high``: its 95 % interval.
        * ``difference``: ``mean`` of the policy minus that of the base model; ``difference_low``, ``difference_high``: its 95 % interval.
          All three are 0 for the base model.

    Raises:
        FileNotFoundError: the folder holds no curve files.
        store.DamagedFileError: a curve file is damaged (see ``lines``).
    """
    logs: dict[str, list[pd.DataFrame]] = {}
    tests = []
    for file in sorted(folder.glob("*-seed*.jsonl")):
        about, *rows = lines(file)
        name, seed = about["recipe"]["name"], about["seed"]
        logs.setdefault(name, []).append(pd.DataFrame([row for row in rows if row["kind"] == "step"]))
        tested = pd.DataFrame([row for row in rows if row["kind"] == "test"]).drop(columns="kind")
        base = tested["condition"] == "base"
        tests.append(tested.assign(name=tested["condition"].where(base, name), seed=[-1 if b else seed for b in base]))
    if not logs:
        raise FileNotFoundError(f"No learning curves in {folder}: run its sweep.py.")
    # Every file repeats the same rows of the base model; duplicates are dropped.
    return logs, pd.concat(tests, ignore_index=True).drop(columns="condition").drop_duplicates(ignore_index=True)


def against(folder: Path, name: str = "correctness") -> pd.DataFrame:
    """Compare every trained policy with the policies of a reference recipe, in accuracy and think tokens.

    The comparison is paired: all policies were tested on the same problems, with the same random seed for sampling.

    Args:
        folder: Directory of curve files, such as ``data/grpo``.
        name: Name of the reference recipe. ``correctness`` is plain GRPO with a reward for correct answers, whatever their length.

    Returns:
        One row per policy and metric. Columns:

        * ``name``, ``seed``: recipe and seed of the policy.
        * ``metric``: ``accuracy`` (0 to 1) or ``think_tokens``.
        * ``difference``: the policy's mean minus the mean over the reference policies (one per seed of the reference recipe). A reference
          policy has rows too: the ``difference`` there is its mean minus the mean over all reference policies, itself included.
        * ``low``, ``high``: 95 % interval of the difference, from resampling problems, not seeds.

    Raises:
        FileNotFoundError: the folder holds no curve file of the reference recipe.
        store.DamagedFileError: a curve file is damaged (see ``lines``).
        ValueError: a policy and the reference were tested on different problems.
    """
    outcomes: dict[tuple[str, int], dict] = {}
    for file in sorted(folder.glob("*-seed*.jsonl")):
        about, *rows = lines(file)
        (outcomes[about["recipe"]["name"], about["seed"]],) = (row for row in rows if row["kind"] == "outcomes")
    references, table = [row for (recipe, _), row in outcomes.items() if recipe == name], []
    if not references:
        raise FileNotFoundError(f"No learning curve of {name} in {folder}.")
    for (recipe, seed), policy in outcomes.items():
        if policy["problem_id"] != references[0]["problem_id"]:
            raise ValueError(f"{recipe}, seed {seed}, was tested on other problems than {name}.")
        for metric in ("accuracy", "think_tokens"):
            # Mean over the reference's seeds, problem by problem: [1, problems].
            reference = np.mean([row[metric] for row in references], axis=0, keepdims=True)
            e = stats.mean_effect(np.array([policy[metric]], float), reference)
            table.append((recipe, seed, metric, e.mean, e.low, e.high))
    return pd.DataFrame(table, columns=["name", "seed", "metric", "difference", "low", "high"])


def after_training(tests: pd.DataFrame, problems: str = "all") -> pd.DataFrame:
    """Return a table of accuracy and think tokens after training, with one row per policy and one for the base model.

    Args:
        tests: Table of test results, the second value that ``read`` returns.
        problems: Set of test problems: ``"all"``, or ``"hard"`` for those with the most operands.

    Returns:
        Columns:

        * ``name``: the recipe, or ``base``.
        * ``seed``: the policy's seed, -1 for the base model.
        * ``accuracy``: mean accuracy over the problems, 0 to 1; ``accuracy_low``, ``accuracy_high``: its 95 % interval.
        * ``accuracy_difference``: policy minus base model; ``accuracy_difference_low``, ``accuracy_difference_high``: its 95 % interval.
        * ``think_tokens``, ``think_tokens_low``, ``think_tokens_high``, ``think_tokens_difference``, ``think_tokens_difference_low``,
          ``think_tokens_difference_high``: likewise for the mean number of think tokens.
    """
    columns = ["mean", "low", "high", "difference", "difference_low", "difference_high"]
    rows = tests[(tests["problems"] == problems) & tests["metric"].isin(["accuracy", "think_tokens"])]
    wide = rows.pivot(index=["name", "seed"], columns="metric", values=columns)
    # The pivot's columns are pairs (kind, metric).
    wide.columns = [metric if kind == "mean" else f"{metric}_{kind}" for kind, metric in wide.columns]
    return wide.reset_index()
