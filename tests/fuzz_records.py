"""Records that the toolkit writes beside models and results, for ``fuzz``: see ``fuzz_kinds``."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import alterations as alter
import pandas as pd
from alterations import Alteration
from fuzz_kinds import Kind, about, direction, json_kind, moments, numbers, plan, tiny

from toolkit import checkpoints, edits, jobs, origins, store
from toolkit.board import measure
from toolkit.types import HeadScores

INDEX = "model.safetensors.index.json"
RECORD = {"made_by": "toolkit 0.1.0, code a", "code": "a", "depends": "b", "modules": {"toolkit.lm": "c"}}


def whole(path: Path) -> bool:
    folder = path.parent
    for name in ("config.json", "a.safetensors", "b.safetensors"):
        store.write_text("x", folder / name)
    if not store.is_whole(folder):  # a right answer where a shard is named otherwise
        raise FileNotFoundError(f"{path}: not all of its files are there")
    return True


@cache
def edited() -> str:
    return edits.apply(tiny(), plan()).fingerprint


def saved(path: Path) -> bool:
    finding = jobs.Finding(
        jobs.OURS, moments(), moments(), direction(), HeadScores(numbers(3, 4), "short", "norm", about()), plan()
    )
    return jobs.is_saved(tiny(), finding, store.existing_file(path).parent)


def made_by(path: Path) -> Any:
    return store.records(store.existing_file(path).parents[1], path.parent.name)


RESULT = {"name": "base", "seed": 0, "model": "m", "fingerprint": "f", "parent": None, "interventions": ["x"], "tokens": 5, "seconds": 1.5,
          "parameters_changed": 0, "training_steps": 0, "shift": dict.fromkeys(measure.IN_SHIFT, 0.5)}  # fmt: skip


def make_result(altered: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        filled = {str: ["a", "b"], int: [1, 2], bool: [True, False], float: [0.5, 1.5]}
        for name, columns in ((measure.ROWS, measure.IN_ROWS), (measure.POINTS, measure.IN_POINTS)):
            store.save_table(pd.DataFrame({column: filled[kind] for column, kind in columns.items()}), folder / name)
        store.write_json(RESULT, folder / measure.ABOUT)
        return folder / altered

    return make


def result(path: Path) -> Any:
    if (found := measure.read_folder(path.parent)) is None:  # a right answer where there is none: it is measured
        raise FileNotFoundError(f"{path} is not there")
    return found


def of_result(path: Path, rng: random.Random, most: int) -> Iterator[Alteration]:
    yield from alter.of_parquet(path, measure.IN_POINTS if path.name == measure.POINTS else measure.IN_ROWS, rng, 10)


KINDS: dict[str, Kind] = {
    "shard index": json_kind(INDEX, lambda: {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}, whole, (),
                             ("weight_map.x dropped", "weight_map.y dropped")),
    "made_from": json_kind("made_from.json", lambda: [origins.record(["p", "q"], task="tiny", split="train", seed=0)],
                           lambda path: checkpoints._made_from(str(store.existing_file(path).parent), None), ("0.task", "0.split", "0.seed"),
                           ("0.problem_ids.0 dropped",)),
    "made_by": json_kind(store.MADE_BY, lambda: RECORD, made_by, ("modules.",)),
    "edit": json_kind("edit.json", lambda: {"plan": {}, "parent": "p", "fingerprint": edited()}, saved, ("plan", "parent")),
    "board about": Kind(make_result(measure.ABOUT), result, json_kind(measure.ABOUT, dict, store.read_json, (), ("parent a text", "seconds null")).of),
    "board rows": Kind(make_result(measure.ROWS), result, of_result),
    "board points": Kind(make_result(measure.POINTS), result, of_result),
}  # fmt: skip
