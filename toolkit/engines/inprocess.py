"""vLLM in this process (``--engine vllm``). Untested with the real library, which needs a GPU.

Source: ``vllm/entrypoints/llm.py``, ``vllm/sampling_params.py`` and ``vllm/lora/request.py``. The tests use a small replacement of the
library that has the classes of these files.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from toolkit import shipped
from toolkit.engines.adapter import LARGEST, save_difference
from toolkit.engines.base import CannotSampleError, Request, Response
from toolkit.engines.probing import PROBE, Probe, check_unmodified, chosen_prompts, complete
from toolkit.engines.wire import Sampled, Served, seed_of
from toolkit.lm import LM, Condition
from toolkit.memory import release
from toolkit.sampling import Sampling

CHUNK = 512  # responses that are sampled together and then stored
HALF = (torch.float16, torch.bfloat16)  # dtypes in which vLLM computes with adapters: its GPU kernels for LoRA refuse all others
FREE = 0.95  # part of the free memory of a GPU that vLLM may take; the base model of the conditions is on the GPU already


@dataclass(frozen=True)
class InProcessVLLM:
    """The engine that samples with vLLM in this process. vLLM holds a second copy of the base model, loaded from its directory or hub id.

    Edited and trained models are loaded as LoRA adapters of the base model (see ``adapter.save_difference``).

    Attributes:
        base: Base model of the conditions.
        tolerance: Largest allowed mean absolute difference between the log-probabilities of vLLM and of the condition's model, in nats per
            token.
        adapters: Directory in which adapters are saved.
        options: Further arguments of ``vllm.LLM``. If the base model is on a GPU, the default of ``gpu_memory_utilization`` is ``FREE`` of
            the memory that is free, as a share of all memory: vLLM's own default, 0.9, does not fit beside the base. Not tested on a GPU.
    """

    base: LM
    tolerance: float = 0.05
    adapters: Path = Path("runs/adapters")
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    name = "vllm in this process"

    @property
    def takes_adapters(self) -> bool:
        """Whether vLLM can compute with adapters in the dtype of the base model (see ``HALF``)."""
        return self._dtype in HALF

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.base.model.parameters()).dtype

    @property
    def header(self) -> Mapping[str, str]:
        """``{"engine": "vllm"}``: the header of rollouts is the same as with a vLLM server."""
        return {"engine": "vllm"}

    def check(self, condition: Condition, sampling: Sampling) -> None:
        """Check that vLLM can sample from a condition.

        Raises:
            CannotSampleError: the condition has interventions or decoding rules; or ``sampling.details`` asks for entropies; or the
                condition's model is edited or trained and the base model is not in half precision.
        """
        check_unmodified(condition, sampling, self.name)
        if condition.lm.fingerprint != self.base.fingerprint:
            self.check_edits()

    def check_edits(self) -> None:
        """Raise CannotSampleError if the base model is not in half precision, in which alone vLLM computes with adapters."""
        if not self.takes_adapters:
            raise CannotSampleError(
                f"vLLM samples edited and trained models as adapters, and computes with adapters only in float16 or bfloat16, but {self.base.name} "
                f"is in {str(self._dtype).removeprefix('torch.')}: load it with --dtype bfloat16, or use the toolkit's own loop (no --engine)."
            )

    def session(self, condition: Condition, requests: Sequence[Request], sampling: Sampling) -> _Session:
        """Load the base model into vLLM, if that has not happened yet. Return a session that samples responses from the condition.

        Raises:
            ImportError: vLLM is not installed.
            CannotSampleError: as in ``check``; or vLLM's log-probabilities differ from those of the condition's model.
            EngineError: as in ``adapter.save_difference``.
        """
        self.check(condition, sampling)
        lm, adapter = condition.lm, None
        if lm.fingerprint != self.base.fingerprint:
            folder = save_difference(self.base, lm, self.adapters / f"toolkit-{self.base.fingerprint[:8]}-{lm.fingerprint[:16]}")
            number = int(lm.fingerprint[:7], 16) + 1  # vLLM knows adapters by a positive number
            adapter = self._library("vllm.lora.request").LoRARequest(folder.name, number, str(folder.resolve()))
        session = _Session(self, lm, adapter, sampling)
        prompts = chosen_prompts(requests)
        sampled = session.responses(prompts, PROBE, logprobs=True)
        probe = Probe(Served("base" if adapter is None else adapter.lora_name), prompts, sampled)
        difference = probe.divergence(lm)
        if not difference <= self.tolerance or (adapter is not None and probe.verdict(self.base, lm) == "other"):
            raise CannotSampleError(
                f"vLLM does not compute {lm.name}: log-probabilities of {probe.tokens} sampled tokens differ by {difference:.3f} nats per token "
                f"(at most {self.tolerance} expected), or do not show the edit. Load the model in the dtype that vLLM uses, or "
                "use the toolkit's own loop."
            )
        return session

    @cached_property
    def llm(self) -> Any:
        """The ``vllm.LLM``, loaded when it is first used.

        Raises:
            CannotSampleError: the weights of the base model are in no directory, since it was made from another model.
        """
        name, folder = self.base.name, self.base.folder
        # The folder of such a model, as that of an adapter that was merged, is the folder of the model that it was made from.
        merged = folder is not None and Path(name).is_dir() and Path(name).resolve() != folder.resolve()
        if self.base.parent is not None or merged:
            raise CannotSampleError(
                f"vLLM loads its base model from a directory, but the weights of {name} were made in this process from those of another model. "
                "Save them (lm.save), load that directory as the base, and connect again."
            )
        source = str(shipped.path_of(name) if name in shipped.COMPLETE else self.base.folder or name)
        # generation_config="vllm": without it, vLLM takes defaults from the model's generation config.
        settings: dict[str, Any] = {"dtype": str(self._dtype).removeprefix("torch."), "generation_config": "vllm"}
        if self.takes_adapters:
            settings |= {"enable_lora": True, "max_lora_rank": LARGEST, "max_loras": 2}
        if self.base.device.type == "cuda":
            release()
            free, total = torch.cuda.mem_get_info(0)  # of the GPU that vLLM takes
            settings["gpu_memory_utilization"] = round(FREE * free / total, 3)
        return self._library("vllm").LLM(model=source, revision=self.base.revision, **settings | dict(self.options))

    def _library(self, name: str) -> Any:
        try:
            return importlib.import_module(name)
        except ImportError as error:
            raise ImportError(f"--engine vllm needs vLLM, which is not installed here: pip install vllm ({error}).") from error


@dataclass(frozen=True)
class _Session:
    engine: InProcessVLLM
    lm: LM
    adapter: Any
    sampling: Sampling

    @property
    def serves(self) -> str:
        return "base" if self.adapter is None else str(self.adapter.lora_name)

    def sample(self, requests: Sequence[Request], tick: Callable[[int], Any]) -> Iterator[list[tuple[int, Response]]]:
        for start in range(0, len(requests), CHUNK):
            chunk = requests[start : start + CHUNK]
            sampled = self.responses(chunk, self.sampling, logprobs=False)
            tick(len(chunk))
            yield [(start + i, complete(self.lm, s, self.sampling.max_new_tokens)) for i, s in enumerate(sampled)]

    def responses(self, requests: Sequence[Request], sampling: Sampling, *, logprobs: bool) -> list[Sampled]:
        """Sample one response per request, and return the responses in order.

        Args:
            requests: The requests.
            sampling: Sampling settings.
            logprobs: True to return log-probabilities too.
        """
        library = self.engine._library("vllm")
        settings = [
            library.SamplingParams(
                n=1,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                min_p=0.0,
                repetition_penalty=1.0,
                presence_penalty=0.0,
                frequency_penalty=0.0,
                seed=seed_of(request, sampling),
                max_tokens=sampling.max_new_tokens,
                stop_token_ids=sorted(self.lm.eos_ids),
                logprobs=0 if logprobs else None,
                detokenize=False,
            )
            for request in requests
        ]
        prompts = [{"prompt_token_ids": list(request.prompt)} for request in requests]
        results = self.engine.llm.generate(prompts, settings, use_tqdm=False, lora_request=self.adapter)
        outputs = [result.outputs[0] for result in results]
        return [
            Sampled(
                list(o.token_ids),
                o.finish_reason == "stop",
                [row[token].logprob for row, token in zip(o.logprobs, o.token_ids, strict=True)] if logprobs else [],
            )
            for o in outputs
        ]
