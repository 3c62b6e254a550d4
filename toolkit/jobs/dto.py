"""DTO from start to end: sample responses, make preference pairs from them, and train on the pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd

from toolkit import finetune, preferences, progress, steps, store
from toolkit.generate import Sampling, rollouts, task_and_split
from toolkit.lm import LM
from toolkit.methods import thinking_optimization
from toolkit.methods.thinking_optimization import DTOSettings
from toolkit.steps import Splitter
from toolkit.types import Problem

CHUNK = 32  # responses that are worked on between two saved files
SEGMENTS: Mapping[str, Splitter | None] = {"cues": None, "lines": steps.lines, "paragraphs": steps.paragraphs}
"""Name of a way to split thinking into segments -> splitter; ``None`` splits at cue words."""
PAIRS = "pairs.jsonl"


def make_pairs(
    lm: LM,
    problems: Sequence[Problem],
    sampling: Sampling,
    settings: DTOSettings,
    out: str | Path,
    *,
    segments: str = "cues",
    about: Mapping[str, Any] | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Sample responses and make DTO's preference pairs from them. Return the pairs, and a table with one row per response.

    The pairs are written to ``out/pairs.jsonl``, the responses to ``out/rollouts``. After a stop, the same call goes on. The columns of the
    tables are those of ``thinking_optimization.pairs`` and ``thinking_optimization.table``.

    Args:
        lm: The model.
        problems: Problems to respond to.
        sampling: Sampling settings.
        settings: Settings of DTO. Its field ``split`` is not read.
        out: Directory to write to.
        segments: Splitter of thinking: ``"cues"`` (at cue words), ``"lines"`` or ``"paragraphs"``.
        about: Facts that are stored with the rollouts, such as task, split and seed.

    Raises:
        KeyError: ``segments`` is unknown.
        store.WrongModelError: ``out`` holds pairs of another model, other problems or other settings.
    """
    chosen = replace(settings, split=SEGMENTS[segments])
    numbers = asdict(replace(chosen, split=None)) | {"answering": settings.answering.identity}
    identity = {
        "model": lm.fingerprint,
        "problems": store.key([(p.id, p.messages, p.answer) for p in problems]),
        "sampling": sampling.identity,
        "segments": segments,
        "dto": numbers,
        "code": store.code_of("toolkit.methods.thinking_optimization"),
    }
    out = finetune.claimed(out, identity)
    sampled = rollouts(lm, problems, sampling, out=out / "rollouts", about=about or task_and_split(problems))
    pairs, tables = [], []
    starts = range(0, len(sampled), CHUNK)
    with progress.stage("better responses", len(sampled), "response") as stage:
        for start in starts:
            part = sampled[start : start + CHUNK]
            pair_file, table_file = (out / f"{name}-{start}.parquet" for name in ("pairs", "table"))
            if not table_file.exists():  # it is written last
                found = thinking_optimization.optimise(lm, part, problems, chosen)
                store.save_table(thinking_optimization.pairs(lm, found), pair_file)
                store.save_table(thinking_optimization.table(found), table_file)
            pairs.append(store.read_table(pair_file))
            tables.append(store.read_table(table_file))
            stage.update(len(part))
    # Without empty parts, whose columns may have other dtypes.
    whole = pd.concat([part for part in pairs if len(part)] or pairs[:1], ignore_index=True)
    store.write_rows(whole.to_dict("records"), out / PAIRS)
    return whole, pd.concat(tables, ignore_index=True)


def train_on_pairs(lm: LM, pairs: pd.DataFrame, settings: preferences.Settings, out: str | Path) -> LM:
    """Train a copy of the model on DTO's pairs with SimPO, save it in ``out/trained/model``, and return it.

    Args:
        lm: The initial model.
        pairs: From ``make_pairs``.
        settings: Settings of the training.
        out: Directory of the pairs.

    Raises:
        ValueError: There are no pairs.
    """
    return preferences.train(lm, pairs, settings, Path(out) / "trained", name=f"{lm.name}, DTO")
