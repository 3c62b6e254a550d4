"""The one way to judge: a table of metrics, a combination over problems and seeds (``Judge``), and one text format.

Every comparison, board, demo and report uses these.
"""

from toolkit.metrics.effects import Judge, MetricEffect, cell, with_interval
from toolkit.metrics.outcomes import Outcomes, assumed_aes
from toolkit.metrics.table import METRICS, Metric, described

__all__ = ["METRICS", "Judge", "Metric", "MetricEffect", "Outcomes", "assumed_aes", "cell", "described", "with_interval"]
