"""CoDE-Stop: stop thinking by confidence and its decline, arXiv:2604.04930. A check for ``exits.EarlyExit``.

At each candidate, an answer is forced: thinking is closed, and up to 21 tokens are decoded greedily. Equations, for a probe of n tokens
with probabilities p_1 .. p_n, and for candidate j::

    conf   = exp( sum_{i=2}^{n-1} ln p_i / (n - 1) )              needs n >= 3
    r_j    = low + (high - low) min(1, (j - 1) / ramp)            .90 to .95, ramp 2
    D      = sum over i, where ln conf fell from i - 1 to i, of 1 + ln(t_last / t_i)        0 before 3 observations
    stop   if conf > r_j or D > 2.0

t_i is the number of think tokens at candidate i, t_last that at the newest one. A fixed threshold (``low=high=.95``, no limit on D) is
DEER, the method's sibling.

Sources: two re-implementations of one upstream commit, and the abstract; the paper and its own code could not be read. The values above are
those of the re-implementations.

Deviations:

* The probe's first and last token are left out of the sum, as in the re-implementations: with ``\\boxed{`` as ``lead`` they are not the
  answer. ``skip`` changes that. For answers of one or two tokens, ``skip=(0, 0)`` averages all of them, the end token included.
* The probe ends at the end token or at ``until``; the re-implementations count the text after the box too, which they call a bug.
* Without a confidence (a probe that is too short), a candidate stops nothing and is not an observation.

Units and signs: confidences are probabilities, 0 to 1; t counts think tokens. Cost: each candidate takes a pass over the response so far
and one pass per probe token. **Count them**: ``probe_tokens`` returns their number, and a saving should be stated without them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from transformers import DynamicCache

from toolkit import exits
from toolkit.baselines import closing
from toolkit.exits import EarlyExit
from toolkit.lm import LM
from toolkit.spans import Reader
from toolkit.types import Rollout

LONGEST = 21  # tokens of a probe, as in the re-implementations
SKIP = (1, 1)  # tokens left out at both ends, as in the re-implementations
LOW, HIGH, RAMP, DECLINE = 0.90, 0.95, 2, 2.0  # thresholds, as in the re-implementations; not confirmed upstream
FEWEST = 3  # observations before the decline counts


def confidence(logprobs: Sequence[float], skip: tuple[int, int] = SKIP) -> float | None:
    """Return the confidence of a probe, 0 to 1; ``None`` if no token is left to average.

    >>> round(confidence([-9.0, -0.2, -0.4, -9.0]), 4)  # exp((-0.2 - 0.4) / 3)
    0.8187

    Args:
        logprobs: Log-probability of each token, nats.
        skip: Number of tokens at the beginning and at the end that are left out of the sum. The divisor is the number of tokens without
            those at the beginning.
    """
    first, last = skip
    chosen = logprobs[first : len(logprobs) - last]
    return math.exp(sum(chosen) / (len(logprobs) - first)) if chosen else None


def threshold(j: int, low: float = LOW, high: float = HIGH, ramp: int = RAMP) -> float:
    """Return the threshold on the confidence at candidate j, counted from 1.

    >>> [round(threshold(j), 3) for j in (1, 2, 3, 4)]
    [0.9, 0.925, 0.95, 0.95]
    """
    return low + (high - low) * (min(1.0, (j - 1) / ramp) if ramp else 1.0)


def decline(observed: Sequence[tuple[float, int]]) -> float:
    """Return the degeneration D: the weighted number of falls of the log-confidence. It is 0 for fewer than three observations.

    >>> round(decline([(0.9, 10), (0.5, 20), (0.6, 40)]), 4)  # one fall, at token 20: 1 + ln(40 / 20)
    1.6931

    Args:
        observed: Pairs (confidence, number of think tokens) of the candidates so far, in order.
    """
    if len(observed) < FEWEST:
        return 0.0
    last = observed[-1][1]
    return math.fsum(1 + math.log(last / max(1, t)) for (before, _), (now, t) in pairwise(observed) if now < before)


@dataclass(frozen=True)
class Probe:
    """How an answer is forced at a candidate.

    Attributes:
        before: Text directly before the closing think tag.
        lead: Text after the closing tag, such as ``"\\boxed{"``, which the model continues.
        until: Text at which the probe ends, such as ``"}"``; ``""`` for none. The end token ends it in any case.
        tokens: Largest number of tokens.
    """

    before: str = ""
    lead: str = ""
    until: str = ""
    tokens: int = LONGEST

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"tokens={self.tokens}: a probe needs at least one token.")

    @torch.inference_mode()
    def __call__(self, lm: LM, reader: Reader) -> tuple[list[int], list[float]]:
        """Return the tokens of a forced answer, decoded greedily, and their log-probabilities in nats."""
        forced = [*closing(lm, reader, self.before), *lm.tokenizer.encode(self.lead, add_special_tokens=False)]
        ids = torch.tensor([[*reader.ids, *forced]], device=lm.device)
        cache, tokens, logprobs = DynamicCache(config=lm.model.config), list[int](), list[float]()
        while len(tokens) < self.tokens:
            logits = lm.model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0, -1].float()
            token = int(logits.argmax())
            tokens.append(token)
            logprobs.append(float(logits.log_softmax(dim=-1)[token]))
            if token in lm.eos_ids or (self.until and self.until in lm.text(tokens)):
                break
            ids = torch.tensor([[token]], device=lm.device)
        return tokens, logprobs


@dataclass(frozen=True)
class CodeStop:
    """Check that stops where a forced answer is confident, or where confidence has declined.

    Attributes:
        low: Threshold on the confidence at the first candidate.
        high: Threshold after the ramp.
        ramp: Number of candidates over which the threshold rises; 0 for ``high`` from the first on.
        limit: Limit on the decline D; infinity for none, as in DEER.
        skip: Tokens of a probe that are left out, see ``confidence``.
        probe: How the answer is forced.
    """

    low: float = LOW
    high: float = HIGH
    ramp: int = RAMP
    limit: float = DECLINE
    skip: tuple[int, int] = SKIP
    probe: Probe = Probe()

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= 1 or self.ramp < 0 or not self.limit > 0 or min(self.skip) < 0:
            raise ValueError(
                f"low={self.low}, high={self.high}, ramp={self.ramp}, limit={self.limit}, skip={self.skip}: need 0 <= low <= high <= 1, "
                "ramp >= 0, limit > 0, and no negative number of tokens to skip."
            )

    def __call__(self, lm: LM, reader: Reader, earlier: list[Any]) -> bool:
        """Return True to stop. ``earlier`` gets a triple per candidate: confidence or ``None``, think tokens, probe tokens."""
        tokens, logprobs = self.probe(lm, reader)
        conf = confidence(logprobs, self.skip)
        earlier.append((conf, reader.written, len(tokens)))
        observed = [(c, t) for c, t, _ in earlier if c is not None]
        if conf is None:
            return False
        return conf > threshold(len(earlier), self.low, self.high, self.ramp) or decline(observed) > self.limit


def probe_tokens(lm: LM, rule: EarlyExit, rollout: Rollout) -> int:
    """Return the number of tokens that the probes of a response took. The check is replayed at each candidate up to the exit.

    At the end of the last step, the tokens do not tell whether the rule or the model closed thinking, unless the rule places a text before the
    tag. If the replayed check stops there, the probe is counted. If not, the model closed thinking by itself, so no probe was made. With
    ``cues`` and without such a text, the number is therefore an upper bound.

    Args:
        lm: The model.
        rule: Rule with a ``CodeStop`` as its check, with which the response was sampled.
        rollout: The response.
    """
    earlier: list[Any] = []
    for _, reader in exits.candidates(lm, rule, rollout, closed=True):
        if rule.check(lm, reader, earlier):
            break
        if exits.is_close(lm, rule, rollout, reader):
            del earlier[-1]
    return sum(tokens for _, _, tokens in earlier)
