"""One module per chapter: reference, baseline, optimised path, cases, gate, hazards, prediction, claims."""

from dsv4ref.optimizations.base import Case, Claim, Hazard, Optimization, Prediction

__all__ = ["Case", "Claim", "Hazard", "Optimization", "Prediction"]
