"""Recipes: the training settings of a method as one frozen value, which can be printed, compared and changed with ``dataclasses.replace``.

``recipes.dler()`` has the paper's numbers; its field ``sources`` says where they come from. ``recipes.dler().scaled()`` is the same method
with numbers for the tiny reasoner (the small model in this package). Scaled recipes have 16 problems x 8 samples per step, responses of at
most 200 tokens (40 for DLER), and a learning rate chosen on the dev split. All numbers set by ``scaled`` are ours.

``recipes.ALL`` lists the recipes. For the name of a reward without a recipe of its own, ``find(name)`` returns plain GRPO with that reward.

If we did not find a number of a paper, the reward's default (``assumed_...`` in the reward's module) or TRL's default is used.

Samples per problem, in the paper and scaled:

>>> find("dler").samples, find("dler").scaled().samples
(16, 8)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pandas as pd

from toolkit import rewards
from toolkit.grpo.decs import DECS
from toolkit.grpo.draws import Curriculum, Dynamic, Modes
from toolkit.grpo.filters import GFPO, CellMask
from toolkit.grpo.losses import DRPO, ModeSwitch
from toolkit.grpo.recipe import Recipe as Recipe

CLIP_HIGHER = {"epsilon": 0.2, "epsilon_high": 0.28}
"""Clip-higher (DAPO): the ratio of token probabilities, new to old policy, is clipped to ``[1 - epsilon, 1 + epsilon_high]``."""
DUAL_CLIP = 10.0
"""Largest probability ratio, new to old policy, for tokens with a negative advantage A: such a token adds at most ``10 |A|`` to the loss.

TRL calls this number ``delta``, verl ``clip_ratio_c``. Both libraries compute the same loss if the number exceeds ``1 + epsilon_high``.
"""


def plain(reward: str, **options: Any) -> Recipe:
    """Return a recipe that trains the given reward with GRPO, with TRL's defaults.

    By these defaults, advantages are divided by the standard deviation of the rewards in the group. The loss is the mean over all tokens of
    the batch (DAPO's loss).

    Args:
        reward: Name of the reward, a key of ``rewards.ALL``.
        options: Arguments of the reward, by name.
    """
    entry = rewards.ALL.get(reward)
    paper = entry.paper if entry else ""
    return Recipe(
        reward, paper, reward, options, sources="GRPO as TRL's defaults have it (arXiv 2402.03300); learning rate: TRL's."
    )


def length_penalty_mild() -> Recipe:
    """Return our recipe of the reward ``length_penalty`` with half the default weight of its penalty (``alpha=0.5``).

    It is meant for comparison with ``find("length_penalty")``, which has the full weight. A penalty with too small a weight has no effect.
    With too large a weight, training collapses. The range of weights between is narrow.
    """
    return replace(
        plain("length_penalty", alpha=0.5), name="length_penalty_mild", sources="Ours: to be compared with length_penalty."
    )


def grpo_lambda() -> Recipe:
    """Return the recipe of GRPO-lambda (arXiv 2505.18086): length is penalised only on the batch's problems with the highest accuracy."""
    return Recipe(
        "grpo_lambda",
        "2505.18086",
        "grpo_lambda",
        sources="20 % of groups: a note's example. Penalty, rate, batch: not found; the reward's defaults and TRL's.",
    )


def dler(*, tokens: bool = False) -> Recipe:
    """Return the recipe of DLER (arXiv 2510.15110).

    It combines a reward for correct responses that end within a length limit, advantages normalised over the batch, clip-higher (see
    ``CLIP_HIGHER``), and dynamic sampling.

    Args:
        tokens: True to take the mean and standard deviation of the advantages over all tokens of the batch, as in the released code. False
            to take them over all responses, as in the paper.
    """
    return Recipe(
        "dler",
        "2510.15110",
        "dler",
        advantage="dler_tokens" if tokens else "dler",
        dynamic=Dynamic(),
        problems=512,
        samples=16,
        updates=8,
        max_tokens=4000,
        learning_rate=1e-6,
        config={
            **CLIP_HIGHER,
            "delta": DUAL_CLIP,
            "beta": 5e-4,
            "loss_type": "dapo",
            "max_grad_norm": 1.0,
            "weight_decay": 0.01,
            "temperature": 1.0,
        },
        sources="Paper and code NVlabs/DLER: 16 rollouts, 512 prompts, mini-batch 64, 4000 tokens, dual clip 10 (script: clip_ratio_c). "
        "KL is TRL's k3 (paper: mse; script: k3). Dynamic sampling looks at the truncated reward (paper; script: at the score before it).",
    )


def da_dler() -> Recipe:
    """Return the recipe of difficulty-aware DLER (arXiv 2510.15110): problems that the model solves more often get a lower length limit."""
    return replace(
        dler(), name="da_dler", reward="da_dler", sources="Paper: 2000 tokens above accuracy .5, 4000 below; not in the code."
    )


def laser(reward: str = "laser") -> Recipe:
    """Return the recipe of LASER (arXiv 2505.15612): a bonus for correct responses within a target length.

    Args:
        reward: Name of the reward; only for internal use. For the variants of LASER, call ``laser_d()`` or ``laser_de()``.
    """
    return Recipe(
        reward,
        "2505.15612",
        reward,
        problems=128,
        updates=2,
        max_tokens=16384,
        learning_rate=1e-6,
        config={**CLIP_HIGHER, "beta": 1e-3, "entropy_coef": 1e-3, "temperature": 0.6},
        sources="Paper and code hkust-nlp/Laser: batch 128, mini-batch 64, 8 rollouts, T .6, 16384 tokens, 1e-6.",
    )


def _adapted(reward: str) -> Recipe:
    """Return the recipe of a LASER variant whose target lengths are adapted during training; ``Recipe.sources`` says how.

    Args:
        reward: Name of the reward, ``"laser_d"`` or ``"laser_de"``.
    """
    recipe = laser(reward)
    more = " Targets: 500 problems monitored every 20 generations; |C_d| rounded up (paper; scripts: down, laser_targets.SCRIPT_ROUNDING)."
    return replace(recipe, sources=recipe.sources + more)


def laser_d() -> Recipe:
    """Return the recipe of LASER-D (arXiv 2505.15612): LASER with one target length per level of difficulty, adapted during training."""
    return _adapted("laser_d")


def laser_de() -> Recipe:
    """Return the recipe of LASER-DE (arXiv 2505.15612): LASER-D plus a bonus for wrong responses that exceed the target length."""
    return _adapted("laser_de")


def hapo() -> Recipe:
    """Return the recipe of HAPO (arXiv 2505.11225).

    A correct response is compared with the shortest correct response to the same problem so far. It gets a bonus if it is shorter, and a
    penalty if it is longer.
    """
    return Recipe(
        "hapo",
        "2505.11225",
        "hapo",
        problems=2,
        samples=2,
        max_tokens=32768,
        config={"temperature": 0.7},
        sources="Script of HCY123902/HAPO: 2 rollouts, 4 responses a process and step, T .7, 32768 tokens, TRL's learning rate.",
    )


def drpo(lam: float = 0.1) -> Recipe:
    """Return the recipe of DRPO (arXiv 2510.04474), which has its own loss: length matters only among correct rollouts.

    Args:
        lam: Temperature of the weights for brevity; a smaller value favours short rollouts more (see ``losses.DRPO``).
    """
    return Recipe(
        "drpo",
        "2510.04474",
        "correctness",
        loss=DRPO(lam=lam, capacity=8192),
        problems=128,
        updates=4,
        max_tokens=8192,
        learning_rate=2e-6,
        config={"temperature": 0.6},
        sources="Code Optimization-AI/DRPO, the 1.5B script: lambda .1, tau 10, beta 1e3, delta 1e-4, batch 128, mini-batch 32, 8 rollouts.",
    )


def gfpo(keep: int = 8, metric: str = "shortest") -> Recipe:
    """Return the recipe of GFPO (arXiv 2508.09726): sample many responses, and learn from the shortest, or the best per token.

    Args:
        keep: Number of responses per problem to learn from, of 16.
        metric: ``"shortest"`` or ``"efficiency"`` (see ``filters.GFPO``).
    """
    return Recipe(
        "gfpo" if metric == "shortest" else "gfpo_efficiency",
        "2508.09726",
        "correctness",
        filter=GFPO(keep, metric),
        samples=16,
        note=f"only {'the shortest responses' if metric == 'shortest' else 'those with the most reward per token'} are trained on",
        sources="Notes: 8, 16 or 24 rollouts, at most 8 kept. Batch, rate and token limit not found.",
    )


def gfpo_efficiency() -> Recipe:
    """Return the recipe of GFPO (arXiv 2508.09726) that keeps the responses with the most reward per token."""
    return gfpo(metric="efficiency")


def art(masked: tuple[str, ...] = ()) -> Recipe:
    """Return the recipe of Art's study of truncation (arXiv 2602.20945): correctness within a length limit.

    Args:
        masked: Cells of responses to learn nothing from, some of ``filters.CELLS``. The paper's variants are ``("SW", "LW")``, ``("LC",)``,
            ``("LC", "SW")`` and ``("LC", "LW")``; () masks none. With a mask, responses are sampled up to 16,000 tokens, four times the
            length limit, as in the paper's study: else none would be long. A group has then 8 responses, else 24.
    """
    return Recipe(
        "art",
        "2602.20945",
        "truncation",
        {"target": 4000},
        filter=CellMask(masked, 4000) if masked else None,
        problems=128,
        samples=8 if masked else 24,
        max_tokens=16_000 if masked else 4000,
        learning_rate=1e-6,
        config={**CLIP_HIGHER},
        note=f"sampled up to {'16,000 tokens' if masked else 'the same limit'}, {'8' if masked else '24'} responses per problem",
        sources="Notes: 24 rollouts, batch 128, limit of the reward = limit of sampling = 4k, 1e-6, clip-high .28. Easy prompts: not chosen here. "
        "Masking study: limit of sampling 16k; 8 rollouts, from the base setting with this limit, not restated for the study.",
    )


def decs() -> Recipe:
    """Return the recipe of DECS (arXiv 2509.25827): only tokens after the first right answer of the thinking are charged for length."""
    return Recipe(
        "decs",
        "2509.25827",
        "correctness",
        token_advantage=DECS(),
        samples=16,
        max_tokens=16384,
        note="tokens after the first right answer in the thinking are charged for length",
        sources="Code pixas/DECS: bonus .1, 16 rollouts, 16384 tokens. Judge and curriculum left out; batch and rate not found.",
    )


def luspo() -> Recipe:
    """Return the recipe of LUSPO (arXiv 2602.05261): GSPO's loss times the length of the response, which does not favour short ones."""
    return replace(
        plain("correctness"),
        name="luspo",
        paper="2602.05261",
        config={"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 2e-3, "epsilon_high": 2.5e-3},
        note="a response's loss is weighted by its length",
        sources="TRL's loss, with the paper's clipping. The loss grows with length: lower the rate, or rely on clipping.",
    )


def gdpo() -> Recipe:
    """Return the recipe of GDPO (arXiv 2601.05242) with the reward of LASER: its components are normalised one by one, then added."""
    return Recipe(
        "gdpo",
        "2601.05242",
        "laser",
        advantage="gdpo",
        note="correctness and bonus are normalised one by one",
        sources="TRL's normalize_then_sum, on the components of LASER, whose bonus only right answers get (ours). Numbers: TRL's.",
    )


def entropy_bonus() -> Recipe:
    """Return the recipe of correctness with TRL's adaptive entropy bonus, after Skywork-OR1 (arXiv 2505.22312)."""
    return replace(
        plain("correctness"),
        name="entropy_bonus",
        paper="2505.22312",
        config={"use_adaptive_entropy": True},
        note="an entropy bonus keeps the entropy above a target",
        sources="TRL's defaults: target .2 nats, steps of .005 up to 1. A bonus may lengthen responses: compare with and without.",
    )


def slpo() -> Recipe:
    """Return the recipe of SLPO, the method with which the ORION models were trained (arXiv 2511.22891).

    A correct rollout gets more reward the shorter it is among the correct rollouts of the same problem.
    """
    return replace(plain("slpo"), paper="2511.22891", sources="Weight, rate and batch not found.")


def train_long_think_short() -> Recipe:
    """Return the recipe of Train Long, Think Short (arXiv 2508.08940).

    The prompt states a token budget that falls during training. The reward is highest for a response of exactly that length.
    """
    return Recipe(
        "train_long_think_short",
        "2508.08940",
        "train_long_think_short",
        curriculum=Curriculum(),
        sources="Paper: B0 256 to 87 in 3 drops, every 150 of 600 steps, G 8. Rate and batch not found.",
    )


def adaptive_deep_reasoning(switch: ModeSwitch | None = None) -> Recipe:
    """Return the recipe of Adaptive Deep Reasoning (arXiv 2505.20101).

    Half of the responses to each problem are prompted for long thinking, half for short. We did not find all of the paper's numbers; the
    recipe's ``sources`` says which are ours.

    Args:
        switch: Parameters of a loss that teaches the model to choose between long and short thinking itself; its formula is ours. The
            parameters include the texts with which a long and a short response of your model begin. ``None`` leaves the loss out.
    """
    return Recipe(
        "adaptive_deep_reasoning",
        "2505.20101",
        "adaptive_deep_reasoning",
        modes=Modes(),
        switch=switch,
        sources="Rewards 1.5 and 1.0 from digests; thresholds, margin, rate and batch are ours.",
    )


def sar() -> Recipe:
    """Return the recipe of the self-aligned reward, SAR (arXiv 2509.05489).

    The reward of a response rises with its log-probability given the question minus its log-probability without the question.
    The paper's other form, PPO with a critic, is not built: the reward is the same, so that it is not needed.
    """
    return Recipe(
        "sar",
        "2509.05489",
        "sar",
        problems=128,
        samples=6,
        updates=2,
        max_tokens=4096,
        learning_rate=1e-6,
        config={"scale_rewards": "none", "loss_type": "dr_grpo", "beta": 1e-3},
        sources="Code amazon-science/Self-Aligned-Reward: alpha .2, n 6, batch 128, mini-batch 64, 4096 tokens, Dr. GRPO, 500 steps.",
    )


def pear() -> Recipe:
    """Return the recipe of PEAR (arXiv 2510.08026).

    The more the entropy of the thinking exceeds that of the answer, the lower the reward of a correct response.
    """
    return Recipe(
        "pear", "2510.08026", "pear", problems=128, learning_rate=1e-6, sources="Notes: alpha 1, batch 128, 1e-6; G not found."
    )


def surrogate() -> Recipe:
    """Return the recipe of surrogate rewards (arXiv 2505.19439), which score format and length and need no reference answers."""
    return Recipe(
        "surrogate",
        "2505.19439",
        "surrogate",
        problems=128,
        max_tokens=3072,
        learning_rate=1e-6,
        config={"beta": 1e-3, "temperature": 0.6},
        sources="Paper: p .5, 3072 tokens, batch 128, n 8, T .6, KL .001, 100 steps.",
    )


def longwriter() -> Recipe:
    """Return the recipe of LongWriter-Zero (arXiv 2506.18841): the mean of the advantages of length, writing quality and format.

    Quality and format are rules of ours. They read the headings and keywords that the prompts of the task ``writing`` request.
    """
    return Recipe(
        "longwriter",
        "2506.18841",
        "longwriter_zero",
        {"unit": "words"},
        advantage="decoupled",
        samples=32,
        max_tokens=14000,
        config={"temperature": 0.8},
        note="the advantages of length, quality and format are averaged",
        sources="Notes: ranges in words, 32 rollouts, T .8, 14000 tokens. Quality by rule: ours.",
    )


def ppr() -> Recipe:
    """Return the recipe of PPR (arXiv 2509.25598): a reward per turn, and one advantage per turn.

    The paper trains with PPO and a critic. Here GRPO's process rewards take its place.
    """
    return Recipe(
        "ppr", "2509.25598", "ppr", advantage="grpo_steps", sources="GRPO in place of PPO: ours. Rate and batch not found."
    )


def fine_grained() -> Recipe:
    """Return the recipe of Fine-Grained RLHF (arXiv 2306.01693): rewards at the ends of segments, and one advantage per token.

    The paper trains with PPO and a critic. Here the group's mean reward to go takes the critic's place.
    """
    return Recipe(
        "fine_grained",
        "2306.01693",
        "fine_grained",
        advantage="reward_to_go",
        samples=4,
        max_tokens=200,
        learning_rate=1e-5,
        config={"beta": 0.3, "temperature": 0.7, "top_k": 20},
        note="each error is charged at the token where its segment ends",
        sources="Code: KL .3, T .7, top-k 20, 4 samples, 200 tokens, 1e-5. Group means in place of a critic, KL in the loss: ours. Batch not found.",
    )


def page_llm() -> Recipe:
    """Return the recipe of PageLLM (arXiv 2506.09084): a reward of the page at its end and of each item at its identifier."""
    return Recipe(
        "page_llm",
        "2506.09084",
        "page_llm",
        advantage="reward_to_go",
        sources="Paper: PPO. Group means in place of a critic, and all numbers: ours or TRL's.",
    )


def mash() -> Recipe:
    """Return the recipe of MASH (arXiv 2510.01152): a right answer earns less the more calls it has beyond the fewest that suffice."""
    return Recipe(
        "mash",
        "2510.01152",
        "mash",
        {"cost": "calls"},
        samples=16,
        sources="Notes: exp, lambda .7, G 16, 1e-6, no KL. Batch not found.",
    )


ALL: Mapping[str, Callable[[], Recipe]] = MappingProxyType(
    {
        f.__name__: f
        for f in (
            length_penalty_mild,
            grpo_lambda,
            dler,
            da_dler,
            laser,
            laser_d,
            laser_de,
            hapo,
            drpo,
            gfpo,
            gfpo_efficiency,
            art,
            decs,
            luspo,
            gdpo,
            entropy_bonus,
            slpo,
            train_long_think_short,
            adaptive_deep_reasoning,
            sar,
            pear,
            surrogate,
            longwriter,
            ppr,
            fine_grained,
            page_llm,
            mash,
        )
    }
)
"""Name of the recipe -> function that makes the recipe."""


def find(name: str) -> Recipe:
    """Return the recipe named ``name``. If ``ALL`` has none, return plain GRPO with the reward of that name in ``rewards.ALL``.

    Raises:
        ValueError: no recipe and no reward has that name; the message lists all names.
    """
    if name in ALL:
        return ALL[name]()
    if name not in rewards.ALL:
        raise ValueError(f"Unknown reward or recipe {name!r}: choose one of {', '.join(sorted({*ALL, *rewards.ALL}))}.")
    return plain(name)


def catalogue() -> pd.DataFrame:
    """Return a table of all rewards and recipes, one row each, for ``toolkit grpo --list``.

    A recipe is a paper's training setup: reward, loss, and numbers such as the batch size. Index: ``name``. Columns:

    * ``paper``: arXiv id.
    * ``own``: ``"yes"`` if there is a recipe of this name; ``""`` if there is only a reward, which is used with plain GRPO.
    * ``pays``: one sentence that says which responses get a high reward.
    """
    rows = [(name, e.paper, "yes" if name in ALL else "", e.line) for name, e in rewards.ALL.items()]
    others = [(name, find(name)) for name in ALL if name not in rewards.ALL]
    rows += [(name, r.paper, "yes", f"{rewards.ALL[r.reward].line[:-1]}; {r.note or 'its loss differs'}.") for name, r in others]
    return pd.DataFrame(rows, columns=["name", "paper", "own", "pays"]).set_index("name")
