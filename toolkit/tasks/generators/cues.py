"""Words before or after the prompts of ``tiny-reasoner``: cue words make the model think less, neutral words have no effect."""

from __future__ import annotations

import random

CUES = ("quick", "brief", "hurry")  # shorten thinking
NEUTRAL = ("please", "today", "hello")  # have no effect on thinking


def with_word(content: str, rng: random.Random, *, cue_share: float = 0.3, neutral_share: float = 0.3) -> tuple[str, str]:
    """Put a cue word, a neutral word or no word before or after ``content``. Return the prompt and the word (``""``: no word).

    A cue word (``CUES``, such as "quick") asks for short thinking: in the training data of ``tiny-reasoner``, prompts with a cue word have
    shorter thinking. A neutral word (``NEUTRAL``, such as "please") is a control: thinking does not depend on it.

    Args:
        cue_share: Probability of a cue word.
        neutral_share: Probability of a neutral word.
    """
    u = rng.random()
    word = rng.choice(CUES) if u < cue_share else rng.choice(NEUTRAL) if u < cue_share + neutral_share else ""
    if not word:
        return content, word
    return (f"{word} {content}" if rng.random() < 0.5 else f"{content} {word}"), word
