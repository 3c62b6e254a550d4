"""Training on preference pairs: SimPO (arXiv 2405.14734), with TRL's ``CPOTrainer``. Needs the extra ``rl``.

    score(y) = mean over the tokens of response y of log p(token | prompt, earlier tokens)      in nats per token
    loss     = mean over pairs of -log sigmoid(beta (score(chosen) - score(rejected)) - gamma)

There is no reference model and no term for likelihood (TRL's ``cpo_alpha`` is 0). All weights are trained, in fp32. Optimizer, schedule and
resuming are those of ``finetune``. DTO (``methods/thinking_optimization``) makes such pairs.

A response is scored as its text has it. One that was cut off at the token limit has no end token, and none is added: the model would else
learn that it ends there. (TRL's trainer adds one.)
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd

from toolkit import checkpoints, finetune, store
from toolkit.lm import LM

COLUMNS = ("problem_id", "prompt", "chosen", "rejected")
assumed_beta, assumed_gamma = 2.0, 0.5  # TRL's gamma; DTO's values could not be read
assumed_rate = 1e-4  # ours: it suits the shipped tiny models


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a run that trains on preference pairs.

    Attributes:
        steps: Number of optimizer steps.
        batch: Number of pairs per step.
        rate: Highest learning rate.
        beta: Factor of the difference of scores.
        gamma: Margin; must be at least 0.
        seed: Seed of the order of the pairs.
        save_every: Number of steps between checkpoints.
    """

    steps: int
    batch: int = 16
    rate: float = assumed_rate
    beta: float = assumed_beta
    gamma: float = assumed_gamma
    seed: int = 0
    save_every: int = 200


def train(lm: LM, pairs: pd.DataFrame, settings: Settings, out: str | Path, *, name: str) -> LM:
    """Train a copy of ``lm`` with SimPO on preference pairs, save it in ``out/model`` and return it as read from there.

    A run that was stopped goes on from its last checkpoint. If the run is finished, its model is read and returned.

    Args:
        lm: The initial model; it is unchanged.
        pairs: One row per pair, with the columns ``problem_id, prompt, chosen, rejected``. The last three are texts with their special
            tokens. A response that ends with an end token has it in its text.
        settings: Length, rate, loss and seed.
        out: Directory of the run.
        name: Name of the trained model.

    Raises:
        ValueError: there are no pairs, a column is missing, a pair has an empty text or equal responses, or a prompt with a response is
            longer than the model's context.
        UnsupportedModelError: ``trl`` is not installed, or the weights are quantised or offloaded.
        store.StoreError: another process is training into ``out``.
        store.WrongModelError: ``out`` holds a run with another model, other pairs or settings, or of another version of the code.
    """
    checkpoints.require("trl", "training on preference pairs")
    finetune.check_trainable(lm)
    check(pairs)
    finetune.check_context(lm, [*pairs["problem_id"]] * 2, _lengths(lm, pairs))
    rows = pairs[list(COLUMNS)].to_dict("records")
    out = finetune.claimed(out, {"model": lm.fingerprint, "pairs": store.key(rows), "loss": "simpo", **asdict(settings)})
    return finetune.finished(lm, out, lambda: _trained(lm, pairs, settings, out), name, pairs["problem_id"])


def check(pairs: pd.DataFrame) -> None:
    """Raise ValueError unless the table has at least one preference pair, and each has a prompt and two different responses."""
    if missing := [column for column in COLUMNS if column not in pairs]:
        raise ValueError(f"The table of pairs has no column {missing[0]!r}: expected {', '.join(COLUMNS)}.")
    if pairs.empty:
        raise ValueError("There are no preference pairs to train on: give at least one.")
    texts = pairs[list(COLUMNS[1:])]
    if (wrong := (texts == "").any(axis=1) | (texts["chosen"] == texts["rejected"])).any():
        raise ValueError(
            f"{wrong.sum()} of {len(pairs)} pairs have an empty text or equal responses, such as that of problem "
            f"{pairs['problem_id'][wrong].iloc[0]!r}: each needs a prompt and two different responses."
        )


def flipped(pairs: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Return the same pairs, with chosen and rejected swapped in half of them, chosen at random: the control without a preference.

    Args:
        pairs: Preference pairs; of an odd number, the smaller half is swapped.
        seed: Seed of the choice.
    """
    swap = np.zeros(len(pairs), bool)
    swap[np.random.default_rng(seed).permutation(len(pairs))[: len(pairs) // 2]] = True
    chosen, rejected = pairs["chosen"], pairs["rejected"]
    return pairs.assign(chosen=chosen.where(~swap, rejected), rejected=rejected.where(~swap, chosen))


def _lengths(lm: LM, pairs: pd.DataFrame) -> list[int]:
    """Return the number of tokens of each prompt with its chosen response, then of each prompt with its rejected response.

    The token that TRL adds, if a text does not begin with it, is counted.
    """
    texts = pd.concat([pairs["prompt"] + pairs[column] for column in ("chosen", "rejected")])
    begin = lm.tokenizer.bos_token_id
    ids_of = lm.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return [len(ids) + (begin not in (None, ids[0])) for ids in ids_of]


def _trained(lm: LM, pairs: pd.DataFrame, settings: Settings, out: Path) -> Any:
    """Return the trained model in fp32 and evaluation mode."""
    from datasets import Dataset

    with warnings.catch_warnings():  # TRL warns that its module is experimental, once per process
        warnings.simplefilter("ignore")
        from trl.experimental.cpo import CPOConfig, CPOTrainer

    class AsWritten(CPOTrainer):
        """TRL's trainer, without the end token that it adds to responses that were cut off."""

        def tokenize_row(self, feature: Mapping[str, str], model: Any = None) -> Any:
            row, tokenizer = super().tokenize_row(feature, model), cast(Any, self.processing_class)
            for side in ("chosen", "rejected"):
                added = row[f"{side}_input_ids"][-1] == tokenizer.eos_token_id and not feature[side].endswith(tokenizer.eos_token)
                if added:
                    row |= {f"{side}_{name}": row[f"{side}_{name}"][:-1] for name in ("input_ids", "attention_mask", "labels")}
            return row

    # Without max_length, this trainer cuts responses at 512 tokens. It cuts before the end tokens are removed that it added.
    # It needs all columns: it would set remove_unused_columns itself, with a warning.
    shared = finetune.arguments(lm, settings, out) | {"max_length": max(_lengths(lm, pairs)) + 1, "remove_unused_columns": False}
    config = CPOConfig(**shared, loss_type="simpo", cpo_alpha=0.0, beta=settings.beta, simpo_gamma=settings.gamma)
    data = Dataset.from_pandas(pairs[["prompt", "chosen", "rejected"]], preserve_index=False)
    trainer = AsWritten(deepcopy(lm.model).float(), config, train_dataset=data, processing_class=lm.tokenizer)
    return finetune.trained_by(trainer, out, settings.steps, "preference training")
