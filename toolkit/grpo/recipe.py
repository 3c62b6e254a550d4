"""The value ``Recipe``, which holds the training settings of a method, and its numbers for the tiny reasoner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any

from toolkit import rewards
from toolkit.grpo import advantages
from toolkit.grpo.decs import DECS
from toolkit.grpo.draws import Curriculum, Dynamic, Modes
from toolkit.grpo.filters import GFPO, CellMask, Filter
from toolkit.grpo.losses import DRPO, ModeSwitch
from toolkit.rewards.laser_targets import TargetSettings

TINY_TOKENS = 200  # longest response in tokens of scaled recipes; the tiny reasoner's longest are about 150
TINY_RATE = 3e-4  # learning rate
TINY_LIMITS = {
    "art": 40,
    "dler": 40,
    "da_dler": 40,
}  # longest response, tokens; also the length beyond which the reward is 0 (TINY_OPTIONS)
TINY_TARGETS = TargetSettings(base=16, step=8, longest=TINY_TOKENS, every=10, problems=32)
TINY_OPTIONS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "alp": {"beta": 0.01},  # a response of 40 tokens pays 0.2 where half of the responses are right
        "art": {"target": 40},
        "cosine": {"longest": TINY_TOKENS},
        "da_dler": {"tiers": ((0.0, 40), (0.5, 24))},
        "dler": {"target": 40},
        "dot": {"alpha": 1.5, "margin": 8},  # with 8 samples, alpha of 2.47 or more cuts nothing
        "gdpo": {"target": 24},
        "laser": {"target": 24},
        "laser_d": {"targets": TINY_TARGETS},
        "laser_de": {"targets": TINY_TARGETS},
        "length_penalty": {"longest": 20},  # each token costs 5 % (1/20) of the reward of a correct answer
        "length_penalty_mild": {"longest": 20},  # 2.5 %: half the weight
        "surrogate": {"longest": 80},  # highest reward at 40 tokens
        "truncation": {"target": 40},
    }
)
"""Recipe name -> reward options that ``Recipe.scaled`` sets for the tiny reasoner, the small model in this package.

The model's responses have 7 to 150 tokens. All lengths are in tokens.
"""
TINY_PROMPTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "adaptive_deep_reasoning": {"modes": Modes(long=" please", short=" quick")},
        "train_long_think_short": {"curriculum": Curriculum(start=48, every=25, text=" {budget}")},  # to 16 in 100 steps
    }
)
"""Recipe name -> fields of the recipe with texts for the prompt, in words that the tiny reasoner (the small model in this package) knows.

``Recipe.scaled`` puts them in the place of the paper's texts. The model knows only a few words and fails after an unfamiliar sentence.
"""


@dataclass(frozen=True)
class Recipe:
    """Training settings of one method.

    Attributes:
        name: Name of the recipe in runs and logs.
        paper: arXiv id of the paper; "" if the method is ours.
        reward: Name of the reward, a key of ``rewards.ALL``.
        options: Arguments of the reward, by name.
        advantage: Name of the advantage, a key of ``advantages.ALL``, ``advantages.STEPS`` or ``advantages.TOKENS``; ``None`` means TRL's
            (``scale_rewards`` in ``config``).
        loss: Parameters of DRPO's loss, which then replaces TRL's; ``None`` means TRL's loss (``loss_type`` in ``config``).
        dynamic: Settings of dynamic sampling, which replaces problems whose responses all get the same reward; ``None`` turns it off.
        filter: Rollouts to learn from; the others get advantage 0 (see ``filters``). The advantage is GRPO's if ``advantage`` is ``None``.
            ``None`` keeps all.
        token_advantage: Parameters of DECS, which gives every token its own advantage instead; ``None`` for one per rollout.
        curriculum: Token budget that is stated in the prompt and falls during training; ``None`` states no budget.
        modes: Texts that request long thinking in half of a problem's prompts and short thinking in the other half; ``None`` adds no such
            text.
        switch: Parameters of a loss that teaches the model to choose between long and short thinking itself; ``None`` means no such loss.
        problems: Problems per generation (a batch of responses sampled at once), over all processes.
        samples: Responses per problem, the size of a group (G in the papers).
        max_tokens: Largest response length, in tokens.
        learning_rate: Learning rate of AdamW, constant during training.
        updates: Optimizer steps per generation (in the papers: batch size divided by mini-batch size).
        config: Further fields of TRL's ``GRPOConfig``.
        note: How the training differs from GRPO with the reward, for the list of recipes.
        sources: Note on where the numbers come from and which of them are ours.
    """

    name: str
    paper: str
    reward: str
    options: Mapping[str, Any] = field(default_factory=dict)
    advantage: str | None = None
    loss: DRPO | None = None
    dynamic: Dynamic | None = None
    filter: Filter | None = None
    token_advantage: DECS | None = None
    curriculum: Curriculum | None = None
    modes: Modes | None = None
    switch: ModeSwitch | None = None
    problems: int = 16
    samples: int = 8
    max_tokens: int = 4096
    learning_rate: float = 1e-6
    updates: int = 1
    config: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    sources: str = ""

    def __post_init__(self) -> None:
        if self.reward not in rewards.ALL:
            raise ValueError(f"Unknown reward {self.reward!r}: choose one of {', '.join(rewards.ALL)}.")
        if self.advantage is not None and self.advantage not in (names := (*advantages.ALL, *advantages.STEPS, *advantages.TOKENS)):
            raise ValueError(f"Unknown advantage {self.advantage!r}: choose one of {', '.join(names)}.")
        for name in ("problems", "samples", "max_tokens", "updates"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r}: give a whole number of at least 1.")
        if self.samples < 2:
            raise ValueError(f"samples={self.samples}: an advantage compares the samples of a problem, so give at least 2.")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate}: give a number above 0.")
        if self.modes and self.samples % 2:
            raise ValueError(f"samples={self.samples}: half of a group thinks long and half short, so give an even number.")
        if isinstance(self.filter, GFPO) and self.filter.keep >= self.samples:
            raise ValueError(
                f"samples={self.samples}: the filter keeps {self.filter.keep} of them, which leaves none out. Sample more."
            )
        long = [cell for cell in getattr(self.filter, "cells", ()) if cell.startswith("L")]
        if isinstance(self.filter, CellMask) and long and self.filter.target >= self.max_tokens:
            raise ValueError(
                f"The filter masks {', '.join(long)}, responses of more than {self.filter.target} tokens, and none is sampled beyond "
                f"max_tokens={self.max_tokens}: raise max_tokens, or mask other cells."
            )
        if self.filter and self.advantage in (*advantages.STEPS, *advantages.TOKENS):
            unit = "turn" if self.advantage in advantages.STEPS else "token"
            raise ValueError(
                f"The advantage {self.advantage!r} is one per {unit}, and the filter needs one per rollout: set one of them."
            )
        if self.token_advantage and (self.advantage or self.filter or self.loss):
            raise ValueError("token_advantage replaces advantage, filter and loss: set none of them.")
        if self.loss and (self.advantage or self.filter):
            raise ValueError("loss replaces advantage and filter: DRPO's loss weights rollouts itself, so set neither.")
        if self.switch and not self.modes:
            raise ValueError("switch is set without modes: the mode-switching loss needs modes=Modes(...).")

    def scaled(self) -> Recipe:
        """Return the recipe with numbers for the tiny reasoner, the small model in this package.

        The scaled recipe samples 8 responses to each of 16 problems at once, uses them for one optimizer step, and has a low token limit.
        Lengths in the reward's options and texts in the prompt are changed to suit the model. All new numbers are ours.
        """
        return replace(
            self,
            problems=16,
            samples=8,
            updates=1,
            # A mask needs responses that are longer than its limit.
            max_tokens=TINY_TOKENS if isinstance(self.filter, CellMask) else TINY_LIMITS.get(self.name, TINY_TOKENS),
            learning_rate=TINY_RATE,
            options={**self.options, **TINY_OPTIONS.get(self.name, {})},
            filter=_scaled_filter(self.filter, self.samples),
            token_advantage=replace(self.token_advantage, longest=None) if self.token_advantage else None,
            loss=replace(self.loss, capacity=None) if self.loss else None,  # None: DRPO divides lengths by the scaled token limit
            **TINY_PROMPTS.get(self.name, {}),
            config={k: v for k, v in self.config.items() if k not in NOT_SCALED},
        )


def _scaled_filter(form: Filter | None, samples: int) -> Filter | None:
    """Return a filter for 8 samples per problem and the tiny reasoner's lengths; ``samples`` is the number of samples before."""
    if isinstance(form, GFPO):
        return replace(form, keep=max(2, form.keep * 8 // samples))
    return replace(form, target=TINY_OPTIONS["truncation"]["target"]) if form else None


NOT_SCALED = ("beta", "temperature", "entropy_coef")
"""Fields of ``Recipe.config`` that ``Recipe.scaled`` leaves out. TRL's defaults then hold:

* ``beta``, weight of the KL penalty: 0, so no reference model is needed.
* ``temperature``: 1, at which the tiny reasoner (the small model in this package) is evaluated.
* ``entropy_coef``, weight of the entropy bonus: 0.

``use_adaptive_entropy`` stays: the recipe ``entropy_bonus`` differs from plain GRPO by it alone.
"""


def with_defaults(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a recipe as a file holds them. A field that did not exist when the file was written gets its default."""
    return {f.name: f.default for f in fields(Recipe) if f.name not in saved} | dict(saved)
