"""Records that the toolkit writes beside models and results, for ``fuzz``: see ``fuzz_kinds``."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from fuzz_kinds import Kind, about, direction, json_kind, moments, numbers, plan, tiny

from toolkit import edits, jobs, origins, store
from toolkit import lm as lms
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
    finding = jobs.Finding(moments(), direction(), HeadScores(numbers(3, 4), "short", "norm", about()), plan())
    return jobs.is_saved(tiny(), finding, store.existing(path).parent)


def made_by(path: Path) -> Any:
    return store.records(store.existing(path).parents[1], path.parent.name)


KINDS: dict[str, Kind] = {
    "shard index": json_kind(INDEX, lambda: {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}, whole, (),
                             ("weight_map.x dropped", "weight_map.y dropped")),
    "made_from": json_kind("made_from.json", lambda: [origins.record(["p", "q"], task="tiny", split="train", seed=0)],
                           lambda path: lms._origins(store.existing(path)), ("0.task", "0.split", "0.seed"),
                           ("0.problem_ids.0 dropped",)),
    "made_by": json_kind(store.MADE_BY, lambda: RECORD, made_by, ("modules.",)),
    "edit": json_kind("edit.json", lambda: {"plan": {}, "parent": "p", "fingerprint": edited()}, saved, ("plan", "parent")),
}  # fmt: skip
