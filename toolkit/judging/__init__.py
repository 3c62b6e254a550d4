"""Judges: score responses with a frozen model and a small trained head, and measure how often the scores are right.

``response_states`` gives features of several responses to one prompt. ``fit`` trains a ``RewardHead`` on pairs of responses of which one
is preferred. ``best_of`` measures how often the best score belongs to a right response. Two small judges serve as arguments of rewards:
``nuggets`` (a verifier of facts) and ``contrastive`` (an encoder of questions and queries).
"""

from toolkit.judging.heads import RewardHead, best_of, fit, flipped, response_states

__all__ = ["RewardHead", "best_of", "fit", "flipped", "response_states"]
