"""Every kind of file that the toolkit reads: how a whole one is made, who reads it, and in what ways it can be wrong."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import alterations as alter
import numpy as np
import pandas as pd
import torch
from alterations import Alteration, Step

from toolkit import edits, jobs, store, vectors
from toolkit import lm as lms
from toolkit.generate import Sampling
from toolkit.grpo import curves, judge, log
from toolkit.grpo import run as grpo_run
from toolkit.grpo.trainer import STATE
from toolkit.lm import LM
from toolkit.tasks import needle
from toolkit.tasks.external import mathematics
from toolkit.types import Direction, HeadEdit, HeadScores, Moments, Plan, Problem, Provenance, Rollout, Span


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        make: Writes a whole one into an empty folder; returns the file that is altered.
        read: Reads it, given the path that ``make`` returned.
        of: Alterations beside those of any file, given the whole file.
        cut_is_legal: A file that was cut may be a shorter whole one.
    """

    make: Callable[[Path], Path]
    read: Callable[[Path], Any]
    of: Callable[[Path, random.Random, int], Iterator[Alteration]]
    cut_is_legal: bool = False


@cache
def tiny() -> LM:
    return lms.load("tiny-reasoner", device="cpu")


def about() -> Provenance:
    return Provenance("tiny-reasoner", None, tiny().fingerprint, "0" * 16, "0.1.0", 3, {"split": "dev", "n": [1, 2]})


def numbers(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def direction(**fields: Any) -> Direction:
    shape = tiny().layout.n_layers, tiny().layout.d_model
    return Direction(**{"vector": numbers(*shape), "kind": "resid_post", "positions": "think", "estimator": "x", "n_pos": 3, "n_neg": 4,
                        "provenance": about(), **fields})  # fmt: skip


def no_skip(path: tuple[Step, ...]) -> bool:
    return False


# --- values --------------------------------------------------------------------------------------------------


def in_notes(path: tuple[Step, ...]) -> bool:
    """Notes may hold anything; a metadata entry that nobody reads too."""
    return ("notes" in path[:-2]) or "metrics_json" in path or "created" in path


def of_value(path: Path, rng: random.Random, most: int) -> Iterator[Alteration]:
    for a in alter.of_safetensors(path, rng, in_notes, most):
        # There need not be a seed or a revision.
        yield dataclasses.replace(
            a,
            legal=a.label.endswith(("metadata: seed dropped", ".seed dropped", ".seed null", ".revision null", ".revision a text")),
        )
    header_size = int.from_bytes(path.read_bytes()[:8], "little")
    yield from alter.flips(sorted(rng.sample(range(8 + header_size), 12)), "header", legal=False)
    yield from alter.flips([path.stat().st_size - i for i in range(1, 9)], "body", legal=True)


def value_kind(make: Callable[[], Any]) -> Kind:
    def read(path: Path) -> Any:
        value = store.load(path, type(make()), fingerprint=tiny().fingerprint)
        if isinstance(value, Plan):
            try:
                edits.check_plan(tiny(), value)
            except (IndexError, ValueError) as error:  # of the model, which knows no file
                raise ValueError(f"{path}: {error}") from error
        return value

    return Kind(lambda folder: store.save(make(), folder / "v.safetensors"), read, of_value)


def plan() -> Plan:
    chosen = (HeadEdit(1, 2, "project_out", 1.0), HeadEdit(0, 1, "scale", 0.5))
    return Plan(chosen, direction(kind="resid_mid"), "two heads", about())


def moments() -> Moments:
    sums = {"resid_mid": numbers(2, 3, 4), "z": numbers(2, 3, 5)}
    return Moments(("long", "short"), (3, 4), "think", sums, {"resid_mid": numbers(2, 3, 4, 4)}, about())


# --- rollouts ------------------------------------------------------------------------------------------------

HEADER = {"model": "tiny-reasoner", "interventions": [], "eos_ids": [2], "template": "t", "tags": None, "problems": "p",
          "sampling": Sampling(n=2).identity}  # fmt: skip
COLUMNS = {"problem_id": str, "sample": int, "prompt_len": int, "finish": str, "text": str, "correct": bool, "think_start": int,
           "think_stop": int, "answer_start": int, "answer_stop": int, "token_ids": list, "logprobs": list, "entropies": list}  # fmt: skip


def rollout(name: str, sample: int) -> Rollout:
    ids = tuple(range(10, 22))
    details = tuple(0.5 for _ in range(9))
    return Rollout(name, sample, ids, 3, Span(4, 8), Span(9, 11), "stop", "text", True, tuple(-x for x in details), details)


def make_rollouts(folder: Path) -> Path:
    store.open_rollouts(folder, {**HEADER, "fingerprint": tiny().fingerprint, "rollouts": 6})
    return store.append_rollouts([rollout(name, k) for name in "abc" for k in range(2)], folder)


def of_part(path: Path, rng: random.Random, most: int) -> Iterator[Alteration]:
    table = pd.read_parquet(path, dtype_backend="pyarrow")
    for a in alter.of_parquet(path, COLUMNS, rng, 10):
        yield dataclasses.replace(a, legal=a.label.endswith(("logprobs null", "entropies null")))  # where none were kept
    changes: dict[str, Any] = {
        "a row twice": pd.concat([table, table[:1]]),
        "a span backwards": table.assign(think_start=9, think_stop=5),
        "a span beyond the end": table.assign(answer_stop=500),
        "an answer before the thinking": table.assign(answer_start=0, answer_stop=2),
        "a negative stop": table.assign(think_stop=-7),
        "a prompt of more than all": table.assign(prompt_len=500),
        "a negative sample": table.assign(sample=-1),
        "another finish": table.assign(finish="maybe"),
        "negative tokens": table.assign(token_ids=[[-5] * 12] * len(table)),
        "tokens of text": table.assign(token_ids=[["a"] * 12] * len(table)),
        "entropies too few": table.assign(entropies=[[0.1]] * len(table)),
        "entropies that are NaN": table.assign(entropies=[[np.nan] * 9] * len(table)),
        "log-probabilities above 0": table.assign(logprobs=[[1.0] * 9] * len(table)),
        "one log-probability": table.assign(logprobs=[0.5] * len(table)),
        "one token": table.assign(token_ids=[3] * len(table)),
        "no prompt": table.assign(prompt_len=0),
        "no token": table.assign(token_ids=[[]] * len(table)),
    }
    for label, changed in changes.items():
        yield Alteration(f"rollouts: {label}", lambda file, changed=changed: changed.to_parquet(file))


# --- vectors of other tools ----------------------------------------------------------------------------------


def make_pt(value: Callable[[], Any], name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        torch.save(value(), folder / name)
        return folder / name

    return make


def of_pt(wrong: Callable[[], Mapping[str, Any]]) -> Callable[[Path, random.Random, int], Iterator[Alteration]]:
    def alterations(path: Path, rng: random.Random, most: int) -> Iterator[Alteration]:
        for label, value in {**wrong(), "an object": Path("x"), "text": "a", "nothing": None, "whole numbers": torch.ones(3, 4).long(),
                             "a sparse tensor": torch.eye(4).to_sparse(), "complex": torch.ones(3, 4) * 1j,
                             "no number": torch.ones(0), "one number": torch.tensor(1.0), "an empty mapping": {}}.items():  # fmt: skip
            yield Alteration(f"pt: {label}", lambda file, value=value: torch.save(value, file))
        yield from alter.flips(sorted(rng.sample(range(path.stat().st_size), 15)), "pt", legal=True)

    return alterations


def wrong_tensors(good: Callable[[], torch.Tensor]) -> Callable[[], dict[str, Any]]:
    def made() -> dict[str, Any]:
        value = good()
        holed = value.clone()
        holed[-1] = float("nan")
        return {"NaN": holed, "zeros": value * 0, "infinite": value / 0, "two": [value, value], "a layer more": torch.cat([value, value[:1]]),
                "narrower": value[..., 1:], "an axis more": value[None], "turned": value.transpose(0, -1)}  # fmt: skip

    return made


def steering_vectors() -> dict[str, Any]:
    rows = numbers(3, tiny().layout.d_model, dtype=torch.float32)
    return {"layer_activations": dict(enumerate(rows)), "layer_type": "decoder_block"}


def wrong_steering_vectors() -> dict[str, Any]:
    good = steering_vectors()
    rows = good["layer_activations"]
    others = {"text": {"a": rows[0]}, "deep": {99: rows[0]}, "negative": {-1: rows[0]}, "twice": {**rows, "1": rows[0]}, "wide": {0: rows[0][1:]},
              "NaN": {0: rows[0] / 0}, "zeros": {0: rows[0] * 0}, "a list": {0: [1.0]}, "none": {}}  # fmt: skip
    made: dict[str, Any] = {label: {**good, "layer_activations": value} for label, value in others.items()}
    return made | {
        "another site": {**good, "layer_type": "norm"},
        "no site": {"layer_activations": rows},
        "no layers": {"layer_type": "mlp"},
    }


def make_svec(folder: Path) -> Path:
    rows = {str(layer): [row.tolist()] for layer, row in enumerate(numbers(2, tiny().layout.d_model))}
    return store.write_json({"model_type": tiny().model.config.model_type, "directions": rows}, folder / "v.svec")


def of_gguf(path: Path, rng: random.Random, most: int) -> Iterator[Alteration]:
    width, hint = tiny().layout.d_model, {"controlvector.model_hint": tiny().model.config.model_type}
    rows = {f"direction.{k}": np.ones(width, "f4") for k in (1, 2)}
    cases: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
        "no tensor": ("controlvector", hint, {}), "a model": ("llama", hint, rows), "layer 0": ("controlvector", hint, {"direction.0": rows["direction.1"]}),
        "deep": ("controlvector", hint, {"direction.99": rows["direction.1"]}), "deepest": ("controlvector", hint, {"direction.99999999999": rows["direction.1"]}),
        "wide": ("controlvector", hint, {"direction.1": np.ones(width + 1, "f4")}), "NaN": ("controlvector", hint, {"direction.1": np.full(width, np.nan, "f4")}),
        "zeros": ("controlvector", hint, {"direction.1": np.zeros(width, "f4")}), "another type": ("controlvector", hint, {"direction.1": np.ones(width, "f2")}),
        "another model": ("controlvector", {"controlvector.model_hint": "qwen9"}, rows), "a number as hint": ("controlvector", {"controlvector.model_hint": 7}, rows),
        "another name": ("controlvector", hint, {"vector.1": rows["direction.1"]}),
    }  # fmt: skip
    for label, case in cases.items():
        yield Alteration(f"gguf: {label}", lambda file, case=case: store.write_gguf(*case, file) and None)
    yield from alter.flips(sorted(rng.sample(range(path.stat().st_size), 20)), "gguf", legal=True)


# --- problems, tables, JSON that the toolkit wrote -----------------------------------------------------------


def make_problems(folder: Path) -> Path:
    asked = [({"role": "user", "content": f"{k}+1=?"},) for k in range(4)]
    return store.save_problems([Problem(f"p{k}", m, str(k + 1), {"task": "sum"}) for k, m in enumerate(asked)], folder / "p.jsonl")


def free_in_problem(path: tuple[Step, ...]) -> bool:
    return path[0] == "meta" and len(path) > 1


def of_problems(path: Path, rng: random.Random, most: int) -> Iterator[Alteration]:
    legal = (
        "meta dropped",
        "meta renamed",
        "meta an object",
        "id dropped",
        "id renamed",
        "id a text",
        "id a number",
        "answer a number",
    )
    for a in alter.of_lines(path, rng, free_in_problem, most, unique=True):
        # Text and numbers are ids and answers; a role or a question is any text.
        yield dataclasses.replace(a, legal=a.label.endswith((*legal, "content a text")))
    yield from alter.of_text()
    empty = {"id": " ", "answer": "", "messages": [], "question": ""}
    for field, value in empty.items():
        row = (
            {"question": "q", "answer": "1"}
            if field == "question"
            else {"id": "p", "messages": [{"role": "user", "content": "q"}], "answer": "1"}
        )
        text = json.dumps({**row, field: value}) + "\n"
        yield Alteration(f"problem: empty {field}", lambda file, text=text: file.write_text(text) and None, line=1)
    long = json.dumps({"question": "q" * 5_000_000, "answer": ["1"]}) + "\n"
    yield Alteration("problem: a huge line", lambda file: file.write_text(long) and None, line=1)


def make_table(suffix: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        frame, path = (
            pd.DataFrame({"question": ["a, b?", "c?", "d?"], "answer": ["x #### 1", "NA #### 007", "#### 3"]}),
            folder / f"t{suffix}",
        )
        if suffix == ".csv":
            frame.to_csv(path, index=False)
            return path
        return store.save_table(frame, path) if suffix == ".parquet" else store.write_rows(frame.to_dict("records"), path)

    return make


def of_table(path: Path, rng: random.Random, most: int) -> Iterator[Alteration]:
    if path.suffix == ".parquet":
        yield from alter.of_parquet(path, {"question": str, "answer": str}, rng, 25)
        return
    yield from alter.of_text(is_json=path.suffix == ".jsonl")
    if path.suffix == ".csv":
        yield from alter.of_csv(path)
        return
    for a in alter.of_lines(path, rng, no_skip, most, unique=False):
        # The errors of columns name row and column instead.
        yield dataclasses.replace(a, legal=a.label.endswith("a text"), line=None)


def json_kind(
    name: str, value: Callable[[], Any], read: Callable[[Path], Any], free: tuple[str, ...] = (), legal: tuple[str, ...] = ()
) -> Kind:
    def of(path: Path, rng: random.Random, most: int) -> Iterator[Alteration]:
        def skip(at: tuple[Step, ...]) -> bool:
            return any(".".join(map(str, at)).startswith(name) for name in free)

        for a in alter.of_json(path, rng, skip, most):
            yield dataclasses.replace(a, legal=a.label.removeprefix("json: ") in legal)
        yield from alter.of_text()

    return Kind(lambda folder: store.write_json(value(), folder / name), read, of)


def lines_kind(name: str, make: Callable[[], list[dict]], read: Callable[[Path], Any], strict: tuple[str, ...]) -> Kind:
    def of(path: Path, rng: random.Random, most: int) -> Iterator[Alteration]:
        for a in alter.of_lines(path, rng, lambda at: at[0] not in strict, most, unique=False):
            yield dataclasses.replace(
                a,
                legal=a.label.endswith(
                    ("loss dropped", "loss renamed", "accuracy dropped", "accuracy renamed", "loss null", "accuracy null")
                ),
            )
        yield from alter.of_text()

    return Kind(lambda folder: store.write_rows(make(), folder / name), read, of, cut_is_legal=True)


def curve_rows() -> list[dict[str, Any]]:
    base = {"kind": "test", "problems": "all", "metric": "accuracy", "mean": 0.5, "low": 0.4, "high": 0.6}
    return [{"kind": "about", "recipe": {"name": "pear"}, "seed": 0}, {"kind": "step", "step": 1, "accuracy": 0.5},
            {**base, "condition": "base"}, {**base, "condition": "pear-seed0"},
            {"kind": "outcomes", "problem_id": ["a", "b"], "accuracy": [0.5, 1.0], "think_tokens": [3.0, 4.0]}]  # fmt: skip


def dose_rows() -> dict[str, Any]:
    row = {"direction": "length direction", "metric": "accuracy", "mean": 0.5, "low": 0.4, "high": 0.6}
    return {"usable": [-1.0, 1.0], "doses": [{**row, "strength": s} for s in (-1.0, 0.0, 1.0)]}


def make_filler(folder: Path) -> Path:
    return store.write_text("One sentence. Another one!\nAnd a third?\n", folder / "filler.txt")


def parent(read: Callable[[Path], Any]) -> Callable[[Path], Any]:
    return lambda path: read(path.parent)


def conciseness() -> dict[str, Any]:
    return {"weight": numbers(tiny().layout.d_model).tolist(), "centre": 0.5, "spread": 1.5}


def thinkedit_file() -> torch.Tensor:
    return numbers(tiny().layout.n_layers, 1, tiny().layout.d_model)


KINDS: dict[str, Kind] = {
    "direction": value_kind(direction),
    "scores": value_kind(lambda: HeadScores(numbers(3, 4), "short", "norm", about())),
    "moments": value_kind(moments),
    "plan": value_kind(plan),
    "rollouts": Kind(make_rollouts, lambda path: jobs.read_rollouts(path.parent).rollouts, of_part),
    "rollouts header": Kind(lambda folder: make_rollouts(folder).parent / "header.json", lambda path: jobs.read_rollouts(path.parent),
                            json_kind("header.json", dict, store.read_json, ("eos_ids", "template", "tags", "problems", "sampling.seed", "model", "rollouts")).of),
    "problems": Kind(make_problems, store.load_problems, of_problems, cut_is_legal=True),
    "table.csv": Kind(make_table(".csv"), lambda path: mathematics.gsm8k(path=path), of_table, cut_is_legal=True),
    "table.jsonl": Kind(make_table(".jsonl"), lambda path: mathematics.gsm8k(path=path), of_table, cut_is_legal=True),
    "table.parquet": Kind(make_table(".parquet"), lambda path: mathematics.gsm8k(path=path), of_table),
    "filler": Kind(make_filler, needle.read_filler, lambda path, rng, most: alter.of_text(is_json=False), cut_is_legal=True),
    "own vector": Kind(lambda folder: vectors.save(direction(), folder / "v.safetensors", lm=tiny()), lambda path: vectors.load(path, tiny()), of_value),
    "own gguf": Kind(lambda folder: vectors.save_gguf(direction(), folder / "v.gguf", lm=tiny(), drop_layer_0=True),
                     lambda path: vectors.load_gguf(path, tiny()), of_gguf),
    "svec": Kind(make_svec, lambda path: vectors.load_svec(path, tiny()), json_kind("v.svec", dict, store.read_json, (), ("directions.0 dropped", "directions.1 dropped")).of),
    "thinkedit": Kind(make_pt(thinkedit_file, "v_mlp.pt"), lambda path: vectors.load_thinkedit(path, tiny()), of_pt(wrong_tensors(thinkedit_file))),
    "hidden-directions": Kind(make_pt(lambda: direction().vector, "v.pt"), lambda path: vectors.load_hidden_directions(path, tiny()),
                              of_pt(wrong_tensors(lambda: direction().vector))),
    "steering-vectors": Kind(make_pt(steering_vectors, "v.pt"), lambda path: vectors.from_steering_vectors(store.read_pt(path), tiny()),
                             of_pt(wrong_steering_vectors)),
    "doses": json_kind("doses.json", dose_rows, parent(jobs.read_doses), ("usable",)),
    "conciseness": json_kind("conciseness.json", conciseness, lambda path: judge.read_head(tiny(), path)),
    "checkpoint state": json_kind(STATE, lambda: {"identity": {"seed": 0}, "reward": {}}, parent(grpo_run.state_of), ("identity.",),
                                  ("identity an object", "reward an object")),
    "training log": lines_kind("log.jsonl", lambda: [{"step": k, "loss": 0.5} for k in range(3)], log.read, ("step", "loss")),
    "learning curve": lines_kind("pear-seed0.jsonl", curve_rows, parent(curves.read), tuple({n for c in curves.IN_CURVE.values() for n in c})),
}  # fmt: skip
