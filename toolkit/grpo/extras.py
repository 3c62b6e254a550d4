"""Plug-ins of a trainer that its recipe does not set: your reward object, reward columns, engine, LoRA, callbacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainerCallback

from toolkit.grpo.draws import Drawn

Column = Callable[[Sequence[Drawn]], Sequence[Any]]
"""Function that computes a column which a reward needs and rollouts do not have: from the rollouts, one value per rollout."""


@dataclass(frozen=True)
class Extras:
    """Plug-ins of a trainer that are not part of its recipe.

    Attributes:
        reward: Reward object to use instead of the recipe's, or ``None``.
        columns: Column name -> function that computes it (see ``Column``), such as ``{"conciseness": f}``.
        engine: Code that samples the responses: ``"toolkit"``, or ``"trl"`` for TRL's (with vLLM if the config has ``use_vllm``).
        lora: A ``peft`` config, or ``None`` to train every weight.
        callbacks: Further callbacks of transformers, such as ``log.Bar``.
    """

    reward: Any = None
    columns: Mapping[str, Column] = field(default_factory=dict)
    engine: str = "toolkit"
    lora: Any = None
    callbacks: tuple[TrainerCallback, ...] = ()

    def __post_init__(self) -> None:
        if self.engine not in ("toolkit", "trl"):
            raise ValueError(f'engine={self.engine!r}: choose "toolkit" or "trl".')
