"""Find retrieval heads: answer haystacks and measure every head while the model answers (``toolkit retrieval-heads``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from toolkit import masks, needles
from toolkit.generate import Sampling, rollouts
from toolkit.jobs.study import Say
from toolkit.lm import LM
from toolkit.methods import retrieval_heads
from toolkit.methods.retrieval_heads import HeadMetrics
from toolkit.tasks import haystack, lookup, needle, threading
from toolkit.tasks.haystack import Haystack
from toolkit.types import HeadScores, Rollout

TASKS = ("lookup", "needle", "threading")
RANKINGS = {"copy, as published": ("copy", False), "write (ours)": ("write", True)}
"""Rankings of the heads: a metric, and True if the needle is the whole needed piece, False if it is only the words of the answer."""


@dataclass(frozen=True)
class Search:
    """Settings for finding retrieval heads and for masking them.

    Attributes:
        task: ``lookup`` (for the tiny reasoner), ``needle`` (facts in filler text) or ``threading`` (chains of keys).
        instances: Number of haystacks: dev split to find heads, as many of the test split to mask them.
        lengths: Prompt lengths in tokens; empty means five lengths up to the model's context. Not used by ``lookup``.
        counts: Numbers of heads to mask.
        ops: Forms of masking to try at the largest count. The published form (``uniform``) is always used.
        draws: Number of random controls per mask, with heads of the same layers.
        max_new_tokens: Token budget of a response.
    """

    task: str = "lookup"
    instances: int = 100
    lengths: tuple[int, ...] = ()
    counts: tuple[int, ...] = (1, 2, 3, 4)
    ops: tuple[str, ...] = masks.ABLATIONS
    draws: int = 3
    max_new_tokens: int = 120
    batch_size: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task={self.task!r} has no needle in its prompts: choose one of {', '.join(TASKS)}.")
        if wrong := set(self.ops) - set(masks.ABLATIONS):
            raise ValueError(f"ops={', '.join(wrong)}: choose from {', '.join(masks.ABLATIONS)}.")
        if self.instances < 1 or self.draws < 1 or not self.counts or min(self.counts) < 1:
            raise ValueError(f"instances={self.instances}, draws={self.draws}, counts={self.counts}: all must be at least 1.")

    @property
    def sampling(self) -> Sampling:
        """Sampling settings: greedy, as published."""
        return Sampling(temperature=0.0, max_new_tokens=self.max_new_tokens, seed=self.seed, batch_size=self.batch_size)

    def haystacks(self, lm: LM, split: str) -> list[Haystack]:
        """Return the haystacks of a split for ``lm``, with the positions of their needles. Errors as in ``tasks.haystack``."""
        match self.task:
            case "lookup":
                return [haystack.locate_lookup(lm, p) for p in lookup.load(split, self.instances, self.seed)]
            case "needle":
                return needle.spread(lm, split, self.instances, self.seed, lengths=self.lengths)
        sizes = self.lengths or haystack.lengths(lm)
        each = max(1, round(self.instances / len(sizes) / len(threading.MIX)))
        return threading.grid(lm, sizes, threading.MIX, split=split, n=each, seed=self.seed)


@dataclass(frozen=True)
class RetrievalMeasurement:
    """Retrieval metrics of every head on haystacks.

    Attributes:
        haystacks: The haystacks.
        rollouts: The model's greedy answers.
        measured: Metrics of every head and example, by ranking (see ``RANKINGS``).
    """

    haystacks: Sequence[Haystack]
    rollouts: Sequence[Rollout]
    measured: Mapping[str, HeadMetrics]

    @property
    def scores(self) -> dict[str, HeadScores]:
        """Head scores by ranking."""
        return {name: retrieval_heads.scores(self.measured[name], metric) for name, (metric, _) in RANKINGS.items()}

    def recall(self) -> pd.DataFrame:
        """Return the share of haystacks answered correctly by prompt length and needle depth.

        Columns: ``length`` (tokens; quintiles for ``lookup``), ``depth`` (of the first needed piece, 0 to 1), ``correct``, ``n``.
        """
        by_id = {h.problem.id: h for h in self.haystacks}
        rows = []
        for r in self.rollouts:
            h = by_id[r.problem_id]
            n, meta = len(h.prompt_ids), h.problem.meta
            rows.append((meta.get("length", n), meta.get("depth", h.needed[0].start / n), r.correct))
        cells = pd.DataFrame(rows, columns=["length", "depth", "correct"])
        for name, most in (("length", 8), ("depth", 11)):
            if cells[name].nunique() > most:
                cells[name] = pd.qcut(cells[name], 5, duplicates="drop").map(lambda bin: round(bin.mid, 2)).astype(float)
        return cells.groupby(["length", "depth"])["correct"].agg(correct="mean", n="size").reset_index()


def measure_retrieval(lm: LM, search: Search, *, out: Path | None = None, say: Say = lambda text: None) -> RetrievalMeasurement:
    """Answer the dev haystacks greedily, and measure the retrieval metrics of every head while it answers.

    Args:
        out: Directory to keep the rollouts in.
    """
    haystacks = search.haystacks(lm, "dev")
    say(f"answering {len(haystacks)} haystacks of up to {max(len(h.prompt_ids) for h in haystacks)} tokens")
    answers = rollouts(lm, [h.problem for h in haystacks], search.sampling, out=out)
    say("measuring every head at the generated tokens")
    measured = {
        whole: retrieval_heads.measure(
            lm, needles.examples(haystacks, answers, whole=whole), success=lambda e: bool(e.rollout.correct)
        )
        for whole in (False, True)
    }
    return RetrievalMeasurement(haystacks, answers, {name: measured[whole] for name, (_, whole) in RANKINGS.items()})


def top_heads(measurement: RetrievalMeasurement, count: int = 10) -> pd.DataFrame:
    """Return the best heads of each ranking.

    Columns: ``ranking, rank, layer, head, score``, and ``given_success``, the score over correctly answered haystacks only.
    """
    rows = []
    for name, (metric, _) in RANKINGS.items():
        measured = measurement.measured[name]
        score = retrieval_heads.scores(measured, metric)
        on_success = retrieval_heads.scores(measured, metric, when="success") if any(measured.success) else None
        for rank, (layer, head) in enumerate(score.ranked()[:count], 1):
            given_success = np.nan if on_success is None else float(on_success.score[layer, head])
            rows.append((name, rank, layer, head, float(score.score[layer, head]), given_success))
    return pd.DataFrame(rows, columns=["ranking", "rank", "layer", "head", "score", "given_success"])


def sparsity(measurement: RetrievalMeasurement, name: str) -> pd.DataFrame:
    """Return the shares of heads with a published score above 0.1, above 0.5 and at zero, beside those of published models.

    Args:
        name: Name of this model in the table.
    """
    shares = retrieval_heads.statistics(measurement.measured["copy, as published"].select("copy"))
    rows = {name: (shares["share_retrieval"], shares["share_strong"], shares["share_zero"]), **retrieval_heads.PUBLISHED_SHARES}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["above 0.1", "above 0.5", "zero"]).rename_axis("model")


def stability(measurement: RetrievalMeasurement, count: int, *, seed: int = 0) -> pd.DataFrame:
    """Return the overlap of the top heads on n examples with the top heads on all examples (in-sample).

    Columns: ``ranking, n, overlap``.
    """
    rows = []
    for name, (metric, _) in RANKINGS.items():
        values = measurement.measured[name].select(metric)
        for n in (1, 3, 10, 30, 100):
            if n <= len(values):
                rows.append((name, n, retrieval_heads.stability(values, n, count, seed=seed)))
    return pd.DataFrame(rows, columns=["ranking", "n", "overlap"])
