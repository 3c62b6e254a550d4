"""Rollouts: tokens per second beside transformers' ``generate`` (one batch; sorted batches) and its continuous batching."""

from __future__ import annotations

import statistics
from functools import partial

import torch
from clock import QUICK, Row, median, ratio, shares, start, turns, words, write
from models import smol, tiny
from scipy import stats

from toolkit import generate, tasks
from toolkit import lm as lms
from toolkit.generate import Sampling
from toolkit.lm import LM
from toolkit.types import Problem, Rollout

TURNS = 3  # of many seconds each
ASKED = (
    "Say hello.", "Name three colours.", "What is 2+3?", "Why is the sky blue? Answer in two sentences.", "Tell a short story about a fox.",
    "Capital of France?", "List four fruits.", "What is a prime number?",
)  # fmt: skip


def prompts_of(lm: LM, problems: list[Problem], n: int) -> list[list[int]]:
    return [lm.prompt_ids(p.messages) for p in problems for _ in range(n)]


def theirs(lm: LM, prompts: list[list[int]], budget: int, rows: int, *, greedy: bool = False) -> list[list[int]]:
    """``generate`` in batches of ``rows``, prompts sorted by length, left padded; the responses, end token included."""
    found, eos = [], sorted(lm.eos_ids)
    pad = lm.tokenizer.pad_token_id
    ordered = sorted(prompts, key=len)
    for at in range(0, len(ordered), rows):
        part = ordered[at : at + rows]
        width = max(map(len, part))
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in part], device=lm.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part], device=lm.device)
        drawn = {"do_sample": False} if greedy else {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
        out = lm.model.generate(ids, attention_mask=mask, max_new_tokens=budget, pad_token_id=pad, eos_token_id=eos, **drawn)
        for row in out[:, width:].tolist():
            stop = next((i + 1 for i, token in enumerate(row) if token in eos), len(row))
            found.append(row[:stop])
    return found


def continuous(lm: LM, prompts: list[list[int]], budget: int) -> list[list[int]]:
    """transformers' continuous batching, as documented."""
    from transformers import GenerationConfig

    config = GenerationConfig(
        do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=budget, eos_token_id=sorted(lm.eos_ids), pad_token_id=0
    )
    own = lm.model.config._attn_implementation
    try:
        out = lm.model.generate_batch(inputs=prompts, generation_config=config, progress_bar=False)
    finally:
        lm.model.set_attn_implementation(own)
    return [list(o.generated_tokens) for o in out.values()]


def gate(ours: list[list[int]], others: list[list[int]]) -> str:
    """Two samples of the same distribution: response lengths, and how often each token occurs."""
    lengths = stats.ks_2samp([len(r) for r in ours], [len(r) for r in others]).pvalue
    both = sorted({t for r in [*ours, *others] for t in r})
    counts = [[sum(r.count(t) for r in some) / sum(map(len, some)) for t in both] for some in (ours, others)]
    far = 0.5 * sum(abs(a - b) for a, b in zip(*counts, strict=True))
    assert lengths > 1e-3, lengths
    return f"lengths of the same distribution (Kolmogorov-Smirnov p = {lengths:.2f}), token frequencies differ by {far:.3f}"


def same_greedy(lm: LM, problems: list[Problem], budget: int) -> str:
    ours = generate.rollouts(lm, problems, Sampling(temperature=0.0, max_new_tokens=budget), progress=False)
    expected = theirs(lm, prompts_of(lm, problems, 1), budget, len(problems), greedy=True)
    found = sorted(list(r.token_ids[r.prompt_len :]) for r in ours)
    same = sum(a == b for a, b in zip(found, sorted(expected), strict=True))
    assert same >= 0.9 * len(problems), same  # a tie of two tokens may break either way
    return f"{same} of {len(problems)} greedy responses equal"


def rows_of(name: str, lm: LM, problems: list[Problem], n: int, budget: int, aim: float) -> list[Row]:
    prompts, sampling = prompts_of(lm, problems, n), Sampling(n=n, max_new_tokens=budget)
    tokens: dict[str, list[int]] = {}

    def counted(key: str, run) -> None:
        tokens.setdefault(key, []).append(sum(map(len, run())))

    def ours() -> list[list[int]]:
        return [list(r.token_ids[r.prompt_len :]) for r in generate.rollouts(lm, problems, sampling, progress=False)]

    peers = {"generate, one batch": partial(theirs, lm, prompts, budget, len(prompts))}
    if len(prompts) > 32:
        peers["generate, sorted batches of 32"] = partial(theirs, lm, prompts, budget, 32)
    if len(prompts) <= 128 and not QUICK:  # minutes a turn beyond
        peers["continuous batching"] = partial(continuous, lm, prompts, budget)
    told, rows, missing = same_greedy(lm, problems[:16], budget), [], {}
    for key, run in [*peers.items()]:
        try:
            passed = f"{told}; {gate(ours(), run())}"
            peers[key] = (run, passed)
        except Exception as error:  # noqa: BLE001
            missing[key] = f"not available: {type(error).__name__}: {str(error)[:160]}"
            del peers[key]
    torch.manual_seed(0)
    work = {"ours": lambda: counted("ours", ours)}
    work |= {key: partial(counted, key, run) for key, (run, _) in peers.items()}
    seconds = turns(work, TURNS)
    speed = {key: [n / s for n, s in zip(tokens[key][-len(took) :], took, strict=True)] for key, took in seconds.items()}
    lengths = [len(r) for r in ours()]
    spent = shares(ours)
    fastest = spent["matrix products"] + spent["attention"]
    note = f"{median(speed['ours']):.0f} tokens/s, {len(prompts)} rows of {min(lengths)}-{max(lengths)} tokens, median {statistics.median(lengths):.0f}"
    for key, (_, passed) in peers.items():
        value = ratio(speed["ours"], speed[key])
        where = f"{words(spent)}; if only matrix products and attention took time: {value[0] / fastest:.1f} x"
        rows.append(
            Row(
                f"rollouts, {name}: tokens/s over {key}",
                *value,
                f">= {aim:g}",
                passed,
                where,
                f"{note}; theirs {median(speed[key]):.0f}",
            )
        )
    rows += [Row(f"rollouts, {name}: tokens/s over {key}", None, None, f">= {aim:g}", why, "") for key, why in missing.items()]
    return rows


@torch.inference_mode()
def price(lm: LM, cheaper: LM, rollouts: list[Rollout]) -> float:
    """Mean KL divergence of a cheaper copy's next tokens from the model's own, in nats per token, over the responses."""
    found = []
    for r in rollouts:
        ids = torch.tensor([r.token_ids[:-1]], device=lm.device)
        own, other = (m.model(input_ids=ids).logits[0, r.prompt_len - 1 :].float().log_softmax(dim=-1) for m in (lm, cheaper))
        found.append((own.exp() * (own - other)).sum(dim=-1))
    return torch.cat(found).mean().item()


def in_bf16(lm: LM, problems: list[Problem], n: int, budget: int) -> list[Row]:
    """The same rollouts with weights in bf16, over ``generate`` in fp32 and in bf16."""
    half = lms.load(lms.smollm2_path(), dtype=torch.bfloat16, device=lm.device, tags=lms.ThinkTags(None, None))
    prompts, sampling = prompts_of(lm, problems, n), Sampling(n=n, max_new_tokens=budget)
    kl = price(lm, half, generate.rollouts(lm, problems, sampling, progress=False))
    count: dict[str, list[int]] = {"ours": [], "fp32": [], "bf16": []}

    def ours() -> None:
        count["ours"].append(sum(r.response_tokens for r in generate.rollouts(half, problems, sampling, progress=False)))

    def others(key: str, model: LM) -> None:
        count[key].append(sum(map(len, theirs(model, prompts, budget, len(prompts)))))

    torch.manual_seed(0)
    seconds = turns({"ours": ours, "fp32": partial(others, "fp32", lm), "bf16": partial(others, "bf16", half)}, TURNS)
    speed = {key: [c / s for c, s in zip(count[key][-len(took) :], took, strict=True)] for key, took in seconds.items()}
    where, told = words(shares(ours)), f"bf16 instead of fp32: KL divergence {kl:.1e} nats per token"
    note = (
        f"{median(speed['ours']):.0f} tokens/s; generate in fp32 {median(speed['fp32']):.0f}, in bf16 {median(speed['bf16']):.0f}"
    )
    return [
        Row("rollouts, SmolLM2 in bf16: tokens/s over generate in fp32, one batch", *ratio(speed["ours"], speed["fp32"]), ">= 2", told, where, note),
        Row("rollouts, SmolLM2 in bf16: tokens/s over generate in bf16, one batch", *ratio(speed["ours"], speed["bf16"]), None, told, where, note),
    ]  # fmt: skip


def main() -> None:
    start()
    lm = tiny()
    problems = tasks.load("arithmetic", "train", 64)
    rows = rows_of("tiny reasoner, 128 rows", lm, problems[:16], 8, 200, 6)
    if not QUICK:
        rows += rows_of("tiny reasoner, 256 rows", lm, problems[:32], 8, 200, 6)
        rows += rows_of("tiny reasoner, 512 rows", lm, problems, 8, 200, 6)
        large = smol()
        asked = [Problem(f"s{i}", ({"role": "user", "content": text},), "") for i, text in enumerate(ASKED)]
        rows += rows_of("SmolLM2", large, asked, 2, 128, 2) + in_bf16(large, asked, 2, 128)
    write("rollouts", rows)


if __name__ == "__main__":
    main()
