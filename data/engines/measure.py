"""Measure sampling through llama.cpp's server beside the toolkit's own loop, on SmolLM2-135M: ``python data/engines/measure.py``.

Needs ``make llama`` and ``make smol``. Writes ``llama-server.json`` and the table in ``README.md`` here. Rollouts are kept in ``runs/engines``,
so after a stop the same command goes on.

1. *Next tokens.* The server's distribution of the next token against ours, in nats (KL over its 200 most likely tokens): unsteered; steered by
   our GGUF control vector against our own steering, against our steering one layer off, and against no steering; with our GGUF LoRA of a head
   edit against the edited model, and against the unedited one. Means over prompts, with 95 % intervals.
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

from toolkit import edits, engines, entropies, evaluate, exports, generate, stats, store, tasks, vectors
from toolkit import lm as lms
from toolkit.edits import steering
from toolkit.generate import Sampling
from toolkit.lm import LM, Condition
from toolkit.metrics import with_interval
from toolkit.types import Direction, HeadEdit, Plan, Rollout

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "data")]
import llama  # noqa: E402  # the tests' way to start the server
import publish  # noqa: E402

WORK = ROOT / "runs" / "engines"
PROMPTS, PROBLEMS = 24, 40
WARM = Sampling(n=4, max_new_tokens=96, seed=0)
GREEDY = Sampling(temperature=0.0, max_new_tokens=96)
DOSE = 0.06  # norm of the steering vector, as a share of the residual stream's
LISTED = 200  # tokens of the server's distribution that are compared


def next_tokens(url: str, prompts: Sequence[list[int]]) -> list[Mapping[int, float]]:
    """Return the server's log-probabilities of the most likely next tokens after each prompt."""
    found = []
    for prompt in prompts:
        body = {
            "prompt": prompt,
            "n_predict": 1,
            "n_probs": LISTED,
            "temperature": 0.0,
            "cache_prompt": False,
            "samplers": ["temperature"],
        }
        answer = httpx.post(f"{url}/completion", json=body, trust_env=False, timeout=300).json()
        (row,) = answer["completion_probabilities"]
        found.append({entry["id"]: entry["logprob"] for entry in row["top_logprobs"]})
    return found


@torch.inference_mode()
def divergences(condition: Condition, prompts: Sequence[list[int]], theirs: Sequence[Mapping[int, float]]) -> dict[str, float]:
    """Return the mean KL divergence of a condition's next-token distribution from the server's, in nats, with its 95 % interval."""
    values = []
    for prompt, listed in zip(prompts, theirs, strict=True):
        with condition.active() as lm:
            ours = lm.model(torch.tensor([prompt])).logits[0, -1].float().log_softmax(-1)
        there = torch.tensor(list(listed.values()))
        values.append(float((there.exp() * (there - ours[torch.tensor(list(listed))])).sum()))
    return estimated(values, list(map(str, range(len(values)))))


def estimated(values: Sequence[float], problems: Sequence[str]) -> dict[str, float]:
    """Return a mean over problems with its 95 % bootstrap interval."""
    e = stats.over_problems(values, problems)
    return {"mean": e.mean, "low": e.low, "high": e.high}


def random_direction(lm: LM, prompts: Sequence[list[int]]) -> Direction:
    """Return a random direction at every block's output but the first's, which llama.cpp cannot steer."""
    with torch.inference_mode():
        states = lm.model.base_model(torch.tensor([prompts[0]]), output_hidden_states=True).hidden_states[1:]
    norms = torch.stack([h[0].norm(dim=-1).square().mean().sqrt() for h in states])
    drawn = torch.randn(lm.layout.n_layers, lm.layout.d_model, generator=torch.Generator().manual_seed(0))
    drawn[0] = 0
    vector = DOSE * norms[:, None] * torch.nn.functional.normalize(drawn, dim=1)
    return Direction(vector, "resid_post", "all", "random", 1, 1, lm.provenance(0))


def head_edit(lm: LM, v: Direction) -> Plan:
    """Return a plan that removes a direction from a tenth of the heads, chosen at random."""
    rng = np.random.default_rng(0)
    heads = [(layer, head) for layer in range(1, lm.layout.n_layers) for head in range(lm.layout.heads[layer])]
    chosen = sorted(heads[i] for i in rng.choice(len(heads), len(heads) // 10, replace=False))
    changes = tuple(HeadEdit(layer, head, "project_out", 2.0) for layer, head in chosen)
    return Plan(changes, replace(v, kind="attn_out"), "random direction removed from random heads", lm.provenance(0))


def next_token_rows(lm: LM, prompts: Sequence[list[int]]) -> dict[str, dict[str, float]]:
    """Return the divergences of the next-token distribution, by what is compared."""
    v = random_direction(lm, prompts)
    off = replace(v, vector=v.vector.roll(1, 0))
    plan = head_edit(lm, v)
    edited = edits.apply(lm, plan)
    with tempfile.TemporaryDirectory() as folder:
        vector, adapter = Path(folder) / "v.gguf", Path(folder) / "edit.gguf"
        vectors.save_gguf(v, vector, lm=lm, drop_layer_0=True)
        exports.find("gguf-lora").write(lm, plan, adapter, exports.Settings())
        served = {}
        for name, options in {"plain": (), "steered": ("--control-vector", vector), "edited": ("--lora", adapter)}.items():
            with llama.running(lms.smollm2_path(), *options) as (url, _):
                served[name] = next_tokens(url, prompts)
    act, wrong = steering(v, 1.0), steering(off, 1.0)
    compared = {
        "unsteered: server against ours": (Condition(lm), "plain"),
        "control vector: server against our steering": (Condition(lm, (act,)), "steered"),
        "control vector: server against our steering one layer off": (Condition(lm, (wrong,)), "steered"),
        "control vector: server against ours unsteered": (Condition(lm), "steered"),
        "GGUF LoRA of a head edit: server against our edited model": (Condition(edited), "edited"),
        "GGUF LoRA of a head edit: server against ours unedited": (Condition(lm), "edited"),
    }
    return {name: divergences(condition, prompts, served[which]) for name, (condition, which) in compared.items()}


def response_rows(lm: LM) -> dict[str, Any]:
    """Return how responses of the server differ from ours."""
    problems = tasks.load("wordproblems", "test", PROBLEMS, lm=lm)
    with llama.running(lms.smollm2_path()) as (url, _):
        server = engines.connect(url, lm)
        sampled = {
            (which, name): generate.rollouts(lm, problems, sampling, engine=engine, out=WORK / f"{which}-{name}")
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
    lines = ["| next token, mean over prompts | divergence, nats |", "|---|---|"]
    lines += [
        f"| {name} | {with_interval(e['mean'], e['low'], e['high'], 'nats', digits=4)} |" for name, e in found["next token"].items()
    ]
    r = found["responses"]
    units = {"response_tokens": "tokens", "correct": "", "entropy": "nats", "logprob": "nats"}
    names = {
        "response_tokens": "length of a response",
        "correct": "share of right answers",
        "entropy": "entropy per token",
        "logprob": "log-probability per token under our model",
    }
    lines += ["", f"| {r['rollouts']} responses at temperature 1 | server minus ours |", "|---|---|"]
    for name, e in r["server minus ours"].items():
        lines.append(f"| {names[name]} | {with_interval(e['mean'], e['low'], e['high'], units[name], sign='+', digits=3)} |")
    lines += ["", "| greedy responses | same in server and own loop |", "|---|---|"]
    lines += [f"| first {n} tokens | {share:.0%} |" for n, share in r["greedy, same first tokens"].items()]
    return "\n".join(lines)


def main() -> None:
    torch.set_num_threads(1)
    lm = lms.load(lms.smollm2_path(), device="cpu", tags=lms.ThinkTags(None, None))
    prompts = [lm.prompt_ids(p.messages) for p in tasks.load("wordproblems", "dev", PROMPTS, lm=lm)]
    build = store.read_json(llama.server().parents[1] / "build_info.json", Mapping[str, Any])
    found = {
        "server": build,
        "sizes": {"prompts": PROMPTS, "problems": PROBLEMS, "samples": WARM.n, "max_new_tokens": WARM.max_new_tokens, "dose": DOSE},
        "next token": next_token_rows(lm, prompts),
        "responses": response_rows(lm),
        "fingerprint": lm.fingerprint,
    }
    store.write_json(found, HERE / "llama-server.json")
    publish.splice("llama-server", table(found), HERE / "README.md")


if __name__ == "__main__":
    main()
