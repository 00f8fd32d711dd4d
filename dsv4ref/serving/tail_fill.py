"""Persistent index buffers whose unused end stays zero without filling the whole buffer in every step.

A decode step's ragged metadata lies in three buffers of fixed size and address, so that captured graphs may read them:
the request of each token, the KV indices of all tokens one after the other, and where each token's begin. Kernels of a
captured batch also read the rows behind the live tokens, so these must hold something harmless. Filling everything
with zeros in every step does it; filling only what the previous, larger step used does it too.

Source: vllm#42982; vLLM 0.33.0 v1/attention/backends/mla/rocm_aiter_mla_sparse.py, ``build``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4ref.kernels import checks
from dsv4ref.kernels.capture import is_capturing

__all__ = ["TailFilled"]


class TailFilled:
    """The three buffers, and the number of tokens up to which they are in use.

    A step calls `prepare` on the host, then `write`; whatever computes the KV indices then stores them at
    ``indices[indptr[t]:indptr[t + 1]]``. After that, for n tokens with lengths that sum to L:

    * ``req_id[:n]`` is the step's, ``req_id[n:]`` is 0;
    * ``indptr[:n + 1]`` is the step's, ``indptr[n + 1:]`` is L, so that a row behind the live ones is empty;
    * ``indices[:L]`` is the step's, ``indices[n * topk:]`` is 0;
    * ``indices[L:n * topk]``, the *gap*, holds what earlier steps left there. Nobody may read it: a reader stops at
      indptr. Filling everything would have left zeros in the gap; this is the one difference (H14).

    The extent counts tokens, and top-k indices per token whatever their lengths: lengths are on the device.

    Args:
        max_tokens: tokens of a step at most, at least 1.
        topk: KV indices of a token at most, at least 1.
        device: where the buffers go.

    Raises:
        ValueError: a number below 1.
    """

    def __init__(self, max_tokens: int, topk: int, device: torch.device | str = "cpu") -> None:
        for name, value in (("max_tokens", max_tokens), ("topk", topk)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        self.max_tokens, self.topk = max_tokens, topk
        # Zeros, not empty: what no step has reached yet is read as well (H13).
        self.req_id = torch.zeros(max_tokens, dtype=torch.int32, device=device)
        self.indices = torch.zeros(max_tokens * topk, dtype=torch.int32, device=device)
        self.indptr = torch.zeros(max_tokens + 1, dtype=torch.int32, device=device)
        self._tokens = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the three buffers."""
        return self.req_id.nbytes + self.indices.nbytes + self.indptr.nbytes

    def prepare(self, tokens: int) -> None:
        """Clear what the previous step used and this one does not; the host's part, before a launch or a replay.

        Args:
            tokens: query tokens of the step, 0 to `max_tokens`.

        Raises:
            ValueError: more tokens than the buffers hold, or a negative number.
            RuntimeError: called under graph capture, which would freeze the two extents (H07).
        """
        if not 0 <= tokens <= self.max_tokens:
            raise ValueError(f"tokens: got {tokens}, expected 0 to {self.max_tokens}")
        if is_capturing():
            raise RuntimeError("prepare: called under graph capture, which would freeze the extents; call it before")
        self.clear(tokens, self._tokens)
        self._tokens = tokens  # not before the fill, which needs the old one

    def clear(self, begin: int, end: int) -> None:
        """Zero the request ids and KV indices of tokens `begin` to `end`: two launches, or none if there are none."""
        if begin < end:
            self.req_id[begin:end].zero_()
            self.indices[begin * self.topk : end * self.topk].zero_()

    def write(self, req_id: Tensor, lengths: Tensor) -> None:
        """Write the step's request ids and where its tokens' indices begin; device work only, safe to capture.

        Args:
            req_id: int32 ``[T]``, the request of each token; T as given to `prepare`.
            lengths: int32 ``[T]``, KV indices of each token, 0 to `topk` (not checked: they lie on the device).

        Raises:
            TypeError, ValueError: another dtype, shape or device.
        """
        tokens, where = self._tokens, self.req_id.device
        checks.check_tensor("req_id", req_id, dtype=torch.int32, shape=(tokens,), device=where)
        checks.check_tensor("lengths", lengths, dtype=torch.int32, shape=(tokens,), device=where)
        self.req_id[:tokens].copy_(req_id)
        torch.cumsum(lengths, 0, dtype=torch.int32, out=self.indptr[1 : tokens + 1])
        self.indptr[tokens + 1 :].fill_(self.indptr[tokens])
