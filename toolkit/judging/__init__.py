"""Judges: score responses with a frozen model and a small trained head, and measure how often the scores are right.

``response_states`` gives features of several responses to one prompt. ``fit`` trains a ``RewardHead`` on pairs of responses of which one
is preferred. ``best_of`` measures how often the best score belongs to a right response. ``report`` is the table of any judge: accuracy,
calibration, length bias. ``at_equal_length`` is the length-controlled win rate. Two small judges serve as arguments of rewards:
``nuggets`` (a verifier of facts) and ``contrastive`` (an encoder of questions and queries).
"""

from toolkit.judging.heads import RewardHead, best_of, fit, flipped, response_states
from toolkit.judging.reports import at_equal_length, reliability, report

__all__ = ["RewardHead", "at_equal_length", "best_of", "fit", "flipped", "reliability", "report", "response_states"]
