"""The whole model: embedding, blocks, collapse of the streams, logits; prefill, chunks of it, and decode alike.

    X_i = embed[token] for i = 0 .. 3
    each block:  u, post, C = hc_pre(X);  X <- hc_post(attention(RMSNorm(u)), X, post, C)
                 u, post, C = hc_pre(X);  X <- hc_post(experts(RMSNorm(u)), X, post, C)
    logits = RMSNorm(collapse(X)) head^T

A forward pass takes any number of consecutive tokens of one sequence and a state, and returns the next state: a prompt
in one pass, in chunks, or token by token gives the same logits up to rounding.

Source: DeepSeek-V4 inference/model.py, ``Transformer``, ``Block`` and ``ParallelHead`` (which does whole prompts, then
single tokens, and computes logits of the last position only).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dsv4ref.config import ModelConfig
from dsv4ref.ref.attention import attention_ref
from dsv4ref.ref.experts import moe_ref
from dsv4ref.ref.hyper_connections import collapse_ref, hc_post_ref, hc_pre_ref
from dsv4ref.ref.norms import rms_norm_ref
from dsv4ref.ref.numerics import DEFAULT, Numerics
from dsv4ref.ref.state import LayerState, State, empty_sequence
from dsv4ref.ref.weights import Weights, block_name, check_weights

__all__ = ["Model", "Output", "block_ref", "forward_ref", "head_ref"]


@dataclass(frozen=True)
class Model:
    """A configuration, its weights and the formats to compute in.

    Args:
        config: shapes.
        tensors: checkpoint name -> tensor, floating or in the checkpoint's own formats.
        numerics: roundings and quantisations.

    Raises:
        ValueError, TypeError: a tensor is missing, unknown or wrong (`check_weights`).
    """

    config: ModelConfig
    tensors: Mapping[str, Tensor]
    numerics: Numerics = DEFAULT

    def __post_init__(self) -> None:
        check_weights(self.config, self.tensors)

    @property
    def weights(self) -> Weights:
        """The tensors, read in the arithmetic dtype."""
        return Weights(self.tensors, self.numerics.dtype)

    @property
    def device(self) -> torch.device:
        """Where the weights are, hence where the model computes."""
        return self.tensors["embed.weight"].device

    def new_sequence(self) -> State:
        """An empty state on plain tensors."""
        return empty_sequence(self.config, self.numerics.dtype, self.device)


class Output(NamedTuple):
    """Logits ``[T, V]``, and the streams ``[T, n, D]`` after the last block, which the MTP block reads."""

    logits: Tensor
    streams: Tensor


def block_ref(
    streams: Tensor, token_ids: Tensor, positions: Tensor, layer: int, model: Model, state: LayerState
) -> tuple[Tensor, LayerState]:
    """One block: an attention half and an experts half, each between `hc_pre_ref` and `hc_post_ref`.

    Args:
        streams: X ``[T, n, D]``.
        token_ids: int64 ``[T]``, read by hash layers.
        positions: int64 ``[T]``, consecutive, following the state.
        layer: which block; MTP blocks come after the main ones.
        model: config, weights, formats.
        state: the block's.

    Returns:
        X ``[T, n, D]`` and the new state.
    """
    config, numerics = model.config, model.numerics
    weights = model.weights.at(block_name(config, layer))

    u, post, mix = hc_pre_ref(streams, weights, "attn", config, numerics)
    normed = numerics.round(rms_norm_ref(u, weights.tensor("attn_norm.weight"), config.norm_eps))
    result, state = attention_ref(normed, weights.at("attn"), layer, positions, state, config, numerics)
    streams = hc_post_ref(result, streams, post, mix, numerics)

    u, post, mix = hc_pre_ref(streams, weights, "ffn", config, numerics)
    normed = numerics.round(rms_norm_ref(u, weights.tensor("ffn_norm.weight"), config.norm_eps))
    result = moe_ref(normed, token_ids, weights.at("ffn"), config.is_hash_layer(layer), config, numerics)
    return hc_post_ref(result, streams, post, mix, numerics), state


def head_ref(streams: Tensor, weights: Weights, model: Model) -> Tensor:
    """Streams to logits.

    Args:
        streams: X ``[T, n, D]``.
        weights: where ``hc_head_*`` and ``norm.weight`` are: the top level, or an MTP block.
        model: gives the shared ``head.weight``.

    Returns:
        ``[T, V]``.
    """
    collapsed = collapse_ref(streams, weights, model.config, model.numerics)
    normed = model.numerics.round(rms_norm_ref(collapsed, weights.tensor("norm.weight"), model.config.norm_eps))
    return normed @ model.weights.matrix("head").T


def check_tokens(token_ids: Tensor, position: int, config: ModelConfig, argument: str = "token_ids") -> None:
    """Token ids are a non-empty int64 or int32 ``[T]`` within the vocabulary, and T more fit the positions."""
    if not isinstance(token_ids, Tensor):
        raise TypeError(f"{argument}: got {type(token_ids).__name__}, expected a torch.Tensor of integers [T]")
    if token_ids.dtype not in (torch.int64, torch.int32) or token_ids.dim() != 1 or not token_ids.numel():
        raise ValueError(
            f"{argument}: got {token_ids.dtype} {tuple(token_ids.shape)}, expected integers [T] with at least one token"
        )
    outside = (token_ids < 0) | (token_ids >= config.vocab_size)
    if bool(outside.any()):
        raise ValueError(f"{argument}: got {int(token_ids[outside][0])}, expected 0 to {config.vocab_size - 1}")
    if position + token_ids.shape[0] > config.max_position:
        raise ValueError(
            f"{argument}: got {token_ids.shape[0]} tokens from position {position}, expected at most "
            f"{config.max_position - position}: {config.name} has {config.max_position} positions"
        )


def forward_ref(model: Model, token_ids: Tensor, state: State | None = None) -> tuple[Output, State]:
    """Process the next tokens of one sequence.

    Args:
        model: config, weights, formats.
        token_ids: int64 or int32 ``[T]``, T >= 1: a prompt, a chunk of one, or decoded tokens.
        state: what earlier tokens left; None starts a sequence.

    Returns:
        `Output` with logits of every token, ``[T, V]``; and the state after the last.

    Raises:
        ValueError: token ids outside the vocabulary, positions past the maximum, a state of another model or one whose
            parts do not belong together, a cache that is too small; always before any work.
        TypeError: token ids that are no tensor.
    """
    config = model.config
    state = model.new_sequence() if state is None else state
    if len(state.layers) != config.n_layers:
        raise ValueError(f"state: got {len(state.layers)} layers, expected {config.n_layers} for {config.name}")
    for layer, layer_state in enumerate(state.layers):
        if layer_state.kind != config.ratio(layer):
            raise ValueError(
                f"state: layer {layer} is made for ratio {layer_state.kind}, expected {config.ratio(layer)}"
            )
    check_tokens(token_ids, state.position, config)
    state.check_rows(config)
    state.check_room(config, token_ids.shape[0])

    token_ids = token_ids.to(model.device, torch.int64)
    positions = state.position + torch.arange(token_ids.shape[0], device=model.device)  # [T]
    embedded = model.numerics.round(model.weights.raw("embed.weight")[token_ids].to(model.numerics.dtype))  # [T, D]
    streams = embedded[:, None, :].repeat(1, config.hc_mult, 1)  # [T, n, D]
    layers = []
    for layer, layer_state in enumerate(state.layers):
        streams, layer_state = block_ref(streams, token_ids, positions, layer, model, layer_state)
        layers.append(layer_state)
    logits = head_ref(streams, model.weights, model)
    return Output(logits, streams), State(state.position + token_ids.shape[0], tuple(layers))
