"""Stage *fast*: speed and memory at real size, beside transformers, TRL and the limit that memory bandwidth sets."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import shapes
import torch
from ledger import Absent, Check, Value, forget, peak_mb, reset_peak, synchronize

from toolkit import collect, edits, generate, rewards, tasks
from toolkit import lm as lms
from toolkit.engines import OwnLoop, loop
from toolkit.generate import Sampling
from toolkit.lm import LM, Condition
from toolkit.types import Problem, Rollout


@dataclass
class Setting:
    small: bool
    device: torch.device

    @cached_property
    def lm(self) -> LM:
        """The random model of 1.5 billion weights."""
        return shapes.random_model("1.5B", small=self.small, device=self.device)

    @cached_property
    def bandwidth(self) -> float:
        """Bytes per second that a copy inside the device's memory reads and writes."""
        source = torch.empty(2**22 if self.small else 2**31, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.numel() / min(seconds(lambda: target.copy_(source)) for _ in range(10))

    @property
    def rows(self) -> int:
        return 4 if self.small else 64

    @property
    def problems(self) -> list[Problem]:
        return tasks.load("arithmetic", "test", self.rows // 4)


def setting(*, small: bool, out: Path, ends: float) -> Setting:
    return Setting(small, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def seconds(run: Callable[[], Any]) -> float:
    synchronize()
    began = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - began


def machine(s: Setting) -> dict[str, Value]:
    n = 256 if s.small else 8192
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=s.device) for _ in range(2))
    took = min(seconds(lambda: a @ b) for _ in range(10))
    return {
        "memory bandwidth, read and written (TB/s)": s.bandwidth / 1e12,
        "bf16 products (TFLOP/s)": (2 * n**3 / took / 1e12, f"{n} x {n}"),
    }


# --- decoding ------------------------------------------------------------------------------------------------


@contextmanager
def unrecorded() -> Iterator[None]:
    """Slots, but every step is launched anew."""
    before = loop.recorder_for
    loop.recorder_for = lambda device: None  # type: ignore[assignment]
    try:
        yield
    finally:
        loop.recorder_for = before


def decode(s: Setting, target: LM | Condition, tokens: int, engine: OwnLoop) -> float:
    """Seconds to sample ``tokens`` tokens in each of ``s.rows`` rows."""
    sampling = Sampling(n=4, max_new_tokens=tokens, batch_size=s.rows)
    return seconds(lambda: generate.rollouts(target, s.problems, sampling, engine=engine, progress=False))


def per_step(run: Callable[[int], float], few: int, many: int) -> float:
    """Milliseconds per step between the ``few``-th and the ``many``-th token: prefill and recording are left out."""
    run(2)
    first = run(few)
    return 1000 * (run(many) - first) / (many - few)


def span(s: Setting, captured: bool) -> tuple[int, int]:
    """Tokens between which steps are timed. A captured step is recorded anew at 256 tokens of a row, so both ends lie beyond."""
    return (2, 6) if s.small else (290, 480) if captured else (32, 96)


def generate_step(s: Setting, lm: LM) -> float:
    """Milliseconds per step of transformers' ``generate``, the same rows in one batch."""
    from rolling import prompts_of, theirs

    prompts = prompts_of(lm, s.problems, 4)
    return per_step(lambda tokens: seconds(lambda: theirs(lm, prompts, tokens, len(prompts))), *span(s, captured=False))


def captured_rows(s: Setting, lm: LM, name: str) -> Iterator[tuple[str, Value]]:
    few, many = span(s, captured=True)
    whole: list[float] = []

    def run(tokens: int) -> float:
        whole.append(decode(s, lm, tokens, OwnLoop(in_slots=True)))
        return whole[-1]

    step = per_step(run, few, many)
    limit = 1000 * shapes.bytes_per_step(lm, s.rows, (few + many) / 2 + 20) / s.bandwidth
    note = f"{1000 * s.rows / step:.0f} tokens/s; {1000 * whole[-1] / many:.2f} ms with prefill and recording, over {many} tokens"
    yield f"{name}, 64 rows, captured (ms per step)", (step, note)
    yield f"{name}, captured step over the limit", step / limit
    if name == "1.5B":
        yield "1.5B, 64 rows, memory-bound limit (ms per step)", limit
    theirs = generate_step(s, lm)
    yield f"{name}, captured tokens/s over generate", (theirs / step, f"generate {theirs:.1f} ms per step")


def decoding(s: Setting) -> Iterator[tuple[str, Value]]:
    yield from captured_rows(s, s.lm, "1.5B")
    yield (
        "1.5B, 64 rows, in batches (ms per step)",
        per_step(lambda n: decode(s, s.lm, n, OwnLoop(in_slots=False)), *span(s, captured=False)),
    )
    with unrecorded():
        step = per_step(lambda n: decode(s, s.lm, n, OwnLoop(in_slots=True)), *span(s, captured=False))
    yield "1.5B, 64 rows, in slots (ms per step)", step


def steering(s: Setting) -> dict[str, Value]:
    condition = Condition(s.lm, (edits.steering(shapes.direction(s.lm), 1.0, during="all"),))
    steps: dict[str, list[float]] = {"plain": [], "steered": []}
    for _ in range(2):
        for name, target in (("plain", s.lm), ("steered", condition)):
            steps[name].append(per_step(lambda n, t=target: decode(s, t, n, OwnLoop(in_slots=True)), *span(s, captured=True)))
    ratios = [a / b for a, b in zip(steps["steered"], steps["plain"], strict=True)]
    return {"1.5B, steered over plain, time": (median(ratios), f"every layer, every token; ms per step: {steps}")}


def skewed(s: Setting) -> Iterator[tuple[str, Value]]:
    """Responses whose lengths have a geometric law, more of them than slots."""
    from rolling import continuous, prompts_of, theirs

    mean, most, n = (4, 12, 4) if s.small else (128, 384, 6)
    lm = shapes.ending(s.lm, frozenset(range(1, s.lm.vocab_size, mean)))
    prompts, told = prompts_of(lm, s.problems, n), f"mean {mean}, at most {most} tokens, {len(s.problems) * n} responses"

    def speed(run: Callable[[], Sequence[Sequence[int]]]) -> float:
        found: list[Sequence[int]] = []
        took = seconds(lambda: found.extend(run()))
        return sum(map(len, found)) / took

    def ours() -> list[Sequence[int]]:
        sampled = generate.rollouts(lm, s.problems, Sampling(n=n, max_new_tokens=most, batch_size=s.rows), progress=False)
        return [r.token_ids[r.prompt_len :] for r in sampled]

    fast = speed(ours)
    yield "skewed lengths, ours (tokens/s)", (fast, told)
    slow = speed(lambda: theirs(lm, prompts, most, len(prompts)))
    yield "skewed lengths, over generate", (fast / slow, f"generate {slow:.0f} tokens/s, one batch")
    if not torch.cuda.is_available():
        raise Absent("generate_batch reserves all free memory, which on a CPU takes a minute")
    paged = speed(lambda: continuous(lm, prompts, most))
    yield "skewed lengths, over generate_batch", (fast / paged, f"generate_batch {paged:.0f} tokens/s")


def larger(s: Setting) -> Iterator[tuple[str, Value]]:
    yield from captured_rows(s, shapes.random_model("4B", small=s.small, device=s.device), "4B")


# --- waits ---------------------------------------------------------------------------------------------------


def synchronizations(run: Callable[[], Any]) -> int:
    """How often the CPU waited for the GPU, from PyTorch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    with profile(activities=activities) as seen:
        run()
    return sum(event.count for event in seen.key_averages() if "Synchronize" in event.key)


def waits(s: Setting) -> dict[str, Value]:
    few, many = (4, 8) if s.small else (40, 104)
    run = lambda tokens: decode(s, s.lm, tokens, OwnLoop(in_slots=True))  # noqa: E731
    run(few)
    first, last = synchronizations(lambda: run(few)), synchronizations(lambda: run(many))
    found = traces(s)[:4]
    collect.moments(s.lm, found, by_parity)
    batch = synchronizations(lambda: collect.moments(s.lm, found, by_parity))
    if not torch.cuda.is_available():
        raise Absent("there is no GPU to wait for; tests/test_waiting.py counts waits on a pretended one")
    return {
        "waits for the card per decoded token": ((last - first) / (many - few), f"{first} for {few} tokens, {last} for {many}"),
        "waits for the card per layer of collect": (batch / s.lm.layout.n_layers, f"{batch} in one batch"),
    }


# --- measuring -----------------------------------------------------------------------------------------------


def traces(s: Setting) -> list[Rollout]:
    from models import traces as made

    return made(s.lm, 4 if s.small else 48, shortest=40 if s.small else 512, longest=64 if s.small else 1024)


def by_parity(r: Rollout) -> str:
    return "long" if r.correct else "short"


def in_turns(work: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each piece of work, in turns, after one round that is not counted."""
    took: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(repeats + 1):
        for name, run in work.items():
            once = seconds(run)
            if turn:
                took[name].append(once)
    return {name: median(each) for name, each in took.items()}


def collecting(s: Setting) -> Iterator[tuple[str, Value]]:
    from collecting import bare, ours, with_logits

    found, repeats = traces(s), 1 if s.small else 5
    took = in_turns({"ours": lambda: ours(s.lm, found), "bare": lambda: bare(s.lm, found)}, repeats)
    told = f"{took['ours']:.2f} s against {took['bare']:.2f} s, {len(found)} traces"
    yield "collect over a bare forward, time", (took["ours"] / took["bare"], told)
    both = {
        "ours": lambda: collect.moments_and_entropies(s.lm, found, by_parity),
        "logits": lambda: with_logits(s.lm, found),
    }
    took = in_turns(both, repeats)
    told = f"{took['ours']:.2f} s against {took['logits']:.2f} s"
    yield "collect with entropies over a forward with logits, time", (took["ours"] / took["logits"], told)


def retrieval(s: Setting) -> Iterator[tuple[str, Value]]:
    from retrieval import eager, ours

    short, long = (48, 96) if s.small else (8192, 32768)
    ours(s.lm, shapes.needle(s.lm, short))
    took: dict[int, float] = {}
    for length in (short, long):
        reset_peak()
        took[length] = seconds(lambda n=length: ours(s.lm, shapes.needle(s.lm, n)))
    yield "retrieval scores at 32k tokens (s)", (took[long], f"{took[short]:.2f} s at 8k; one needle")
    yield "retrieval at 32k, peak memory (GB)", peak_mb() / 1000
    own = s.lm.model.config._attn_implementation
    s.lm.model.set_attn_implementation("eager")
    try:
        for name, length in (("8k", short), ("32k", long)):
            forget()
            theirs = seconds(lambda n=length: eager(s.lm, shapes.needle(s.lm, n)))
            yield f"retrieval at {name} over eager, time", (took[length] / theirs, f"eager {theirs:.2f} s")
    except torch.OutOfMemoryError as error:
        raise Absent(f"eager attention does not fit in memory at {name} tokens: {str(error)[:200]}") from error
    finally:
        s.lm.model.set_attn_implementation(own)


def editing(s: Setting) -> Iterator[tuple[str, Value]]:
    from collecting import ours

    attn, _, scores = ours(s.lm, traces(s))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "edited"
        made: list[LM] = []

        def work() -> None:
            made.append(edits.apply(s.lm, edits.plan(scores, attn)))
            made[0].save(path)

        yield (
            "plan, edit and save 1.5B (s)",
            (seconds(work), f"{sum(p.numel() for p in s.lm.model.parameters()) / 1e9:.2f} G weights"),
        )
        back = lms.load(path, dtype=torch.bfloat16, device=s.device)
        yield "saved 1.5B: weights that differ", sum(back.digests[name] != value for name, value in made[0].digests.items())


# --- training ------------------------------------------------------------------------------------------------


class Parity(rewards.Reward):
    """A reward that a random model gets half of the time: whether the sum of its tokens is odd."""

    name, needs = "parity", ("token_ids",)

    def __call__(self, batch: rewards.RewardBatch) -> rewards.RewardValues:
        values = np.array([float(sum(ids) % 2) for ids in batch["token_ids"]])
        return rewards.RewardValues(values, {"parity": values})


def lora() -> Any:
    from toolkit.grpo import parts

    return parts.adapter(16)


def trainer_of(s: Setting, folder: str, *, problems: int, samples: int, tokens: int, micro: int) -> Any:
    """Return our trainer for one step of LoRA on a copy of the model. The original stays in memory, as it does in a run."""
    from toolkit.grpo import recipes, run
    from toolkit.grpo.extras import Extras
    from toolkit.grpo.trainer import Trainer

    recipe = replace(recipes.plain("correctness"), problems=problems, samples=samples, max_tokens=tokens)
    plan = run.Run(Path(folder), 1, save_every=10**6, micro_batch=micro)
    lm = shapes.ending(replace(s.lm, model=deepcopy(s.lm.model)), s.lm.eos_ids)
    questions = tasks.load("arithmetic", "train", 2 * problems)
    return Trainer(lm, recipe, questions, run.arguments(lm, recipe, plan), Extras(reward=Parity(), train=lora()))


def grpo_step(s: Setting) -> Iterator[tuple[str, Value]]:
    names, few, real = ("problems", "samples", "tokens", "micro"), (2, 2, 8, 2), (16, 8, 1024, 8)
    size = dict(zip(names, few if s.small else real, strict=True))
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(s, folder, **size)
        reset_peak()
        took = seconds(trainer.train)
        sampled = trainer.sampler.metrics["seconds/rollouts"]
        yield "GRPO step (s)", (took, f"of them {sampled:.1f} s of sampling; {size}")
        yield "GRPO step, peak memory (GB)", peak_mb() / 1000
        dataset, args = trainer.train_dataset, trainer.args
        del trainer
        forget()
        stock = trl_trainer(s, dataset, args)
        reset_peak()
        theirs = seconds(stock.train)
        yield "TRL's step, peak memory (GB)", peak_mb() / 1000
        yield "GRPO step, 16 x 8, LoRA, over TRL's, time", (took / theirs, f"TRL {theirs:.1f} s")


def trl_trainer(s: Setting, dataset: Any, args: Any) -> Any:
    """TRL's own trainer with the same config, problems and reward. No end token: its rows are as long as ours."""
    from transformers import PrinterCallback
    from trl import GRPOTrainer

    def odd(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        return [float(sum(ids) % 2) for ids in completion_ids]

    trainer = GRPOTrainer(deepcopy(s.lm.model), odd, args, dataset, processing_class=s.lm.tokenizer, peft_config=lora())
    trainer.generation_config.eos_token_id = shapes.NEVER
    trainer.remove_callback(PrinterCallback)
    return trainer


def long_completions(s: Setting) -> dict[str, Value]:
    """One training step on given responses, one row at a time. Sampling needs less: its cache is in the note."""
    tokens = 32 if s.small else 8192
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(s, folder, problems=1, samples=4, tokens=tokens, micro=1)
        trainer.sampler.draw = lambda ids: drawn(trainer, ids, tokens)
        reset_peak()
        took = seconds(trainer.train)
    cache = (shapes.bytes_per_step(s.lm, 1, tokens) - shapes.bytes_per_step(s.lm, 1, 0)) / 1e9
    note = f"{took:.1f} s for 4 rows, LoRA; the cache of one row takes {cache:.2f} GB"
    return {"8k-token completions, 1.5B, one step's peak memory (GB)": (peak_mb() / 1000, note)}


def drawn(trainer: Any, ids: Sequence[str], tokens: int) -> list[Any]:
    from toolkit.grpo.draws import Drawn

    problems, lm = [trainer.problems[i] for i in ids], trainer.origin
    made = shapes.completions(lm, ids, [lm.prompt_ids(p.messages) for p in problems], tokens)
    return [Drawn(rollout, p.messages) for rollout, p in zip(made, problems, strict=True)]


CHECKS: Mapping[str, Check] = {
    "machine": machine,
    "decoding": decoding,
    "steering": steering,
    "waits": waits,
    "collecting": collecting,
    "grpo_step": grpo_step,
    "long_completions": long_completions,
    "retrieval": retrieval,
    "larger": larger,
    "editing": editing,
    "skewed": skewed,
}
