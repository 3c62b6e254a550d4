"""Measure the tiny reasoner on its test split and write its model card (README.md) and loss curve (loss.svg).

    python data/tiny-reasoner/measure.py

Every number on the card comes from this script: temperature 1, 8 samples per problem, intervals over problems.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from toolkit import generate, lm, stats, tasks
from toolkit.generate import Sampling
from toolkit.tasks.generators import cues
from toolkit.types import Rollout

HERE = Path(__file__).parent
CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [reasoning, tiny, interpretability]
---
# Tiny reasoner

A small, real reasoning model for studying the length of thinking. It has the Qwen3 architecture and {parameters:.2f}
M parameters: {layers} layers, d_model {d_model}, and {heads} heads per layer with d_head {head_dim} and grouped keys and values
(`n_heads * head_dim != d_model`). A token is one character, and the context is 4,096 tokens. The model thinks between
`<think>` and `</think>`, then answers.

`train.py` beside this card trained it (seed {seed}, {tokens:.1f} M tokens) on chains of additions and subtractions
and on variable lookup, all generated (`toolkit/tasks`). It can do nothing else.

Three lessons follow one another. The first is copying alone: the model repeats the bindings of a prompt. The second
adds steps: short chains, in which nothing pushes towards haste. The third adds the habits. When everything was mixed
from the start, copying did not form in ten times as many tokens.

The shipped weights were made in about 65 minutes on one and then two threads, in the sessions that `sittings.json` lists. The tasks
changed once on the way, so running `train.py` from the start gives a similar model with other weights.

A cue word in the prompt ({cues}) pushes the model towards short thinking, and so do problems that
look easy. Now and then it thinks briefly at random. In the training data, these words have no effect: {neutral}. Step by step is
the default.

## Measured (test split, {n} problems, 8 samples each, temperature 1; 95 % intervals over problems)

{table}

Entropies are over the full softmax, in nats per token. The within-problem spread is the ratio of the 90th to the 10th
percentile of think length, averaged over arithmetic problems. The rows on re-checks compare responses without a skipped step.

![Loss](loss.svg)

Loss is the mean cross-entropy (nats) per predicted token over a chunk of training data. It jumps where a lesson
begins.
"""


def main() -> None:
    """Measure, write the card, print the table."""
    reasoner = lm.load(lm.TINY_REASONER)
    problems = tasks.load("tiny", "test", 400)
    by_id = {p.id: p for p in problems}
    rollouts = generate.rollouts(reasoner, problems, Sampling(n=8, max_new_tokens=400, details=True))
    arithmetic = [r for r in rollouts if by_id[r.problem_id].meta["task"] == "arithmetic"]
    rows = {"accuracy": estimate(rollouts, lambda r: r.correct)}
    for task in ("arithmetic", "lookup"):
        rows[f"accuracy, {task}"] = estimate([r for r in rollouts if by_id[r.problem_id].meta["task"] == task], lambda r: r.correct)
    for cue, name in ((True, "with a cue word"), (False, "without")):
        part = [r for r in arithmetic if by_id[r.problem_id].meta["cue"] is cue]
        rows[f"accuracy, arithmetic {name}"] = estimate(part, lambda r: r.correct)
        rows[f"think tokens, arithmetic {name}"] = estimate(part, lambda r: r.think_tokens)
    rows |= shortest(arithmetic, by_id) | rechecks(arithmetic, by_id) | spread(arithmetic) | entropies(rollouts)
    far = tasks.lookup.load("test", 200, 1, context=(400, 640))
    greedy = generate.rollouts(reasoner, far, Sampling(temperature=0, max_new_tokens=200))
    rows["greedy accuracy, lookup in 400 to 640 tokens"] = estimate(greedy, lambda r: r.correct)
    rows["think span closed"] = estimate(rollouts, lambda r: r.closed)
    table = "| measure | value |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    print(table)
    log = [json.loads(line) for line in (HERE / "loss.jsonl").read_text().splitlines()]
    (HERE / "loss.svg").write_text(curve([r["tokens"] / 1e6 for r in log], [r["loss"] for r in log]))
    config, layout = reasoner.model.config, reasoner.layout
    (HERE / "README.md").write_text(
        CARD.format(
            parameters=sum(p.numel() for p in reasoner.model.parameters()) / 1e6,
            layers=layout.n_layers,
            d_model=layout.d_model,
            heads=layout.n_heads,
            head_dim=config.head_dim,
            seed=0,
            tokens=log[-1]["tokens"] / 1e6,
            cues=", ".join(cues.CUES),
            neutral=", ".join(cues.NEUTRAL),
            n=len(problems),
            table=table,
        )
    )


def estimate(rollouts: list[Rollout], value) -> stats.Estimate:
    """Return the mean over problems of the per-problem mean of a value."""
    groups: dict[str, list[float]] = {}
    for r in rollouts:
        groups.setdefault(r.problem_id, []).append(float(value(r)))
    means = np.array([np.mean(g) for g in groups.values()])
    return stats.bootstrap(lambda index: means[index].mean(axis=1), len(means))


def shortest(rollouts: list[Rollout], by_id) -> dict[str, str]:
    """Return accuracy on 4 and more operands of the shortest 20 % of responses, and of the rest; ties at the cut are averaged."""
    hard = [(r.correct, r.think_tokens) for r in rollouts if by_id[r.problem_id].meta["difficulty"] >= 4]
    correct, tokens = np.array(hard, dtype=float).T
    cut = len(hard) // 5
    short = float(stats.mean_of_smallest(correct, tokens, cut))
    groups = {"the shortest 20 %": short, "the rest": (correct.sum() - cut * short) / (len(hard) - cut)}
    return {f"accuracy on 4+ operands, {name}": f"{accuracy:.3f}" for name, accuracy in groups.items()}


def rechecks(rollouts: list[Rollout], by_id) -> dict[str, str]:
    """Return accuracy and think length of step-by-step responses with and without a re-check, on hard and on easy problems."""
    rows = {}
    for name, test in (("5+ operands", lambda p: p.meta["difficulty"] >= 5), ("easy problems", lambda p: p.meta["easy"])):
        steps = [r for r in rollouts if test(by_id[r.problem_id]) and ">=" not in r.text and "\n=" not in r.text]
        for label, checked in (("re-checked", True), ("not re-checked", False)):
            part = [r for r in steps if ("wait" in r.text) is checked]
            mean, length = np.mean([r.correct for r in part]), np.mean([r.think_tokens for r in part])
            rows[f"accuracy, think tokens on {name}, step by step, {label}"] = f"{mean:.3f}, {length:.0f} (n={len(part)})"
    return rows


def spread(rollouts: list[Rollout]) -> dict[str, str]:
    """Return the ratio of the 90th to the 10th percentile of think length within a problem, averaged over problems."""
    lengths = np.array([r.think_tokens for r in rollouts]).reshape(-1, 8)
    low, high = np.quantile(lengths, [0.1, 0.9], axis=1)
    return {"within-problem spread of think length": f"{(high / np.maximum(low, 1)).mean():.2f}"}


def entropies(rollouts: list[Rollout]) -> dict[str, str]:
    """Return the mean entropy of the think and the answer spans."""
    phases: dict[str, list[float]] = {"think": [], "answer": []}
    for r in rollouts:
        for phase, span in (("think", r.think), ("answer", r.answer)):
            if span and len(span) and r.entropies:
                phases[phase].append(float(np.mean(r.entropies[span.start - r.prompt_len : span.stop - r.prompt_len])))
    return {f"mean entropy, {phase} phase": f"{np.mean(values):.3f}" for phase, values in phases.items()}


def curve(x: list[float], y: list[float], width: int = 640, height: int = 280) -> str:
    """Return a line chart as SVG."""
    left, bottom = 50, 40
    sx, sy = (width - left - 10) / max(x), (height - bottom - 10) / max(y)
    points = " ".join(f"{left + sx * a:.1f},{height - bottom - sy * b:.1f}" for a, b in zip(x, y, strict=True))
    axis = f"M{left},10V{height - bottom}H{width - 10}"
    marks = "".join(
        f'<text x="{left + sx * v:.0f}" y="{height - bottom + 16}" text-anchor="middle">{v:.0f}</text>'
        for v in np.linspace(0, max(x), 5)
    ) + "".join(
        f'<text x="{left - 6}" y="{height - bottom - sy * v + 4:.0f}" text-anchor="end">{v:.1f}</text>'
        for v in np.linspace(0, max(y), 5)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">'
        f'<rect width="{width}" height="{height}" fill="white"/><path d="{axis}" fill="none" stroke="#888"/>{marks}'
        f'<polyline points="{points}" fill="none" stroke="#0072B2" stroke-width="1.5"/>'
        f'<text x="{width / 2}" y="{height - 6}" text-anchor="middle">million training tokens</text>'
        f'<text x="12" y="{height / 2}" transform="rotate(-90 12 {height / 2})" text-anchor="middle">loss (nats)</text></svg>\n'
    )


if __name__ == "__main__":
    main()
