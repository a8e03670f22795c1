"""Running statistics examined, watched and repaired: what is wrong with a state, and what mends it."""

from cubn.health.finding import Finding, Severity
from cubn.health.history import TRENDS
from cubn.health.layer import Layer
from cubn.health.monitor import HealthWarning, Monitor

__all__ = ["TRENDS", "Finding", "HealthWarning", "Layer", "Monitor", "Severity"]
