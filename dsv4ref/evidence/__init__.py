"""How a claim is proved and measured: comparisons, gates, timing, rooflines, launches, ISA, records.

Knows nothing of DeepSeek-V4: it takes callables and tensors.
"""
