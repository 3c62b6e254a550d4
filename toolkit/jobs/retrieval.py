"""Find retrieval heads, which copy from the prompt: measure every attention head at the tokens of answers to haystacks.

A *haystack* is a prompt that hides the facts needed for the answer; a hidden fact is a *needle*. The command is
``toolkit retrieval-heads``.
"""

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
"""Name of a ranking of the heads -> ``(metric, whole)``.

``metric`` is the key in ``retrieval_heads.METRICS`` by which heads are ranked. ``whole`` says which tokens of the prompt count as the
needle: True for the whole hidden fact (such as ``N=8;``), False for only the words of the answer in it (``8``), as published.
"""


@dataclass(frozen=True)
class Search:
    """Settings for finding retrieval heads and for masking them.

    Attributes:
        task: ``lookup`` (variables and values, for the tiny reasoner), ``needle`` (facts in filler text) or ``threading`` (chains of keys).
        instances: Number of haystacks per split (for ``threading`` approximately): heads are found on dev and masked on test.
        lengths: Prompt lengths in tokens; empty means five lengths up to the model's context. Not used by ``lookup``.
        counts: Numbers of heads to mask.
        ops: Masking operations to try at the largest count: ``uniform`` (uniform attention), ``zero`` (no output) or ``mean`` (mean
            output). ``uniform`` is the published operation; it is always used, at every count.
        draws: Number of random controls per mask; each masks random heads of the same layers.
        max_new_tokens: Token budget of a response.
        batch_size: Rows decoded together; does not change the responses.
        seed: Seed of the haystacks and of the random controls.
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
            raise ValueError(
                f"task={self.task!r} is no retrieval task (prompts that hide a fact): choose one of {', '.join(TASKS)}."
            )
        if wrong := set(self.ops) - set(masks.ABLATIONS):
            raise ValueError(f"ops={', '.join(wrong)}: unknown masking operation; choose from {', '.join(masks.ABLATIONS)}.")
        if self.instances < 1 or self.draws < 1 or not self.counts or min(self.counts) < 1:
            raise ValueError(f"instances={self.instances}, draws={self.draws}, counts={self.counts}: all must be at least 1.")

    @property
    def sampling(self) -> Sampling:
        """Sampling settings: one greedy response per haystack, as published."""
        return Sampling(temperature=0.0, max_new_tokens=self.max_new_tokens, seed=self.seed, batch_size=self.batch_size)

    def haystacks(self, lm: LM, split: str) -> list[Haystack]:
        """Return the haystacks of a split, with the token positions of their needles in the chat prompt of ``lm``.

        Raises:
            tasks.haystack.HaystackError: a prompt length is beyond the model's context, the hidden facts do not fit a length, or the facts
                cannot be located in the tokens.
        """
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
        rollouts: The model's greedy responses to the haystacks.
        measured: Name of a ranking (see ``RANKINGS``) -> all metrics of every head in every example. An example is one needle in one
            response.
    """

    haystacks: Sequence[Haystack]
    rollouts: Sequence[Rollout]
    measured: Mapping[str, HeadMetrics]

    @property
    def scores(self) -> dict[str, HeadScores]:
        """Name of a ranking -> score of every head: the mean over examples of the ranking's metric."""
        return {name: retrieval_heads.scores(self.measured[name], metric) for name, (metric, _) in RANKINGS.items()}

    def recall(self) -> pd.DataFrame:
        """Return the share of haystacks that the model answered correctly, one row per prompt length and needle depth.

        Columns: ``length`` (prompt length in tokens), ``depth`` (relative position of the first needle in the prompt, 0 to 1), ``correct``
        (share of right answers, 0 to 1) and ``n`` (number of haystacks). If there are more than 8 lengths or 11 depths, they are replaced
        by the midpoints of their quintiles.
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
    """Sample greedy responses to the dev haystacks, and measure how much every head retrieves from the prompt at the response tokens.

    Args:
        search: Task, sizes and seed of the haystacks.
        out: Directory to save the rollouts in, from which a repeated call resumes; ``None`` saves nothing.
        say: Function that is called with one line of progress at a time.
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
    """Return the best heads of each ranking, one row per head.

    Columns: ``ranking, rank`` (1 is the best), ``layer, head, score``, and ``given_success``: the score over correctly answered haystacks
    only (NaN if there are none). Scores are shares for ``copy`` and logits for ``write``.

    Args:
        count: Number of heads per ranking.
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
    """Return the shares of heads with a copy score above 0.1, above 0.5 and equal to zero, beside the shares of seven published models.

    The copy score of a head is the share of the needle's tokens that it copies, mean over examples.

    Args:
        name: Name of this model in the table.

    Returns:
        One row per model, this model first: index ``model``, columns ``above 0.1, above 0.5, zero`` (shares of all heads, 0 to 1).
    """
    shares = retrieval_heads.statistics(measurement.measured["copy, as published"].select("copy"))
    rows = {name: (shares["share_retrieval"], shares["share_strong"], shares["share_zero"]), **retrieval_heads.PUBLISHED_SHARES}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["above 0.1", "above 0.5", "zero"]).rename_axis("model")


def stability(measurement: RetrievalMeasurement, count: int, *, seed: int = 0) -> pd.DataFrame:
    """Return how stable the top heads are: the share of those on all examples that are also top heads on only ``n`` random examples.

    The ``n`` examples are among all examples, so this is an in-sample measure.

    Args:
        count: Number of top heads that are compared.
        seed: Seed of the random examples.

    Returns:
        Columns ``ranking``, ``n`` (1, 3, 10, 30, 100, as far as there are examples), and ``overlap`` (that share, 0 to 1, mean over 20
        draws of the ``n`` examples).
    """
    rows = []
    for name, (metric, _) in RANKINGS.items():
        values = measurement.measured[name].select(metric)
        for n in (1, 3, 10, 30, 100):
            if n <= len(values):
                rows.append((name, n, retrieval_heads.stability(values, n, count, seed=seed)))
    return pd.DataFrame(rows, columns=["ranking", "n", "overlap"])
