"""Recipes: everything a paper's training is made of, as one value that can be printed, compared and changed with ``replace``.

``recipes.dler()`` has the paper's numbers, each with its source in ``sources``; ``recipes.dler().scaled()`` is the same method in the size
of the tiny reasoner (16 problems x 8 samples a step, responses of at most 200 tokens, a learning rate found on its dev split): every
number it changes is ours. ``recipes.ALL`` lists them; a reward without a recipe of its own trains with plain GRPO (:func:`plain`).

Units: lengths are tokens, learning rates are Adam's. Where a paper's number was not found, the reward's own default (named
``assumed_...`` there) or TRL's stands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from toolkit import rewards
from toolkit.grpo import advantages
from toolkit.grpo.draws import Curriculum, Dynamic, Modes
from toolkit.grpo.losses import DRPO, ModeSwitch
from toolkit.rewards.laser_targets import TargetSettings

TINY_TOKENS = 200  # longest response of the scaled presets; the tiny reasoner's longest are about 150
TINY_RATE = 3e-4
TINY_LIMITS = {"dler": 40, "da_dler": 40}  # their truncation is the budget of a response
TINY_TARGETS = TargetSettings(base=16, step=8, longest=TINY_TOKENS, every=10, problems=32)
TINY_OPTIONS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "cosine": {"longest": TINY_TOKENS},
        "da_dler": {"tiers": ((0.0, 40), (0.5, 24))},
        "dler": {"target": 40},
        "laser": {"target": 24},
        "laser_d": {"targets": TINY_TARGETS},
        "laser_de": {"targets": TINY_TARGETS},
        "length_penalty": {"longest": 20},  # a token costs 5 % of a right answer
        "length_penalty_mild": {"longest": 20},  # 2.5 %
        "surrogate": {"longest": 80},  # best paid at 40
        "truncation": {"target": 40},
    }
)
"""Lengths in tokens for responses of 7 to 150, by recipe; the rewards' other options are the papers'."""
TINY_PROMPTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "adaptive_deep_reasoning": {"modes": Modes(long=" please", short=" quick")},
        "train_long_think_short": {"curriculum": Curriculum(start=48, every=25, text=" {budget}")},  # to 16 in 100 steps
    }
)
"""What is added to a question, by recipe: the tiny reasoner knows a few words, and a sentence it never saw throws it off."""


@dataclass(frozen=True)
class Recipe:
    """One way to train.

    Attributes:
        name: What runs and logs are called.
        paper: arXiv id, or "" for ours.
        reward: Name in ``rewards.ALL``.
        options: Arguments of that reward.
        advantage: Name in ``advantages.ALL``; ``None`` leaves the advantages to TRL (``scale_rewards`` in ``config``).
        loss: ``None`` for TRL's (``loss_type`` in ``config``).
        dynamic: Dynamic sampling, or ``None``.
        curriculum: Budget in the prompt, or ``None``.
        modes: Long and short mode, or ``None``.
        switch: Mode-switching loss, or ``None``.
        problems: Problems a generation, over all processes.
        samples: Samples a problem, G in the papers.
        max_tokens: Longest response, tokens.
        learning_rate: Adam's, constant.
        updates: Optimizer steps that share a generation (its batch over the mini-batch).
        config: Further fields of TRL's ``GRPOConfig``.
        sources: Where the numbers come from, and what is ours.
    """

    name: str
    paper: str
    reward: str
    options: Mapping[str, Any] = field(default_factory=dict)
    advantage: str | None = None
    loss: DRPO | None = None
    dynamic: Dynamic | None = None
    curriculum: Curriculum | None = None
    modes: Modes | None = None
    switch: ModeSwitch | None = None
    problems: int = 16
    samples: int = 8
    max_tokens: int = 4096
    learning_rate: float = 1e-6
    updates: int = 1
    config: Mapping[str, Any] = field(default_factory=dict)
    sources: str = ""

    def __post_init__(self) -> None:
        if self.reward not in rewards.ALL:
            raise ValueError(f"Unknown reward {self.reward!r}: choose one of {', '.join(rewards.ALL)}.")
        if self.advantage is not None and self.advantage not in advantages.ALL:
            raise ValueError(f"Unknown advantage {self.advantage!r}: choose one of {', '.join(advantages.ALL)}.")
        for name in ("problems", "samples", "max_tokens", "updates"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r}: give a whole number of at least 1.")
        if self.samples < 2:
            raise ValueError(f"samples={self.samples}: an advantage compares the samples of a problem, so give at least 2.")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate}: it must be positive.")
        if self.modes and self.samples % 2:
            raise ValueError(f"samples={self.samples}: half of a group thinks long and half short, so give an even number.")
        if self.switch and not self.modes:
            raise ValueError("A mode-switching loss needs modes: give modes=Modes(...).")

    def scaled(self) -> Recipe:
        """The recipe in the size of the tiny reasoner; every number changed is ours."""
        return replace(
            self,
            problems=16,
            samples=8,
            updates=1,
            max_tokens=TINY_LIMITS.get(self.name, TINY_TOKENS),
            learning_rate=TINY_RATE,
            options={**self.options, **TINY_OPTIONS.get(self.name, {})},
            loss=replace(self.loss, capacity=None) if self.loss else None,
            **TINY_PROMPTS.get(self.name, {}),
            config={k: v for k, v in self.config.items() if k not in NOT_SCALED},
        )


NOT_SCALED = ("beta", "temperature", "entropy_coef")
"""Left at TRL's defaults in the scaled presets (0, 1 and 0): no reference model, and the tiny reasoner is measured at temperature 1."""
CLIP_HIGHER = {"epsilon": 0.2, "epsilon_high": 0.28}
DUAL_CLIP = 10.0
"""Largest ratio that counts where the advantage is negative, so that a token costs at most ``10 |A|``: TRL's ``delta`` is verl's
``clip_ratio_c`` wherever it exceeds ``1 + epsilon_high``."""


def plain(reward: str, **options: Any) -> Recipe:
    """Plain GRPO with a reward: advantages scaled by group, TRL's other defaults, a token mean over the batch (DAPO's loss)."""
    entry = rewards.ALL.get(reward)
    paper = entry.paper if entry else ""
    return Recipe(
        reward, paper, reward, options, sources="GRPO as TRL's defaults have it (arXiv 2402.03300); learning rate: TRL's."
    )


def length_penalty_mild() -> Recipe:
    """The naive length penalty at half the price (ours): between no effect and collapse there is a narrow range of prices."""
    return replace(
        plain("length_penalty", alpha=0.5), name="length_penalty_mild", sources="Ours: to be compared with length_penalty."
    )


def grpo_lambda() -> Recipe:
    """GRPO-lambda (arXiv 2505.18086): only the groups with the highest accuracy are paid for brevity."""
    return Recipe(
        "grpo_lambda",
        "2505.18086",
        "grpo_lambda",
        sources="20 % of groups: a note's example. Penalty, rate, batch: not found; the reward's defaults and TRL's.",
    )


def dler(*, tokens: bool = False) -> Recipe:
    """DLER (arXiv 2510.15110): a plain truncation reward, batch-wise advantages, clip-higher, dynamic sampling.

    Args:
        tokens: Weigh the batch statistics by tokens, as the released code does, instead of by response, as the paper writes.
    """
    return Recipe(
        "dler",
        "2510.15110",
        "dler",
        advantage="dler_tokens" if tokens else "dler",
        dynamic=Dynamic(),
        problems=512,
        samples=16,
        updates=8,
        max_tokens=4000,
        learning_rate=1e-6,
        config={
            **CLIP_HIGHER,
            "delta": DUAL_CLIP,
            "beta": 5e-4,
            "loss_type": "dapo",
            "max_grad_norm": 1.0,
            "weight_decay": 0.01,
            "temperature": 1.0,
        },
        sources="Paper and code NVlabs/DLER: 16 rollouts, 512 prompts, mini-batch 64, 4000 tokens, dual clip 10 (script: clip_ratio_c). "
        "KL is TRL's k3 (paper: mse; script: k3). Dynamic sampling looks at the truncated reward (paper; script: at the score before it).",
    )


def da_dler() -> Recipe:
    """Difficulty-aware DLER (arXiv 2510.15110): a shorter truncation where the group is more often right."""
    return replace(
        dler(), name="da_dler", reward="da_dler", sources="Paper: 2000 tokens above accuracy .5, 4000 below; not in the code."
    )


def laser(reward: str = "laser") -> Recipe:
    """LASER, LASER-D, LASER-DE (arXiv 2505.15612): a bonus for correct responses within a target, adapted to difficulty in -D and -DE."""
    return Recipe(
        reward,
        "2505.15612",
        reward,
        problems=128,
        updates=2,
        max_tokens=16384,
        learning_rate=1e-6,
        config={**CLIP_HIGHER, "beta": 1e-3, "entropy_coef": 1e-3, "temperature": 0.6},
        sources="Paper and code hkust-nlp/Laser: batch 128, mini-batch 64, 8 rollouts, T .6, 16384 tokens, 1e-6.",
    )


def _adapted(reward: str) -> Recipe:
    """LASER with targets that follow a monitoring set."""
    own = laser(reward)
    more = " Targets: 500 problems monitored every 20 generations; |C_d| rounded up (paper; scripts: down, laser_targets.SCRIPT_ROUNDING)."
    return replace(own, sources=own.sources + more)


def laser_d() -> Recipe:
    """LASER-D: targets per difficulty, adapted. See :func:`laser`."""
    return _adapted("laser_d")


def laser_de() -> Recipe:
    """LASER-DE: also pays wrong responses for going on. See :func:`laser`."""
    return _adapted("laser_de")


def hapo() -> Recipe:
    """HAPO (arXiv 2505.11225): each problem's shortest correct response so far is the one to beat."""
    return Recipe(
        "hapo",
        "2505.11225",
        "hapo",
        problems=2,
        samples=2,
        max_tokens=32768,
        config={"temperature": 0.7},
        sources="Script of HCY123902/HAPO: 2 rollouts, 4 responses a process and step, T .7, 32768 tokens, TRL's learning rate.",
    )


def drpo(lam: float = 0.1) -> Recipe:
    """DRPO (arXiv 2510.04474): the length reward acts among correct rollouts only, through a loss of its own."""
    return Recipe(
        "drpo",
        "2510.04474",
        "correctness",
        loss=DRPO(lam=lam, capacity=8192),
        problems=128,
        updates=4,
        max_tokens=8192,
        learning_rate=2e-6,
        config={"temperature": 0.6},
        sources="Code Optimization-AI/DRPO, the 1.5B script: lambda .1, tau 10, beta 1e3, delta 1e-4, batch 128, mini-batch 32, 8 rollouts.",
    )


def slpo() -> Recipe:
    """ORION's SLPO (arXiv 2511.22891): correct rollouts are paid for being short within their group."""
    return replace(plain("slpo"), paper="2511.22891", sources="Weight, rate and batch not found.")


def train_long_think_short() -> Recipe:
    """Train Long, Think Short (arXiv 2508.08940): a budget in the prompt that falls as training goes on, and a reward for meeting it."""
    return Recipe(
        "train_long_think_short",
        "2508.08940",
        "train_long_think_short",
        curriculum=Curriculum(),
        sources="Paper: B0 256 to 87 in 3 drops, every 150 of 600 steps, G 8. Rate and batch not found.",
    )


def adaptive_deep_reasoning(switch: ModeSwitch | None = None) -> Recipe:
    """Adaptive Deep Reasoning (arXiv 2505.20101): half of each group asked for long thinking, half for short; a stand-in of ours where
    the paper's formulas were not found.

    Args:
        switch: The mode-switching loss, which needs the first token of each mode of the model at hand.
    """
    return Recipe(
        "adaptive_deep_reasoning",
        "2505.20101",
        "adaptive_deep_reasoning",
        modes=Modes(),
        switch=switch,
        sources="Rewards 1.5 and 1.0 from digests; thresholds, margin, rate and batch are ours.",
    )


def sar() -> Recipe:
    """Self-aligned reward (arXiv 2509.05489): a response is worth more where the question makes it likelier."""
    return Recipe(
        "sar",
        "2509.05489",
        "sar",
        problems=128,
        samples=6,
        updates=2,
        max_tokens=4096,
        learning_rate=1e-6,
        config={"scale_rewards": "none", "loss_type": "dr_grpo", "beta": 1e-3},
        sources="Code amazon-science/Self-Aligned-Reward: alpha .2, n 6, batch 128, mini-batch 64, 4096 tokens, Dr. GRPO, 500 steps.",
    )


def pear() -> Recipe:
    """PEAR (arXiv 2510.08026): a correct response pays for the entropy of its thinking above that of its answer."""
    return Recipe(
        "pear", "2510.08026", "pear", problems=128, learning_rate=1e-6, sources="Notes: alpha 1, batch 128, 1e-6; G not found."
    )


def surrogate() -> Recipe:
    """Format and length instead of answers (arXiv 2505.19439)."""
    return Recipe(
        "surrogate",
        "2505.19439",
        "surrogate",
        problems=128,
        max_tokens=3072,
        learning_rate=1e-6,
        config={"beta": 1e-3, "temperature": 0.6},
        sources="Paper: p .5, 3072 tokens, batch 128, n 8, T .6, KL .001, 100 steps.",
    )


def longwriter() -> Recipe:
    """LongWriter-Zero (arXiv 2506.18841): the mean of each component's own advantage."""
    return Recipe(
        "longwriter",
        "2506.18841",
        "longwriter",
        {"unit": "words"},
        advantage="decoupled",
        samples=32,
        max_tokens=14000,
        config={"temperature": 0.8},
        sources="Notes: ranges in words, 32 rollouts, T .8, 14000 tokens.",
    )


ALL: Mapping[str, Callable[[], Recipe]] = MappingProxyType(
    {
        f.__name__: f
        for f in (
            length_penalty_mild,
            grpo_lambda,
            dler,
            da_dler,
            laser,
            laser_d,
            laser_de,
            hapo,
            drpo,
            slpo,
            train_long_think_short,
            adaptive_deep_reasoning,
            sar,
            pear,
            surrogate,
            longwriter,
        )
    }
)


def find(name: str) -> Recipe:
    """The recipe of a name: its own if there is one, else plain GRPO with the reward of that name.

    Raises:
        ValueError: neither; lists both.
    """
    if name in ALL:
        return ALL[name]()
    if name not in rewards.ALL:
        raise ValueError(f"Unknown reward or recipe {name!r}: choose one of {', '.join(sorted({*ALL, *rewards.ALL}))}.")
    return plain(name)
