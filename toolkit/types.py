"""Frozen values that travel between rooms. None of them runs a model or touches a file.

Units: lengths are tokens, entropies are nats. Sign convention everywhere: **+ is longer thinking**.
Residual tensors are indexed ``[layers, d_model]`` with layer 0 the first block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from toolkit import origins

Finish = Literal["stop", "length"]
Kind = Literal["resid_pre", "z", "attn_out", "resid_mid", "mlp_out", "resid_post"]
"""Site kinds, in the order they are computed: see ``sites``."""
Z_OVER_NORM = "z_over_norm"
"""Name of ``z`` divided, position by position, by the scale of the norm between ``W_O`` and the residual stream (ours)."""
Op = Literal["project_out", "scale"]


def _checked(name: str, value: Tensor, axes: int) -> Tensor:
    """The tensor, if it has so many axes, none of them empty, and a floating point type; else ValueError."""
    if value.ndim != axes or not value.is_floating_point() or 0 in value.shape:
        raise ValueError(
            f"{name} is {value.dtype} of the shape {tuple(value.shape)}: expected floats with {axes} axes, none empty."
        )
    return value


@dataclass(frozen=True)
class Problem:
    """One question with a checkable answer.

    Attributes:
        id: Unique and stable; group statistics and paired comparisons follow it.
        messages: Chat messages, ``({"role": ..., "content": ...}, ...)``.
        answer: The gold answer as text.
        meta: Task facts (``task``, ``difficulty``, ``split``, ...); never read by a method.
    """

    id: str
    messages: tuple[Mapping[str, str], ...]
    answer: str
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Span:
    """Half-open range of token positions ``[start, stop)`` in a full sequence (prompt + response)."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise ValueError(f"Span needs 0 <= start <= stop, got start={self.start}, stop={self.stop}.")

    def __len__(self) -> int:
        return self.stop - self.start

    def predictors(self) -> Span:
        """Positions whose states *predict* the span's tokens: ``[start-1, stop-1)``.

        The state at position t predicts token t+1, so this is what "over the span" means in every method.
        """
        if self.start == 0:
            raise ValueError("Span starts at position 0: no position predicts its first token.")
        return Span(self.start - 1, self.stop - 1)


@dataclass(frozen=True)
class Rollout:
    """One sampled response with its spans, decided once in ``generate``.

    Attributes:
        problem_id: The problem it answers.
        sample: Index of the sample within the problem.
        token_ids: Prompt and response tokens (no padding).
        prompt_len: Number of prompt tokens.
        think: Tokens *between* the think tags, tags excluded. Open (to the end) if never closed;
            ``None`` if the response never opened a think span.
        answer: Tokens after the closing tag, end-of-sequence token excluded; ``None`` if never closed.
        finish: ``"stop"`` if an end-of-sequence token was sampled, ``"length"`` if the budget ran out.
        text: Decoded response, special tokens kept.
        correct: Graded on the answer span; without one (never closed) it is wrong.
        logprobs: Log-probability of each response token under the sampling distribution, or ``None``.
        entropies: Full-softmax entropy (nats, at the sampling temperature) before each response token.
    """

    problem_id: str
    sample: int
    token_ids: tuple[int, ...]
    prompt_len: int
    think: Span | None
    answer: Span | None
    finish: Finish
    text: str
    correct: bool
    logprobs: tuple[float, ...] | None = None
    entropies: tuple[float, ...] | None = None

    @property
    def think_tokens(self) -> int:
        """Length of the think span in tokens, tags excluded; 0 if thinking never started."""
        return len(self.think) if self.think else 0

    @property
    def closed(self) -> bool:
        """Whether the think span was closed by its tag."""
        return self.answer is not None

    @property
    def response_tokens(self) -> int:
        """Tokens sampled after the prompt, tags and end-of-sequence included."""
        return len(self.token_ids) - self.prompt_len


@dataclass(frozen=True)
class Provenance:
    """What an artifact was made from; travels with it into every file.

    Attributes:
        model: Id or directory the model was loaded from.
        revision: Hub revision, or ``None``.
        fingerprint: SHA-256 over all weights; loading an artifact onto other weights is an error.
        template_hash: Hash of the chat template.
        toolkit_version: Version that wrote it.
        seed: Seed of whatever was random, or ``None``.
        notes: Anything else worth keeping (sampling, thresholds), JSON-serialisable; among it the record of the problems it was made
            from, see ``origins``.
    """

    model: str
    revision: str | None
    fingerprint: str
    template_hash: str
    toolkit_version: str
    seed: int | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        origins.check(self.notes)


@dataclass(frozen=True)
class Moments:
    """Running sums of per-example mean activations, by class, for some sites. Sums add up across shards.

    ``sums[kind][c, l]`` is the sum over the examples of class c of the example's mean activation at layer l.
    ``outer[kind][l]`` (optional) is the sum over examples of the mean outer product of activations, all
    classes together *within* class: see :meth:`covariance`.

    Attributes:
        labels: Class names, e.g. ``("long", "short")``.
        n: Examples per class.
        positions: Name of the positions averaged over, e.g. ``"think"``.
        sums: Site kind (or ``sites.Z_OVER_NORM``) -> ``[labels, layers, width]``, fp32 or wider.
        outer: Site kind -> ``[labels, layers, width, width]``, or empty.
    """

    labels: tuple[str, ...]
    n: tuple[int, ...]
    positions: str
    sums: Mapping[str, Float[Tensor, "labels layers _"]]
    outer: Mapping[str, Float[Tensor, "labels layers _ _"]]
    provenance: Provenance

    def __post_init__(self) -> None:
        if len(set(self.labels)) < len(self.labels) or len(self.n) != len(self.labels) or any(n < 0 for n in self.n):
            raise ValueError(f"Moments need classes of different names and one count each, got {self.labels} and {self.n}.")
        kinds = (*get_args(Kind), Z_OVER_NORM)
        if unknown := [kind for kind in self.sums if kind not in kinds]:
            raise ValueError(f"Moments.sums has the unknown site kind {unknown[0]!r:.40}: expected {', '.join(kinds)}.")
        if alone := [kind for kind in self.outer if kind not in self.sums]:
            raise ValueError(f"Moments.outer has {alone[0]!r:.40}, which Moments.sums has not.")
        layers = {kind: _checked(f"Moments.sums.{kind}", value, 3).shape[1] for kind, value in self.sums.items()}
        if len(set(layers.values())) > 1:
            raise ValueError(f"Moments.sums has different numbers of layers: {layers}.")
        for kind, value in self.sums.items():
            size = (len(self.labels), value.shape[1], value.shape[2])
            if value.shape[0] != size[0]:
                raise ValueError(f"Moments.sums.{kind} has the shape {tuple(value.shape)}, but there are {size[0]} classes.")
            if kind in self.outer and self.outer[kind].shape != (*size, size[2]):
                raise ValueError(
                    f"Moments.outer.{kind} has the shape {tuple(self.outer[kind].shape)}, expected {(*size, size[2])}."
                )

    def index(self, label: str) -> int:
        """Row of a class. Raises KeyError naming the classes there are."""
        if label not in self.labels:
            raise KeyError(f"No class {label!r} in these moments: they hold {', '.join(self.labels)}.")
        return self.labels.index(label)

    def mean(self, kind: str, label: str) -> Float[Tensor, "layers _"]:
        """Mean over examples of the per-example mean activation at site ``kind``, class ``label``."""
        row = self.index(label)
        if kind not in self.sums:
            raise KeyError(f"Site {kind!r} was not collected: these moments hold {', '.join(self.sums)}.")
        if self.n[row] == 0:
            raise ValueError(f"Class {label!r} has no examples: its mean is undefined.")
        return self.sums[kind][row] / self.n[row]

    def covariance(self, kind: str) -> Float[Tensor, "layers _ _"]:
        """Pooled within-class covariance of activations (each example weight 1) at site ``kind``."""
        if kind not in self.outer:
            raise KeyError(f"No second moments of {kind!r}: collect with second=({kind!r},).")
        total = self.outer[kind].sum(dim=0)
        for i, n in enumerate(self.n):
            if n:
                mean = self.sums[kind][i] / n
                total = total - n * mean[:, :, None] * mean[:, None, :]
        return total / sum(self.n)

    def __add__(self, other: Moments) -> Moments:
        """Merge two shards of the same model, positions and sites; a class may be missing from either."""
        mine = (self.positions, self.provenance.fingerprint, sorted(self.sums), sorted(self.outer))
        theirs = (other.positions, other.provenance.fingerprint, sorted(other.sums), sorted(other.outer))
        if mine != theirs:
            raise ValueError(f"These moments do not belong together: {mine} and {theirs} (positions, weights, sites).")
        labels = tuple(sorted({*self.labels, *other.labels}))

        def merged(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Tensor]:
            found = {kind: torch.zeros(len(labels), *a[kind].shape[1:], dtype=a[kind].dtype) for kind in a}
            for part, names in ((a, self.labels), (b, other.labels)):
                for kind, value in part.items():
                    found[kind][[labels.index(name) for name in names]] += value
            return found

        counts = [dict(zip(m.labels, m.n, strict=True)) for m in (self, other)]
        n = tuple(sum(c.get(name, 0) for c in counts) for name in labels)
        about = replace(self.provenance, notes=origins.join_notes(self.provenance.notes, other.provenance.notes))
        return Moments(labels, n, self.positions, merged(self.sums, other.sums), merged(self.outer, other.outer), about)


@dataclass(frozen=True)
class Direction:
    """A direction of thinking length in the residual stream, one vector per layer, **+ is longer**.

    Attributes:
        vector: ``[layers, d_model]``, un-normalised.
        kind: Site kind it lives at: ``"resid_mid"`` (attn) or ``"resid_post"`` (mlp), before any final norm; ``"attn_out"`` for a
            direction that heads write themselves (it differs from the residual stream only in post-norm families).
        positions: Name of the positions it was averaged over.
        estimator: ``"mean_difference"``, ``"whitened"``, ``"random"``, ...
        n_pos: Examples of the long class.
        n_neg: Examples of the short class.
    """

    vector: Float[Tensor, "layers d_model"]
    kind: str
    positions: str
    estimator: str
    n_pos: int
    n_neg: int
    provenance: Provenance

    def __post_init__(self) -> None:
        _checked("Direction.vector", self.vector, 2)
        if self.kind not in get_args(Kind) or self.kind == "z":
            kinds = ", ".join(kind for kind in get_args(Kind) if kind != "z")
            raise ValueError(f"Direction.kind is {self.kind!r:.40}: a direction lives at one of {kinds}.")
        if self.n_pos < 0 or self.n_neg < 0:
            raise ValueError(f"A direction cannot be of n_pos={self.n_pos} and n_neg={self.n_neg} examples: expected 0 or more.")

    @property
    def norms(self) -> Float[Tensor, " layers"]:
        """Euclidean norm of each layer's vector."""
        return self.vector.norm(dim=-1)

    def unit(self) -> Float[Tensor, "layers d_model"]:
        """Unit vectors. A layer whose vector is zero stays zero (nothing is projected out there)."""
        norms = self.norms[:, None]
        return self.vector / norms.where(norms > 0, 1.0)


@dataclass(frozen=True)
class HeadScores:
    """One number per attention head.

    Attributes:
        score: ``[layers, heads]``; higher means more of what ``method`` looks for.
        method: What was scored, e.g. ``"short_thinking"``.
        units: e.g. ``"residual stream norm"``: what a head adds to the residual stream, behind any norm on its way there.
    """

    score: Float[Tensor, "layers heads"]
    method: str
    units: str
    provenance: Provenance

    def __post_init__(self) -> None:
        _checked("HeadScores.score", self.score, 2)

    def ranked(self) -> list[tuple[int, int]]:
        """``(layer, head)`` from the highest score to the lowest; of equal ones the lower layer, then the lower head, is first."""
        heads = self.score.shape[1]
        order = self.score.flatten().argsort(descending=True, stable=True).tolist()
        return [(i // heads, i % heads) for i in order]


@dataclass(frozen=True)
class HeadEdit:
    """One change of one attention head.

    ``project_out``: ``W_h <- (I - strength v v^T) W_h`` with v the plan's unit direction at that layer, taken back through the
    norm that follows ``W_O`` in post-norm families.
    ``scale``: ``W_h <- (1 - strength) W_h``; strength 1 silences the head, 0 is no change.
    """

    layer: int
    head: int
    op: Op
    strength: float

    def __post_init__(self) -> None:
        if self.layer < 0 or self.head < 0:
            raise ValueError(f"An edit of layer {self.layer}, head {self.head} does not exist: both count from 0.")
        if self.op not in get_args(Op) or not math.isfinite(self.strength):
            raise ValueError(
                f"Head {self.layer}.{self.head} cannot be edited by op={self.op!r:.40}, strength={self.strength}: expected one of "
                f"{', '.join(get_args(Op))}, and a finite strength."
            )


@dataclass(frozen=True)
class Plan:
    """Edits as a value: can be printed, saved, compared, applied at run time or written into weights."""

    edits: tuple[HeadEdit, ...]
    direction: Direction | None
    name: str
    provenance: Provenance

    def __post_init__(self) -> None:
        if self.direction is None and any(edit.op == "project_out" for edit in self.edits):
            raise ValueError("This plan projects out a direction, but has none: pass direction=...")
        if self.direction is None:
            return
        for edit in self.edits:
            if edit.op == "project_out" and edit.layer >= len(self.direction.vector):
                raise IndexError(
                    f"This plan edits layer {edit.layer}, but its direction has layers 0..{len(self.direction.vector) - 1}: "
                    "they were not made for one model."
                )

    @property
    def heads(self) -> list[tuple[int, int]]:
        """The edited heads as ``(layer, head)``."""
        return [(edit.layer, edit.head) for edit in self.edits]


@dataclass(frozen=True)
class Report:
    """What a comparison measured: every model on the same problems and seeds.

    Attributes:
        rows: One row per rollout: ``condition, problem_id, sample, task, difficulty, correct, think_tokens,
            response_tokens, closed, looping, finish``.
        conditions: Condition name -> what it is (model, fingerprint, interventions, note).
        base: Name of the condition that differences are taken to.
        provenance: Of the base model; its notes hold sampling and problems.
    """

    rows: pd.DataFrame
    conditions: Mapping[str, Mapping[str, Any]]
    base: str
    provenance: Provenance

    def only(self, **columns: Any) -> Report:
        """The report on some of the problems: ``report.only(task="arithmetic")`` or ``only(difficulty=[4, 5, 6])``."""
        rows = self.rows
        for name, wanted in columns.items():
            if name not in rows:
                raise KeyError(f"No column {name!r} in this report: it has {', '.join(rows.columns)}.")
            rows = rows[rows[name].isin(list(wanted) if isinstance(wanted, list | tuple | range) else [wanted])]
        if rows.empty:
            raise ValueError(f"No row is left with {columns}.")
        return Report(rows, self.conditions, self.base, self.provenance)
