"""Learning to summarize from human feedback (Stiennon et al., 2020), arXiv:2009.01325.

A reward model is trained on preferences between summaries, and a policy is trained on its scores, with a penalty for its distance from the
initial policy. If the penalty is weak, the scores go on rising while the true quality falls: *over-optimisation* (section 4.3, figure 5).

Equations (x: prompt, y: response, pi: policy, pi_0: initial policy, r: score of the reward model, beta: weight of the penalty, rho = pi_0 /
pi, sigma: the logistic function)::

    reward model   L = -log sigma( r(x, y_w) - r(x, y_l) )                                     section 3.4; ``judging.fit``
    reward         R(x, y) = r(x, y) - beta log( pi(y|x) / pi_0(y|x) )                         section 3.4; per token: ``shaped_rewards``
    KL per token   k1 = -log rho,   k3 = rho - 1 - log rho                                     ``kl_terms``
    best of n      KL = log n - (n - 1) / n                                                    ``best_of_n_kl``
    optimum        pi_beta(y|x) = pi_0(y|x) exp(r(x, y) / beta) / Z(x)                         ``tilted``

R is the reward of a whole response; its penalty is a sum over tokens, so each token gets its own share, and the last one the score as well.
The best policy under R is pi_beta. Best-of-n samples n responses of pi_0 and keeps the best score; both move away from pi_0 as n grows or
beta falls.

Sources besides the paper: k1 and k3 are John Schulman's (joschu.net/blog/kl-approx.html, 2020). The KL of best-of-n is from the
paper's appendix; it is exact if all scores differ, else an upper bound (Beirami et al., arXiv:2401.01879). Best-of-n from N samples without
bias: WebGPT, arXiv:2112.09332.

Deviations: the paper trains 1.3B and 6.7B models with PPO, on human judgements. Here the true quality is known, since the responses are
generated (``tasks.generators.preferences``), and both kinds of optimisation are exact on a finite set of sampled responses, without
training a policy: so the KL is at most log N. The paper shifts r so that reference summaries score 0 on average; a shift changes no choice
and no advantage, so it is left out. A reproduction's penalty of -1 for a response that does not end is left out, too.

Units and signs: KL in nats per response (``kl_terms``: per token); scores in logits, higher is better.

Cost: none beside the scores. ``data/judging`` has a measurement on a frozen SmolLM2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray
from scipy import special

from toolkit import stats

PUBLISHED_BETA = 0.05


# --- reward and KL per token ---------------------------------------------------------------------------------


def shaped_rewards(
    score: float, logprobs: Sequence[float] | ndarray, initial: Sequence[float] | ndarray, beta: float = PUBLISHED_BETA
) -> Float[ndarray, " tokens"]:
    """Return the reward of each token: ``-beta log(pi / pi_0)``, and at the last token also the score. Their sum is R.

    Args:
        score: r, the reward model's score of the whole response.
        logprobs: Log-probability of each token of the response under the policy, in nats.
        initial: The same under the initial policy.
        beta: Weight of the penalty, in units of the score per nat.

    Raises:
        ValueError: the response is empty, or the two lengths differ.

    >>> shaped_rewards(1.0, [-1.0, -2.0], [-1.5, -2.0], beta=0.1).round(3).tolist()
    [-0.05, 1.0]
    """
    policy, before = np.asarray(logprobs, float), np.asarray(initial, float)
    if not len(policy) or policy.shape != before.shape:
        raise ValueError(f"{len(policy)} and {len(before)} log-probabilities: give one per token from each model, at least one.")
    rewards = -beta * (policy - before)
    rewards[-1] += score
    return rewards


def kl_terms(
    logprobs: Float[ndarray, " tokens"], initial: Float[ndarray, " tokens"], kind: str = "k1"
) -> Float[ndarray, " tokens"]:
    """Return one estimate of ``KL(pi || pi_0)`` per token, in nats, from tokens that were sampled from pi. Their mean has no bias.

    ``"k1"`` can be negative; ``"k3"`` never is, and varies less while the policies are close.

    Args:
        logprobs: Log-probability of each token under the policy.
        initial: The same under the initial policy.
        kind: ``"k1"`` or ``"k3"``.

    Raises:
        ValueError: an unknown kind.

    >>> kl_terms(np.array([-1.0, -2.0]), np.array([-2.0, -1.0]), "k3").round(3).tolist()
    [0.368, 0.718]
    """
    if kind not in ("k1", "k3"):
        raise ValueError(f"kind={kind!r}: choose k1 or k3.")
    log_rho = np.asarray(initial, float) - np.asarray(logprobs, float)
    return -log_rho if kind == "k1" else np.expm1(log_rho) - log_rho


# --- optimisation against the score --------------------------------------------------------------------------


def best_of_n_kl(n: int) -> float:
    """Return the KL divergence of best-of-n sampling from the initial policy, ``log n - (n - 1) / n``, in nats.

    >>> round(best_of_n_kl(4), 3)
    0.636
    """
    return math.log(n) - (n - 1) / n


def best_of_n(scores: Float[ndarray, " N"], values: Float[ndarray, " N"], n: int) -> float:
    """Return the expected value of the response with the best score among n of N sampled responses, without bias.

    The mean runs over all sets of n of the N responses. Equal scores are chosen among at random.

    Args:
        scores: Score of each response, by which the best is chosen.
        values: The quantity to average, such as the true quality.
        n: Responses to choose from, 1 to N.

    Raises:
        ValueError: n is out of range.

    >>> best_of_n(np.array([1.0, 2.0, 3.0]), np.array([0.0, 0.0, 1.0]), 2)  # the last one is best in two of three pairs
    0.6666666666666666
    """
    total = len(scores)
    if not 1 <= n <= total:
        raise ValueError(f"n={n} of {total} responses: n has to be 1 to {total}.")
    order = np.argsort(scores, kind="stable")
    # The response of rank k (from 1, the worst) is the best of C(k - 1, n - 1) sets.
    chance = special.comb(np.arange(total), n - 1) / special.comb(total, n)
    # Responses of equal score share their chances.
    _, which = np.unique(scores[order], return_inverse=True)
    return float(values[order] @ (np.bincount(which, chance) / np.bincount(which))[which])


def tilted(scores: Float[ndarray, " N"], beta: float) -> tuple[Float[ndarray, " N"], float]:
    """Return the best policy under R on N sampled responses, as probabilities, and its KL from the uniform distribution, in nats.

    The N responses stand for the initial policy, each with probability 1 / N. So the KL is at most log N.

    Args:
        scores: Score of each response.
        beta: Weight of the penalty, above 0.

    Raises:
        ValueError: beta is not above 0.

    >>> p, kl = tilted(np.array([0.0, 1.0]), beta=1.0)
    >>> p.round(3).tolist(), round(kl, 3)
    ([0.269, 0.731], 0.111)
    """
    if beta <= 0:
        raise ValueError(f"beta={beta}: the penalty's weight has to be above 0.")
    log_p = special.log_softmax(np.asarray(scores, float) / beta)
    p = np.exp(log_p)
    return p, float(p @ (log_p + math.log(len(p))))


def optimisation_curve(
    scores: Float[ndarray, "prompts N"],
    quality: Float[ndarray, "prompts N"],
    *,
    ns: Sequence[int] = (),
    betas: Sequence[float] = (),
    problems: Sequence[str] | ndarray | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Return score and true quality as optimisation against the score grows, with 95 % bootstrap intervals over prompts.

    Args:
        scores: Score of each of N responses of the initial policy to each prompt.
        quality: Their true quality.
        ns: Values of n, for best-of-n.
        betas: Values of beta, for the best policy under R.
        problems: Prompt id of each row, if a prompt has several rows, such as one per judge. Default: each row is another prompt.
        seed: Seed of the bootstrap.

    Returns:
        Table with one row per setting and measure, and the columns ``by`` (``"best of n"`` or ``"penalty"``), ``setting`` (n or beta),
        ``kl`` (nats), ``measure`` (``"score"`` or ``"quality"``), ``mean, low, high`` (difference from the initial policy).
    """
    rows, prompts = [], np.arange(len(scores)).astype(str) if problems is None else problems
    for measure, values in (("score", scores), ("quality", quality)):
        base = values.mean(axis=1)
        settings: list[tuple[str, float, float, ndarray]] = [
            ("best of n", n, best_of_n_kl(n), np.array([best_of_n(s, v, n) for s, v in zip(scores, values, strict=True)]))
            for n in ns
        ]
        for beta in betas:
            policies = [tilted(s, beta) for s in scores]
            gained = np.array([p @ v for (p, _), v in zip(policies, values, strict=True)])
            settings.append(("penalty", beta, float(np.mean([kl for _, kl in policies])), gained))
        for by, setting, kl, gained in settings:
            e = stats.over_problems(gained - base, prompts, seed=seed)
            rows.append((by, setting, kl, measure, e.mean, e.low, e.high))
    return pd.DataFrame(rows, columns=["by", "setting", "kl", "measure", "mean", "low", "high"])
