"""Save the state of stateful rewards in the checkpoints of a plain TRL script.

With ``entry = rewards.as_trl(reward)``, write ``GRPOTrainer(reward_funcs=[entry], callbacks=[Kept(entry)], ...)``.

Some rewards have a state that changes during training: HAPO remembers the shortest correct length per problem, LASER-D adapts target
lengths. Without this callback, ``trainer.train(resume_from_checkpoint=...)`` would silently restart them from their initial state. This
toolkit's own trainer (``grpo.trainer.Trainer``) saves the state itself and needs no callback.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from toolkit.rewards.trl import TRLReward


class Kept(TrainerCallback, ExportableState):
    """Callback that saves the states of rewards in ``trainer_state.json`` of each checkpoint, and restores them when training resumes.

    The state of a reward is what it remembers of the training so far. HAPO's, for example, is the shortest correct length per problem.

    Args:
        entries: Reward functions made by ``rewards.as_trl``, at least one.

    Raises:
        ValueError: on construction, if no reward is given or two share a name. When training resumes, if the checkpoint was written without
            this callback or with other rewards.
    """

    def __init__(self, *entries: TRLReward) -> None:
        names = [e.reward.name for e in entries]
        if not entries or len(set(names)) < len(names):
            raise ValueError(f"Rewards named {names}: give at least one reward, and no two with the same name.")
        self.entries = {e.reward.name: e for e in entries}

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must store: ``{"args": {}, "attributes": {"states": {name of the reward: its state}}}``.

        transformers requires the keys ``args`` and ``attributes``. Rewards that do not change during training are left out.
        """
        states = {name: e.reward.state_dict() for name, e in self.entries.items() if hasattr(e.reward, "state_dict")}
        return {"args": {}, "attributes": {"states": states}}

    def on_train_begin(self, args, state, control, **_) -> None:
        if not state.global_step:  # a new run: there is nothing to restore
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
