"""Answer facts in short and long questions, and compare the components that contribute to both answers. After SLAQ (arXiv:2510.11218).

``measure`` runs a model on pairs of ``tasks.slaq``, one pair at a time, so that it can resume. ``summary`` gives the results with intervals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from toolkit import stats, store
from toolkit.generate import Sampling, rollouts
from toolkit.lm import LM
from toolkit.methods import slaq as method
from toolkit.methods import slaq_positions
from toolkit.methods.slaq import Attribution
from toolkit.probes import Protocol
from toolkit.progress import stage
from toolkit.stats import Estimate
from toolkit.tasks import slaq
from toolkit.tasks.slaq import ShortLong
from toolkit.types import Problem, Rollout, Span

FEATURES = tuple(f"{part} {name}" for part in ("components", "neurons") for name in method.SIMILARITIES)
PAIR = Mapping[str, Any]  # what the file of a pair holds


def measure(lm: LM, pairs: Sequence[ShortLong], sampling: Sampling, *, out: Path | None = None) -> pd.DataFrame:
    """Answer every question of some pairs, and compare the components that contribute to the right answer in both forms.

    After a stop, the same call goes on after the last finished batch of answers, or the last finished pair.

    Args:
        lm: A model without think tags, whose answers begin at once.
        pairs: Pairs of one long question and its short ones, all with equally many facts.
        sampling: Sampling settings; one sample per question.
        out: Directory to save answers and finished pairs in; ``None`` saves nothing.

    Returns:
        One row per fact. Columns: ``pair`` (id), ``position`` (of the fact in the long question, from 0), ``short`` and ``long`` (whether
        the answer is right), ``short_log_odds`` and ``long_log_odds`` (log-odds of the right answer, nats per token), and one column
        per similarity (``FEATURES``). Columns with the prefix ``"other "`` hold the control: the mean similarity of the fact's short form
        to the long form of the *other* facts of the pair.

    Raises:
        ValueError: the model thinks before it answers, or more than one sample per question is asked for.
    """
    if lm.tags is not None and lm.tags.close is not None:
        raise ValueError(
            f"{lm.name} thinks before it answers, but attributions need answers that begin at once: load another model."
        )
    if sampling.n != 1:
        raise ValueError(f"{sampling.n} samples per question: use Sampling(n=1).")
    # All questions are answered together, since large batches are much faster.
    answers = iter(rollouts(lm, [p for pair in pairs for p in pair.problems], sampling, out=out and out / "rollouts"))
    rows: list[dict[str, Any]] = []
    with stage("pairs", len(pairs), "pair", show=len(pairs) >= 4) as bar:
        for pair in pairs:
            given = [next(answers) for _ in pair.problems]
            rows += _kept_rows(lm, pair, given, out)
            bar.update()
    return pd.DataFrame(rows)


def _kept_rows(lm: LM, pair: ShortLong, answers: Sequence[Rollout], out: Path | None) -> list[dict[str, Any]]:
    """Return the rows of a pair, read from ``out`` if they were measured before."""
    if out is None:
        return _compare_forms(lm, pair, answers)
    depends = [store.code_of(__name__), lm.fingerprint, pair.long.id, [r.token_ids for r in answers]]
    file = out / "pairs" / f"{store.key(depends)}.json"
    if not file.exists():
        store.write_json(_compare_forms(lm, pair, answers), file)
    return store.read_json(file, list[PAIR])


def _compare_forms(lm: LM, pair: ShortLong, answers: Sequence[Rollout]) -> list[dict[str, Any]]:
    """Return one row of ``measure`` per fact of a pair. ``answers`` has the response to the long question, then those to the short ones."""
    right = [
        slaq.judge_answer(p, lm.text(r.token_ids[r.prompt_len :], special=False))
        for p, r in zip(pair.problems, answers, strict=True)
    ]
    long = _attributions(lm, pair.long)
    short = [_attributions(lm, problem)[0] for problem in pair.short]
    every = [[method.similarities(s, x) for x in long] for s in short]
    rows = []
    for i, similar in enumerate(every):
        others = [row for j, row in enumerate(similar) if j != i]
        rows.append(
            {
                "pair": pair.long.id,
                "position": i,
                "short": right[i + 1][0],
                "long": right[0][i],
                "short_log_odds": short[i].log_odds,
                "long_log_odds": long[i].log_odds,
                **similar[i],
                **{f"other {name}": float(np.mean([row[name] for row in others])) for name in FEATURES},
            }
        )
    return rows


def _attributions(lm: LM, problem: Problem) -> list[Attribution]:
    """Return one attribution per question of a problem, on the right answers in the form that the prompt asks for."""
    ids, spans = right_response(lm, problem)
    return method.attribute(lm, ids, spans)


def right_response(lm: LM, problem: Problem) -> tuple[list[int], list[Span]]:
    """Return the token ids of a prompt with its right response, and the token span of each answer in it.

    A fact is answered by the sentence of the prompt that states it, or by the answer alone if the prompt does not state it. The response to
    a long question has numbered lines.

    Raises:
        ValueError: the tokenizer gives no character offsets, or an answer shares a token with the text before it.
    """
    golds, told = problem.meta["golds"], problem.meta["needed"]
    content = problem.messages[-1]["content"]
    sentences = [content[start:stop] for start, stop in told] if len(told) == len(golds) else golds
    text, ranges = "", []
    for number, (gold, sentence) in enumerate(zip(golds, sentences, strict=True), 1):
        text += f"{number}. " if len(golds) > 1 else ""
        at = len(text) + sentence.rindex(gold)
        ranges.append((at, at + len(gold)))
        text += sentence + "\n" * (number < len(golds))
    if not lm.tokenizer.is_fast:
        raise ValueError(f"The tokenizer of {lm.name} gives no character offsets: use its fast form.")
    encoded = lm.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    prompt, offsets = lm.prompt_ids(problem.messages), encoded["offset_mapping"]
    spans = []
    for start, stop in ranges:
        inside = [i for i, (a, b) in enumerate(offsets) if a < stop and b > start]
        if text[offsets[inside[0]][0] : offsets[inside[-1]][1]].strip() != text[start:stop]:
            raise ValueError(
                f"{problem.id}: the answer {text[start:stop]!r} shares a token with other text, so it cannot be attributed."
            )
        spans.append(Span(len(prompt) + inside[0], len(prompt) + inside[-1] + 1))
    return [*prompt, *encoded["input_ids"]], spans


def summary(facts: pd.DataFrame, *, shuffles: int = 50, protocol: Protocol = Protocol()) -> dict[str, Any]:
    """Return the results of ``measure`` with 95 % intervals over pairs.

    Args:
        facts: Table of ``measure``.
        shuffles: Number of predictors fitted to shuffled labels.
        protocol: Cross-validation of the predictors.

    Returns:
        Keys: ``pairs`` and ``facts`` (numbers); ``accuracy`` (``short``, ``long``, ``aligned``); ``position`` (``position_effect``);
        ``momentum``; ``momentum p`` (p-value of momentum against answers without it); ``similarity`` (per feature: ``same fact``, ``other fact`` and ``same - other``); ``correlation`` (per feature:
        Spearman correlation with alignment); ``prediction`` (of alignment: from ``similarities``, from the ``log-odds`` of the right
        answer in both forms, which need no components, and from ``both``).

    Raises:
        ValueError: pairs have different numbers of facts.
        probes.TooFewProblemsError: too few pairs, or nearly all facts are aligned or none is.
    """
    counts = facts.groupby("pair").size()
    if counts.nunique() != 1:
        raise ValueError(f"Pairs have {counts.min()} to {counts.max()} facts: measure pairs with equally many.")
    n, m = len(counts), int(counts.iloc[0])
    facts = facts.sort_values(["pair", "position"])

    def grid(*columns: str) -> np.ndarray:
        return facts[list(columns)].to_numpy(float).reshape(n, m, -1)

    short, long = (grid(name)[..., 0].astype(bool) for name in ("short", "long"))
    aligned, flat = short == long, (short == long).ravel().astype(float)

    def mean(values: np.ndarray) -> Estimate:
        return stats.bootstrap(stats.mean_of(values.reshape(n, m).astype(float)), n)

    confidence = ("short_log_odds", "long_log_odds")
    sets = {"similarities": FEATURES, "log-odds": confidence, "both": (*FEATURES, *confidence)}
    return {
        "pairs": n,
        "facts": n * m,
        "accuracy": {"short": mean(short), "long": mean(long), "aligned": mean(aligned)},
        "position": slaq_positions.position_effect(short, long),
        "momentum": slaq_positions.momentum(long),
        "momentum p": slaq_positions.momentum_p(long),
        "similarity": {
            name: {
                "same fact": mean(grid(name)),
                "other fact": mean(grid(f"other {name}")),
                "same - other": mean(grid(name) - grid(f"other {name}")),
            }
            for name in FEATURES
        },
        "correlation": {
            name: stats.correlation(facts[name].to_numpy(), flat, facts["pair"].to_numpy(), kind="spearman") for name in FEATURES
        },
        "prediction": {
            name: method.predict_alignment(grid(*columns), aligned, shuffles=shuffles, protocol=protocol)
            for name, columns in sets.items()
        },
    }
