"""Fixtures shared by the tests: cached models, made-up rollouts, problems of the tiny reasoner's own kind.

Models are never modified by the toolkit, so one copy of each serves the whole session; ``test_edits.py`` proves that
they are not. A test that trains takes a copy. After each file, the shared models are checked.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import pytest
import torch
from families import FAMILIES, family
from hypothesis import settings

from toolkit import lm as lms
from toolkit.lm import LM
from toolkit.types import Problem, Provenance, Rollout, Span

settings.register_profile("toolkit", max_examples=25, deadline=None, derandomize=True)
settings.load_profile("toolkit")
torch.set_num_threads(1)

THINK_OPEN, THINK_CLOSE, END = "<think>", "</think>", "<|end|>"


SHARED: list[tuple[LM, tuple]] = []  # models that serve all tests of a process, each with its state when it was made


STATE = "weights", "what is trained", "modes", "hooks"


def state_of(lm: LM) -> tuple:
    """Return what a test must leave as it was: weights, what is trained, modes and hooks."""
    weights = hashlib.blake2b()
    for weight in lm.model.state_dict().values():
        weights.update(weight.contiguous().view(torch.uint8).numpy())
    hooks = [hook for m in lm.model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    # transformers leaves its own hooks on a model that was once asked for attention weights or hidden states.
    left = sum(not getattr(hook, "__module__", "").startswith("transformers.") for hook in hooks)
    checkpointing = any(getattr(m, "gradient_checkpointing", False) for m in lm.model.modules())
    modes = lm.model.training, checkpointing, getattr(lm.model.config, "use_cache", None)
    return weights.hexdigest(), [p.requires_grad for p in lm.model.parameters()], modes, left


def shared(lm: LM) -> LM:
    """Return a model, and remember how it is."""
    SHARED.append((lm, state_of(lm)))
    return lm


@pytest.fixture(scope="module", autouse=True)
def denormal_numbers_stay():
    """Undo for the files after this one that a training script of ``data/``, run in this process, rounded denormal numbers to zero."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(scope="module", autouse=True)
def shared_models_are_left_as_they_were():
    """Fail after a file whose tests changed a shared model: tests of other files would fail for it."""
    yield
    changed = []
    for i, (lm, state) in enumerate(SHARED):
        SHARED[i] = lm, state_of(lm)  # the files after this one are judged by what they change themselves
        differs = [part for part, old, new in zip(STATE, state, SHARED[i][1], strict=True) if old != new]
        if differs:
            changed.append(f"{lm.name} ({', '.join(differs)})")
    assert not changed, f"tests of this file changed a shared model: {'; '.join(changed)}. Use a copy of it there"


@cache
def _family(name: str, dtype: torch.dtype = torch.float32) -> LM:
    return shared(family(name, dtype=dtype))


@pytest.fixture(scope="session")
def tiny() -> LM:
    """The shipped tiny reasoner."""
    return shared(lms.load("tiny-reasoner", device="cpu"))


@pytest.fixture(scope="session")
def model_of(tiny: LM) -> Callable[..., LM]:
    """``model_of(name, dtype)``: a cached tiny random model of a family, or the tiny reasoner."""

    def find(name: str, dtype: torch.dtype = torch.float32) -> LM:
        return tiny if name == "tiny-reasoner" else _family(name, dtype)

    return find


@pytest.fixture(params=FAMILIES)
def lm(request, model_of) -> LM:
    """One tiny random model of every family."""
    return model_of(request.param)


@pytest.fixture(params=[*FAMILIES, "tiny-reasoner"])
def any_lm(request, model_of) -> LM:
    """One tiny random model of every family, and the tiny reasoner."""
    return model_of(request.param)


@pytest.fixture(scope="session")
def llama(model_of) -> LM:
    return model_of("llama")


@pytest.fixture
def ids() -> torch.Tensor:
    """Two sequences of 20 tokens: longer than the sliding windows of the tiny models."""
    return torch.randint(5, 103, (2, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def token() -> Callable[[str], int]:
    """Id of a special token of the shared tokenizer."""
    from families import tokenizer

    return lambda text: tokenizer().convert_tokens_to_ids(text)


@pytest.fixture(scope="session")
def problems_of() -> Callable[..., list[Problem]]:
    """``problems_of(n)``: sums in the tiny reasoner's alphabet, of clearly different prompt lengths."""

    def make(n: int = 4, seed: int = 0) -> list[Problem]:
        rng = random.Random(seed)
        found = []
        for i in range(n):
            values = [rng.randint(1, 99) for _ in range(2 + i % 5)]
            content = "+".join(map(str, values)) + "=?"
            meta = {"task": "arithmetic", "difficulty": len(values)}
            found.append(Problem(f"p{i}", ({"role": "user", "content": content},), str(sum(values)), meta))
        return found

    return make


@pytest.fixture(scope="session")
def rollout_of(token) -> Callable[..., Rollout]:
    """``rollout_of(think=n)``: a closed rollout with n random think tokens, spans as ``generate`` would set them."""

    def make(think: int, *, seed: int = 0, prompt: int = 5, name: str = "p", closed: bool = True) -> Rollout:
        rng = random.Random(f"{seed}-{think}-{name}")
        text = [rng.randrange(10, 103) for _ in range(prompt + think + 3)]
        head, middle, tail = text[:prompt], text[prompt : prompt + think], text[prompt + think :]
        ids = [*head, token(THINK_OPEN), *middle, *([token(THINK_CLOSE), *tail, token(END)] if closed else [])]
        start = prompt + 1
        return Rollout(
            problem_id=name,
            sample=0,
            token_ids=tuple(ids),
            prompt_len=prompt,
            think=Span(start, start + think),
            answer=Span(start + think + 1, len(ids) - 1) if closed else None,
            finish="stop" if closed else "length",
            text="",
            correct=False,
        )

    return make


@pytest.fixture(scope="session")
def mixed_rollouts(rollout_of) -> Sequence[Rollout]:
    """Ten short (3-7 tokens) and ten long (20-40 tokens) closed rollouts, and some that belong to no class."""
    short = [rollout_of(3 + i % 5, seed=i, prompt=4 + i % 3, name=f"s{i}") for i in range(10)]
    long = [rollout_of(20 + 2 * i, seed=i, prompt=4 + i % 3, name=f"l{i}") for i in range(10)]
    neither = [rollout_of(12, name="m"), rollout_of(30, name="open", closed=False), rollout_of(0, name="empty")]
    mixed = [*short, *long, *neither]
    random.Random(0).shuffle(mixed)
    return tuple(mixed)


@pytest.fixture(scope="session")
def by_length() -> Callable[[Rollout], str | None]:
    """Classes of :func:`mixed_rollouts`, in plain words."""

    def label(r: Rollout) -> str | None:
        if not r.closed:
            return None
        return "short" if r.think_tokens < 10 else "long" if r.think_tokens > 15 else None

    return label


@pytest.fixture
def outcomes() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Correctness and lengths, ``[20 problems, 4 samples]``, by condition."""
    rng = np.random.default_rng(0)
    lengths = {name: rng.integers(1, 99, (20, 4)) for name in ("base", "edited")}
    correct = {name: rng.random((20, 4)) < p for name, p in (("base", 0.4), ("edited", 0.8))}
    return correct, lengths


@pytest.fixture(scope="session")
def provenance() -> Provenance:
    return Provenance("tiny llama", None, "f" * 64, "0123456789abcdef", "0.1.0", 3, {"split": "dev", "n": [1, 2]})
