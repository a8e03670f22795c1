"""Running statistics examined and repaired: what is wrong with a state, and what mends it."""

from cubn.health.finding import Finding, Severity
from cubn.health.layer import Layer

__all__ = ["Finding", "Layer", "Severity"]
