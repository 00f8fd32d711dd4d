"""The PyTorch reference: one readable function per operation, the specification in code. Never imports kernels.

Where public implementations differ, `dsv4ref.ref.numerics.Numerics` has a switch or the function's docstring names the
choice; book/ambiguities.md lists who does what.
"""
