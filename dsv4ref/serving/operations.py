"""What a decode step is made of, chosen once: every `Features` switch is read in `compose`, and nowhere else.

Kernels and their buffers live on the engine's device; the reference computes where the model's weights are. Where the
two are different, each operation here carries its own inputs over and its result back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from dsv4ref.formats.scope import Scope
from dsv4ref.kernels.codes import architecture
from dsv4ref.kernels.experts import route_hash, route_learned
from dsv4ref.kernels.projection import DequantisedWeight, grouped_projection
from dsv4ref.kernels.sparse_mla import sparse_mla_decode
from dsv4ref.kernels.sparse_mla.launch import STATIC
from dsv4ref.ref.attention import output_ref
from dsv4ref.ref.experts import route_ref, routed_experts_ref
from dsv4ref.ref.model import Model
from dsv4ref.ref.rope import rotate_back_ref
from dsv4ref.ref.router import router_logits_ref
from dsv4ref.ref.sparse_attention import sparse_attention_ref
from dsv4ref.ref.weights import Weights, block_name
from dsv4ref.serving.features import Features, check_available
from dsv4ref.serving.gathered_experts import GatheredExperts
from dsv4ref.serving.grouped_experts import GroupedExperts
from dsv4ref.serving.tail_fill import TailFilled

__all__ = ["Attend", "Experts", "Operations", "PrepareLists", "Project", "Route", "compose", "reference_attention"]

Attend: TypeAlias = Callable[[Tensor, Scope, Scope | None, Tensor, Tensor], Tensor]
"""(q ``[T, H, 512]``, window scope, compressed scope, sink ``[H]``, out bf16 ``[T, H, 512]``) -> o ``[T, H, 512]``;
``out`` is the engine's memory for these rows, which an operation may use."""

Project: TypeAlias = Callable[[Tensor, int, Tensor, Tensor], Tensor]
"""(o ``[T, H, 512]``, layer, positions ``[T]``, freqs ``[32]``) -> y ``[T, D]``: rotate back, ``wo_a``, ``wo_b``."""

Route: TypeAlias = Callable[[Tensor, Tensor, Weights, bool], tuple[Tensor, Tensor]]
"""(x ``[T, D]``, token ids ``[T]``, the gate's weights, hash layer) -> weights ``[T, k]``, experts int64 ``[T, k]``."""

Experts: TypeAlias = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""(x ``[T, D]``, route weights ``[T, k]``, experts int64 ``[T, k]``, layer) -> the routed sum ``[T, D]``, unrounded."""

PrepareLists: TypeAlias = Callable[[TailFilled, int], None]
"""(buffers, decode rows of the step): clears what the step must not find."""


@dataclass(frozen=True)
class Operations:
    """The exchangeable parts of a step.

    Args:
        attend: attention of decode rows.
        project: the output projection of all rows.
        route: experts and weights of all rows.
        prepare_lists: before the decode rows' lists are written.
        experts: the routed experts of all rows but those of a device step.
        step_experts: of a device step's rows; an expert of -1 adds nothing, and the device is never read.
    """

    attend: Attend
    project: Project
    route: Route
    prepare_lists: PrepareLists
    experts: Experts
    step_experts: Experts


def compose(model: Model, features: Features, device: torch.device | str) -> Operations:
    """Choose every operation.

    Args:
        model: shapes, weights, formats. With ``cached_projection`` on another device than the weights', they are copied
            there now and later changes of them are not seen.
        features: which optimisations.
        device: where kernels run.

    Raises:
        TypeError, ValueError: a feature that the model cannot turn on; a device on which kernels cannot run.
    """
    check_available(model, features)
    device = torch.device(device)
    if any((features.sparse_decode, features.cached_projection, features.routing_kernels, features.grouped_experts)):
        architecture(device)  # refuses the CPU where kernels are compiled, now and not in the first step

    attend: Attend = reference_attention(model)
    if features.sparse_decode:
        attend = _kernel_attention(model, selected=features.launch_shape, in_place=features.output_passthrough)
    project = _cached_projection(model, device) if features.cached_projection else _reference_projection(model)
    route = _kernel_routing(model, device) if features.routing_kernels else _reference_routing(model)
    prepare_lists = _fill_the_tail if features.shrink_tail_fill else _fill_everything
    experts: Experts = _reference_experts(model)
    step_experts = experts
    if features.grouped_experts:
        experts = step_experts = GroupedExperts(model, device)
    elif features.device_step:
        step_experts = GatheredExperts(model, device)
    return Operations(attend, project, route, prepare_lists, experts, step_experts)


# --- attention ---


def reference_attention(model: Model) -> Attend:
    """Attention by the reference, in the arithmetic dtype; prompt rows use it whatever the features."""
    scale, dtype = model.config.softmax_scale, model.numerics.dtype

    def attend(q: Tensor, window: Scope, compressed: Scope | None, sink: Tensor, out: Tensor) -> Tensor:
        scopes = [window] if compressed is None else [window, compressed]
        where = window.cache.data.device
        o, _ = sparse_attention_ref(q.to(where), scopes, sink.to(where), scale, dtype)
        return o.to(q.device)

    return attend


def _kernel_attention(model: Model, *, selected: bool, in_place: bool) -> Attend:
    scale = model.config.softmax_scale
    launch = None if selected else STATIC  # None: the kernel's launcher selects

    def attend(q: Tensor, window: Scope, compressed: Scope | None, sink: Tensor, out: Tensor) -> Tensor:
        kernel_q = q.to(out.device, torch.bfloat16)  # exact: the numerics have rounded q
        kernel_sink = sink.to(out.device, torch.float32)
        target = out if in_place else None
        result, _ = sparse_mla_decode(
            kernel_q, window, compressed, sink=kernel_sink, scale=scale, out=target, launch=launch
        )
        if not in_place:
            out.copy_(result)
        return out.to(q.device, q.dtype)

    return attend


# --- output projection ---


def _reference_projection(model: Model) -> Project:
    def project(o: Tensor, layer: int, positions: Tensor, freqs: Tensor) -> Tensor:
        weights = model.weights.at(block_name(model.config, layer)).at("attn")
        return output_ref(o, weights, positions, freqs, model.config, model.numerics)

    return project


def _cached_projection(model: Model, device: torch.device) -> Project:
    config, numerics = model.config, model.numerics
    stored: list[tuple[Tensor, Tensor]] = []
    for layer in range(config.n_layers):
        part = model.weights.at(block_name(config, layer)).at("attn")
        weight, scale = (part.raw(f"wo_a.{name}").to(device) for name in ("weight", "scale"))
        stored.append((weight, scale.view(torch.uint8)))
    copies = [DequantisedWeight(weight, scale, check="host") for weight, scale in stored]

    def project(o: Tensor, layer: int, positions: Tensor, freqs: Tensor) -> Tensor:
        o = numerics.round(rotate_back_ref(o, positions, freqs))
        grouped = o.reshape(o.shape[0], config.o_groups, config.wo_a_input_width)  # [T, G, H/G * d]
        z = grouped_projection(grouped.to(device, torch.bfloat16), copies[layer].current(*stored[layer]))
        z = z.to(o.device, o.dtype).flatten(1)  # [T, G * o_lora_rank]
        wo_b = model.weights.at(block_name(config, layer)).at("attn").matrix("wo_b")
        return numerics.round(numerics.linear_input(z) @ wo_b.T)

    return project


# --- routing ---


def _reference_routing(model: Model) -> Route:
    def route(x: Tensor, token_ids: Tensor, gate: Weights, hashed: bool) -> tuple[Tensor, Tensor]:
        return route_ref(x, token_ids, gate, hashed, model.config)

    return route


def _kernel_routing(model: Model, device: torch.device) -> Route:
    router = model.config.router

    def route(x: Tensor, token_ids: Tensor, gate: Weights, hashed: bool) -> tuple[Tensor, Tensor]:
        logits = router_logits_ref(x, gate.tensor("weight")).to(device)
        if hashed:
            weights, experts = route_hash(logits, gate.raw("tid2eid").to(device), token_ids.to(device), router)
        else:
            weights, experts = route_learned(logits, gate.tensor("bias").to(device), router)
        return weights.to(x.device), experts.to(x.device, torch.int64)

    return route


# --- experts ---


def _reference_experts(model: Model) -> Experts:
    config = model.config

    def compute(x: Tensor, route_weights: Tensor, experts: Tensor, layer: int) -> Tensor:
        weights = model.weights.at(block_name(config, layer)).at("ffn").at("experts")
        return routed_experts_ref(x, route_weights, experts, weights, config.swiglu_limit, model.numerics)

    return compute


# --- lists ---


def _fill_the_tail(buffers: TailFilled, rows: int) -> None:
    buffers.prepare(rows)


def _fill_everything(buffers: TailFilled, rows: int) -> None:
    for whole in (buffers.req_id, buffers.indices, buffers.indptr):
        whole.zero_()
    buffers.prepare(rows)  # notes the rows; where the batch shrank it also clears the tail a second time
