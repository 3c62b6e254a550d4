"""Jupyter widgets: steering with controls, a map of heads that can be turned off, transcripts side by side, and live learning curves.

They need the optional dependencies ``notebook``, except ``static``, which shows steered responses as HTML without controls.
"""

from toolkit.widgets.heads import head_map
from toolkit.widgets.responses import Stream, partial_html, response_html, streamed
from toolkit.widgets.steering import PHASES, static, steer
from toolkit.widgets.training import live
from toolkit.widgets.transcripts import compared_html, transcripts

__all__ = [
    "PHASES",
    "Stream",
    "compared_html",
    "head_map",
    "live",
    "partial_html",
    "response_html",
    "static",
    "steer",
    "streamed",
    "transcripts",
]
