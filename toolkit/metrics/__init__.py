"""How anything is judged: one table of metrics, one combination over problems and seeds (:class:`Judge`), one text cell."""

from toolkit.metrics.effects import Judge, Judged, cell, with_interval
from toolkit.metrics.outcomes import Outcomes, assumed_aes
from toolkit.metrics.table import METRICS, Metric, described

__all__ = ["METRICS", "Judge", "Judged", "Metric", "Outcomes", "assumed_aes", "cell", "described", "with_interval"]
