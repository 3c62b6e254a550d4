"""Save the state of stateful rewards in the checkpoints of a plain TRL script: ``GRPOTrainer(..., callbacks=[Kept(entry)])``.

This toolkit's own trainer needs no callback for that. In a plain script, ``trainer.train(resume_from_checkpoint=...)`` would silently
continue with an empty history (HAPO) or with the initial targets (LASER-D).
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from toolkit.rewards.trl import TRLReward


class Kept(TrainerCallback, ExportableState):
    """Save the states of rewards made by ``rewards.as_trl`` in ``trainer_state.json``, and restore them on resuming.

    Raises:
        ValueError: on resuming, the checkpoint was written without this callback or with other rewards.
    """

    def __init__(self, *entries: TRLReward) -> None:
        names = [e.reward.name for e in entries]
        if not entries or len(set(names)) < len(names):
            raise ValueError(f"Rewards named {names}: give at least one reward, and no two with the same name.")
        self.entries = {e.reward.name: e for e in entries}

    def state(self) -> dict[str, Any]:
        """Return the state of every reward by name, in the form that transformers saves in a checkpoint."""
        states = {name: e.reward.state_dict() for name, e in self.entries.items() if hasattr(e.reward, "state_dict")}
        return {"args": {}, "attributes": {"states": states}}

    def on_train_begin(self, args, state, control, **_) -> None:
        if not state.global_step:
            return
        saved = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {}).get("states")
        expected = self.state()["attributes"]["states"]
        if saved is None or set(saved) != set(expected):
            raise ValueError(
                f"The checkpoint of step {state.global_step} holds the states of the rewards {sorted(saved or {})}, expected {sorted(expected)}: "
                "resume a run that had Kept with the same rewards among its callbacks, or start a new run."
            )
        for name, value in saved.items():
            self.entries[name].reward.load_state_dict(value)  # type: ignore[attr-defined]
