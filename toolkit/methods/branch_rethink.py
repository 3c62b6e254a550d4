r"""BR-RM: think twice, a branch-and-rethink reasoning reward model (2025), arXiv:2510.23596.

A judge that reads two responses once spreads its attention over all criteria. Here it judges in two turns: in the first it *branches*, that
is, it chooses one to three criteria that matter for this instance and lists issues under them; in the second it *rethinks*, that is, it reads
the responses again under these criteria, and gives a verdict ``\boxed{1}`` or ``\boxed{2}``.

Equations (p: the verdict, g: the preferred response, 1 or 2; G: judgements sampled per pair)::

    r   = 0 if p = g,   -10 |p - g| if not,   -100 if the format of a turn is broken                       ``reward``
    A_i = r_i - mean of the other G - 1 rewards                                    ``grpo.advantages.leave_one_out``

Both turns of a judgement get the same advantage. Sources: the paper and its code. Published training: G = 8, 64 pairs per step, temperature
1, 16k tokens; KL weight 0.02 in the configuration and 0.001 in the README.

Deviations: prompts, names of the eight criteria and the line ``Criteria: ...`` are ours. The gate is strict on both turns; in the released
code the first turn never fails. The verdict has to be the only box of its turn. ``judge`` runs
with any model; ``data/branch-judge`` trains small judges with ``reward`` and ``leave_one_out``.

Units and signs: rewards of 0 (best) to -100.

Cost: two responses per pair.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from toolkit import generate
from toolkit.generate import Sampling
from toolkit.lm import LM, Condition
from toolkit.types import Problem

WRONG, BROKEN = -10.0, -100.0  # from the paper's code: per point of difference, and for a broken format
MOST_CRITERIA = 3  # from the paper
assumed_criteria = (
    "accuracy", "computation", "reasoning", "implementation", "safety", "completeness", "instructions", "clarity",
)  # fmt: skip

Message = Mapping[str, str]
Write = Callable[[Sequence[Sequence[Message]]], Sequence[str]]
"""Function from conversations, each a list of chat messages that ends with the user's, to one reply per conversation."""


@dataclass(frozen=True)
class Judgement:
    """A judgement of two responses in two turns.

    Attributes:
        branch: Reply of the first turn.
        rethink: Reply of the second turn.
        criteria: The criteria chosen in the first turn; ``None`` if its format is broken.
        verdict: Number of the better response, 1 or 2; ``None`` if the format of either turn is broken.
    """

    branch: str
    rethink: str
    criteria: tuple[str, ...] | None
    verdict: int | None


# --- prompts -------------------------------------------------------------------------------------------------


def branch_messages(question: str, responses: tuple[str, str], criteria: Sequence[str] = assumed_criteria) -> tuple[Message, ...]:
    """Return the conversation of the first turn: choose criteria, and list issues of both responses under them."""
    content = (
        f"Compare two responses to a question.\n\nQuestion:\n{question}\n\nResponse 1:\n{responses[0]}\n\nResponse 2:\n{responses[1]}\n\n"
        f"Do not decide yet. Choose the one to {MOST_CRITERIA} criteria that matter most here, from: {', '.join(criteria)}. Begin with one "
        "line 'Criteria: ' and their names, separated by commas. Then list the issues of each response under these criteria."
    )
    return ({"role": "user", "content": content},)


def rethink_messages(first: Sequence[Message], reply: str) -> tuple[Message, ...]:
    """Return the conversation of the second turn: read both responses again under the chosen criteria, and decide.

    Args:
        first: The conversation of the first turn.
        reply: The judge's reply to it.
    """
    content = (
        "Read both responses again under the criteria that you chose, and check each issue that you listed. Then end with the number of "
        "the better response in a box: \\boxed{1} or \\boxed{2}."
    )
    return (*first, {"role": "assistant", "content": reply}, {"role": "user", "content": content})


# --- the gate ------------------------------------------------------------------------------------------------


def chosen_criteria(reply: str, criteria: Sequence[str] = assumed_criteria) -> tuple[str, ...] | None:
    r"""Return the criteria that a reply chooses, or ``None`` if it breaks the format.

    The format: exactly one line ``Criteria: NAMES``, with one to three different known names, separated by commas.

    >>> chosen_criteria("Criteria: accuracy, Clarity\nResponse 1 is wrong.")
    ('accuracy', 'clarity')
    """
    lines = re.findall(r"^Criteria:(.*)$", reply, re.MULTILINE)
    if len(lines) != 1:
        return None
    names = [name.strip().lower() for name in lines[0].rstrip(" .").split(",")]
    fine = 1 <= len(names) <= MOST_CRITERIA and len(set(names)) == len(names) and set(names) <= {c.lower() for c in criteria}
    return tuple(names) if fine else None


def verdict(reply: str) -> int | None:
    r"""Return the number in the reply's only box, 1 or 2, or ``None`` if there is no box, another content, or more than one box.

    >>> verdict(r"The first one is right: \boxed{1}")
    1
    >>> verdict(r"\boxed{1} or \boxed{2}") is None
    True
    """
    boxes = re.findall(r"\\boxed\s*\{([^{}]*)\}", reply)
    if reply.count("\\boxed") != 1 or len(boxes) != 1 or boxes[0].strip() not in ("1", "2"):
        return None
    return int(boxes[0])


def reward(judgement: Judgement, preferred: int) -> float:
    """Return the reward of a judgement: 0 if right, -10 if wrong, -100 if the format of a turn is broken.

    Args:
        judgement: The judgement.
        preferred: Number of the preferred response, 1 or 2.

    Raises:
        ValueError: ``preferred`` is neither 1 nor 2.
    """
    if preferred not in (1, 2):
        raise ValueError(f"preferred={preferred}: give the number of the preferred response, 1 or 2.")
    if judgement.verdict is None:
        return BROKEN
    return WRONG * abs(judgement.verdict - preferred) if judgement.verdict != preferred else 0.0


# --- judging -------------------------------------------------------------------------------------------------


def judge(
    write: Write, pairs: Sequence[tuple[str, tuple[str, str]]], criteria: Sequence[str] = assumed_criteria
) -> list[Judgement]:
    """Return a judgement in two turns for each pair. The second turn is written only where the first keeps the format.

    Args:
        write: The judge, such as ``writer(lm)``.
        pairs: ``(question, (response 1, response 2))``.
        criteria: Names of the criteria to choose from.
    """
    first = [branch_messages(question, responses, criteria) for question, responses in pairs]
    branches = write(first) if first else []
    chosen = [chosen_criteria(reply, criteria) for reply in branches]
    kept = [i for i, names in enumerate(chosen) if names is not None]
    replies = dict(zip(kept, write([rethink_messages(first[i], branches[i]) for i in kept]) if kept else [], strict=True))
    return [
        Judgement(branch, replies.get(i, ""), names, verdict(replies[i]) if i in replies else None)
        for i, (branch, names) in enumerate(zip(branches, chosen, strict=True))
    ]


def writer(target: LM | Condition, sampling: Sampling = Sampling(temperature=0.0, max_new_tokens=512)) -> Write:
    """Return a function that lets a model reply to conversations. Thinking is left out of a reply; unfinished thinking gives "".

    Args:
        target: A model or condition with a chat template.
        sampling: Sampling settings, with one sample per conversation.

    Raises:
        ValueError: the sampling settings ask for several samples.
    """
    if sampling.n != 1:
        raise ValueError(f"n={sampling.n}: a judge writes one reply per conversation; repeat the pairs for more.")
    lm = target.lm if isinstance(target, Condition) else target

    def write(conversations: Sequence[Sequence[Message]]) -> list[str]:
        problems = [Problem(f"judgement-{i}", tuple(messages), "") for i, messages in enumerate(conversations)]
        rollouts = generate.rollouts(target, problems, sampling, progress=False)
        return ["" if r.answer is None else lm.text(r.token_ids[r.answer.start : r.answer.stop], special=False) for r in rollouts]

    return write
