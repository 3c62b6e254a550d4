"""How often the CPU waits for a GPU, counted with a pretended one (``card``): hardly ever per token, and never per layer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from card import CUDA, Counting, on_card, pretended
from zoo import model_of_type

from toolkit import attention, collect, edits, masks, needles, tensors
from toolkit.baselines import Budget, Suppress
from toolkit.edits import RuntimeEdit, steering
from toolkit.engines import OwnLoop
from toolkit.generate import Sampling, rollouts
from toolkit.lm import LM, Condition
from toolkit.methods import retrieval_heads
from toolkit.phases import Scope
from toolkit.types import Direction, HeadEdit, Plan, Span

# --- the pretended GPU ---------------------------------------------------------------------------------------

WAITING = {
    "item": lambda x: x[0, 0].item(),
    "tolist": lambda x: x.tolist(),
    "bool": lambda x: bool(x.any()),
    "int": lambda x: int(x.max()),
    "cpu": lambda x: x.cpu(),
    "to cpu": lambda x: x.to("cpu"),
    "to the device": lambda x: torch.zeros(3).to(x.device),
    "tensor of numbers": lambda x: torch.tensor([1, 2], device=x.device),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "an index by a mask": lambda x: x[x > 0],
    "an index by a list": lambda x: x[[0, 2]],
    "masked_select": lambda x: x.masked_select(x > 0),
    "allclose": lambda x: torch.allclose(x, x),
    "repeat_interleave": lambda x: x.repeat_interleave(torch.ones(3, dtype=torch.long, device=x.device).cumsum(0), dim=0),
}
GOING_ON = {
    "arithmetic": lambda x: (x @ x.T).softmax(dim=-1) + 1,
    "zeros": lambda x: torch.zeros(3, device=x.device),
    "upload": lambda x: tensors.upload(torch.zeros(3), x.device),
    "where of three": lambda x: torch.where(x > 0, x, 0.0),
    "an index by indices": lambda x: x[torch.arange(2, device=x.device)],
    "shapes": lambda x: (x.shape, x.device, x.dtype, len(x)),
    "to another type": lambda x: x.to(torch.float64),
}


@pytest.mark.parametrize("name", WAITING)
def test_what_waits_for_a_gpu_is_counted(name):
    with Counting() as mode:
        WAITING[name](on_card(torch.ones(3, 4)))
    assert mode.waits.total() == 1


@pytest.mark.parametrize("name", GOING_ON)
def test_what_does_not_wait_is_not_counted(name):
    with Counting() as mode:
        result = GOING_ON[name](on_card(torch.ones(3, 4)))
        assert not isinstance(result, torch.Tensor) or result.device == CUDA
    assert not mode.waits


def test_tensors_of_two_devices_do_not_mix():
    with Counting(), pytest.raises(RuntimeError, match="mixes"):
        on_card(torch.ones(3)) + torch.ones(3)


# --- decoding in batches (in slots: test_slots.py) -----------------------------------------------------------

IN_BATCHES = OwnLoop(in_slots=False)


def endless(lm: LM) -> LM:
    lm = replace(lm)
    lm.__dict__["eos_ids"] = frozenset({10**6})
    return lm


def direction_of(lm: LM, kind: str = "resid_post") -> Direction:
    vector = torch.randn(lm.layout.n_layers, lm.layout.d_model, generator=torch.Generator().manual_seed(0))
    return Direction(vector, kind, "think", "by hand", 1, 1, lm.provenance())


def plan_of(lm: LM, op: str = "scale") -> Plan:
    chosen = tuple(HeadEdit(layer, 1, op, 0.5 + 0.5 * (layer == 1)) for layer in range(lm.layout.n_layers))
    return Plan(chosen, direction_of(lm, "attn_out") if op == "project_out" else None, "by hand", lm.provenance())


def steered(lm: LM, op: str, during: str | Scope, kind: str = "resid_post"):
    return steering(direction_of(lm, kind), 0.3, op=op, value=1.0, during=during)


def masked(lm: LM, op: str, during: str | Scope):
    reference = None
    if op == "mean":
        from toolkit.tasks import load

        responses = rollouts(lm, load("arithmetic", "train", 4), Sampling(max_new_tokens=60, seed=1), progress=False)
        reference = collect.moments(lm, responses, lambda r: "all", kinds=("z",))
    return masks.masking(plan_of(lm), op, during=during, reference=reference)


INTERVENTIONS = {
    "none": lambda lm: (),
    "steered": lambda lm: (steered(lm, "add", "all"),),
    "steered at resid_mid": lambda lm: (steered(lm, "add", "think", "resid_mid"),),
    "steered while thinking": lambda lm: (steered(lm, "add", "think"),),
    "steered, newest": lambda lm: (steered(lm, "add", "newest"),),
    "ramp": lambda lm: (steered(lm, "add", Scope(("think",), ramp="up", budget=6)),),
    "late": lambda lm: (steered(lm, "add", Scope(("think", "answer"), first=3, until=9)),),
    "ablated": lambda lm: (steered(lm, "ablate", "think+answer"),),
    "clamped": lambda lm: (steered(lm, "clamp", "all"),),
    "clamped on a ramp": lambda lm: (steered(lm, "clamp", Scope(("think",), ramp="down", budget=9)),),
    "zeroed": lambda lm: (masked(lm, "zero", "all"),),
    "mean": lambda lm: (masked(lm, "mean", "newest"),),
    "uniform": lambda lm: (masked(lm, "uniform", "think"),),
    "edited": lambda lm: (RuntimeEdit(plan_of(lm, "project_out")),),
    "suppressed": lambda lm: (Suppress(("W", "1")),),
    "two": lambda lm: (steered(lm, "add", "think"), masked(lm, "zero", "answer")),
}


@pytest.mark.parametrize("name", INTERVENTIONS)
def test_decoding_waits_once_in_eight_steps(name, tiny, problems_of):
    """And samples the same tokens as on the CPU."""
    during, problems = INTERVENTIONS[name](tiny), problems_of(3)

    def sample(lm: LM, steps: int):
        sampling = Sampling(n=2, max_new_tokens=steps, seed=3, details=True)
        return rollouts(Condition(endless(lm), during), problems, sampling, engine=IN_BATCHES, progress=False)

    expected = sample(tiny, 24)
    with pretended(tiny) as (there, waits):
        counted = []
        for steps in (24, 72):
            waits.clear()
            found = sample(there, steps)
            counted.append(waits.total())
            if steps == 24:
                assert [r.token_ids for r in found] == [r.token_ids for r in expected]
    assert counted[1] - counted[0] <= (72 - 24) / 8


def test_rows_that_end_cost_no_more_waits(tiny, problems_of):
    """Rows end at nearly every check, and nine of ten rows leave the batch early."""
    sampling = Sampling(n=8, max_new_tokens=80, seed=1, details=True)
    expected = rollouts(tiny, problems_of(5), sampling, progress=False)
    assert len({r.response_tokens // 8 for r in expected}) > 4
    with pretended(tiny) as (there, waits):
        rollouts(there, problems_of(5), replace(sampling, max_new_tokens=1), engine=IN_BATCHES, progress=False)
        fixed = waits.total()
        waits.clear()
        found = rollouts(there, problems_of(5), sampling, engine=IN_BATCHES, progress=False)
        assert waits.total() - fixed <= max(r.response_tokens for r in expected) / 8
    assert [r.token_ids for r in found] == [r.token_ids for r in expected]


def test_rules_wait_once_per_step(tiny, problems_of):
    """They run on the CPU, so they need every token; what they place goes back without waiting."""
    counted = []
    with pretended(tiny) as (there, waits):
        for steps in (24, 72):
            waits.clear()
            condition = Condition(endless(there), rules=(Budget(10),))
            rollouts(condition, problems_of(2), Sampling(max_new_tokens=steps), engine=IN_BATCHES, progress=False)
            counted.append(waits.total())
    assert counted[1] - counted[0] <= (72 - 24) * (1 + 1 / 8)


# --- reading -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shallow_and_deep() -> list[LM]:
    return [model_of_type("llama", num_hidden_layers=layers) for layers in (2, 6)]


def waits_of(models: list[LM], run) -> list[int]:
    counted = []
    for lm in models:
        with pretended(lm) as (there, waits):
            run(there)
            counted.append(waits.total())
    return counted


def test_reading_attention_waits_neither_per_layer_nor_per_chunk(shallow_and_deep, monkeypatch, ids):
    def run(lm):
        attention.read(lm, ids.tolist(), [Span(4, 18), Span(6, 19)], lambda rows: None)

    base = waits_of(shallow_and_deep, run)
    monkeypatch.setattr(attention, "ROW_NUMBERS", 1)
    assert len({*base, *waits_of(shallow_and_deep, run)}) == 1


def test_measuring_retrieval_heads_does_not_wait_per_layer(shallow_and_deep, rollout_of):
    examples = [needles.Example(rollout_of(6, seed=i, prompt=9), Span(2, 5), Span(5, 8), emitted=Span(11, 15)) for i in range(3)]
    assert len({*waits_of(shallow_and_deep, lambda lm: retrieval_heads.measure(lm, examples))}) == 1


@pytest.mark.parametrize("second", [(), ("resid_mid",)])
def test_collecting_does_not_wait_per_layer(shallow_and_deep, mixed_rollouts, by_length, second):
    def run(lm):
        collect.moments(lm, mixed_rollouts[:6], by_length, second=second)

    assert len({*waits_of(shallow_and_deep, run)}) == 1


def test_looking_for_weights_that_are_not_finite_waits_once(shallow_and_deep):
    assert waits_of(shallow_and_deep, lambda lm: tensors.not_finite(lm.model)) == [1, 1]


def test_steering_every_layer_copies_its_vectors_at_once(shallow_and_deep):
    def run(lm):
        with edits.steering(direction_of(lm), 0.5, op="clamp", value=1.0)(lm):
            lm.body(input_ids=torch.zeros(1, 3, dtype=torch.long, device=CUDA), use_cache=False)

    plain, *_ = waits_of(
        shallow_and_deep, lambda lm: lm.body(input_ids=torch.zeros(1, 3, dtype=torch.long, device=CUDA), use_cache=False)
    )
    assert waits_of(shallow_and_deep, run) == [plain + 1] * 2
