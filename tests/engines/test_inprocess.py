"""vLLM in this process, replaced by a small library with the documented classes, which samples with the toolkit's own loop."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from servers import adapted, sample

from toolkit import edits, engines, evaluate, generate, jobs, shipped
from toolkit import lm as lms
from toolkit.engines import CannotSampleError, EngineError, connect, inprocess
from toolkit.engines.inprocess import InProcessVLLM
from toolkit.generate import Sampling
from toolkit.lm import LM, Condition
from toolkit.types import HeadEdit, Plan

GREEDY = Sampling(n=2, temperature=0.0, max_new_tokens=50)


@dataclass(kw_only=True)
class SamplingParams:
    n: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    max_tokens: int
    stop_token_ids: list[int]
    logprobs: int | None
    detokenize: bool


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


@pytest.fixture
def library(monkeypatch, tiny):
    """Modules ``vllm`` and ``vllm.lora.request``; what ``vllm.LLM`` serves can be replaced."""
    serves = SimpleNamespace(lm=tiny, loads=[], adapters=[])

    class LLM:
        def __init__(self, *, model: str, revision: str | None, dtype: str, generation_config: str, **lora: Any) -> None:
            assert generation_config == "vllm" and set(lora) in ({"enable_lora", "max_lora_rank", "max_loras"}, set())
            self.takes_adapters = lora.get("enable_lora", False)
            serves.loads.append((model, dtype))

        def generate(self, prompts: list[dict], params: list[SamplingParams], *, use_tqdm: bool, lora_request: LoRARequest | None):
            lm = serves.lm
            if lora_request is not None:
                assert self.takes_adapters
                serves.adapters.append(lora_request.lora_name)
                lm = adapted(lm, lora_request.lora_path)
            results = []
            for prompt, p in zip(prompts, params, strict=True):
                settings = Sampling(p.n, p.temperature, p.top_p, p.top_k, p.max_tokens, seed=p.seed, details=True)
                tokens, stopped, logprobs = sample(lm, prompt["prompt_token_ids"], settings)
                rows = (
                    [{t: SimpleNamespace(logprob=v)} for t, v in zip(tokens, logprobs, strict=True)]
                    if p.logprobs is not None
                    else None
                )
                output = SimpleNamespace(token_ids=tuple(tokens), finish_reason="stop" if stopped else "length", logprobs=rows)
                results.append(SimpleNamespace(outputs=[output]))
            return results

    vllm, request = ModuleType("vllm"), ModuleType("vllm.lora.request")
    vllm.LLM, vllm.SamplingParams, request.LoRARequest = LLM, SamplingParams, LoRARequest
    for name, module in (("vllm", vllm), ("vllm.lora", ModuleType("vllm.lora")), ("vllm.lora.request", request)):
        monkeypatch.setitem(sys.modules, name, module)
    return serves


def without_a_head(lm):
    return edits.apply(lm, Plan((HeadEdit(2, 1, "scale", 1.0),), None, "off", lm.provenance()))


def test_rollouts_equal_those_of_the_own_loop_and_the_model_is_loaded_once(library, tiny, problems_of, tmp_path, monkeypatch):
    monkeypatch.setattr(inprocess, "HALF", (torch.float32,))  # the library of this file computes with adapters in fp32 too
    engine = connect("vllm", tiny, adapters=tmp_path)
    for lm in (tiny, without_a_head(tiny)):
        found = generate.rollouts(lm, problems_of(3), GREEDY, engine=engine, progress=False)
        assert found == generate.rollouts(lm, problems_of(3), GREEDY, progress=False)
    assert library.loads == [(str(shipped.path_of("tiny-reasoner")), "float32")] and library.adapters


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_edit_of_a_model_in_half_precision_is_sampled_as_an_adapter(dtype, library, problems_of, tmp_path):
    half = lms.load("tiny-reasoner", device="cpu", dtype=dtype)
    library.lm = half
    engine = connect("vllm", half, tolerance=0.2, adapters=tmp_path)
    found = generate.rollouts(without_a_head(half), problems_of(2), GREEDY, engine=engine, progress=False)
    assert len(found) == 4 and library.adapters


def test_an_edit_of_a_model_in_fp32_is_refused_before_anything_is_sampled(library, tiny, problems_of, tmp_path):
    engine = connect("vllm", tiny, adapters=tmp_path)
    conditions = {"base": tiny, "edited": without_a_head(tiny)}
    for attempt in (
        lambda: jobs.extraction_rollouts(tiny, jobs.Study(problems=20, samples=2), engine=engine),
        lambda: evaluate.compare(conditions, problems_of(2), GREEDY, engine=engine, progress=False),
    ):
        with pytest.raises(CannotSampleError, match=r"tiny-reasoner is in float32: load it with --dtype bfloat16"):
            attempt()
    assert not library.loads and not engine.takes_adapters
    assert len(generate.rollouts(tiny, problems_of(2), GREEDY, engine=engine, progress=False)) == 4, (
        "the base model is sampled in fp32"
    )


def test_other_weights_are_refused(library, tiny, problems_of, tmp_path):
    library.lm = without_a_head(tiny)
    with pytest.raises(EngineError, match="does not compute tiny-reasoner"):
        generate.rollouts(tiny, problems_of(3), GREEDY, engine=connect("vllm", tiny, tolerance=0.02), progress=False)


def test_interventions_are_refused_before_the_model_is_loaded(library, tiny, problems_of):
    ruled = Condition(tiny, rules=(lambda lm, reader, token: None,), note="budget 10")
    with pytest.raises(EngineError, match=r"budget 10.*own loop"):
        generate.rollouts(ruled, problems_of(3), GREEDY, engine=connect("vllm", tiny), progress=False)
    assert not library.loads


@pytest.mark.parametrize("asked", [{}, {"gpu_memory_utilization": 0.5}])
def test_on_a_gpu_vllm_takes_of_the_memory_that_the_base_model_leaves_free(asked, library, tiny, monkeypatch):
    monkeypatch.setattr(sys.modules["vllm"], "LLM", lambda **settings: settings)
    assert "gpu_memory_utilization" not in InProcessVLLM(tiny).llm, "not on a CPU"
    monkeypatch.setattr(LM, "device", property(lambda lm: torch.device("cuda:0")))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * 2**30, 80 * 2**30))
    settings = InProcessVLLM(tiny, options=asked).llm
    assert settings["gpu_memory_utilization"] == pytest.approx(asked.get("gpu_memory_utilization", 0.95 * 60 / 80), abs=1e-3)


def test_a_base_model_whose_weights_are_in_no_directory_is_refused(library, tiny, tmp_path):
    adapter, base = tmp_path / "adapter", tmp_path / "base"
    adapter.mkdir()
    for lm in (without_a_head(tiny), replace(tiny, name=str(adapter), folder=base)):
        with pytest.raises(EngineError, match=r"made in this process from those of another model\. Save them"):
            _ = InProcessVLLM(lm).llm
    assert not library.loads


def test_without_the_library_the_error_says_what_to_install(tiny, problems_of, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match="pip install vllm"):
        generate.rollouts(tiny, problems_of(1), GREEDY, engine=connect("vllm", tiny), progress=False)


def test_the_own_loop_is_named_ours(tiny):
    assert connect("ours") is engines.OWN_LOOP
