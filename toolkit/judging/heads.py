"""A reward head: a linear score of a frozen model's states, trained on preferences with the Bradley-Terry model.

    P(response i is preferred to response j) = sigma(w (x_i - x_j))        sigma: the logistic function; x: features; w: weights

The features of a response are its states after one block, averaged over its tokens. The model itself is not trained.

Deviations: reward models usually train all weights and read the state at the last token. Here only the head is trained, so a few dozen
pairs and a CPU suffice; what a frozen model does not represent linearly, no such head can score. The average over tokens is our choice.

Units and signs: higher is better. Only differences between responses to one prompt have meaning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy import ndarray
from torch import Tensor
from transformers import DynamicCache

from toolkit import hooks, stats
from toolkit.decode import check_growth, select_rows
from toolkit.lm import LM
from toolkit.passes import pad_right
from toolkit.sites import Site
from toolkit.stats import PairRows

assumed_strength = 0.01  # inverse of the penalty, scikit-learn's C: ours


@dataclass(frozen=True)
class RewardHead:
    """A linear head that scores responses from their features. ``fit`` trains it.

    Attributes:
        weight: w, ``[d]``. Features need no standardisation before they are multiplied by it.
        layer: Layer that the features are from, from 0.
        fingerprint: Fingerprint of the model that the features are from.
    """

    weight: Float[ndarray, " d"]
    layer: int
    fingerprint: str

    def score(self, features: Float[ndarray, "n d"]) -> Float[ndarray, " n"]:
        """Return the score ``w x`` of each response. Higher is better; the zero is arbitrary.

        Args:
            features: Features of each response at ``layer``, from ``response_states``.
        """
        return features @ self.weight

    def state_dict(self) -> dict[str, Any]:
        """Return the head's fields as a dict that can be written as JSON."""
        return {"weight": self.weight.tolist(), "layer": self.layer, "fingerprint": self.fingerprint}

    @classmethod
    def from_state_dict(cls, saved: dict[str, Any]) -> RewardHead:
        """Make a head from ``saved``, the result of ``state_dict``."""
        return cls(np.array(saved["weight"], np.float64), int(saved["layer"]), str(saved["fingerprint"]))


@torch.inference_mode()
def response_states(lm: LM, prompt: Sequence[int], responses: Sequence[Sequence[int]]) -> Float[Tensor, "responses layers d_model"]:
    """Return the states after every block, averaged over the tokens of each response to one prompt, in fp32 on the CPU.

    The prompt is run once, and its KV cache serves all responses. So judging several responses to a long prompt costs little more than one.

    Args:
        prompt: Token ids of the prompt, at least one.
        responses: Token ids of each response, at least one per response.

    Raises:
        ValueError: the prompt, the list of responses, or a response is empty.
        UnsupportedModelError: a response crosses the length at which the model's rotary frequencies change (``LM.frequency_limit``).
    """
    if not len(prompt) or not responses or not all(map(len, responses)):
        raise ValueError(
            f"A prompt of {len(prompt)} tokens and responses of {[len(r) for r in responses][:20]}: need at least one token in each."
        )
    ends = ((len(prompt), len(prompt) + len(response)) for response in responses)
    check_growth(lm, ends, "Give responses that end within {limit} tokens, prompt included.")
    cache = DynamicCache(config=lm.model.config)
    lm.body(input_ids=torch.tensor([list(prompt)], device=lm.device), past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        select_rows(layer, torch.zeros(len(responses), dtype=torch.long, device=lm.device))
    ids, lengths = pad_right(responses, lm), torch.tensor([len(r) for r in responses], device=lm.device)
    positions = torch.arange(ids.shape[1], device=lm.device)
    weights = (positions < lengths[:, None]).float() / lengths[:, None]
    states = torch.empty(len(responses), lm.layout.n_layers, lm.layout.d_model)

    def watch(layer: int) -> Any:
        def take(value: Tensor) -> None:
            states[:, layer] = torch.einsum("bt,btd->bd", weights, value.float()).cpu()

        return take

    with hooks.observe(lm.layout, {Site("resid_post", layer): watch(layer) for layer in range(lm.layout.n_layers)}):
        # Causal masks keep tokens from the right padding, so no attention mask is needed.
        lm.body(input_ids=ids, position_ids=(len(prompt) + positions)[None], past_key_values=cache, use_cache=True)
    return states


def fit(
    features: Float[ndarray, "n d"],
    pairs: PairRows,
    *,
    layer: int,
    fingerprint: str,
    strength: float = assumed_strength,
    margins: Float[ndarray, " pairs"] | None = None,
) -> RewardHead:
    """Train a ``RewardHead`` on pairs of responses, and return it.

    Args:
        features: Features of each response at ``layer``, from ``response_states``.
        pairs: Row indices of pairs: ``(preferred response, other response)``.
        layer: Layer that the features are from.
        fingerprint: Fingerprint of the model that they are from, ``lm.fingerprint``.
        strength: Inverse of the L2 penalty; lower gives smaller weights.
        margins: By how much more the preferred response of each pair has to score (``stats.bradley_terry``).

    Raises:
        ValueError: there are no pairs, not one margin per pair, or a feature is not finite.
    """
    return RewardHead(stats.bradley_terry(features, pairs, strength=strength, margins=margins), layer, fingerprint)


def flipped(pairs: PairRows, *, seed: int = 0) -> PairRows:
    """Return the pairs with their labels shuffled: each is reversed with probability one half. A head trained on them is a control."""
    reverse = np.random.default_rng(seed).random(len(pairs)) < 0.5
    return np.where(reverse[:, None], pairs[:, ::-1], pairs)


def best_of(scores: Float[ndarray, "prompts n"], right: Bool[ndarray, "prompts n"]) -> Float[ndarray, " prompts"]:
    """Return for each prompt the probability that the response with the best score is right; equal scores are chosen among at random.

    >>> best_of(np.array([[1.0, 2.0], [3.0, 3.0]]), np.array([[False, True], [False, True]])).tolist()
    [1.0, 0.5]
    """
    top = scores == scores.max(axis=1, keepdims=True)
    return (top & right).sum(axis=1) / top.sum(axis=1)
