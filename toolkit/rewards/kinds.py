"""Every reward as a model of preference: where it comes from, how often it is paid, and the assumption that it makes about good responses.

The words are those of a survey, Inverse reinforcement learning meets large language model post-training, arXiv:2507.13158. There a reward is
what a demonstrator or annotator is thought to maximise. It is either given (by a rule or a verifier) or inferred from preferences or
demonstrations, and it is sparse (one number per response) or dense.

Deviations: only abstract and digests of the survey were read; the five sources and their names are ours, and so is every assumption below. No
reward here is inferred from demonstrations: HAPO, MASH and the fitted targets of LASER-D come nearest, since they take the shortest success
so far as an example.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

RULE, OUTCOME, PREFERENCE, PROCESS, POLICY = "rule", "verifiable outcome", "preference model", "process", "policy itself"
SOURCES = {
    RULE: "computed from the response alone, such as its length, its form or its repetitions; a designer states what is better",
    OUTCOME: "computed from an answer that can be checked, or from labels of the problem",
    PREFERENCE: "the score of a model that was trained on pairs or labels",
    PROCESS: "a value for each step, turn or segment, not only for the end",
    POLICY: "computed from the probabilities of the model that is trained",
}
"""Source of a reward -> description."""


@dataclass(frozen=True)
class Kind:
    """Place of a reward among models of preference.

    Attributes:
        sources: Where its parts come from, keys of ``SOURCES``.
        assumes: What it assumes of good responses, or of those whose preferences it stands for.
    """

    sources: tuple[str, ...]
    assumes: str


_LENGTH = (OUTCOME, RULE)
KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "correctness": Kind((OUTCOME,), "All right answers are equally good."),
        "format": Kind((RULE,), "A well-formed response is better, whatever it says."),
        "length_penalty": Kind(_LENGTH, "Each token costs the same, in right and wrong responses."),
        "truncation": Kind(_LENGTH, "A response beyond a fixed length is worth nothing."),
        "think_prune": Kind(_LENGTH, "As truncation, with a patience that falls during training."),
        "cosine": Kind(_LENGTH, "Short is better when right, and long is better when wrong."),
        "overlong": Kind(_LENGTH, "Length matters only near the limit."),
        "arora_zanette": Kind(_LENGTH, "Right responses are compared with each other: shorter than the group's mean is better."),
        "kimi": Kind(_LENGTH, "The group's shortest response is best; a wrong one earns nothing by being short."),
        "alp": Kind(_LENGTH, "A token costs more on problems that are solved often."),
        "gr3": Kind(_LENGTH, "Length divides the worth of a right response."),
        "dot": Kind(_LENGTH, "Outliers in length are waste, once a problem is solved."),
        "l1_exact": Kind(_LENGTH, "The prompt states the wanted length; each token away from it costs."),
        "l1_max": Kind(_LENGTH, "The prompt states the largest length; less is better."),
        "grpo_lambda": Kind(_LENGTH, "Length matters only where nearly all responses are right."),
        "dler": Kind(_LENGTH, "A response beyond a fixed length is worth nothing."),
        "da_dler": Kind(_LENGTH, "Easy problems deserve less patience."),
        "laser": Kind(_LENGTH, "All right responses within a length are equally good."),
        "laser_d": Kind(_LENGTH, "As LASER; the lengths that suffice are read off the policy's own successes."),
        "laser_de": Kind(_LENGTH, "As LASER-D; a wrong response should have gone on."),
        "hapo": Kind(_LENGTH, "The shortest right response so far is the example to follow."),
        "slpo": Kind(_LENGTH, "The group's shortest right response is the example to follow."),
        "self_rewarded_efficiency": Kind(_LENGTH, "As SLPO, which stands in for it."),
        "train_long_think_short": Kind(_LENGTH, "The stated budget is the wanted length."),
        "adaptive_deep_reasoning": Kind(_LENGTH, "Each problem has a mode, long or short, that suits it; accuracy shows which."),
        "sar": Kind((OUTCOME, POLICY), "A good response is explained by the question, as the policy's likelihood sees it."),
        "pear": Kind((OUTCOME, POLICY), "Uncertain thinking before a certain answer is waste."),
        "crf": Kind((OUTCOME, PREFERENCE), "Of two right responses the more concise is preferred, as in Bradley-Terry."),
        "surrogate": Kind((RULE,), "An answer that parses, of medium length, tends to be right; no labels."),
        "longwriter": Kind((RULE,), "The wanted range of lengths is known."),
        "longwriter_zero": Kind(
            _LENGTH, "The requested length, headings and keywords are the whole preference; repetition is bad."
        ),
        "beyond_monolithic": Kind(_LENGTH, "Right, well formed, and not shorter than the group's right responses."),
        "hybrid": Kind(
            (OUTCOME, PREFERENCE), "The rule knows how sure it is; elsewhere a trained model ranks as annotators would."
        ),
        "mash": Kind(_LENGTH, "A right answer with fewer calls is better; the cheapest known one is the example."),
        "reseek": Kind((OUTCOME, PROCESS), "Each search result is useful or not, and a good response says so."),
        "re_searcher": Kind((OUTCOME, PROCESS), "Reflections on search results can be right or wrong."),
        "ppr": Kind((OUTCOME, PROCESS), "Each turn follows principles; the outcome sets the sign."),
        "fine_grained": Kind((OUTCOME, PROCESS), "Error types are independent and additive, each with a fixed weight."),
        "toolrl": Kind((OUTCOME, RULE), "Good calls equal the labelled ones in name, parameters and values."),
        "search_gen_v": Kind((OUTCOME, PREFERENCE), "A good answer states the labelled facts; all count the same."),
        "contrastive_sql": Kind((OUTCOME, PREFERENCE), "A right query is also near its question in a learned space."),
        "r3": Kind((RULE,), "Relevant, long and without repetition; a product, so that none can replace another."),
        "ruler": Kind((RULE,), "Only the stated range of lengths matters."),
        "repetition": Kind((OUTCOME, RULE), "Repeated n-grams make a right answer worth less."),
        "repetition_penalty": Kind((RULE,), "Repeated n-grams are bad, whatever the answer."),
        "ace_rl": Kind((RULE,), "The stated constraints are the whole preference, and all count the same."),
        "page_llm": Kind(
            (OUTCOME, PROCESS), "Readers gain from relevance, less at lower ranks; neighbours can be compared in pairs."
        ),
    }
)
"""Name of a reward in ``rewards.ALL`` -> its kind."""


def is_dense(reward: object) -> bool:
    """Return True if a reward also gives a value per turn (``steps``) or per segment (``segments``)."""
    # A field of the same name, such as a number of steps, is no method.
    return any(callable(getattr(reward, name, None)) for name in ("steps", "segments"))
