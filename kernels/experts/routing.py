"""Expert routers, one launch each: V4's by score and by token id, and V3.2's by score within groups.

One program routes one token with one wave: scores, selection and weights stay in registers, and what reaches memory is
k ids and k weights. Arithmetic and selection are fp32 whatever the logits are stored in; the bias is fp32 or refused.

Selection is exact and total. A biased score becomes a 64-bit key, its order in the upper half and the expert's number,
counted down, in the lower, and the k largest keys win one after the other. So

* equal scores go to the lower expert;
* NaN ranks below -inf: an expert without a number is chosen only when nothing else is left (in V3.2: in the kept
  groups), so ids are distinct and in range for any input;
* weights follow the formula: a chosen NaN or +inf makes NaN of that row's weights, which is visible downstream. Where
  the scores' sum is 0 (every chosen logit far below -175, sigmoid: -87, where scores leave fp32's normal range) all
  weights are 0.

A hash layer's token id outside the table, or an id in the table that is no expert, gives id -1 with weight 0, which
`dispatch` skips.

Reference: `dsv4ref.ref.router`. Hazards: H15, H22, H23, H24, H25.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4ref.config import RouterConfig
from dsv4ref.kernels import checks
from dsv4ref.kernels.codes import architecture

__all__ = ["check_hash_table", "route_grouped", "route_hash", "route_learned"]

_LAST = tl.constexpr(0x7FFFFFFF)
_NO_NUMBER = tl.constexpr(-0x7FFFFFFF)
"""Where NaN ranks: below -inf, whose order is -0x7F800001."""
_NO_CANDIDATE = tl.constexpr(-(2**63))
_UNDERFLOW = tl.constexpr(-16.0)
"""Below this, ln(1 + e^z) is e^z to fp32, and its root e^(z/2): no subnormal on the way."""
_LOG2_E = tl.constexpr(1.4426950408889634)
# ln 2 in two parts: the first has 9 bits, so that its product with a whole number of at most 15 bits is exact.
_LN_2_HIGH = tl.constexpr(0.693359375)
_LN_2_LOW = tl.constexpr(-2.12194440e-4)
_ZERO_BELOW = tl.constexpr(-200.0)


@triton.jit
def _exp_of_negative(x):
    """e^x to a few ulps for x <= 0; NaN stays NaN.

    On NVIDIA tl.exp is 2^(x log2 e) with the product rounded once, which alone costs up to 32 ulps at -87.
    """
    x = tl.where(x < _ZERO_BELOW, _ZERO_BELOW, x)  # e^x is 0 there, and -inf - -inf would be NaN
    whole = tl.floor(x * _LOG2_E)
    rest = (x - whole * _LN_2_HIGH) - whole * _LN_2_LOW
    return tl.exp2(whole) * tl.exp(rest)


@triton.jit
def _score(z, SCORING: tl.constexpr):
    """s = sqrt(ln(1 + e^z)) or s = 1 / (1 + e^-z), fp32."""
    small = _exp_of_negative(-tl.abs(z))
    if SCORING == "sqrtsoftplus":
        above = 1.0 + small
        # ln(1 + small), times small over what was left of it after rounding 1 + small.
        log1p = tl.where(above == 1.0, small, tl.log(above) * (small / (above - 1.0)))
        softplus = tl.maximum(z, 0.0) + log1p
        return tl.where(z < _UNDERFLOW, _exp_of_negative(0.5 * tl.minimum(z, 0.0)), tl.sqrt(softplus))
    else:
        tl.static_assert(SCORING == "sigmoid")
        return tl.where(z < 0.0, small, 1.0) / (1.0 + small)


@triton.jit
def _keys(values, numbers):
    """int64 keys: larger for larger values, then for lower numbers; NaN below every number.

    -0 would rank below +0, but a score is at least +0, and +0 plus any bias is no -0.
    """
    bits = values.to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ _LAST, bits)
    order = tl.where(values == values, order, _NO_NUMBER)
    return (order.to(tl.int64) << 32) | (numbers ^ _LAST).to(tl.int64)


@triton.jit
def _number(key):
    return (key & _LAST).to(tl.int32) ^ _LAST


@triton.jit
def _store_row(
    logits_row, weights, experts, row, chosen, valid, scale,
    K: tl.constexpr, SLOT_LANES: tl.constexpr, SCORING: tl.constexpr, NORMALISE: tl.constexpr,
):  # fmt: skip
    """w = s[chosen];  w <- w / sum w;  w <- w * scale"""
    slots = tl.arange(0, SLOT_LANES)
    live = slots < K
    valid = valid & live
    z = tl.load(logits_row + chosen, mask=valid, other=0.0).to(tl.float32)
    weight = tl.where(valid, _score(z, SCORING), 0.0)
    if NORMALISE:
        total = tl.sum(weight, axis=0)
        weight = tl.where(total == 0.0, 0.0, weight / total)
    tl.store(weights + row * K + slots, weight * scale, mask=live)
    tl.store(experts + row * K + slots, tl.where(valid, chosen, -1), mask=live)


@triton.jit
def _route_scored_kernel(
    logits,
    bias,
    weights,
    experts,
    logits_stride,
    scale,
    E: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    SCORING: tl.constexpr,
    NORMALISE: tl.constexpr,
    GROUP_LANES: tl.constexpr,
    EXPERT_LANES: tl.constexpr,
    SLOT_LANES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_row = logits + row * logits_stride
    PER_GROUP: tl.constexpr = E // GROUPS
    groups, members = tl.arange(0, GROUP_LANES)[:, None], tl.arange(0, EXPERT_LANES)[None, :]
    numbers = groups * PER_GROUP + members  # [GROUP_LANES, EXPERT_LANES]
    real = (groups < GROUPS) & (members < PER_GROUP)

    # b = s + bias
    z = tl.load(logits_row + numbers, mask=real, other=0.0).to(tl.float32)
    biased = _score(z, SCORING) + tl.load(bias + numbers, mask=real, other=0.0)
    keys = tl.where(real, _keys(biased, numbers), _NO_CANDIDATE)

    # group score = sum of its two largest b; experts of other groups are no candidates
    if GROUPS > 1:
        values = tl.where(real & (biased == biased), biased, float("-inf"))
        first = _number(tl.max(keys, axis=1))  # [GROUP_LANES]
        second = tl.max(tl.where(numbers == first[:, None], float("-inf"), values), axis=1)
        flat = tl.arange(0, GROUP_LANES)
        group_keys = _keys(tl.max(values, axis=1) + second, flat)
        group_keys = tl.where(flat < GROUPS, group_keys, _NO_CANDIDATE)
        kept = flat < 0
        for _ in tl.static_range(KEPT):
            best = _number(tl.max(group_keys, axis=0))
            group_keys = tl.where(flat == best, _NO_CANDIDATE, group_keys)
            kept = kept | (flat == best)
        keys = tl.where(kept[:, None], keys, _NO_CANDIDATE)

    # chosen = the k largest, best first
    slots = tl.arange(0, SLOT_LANES)
    chosen = tl.zeros((SLOT_LANES,), dtype=tl.int32)
    for slot in tl.static_range(K):
        expert = _number(tl.max(tl.max(keys, axis=1), axis=0))
        keys = tl.where(numbers == expert, _NO_CANDIDATE, keys)
        chosen = tl.where(slots == slot, expert, chosen)
    _store_row(
        logits_row, weights, experts, row, chosen, slots < K, scale, K, SLOT_LANES, SCORING, NORMALISE
    )  # fmt: skip


@triton.jit
def _route_hash_kernel(
    logits,
    table,
    token_ids,
    weights,
    experts,
    logits_stride,
    vocabulary,
    scale,
    E: tl.constexpr,
    K: tl.constexpr,
    NORMALISE: tl.constexpr,
    SLOT_LANES: tl.constexpr,
):
    """chosen = table[token id]; nothing outside the table or the row of logits is read."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(token_ids + row).to(tl.int64)
    slots = tl.arange(0, SLOT_LANES)
    known = (token >= 0) & (token < vocabulary) & (slots < K)
    listed = tl.load(table + token * K + slots, mask=known, other=-1)
    valid = (listed >= 0) & (listed < E)  # before the cast: 2^32 would become expert 0
    chosen = tl.where(valid, listed, -1).to(tl.int32)
    logits_row = logits + row * logits_stride
    _store_row(
        logits_row, weights, experts, row, chosen, valid, scale, K, SLOT_LANES, "sqrtsoftplus", NORMALISE
    )  # fmt: skip


def route_learned(
    logits: Tensor,
    bias: Tensor,
    router: RouterConfig,
    *,
    weights: Tensor | None = None,
    experts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """V4, learned layers: the k experts of highest biased score, one kernel launch.

    Args:
        logits: fp32 or bf16 ``[M, E]``, any row stride, unit last stride. bf16 logits carry bf16 information; the
            arithmetic on them is fp32.
        bias: fp32 ``[E]`` contiguous, whatever the logits' dtype. It selects and never weighs.
        router: ungrouped, sqrt-softplus; k, scale and renormalisation.
        weights: fp32 ``[M, k]`` contiguous to write into; allocated if None.
        experts: int32 ``[M, k]`` likewise.

    Returns:
        (weights, experts), best first, ties to the lower expert; the module docstring says what NaN and infinity do.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, stride or device, a router of another kind, or outputs that share
            memory with an input or each other.
    """
    _check_router(router, "sqrtsoftplus", grouped=False)
    return _route_scored(logits, bias, router, weights, experts)


def route_grouped(
    logits: Tensor,
    bias: Tensor,
    router: RouterConfig,
    *,
    weights: Tensor | None = None,
    experts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """V3.2: the k experts of highest biased score within the best groups, one kernel launch.

    Args: as `route_learned`; the router is grouped and sigmoid (a `RouterConfig` has at least two experts to a group).
    """
    _check_router(router, "sigmoid", grouped=True)
    return _route_scored(logits, bias, router, weights, experts)


def route_hash(
    logits: Tensor,
    table: Tensor,
    token_ids: Tensor,
    router: RouterConfig,
    *,
    weights: Tensor | None = None,
    experts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """V4, hash layers: experts fixed per token id, weighed by their scores, one kernel launch.

    Args:
        logits, router, weights, experts: as `route_learned`.
        table: int32 or int64 ``[V, k]`` contiguous; `check_hash_table` says once, at load, whether it is sound.
        token_ids: int32 or int64 ``[M]`` contiguous. An id outside the table (-1 of a padding row) gives -1, weight 0.

    Returns:
        (weights, experts), in the table's order.
    """
    _check_router(router, "sqrtsoftplus", grouped=False)
    weights, experts = _check_rows(logits, router, weights, experts)
    for name, tensor in (("table", table), ("token_ids", token_ids)):
        if not isinstance(tensor, Tensor) or tensor.dtype not in (torch.int32, torch.int64):
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name}: got {got}, expected torch.int32 or torch.int64")
    rows, where = logits.shape[0], logits.device
    checks.check_tensor("table", table, dtype=table.dtype, shape=("V", router.top_k), device=where, contiguous=True)
    checks.check_tensor("token_ids", token_ids, dtype=token_ids.dtype, shape=(rows,), device=where, contiguous=True)
    _check_apart(weights, experts, {"logits": logits, "table": table, "token_ids": token_ids})
    if rows:
        _route_hash_kernel[(rows,)](
            logits, table, token_ids, weights, experts, logits.stride(0), table.shape[0], router.route_scale,
            E=router.n_experts, K=router.top_k, NORMALISE=router.norm_topk_prob,
            SLOT_LANES=triton.next_power_of_2(router.top_k), num_warps=1,
        )  # fmt: skip
    return weights, experts


def check_hash_table(table: Tensor, router: RouterConfig) -> None:
    """Refuse a hash table with an id that is no expert, or with an expert twice in a row; waits for the device.

    Some code would add a doubled expert once and some twice: no source says which is meant.

    Args:
        table: integer ``[V, k]``.
        router: number of experts and k.

    Raises:
        ValueError: naming the first bad token id.
    """
    if table.dim() != 2 or table.shape[1] != router.top_k:
        raise ValueError(f"table: got shape {list(table.shape)}, expected [V, {router.top_k}]")
    ordered = table.sort(dim=1).values
    outside = ((table < 0) | (table >= router.n_experts)).any(dim=1)
    doubled = (ordered[:, 1:] == ordered[:, :-1]).any(dim=1)
    for bad, wanted in ((outside, f"experts 0 to {router.n_experts - 1}"), (doubled, "distinct experts")):
        if bool(bad.any()):
            token = int(bad.to(torch.uint8).argmax())
            raise ValueError(f"table: token {token} has experts {table[token].tolist()}, expected {wanted}")


def _route_scored(
    logits: Tensor, bias: Tensor, router: RouterConfig, weights: Tensor | None, experts: Tensor | None
) -> tuple[Tensor, Tensor]:
    weights, experts = _check_rows(logits, router, weights, experts)
    checks.check_tensor(
        "bias", bias, dtype=torch.float32, shape=(router.n_experts,), device=logits.device, contiguous=True
    )
    _check_apart(weights, experts, {"logits": logits, "bias": bias})
    if logits.shape[0]:
        _route_scored_kernel[(logits.shape[0],)](
            logits, bias, weights, experts, logits.stride(0), router.route_scale, **scored_constants(router),
            num_warps=1,
        )  # fmt: skip
    return weights, experts


def scored_constants(router: RouterConfig) -> dict[str, int | bool | str]:
    """What `_route_scored_kernel` is compiled for: the router's shape, padded to powers of two."""
    groups = router.n_groups or 1
    return {
        "E": router.n_experts,
        "K": router.top_k,
        "GROUPS": groups,
        "KEPT": router.topk_groups or 1,
        "SCORING": router.scoring,
        "NORMALISE": router.norm_topk_prob,
        "GROUP_LANES": triton.next_power_of_2(groups),
        "EXPERT_LANES": triton.next_power_of_2(router.n_experts // groups),
        "SLOT_LANES": triton.next_power_of_2(router.top_k),
    }


def _check_router(router: RouterConfig, scoring: str, *, grouped: bool) -> None:
    if not isinstance(router, RouterConfig):
        raise TypeError(f"router: got {type(router).__name__}, expected a RouterConfig")
    if router.scoring != scoring or (router.n_groups is not None) != grouped:
        kinds = [
            f"{s}, {'grouped' if g else 'no groups'}"
            for s, g in ((router.scoring, router.n_groups is not None), (scoring, grouped))
        ]
        raise ValueError(f"router: got {kinds[0]}, expected {kinds[1]}")


def _check_rows(
    logits: Tensor, router: RouterConfig, weights: Tensor | None, experts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Check the logits and the outputs' shapes, and allocate the outputs that the caller has not."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits: got {type(logits).__name__}, expected a torch.Tensor")
    if logits.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"logits: got {logits.dtype}, expected torch.float32 or torch.bfloat16")
    checks.check_tensor("logits", logits, dtype=logits.dtype, shape=("M", router.n_experts))
    if logits.stride(1) != 1 and router.n_experts > 1:
        raise ValueError(f"logits: got strides {logits.stride()}, expected a unit stride in the last dimension")
    architecture(logits.device)  # refuses CPU tensors where kernels are compiled
    shape = (int(logits.shape[0]), router.top_k)
    outputs = []
    for name, tensor, dtype in (("weights", weights, torch.float32), ("experts", experts, torch.int32)):
        if tensor is None:
            tensor = torch.empty(shape, dtype=dtype, device=logits.device)
        checks.check_tensor(name, tensor, dtype=dtype, shape=shape, device=logits.device, contiguous=True)
        outputs.append(tensor)
    return outputs[0], outputs[1]


def _check_apart(weights: Tensor, experts: Tensor, inputs: dict[str, Tensor]) -> None:
    for name, tensor in inputs.items():
        checks.check_no_overlap("weights", weights, name, tensor)
        checks.check_no_overlap("experts", experts, name, tensor)
    checks.check_no_overlap("experts", experts, "weights", weights)
