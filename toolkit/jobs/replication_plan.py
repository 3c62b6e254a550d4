"""The plan of a replication, read from a TOML file: model, rollouts, edit, tests, and the numbers of the paper. No model is needed.

``read_plan`` checks every setting against the code. ``replication_steps`` returns the expected tokens, hours and memory of each step.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import pandas as pd

from toolkit import evaluate, store, tasks
from toolkit.generate import Sampling
from toolkit.jobs.check import Shape, memory
from toolkit.jobs.finding import EditSettings, form_named
from toolkit.metrics import METRICS
from toolkit.tags import ThinkTags

S = TypeVar("S")
REMEDY = "Correct the plan; plans/README.md describes its fields."
NOT_FOUND = "NOT FOUND"  # stands where the paper's number is not known
SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Number type of the weights -> bytes per number."""


@dataclass(frozen=True)
class ModelPart:
    """The model of a replication. The sizes give the memory without loading it, and are compared with the loaded model.

    Attributes:
        id: Hub id, directory, or name of a model that comes with the toolkit.
        dtype: Number type of the weights.
        weights: Number of weights, in millions.
        layers: Number of layers.
        heads: Attention heads per layer.
        kv_heads: Heads of the KV cache per layer.
        head_dim: Width of a head.
        think: Think tags as for ``--think``; "" detects them.
        template: Variables of the chat template.
    """

    id: str
    dtype: str
    weights: float
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    think: str = ""
    template: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.dtype not in SIZES:
            raise ValueError(f"dtype {self.dtype!r}: choose one of {', '.join(SIZES)}.")
        if self.think:
            ThinkTags.parse(self.think)
        if min(self.weights, self.layers, self.heads, self.kv_heads, self.head_dim) <= 0:
            raise ValueError("all sizes must be above 0.")

    @property
    def shape(self) -> Shape:
        """Sizes that determine how much memory the model needs."""
        size, count = SIZES[self.dtype], round(1e6 * self.weights)
        return Shape(count, count * size, size, 2 * self.kv_heads * self.head_dim * self.layers * size)


@dataclass(frozen=True)
class SamplingPart:
    """Problems to answer, and how responses are sampled: the rollouts that the edit is made from, or one of the tests.

    Attributes:
        task: Name of the task.
        splits: Splits of the task whose problems are used.
        problems: Largest number of problems per split.
        samples: Samples per problem.
        max_new_tokens: Token budget of a response.
        mean_tokens: Expected mean length of a response in tokens, for the expected hours (an assumption).
        temperature: Sampling temperature.
        top_p: Probability mass of nucleus sampling.
        top_k: Number of most likely tokens that are kept; 0 keeps all.
        name: Name of a test in tables; "" stands for the task.
        available: Number of problems in all splits together, if it is below ``problems`` times the number of splits. Only the expected hours
            need it.
    """

    task: str
    splits: tuple[str, ...]
    problems: int
    samples: int
    max_new_tokens: int
    mean_tokens: float
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    name: str = ""
    available: int | None = None

    def __post_init__(self) -> None:
        if self.problems < 1 or not self.splits:
            raise ValueError(f"problems={self.problems}, splits={list(self.splits)}: give at least one of each.")
        if not 0 < self.mean_tokens <= self.max_new_tokens:
            raise ValueError(
                f"mean_tokens={self.mean_tokens}: give a length above 0, at most max_new_tokens={self.max_new_tokens}."
            )
        self.sampling(0, 1)
        tasks.check(self.task, *self.splits)

    @property
    def label(self) -> str:
        """Name of the test in tables."""
        return self.name or self.task

    @property
    def responses(self) -> int:
        """Largest number of responses."""
        problems = self.problems * len(self.splits)
        return min(problems, self.available or problems) * self.samples

    def sampling(self, seed: int, batch_size: int) -> Sampling:
        """Return the sampling settings."""
        return Sampling(self.samples, self.temperature, self.top_p, self.top_k, self.max_new_tokens, seed, batch_size=batch_size)


@dataclass(frozen=True)
class EditPart:
    """ThinkEdit's edit and its random controls.

    Attributes:
        form: ``published`` or ``ours``, see ``jobs.FORMS``.
        fraction: Share of all heads that are edited, 0 to 1.
        strength: Factor in the edit. 1 removes the component along the direction from the outputs of the heads, 2 reverses its sign.
        share: Share of the responses in each length class, if the next two are not given.
        short_below: Short class: responses with fewer think tokens than this.
        long_above: Long class: responses with more think tokens than this.
        draws: Number of random controls of each kind, at least 3.
    """

    form: str
    fraction: float
    strength: float
    share: float = 0.2
    short_below: float | None = None
    long_above: float | None = None
    draws: int = 3

    def __post_init__(self) -> None:
        form_named(self.form)
        self.settings(0)
        if self.draws < 3:
            raise ValueError(f"draws={self.draws}: with fewer than three random draws a control has no interval.")

    def settings(self, seed: int) -> EditSettings:
        """Return the settings of the edit."""
        return EditSettings(self.fraction, self.strength, self.share, self.short_below, self.long_above, seed, draws=self.draws)


@dataclass(frozen=True)
class RunPart:
    """Seed, batch size and expected speeds. The speeds are assumptions, for the expected hours only.

    Attributes:
        seed: Seed of problems, samples, controls and bootstrap.
        batch_size: Responses that are decoded together.
        sampled_per_second: Expected tokens per second of sampling.
        read_per_second: Expected tokens per second of teacher-forced passes.
        device: Device for which the speeds are meant, in words.
    """

    seed: int
    batch_size: int
    sampled_per_second: float
    read_per_second: float
    device: str

    def __post_init__(self) -> None:
        if self.batch_size < 1 or min(self.sampled_per_second, self.read_per_second) <= 0:
            raise ValueError("batch_size and the speeds must be above 0.")


@dataclass(frozen=True)
class Published:
    """Numbers of the paper for one test and metric, for the unchanged and for the edited model.

    Attributes:
        test: Name of a test of the plan.
        metric: Name of a metric, such as ``accuracy`` or ``shortest_5``.
        version: Version of the paper, such as ``v3/v4``.
        base: Value of the unchanged model, in percent; ``None`` if it was not found.
        edited: Value of the edited model, in percent; ``None`` if it was not found.
        note: Where the numbers are from, or what was not found.
    """

    test: str
    metric: str
    version: str
    base: float | None = None
    edited: float | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if self.metric not in evaluate.REPORTED or METRICS[self.metric].unit != "share":
            shares = [name for name in evaluate.REPORTED if METRICS[name].unit == "share"]
            raise ValueError(f"metric {self.metric!r}: choose one of {', '.join(shares)}.")
        if any(value is not None and not 0 <= value <= 100 for value in (self.base, self.edited)):
            raise ValueError(f"base={self.base}, edited={self.edited}: numbers are in percent, 0 to 100.")


@dataclass(frozen=True)
class Replication:
    """The plan of a replication.

    Attributes:
        title: Title of the report.
        paper: The paper, with its arXiv id.
        untested: Parts of the plan that were never run with the real model, in words; "" if there are none.
        deviations: Known differences from the paper.
        model: The model.
        train: Rollouts that the edit is made from.
        edit: The edit.
        run: Seed, batch size and expected speeds.
        tests: Tests on which base, edited model and controls are compared.
        published: Numbers of the paper.
    """

    title: str
    paper: str
    untested: str
    deviations: tuple[str, ...]
    model: ModelPart
    train: SamplingPart
    edit: EditPart
    run: RunPart
    tests: tuple[SamplingPart, ...]
    published: tuple[Published, ...]

    def __post_init__(self) -> None:
        labels = [test.label for test in self.tests]
        if not labels or len({*labels}) < len(labels):
            raise ValueError(f"tests {labels}: give at least one test, each with its own name.")
        if unknown := [row.test for row in self.published if row.test not in labels]:
            raise ValueError(f"published numbers of {unknown[0]!r}, which is no test of the plan: choose from {', '.join(labels)}.")
        used = {(self.train.task, split) for split in self.train.splits}
        for test in self.tests:
            if shared := [split for split in test.splits if (test.task, split) in used]:
                raise ValueError(
                    f"test {test.label}: the edit is made from split {shared[0]} of the same task. Test on another split."
                )

    @property
    def edited_heads(self) -> int:
        """Number of heads that are edited."""
        return max(1, round(self.edit.fraction * self.model.layers * self.model.heads))

    @property
    def conditions(self) -> int:
        """Number of conditions per test: base, the edited model, random heads and random directions."""
        return 2 + 2 * self.edit.draws


def read_plan(path: str | Path) -> Replication:
    """Read the plan of a replication from a TOML file, and check every setting. No model is loaded, and nothing is downloaded.

    Raises:
        FileNotFoundError: there is no such file.
        store.DamagedFileError: the file is not TOML, or a setting is missing, unknown, of the wrong type, or refused by the code.
    """
    text = "\n".join(store.read_lines(store.existing_file(path)))
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise store.DamagedFileError(f"{path} is not TOML: {error}. {REMEDY}") from error
    parts = {"model": ModelPart, "train": SamplingPart, "edit": EditPart, "run": RunPart}
    made: dict[str, Any] = {name: _made(kind, content.pop(name, None), f"{path}, [{name}]") for name, kind in parts.items()}
    for name, kind in {"tests": SamplingPart, "published": Published}.items():
        rows = store.checked(content.pop(name, []), list[Mapping[str, Any]], f"{path}, [[{name}]]", REMEDY)
        made[name] = tuple(_made(kind, row, f"{path}, [[{name}]] number {i}") for i, row in enumerate(rows, 1))
    return _made(Replication, content, str(path), made)


def _made(kind: type[S], table: Any, where: str, made: Mapping[str, Any] = {}) -> S:
    """Return a table of the file as an object of a dataclass, with checked names, types and values.

    Args:
        kind: The dataclass.
        table: Table of the file.
        where: Place of the table, for error messages.
        made: Fields that are read already.
    """
    if not isinstance(table, Mapping):
        raise store.DamagedFileError(f"{where} is missing or no table. {REMEDY}")
    hints, own = get_type_hints(kind), [f for f in fields(kind) if f.name not in made]  # type: ignore[arg-type]
    if unknown := [name for name in table if name not in {f.name for f in own}]:
        raise store.DamagedFileError(
            f"{where} has the unknown setting {unknown[0]!r}: choose from {', '.join(f.name for f in own)}."
        )
    needed = {f.name: hints[f.name] for f in own if f.name in table or (f.default is MISSING and f.default_factory is MISSING)}
    values = store.checked(table, needed, where, REMEDY)
    try:
        return kind(**values, **made)
    except (ValueError, ImportError) as error:
        raise store.DamagedFileError(f"{where}: {error}") from error


def replication_steps(plan: Replication) -> pd.DataFrame:
    """Return the steps of a replication: index ``step``; columns ``responses, tokens`` (expected), ``hours`` and ``memory_gb``.

    Tokens are computed from ``mean_tokens``, hours from the expected speeds. Memory is that of the largest responses.
    """
    train, run = plan.train, plan.run
    read = train.responses * train.mean_tokens
    rows: dict[str, tuple[int, float, float, float]] = {
        f"rollouts: {train.task}": (train.responses, read, read / run.sampled_per_second, _memory(plan, train)),
        "direction, head scores and edit": (0, read, read / run.read_per_second, _memory(plan, None)),
    }
    for test in plan.tests:
        responses = test.responses * plan.conditions
        tokens = responses * test.mean_tokens
        rows[f"compare {plan.conditions} conditions: {test.label}"] = (
            responses, tokens, tokens / run.sampled_per_second, _memory(plan, test),
        )  # fmt: skip
    rows["report"] = (0, 0.0, 0.0, 0.0)
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["responses", "tokens", "hours", "memory_gb"])
    return table.assign(hours=table["hours"] / 3600).rename_axis("step")


def _memory(plan: Replication, part: SamplingPart | None) -> float:
    """Return the expected memory in GB of sampling a part, or of reading its responses (``None``)."""
    if part is None:
        return memory(plan.model.shape)["loading, steering, directions"] / 1e9
    rows = min(plan.run.batch_size, part.responses)
    sizes = memory(plan.model.shape, rows=rows, tokens=part.max_new_tokens)
    return next(size for name, size in sizes.items() if name.startswith("sampling")) / 1e9


def published_table(plan: Replication) -> pd.DataFrame:
    """Return the paper's numbers of a plan as a table of texts, one row per number. Columns: ``base, edited`` (percent or NOT FOUND), ``note``."""
    rows = {
        f"{p.test}, {p.metric}, {p.version}": {"base": said(p.base), "edited": said(p.edited), "note": p.note}
        for p in plan.published
    }
    return pd.DataFrame.from_dict(rows, orient="index", columns=["base", "edited", "note"]).rename_axis("number")


def said(value: float | None) -> str:
    """Return a published number, in percent, as text with two decimals; NOT FOUND for ``None``."""
    return NOT_FOUND if value is None else f"{value:.2f}"
