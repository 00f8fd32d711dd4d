"""Triton kernels and their launchers, and adapters to AITER and peer kernels; installed as ``dsv4ref.kernels``.

Importing this package, or any module in it, decides how Triton kernels run in this process: compiled where torch sees
a GPU, else by Triton's CPU interpreter with the fidelity shim of ``interpreter``. Import it before ``triton``.
"""

from dsv4ref.kernels.interpreter import configure, mode

__all__ = ["mode"]

configure()
