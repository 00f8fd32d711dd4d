"""Chapter 13: expert tiles selected by rows per expert, instead of one tile for every batch.

Baseline: `default_tile`, 128 rows, always. Optimised: `dsv4ref.kernels.experts.tiles.select_tile`. The same three
launches on both sides (W1 with its activation, W2, the sum), and both tiles walk K in steps of 128. Results agree
within a budget and not in every bit: matrix instructions may sum a step's products in another order where tiles differ.

The inputs are chapter 12's. A wrong tile gives right results, slowly. So the gate has a second output: the tile of
either GEMM, which must be the one that the table names for the rows per expert of the *model*, worked out here without
the code under test.

Source: doubleword's vLLM fork, PR 12, commits 330979094 and d9d24cade.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from dsv4ref.config import V4_FLASH
from dsv4ref.device import DeviceSpec
from dsv4ref.evidence import records
from dsv4ref.evidence.gates import Check, Gate
from dsv4ref.evidence.isa import CompileRequest
from dsv4ref.evidence.records import Record
from dsv4ref.evidence.roofline import Bound
from dsv4ref.formats import mxfp4
from dsv4ref.kernels import peers
from dsv4ref.kernels.codes import architecture
from dsv4ref.kernels.experts import DispatchPlan, Mxfp4Weights, expert_layer, plan_dispatch
from dsv4ref.kernels.experts.expert_layer import allocate_scratch
from dsv4ref.kernels.experts.grouped_gemm import grouped_constants
from dsv4ref.kernels.experts.tiles import (
    ExpertTile,
    TileRule,
    choose_tile,
    default_tile,
    local_rows,
    rules_for,
    select_tile,
)
from dsv4ref.optimizations import decode_model, direct_w2_inputs, tile_model
from dsv4ref.optimizations.base import Case, Hazard, Optimization, Prediction
from dsv4ref.optimizations.direct_w2_inputs import CHECKED_ROWS, LayerInputs, in_row_units
from dsv4ref.optimizations.report import PEER_PREFIX
from dsv4ref.optimizations.routing_eager import loads

__all__ = ["M_SWEEP", "OPTIMIZATION", "best_rows", "compile_request", "tiles_for"]

M_SWEEP = (1, 8, 32, 128, 512, 1024, 4096, 8192)
"""Rows of the measured cases."""
_LAUNCHES = 3
_TILE = "tile "
"""What the variants of `timed` that run one tile are called, before the tile."""
_FLASH = {
    "top_k": V4_FLASH.router.top_k,
    "hidden": V4_FLASH.hidden_size,
    "inner": V4_FLASH.moe_inter_dim,
}

Outputs = dict[str, Tensor]
Tiles = tuple[ExpertTile, ExpertTile]


# --- the paths ---


def tiles_for(inputs: LayerInputs, rows: int | None = None) -> Tiles:
    """Selected tiles of W1 and W2 for a rank's share of the batch.

    Args:
        inputs: the case's.
        rows: as `select_tile` takes them; this rank's share of the batch if None.
    """
    arch, top_k = architecture(inputs.x.device), inputs.experts.shape[1]
    mine = inputs.placed.num_local
    if rows is None:
        rows = local_rows(inputs.x.shape[0], inputs.placed.num_experts, mine)
    w1, w2 = (select_tile(arch, rows, mine, top_k, w.n, w.k) for w in (inputs.w1, inputs.w2))
    return w1, w2


def _build(case: Case, device: str, seed: int) -> LayerInputs:
    """Chapter 12's inputs; with a skew, choices fall on experts whose popularity falls with a power of their rank."""
    p, inputs = case.params, direct_w2_inputs.build(case, device, seed)
    if not p["skew"]:
        return inputs
    rng = torch.Generator().manual_seed(seed)
    order = torch.randperm(p["experts"], generator=rng)
    uniform = torch.rand((p["rows"], p["experts"]), generator=rng).clamp_min(1e-12)
    keys = -p["skew"] * torch.log1p(order.to(torch.float32)) - torch.log(-torch.log(uniform))
    chosen = keys.topk(p["top_k"], dim=1).indices
    return replace(inputs, experts=chosen.to(device, torch.int32).contiguous())


def _fixed(inputs: LayerInputs, tile: ExpertTile) -> Tiles:
    return tile.fitted(inputs.w1.n, inputs.w1.k), tile.fitted(inputs.w2.n, inputs.w2.k)


def _plan(inputs: LayerInputs, block_m: int) -> DispatchPlan:
    return plan_dispatch(inputs.experts, block_m=block_m, expert_map=inputs.placed)


def _run(inputs: LayerInputs, tiles: Tiles, plan: DispatchPlan | None = None) -> Outputs:
    (w1, w2), (w1_tile, w2_tile) = inputs.prepared, tiles
    plan = _plan(inputs, w1_tile.block_m) if plan is None else plan
    out = expert_layer(inputs.x, w1, w2, inputs.weights, plan, limit=inputs.limit, w1_tile=w1_tile, w2_tile=w2_tile)
    return {"out": in_row_units(inputs, out), "tile": _numbers(tiles)}


def _numbers(tiles: Tiles) -> Tensor:
    """int32 ``[2, 6]``: block_m, block_n, block_k, warps, stages and subtile (0 for none) of W1 and of W2."""
    fields = ("block_m", "block_n", "block_k", "num_warps", "num_stages", "subtile_n")
    return torch.tensor([[getattr(tile, name) or 0 for name in fields] for tile in tiles], dtype=torch.int32)


def _baseline(inputs: LayerInputs) -> Outputs:
    return _run(inputs, _fixed(inputs, default_tile(architecture(inputs.x.device))))


def _optimized(inputs: LayerInputs) -> Outputs:
    return _run(inputs, tiles_for(inputs))


def _reference(inputs: LayerInputs) -> Outputs:
    """The sum in float64; and the tiles by the exact average of the whole model, M * k / E."""
    average = Fraction(inputs.experts.numel(), inputs.placed.num_experts)
    lines = sorted(rules_for(architecture(inputs.x.device)), key=lambda rule: rule.above)
    line = next(rule for rule in lines if rule.upto is None or average <= rule.upto)
    return {"out": inputs.exact / inputs.row_size, "tile": _numbers(_fixed(inputs, line.tile))}


def _plain(inputs: LayerInputs) -> Outputs:
    return {"out": direct_w2_inputs.plain(inputs).to(torch.float64) / inputs.row_size}


def _timed(inputs: LayerInputs) -> Mapping[str, Callable[[], object]]:
    """Baseline, selection, and every tile the table can choose, on plans and scratch that stay; then the peer."""
    arch, (rows, top_k) = architecture(inputs.x.device), inputs.experts.shape
    scratch = allocate_scratch(rows, top_k, inputs.w2.k, inputs.w2.n, device=inputs.x.device)
    out, plans = torch.empty_like(inputs.x), dict[int, DispatchPlan]()

    def variant(tiles: Tiles) -> Callable[[], Tensor]:
        block_m = tiles[0].block_m
        plan = plans.setdefault(block_m, _plan(inputs, block_m))
        return lambda: expert_layer(
            inputs.x, *inputs.prepared, inputs.weights, plan, limit=inputs.limit, w1_tile=tiles[0],
            w2_tile=tiles[1], scratch=scratch, out=out,
        )  # fmt: skip

    every = {f"{_TILE}{tile}": variant(_fixed(inputs, tile)) for tile in tile_model.candidates(arch)}
    variants = {
        "baseline": variant(_fixed(inputs, default_tile(arch))),
        "optimized": variant(tiles_for(inputs)),
        **every,
    }
    peer = _peer(inputs, variants["optimized"])
    return variants if peer is None else {**variants, f"{PEER_PREFIX}{peers.TRITON_KERNELS}": peer}


def _peer(inputs: LayerInputs, ours: Callable[[], Tensor]) -> Callable[[], Tensor] | None:
    """triton_kernels on the same inputs; None where it is missing, or where it fails, which a warning tells."""
    plan = _plan(inputs, tiles_for(inputs)[0].block_m)
    try:
        return peers.triton_kernels_layer(
            inputs.x, inputs.w1, inputs.w2, inputs.weights, plan, limit=inputs.limit, ours=ours
        )
    except Exception as error:  # someone else's package, of any version: our own times do not depend on it
        warnings.warn(f"{peers.TRITON_KERNELS} is left out: {type(error).__name__}: {error}", stacklevel=2)
        return None


# --- prediction ---


@functools.lru_cache(maxsize=64)
def _histogram(experts: int, top_k: int, rows: int, skew: float, ranks: int) -> Tensor:
    """Rows of rank 0's experts for one draw of the case's routing; the measured draws have other seeds."""
    return tile_model.local_loads(loads(experts, top_k, rows, skew), ranks)


def _shapes(p: Mapping[str, Any]) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """(n, k, columns written) of W1 and W2."""
    return (2 * p["inner"], p["hidden"], p["inner"]), (p["hidden"], p["inner"], p["hidden"])


def _predict(case: Case, device: str) -> Prediction:
    p = case.params
    mine = _histogram(p["experts"], p["top_k"], p["rows"], p["skew"], p["ranks"])
    spec = decode_model.spec_for(device) if int(mine.sum()) else None
    arch = spec.arch if spec else "cpu"
    rows = local_rows(p["rows"], p["experts"], len(mine))
    selected = select_tile(arch, rows, len(mine), p["top_k"], 2 * p["inner"], p["hidden"])
    standing = default_tile(arch)
    # The sum over choices reads each local product and writes each row, on both sides.
    summed = 2 * p["hidden"] * (int(mine.sum()) + p["rows"])

    def traffic(tile: ExpertTile | None) -> int:
        counts = tile_model.occupancy(mine, tile.block_m if tile else standing.block_m)
        return summed + sum(tile_model.gemm_bytes(counts, tile, n, k, out) for n, k, out in _shapes(p))

    def time(tile: ExpertTile, spec: DeviceSpec) -> float:
        return tile_model.layer_time_us(mine, tile, p["hidden"], p["inner"], spec)

    flops = 2 * int(mine.sum()) * sum(n * k for n, k, _ in _shapes(p))
    return Prediction(
        baseline_bytes=traffic(standing),
        optimized_bytes=traffic(selected),
        least_bytes=traffic(None),
        flops=flops,
        baseline_launches=_LAUNCHES,
        optimized_launches=_LAUNCHES,
        baseline_us=time(standing, spec) if spec else None,
        optimized_us=time(selected, spec) if spec else None,
        bound_us=_bound(traffic(None), flops, spec).time_us if spec else None,
        reason=f"{standing} -> {selected}: fewer rows of padding where experts have few rows, against more reads and "
        "decodings of the same weights",
    )


def _bound(least_bytes: int, flops: int, spec: DeviceSpec) -> Bound:
    assert spec.bandwidth_tb_s is not None
    assert spec.bf16_tflops is not None
    return Bound(least_bytes, flops, spec.bandwidth_tb_s * 1e12, spec.bf16_tflops * 1e12)


def best_rows(
    measured: Iterable[Record], devices: Sequence[str] = ("mi300x", "mi355x", "h200")
) -> list[dict[str, Any]]:
    """Selected tile beside the best of the table's, by the model and by records, per measured case and device.

    Args:
        measured: this chapter's records; none is fine.
        devices: which to predict for; those with records come in any case.

    Returns:
        rows ``case, device, selected, predicted best, selected / best, measured best``, the last None where nothing
        is recorded; ``selected / best`` is modelled time.
    """
    fastest: dict[tuple[str, str], Record] = {}
    for record in measured:
        key = (record.case, record.device)
        if record.variant.startswith(_TILE) and (key not in fastest or record.p50_us < fastest[key].p50_us):
            fastest[key] = record
    rows = []
    for case in (case for case in OPTIMIZATION.cases.values() if case.measured):
        p = case.params
        mine = _histogram(p["experts"], p["top_k"], p["rows"], p["skew"], p["ranks"])
        for device in dict.fromkeys([*devices, *(device for name, device in fastest if name == case.name)]):
            spec = decode_model.spec_for(device)
            if spec is None:
                continue
            share = local_rows(p["rows"], p["experts"], len(mine))
            selected = select_tile(spec.arch, share, len(mine), p["top_k"], 2 * p["inner"], p["hidden"])
            best = tile_model.best_tile(mine, p["hidden"], p["inner"], spec)
            slower = [tile_model.layer_time_us(mine, t, p["hidden"], p["inner"], spec) for t in (selected, best)]
            won = fastest.get((case.name, device))
            rows.append(
                {
                    "case": case.name,
                    "device": device,
                    "selected": str(selected),
                    "predicted best": str(best),
                    "selected / best": round(slower[0] / slower[1], 3),
                    "measured best": None if won is None else won.variant.removeprefix(_TILE),
                }
            )
    return rows


def compile_request(tile: ExpertTile, arch: str, *, first: bool) -> CompileRequest:
    """One GEMM of a V4-Flash expert at one tile, as the JIT would specialise it.

    Args:
        tile: the launch shape.
        arch: "gfx942" or "gfx950".
        first: W1 with gather and activation; else W2 with scatter.
    """
    inner, hidden = _FLASH["inner"], _FLASH["hidden"]
    n, k = (2 * inner, hidden) if first else (hidden, inner)
    pointers = {"x": "*bf16", "packed": "*u8", "scales": "*u8", "out": "*bf16"}
    indices = dict.fromkeys(("gather", "offsets", "tile_expert", "tile_first"), "*i32")
    strides = {"x_stride": "i32", "out_stride": "i32"}
    return CompileRequest(
        kernel="grouped_gemm",
        module="dsv4ref.kernels.experts.grouped_gemm",
        function="_grouped_kernel",
        shape=f"{tile}, {'W1' if first else 'W2'}",
        signature={**pointers, **indices, **strides, "tiles": "i32", "limit": "fp32"},
        constexprs=grouped_constants(n, k, _FLASH["top_k"], tile, arch, first, not first, first, first),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        divisible_by_16=frozenset({**pointers, **indices, **strides}),
    )


def _requests(arch: str) -> tuple[CompileRequest, ...]:
    return tuple(compile_request(t, arch, first=first) for t in tile_model.candidates(arch) for first in (True, False))


# --- hazards ---


_constraints: dict[str, int] = {}
"""What the planted override leaves behind, a module's global as in triton_kernels; empty outside that hazard."""


def _constrained(inputs: LayerInputs) -> Tiles:
    w1, w2 = (replace(tile, **_constraints) for tile in tiles_for(inputs))
    return w1, w2


def _override_left_behind(inputs: LayerInputs) -> Outputs:
    """A first matmul sets a global constraint and fails before it is taken back; its caller catches the error."""
    try:
        _constraints.update(block_m=128)
        try:
            _run(replace(inputs, x=inputs.x[:, :-1]), _constrained(inputs))
            _constraints.clear()  # what should have stood in a finally
        except ValueError:
            pass
        return _run(inputs, _constrained(inputs))
    finally:
        _constraints.clear()


def _all_rows(inputs: LayerInputs) -> Outputs:
    """Every row of the batch counted over this rank's experts only."""
    return _run(inputs, tiles_for(inputs, rows=inputs.x.shape[0]))


def _by_table(inputs: LayerInputs, rules: tuple[TileRule, ...]) -> Outputs:
    """The selection by a table that nobody checked; where no line matches, the default tile without a word."""
    rows = local_rows(inputs.x.shape[0], inputs.placed.num_experts, inputs.placed.num_local)
    try:
        tile = choose_tile(rules, rows * inputs.experts.shape[1], inputs.placed.num_local).tile
    except ValueError:
        tile = default_tile(architecture(inputs.x.device))
    return _run(inputs, _fixed(inputs, tile))


def _overlapping(inputs: LayerInputs) -> Outputs:
    """The line of 64-row tiles begins at 16 as well, and stands first."""
    rules = rules_for(architecture(inputs.x.device))
    wider = [replace(rule, above=16) for rule in rules if rule.tile.block_m == 64]
    return _by_table(inputs, (*wider, *(rule for rule in rules if rule.tile.block_m != 64)))


def _with_a_hole(inputs: LayerInputs) -> Outputs:
    """Lines for up to 16 and for 33 and more: averages between have none."""
    rules = rules_for(architecture(inputs.x.device))
    return _by_table(inputs, tuple(rule for rule in rules if rule.tile.block_m != 32))


def _plan_of_another_tile(inputs: LayerInputs) -> Outputs:
    """Tiles cut for 64 rows and walked by programs of 32; the launcher's own check is talked out of it."""
    tiles = tiles_for(inputs)
    plan = _plan(inputs, 2 * tiles[0].block_m)
    return _run(inputs, tiles, replace(plan, block_m=tiles[0].block_m))


def _padded_scales(inputs: LayerInputs) -> Outputs:
    """K rounded up to whole steps, with zeros for x and codes and with 0xFF for the scales nobody owns."""
    tiles = tiles_for(inputs)
    more = -inputs.w1.k % tiles[0].block_k
    pad = torch.nn.functional.pad
    groups = more // mxfp4.BLOCK
    w1 = Mxfp4Weights(pad(inputs.w1.packed, (0, more // 2)), pad(inputs.w1.scales, (0, groups), value=0xFF))
    wide, plan = pad(inputs.x, (0, more)), _plan(inputs, tiles[0].block_m)
    # W2 has D output columns, which the padding must not add to: only W1 is widened.
    narrow = inputs.w2
    w2 = Mxfp4Weights(pad(narrow.packed, (0, 0, 0, more)), pad(narrow.scales, (0, 0, 0, more), value=127))
    out = expert_layer(wide, w1, w2, inputs.weights, plan, limit=inputs.limit, w1_tile=tiles[0], w2_tile=tiles[1])
    return {"out": in_row_units(inputs, out[:, : inputs.x.shape[1]]), "tile": _numbers(tiles)}


# --- cases ---


def _case(name: str, rows: int, experts: int, **changes: Any) -> Case:
    flags = {key: changes.pop(key) for key in ("tiny", "needs_gpu", "measured", "about") if key in changes}
    params = {"rows": rows, "experts": experts, "ranks": 1, "top_k": 2, "hidden": 64, "inner": 32, "skew": 0.0,
              "content": "plain", **changes}  # fmt: skip
    return Case(name, params, **flags)


def _flash(rows: int, ranks: int, **flags: Any) -> Case:
    name = f"ep{ranks}-{rows}" if ranks > 1 else f"all-{rows}"
    experts = V4_FLASH.router.n_experts
    about = f"V4-Flash, {experts // ranks} of {experts} experts on the rank"
    if rows > CHECKED_ROWS:
        flags["checked"] = CHECKED_ROWS
        about += f"; float64 checks {CHECKED_ROWS} rows"
    return _case(name, rows, experts, ranks=ranks, needs_gpu=True, about=about, **_FLASH, **flags)


_CASES = (
    _case("tiny", 48, 4, ranks=2, tiny=True, about="24 rows per expert, half of the experts here"),
    _case("tiny-few", 3, 8, tiny=True, about="fewer rows than experts"),
    _case("tiny-16", 32, 4, tiny=True, about="exactly 16 rows per expert: the last of AMD's line"),
    _case("tiny-64", 75, 3, tiny=True, about="50 rows per expert"),
    _case("tiny-tall", 70, 1, top_k=1, tiny=True, about="one expert with 70 rows"),
    _case("tiny-skewed", 48, 4, skew=3.0, tiny=True, about="most rows on one expert"),
    _case("tiny-odd-k", 24, 3, hidden=160, inner=96, tiny=True, about="K is no multiple of 128"),
    _case("tiny-empty", 0, 4, tiny=True, about="no rows"),
    *(_flash(rows, ranks, measured=True) for ranks in (2, 1) for rows in M_SWEEP),
)

OPTIMIZATION = Optimization(
    id="moe_tiles",
    number=13,
    title="Expert tiles by rows per expert",
    part="III MXFP4 MoE",
    sources=("doubleword vLLM fork PR 12, commits 330979094 and d9d24cade", "vllm#55934 (the constraints' next form)"),
    cases={case.name: case for case in _CASES},
    make_inputs=_build,
    reference=_reference,
    yardstick=_plain,
    baseline=_baseline,
    optimized=_optimized,
    gate=Gate((Check("out", "budget", "expert_rows_bf16"), Check("tile", "exact"))),
    hazards={
        "override-left-behind": Hazard(
            title="a constraint outlives the matmul that it was meant for",
            story="triton_kernels' constraints are a module's global; the published change needs them for one matmul. "
            "Without a finally, an exception between set and reset leaves them for every later matmul of the process: "
            "right numbers, the wrong tile, no error.",
            source="triton_kernels update_opt_flags_constraints; doubleword commit 330979094",
            ids=("H36",),
            case="tiny",
            planted=_override_left_behind,
        ),
        "all-rows": Hazard(
            title="the tile is chosen by all rows instead of the local ones",
            story="Under expert parallelism a rank sees every row and computes its experts' share. triton_kernels "
            "divides the gathered rows, those of other ranks included, by the local experts: twice the true average "
            "at EP2.",
            source="triton_kernels matmul_ogs (M of a gather) and opt_flags (tokens_per_expt)",
            ids=("H36", "H38"),
            case="tiny",
            planted=_all_rows,
        ),
        "overlapping-lines": Hazard(
            title="two lines of the table cover the same batch",
            story="The first that matches wins, so the second is dead for part of its range and nobody is told. The "
            "published launch table of the decode has such a line.",
            source="doubleword commit a767c4d13, lines for 32 rows",
            ids=("H36",),
            case="tiny",
            planted=_overlapping,
        ),
        "hole-in-the-table": Hazard(
            title="no line covers a batch, and the default tile is taken silently",
            story="A tuned table without a line for a size falls back, and nobody is told. How far off a fallback can "
            "be: 128 rows at decode cost a factor of 15.",
            source="vllm#55934",
            ids=("H36",),
            case="tiny",
            planted=_with_a_hole,
        ),
        "plan-of-another-tile": Hazard(
            title="tiles are cut for one height and walked with another",
            story="Selection runs twice, for the plan and for the launch, and one of them sees other numbers. Rows "
            "beyond the shorter height are computed by nobody.",
            source="AITER fused_moe (block_m is an argument of sorting and of the GEMM)",
            ids=("H12", "H36"),
            case="tiny-skewed",
            planted=_plan_of_another_tile,
        ),
        "scale-padding": Hazard(
            title="K is padded to whole steps, and a scale of the padding is NaN",
            story="Codes and activations of the padding are zero, but UE8M0 has no zero: 0xFF is NaN, and 0 x NaN is "
            "NaN in every output.",
            source="aiter#5232, triton#10772",
            ids=("H39",),
            case="tiny-odd-k",
            planted=_padded_scales,
        ),
    },
    predict=_predict,
    claims=records.published("moe_tiles"),
    timed=_timed,
    measured_modules=(
        "dsv4ref.kernels.experts.grouped_gemm",
        "dsv4ref.kernels.experts.mxfp4",
        "dsv4ref.kernels.experts.expert_layer",
        "dsv4ref.kernels.experts.dispatch",
        "dsv4ref.kernels.experts.tiles",
    ),
    kernels=_requests,
)
