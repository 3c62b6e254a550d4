"""Every length reward of the literature as a pure function of a batch, one file a paper; ``ALL`` lists them.

``rewards.laser(batch)`` style calls are ``rewards.ALL["laser"].make()(batch)``; the same object serves the trainer of ``toolkit.grpo``,
anyone's TRL script (:func:`as_trl`) and offline questions (:func:`score`): what would it have paid these responses?
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from toolkit.rewards.batch import MissingColumnError, Reward, RewardBatch, Scored
from toolkit.rewards.correctness import Correctness

__all__ = ["ALL", "Correctness", "Entry", "MissingColumnError", "Reward", "RewardBatch", "Scored"]


@dataclass(frozen=True)
class Entry:
    """A reward in the list.

    Attributes:
        make: Makes it; takes its parameters by name.
        paper: arXiv id, or "" for ours.
        line: What it pays, in one sentence.
    """

    make: Callable[..., Any]
    paper: str
    line: str


ALL: Mapping[str, Entry] = MappingProxyType(
    {
        "correctness": Entry(Correctness, "", "1 if the answer is right, else 0."),
    }
)
"""Name -> reward, its paper and one line."""
