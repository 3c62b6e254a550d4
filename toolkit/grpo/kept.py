"""What a stateful reward remembers, kept with the checkpoints of anyone's TRL script: ``GRPOTrainer(..., callbacks=[Kept(entry)])``.

The trainer of this toolkit does so by itself. In a plain script ``trainer.train(resume_from_checkpoint=...)`` would go on with HAPO's
history or LASER-D's targets empty, and say nothing.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from toolkit.rewards.trl import TRLReward


class Kept(TrainerCallback, ExportableState):
    """Saves the states of entries made by ``rewards.as_trl`` in ``trainer_state.json`` and gives them back on resuming.

    Raises (on resuming):
        ValueError: the checkpoint was written without this callback, or with other rewards.
    """

    def __init__(self, *entries: TRLReward) -> None:
        names = [e.reward.name for e in entries]
        if not entries or len(set(names)) < len(names):
            raise ValueError(f"Entries named {names}: give at least one, with names that differ.")
        self.entries = {e.reward.name: e for e in entries}

    def state(self) -> dict[str, Any]:
        """Name of the reward -> its state, in the form that transformers keeps in a checkpoint."""
        states = {name: e.reward.state_dict() for name, e in self.entries.items() if hasattr(e.reward, "state_dict")}
        return {"args": {}, "attributes": {"states": states}}

    def on_train_begin(self, args, state, control, **_) -> None:
        if not state.global_step:
            return
        saved = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {}).get("states")
        wanted = self.state()["attributes"]["states"]
        if saved is None or set(saved) != set(wanted):
            raise ValueError(
                f"The checkpoint of step {state.global_step} has the states of {sorted(saved or {})}, but {sorted(wanted)} need theirs: resume a "
                "run that had Kept with the same rewards among its callbacks, or start anew."
            )
        for name, value in saved.items():
            self.entries[name].reward.load_state_dict(value)  # type: ignore[attr-defined]
