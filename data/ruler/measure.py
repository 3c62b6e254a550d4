"""Fine-tune a small writer with Ruler's meta length tokens, and measure how well lengths match: ``python data/ruler/measure.py``.

Writes ``results.json``, ``figure.png`` and the tables of ``README.md`` here. Models and measurements are kept in ``runs/ruler``, so after a
stop the same command goes on; about 10 minutes of CPU time.

The tiny reasoner cannot show anything here: its problem decides how long its response is. So a small model learns to write notes, letters and
reports about a subject, in sentences of a small grammar. A prompt does not say how long the text is to be; notes tend to be short and
reports long, but lengths overlap. Lengths are in words, as the paper counts them; targets and ranges are ours, since the paper's begin where
these texts end. Arms: the model before fine-tuning (it gets no request), Ruler, and the same data with shuffled tokens. Texts are sampled
at temperature 1. *Well formed* is the share of sentences that the grammar allows: a text of the right length may be nonsense.
"""

from __future__ import annotations

import math
import random
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch

from toolkit import finetune, report, stats, store
from toolkit.figures.base import error_bars, styled
from toolkit.generate import Sampling, rollouts
from toolkit.lm import LM
from toolkit.methods import ruler
from toolkit.metrics import with_interval
from toolkit.tasks import splits, writing
from toolkit.types import Problem, Rollout

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import publish  # noqa: E402

FIRST, STEPS, BATCH, RATE, SEEDS, POOL, TESTS = 600, 300, 32, 3e-3, (0, 1, 2), 6000, 40
MODEL = {"layers": 2, "d_model": 96, "d_mlp": 192, "heads": 4, "head_dim": 24}
LONGEST, CONTEXT = 120, 160  # tokens of a response, and of a whole sequence
KINDS = {"a note": (4, 28), "a letter": (12, 45), "a report": (24, 68)}  # kind of text -> fewest and most words
TONES = (
    "plain",
    "kind",
    "stern",
    "merry",
    "dry",
    "shy",
    "proud",
    "calm",
    "quick",
    "slow",
    "old",
    "new",
    "sad",
    "bold",
    "soft",
    "warm",
)
PRECISE: stats.Ranges = {10: (8, 12), 20: (18, 22), 30: (28, 32), 40: (38, 42), 50: (48, 52), 60: (60, math.inf)}
FLEXIBLE: stats.Ranges = {10: (5, 15), 20: (15, 25), 30: (25, 35), 40: (35, 45), 50: (45, 55), 60: (60, math.inf)}
TAUGHT: stats.Ranges = {10: (7, 13), 20: (17, 23), 30: (27, 33), 40: (37, 43), 50: (47, 53), 60: (60, math.inf)}
LEVELS = {"level 0": (10, 20), "level 1": (30, 40, 50), "level 2": (60,)}
VERBS, ADVERBS = ("needs", "helps", "changes", "follows", "fills", "keeps"), ("often", "slowly", "again", "here", "now", "well")
PIECES = r"[A-Za-z]+|[^\w\s]"
BEFORE, RULER, CONTROL = "before fine-tuning", "Ruler", "shuffled tokens (control)"
COLOURS = {BEFORE: "#7f7f7f", RULER: "#1f77b4", CONTROL: "#ff7f0e"}
CODE = store.code_of("toolkit.finetune", "toolkit.methods.ruler", "toolkit.generate", "toolkit.tasks.writing")


def sentence(rng: random.Random, keywords: tuple[str, ...]) -> str:
    """Return a sentence of three to seven words, such as ``the rain often fills the old rivers .``"""
    a, b = rng.sample(keywords, 2)
    adverb, tone = (rng.choice(words) if rng.random() < 0.5 else "" for words in (ADVERBS, TONES))
    return " ".join(f"the {a} {adverb} {rng.choice(VERBS)} the {tone} {b} .".split())


def well_formed(text: str, subject: str) -> float:
    """Return the share of sentences that ``sentence`` could have written about the subject; 0 for an empty text."""
    word = f"({'|'.join(writing.SUBJECTS[subject])})"
    pattern = rf"the {word}( ({'|'.join(ADVERBS)}))? ({'|'.join(VERBS)}) the( ({'|'.join(TONES)}))? {word}"
    sentences = [s.strip() for s in text.split(".")][:-1] or [""]
    return float(np.mean([re.fullmatch(pattern, s) is not None for s in sentences]))


@cache
def pool(split: str, n: int) -> list[Problem]:
    """Return n different prompts of a split: kind, tone and subject of a text."""
    rng = random.Random(f"ruler-{split}")

    def draw() -> Problem:
        while True:
            kind, tone, subject = rng.choice([*KINDS]), rng.choice(TONES), rng.choice([*writing.SUBJECTS])
            content = f"Write {kind}, {tone}, about {subject}."
            if splits.split_of(content) == split:
                return Problem(f"ruler-{splits.digest(content)}", ({"role": "user", "content": content},), "", {"task": "ruler", "split": split, "kind": kind, "subject": subject, "grader": "string"})  # fmt: skip

    return splits.distinct(draw, n)


def responses(n: int, seed: int) -> list[tuple[Problem, str]]:
    """Return training prompts with texts, whose numbers of words are drawn from the range of their kind."""
    rng, prompts = random.Random(f"ruler-texts-{seed}"), pool("train", 300)
    pairs = []
    for _ in range(n):
        p = rng.choice(prompts)
        keywords, wanted, text = writing.SUBJECTS[p.meta["subject"]], rng.randint(*KINDS[p.meta["kind"]]), ""
        while stats.words(text) < wanted:
            text = f"{text} {sentence(rng, keywords)}".strip()
        pairs.append((p, f"<think></think>{text}"))
    return pairs


@cache
def begun(work: Path) -> LM:
    """Return the writer before fine-tuning with length tokens, trained if it is not kept."""
    pairs = responses(POOL, -1)
    start = publish.small_model([p.messages[0]["content"] for p, _ in pairs] + [t for _, t in pairs], PIECES, MODEL, "small writer", context=CONTEXT)  # fmt: skip
    settings = finetune.Settings(steps=FIRST, batch=BATCH, rate=RATE)
    return finetune.train(start, [finetune.example(start, p, t) for p, t in pairs], settings, work / "first", name="small writer")


def words(lm: LM, response: Rollout) -> int:
    """Return the number of words of a response, without tags and length tokens."""
    return stats.words(lm.text(list(response.token_ids[response.prompt_len :]), special=False))


def trained(arm: str, seed: int, work: Path) -> LM:
    """Return the model of an arm and seed, trained if it is not kept."""
    grown = ruler.with_tokens(begun(work), TAUGHT)
    data = ruler.examples(grown, responses(POOL, seed), TAUGHT, length=lambda text: stats.words(re.sub(r"</?think>", " ", text)))
    data = ruler.shuffled(data, seed) if arm == CONTROL else data
    settings = finetune.Settings(steps=STEPS, batch=BATCH, rate=RATE / 3, seed=seed)
    return finetune.train(grown, data, settings, work / f"{store.safe_name(arm)}-{seed}", name=f"{arm} {seed}")


def measured(arm: str, seed: int, work: Path) -> dict[str, Any]:
    """Return lengths and shares of well-formed sentences of an arm: per target one number per test prompt, and the same without a request."""
    path = work / f"{store.safe_name(arm)}-{seed}.json"
    if path.is_file():
        return store.read_json(path, dict[str, Any])
    model = begun(work) if arm == BEFORE else trained(arm, seed, work)
    tests, sampling = pool("test", TESTS), Sampling(max_new_tokens=LONGEST, seed=seed)

    def formed(sampled: list[Rollout]) -> list[float]:
        texts = [model.text(list(r.token_ids[r.prompt_len :]), special=False) for r in sampled]
        return [well_formed(text, p.meta["subject"]) for p, text in zip(tests, texts, strict=True)]

    free = rollouts(model, tests, sampling, progress=False)
    found: dict[str, Any] = {"lengths": {}, "formed": {}}
    for target in PRECISE:
        sampled = free if arm == BEFORE else rollouts(model, [ruler.requested(p, target, TAUGHT) for p in tests], sampling, progress=False)  # fmt: skip
        found["lengths"][str(target)] = [words(model, r) for r in sampled]
        found["formed"][str(target)] = formed(sampled)
    found["own"] = [ruler.written(r.text, TAUGHT)[0] for r in free]
    found["free"] = [words(model, r) for r in free]
    store.write_json(found, path)
    return found


def hits(part: Mapping[str, Any], ranges: stats.Ranges) -> np.ndarray:
    """Return for each test problem the share of targets that its responses match."""
    return np.mean([stats.hits(n, [float(t)] * len(n), ranges) for t, n in part["lengths"].items()], axis=0)


def results(parts: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return scores per level, match rates with intervals, and the lengths of each arm."""
    found: dict[str, Any] = {"levels": {}, "lengths": {}, "own": {}, "formed": {}, "match": {}, "differences": {}}
    rates = {m: {a: [hits(p, r) for p in ps] for a, ps in parts.items()} for m, r in (("PM", PRECISE), ("FM", FLEXIBLE))}
    for arm, ps in parts.items():
        pairs = [(n, int(t)) for p in ps for t, numbers in p["lengths"].items() for n in numbers]
        scores = stats.length_match(*zip(*pairs, strict=True), precise=PRECISE, flexible=FLEXIBLE, levels=LEVELS)
        found["levels"][arm] = {
            name: {k: None if math.isnan(v) else v for k, v in asdict(scores[name]).items()} for name in (*LEVELS, "all")
        }
        found["lengths"][arm] = {t: publish.estimate([p["lengths"][t] for p in ps], unit="tokens") for t in ps[0]["lengths"]}
        found["formed"][arm] = publish.estimate([np.mean(list(p["formed"].values()), axis=0) for p in ps])
        found["match"][arm] = {m: publish.estimate(rates[m][arm]) for m in rates}
        own = [(n, t) for p in ps for n, t in zip(p["free"], p["own"], strict=True) if t is not None]
        near = [bool(stats.hits([n], [t], FLEXIBLE)[0]) for n, t in own]
        found["own"][arm] = {"written": len(own) / sum(len(p["own"]) for p in ps), "FM": float(np.mean(near)) if near else None}
    for other in (BEFORE, CONTROL):
        base = {m: rates[m][other] for m in rates}
        found["differences"][other] = {m: publish.estimate(rates[m][RULER], base[m]) for m in rates}
    return found


def tables(found: Mapping[str, Any]) -> str:
    """Return the results as Markdown tables."""

    def cell(e: Mapping[str, float], sign: str = "") -> str:
        return with_interval(e["mean"], e["low"], e["high"], "share", sign=sign)

    levels = pd.DataFrame(
        {
            arm: {name: f"{s['precise']:.0f} / {s['flexible']:.0f}" for name, s in scores.items()}
            for arm, scores in found["levels"].items()
        }
    )
    own = found["own"]
    rows = {
        arm: {
            "PM, %": cell(e["PM"]), "FM, %": cell(e["FM"]), "well formed, %": cell(found["formed"][arm]),
            "writes a token of its own, %": f"{100 * own[arm]['written']:.0f}",
            "FM of its own token, %": "" if own[arm]["FM"] is None else f"{100 * own[arm]['FM']:.0f}",
        }
        for arm, e in found["match"].items()
    }  # fmt: skip
    minus = {f"Ruler minus {arm}": {f"{m}, points": cell(e, "+") for m, e in d.items()} for arm, d in found["differences"].items()}
    frames = (
        levels.rename_axis("PM / FM, %"),
        pd.DataFrame(rows).T.rename_axis("arm"),
        pd.DataFrame(minus).T.rename_axis("difference"),
    )
    return "\n\n".join(map(report.markdown, frames))


def figure(found: Mapping[str, Any]) -> go.Figure:
    """Return the length of responses against the requested length, with the wide ranges."""
    drawn = go.Figure()
    for t, (low, high) in FLEXIBLE.items():
        top = min(high, 72)
        drawn.add_shape(type="rect", x0=t - 2, x1=t + 2, y0=low, y1=top, fillcolor="#dddddd", line_width=0, layer="below")
    for arm, rows in found["lengths"].items():
        means, lows, highs = ([e[k] for e in rows.values()] for k in ("mean", "low", "high"))
        drawn.add_scatter(
            x=[int(t) for t in rows], y=means, name=arm, mode="lines+markers", line={"color": COLOURS[arm]},
            error_y=error_bars(means, lows, highs, COLOURS[arm]),
        )  # fmt: skip
    drawn.update_xaxes(title="requested words (60: more than 60)", tickvals=list(FLEXIBLE)).update_yaxes(title="words")
    return styled(drawn, "Length against requested length; grey: flexible match")


def main() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    work = publish.work_folder(__file__, CODE, scripts=("tiny-reasoner/train.py",))
    arms = {BEFORE: (0,), RULER: SEEDS, CONTROL: SEEDS}
    parts = {arm: [measured(arm, seed, work) for seed in seeds] for arm, seeds in arms.items()}
    found = results(parts)
    sizes = {
        "first": FIRST,
        "steps": STEPS,
        "batch": BATCH,
        "rate": RATE,
        "seeds": SEEDS,
        "pool": POOL,
        "tests": TESTS,
        "model": MODEL,
    }
    store.write_json({"made_by": store.made_by(CODE), "sizes": sizes, **found}, HERE / "results.json")
    publish.draw(figure(found), HERE / "figure.png", 800, 420)
    publish.splice("ruler", tables(found), HERE / "README.md")


if __name__ == "__main__":
    main()
