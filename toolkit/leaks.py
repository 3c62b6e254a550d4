"""Find responses that go on thinking in their answer, that is, after the closing think tag.

Models that were trained or steered to think less may move their thinking to the answer. The think span is then shorter, although the model
reasons as much as before. ``leaks`` tests a response for this. The metric ``leaking`` is the share of such responses.
"""

from __future__ import annotations

import re

from toolkit.tags import ThinkTags
from toolkit.types import Rollout

assumed_words = ("wait", "hmm", "hold on")
"""An answer with a sentence that begins with one of these words counts as thinking.

NoWait (arXiv:2506.08343) lists such words. The choice of these is ours.
"""
_STARTS = re.compile(rf"(?:^|[.!?…\n])\W*(?:(?:but|oh|no|ah)\b\W*)*(?:{'|'.join(assumed_words)})\b", re.IGNORECASE)


def leaks(rollout: Rollout, tags: ThinkTags | None) -> bool:
    """Return True if a response goes on thinking in its answer.

    The result is True if the answer contains a think tag, or a sentence that begins with one of ``assumed_words`` (such as "Wait, ..." or
    "But wait"). It is False if the response has no answer, because its thinking was never closed. It is also False if the model has no
    closing think tag, since nothing marks where thinking ends.

    Args:
        rollout: The response.
        tags: Think tags of the model that sampled it; ``None`` if it has none.
    """
    if rollout.answer is None or tags is None or tags.close is None:
        return False
    answer = rollout.text
    closed_by_prompt = rollout.think is not None and rollout.think.stop == rollout.prompt_len
    if rollout.think is not None and not closed_by_prompt:
        answer = answer.partition(tags.close)[2]
    return any(tag in answer for tag in (tags.open, tags.close) if tag) or bool(_STARTS.search(answer))
