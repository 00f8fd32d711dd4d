"""Routed experts: router logits, scores to experts and weights, global to local ids, the order a grouped GEMM reads,
the GEMM over MXFP4 experts, and the layer they make."""

from dsv4ref.kernels.experts.dispatch import DispatchPlan, allocate_plan, max_tiles, plan_dispatch
from dsv4ref.kernels.experts.expert_layer import ExpertScratch, allocate_scratch, expert_layer
from dsv4ref.kernels.experts.expert_map import ExpertMap
from dsv4ref.kernels.experts.grouped_gemm import grouped_gemm
from dsv4ref.kernels.experts.mxfp4 import Mxfp4Weights
from dsv4ref.kernels.experts.router_gemm import router_logits
from dsv4ref.kernels.experts.routing import route_grouped, route_hash, route_learned
from dsv4ref.kernels.experts.tiles import ExpertTile, select_tile

__all__ = [
    "DispatchPlan",
    "ExpertMap",
    "ExpertScratch",
    "ExpertTile",
    "Mxfp4Weights",
    "allocate_plan",
    "allocate_scratch",
    "expert_layer",
    "grouped_gemm",
    "max_tiles",
    "plan_dispatch",
    "route_grouped",
    "route_hash",
    "route_learned",
    "router_logits",
    "select_tile",
]
