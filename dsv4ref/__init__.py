"""DeepSeek-V4 inference optimisations as a workbook: references, kernels, evidence.

Floors, lowest first: ``config``, ``formats``, ``device``, ``settings``, ``diagnostics``; then ``ref`` and ``kernels``;
then ``evidence`` and ``serving``; then ``optimizations``; then ``show``; then the command line and the notebooks. A
module imports only from floors below it.
"""

__version__ = "0.1.0"
