"""Training settings that several policies share, for boards, sweeps and your own scripts. Importing this module does not import TRL."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from toolkit.grpo import tracking
from toolkit.grpo.recipes import Recipe


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """Settings with which every policy of a board or sweep is trained.

    The policies differ in their recipes: a *recipe* holds the training settings of one method, such as its reward (see ``recipes``).

    Attributes:
        task: Name of the task to train on.
        steps: Optimizer steps per policy.
        pool: Number of different training problems. A run that needs more goes through them again, in a new order. The reward HAPO needs
            such repetition: it compares a response with earlier responses to the same problem.
        held_out: Number of held-out problems (split ``dev``) for the learning curve, with 4 samples each.
        evaluate_every: Optimizer steps between two points of the learning curve; 0 for no curve.
        tiny: True to scale recipes to the tiny reasoner, the small model in this package (see ``Recipe.scaled``). False to keep the numbers
            of their papers.
        changes: Fields of ``Recipe`` to replace in every recipe, as pairs ``(name, value)``, such as ``(("problems", 32),)``.
        micro_batch: Largest number of rows (responses) in each forward/backward pass, on each process.
        train: Part of the model to train, as in ``Extras.train``: ``None`` trains every weight. See ``parts``.
        engine: Library that samples the responses: ``"toolkit"``, or ``"trl"`` (with vLLM: ``overrides=(("use_vllm", True),)``).
        overrides: Fields of TRL's ``GRPOConfig`` to set in every run, as pairs ``(name, value)``. They override ``Recipe.config``.
        track: Tracker that also gets the log of every policy: ``"trackio"``, ``"wandb"`` or ``"tensorboard"`` (see ``tracking``). ``None``
            means none. It is not part of a policy's cache key.

    Raises:
        ValueError: no such tracker.
        ImportError: the tracker cannot be imported.
    """

    task: str = "arithmetic"
    steps: int = 100
    pool: int = 256
    held_out: int = 64
    evaluate_every: int = 20
    tiny: bool = True
    changes: tuple[tuple[str, Any], ...] = ()
    micro_batch: int = 16
    train: Any = None
    engine: str = "toolkit"
    overrides: tuple[tuple[str, Any], ...] = ()
    track: str | None = None

    def __post_init__(self) -> None:
        tracking.check(self.track)

    def sized(self, recipe: Recipe) -> Recipe:
        """Return the recipe to train with: scaled to the tiny reasoner if ``tiny`` is True, then with ``changes`` applied."""
        return replace(recipe.scaled() if self.tiny else recipe, **dict(self.changes))

    @property
    def identity(self) -> dict[str, Any]:
        """Return the settings of this plan that enter a policy's cache key directly, as a dict ``{name: value}``.

        The other settings are left out for these reasons:

        * ``track`` changes no policy.
        * ``train`` is an object. ``policies.basis`` adds its description to the key.
        * ``task`` and ``pool`` determine the training problems, and ``tiny`` and ``changes`` the recipe. ``policies.basis`` adds the
          problems and the recipe to the key.
        * ``micro_batch`` matters only for some losses (``run.micro_batch_counts``). ``policies.basis`` adds it to the key for these.
        """
        return {
            "steps": self.steps,
            "held_out": [self.held_out, self.evaluate_every],
            "engine": self.engine,
            "overrides": self.overrides,
        }
