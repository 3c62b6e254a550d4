"""A board made up by rule, of the size a real one has: 45 conditions, 12 examples, curves of 10 conditions x 3 seeds."""

from __future__ import annotations

import random
from typing import Any

NASTY = '<img src=x onerror="window.hacked=1">'  # a condition's name that would run, were it read as HTML
NASTY_TEXT = "<think>a</script><script>window.hacked=2</script> &lt;b&gt; ${1+1}</think><svg onload=window.hacked=3>7"

# (family, name, effect on accuracy, factor on think tokens, note, paper)
_NAMED = [
    ("edit", "ThinkEdit as published", -0.005, 1.02, "Projects the direction out of the 4 % of heads that write most towards short.", "arXiv:2503.22048"),
    ("edit", "ThinkEdit, ours", 0.004, 1.31, "Ranked by what reaches the end of the stream.", "arXiv:2503.22048"),
    ("edit", "ThinkEdit, halved", 0.002, 1.15, "The same heads, half the strength.", "arXiv:2503.22048"),
    ("edit", "scaled heads", -0.02, 0.86, "The two heads scaled by 1.5.", ""),
    ("edit", "merged 50 %", 0.01, 0.92, "Selective merging of base and the shortest policy.", "arXiv:2510.15110"),
    ("steer", "steered longer, +0.25", 0.03, 1.24, "", "arXiv:2506.15647"),
    ("steer", "steered shorter, -0.05", -0.002, 0.93, "Efficiency Steering, strength chosen on dev.", "arXiv:2506.15647"),
    ("steer", "steered shorter, -0.25", -0.06, 0.80, "", "arXiv:2506.15647"),
    ("steer", "steered shorter, -0.5", -0.18, 0.58, "", "arXiv:2506.15647"),
    ("steer", "probe direction, -0.25", -0.07, 0.83, "Logistic probe instead of difference of means.", ""),
    ("steer", "PCA direction, -0.25", -0.03, 0.95, "", ""),
    ("mask", "4 retrieval heads off", -0.31, 0.88, "Zeroed, our ranking.", "arXiv:2404.15574"),
    ("mask", "2 retrieval heads off", -0.17, 0.93, "", "arXiv:2404.15574"),
    ("mask", "4 published heads off", -0.01, 0.99, "", "arXiv:2404.15574"),
    ("decode", "no second look", 0.01, 0.79, "The first letter of a re-check is forbidden.", ""),
    ("decode", "budget 32", -0.05, 0.74, "Thinking is closed after 32 tokens.", ""),
    ("decode", "budget 16", -0.33, 0.41, "", ""),
    ("decode", "budget 8", -0.46, 0.22, "", ""),
    ("decode", "one more look", 0.015, 1.42, "The closing tag is refused once.", ""),
    ("decode", "most certain of 8", 0.12, 0.96, "The surest of eight responses.", "arXiv:2510.08026"),
    ("prompt", "asked to be brief", -0.01, 0.91, "A cue word of the training data.", ""),
    ("prompt", "asked to be thorough", 0.02, 1.21, "", ""),
    ("prompt", "asked not to think", -0.38, 0.05, "", ""),
    ("trained", "correctness alone", 0.24, 1.00, "GRPO, no length reward.", ""),
    ("trained", "naive price 2.5 %", -0.02, 0.36, "", ""),
    ("trained", "naive price 1 %", 0.12, 0.71, "", ""),
    ("trained", "GRPO-lambda", 0.235, 0.93, "", "arXiv:2505.18086"),
    ("trained", "LASER-D", 0.24, 0.95, "", "arXiv:2505.15612"),
    ("trained", "HAPO", 0.22, 0.94, "", "arXiv:2505.11225"),
    ("trained", "DRPO", 0.236, 0.92, "", "arXiv:2510.04474"),
    ("trained", "PEAR", 0.19, 1.62, "", "arXiv:2510.08026"),
    ("trained", "L1-exact", 0.15, 0.82, "", "arXiv:2503.04697"),
    ("trained", "thinkprune", 0.17, 0.66, "", "arXiv:2504.01296"),
    ("trained", "shortest of 8, supervised", 0.08, 0.62, "", ""),
    ("combined", "LASER-D + no second look", 0.245, 0.77, "", ""),
    ("combined", "LASER-D + steered shorter", 0.20, 0.83, "", ""),
    ("combined", "DRPO + budget 32", 0.19, 0.73, "", ""),
    ("combined", "ThinkEdit + asked to be brief", 0.0, 1.1, "", ""),
    ("control", "random heads", -0.004, 1.00, "As many heads of the same layers.", ""),
    ("control", "random directions", -0.03, 1.03, "The same heads, along directions they can write.", ""),
    ("control", "steered randomly, 0.25", -0.03, 1.01, "Equal norm.", ""),
    ("control", "4 random heads off", -0.02, 0.99, "", ""),
    ("control", "random reward", -0.01, 0.98, "GRPO on noise.", ""),
]  # fmt: skip

METRICS = {
    "accuracy": {"label": "Accuracy", "unit": "share", "better": "high", "group": "main", "help": "Share of responses whose answer is right."},
    "think_tokens": {"label": "Think tokens", "unit": "tokens", "better": "low", "group": "main", "help": "Mean length of thinking, open spans included."},
    "aes": {"label": "Accuracy-efficiency score", "unit": "score", "better": "high", "group": "main", "help": "Length saved, less five times the accuracy lost."},
    "closed": {"label": "Closed", "unit": "share", "better": "high", "group": "main", "help": "Share of responses that close their thinking."},
    "shortest_20": {"label": "Accuracy of own shortest 20 %", "unit": "share", "better": "high", "group": "main", "help": "What ThinkEdit reports."},
    "kl": {"label": "Drift from base", "unit": "nats", "better": "low", "group": "damage", "help": "Mean KL divergence to base on base's own responses."},
    "lookup": {"label": "Lookup without thinking", "unit": "share", "better": "high", "group": "damage", "help": "A skill that nobody meant to change."},
    "answers_kept": {"label": "Right answers kept", "unit": "share", "better": "high", "group": "damage", "help": "Of what base had right."},
    "budget_16": {"label": "Accuracy at 16 tokens", "unit": "share", "better": "high", "group": "budget", "help": "Thinking closed after 16 tokens."},
    "budget_32": {"label": "Accuracy at 32 tokens", "unit": "share", "better": "high", "group": "budget", "help": "Thinking closed after 32 tokens."},
    "entropy": {"label": "Think entropy", "unit": "nats", "better": "none", "group": "mechanism", "help": "Mean entropy a think token."},
    "checks": {"label": "Re-checks a response", "unit": "number", "better": "none", "group": "mechanism", "help": "Lines that repeat a step."},
    "failed": {"label": "Failed steps", "unit": "share", "better": "low", "group": "mechanism", "help": "arXiv:2509.19284."},
}  # fmt: skip
TASKS, DIFFICULTIES = ("all", "arithmetic", "lookup"), ("all", "easy", "medium", "hard")
BASE_ACCURACY, BASE_TOKENS = 0.686, 34.2


def _estimate(mean: float, reach: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - reach, "high": mean + reach}


def _share(mean: float, reach: float) -> dict[str, float]:
    mean = min(max(mean, 0.0), 1.0)
    return {"mean": mean, "low": max(mean - reach, 0.0), "high": min(mean + reach, 1.0)}


def _metrics(rng: random.Random, effect: float, factor: float) -> dict[str, dict[str, float]]:
    accuracy, tokens = BASE_ACCURACY + effect, BASE_TOKENS * factor
    shares = {
        "accuracy": accuracy, "closed": 0.97 - abs(factor - 1) / 8, "shortest_20": accuracy - 0.2 + 0.3 * effect, "lookup": 0.95 - abs(effect) / 3,
        "answers_kept": 0.93 - abs(effect) / 2, "budget_16": 0.25 + 0.15 / factor**0.5, "budget_32": 0.55 + effect / 2, "failed": 0.12 - effect / 6,
    }  # fmt: skip
    found = {m: _share(v + rng.gauss(0, 0.008), rng.uniform(0.018, 0.03)) for m, v in shares.items()}
    found["think_tokens"] = _estimate(tokens, rng.uniform(0.02, 0.05) * tokens)
    found["aes"] = _estimate(1 - factor + 5 * min(effect, 0) + 3 * max(effect, 0), 0.09)
    found["kl"] = _estimate(abs(effect) / 3 + abs(factor - 1) / 9, 0.004)
    found["entropy"] = _estimate(0.175 - 0.05 * (factor - 1), 0.006)
    found["checks"] = _estimate(max(0.0, 1.8 + 2.4 * (factor - 1)), 0.11)
    return {m: found[m] for m in METRICS}


def _cells(rng: random.Random, effect: float, factor: float) -> dict[str, dict[str, Any]]:
    shift = {"all": 0.0, "arithmetic": -0.06, "lookup": 0.12, "easy": 0.14, "medium": 0.02, "hard": -0.2}
    stretch = {"all": 1.0, "arithmetic": 1.1, "lookup": 0.8, "easy": 0.6, "medium": 1.0, "hard": 1.5}
    cells: dict[str, dict[str, Any]] = {}
    for task in TASKS:
        for difficulty in DIFFICULTIES:
            n = 480 // (1 if task == "all" else 2) // (1 if difficulty == "all" else 3)
            accuracy = BASE_ACCURACY + effect * (1 - shift[difficulty]) + shift[task] + shift[difficulty] + rng.gauss(0, 0.01)
            tokens = BASE_TOKENS * factor * stretch[task] * stretch[difficulty]
            reach = 0.9 / n**0.5
            own = {"n": n, "accuracy": _share(accuracy, reach), "think_tokens": _estimate(tokens, reach * tokens)}
            cells.setdefault(task, {})[difficulty] = own
    return cells


def _paired(own: dict, base: dict, rng: random.Random) -> dict[str, dict[str, float]]:
    found = {}
    for metric, value in own.items():
        mean, reach = value["mean"] - base[metric]["mean"], 0.7 * (value["high"] - value["low"]) / 2 + 1e-4
        p = min(1.0, 2.0 * 2.0 ** (-((1.9 * mean / reach) ** 2) / 2) * rng.uniform(0.8, 1.2))
        found[metric] = {**_estimate(mean, reach), "p": p, "p_holm": min(1.0, 30 * p)}
    return found


def _response(rng: random.Random, numbers: list[int], effect: float, factor: float) -> dict[str, Any]:
    total, lines = numbers[0], []
    for number in numbers[1:]:
        lines.append(f"{total}+{number}={total + number}")
        total += number
        if rng.random() < 0.25 * factor:
            lines.append(f"check {total - number}+{number}={total}")
    keep = max(1, round(len(lines) * min(factor, 1.0)))
    correct = rng.random() < BASE_ACCURACY + effect
    answer = total if correct else total + rng.choice((-10, -1, 1, 10))
    think = "\n".join(lines[:keep]) + f"\n={answer}\n"
    parts = {"text": f"<think>{think}</think>{answer}", "think": think, "answer": str(answer), "open": False}
    return {**parts, "correct": correct, "think_tokens": sum(len(line) + 1 for line in lines[:keep])}


def _examples(conditions: list[tuple], rng: random.Random) -> list[dict[str, Any]]:
    found = []
    for i in range(12):
        numbers = [rng.randint(2, 9) for _ in range(4 + 2 * (i % 3))]
        responses = {name: _response(random.Random(i), numbers, effect, factor) for _, name, effect, factor, _, _ in conditions}
        if i == 0:
            responses[NASTY] = {"text": NASTY_TEXT, "correct": False, "think_tokens": 9}
        if i == 1:
            responses["budget 8"] = {
                "text": "[" + "3+4=7\n" * 30,
                "think": "3+4=7\n" * 30,
                "answer": None,
                "open": True,
                "correct": False,
                "think_tokens": 180,
            }
            responses["asked not to think"] = {
                "text": "27",
                "think": None,
                "answer": "27",
                "open": False,
                "correct": False,
                "think_tokens": 0,
            }
        found.append(
            {
                "id": f"problem-{i}",
                "task": ("arithmetic", "lookup")[i % 2],
                "difficulty": DIFFICULTIES[1 + i % 3],
                "prompt": "+".join(map(str, numbers)) + "=?",
                "answer": str(sum(numbers)),
                "responses": responses,
            }
        )
    return found


def _curves(names: list[str], rng: random.Random) -> dict[str, list[dict[str, Any]]]:
    steps = list(range(0, 101, 5))
    effects = {name: (effect, factor) for _, name, effect, factor, _, _ in _NAMED}
    found: dict[str, list[dict[str, Any]]] = {}
    for name in names:
        effect, factor = effects[name]
        for seed in range(3):
            path = [1 - 2.718 ** (-step / 30) for step in steps]
            accuracy = [BASE_ACCURACY + effect * u + rng.gauss(0, 0.015) for u in path]
            tokens = [BASE_TOKENS * (1 + (factor - 1) * u) + rng.gauss(0, 0.8) for u in path]
            found.setdefault(name, []).append({"seed": seed, "step": steps, "accuracy": accuracy, "think_tokens": tokens})
    return found


def _figures(rng: random.Random) -> list[dict[str, Any]]:
    layout = {
        "height": 380,
        "margin": {"l": 60, "r": 20, "t": 40, "b": 50},
        "template": {"layout": {"colorway": ["#0072B2", "#D55E00"]}},
    }
    heads = [[rng.gauss(0, 1) for _ in range(8)] for _ in range(4)]
    axes = {"xaxis": {"title": {"text": "head"}}, "yaxis": {"title": {"text": "layer"}}}
    heat = {"data": [{"type": "heatmap", "z": heads, "colorscale": "RdBu", "zmid": 0}], "layout": {**layout, **axes}}
    lines = [
        {"type": "scatter", "name": n, "x": [8, 16, 32, 64], "y": [0.2, 0.4 + i / 20, 0.65, 0.7 + i / 10]}
        for i, n in enumerate(("base", "LASER-D"))
    ]
    budgets = {
        "data": lines,
        "layout": {**layout, "xaxis": {"title": {"text": "budget (tokens)"}}, "yaxis": {"title": {"text": "accuracy"}}},
    }
    cosines = {
        "data": [{"type": "bar", "x": ["layer 1", "layer 2", "layer 3", "layer 4"], "y": [0.1, 0.4, 0.72, 0.66]}],
        "layout": {**layout, "title": {"text": "Directions agree"}},
    }
    return [
        {"title": "Heads that write towards short thinking", "text": "Contribution of each head; below 0 is shorter.", "figure": heat},
        {"title": "Accuracy under a budget", "text": "Thinking is closed after so many tokens.", "figure": budgets},
        {"title": "Directions agree", "text": "Cosine of the two estimators over the layers.", "figure": cosines},
    ]  # fmt: skip


def board(seed: int = 0) -> dict[str, Any]:
    """The same board for the same seed."""
    rng = random.Random(seed)
    listed = [
        ("base", "base", 0.0, 1.0, "The tiny reasoner as it is.", ""),
        *_NAMED,
        ("control", NASTY, -0.09, 1.1, "<b>not bold</b>", ""),
    ]
    conditions: dict[str, dict[str, Any]] = {}
    for family, name, effect, factor, note, paper in listed:
        trained = family in ("trained", "combined")
        conditions[name] = {
            "family": family,
            "note": note,
            "paper": paper,
            "interventions": [{"op": "project_out", "layer": 2, "head": 5, "strength": 1.0}] if family == "edit" else [],
            "seeds": [0, 1, 2] if trained else [0],
            "metrics": _metrics(rng, effect, factor),
            "cells": _cells(rng, effect, factor),
            "cost": {
                "tokens": 1_843_200 if trained else 12_400 if family in ("edit", "steer") else 0,
                "seconds": 5_230.0 if trained else 41.5 if family in ("edit", "steer") else 0.0,
                "parameters_changed": 1_058_816 if trained else 4_096 if family == "edit" else 0,
                "training_steps": 100 if trained else 0,
            },
        }
    metrics = {name: c["metrics"] for name, c in conditions.items()}
    for name, own in metrics.items():
        others = (m for other, m in metrics.items() if other != name)
        gaps = [
            min(m["accuracy"]["mean"] - own["accuracy"]["mean"], (own["think_tokens"]["mean"] - m["think_tokens"]["mean"]) / 34)
            for m in others
        ]
        conditions[name]["front"] = round(min(1.0, max(0.0, 0.6 - 8 * max(gaps))), 3)
    trained_names = [name for family, name, *_ in _NAMED if family == "trained"][:10]
    return {
        "title": "Forty-five ways to change how long the tiny reasoner thinks",
        "base": "base",
        "provenance": {
            "model": {"name": "tiny-reasoner", "fingerprint": "3f9a" * 16, "parameters": 1_058_816},
            "sampling": {"temperature": 1.0, "max_new_tokens": 256, "n": 4},
            "problems": {"split": "test", "arithmetic": 240, "lookup": 240},
            "toolkit_version": "0.6.0",
            "seeds": [0, 1, 2],
        },
        "conditions": conditions,
        "paired": {name: _paired(own, metrics["base"], rng) for name, own in metrics.items() if name != "base"},
        "metrics": METRICS,
        "tasks": list(TASKS),
        "difficulties": list(DIFFICULTIES),
        "examples": _examples(listed, rng),
        "curves": _curves(trained_names, rng),
        "figures": _figures(rng),
        "methods": [
            {"title": "Comparison", "text": "Every condition answers the same problems with the same seeds. Differences are paired within problems; intervals are percentile bootstraps over problems (2,000 resamples)."},
            {"title": "Several comparisons", "text": "p-values of one metric are corrected together over all conditions after Holm.\n\nA difference is called significant below .05 after that."},
            {"title": "Front", "text": "In each resample of the problems, a condition is on the front if no other is both at least as accurate and shorter. The share of such resamples is reported."},
            {"title": "Controls", "text": "Random heads of the same layers, random directions of equal norm, and training on a random reward."},
        ],
    }  # fmt: skip
