"""Expert routing: router logits, scores to experts and weights, global to local ids, the order a grouped GEMM reads."""

from dsv4ref.kernels.experts.dispatch import DispatchPlan, allocate_plan, max_tiles, plan_dispatch
from dsv4ref.kernels.experts.expert_map import ExpertMap
from dsv4ref.kernels.experts.router_gemm import router_logits
from dsv4ref.kernels.experts.routing import route_grouped, route_hash, route_learned

__all__ = [
    "DispatchPlan",
    "ExpertMap",
    "allocate_plan",
    "max_tiles",
    "plan_dispatch",
    "route_grouped",
    "route_hash",
    "route_learned",
    "router_logits",
]
