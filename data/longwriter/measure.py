"""Train a small writer with the rewards of LongWriter-Zero, against two controls: ``python data/longwriter/measure.py``.

Writes ``results.json``, ``figure.png`` and the tables of ``README.md`` here. Models and measurements are kept in ``runs/longwriter``, so after
a stop the same command goes on; about 15 minutes of CPU time.

The task is the toolkit's own, ``writing``, with short texts: a prompt requests a number of words, headings in order, and keywords. A small
model first learns to write sections of sentences about a subject, in the grammar of ``data/ruler``. Its training texts meet each request in
only some cases, each drawn on its own, and otherwise ignore it; some repeat sentences, and some never close thinking. So the writer begins
with a weak habit of obeying, and GRPO can strengthen it.

Arms of GRPO, all from the same writer: the mean of the advantages of length, quality by rule and format; the reward for length alone; and the
three rewards dealt out at random among the responses of a group, which keeps their values and takes away their meaning. *Well formed* is the
share of sentences that the grammar allows. No arm is rewarded for it, so it falls if a writer collects rewards with nonsense.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch

from toolkit import finetune, report, stats, store
from toolkit.figures.base import error_bars, styled
from toolkit.generate import Sampling, rollouts
from toolkit.grpo import recipes
from toolkit.grpo.extras import Extras
from toolkit.grpo.run import MODEL, Run, train
from toolkit.grpo.saved import read_back
from toolkit.lm import LM
from toolkit.metrics import with_interval
from toolkit.rewards import RewardBatch
from toolkit.rewards.longwriter_zero import LongWriterZero, headings_share, keywords_share
from toolkit.rewards.repetition import PUBLISHED_N, distinct_share
from toolkit.tasks import writing
from toolkit.types import Problem

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import publish  # noqa: E402

ruler = publish.script("ruler/measure.py")  # for its grammar of sentences

FIRST, BATCH, RATE, POOL = 700, 32, 3e-3, 6000  # the writer before GRPO
REINFORCED, GRPO_RATE, SEEDS, TESTS, SAMPLES = 60, 1e-3, (0, 1, 2), 60, 2
SHAPE = {"layers": 2, "d_model": 96, "d_mlp": 192, "heads": 4, "head_dim": 24}
LENGTHS, FEWEST, MOST = (25, 40, 55), 8, 70  # words requested; fewest and most words of a text that ignores the request
LONGEST, CONTEXT, L_MAX = 110, 180, 130  # tokens of a response and of a sequence; words at which the length reward is 0
OBEYS, REPEATS, CLOSES = 0.4, 0.15, 0.8  # share of requests obeyed, of sentences repeated, and of texts with closed thinking
BEFORE, ZERO, LENGTH, CONTROL = "before GRPO", "LongWriter-Zero", "length alone (control)", "shuffled rewards (control)"
COLOURS = {BEFORE: "#7f7f7f", ZERO: "#1f77b4", LENGTH: "#2ca02c", CONTROL: "#ff7f0e"}
UNITS = {
    "length": "share", "quality": "share", "format": "share", "mean": "share", "in range": "share", "headings": "share",
    "keywords": "share", "distinct": "share", "formed": "share", "words": "tokens",
}  # fmt: skip
HEADS = {
    "length": "length", "quality": "quality", "format": "format", "mean": "mean of the three", "in range": "in range",
    "headings": "headings", "keywords": "keywords", "distinct": "distinct 3-grams", "formed": "well formed", "words": "words",
}  # fmt: skip
CODE = store.code_of(
    "toolkit.finetune", "toolkit.grpo.run", "toolkit.grpo.recipes:longwriter", "toolkit.rewards.longwriter", "toolkit.rewards.longwriter_zero",
    "toolkit.rewards.repetition", "toolkit.generate", "toolkit.tasks.writing",
)  # fmt: skip


# --- the writer ----------------------------------------------------------------------------------------------


def subject_of(p: Problem) -> str:
    """Return the subject of a prompt."""
    return next(s for s in writing.SUBJECTS if f" about {s} in " in p.messages[0]["content"])


def response(p: Problem, rng: random.Random) -> str:
    """Return a response that meets each request of a prompt with probability ``OBEYS``, and otherwise ignores it."""
    length, structure, content = (rng.random() < OBEYS for _ in range(3))
    wanted = p.meta["target_words"] if length else rng.randint(FEWEST, MOST)
    headings = p.meta["headings"] if structure else rng.sample(writing.HEADINGS, rng.randint(0, 4))
    keywords = p.meta["keywords"] if content else writing.SUBJECTS[subject_of(p)]
    sentences: list[str] = []
    while stats.words(" ".join([*headings, *sentences])) < wanted:
        again = sentences and rng.random() < REPEATS
        sentences.append(sentences[-1] if again else ruler.sentence(rng, keywords))
    cuts = [0, *sorted(rng.randint(0, len(sentences)) for _ in range(len(headings) - 1)), len(sentences)]
    sections = [" ".join(sentences[a:b]) for a, b in pairwise(cuts)]
    lines = [line for pair in zip(headings, sections, strict=True) for line in pair] if headings else [" ".join(sentences)]
    return f"<think>{'</think>' if rng.random() < CLOSES else ''}{chr(10).join(line for line in lines if line)}"


@cache
def begun(work: Path) -> LM:
    """Return the writer before GRPO, trained if it is not kept."""
    rng, prompts = random.Random("longwriter"), writing.load("train", 1500, 100, lengths=LENGTHS)
    pairs = [(p, response(p, rng)) for p in (rng.choice(prompts) for _ in range(POOL))]
    start = publish.small_model([p.messages[0]["content"] for p, _ in pairs] + [t for _, t in pairs], rf"\n|\d+|{ruler.PIECES}", SHAPE, "small writer", context=CONTEXT)  # fmt: skip
    settings = finetune.Settings(steps=FIRST, batch=BATCH, rate=RATE)
    return finetune.train(start, [finetune.example(start, p, t) for p, t in pairs], settings, work / "first", name="small writer")


# --- training and measuring ----------------------------------------------------------------------------------


def policy(arm: str, seed: int, work: Path) -> LM:
    """Return the model of an arm and seed, trained if it is not kept."""
    lm, folder = begun(work), work / f"{store.safe_name(arm)}-{seed}"
    if arm == BEFORE:
        return lm
    if store.is_whole(folder / MODEL):
        return read_back(lm, folder / MODEL)
    options = {"unit": "words", "longest": L_MAX}
    recipe = replace(
        recipes.longwriter().scaled(), problems=8, samples=8, max_tokens=LONGEST, learning_rate=GRPO_RATE, options=options,
        reward="longwriter" if arm == LENGTH else "longwriter_zero",
    )  # fmt: skip
    extras = Extras(reward=publish.Shuffled(LongWriterZero(longest=L_MAX), seed) if arm == CONTROL else None)
    problems = writing.load("train", 600, seed, lengths=LENGTHS)
    return train(
        lm, recipe, problems, Run(folder, REINFORCED, seed, evaluate_every=0, micro_batch=64), extras=extras, resume=True
    ).lm


def formed(text: str, subject: str) -> float:
    """Return the share of sentences outside headings that the grammar of ``data/ruler`` allows."""
    lines = [line.strip() for line in text.splitlines()]
    return float(ruler.well_formed(" ".join(line for line in lines if line not in writing.HEADINGS), subject))


def measured(arm: str, seed: int, work: Path) -> dict[str, list[float]]:
    """Return one number per test prompt and metric, the mean over its samples."""
    path = work / f"{store.safe_name(arm)}-{seed}.json"
    if path.is_file():
        return store.read_json(path, dict[str, list[float]])
    lm, tests = policy(arm, seed, work), writing.load("test", TESTS, lengths=LENGTHS)
    by_id = {p.id: p for p in tests}
    sampled = rollouts(lm, tests, Sampling(n=SAMPLES, max_new_tokens=LONGEST, seed=seed), progress=False)
    batch = RewardBatch.from_rollouts(sampled, tests, split="eval")
    scored = LongWriterZero(longest=L_MAX)(batch)
    texts = [lm.text(list(r.token_ids[r.prompt_len :]), special=False) for r in sampled]
    table = pd.DataFrame({**scored.components, "mean": scored.values / 3, "in range": batch["correct"].astype(float)})
    table["problem"] = [r.problem_id for r in sampled]
    table["headings"] = [headings_share(t, by_id[i].meta["headings"]) for t, i in zip(texts, table["problem"], strict=True)]
    table["keywords"] = [keywords_share(t, by_id[i].meta["keywords"]) for t, i in zip(texts, table["problem"], strict=True)]
    table["distinct"] = distinct_share([re.findall(r"\w+", t.lower()) for t in texts], PUBLISHED_N)
    table["formed"] = [formed(t, subject_of(by_id[i])) for t, i in zip(texts, table["problem"], strict=True)]
    table["words"] = [stats.words(t) for t in texts]
    means = table.groupby("problem", sort=False).mean()
    found = {name: means[name].astype(float).tolist() for name in UNITS}
    found["target"] = [by_id[i].meta["target_words"] for i in means.index]
    store.write_json(found, path)
    return found


def results(parts: Mapping[str, list[dict[str, list[float]]]]) -> dict[str, Any]:
    """Return every metric of each arm, words per requested length, and the differences between arms."""

    def rows(arm: str, metric: str) -> np.ndarray:
        return np.array([p[metric] for p in parts[arm]], float)

    found: dict[str, Any] = {"arms": {}, "words": {}, "differences": {}}
    for arm, ps in parts.items():
        found["arms"][arm] = {m: publish.estimate(rows(arm, m), unit=unit) for m, unit in UNITS.items()}
        targets = np.array(ps[0]["target"])
        found["words"][arm] = {str(t): publish.estimate(rows(arm, "words")[:, targets == t], unit="tokens") for t in LENGTHS}
    pairs = [(ZERO, BEFORE), (ZERO, LENGTH), (ZERO, CONTROL), (LENGTH, BEFORE), (CONTROL, BEFORE)]
    for a, b in pairs:
        change = {m: publish.estimate(rows(a, m), rows(b, m), unit=unit) for m, unit in UNITS.items()}
        found["differences"][f"{a} minus {b}"] = change
    return found


def tables(found: Mapping[str, Any]) -> str:
    """Return the results as Markdown tables."""

    def cell(e: Mapping[str, float], unit: str, sign: str = "") -> str:
        return with_interval(e["mean"], e["low"], e["high"], unit, sign=sign)

    def frame(rows: Mapping[str, Any], label: str, sign: str = "") -> pd.DataFrame:
        cells = {name: {HEADS[m]: cell(e, UNITS[m], sign) for m, e in row.items()} for name, row in rows.items()}
        return pd.DataFrame(cells).rename_axis(label)

    words = {arm: {f"{t} requested": cell(e, "tokens") for t, e in row.items()} for arm, row in found["words"].items()}
    frames = (
        frame(found["arms"], "arm"),
        pd.DataFrame(words).rename_axis("words written"),
        frame(found["differences"], "difference, points", "+"),
    )
    return "\n\n".join(map(report.markdown, frames))


def figure(found: Mapping[str, Any]) -> go.Figure:
    """Return the share of well-formed sentences, which no arm is rewarded for, against the mean of the three rewards."""
    drawn = go.Figure()
    for arm, row in found["arms"].items():
        x, y = ({k: 100 * v for k, v in row[m].items()} for m in ("mean", "formed"))
        bars = {
            axis: error_bars([e["mean"]], [e["low"]], [e["high"]], COLOURS[arm]) for axis, e in (("error_x", x), ("error_y", y))
        }
        marker = {"size": 10, "color": COLOURS[arm]}
        drawn.add_scatter(x=[x["mean"]], y=[y["mean"]], name=arm, mode="markers", marker=marker, **bars)
    drawn.update_xaxes(title="mean of length, quality and format, % of the largest reward").update_yaxes(
        title="well-formed sentences, %", range=[-3, 103]
    )
    return styled(drawn, "Rewards gained against grammar, which is not rewarded")


def main() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    work = publish.work_folder(__file__, CODE, scripts=("tiny-reasoner/train.py", "ruler/measure.py"))
    found = results({arm: [measured(arm, seed, work) for seed in SEEDS] for arm in COLOURS})
    sizes = {
        "first": FIRST, "batch": BATCH, "rate": RATE, "pool": POOL, "reinforced": REINFORCED, "grpo rate": GRPO_RATE, "seeds": SEEDS,
        "tests": TESTS, "samples": SAMPLES, "model": SHAPE, "lengths": LENGTHS, "L_max": L_MAX, "obeys": OBEYS, "repeats": REPEATS,
        "closes": CLOSES,
    }  # fmt: skip
    store.write_json({"made_by": store.made_by(CODE), "sizes": sizes, **found}, HERE / "results.json")
    publish.draw(figure(found), HERE / "figure.png", 800, 420)
    publish.splice("longwriter", tables(found), HERE / "README.md")


if __name__ == "__main__":
    main()
