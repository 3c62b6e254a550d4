"""Find retrieval heads, the attention heads that copy from the prompt, for the command ``toolkit retrieval-heads``.

Every head is scored while the model answers *haystacks*: prompts that hide the facts needed for the answer. A hidden fact is a *needle*.
"As published" means as in arXiv:2404.15574.
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

``metric`` is the entry of ``retrieval_heads.METRICS`` by which heads are ranked. ``whole`` says which tokens of the prompt count as the
needle. True: the whole hidden fact, such as ``N=8;``. False: only the answer in it, such as ``8`` (as in arXiv:2404.15574).
"""


@dataclass(frozen=True)
class Search:
    """Settings for finding retrieval heads (attention heads that copy from the prompt) and for masking them.

    Heads are found and masked on *haystacks*: prompts that hide the facts needed for the answer.

    Attributes:
        task: ``lookup`` (variables and values, for the tiny reasoner), ``needle`` (facts in filler text) or ``threading`` (chains of keys
            and values that the question follows).
        instances: Number of haystacks per split (approximate for ``threading``). Heads are found on the dev split and masked on the test
            split.
        lengths: Prompt lengths in tokens; empty means five lengths up to the model's context. Not used by ``lookup``.
        counts: Numbers of top heads to mask. Accuracy is measured with each number.
        ops: Masking operations to try at the largest of ``counts``: ``uniform`` (the head attends equally to all keys that it can see),
            ``zero`` (its output is set to 0) or ``mean`` (its output is replaced by its mean over all positions of prompts and responses).
            ``uniform``, the operation of arXiv:2404.15574, is measured at every count, even if it is not listed.
        draws: Number of random controls per mask; each masks random other heads of the same layers.
        max_new_tokens: Token budget of a response.
        batch_size: Number of responses that are decoded together; does not change the responses.
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
        """Sampling settings: one greedy response per prompt, as in arXiv:2404.15574."""
        return Sampling(temperature=0.0, max_new_tokens=self.max_new_tokens, seed=self.seed, batch_size=self.batch_size)

    def haystacks(self, lm: LM, split: str, *, max_new_tokens: int = 0) -> list[Haystack]:
        """Return the haystacks of a split: prompts that hide facts, with the token positions of the hidden facts.

        Args:
            lm: Model whose chat template and tokenizer give the positions.
            split: ``train``, ``dev`` or ``test``.
            max_new_tokens: Token budget of responses that are sampled with other settings than ``sampling``. Without ``lengths``, the
                longest prompts leave as many tokens of the model's context free as the largest budget needs, but at least 256.

        Raises:
            tasks.haystack.HaystackError: a prompt length is beyond the model's context, the hidden facts do not fit a length, or they
                cannot be located in the tokens.
        """
        response = max(haystack.RESPONSE, self.max_new_tokens, max_new_tokens)
        match self.task:
            case "lookup":
                return [haystack.locate_lookup(lm, p) for p in lookup.load(split, self.instances, self.seed)]
            case "needle":
                return needle.spread(lm, split, self.instances, self.seed, lengths=self.lengths, response=response)
        sizes = self.lengths or haystack.lengths(lm, response=response)
        each = max(1, round(self.instances / len(sizes) / len(threading.MIX)))
        return threading.grid(lm, sizes, threading.MIX, split=split, n=each, seed=self.seed)


@dataclass(frozen=True)
class RetrievalMeasurement:
    """Metrics that say how much every attention head retrieves from the prompt, from ``measure_retrieval``.

    Attributes:
        haystacks: Haystacks of the dev split. A haystack is a prompt that hides facts (*needles*) which the answer needs.
        rollouts: The model's greedy responses to the haystacks.
        measured: Name of a ranking (see ``RANKINGS``) -> all metrics of every head in every example. An example is a response together with
            one needle of its prompt.
    """

    haystacks: Sequence[Haystack]
    rollouts: Sequence[Rollout]
    measured: Mapping[str, HeadMetrics]

    @property
    def scores(self) -> dict[str, HeadScores]:
        """Name of a ranking -> scores of all heads. A score is the metric by which the ranking sorts heads, averaged over examples."""
        return {name: retrieval_heads.scores(self.measured[name], metric) for name, (metric, _) in RANKINGS.items()}

    def recall(self) -> pd.DataFrame:
        """Return the share of haystacks answered correctly, one row per prompt length and depth of the hidden fact.

        Columns: ``length`` (prompt length in tokens), ``depth`` (share of the prompt before the first hidden fact, 0 to 1), ``correct``
        (share of right answers, 0 to 1) and ``n`` (number of haystacks: prompts that hide facts). If the task records the length and depth
        that were requested for a prompt, these are used, not the measured ones. More than 8 different lengths are grouped into at most five
        quantile bins, and ``length`` is then the middle of the bin. More than 11 different depths are grouped in the same way.
        """
        by_id = {h.problem.id: h for h in self.haystacks}
        rows = []
        for r in self.rollouts:
            h = by_id[r.problem_id]
            n, meta = len(h.prompt_ids), h.problem.meta
            # Requested length and depth if the task records them, else those of the actual prompt.
            length, depth = meta.get("length"), meta.get("depth")
            first = min(span.start for span in h.needed)  # needed pieces are in the order of use, not of the text
            rows.append((length or n, first / n if depth is None else depth, r.correct))
        cells = pd.DataFrame(rows, columns=["length", "depth", "correct"])
        for name, most in (("length", 8), ("depth", 11)):
            if cells[name].nunique() > most:
                cells[name] = pd.qcut(cells[name], 5, duplicates="drop").map(lambda bin: round(bin.mid, 2)).astype(float)
        return cells.groupby(["length", "depth"])["correct"].agg(correct="mean", n="size").reset_index()


def measure_retrieval(lm: LM, search: Search, *, out: Path | None = None, say: Say = lambda text: None) -> RetrievalMeasurement:
    """Sample greedy responses to prompts that hide facts (haystacks), and measure how much every head retrieves from the prompt.

    The haystacks are those of the dev split.

    Args:
        lm: Model to measure.
        search: Task, number and seed of the haystacks, and token budget.
        out: Directory to save the rollouts in, from which a repeated call resumes; ``None`` saves nothing.
        say: Function that is called with one line of progress at a time.
    """
    haystacks = search.haystacks(lm, "dev")
    say(f"answering {len(haystacks)} haystacks of up to {max(len(h.prompt_ids) for h in haystacks)} tokens")
    answers = rollouts(lm, [h.problem for h in haystacks], search.sampling, out=out)
    say("measuring every head at the generated tokens")
    # Measured once per definition of the needle (``whole``), not once per ranking.
    measured = {
        whole: retrieval_heads.measure(
            lm, needles.examples(haystacks, answers, whole=whole), success=lambda e: bool(e.rollout.correct)
        )
        for whole in (False, True)
    }
    return RetrievalMeasurement(haystacks, answers, {name: measured[whole] for name, (_, whole) in RANKINGS.items()})


def top_heads(measurement: RetrievalMeasurement, count: int = 10) -> pd.DataFrame:
    """Return a table of the heads with the highest scores in each ranking, one row per ranking and head.

    Columns: ``ranking, rank`` (1 is the highest score), ``layer, head, score``, and ``given_success``: the score averaged over correctly
    answered prompts only (NaN if there are none). There are two rankings (see ``RANKINGS``). In ``copy, as published`` the score is the
    share (0 to 1) of the answer's distinct tokens that the head copies. In ``write (ours)`` it is the head's mean contribution to the
    logits of generated tokens of the hidden fact.

    Args:
        measurement: From ``measure_retrieval``.
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
    """Return the shares of heads with a high and with a zero copy score, for this model and for seven models of arXiv:2404.15574.

    The copy score of a head is the share of the answer's distinct tokens that the head copies from the *needle*, the fact that the prompt
    hides. It is averaged over examples: an example is a response together with one needle of its prompt.

    Args:
        measurement: From ``measure_retrieval``.
        name: Name of this model in the table.

    Returns:
        One row per model, this model first: index ``model``; columns ``above 0.1, above 0.5, zero``, the shares of all heads (0 to 1) with
        a copy score above 0.1, above 0.5, and of exactly 0.
    """
    shares = retrieval_heads.statistics(measurement.measured["copy, as published"].select("copy"))
    rows = {name: (shares["share_retrieval"], shares["share_strong"], shares["share_zero"]), **retrieval_heads.PUBLISHED_SHARES}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["above 0.1", "above 0.5", "zero"]).rename_axis("model")


def stability(measurement: RetrievalMeasurement, count: int, *, seed: int = 0) -> pd.DataFrame:
    """Return a table that says whether a few examples suffice to find the top heads.

    An example is a response together with one hidden fact of its prompt. The top heads on a few random examples are compared with the top
    heads on all examples. The few examples are part of all examples, so the overlap is somewhat higher than it would be with new examples.

    Args:
        measurement: From ``measure_retrieval``.
        count: Number of top heads to compare.
        seed: Seed of the random choice of examples.

    Returns:
        One row per ranking and number of examples. Columns:

        * ``ranking``: name of the ranking.
        * ``n``: number of random examples, 1, 3, 10, 30 or 100 (those that do not exceed the number of all examples).
        * ``overlap``: share (0 to 1) of the top heads on all examples that are also top heads on the ``n`` examples, mean over 20 random
          choices of examples.
    """
    rows = []
    for name, (metric, _) in RANKINGS.items():
        values = measurement.measured[name].select(metric)
        for n in (1, 3, 10, 30, 100):
            if n <= len(values):
                rows.append((name, n, retrieval_heads.stability(values, n, count, seed=seed)))
    return pd.DataFrame(rows, columns=["ranking", "n", "overlap"])
