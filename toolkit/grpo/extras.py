"""Parts of a training run that the recipe does not set: your reward object, columns that it reads, the part to train, the engine, callbacks.

A *recipe* holds the training settings of one method, such as its reward and loss (see ``recipes``).

A *column* is an array with one value per rollout, such as ``tokens`` or ``correct``. Rewards read columns by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainerCallback

from toolkit.grpo import parts, tracking
from toolkit.grpo.draws import Drawn
from toolkit.tools import Toolbox

Column = Callable[[Sequence[Drawn]], Sequence[Any]]
"""Function that computes a column from rollouts and their prompts: one value per rollout. Rewards read columns by name.

It is needed only for a column that the toolkit does not compute itself.
"""


@dataclass(frozen=True)
class Extras:
    """Settings of a training run that are not part of its recipe, such as your own reward or an adapter.

    A recipe holds the training settings of one method (see ``recipes.Recipe``).

    Attributes:
        reward: Reward object that replaces the recipe's; ``None`` means the recipe's. ``run.train`` copies a reward with a state, so the
            object does not change.
        columns: Column name -> function that computes the column (see ``Column``), such as ``{"conciseness": f}``.
        engine: Library that samples the responses: ``"toolkit"`` or ``"trl"``. TRL samples with vLLM if ``use_vllm`` is True in its config.
        train: Part of the model to train: ``None`` for every weight, a config of ``peft`` for an adapter, ``parts.Vectors()`` for one vector
            per layer, or ``parts.Heads(...)`` for some attention heads.
        callbacks: Callbacks of transformers in addition to the toolkit's, such as ``log.Bar``.
        tools: Tools that responses may call, in training and in all evaluations of the run; ``None`` means none. Only
            ``engine="toolkit"`` answers calls. Tokens of tool results are not trained on.
        track: Tracker that also gets the log: ``"trackio"``, ``"wandb"`` or ``"tensorboard"`` (see ``tracking``). ``None`` means none.

    Raises:
        ValueError: no such engine, tracker or part, or TRL is to sample with tools.
        ImportError: the tracker cannot be imported.
    """

    reward: Any = None
    columns: Mapping[str, Column] = field(default_factory=dict)
    engine: str = "toolkit"
    train: Any = None
    callbacks: tuple[TrainerCallback, ...] = ()
    track: str | None = None
    tools: Toolbox | None = None

    def __post_init__(self) -> None:
        if self.engine not in ("toolkit", "trl"):
            raise ValueError(f'engine={self.engine!r}: choose "toolkit" or "trl".')
        if self.engine == "trl" and self.tools:
            raise ValueError('engine="trl" cannot answer the calls of this toolbox: use engine="toolkit".')
        tracking.check(self.track)
        parts.check(self.train)
