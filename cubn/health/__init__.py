"""Running statistics examined, watched and repaired: what is wrong with a state, and what mends it."""

from cubn.health.finding import Finding, Severity
from cubn.health.gap import LayerGap, TrainEvalGap
from cubn.health.history import TRENDS
from cubn.health.layer import Layer
from cubn.health.monitor import HealthWarning, Monitor
from cubn.health.train_eval_gap import train_eval_gap

__all__ = [
    "TRENDS",
    "Finding",
    "HealthWarning",
    "Layer",
    "LayerGap",
    "Monitor",
    "Severity",
    "TrainEvalGap",
    "train_eval_gap",
]
