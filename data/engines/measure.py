"""Measure sampling through llama.cpp's server beside the toolkit's own loop, on SmolLM2-135M: ``python data/engines/measure.py``.

Needs ``make llama`` and ``make smol``. Writes ``llama-server.json``, the table in ``README.md`` here, and one in
data/README.md. Rollouts are kept in ``runs/engines``, so after a stop the same command goes on.

1. *Next tokens.* The server's distribution of the next token against ours, KL(ours || theirs) in nats: unchanged; with an exported control
   vector (a random direction) against our steering; with an exported GGUF LoRA of a head edit against the edited model, at three scales.
   Means over prompts, with 95 % intervals.
2. *Responses.* Length, accuracy and entropy of responses that the server and our loop sampled to the same problems: server minus ours. The
   share of greedy responses that begin with the same tokens.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from torch import Tensor

from toolkit import edits, engines, entropies, evaluate, exports, generate, stats, store, tasks
from toolkit import lm as lms
from toolkit.edits import steering
from toolkit.exports.base import Settings
from toolkit.generate import Sampling
from toolkit.lm import LM, Condition
from toolkit.metrics import with_interval
from toolkit.types import Direction, HeadEdit, Plan, Rollout

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "data")]
import llama  # noqa: E402  # the tests' way to start the server
import publish  # noqa: E402
import readme  # noqa: E402

CODE = store.code_of("toolkit.generate", "toolkit.engines.server", "toolkit.engines.connecting", "toolkit.tasks.wordproblems")
PROMPTS, PROBLEMS = 24, 40
WARM = Sampling(n=4, max_new_tokens=96, seed=0)
GREEDY = Sampling(temperature=0.0, max_new_tokens=96)
DOSE = 0.06  # norm of the steering vector, as a share of the residual stream's
LAYERS, STRENGTH = (5, 10, 15, 20, 25), 12.0  # of the head edit, at a strength that moves the next token visibly
LEAST = -60.0  # smallest log-probability that is compared, nats


def next_tokens(url: str, lm: LM, prompts: Sequence[list[int]], **more: Any) -> list[Tensor]:
    """Return the server's log-probabilities of the next token after each prompt."""
    found = []
    for prompt in prompts:
        body = {
            "prompt": prompt,
            "n_predict": 1,
            "n_probs": lm.vocab_size,
            "temperature": 1.0,
            "samplers": ["temperature"],
            "cache_prompt": False,
        }
        answer = httpx.post(f"{url}/completion", json=body | more, trust_env=False, timeout=300).json()
        row = torch.full((lm.vocab_size,), LEAST, dtype=torch.float64)  # of tokens that the server leaves out
        for entry in answer["completion_probabilities"][0]["top_logprobs"]:
            row[entry["id"]] = max(entry["logprob"], LEAST)
        found.append(row)
    return found


@torch.inference_mode()
def divergences(condition: Condition, prompts: Sequence[list[int]], theirs: Sequence[Tensor]) -> dict[str, float]:
    """Return the mean of KL(ours || theirs) of the next token over the prompts, in nats, with its 95 % interval."""
    values = []
    for prompt, row in zip(prompts, theirs, strict=True):
        with condition.active() as lm:
            ours = lm.model(torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1)
        values.append(float((ours.exp() * (ours - row)).sum()))
    return estimated(values, list(map(str, range(len(values)))))


def estimated(values: Sequence[float], problems: Sequence[str]) -> dict[str, float]:
    """Return a mean over problems with its 95 % bootstrap interval."""
    e = stats.over_problems(values, problems)
    return {"mean": e.mean, "low": e.low, "high": e.high}


def interventions(lm: LM, prompts: Sequence[list[int]]) -> tuple[Direction, Plan]:
    """Return a random direction at the outputs of blocks (but the first), and a plan that projects a random direction out of 25 heads."""
    with torch.inference_mode():
        states = lm.model.base_model(torch.tensor([prompts[0]]), output_hidden_states=True).hidden_states[1:]
    norms = torch.stack([h[0, 1:].norm(dim=-1).mean() for h in states])
    drawn = torch.randn(lm.layout.n_layers, lm.layout.d_model, generator=torch.Generator().manual_seed(0))
    vector = DOSE * norms[:, None] * torch.nn.functional.normalize(drawn, dim=1)
    vector[0] = 0
    direction = Direction(vector, "resid_post", "all", "random", 0, 0, lm.provenance(0))
    chosen = tuple(HeadEdit(layer, head, "project_out", STRENGTH) for layer in LAYERS for head in range(0, lm.layout.n_heads, 2))
    plan = Plan(chosen, replace(direction, kind="attn_out"), "25 heads", lm.provenance(0))
    return direction, edits.with_direction(plan, edits.random_written(plan, lm.layout, seed=0))


def next_token_rows(lm: LM, prompts: Sequence[list[int]]) -> dict[str, dict[str, float]]:
    """Return the divergences of the next-token distribution, by what is compared."""
    path = lms.smollm2_path()
    v, plan = interventions(lm, prompts)
    half = replace(plan, edits=tuple(replace(edit, strength=STRENGTH / 2) for edit in plan.edits))
    off = replace(v, vector=v.vector.roll(1, 0))
    plain, edited, halved = Condition(lm), Condition(edits.apply(lm, plan)), Condition(edits.apply(lm, half))
    steered, wrong = (Condition(lm, (steering(direction, 1.0),)) for direction in (v, off))
    with tempfile.TemporaryDirectory() as folder:
        vector, adapter = Path(folder) / "v.gguf", Path(folder) / "edit.gguf"
        exports.find("gguf").write(lm, v, vector, Settings())
        exports.find("gguf-lora").write(lm, plan, adapter, Settings(base=str(path)))
        with llama.running(path) as (url, _):
            untouched = next_tokens(url, lm, prompts)
        with llama.running(path, "--control-vector", vector) as (url, _):
            controlled = next_tokens(url, lm, prompts)
        with llama.running(path, "--lora", adapter) as (url, _):
            adapted = next_tokens(url, lm, prompts)
            weakened, removed = (next_tokens(url, lm, prompts, lora=[{"id": 0, "scale": scale}]) for scale in (0.5, 0.0))
    compared = {
        "neither": (plain, untouched),
        "both steered": (steered, controlled),
        "theirs steered, ours not": (plain, controlled),
        "both steered, ours one layer off": (wrong, controlled),
        "both edited": (edited, adapted),
        "theirs edited, ours not": (plain, adapted),
        "both edited at half strength": (halved, weakened),
        "theirs edited at half strength, ours not": (plain, weakened),
        "theirs edited at strength 0, ours not": (plain, removed),
    }
    return {name: divergences(condition, prompts, theirs) for name, (condition, theirs) in compared.items()}


def response_rows(lm: LM, build: Mapping[str, Any]) -> dict[str, Any]:
    """Return how responses of the server, of the given build, differ from ours."""
    problems = tasks.load("wordproblems", "test", PROBLEMS, lm=lm)
    work = publish.work_folder(__file__, CODE, [lm.fingerprint, build], scripts=("../tests/llama.py",))
    with llama.running(lms.smollm2_path()) as (url, _):
        server = engines.connect(url, lm)
        sampled = {
            (which, name): generate.rollouts(lm, problems, sampling, engine=engine, out=work / f"{which}-{name}")
            for which, sampling in (("warm", WARM), ("greedy", GREEDY))
            for name, engine in (("server", server), ("ours", engines.OWN_LOOP))
        }
    scored = {name: entropies.with_entropies(lm, sampled["warm", name], progress=True) for name in ("server", "ours")}

    def difference(value: Any) -> dict[str, float]:
        pairs = [(r.problem_id, value(r) - value(o)) for r, o in zip(scored["server"], scored["ours"], strict=True)]
        return estimated([d for _, d in pairs], [p for p, _ in pairs])

    def same(n: int) -> float:
        pairs = zip(sampled["greedy", "server"], sampled["greedy", "ours"], strict=True)
        return float(np.mean([first(r, n) == first(o, n) for r, o in pairs]))

    def first(r: Rollout, n: int) -> tuple[int, ...]:
        return r.token_ids[r.prompt_len :][:n]

    return {
        "rollouts": len(scored["ours"]),
        "server minus ours": {
            "response_tokens": difference(lambda r: r.response_tokens),
            "correct": difference(lambda r: float(r.correct)),
            "entropy": difference(lambda r: float(np.mean(r.entropies))),
            "logprob": difference(lambda r: float(np.mean(r.logprobs))),
        },
        "ours": {
            "response_tokens": float(np.mean([r.response_tokens for r in scored["ours"]])),
            "entropy": float(np.mean([np.mean(r.entropies) for r in scored["ours"]])),
        },
        "greedy, same first tokens": {str(n): same(n) for n in (1, 8, 32, 96)},
        "looping": {name: float(evaluate.rollout_table(rs, problems, lm.tags)["looping"].mean()) for name, rs in scored.items()},
    }


def table(found: Mapping[str, Any]) -> str:
    """Return the results as Markdown tables."""
    lines: list[str] = []
    r = found["responses"]
    names = {
        "response_tokens": f"length of a response, tokens (ours: {r['ours']['response_tokens']:.1f})",
        "correct": "share of right answers",
        "entropy": f"entropy per token, nats (ours: {r['ours']['entropy']:.3f})",
        "logprob": "log-probability per token under our model, nats",
    }
    lines += [f"| {r['rollouts']} responses at temperature 1 | server minus ours |", "|---|---|"]
    for name, e in r["server minus ours"].items():
        lines.append(f"| {names[name]} | {with_interval(e['mean'], e['low'], e['high'], '', sign='+', digits=3)} |")
    lines += ["", "| greedy responses | same in server and own loop |", "|---|---|"]
    lines += [f"| first {n} token{'' if n == '1' else 's'} | {share:.0%} |" for n, share in r["greedy, same first tokens"].items()]
    return "\n".join(lines)


def main() -> None:
    torch.set_num_threads(1)
    lm = lms.load(lms.smollm2_path(), device="cpu", tags=lms.ThinkTags(None, None))
    prompts = [lm.prompt_ids(p.messages) for p in tasks.load("wordproblems", "dev", PROMPTS, lm=lm)]
    build = store.read_json(llama.server().parents[1] / "build_info.json", Mapping[str, Any])
    found = {
        "server": build,
        "sizes": {
            "prompts": PROMPTS,
            "problems": PROBLEMS,
            "samples": WARM.n,
            "max_new_tokens": WARM.max_new_tokens,
            "dose": DOSE,
            "strength": STRENGTH,
        },
        "next token": next_token_rows(lm, prompts),
        "responses": response_rows(lm, build),
        "fingerprint": lm.fingerprint,
    }
    store.write_json(found, HERE / "llama-server.json")
    publish.splice("llama-server", table(found), HERE / "README.md")
    readme.update(["served"])


if __name__ == "__main__":
    main()
