"""One module per chapter: reference, baseline, optimised path, cases, gate, hazards, prediction, claims."""

from dsv4ref.optimizations.base import Case, Hazard, Optimization, Prediction

__all__ = ["Case", "Hazard", "Optimization", "Prediction"]
