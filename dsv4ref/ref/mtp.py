"""Multi-token prediction: one more block that guesses the token after next.

    e   = RMSNorm(embed[token t+1]; enorm)                    [T, D]
    h   = RMSNorm(X_t; hnorm), stream by stream               [T, n, D], X the main model's streams before collapse
    X'  = e_proj(e) in every stream + h_proj(h)
    X'' = one block without compression, learned router, own keys
    logits of token t+2 = head(RMSNorm(collapse(X'')))        own collapse and norm; embedding and head are shared

Alignment is DeepSeek-V3's: the hidden state of position t goes with token t+1, at position t; position 0 gets a zero
embedding where ``Numerics.mask_mtp_position_0`` (vLLM). DeepSeek's generation script never runs the block. For chained
drafting the streams X'' are returned un-collapsed.

Source: DeepSeek-V4 inference/model.py, ``MTPBlock``; vLLM's DeepSeek-V4 MTP module (alignment, position 0).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4ref.config import SWA, ModelConfig
from dsv4ref.ref.model import Model, Output, block_ref, check_tokens, head_ref
from dsv4ref.ref.norms import rms_norm_ref
from dsv4ref.ref.state import LayerState, State, empty_layer
from dsv4ref.ref.weights import block_name

__all__ = ["MtpState", "mtp_inputs_ref", "mtp_ref", "new_mtp_sequence"]


@dataclass(frozen=True)
class MtpState:
    """The MTP block's own keys.

    Args:
        position: position of the next hidden state.
        layer: window rows.
    """

    position: int
    layer: LayerState


def new_mtp_sequence(model: Model) -> MtpState:
    """An empty state on plain tensors."""
    return MtpState(0, empty_layer(model.config, 0, model.numerics.dtype, device=model.device))


def mtp_inputs_ref(streams: Tensor, embedded: Tensor, positions: Tensor, model: Model, layer: int) -> Tensor:
    """Join hidden states and next tokens.

    Args:
        streams: X ``[T, n, D]`` of positions t.
        embedded: ``[T, D]`` embeddings of tokens t+1.
        positions: int64 ``[T]``, the t.
        model: config, weights, formats.
        layer: the MTP block's layer number, ``n_layers`` and up.

    Returns:
        X' ``[T, n, D]``.
    """
    config, numerics = model.config, model.numerics
    weights = model.weights.at(block_name(config, layer))
    if numerics.mask_mtp_position_0:
        embedded = torch.where((positions == 0)[:, None], torch.zeros_like(embedded), embedded)
    e = numerics.round(rms_norm_ref(embedded, weights.tensor("enorm.weight"), config.norm_eps))
    h = numerics.round(rms_norm_ref(streams, weights.tensor("hnorm.weight"), config.norm_eps))
    e = numerics.round(numerics.linear_input(e) @ weights.matrix("e_proj").T)  # [T, D]
    h = numerics.round(numerics.linear_input(h) @ weights.matrix("h_proj").T)  # [T, n, D]
    return numerics.round(e[:, None, :] + h)


def mtp_ref(
    model: Model, next_token_ids: Tensor, streams: Tensor, state: MtpState | None = None, block: int = 0
) -> tuple[Output, MtpState]:
    """Guess the tokens after next, for consecutive positions of one sequence.

    Args:
        model: config, weights, formats.
        next_token_ids: int64 or int32 ``[T]``, token t+1 for every position t.
        streams: X ``[T, n, D]`` of `dsv4ref.ref.model.forward_ref`, of the same positions.
        state: what earlier positions left; None starts at position 0.
        block: which MTP block.

    Returns:
        `Output` with logits of tokens t+2 ``[T, V]`` and streams ``[T, n, D]``; and the new state.

    Raises:
        ValueError: no such block, or token ids, streams or a state that do not fit; always before any work.
        TypeError: token ids that are no tensor.
    """
    config: ModelConfig = model.config
    if not 0 <= block < config.n_mtp_layers:
        raise ValueError(f"block: got {block}, expected 0 to {config.n_mtp_layers - 1} for {config.name}")
    state = new_mtp_sequence(model) if state is None else state
    check_tokens(next_token_ids, state.position, config, "next_token_ids")
    if state.layer.kind != SWA:
        raise ValueError(f"state: is made for ratio {state.layer.kind}, expected 0: MTP blocks do not compress")
    window = State(state.position, (state.layer,))
    window.check_rows(config)
    window.check_room(config, next_token_ids.shape[0])
    wanted = (next_token_ids.shape[0], config.hc_mult, config.hidden_size)
    if tuple(streams.shape) != wanted:
        raise ValueError(f"streams: got shape {tuple(streams.shape)}, expected {wanted}")

    layer = config.n_layers + block
    token_ids = next_token_ids.to(model.device, torch.int64)
    positions = state.position + torch.arange(token_ids.shape[0], device=model.device)
    embedded = model.numerics.round(model.weights.raw("embed.weight")[token_ids].to(model.numerics.dtype))
    joined = mtp_inputs_ref(streams.to(model.numerics.dtype), embedded, positions, model, layer)
    result, layer_state = block_ref(joined, token_ids, positions, layer, model, state.layer)
    logits = head_ref(result, model.weights.at(block_name(config, layer)), model)
    return Output(logits, result), MtpState(state.position + token_ids.shape[0], layer_state)
