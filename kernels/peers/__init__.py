"""Other people's kernels for the same operation, used where they are installed and never required.

* `flashmla`: FlashMLA's sparse decode over the FP8 caches, and its sparse prefill over bf16 keys;
* `vllm_triton`: the split-K decode that vLLM wrote in Triton for MI300X;
* `expert_layer`: triton_kernels' MXFP4 GEMMs.

Each gives a callable bound to one set of inputs, or None where the package is missing or does not take the call.
"""

from __future__ import annotations

from dsv4ref.kernels.peers.expert_layer import TRITON_KERNELS, triton_kernels_layer, triton_kernels_note
from dsv4ref.kernels.peers.flashmla import (
    FLASHMLA,
    FLASHMLA_PREFILL,
    flashmla_decode,
    flashmla_note,
    flashmla_prefill,
)
from dsv4ref.kernels.peers.vllm_triton import VLLM_TRITON, vllm_note, vllm_sparse_decode

__all__ = [
    "FLASHMLA",
    "FLASHMLA_PREFILL",
    "TRITON_KERNELS",
    "VLLM_TRITON",
    "flashmla_decode",
    "flashmla_note",
    "flashmla_prefill",
    "note",
    "triton_kernels_layer",
    "triton_kernels_note",
    "vllm_note",
    "vllm_sparse_decode",
]

_NOTES = {
    FLASHMLA: flashmla_note,
    FLASHMLA_PREFILL: flashmla_note,
    TRITON_KERNELS: triton_kernels_note,
    VLLM_TRITON: vllm_note,
}


def note(variant: str) -> str | None:
    """Which package a variant of a measurement calls, with its version; None if it is not here.

    Args:
        variant: its name without the prefix, e.g. "FlashMLA".

    Raises:
        ValueError: no peer of that name.
    """
    if variant not in _NOTES:
        raise ValueError(f"variant: got {variant!r}, expected one of {sorted(_NOTES)}")
    return _NOTES[variant]()
