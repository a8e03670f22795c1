"""Running statistics of a data set: exact, in passes over it, resumable, over ranks, all layers or none."""

from cubn.health.recalibration.request import recalibrate

__all__ = ["recalibrate"]
