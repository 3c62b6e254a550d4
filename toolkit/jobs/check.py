"""Check a model, a problem file and rollouts before any long work: the command ``toolkit check``."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from toolkit import generate, store, tasks, tensors
from toolkit import lm as lms
from toolkit.generate import Sampling
from toolkit.jobs.study import check_header
from toolkit.lm import LM
from toolkit.types import Problem

TRIED = 10  # tokens that are decoded to measure the speed
EXAMPLE = Problem("example", ({"role": "user", "content": "What is 12 + 3?"},), "15")
SAMPLED = (32, 4096)  # rows and tokens of the batch for which memory is estimated


@dataclass
class Findings:
    """Result of ``check``.

    Attributes:
        facts: Facts about the model, the problems and the rollouts: title of a section -> name of a quantity -> its value as text. A title
            is, for example, ``"memory, estimated"``.
        limits: One sentence per feature of the toolkit that does not work with this model. The sentence gives the reason.
        faults: Reasons why the model, the problems or the rollouts cannot be used, one sentence each. Empty if there are none.
    """

    facts: dict[str, dict[str, str]] = field(default_factory=dict)
    limits: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @property
    def go(self) -> bool:
        """True if there are no faults: the model, the problems and the rollouts can be used."""
        return not self.faults


def check(lm: LM, *, problems: str | None = None, rollouts: str | Path | None = None) -> Findings:
    """Check a loaded model, and optionally problems and rollouts to use with it. Return the facts, limits and faults as ``Findings``.

    Args:
        lm: The model.
        problems: Name of a task, or path of a JSONL file of problems. Up to five test problems are loaded, and their prompts are
            tokenized. If this fails, the error becomes a fault and is not raised.
        rollouts: Directory of rollouts. Rollouts that cannot be read are a fault, and so are rollouts from other weights than those of
            ``lm``.
    """
    findings = Findings()
    findings.facts["model"] = dict(_model(lm))
    findings.facts["thinking"] = dict(_thinking(lm))
    findings.facts["checks (largest deviation)"] = _exactness(lm)
    findings.facts["memory, estimated"] = dict(_memory(lm))
    if lm.tokenizer.chat_template:
        findings.facts["speed"] = {f"{TRIED} tokens, one row": f"{_speed(lm):.3g} tokens per second"}
    findings.limits += _limits(lm)
    if problems is not None:
        findings.facts["problems"] = _problems(lm, problems, findings.faults)
    if rollouts is not None:
        findings.facts["rollouts"] = _rollouts(lm, Path(rollouts), findings.faults)
    return findings


def _model(lm: LM) -> Iterator[tuple[str, str]]:
    layout, config = lm.layout, lm.model.config.get_text_config()
    how = tensors.storage(lm.model)
    yield "name", lm.name
    yield "family", f"{layout.row.family} ({config.model_type})"
    numbers = str(lm.model.dtype).removeprefix("torch.") + (f" ({how})" if how else "")
    yield "weights", f"{lm.model.num_parameters() / 1e6:,.1f} million, {numbers}, {_gb(_bytes(lm))}, computed on {lm.device}"
    yield "layers", f"{layout.n_layers}, d_model {layout.d_model}, vocabulary {lm.vocab_size:,}"
    heads = [f"{n} of {size}" if n else "none" for n, size in zip(layout.heads, layout.head_dims, strict=True)]
    yield "attention heads", "; ".join(f"{value} in {_ranges(heads, value)}" for value in dict.fromkeys(heads))
    yield "context", f"{lm.context or 'not limited by the config'}"
    yield "attention function", str(layout.attention.config._attn_implementation)
    yield "fingerprint", lm.fingerprint[:16]


def _ranges(values: Sequence[str], value: str) -> str:
    """Return text such as ``layers 0-2, 4``: the numbers of the layers that have a given value.

    Args:
        values: One value per layer.
        value: The value to look for.
    """
    runs: list[list[int]] = []
    for layer in (layer for layer, each in enumerate(values) if each == value):
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return "layers " + ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _thinking(lm: LM) -> Iterator[tuple[str, str]]:
    yield "tags", lm.thinking
    yield "ends with", ", ".join(repr(lm.text([token])) for token in sorted(lm.eos_ids)) or "nothing: no end-of-sequence token"
    if lm.tokenizer.chat_template:
        yield "a prompt", lm.prompt_text(EXAMPLE.messages)


def _exactness(lm: LM) -> dict[str, str]:
    """Run the checks of ``toolkit.qualify`` on random tokens. Return a dict from the name of a check to its largest deviation, as text.

    The largest deviation is taken over all layers. In most checks it is the largest error of the activations or logits, divided by the
    largest expected value.

    Checks whose names end in "is causal" are left out, since their numbers are not errors. They perturb activations and measure how much
    the logits change.
    """
    worst: dict[str, float] = {}
    for result in lms.qualify(lm):
        name = result.name.lstrip("0123456789 ")  # without a leading number, so that all layers share one entry
        if not name.endswith("is causal"):  # these measure how much the logits change, so a large number is good
            worst[name] = max(worst.get(name, 0.0), result.value)
    return {name: f"{value:.1e}" if value else "0" for name, value in worst.items()}


@dataclass(frozen=True)
class Shape:
    """Sizes of a model that determine how much memory it needs.

    Attributes:
        weights: Number of weights.
        held: Size of the weights in bytes, as they are stored: packed if they are quantised.
        size: Bytes that one number of the model's dtype takes, such as 2 for bfloat16.
        cached: Bytes that one token takes in the KV cache, all layers together.
    """

    weights: int
    held: int
    size: int
    cached: int


def shape_of(lm: LM) -> Shape:
    """Return the sizes of a model."""
    config, layout, size = lm.model.config.get_text_config(), lm.layout, lm.model.dtype.itemsize
    kv_heads = getattr(config, "num_key_value_heads", None) or layout.n_heads
    cached = 2 * kv_heads * sum(layout.head_dims) * size  # 2: keys and values
    return Shape(lm.model.num_parameters(), _bytes(lm), size, cached)


def memory(shape: Shape, *, rows: int = SAMPLED[0], tokens: int = SAMPLED[1]) -> dict[str, float]:
    """Return a dict with estimates of the memory, in bytes, that loading, sampling and training take. Nothing is run.

    Its keys name the work, such as ``"GRPO, LoRA"``. The estimates for training (``GRPO``) do not include activations.

    Args:
        shape: Sizes of the model, from ``shape_of``.
        rows: Number of responses that are sampled together.
        tokens: Largest number of tokens of a response, prompt included.
    """
    loaded = 1.1 * shape.held  # 10 % above the size of the weights
    # Bytes per weight as in the docstring of ``grpo.run``. 20: weight, gradient and Adam's moments in fp32 (16), and the initial model (4).
    # LoRA: the frozen weights and the initial model; the adapter itself is small.
    return {
        "loading, steering, directions": loaded,
        f"sampling {rows} rows of {tokens:,} tokens": loaded + rows * tokens * shape.cached,
        "GRPO, all weights": 20 * shape.weights,
        "GRPO, LoRA": 2 * shape.size * shape.weights,
    }


def _memory(lm: LM) -> Iterator[tuple[str, str]]:
    """Yield the estimates of ``memory`` as pairs of texts, such as ``("GRPO, LoRA", "0.60 GB")``.

    Quantised or offloaded models cannot be trained. For them the estimates for GRPO are left out.
    """
    fixed = tensors.storage(lm.model)
    yield from ((name, _gb(size)) for name, size in memory(shape_of(lm)).items() if not (fixed and name.startswith("GRPO")))


def _bytes(lm: LM) -> int:
    """Return the size of the weights in bytes, as they are stored: packed if they are quantised."""
    return sum(p.numel() * p.element_size() for p in lm.model.parameters())


def _gb(size: float | int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e7 else f"{size / 1e6:,.2f} MB"


def _speed(lm: LM) -> float:
    """Return the decoding speed for a single response, in tokens per second, measured on ten tokens after a warm-up."""
    generate.rollouts(lm, [EXAMPLE], Sampling(1, temperature=0.0, max_new_tokens=1), progress=False)
    began = time.perf_counter()
    (response,) = generate.rollouts(lm, [EXAMPLE], Sampling(1, temperature=0.0, max_new_tokens=TRIED), progress=False)
    return response.response_tokens / (time.perf_counter() - began)


def _limits(lm: LM) -> list[str]:
    layout = lm.layout
    limits = []
    if without := [layer for layer in range(layout.n_layers) if layer not in layout.attention_layers]:
        names = ", ".join(sorted({type(layout.blocks[layer].attention).__name__ for layer in without}))
        limits.append(f"{len(without)} of {layout.n_layers} layers have no attention heads ({names}): head methods skip them.")
    if lm.tags is None:
        limits.append("No think tags: methods that need a think span refuse the model. Use --think OPEN,CLOSE or --think response.")
    if not lm.tokenizer.chat_template:
        limits.append("No chat template: prompts cannot be built. Set tokenizer.chat_template.")
    if not lm.caches_keys:
        limits.append(
            "Its cache does not hold keys and values (latent attention): decoding uses the model's own, slower attention."
        )
    if how := tensors.storage(lm.model):
        limits.append(
            f"The weights are {how}: editing them and training are refused. Edit at run time, or as an adapter of rank 1."
        )
    if lm.model.dtype != torch.float32:
        limits.append("Half precision: logits of cached steps agree to about 1 %, and sampled responses may depend on the batch.")
    return limits


def _problems(lm: LM, name: str, faults: list[str]) -> dict[str, str]:
    try:
        loaded = tasks.load(name, "test", 5, lm=lm)
        longest = max(len(lm.prompt_ids(p.messages)) for p in loaded)
    except (ValueError, OSError, ImportError, KeyError) as error:
        faults.append(f"problems: {error}")
        return {"source": name, "first fault": str(error)}
    return {
        "source": name,
        "test problems looked at": str(len(loaded)),
        "longest of their prompts": f"{longest} tokens",
        "first": loaded[0].messages[-1]["content"],
    }


def _rollouts(lm: LM, folder: Path, faults: list[str]) -> dict[str, str]:
    try:
        header, count = store.load_header(folder), store.count_rollouts(folder)
    except (ValueError, OSError) as error:
        faults.append(f"rollouts: {error}")
        return {"folder": str(folder), "fault": str(error)}
    facts = {"folder": str(folder), "rollouts": str(count)}
    try:
        check_header(header, folder, lm)
    except store.WrongModelError as error:
        faults.append(f"rollouts: {error}")
        return {**facts, "sampled from this model, with its think tags": "no"}
    return {**facts, "sampled from this model, with its think tags": "yes"}
