"""Stage *right*: a GPU gives the numbers of the CPU, within rounding. Where there is none, the CPU is compared with itself."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from families import FAMILIES, family
from ledger import Check, Value

from toolkit import attention, collect, edits, entropies, generate, masks, qualify, recording, sampling, tasks
from toolkit import lm as lms
from toolkit.engines import OwnLoop
from toolkit.generate import Sampling
from toolkit.lm import LM, Condition, Intervention, UnsupportedModelError
from toolkit.methods import thinkedit
from toolkit.phases import Scope
from toolkit.types import Direction, HeadScores, Moments, Plan, Problem, Rollout

TIE = 1e-4  # a random number this close to the border between two tokens may fall on either side


@dataclass
class Setting:
    """What the checks of this stage share. Everything is made when it is first used."""

    small: bool
    device: torch.device

    @cached_property
    def cpu(self) -> LM:
        return lms.load("tiny-reasoner", device="cpu")

    @cached_property
    def card(self) -> LM:
        return lms.load("tiny-reasoner", device=self.device)

    @cached_property
    def problems(self) -> list[Problem]:
        return tasks.load("arithmetic", "test", n=6 if self.small else 64)

    @cached_property
    def sampling(self) -> Sampling:
        return Sampling(n=3 if self.small else 4, max_new_tokens=60 if self.small else 200, details=True)

    @cached_property
    def rollouts(self) -> list[Rollout]:
        """Responses sampled on the CPU."""
        return generate.rollouts(self.cpu, self.problems, self.sampling, progress=False)

    @cached_property
    def classes(self) -> Callable[[Rollout], str | None]:
        return thinkedit.quantile_classes(self.rollouts, at_least=2)

    @cached_property
    def moments(self) -> Moments:
        return collect.moments(self.cpu, self.rollouts, self.classes, second=(collect.ATTN,))

    @cached_property
    def direction(self) -> Direction:
        return thinkedit.direction(self.moments)

    @cached_property
    def scores(self) -> HeadScores:
        return thinkedit.head_scores(self.moments, self.direction, self.cpu)

    @cached_property
    def plan(self) -> Plan:
        return edits.plan(self.scores, self.direction, fraction=0.1)


def setting(*, small: bool, out: Path, ends: float) -> Setting:
    return Setting(small, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, relative to the largest number."""
    a, b = a.double().cpu(), b.double().cpu()
    return ((a - b).abs().max() / a.abs().max()).item()


# --- precision and families ----------------------------------------------------------------------------------


def precision(s: Setting) -> dict[str, Value]:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(512, 512, generator=generator) for _ in range(2))
    product = a.to(s.device) @ b.to(s.device)
    return {
        "TF32 allowed in fp32 products (0: no)": float(qualify.tf32()),
        "fp32 product against fp64, relative error": apart(a.double() @ b.double(), product),
    }


def identities(s: Setting, dtype: torch.dtype, name: str) -> dict[str, Value]:
    worst, refused = 0.0, []
    for kind in FAMILIES:
        lm = family(kind, dtype=dtype)
        try:
            results = lms.qualify(replace(lm, model=lm.model.to(s.device)))
        except UnsupportedModelError as error:
            refused.append(f"{kind}: {str(error)[:300]}")
            continue
        worst = max([worst, *(r.value for r in results if not r.name.endswith("is causal"))])
    return {
        f"families refused in {name}": (len(refused), f"of {len(FAMILIES)}; " + "; ".join(refused)),
        f"largest deviation in {name}": worst,
    }


# --- rollouts ------------------------------------------------------------------------------------------------


def differences(
    s: Setting, a: Sequence[Rollout], b: Sequence[Rollout], *, condition: Condition | None = None
) -> tuple[float, int, float]:
    """Compare two samplings of the same problems: share of equal responses, first differences that are no tie, and log-probabilities.

    A first difference is a tie if the random number with which the token was drawn lies at the border between the two tokens. The border is
    computed again on the CPU. The third number is the largest difference of log-probabilities up to there.
    """
    equal, no_tie, worst = 0, 0, 0.0
    for one, other in zip(a, b, strict=True):
        left, right = (r.token_ids[r.prompt_len :] for r in (one, other))
        shared = next(
            (i for i, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]), min(len(left), len(right))
        )
        pairs = zip(one.logprobs or (), other.logprobs or (), strict=False)
        worst = max([worst, *(abs(x - y) for _, (x, y) in zip(range(shared), pairs, strict=False))])
        if left == right:
            equal += 1
        elif shared == min(len(left), len(right)) or border(s, one, shared, right[shared], condition) > TIE:
            no_tie += 1
    return equal / len(a), no_tie, worst


@torch.inference_mode()
def border(s: Setting, r: Rollout, step: int, token: int, condition: Condition | None) -> float:
    """Distance of the random number of a step from the interval of the cumulative probability in which ``token`` is drawn."""
    streams, at = sampling.Streams([(r.problem_id, r.sample)], s.sampling.seed), torch.tensor([0])
    uniform = [streams.at(i, [0], at) for i in range(step + 1)][-1].item()
    with (condition or Condition(s.cpu)).active():
        ids = torch.tensor([r.token_ids[: r.prompt_len + step]])
        logits = s.cpu.model(input_ids=ids, use_cache=False).logits[0, -1]
    cumulative = logits.float().softmax(dim=-1).cumsum(dim=-1)
    low, high = (cumulative[token - 1].item() if token else 0.0), cumulative[token].item()
    return max(low - uniform, uniform - high, 0.0)


def rollouts(s: Setting) -> dict[str, Value]:
    share, no_tie, worst = differences(s, s.rollouts, generate.rollouts(s.card, s.problems, s.sampling, progress=False))
    return {
        "share of responses equal, CPU and card": (share, f"of {len(s.rollouts)}"),
        "first differences that are no tie": no_tie,
        "log-probabilities up to there, largest difference (nats)": worst,
    }


def batches(s: Setting) -> Iterator[tuple[str, Value]]:
    def drawn(lm: LM, size: int, problems: Sequence[Problem], engine: OwnLoop = OwnLoop()) -> list[Rollout]:  # noqa: B008
        return generate.rollouts(lm, problems, replace(s.sampling, batch_size=size), engine=engine, progress=False)

    few = s.problems[: 2 if s.small else 8]
    large = drawn(s.card, 256, s.problems)
    share, no_tie, _ = differences(s, large, drawn(s.card, 4 if s.small else 16, s.problems))
    yield "share equal, batch 16 against 256", share
    alone, no_tie_alone, _ = differences(s, large[: len(few) * s.sampling.n], drawn(s.card, 1, few))
    yield "share equal, batch 1 against 256", (alone, f"of {len(few) * s.sampling.n}")
    yield "first differences that are no tie, batches", no_tie + no_tie_alone
    longest = max(r.prompt_len for r in large) + s.sampling.max_new_tokens
    fixed = OwnLoop(fixed=(8 if s.small else 64, longest))
    whole = drawn(s.card, 256, s.problems[: 4 * len(few)], fixed)
    part = drawn(s.card, 256, few, fixed)
    yield "share equal in a fixed shape, a part against all", differences(s, whole[: len(part)], part)[0]
    half = lms.load("tiny-reasoner", dtype=torch.bfloat16, device=s.device)
    pair = [drawn(half, size, s.problems[: 4 * len(few)]) for size in (256, 4 if s.small else 16)]
    yield (
        "bf16: share equal, batch 16 against 256",
        sum(a.token_ids == b.token_ids for a, b in zip(*pair, strict=True)) / len(pair[0]),
    )


def slots(s: Setting) -> dict[str, Value]:
    said: list[str] = []
    recorded: list[int] = []
    handler, graph = logging.Handler(), recording.cuda_graph
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(recording.__name__).addHandler(handler)

    def counted(run: recording.Run) -> tuple[Callable[[], None], torch.Tensor]:
        result = graph(run)
        recorded.append(1)
        return result

    recording.cuda_graph = counted
    try:
        found = [
            generate.rollouts(s.card, s.problems, s.sampling, engine=OwnLoop(in_slots=how), progress=False) for how in (False, True)
        ]
    finally:
        recording.cuda_graph = graph
        logging.getLogger(recording.__name__).removeHandler(handler)
    share, no_tie, _ = differences(s, *found)
    return {
        "share equal, slots against batches": share,
        "first differences that are no tie, slots": no_tie,
        "recordings that failed": (len(said), said[0] if said else ""),
        "steps recorded as CUDA graphs": len(recorded),
    }


# --- measuring -----------------------------------------------------------------------------------------------


def moments(s: Setting) -> dict[str, Value]:
    found = collect.moments(s.card, s.rollouts, s.classes, second=(collect.ATTN,))
    return {
        "sums, relative difference": max(apart(s.moments.sums[k], found.sums[k]) for k in found.sums),
        "outer products, relative difference": max(apart(s.moments.outer[k], found.outer[k]) for k in found.outer),
    }


def measured_entropies(s: Setting) -> dict[str, Value]:
    bare = [replace(r, entropies=None, logprobs=None) for r in s.rollouts]
    pairs = zip(s.rollouts, entropies.with_entropies(s.card, bare), strict=True)
    worst = max(abs(x - y) for a, b in pairs for x, y in zip(a.entropies or (), b.entropies or (), strict=True))
    return {"entropies, largest difference (nats)": worst}


def attention_rows(s: Setting) -> dict[str, Value]:
    chosen = [r for r in s.rollouts if r.think and len(r.think) > 1][:8]
    pairs = [[attention.rows(lm, r.token_ids, r.think) for lm in (s.cpu, s.card)] for r in chosen if r.think]
    return {"attention rows, largest difference": max((a - b).abs().max().item() for a, b in pairs)}


# --- changing ------------------------------------------------------------------------------------------------


@torch.inference_mode()
def logits(lm: LM, r: Rollout, act: Intervention | None = None) -> torch.Tensor:
    with Condition(lm, (act,) if act else ()).active():
        return lm.model(input_ids=torch.tensor([r.token_ids], device=lm.device), use_cache=False).logits[0]


def acting(s: Setting, act: Intervention) -> float:
    """Relative difference of the logits of CPU and card under an intervention. It must change them."""
    pairs = [(logits(s.cpu, r, act), logits(s.card, r, act)) for r in s.rollouts[:4]]
    assert apart(logits(s.cpu, s.rollouts[0]), pairs[0][0]) > 1e-3, f"{act} does not act"
    return max(apart(*pair) for pair in pairs)


def edited(s: Setting) -> Iterator[tuple[str, Value]]:
    here, there = edits.apply(s.cpu, s.plan), edits.apply(s.card, s.plan)
    yield "edited weights, logits, relative difference", max(apart(logits(here, r), logits(there, r)) for r in s.rollouts[:4])
    running = [logits(s.card, r, edits.RuntimeEdit(s.plan)) for r in s.rollouts[:4]]
    far = max(apart(logits(there, r), now) for r, now in zip(s.rollouts[:4], running, strict=True))
    yield "edit at run time against edit in weights, relative difference", far
    with tempfile.TemporaryDirectory() as folder:
        there.save(Path(folder) / "edited")
        back = lms.load(Path(folder) / "edited", device=s.device)
        yield "saved and loaded: weights that differ", sum(back.digests[name] != value for name, value in there.digests.items())


def steered(s: Setting) -> Iterator[tuple[str, Value]]:
    for phase in ("all", "prompt", "think", "answer", "newest"):
        yield f"steered in {phase}, logits, relative difference", acting(s, edits.steering(s.direction, 2.0, during=phase))
    ramp = edits.steering(s.direction, 2.0, during=Scope(("think",), ramp="down", budget=16), op="clamp", value=1.0)
    yield "steered in a ramp, logits, relative difference", acting(s, ramp)
    act = edits.steering(s.direction, 0.5, during="think")
    pair = [generate.rollouts(Condition(lm, (act,)), s.problems, s.sampling, progress=False) for lm in (s.cpu, s.card)]
    share, no_tie, _ = differences(s, *pair, condition=Condition(s.cpu, (act,)))
    yield "steered while thinking: share of responses equal", share
    yield "steered: first differences that are no tie", no_tie


def masked(s: Setting) -> Iterator[tuple[str, Value]]:
    plan = replace(s.plan, edits=tuple(replace(edit, op="scale") for edit in s.plan.edits), direction=None)
    for op in masks.ABLATIONS:
        act = masks.masking(plan, op, during="newest", reference=s.moments if op == "mean" else None)
        yield f"masked ({op}), logits, relative difference", acting(s, act)


# --- training ------------------------------------------------------------------------------------------------


def copied(lm: LM, device: torch.device | str) -> LM:
    return lms.wrap(deepcopy(lm.model).to(device), lm.tokenizer, name=lm.name, tags=lm.tags)


def few_rows(s: Setting) -> Any:
    """Return a recipe of 16 short responses per step."""
    from toolkit.grpo import recipes

    return replace(recipes.plain("correctness").scaled(), problems=4, samples=4, max_tokens=48 if s.small else 200)


def grpo_gradient(s: Setting) -> dict[str, Value]:
    """The gradient of one whole step on the same rollouts, those of the CPU."""
    from training import gradient

    from toolkit.grpo import run
    from toolkit.grpo.trainer import Trainer

    recipe, problems = few_rows(s), tasks.load("arithmetic", "train", 32)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for device in ("cpu", s.device):
            lm = copied(s.cpu, device)
            plan = run.Run(Path(folder), 1, micro_batch=8)
            trainer = Trainer(lm, recipe, problems, run.arguments(lm, recipe, plan))
            if found:
                trainer.sampler.draw = lambda ids, drawn=found[0][1]: drawn  # type: ignore[method-assign]
            value = gradient(trainer).double().cpu()
            assert trainer.newest is not None
            found.append((value, trainer.newest.drawn))
    (a, _), (b, _) = found
    assert a.norm() > 0, "the gradient is 0: all rewards are equal"
    return {
        "gradient of one step, 1 - cosine": 1 - torch.nn.functional.cosine_similarity(a, b, dim=0).item(),
        "gradient, ratio of norms less 1": abs((a.norm() / b.norm()).item() - 1),
    }


def grpo_resumed(s: Setting) -> dict[str, Value]:
    """A run that is stopped by an error after a checkpoint and resumed ends with the weights of one that was not.

    ``make torture`` kills the process itself, on a CPU; here it is about the states on the device.
    """
    from transformers import TrainerCallback

    from toolkit.grpo import run
    from toolkit.grpo.extras import Extras

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2:
                raise KeyboardInterrupt

    recipe, problems = few_rows(s), tasks.load("arithmetic", "train", 32)
    with tempfile.TemporaryDirectory() as folder:
        plans = [run.Run(Path(folder) / name, 3, save_every=1, micro_batch=8) for name in ("whole", "stopped")]
        whole = run.train(s.card, recipe, problems, plans[0])
        try:
            run.train(s.card, recipe, problems, plans[1], extras=Extras(callbacks=(Stop(),)))
            raise AssertionError("the run was not stopped")
        except KeyboardInterrupt:
            resumed = run.train(s.card, recipe, problems, plans[1], resume=True)
    pairs = zip(whole.lm.model.parameters(), resumed.lm.model.parameters(), strict=True)
    return {"stopped and resumed, relative difference of weights": max(apart(a, b) for a, b in pairs)}


CHECKS: Mapping[str, Check] = {
    "precision": precision,
    "identities_fp32": lambda s: identities(s, torch.float32, "fp32"),
    "identities_bf16": lambda s: identities(s, torch.bfloat16, "bf16"),
    "rollouts": rollouts,
    "batches": batches,
    "slots": slots,
    "moments": moments,
    "entropies": measured_entropies,
    "attention_rows": attention_rows,
    "edited": edited,
    "steered": steered,
    "masked": masked,
    "grpo_gradient": grpo_gradient,
    "grpo_resumed": grpo_resumed,
}
