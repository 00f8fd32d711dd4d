"""Chapter 03's layer on several GPUs, verified and timed: torchrun runs this module, one process per rank.

    torchrun --nproc-per-node 2 -m dsv4ref.optimizations.routing_exchange --out records

One V4-Flash layer's routed experts: every rank routes its own tokens, `expert_parallel` exchanges them, each rank runs
the MXFP4 experts that it holds, and the parts are summed. Gates first, on every batch and both placements: what the
ranks return against float64 and against one rank with all experts, with tokens split unevenly, with a rank that has no
token, and with a rank whose experts nobody chose. Then the layer is timed on one rank and on all of them, in turns, in
the same processes; rank 0 writes the records. A red gate: nothing is timed, exit status 1.

A step begins on all ranks behind one small all-reduce, and takes as long as its slowest rank. Weights are fifty times
an L2, so no cache is flushed. Eager steps first; then, where the backend lets itself be captured, replayed ones.

Without a GPU: gloo, CPU tensors, a tiny layer and the host's clock. A rehearsal of the same lines, nothing recorded.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dsv4ref import kernels  # before triton: this import decides how kernels run

# isort: split
import torch
import torch.distributed as dist
from torch import Tensor

from dsv4ref import device as machines
from dsv4ref.config import V4_FLASH, RouterConfig
from dsv4ref.evidence import compare, records, timing
from dsv4ref.evidence.compare import Comparison
from dsv4ref.evidence.records import Record
from dsv4ref.kernels.codes import architecture
from dsv4ref.kernels.experts import ExpertMap, Mxfp4Weights, expert_layer, plan_dispatch, route_learned
from dsv4ref.kernels.experts.expert_map import Placement
from dsv4ref.kernels.experts.expert_parallel import combine, expert_parallel, gather_tokens
from dsv4ref.kernels.experts.tiles import local_rows, select_tile
from dsv4ref.optimizations import direct_w2_inputs, expert_traffic
from dsv4ref.optimizations.base import Case, case_seed
from dsv4ref.optimizations.direct_w2_inputs import CHECKED_ROWS, LayerInputs, in_row_units
from dsv4ref.optimizations.routing_ranks import shares

__all__ = ["CHAPTER", "FLASH", "MEASURED_MODULES", "TINY", "Layer", "compared", "record_rows"]

CHAPTER = "expert_routing"
MEASURED_MODULES = tuple(
    f"dsv4ref.kernels.experts.{name}"
    for name in (
        "dispatch", "expert_layer", "expert_map", "expert_parallel", "grouped_gemm", "mxfp4", "routing", "tiles"
    )
)  # fmt: skip
PLACEMENTS: tuple[Placement, ...] = ("linear", "round_robin")
ONE, TWIN, MANY, ALONE = "baseline", "baseline again", "optimized", "exchange alone"
_CUSHION_BYTES = 1 << 31
"""Written before a sample, so that the device is still busy when the host has submitted it."""
_TOLERANCE = compare.TOLERANCES["expert_rows_bf16"]
assert _TOLERANCE.cosine is not None
_BETWEEN = replace(
    _TOLERANCE, abs=2 * _TOLERANCE.abs, rel=2 * _TOLERANCE.rel, cosine=4 * _TOLERANCE.cosine, yardstick_factor=None,
    reason="two results, each within the budget of one: twice the distance, and its square for the cosine",
)  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """The layer and the batches that it runs on.

    Args:
        name: names the records' cases, with the rows.
        hidden, inner: D and I.
        router: E, k and the scale.
        rows: tokens of all ranks together.
        rounds, warmup: samples of each variant, and rounds before them.
    """

    name: str
    hidden: int
    inner: int
    router: RouterConfig
    rows: tuple[int, ...]
    rounds: int
    warmup: int


FLASH = Layer("flash-layer", V4_FLASH.hidden_size, V4_FLASH.moe_inter_dim, V4_FLASH.router, (64, 1024), 40, 3)
TINY = Layer("tiny-layer", 64, 32, replace(V4_FLASH.router, n_experts=5, top_k=2), (5,), 1, 0)


@dataclass(frozen=True)
class _Batch:
    """One batch, the same on every rank: logits and bias of the router, and all experts with the batch routed."""

    logits: Tensor
    bias: Tensor
    whole: LayerInputs


# --- what runs ---


def _batch(layer: Layer, rows: int, device: str, seed: int, idle: bool) -> _Batch:
    """Rank 0's draw, on every rank; with ``idle``, nobody chooses what a linear placement gives the last rank."""
    router = layer.router
    params = {
        "rows": rows, "experts": router.n_experts, "ranks": 1, "top_k": router.top_k, "hidden": layer.hidden,
        "inner": layer.inner, "content": "plain", "checked": CHECKED_ROWS,
    }  # fmt: skip
    drawn = direct_w2_inputs.build(Case(layer.name, params), device, seed)
    rng = torch.Generator().manual_seed(seed)
    logits = (1.5 * torch.randn((rows, router.n_experts), generator=rng)).to(device)
    bias = (7.0 + 0.1 * torch.randn(router.n_experts, generator=rng)).to(device)
    if idle:
        last = ExpertMap.placed(router.n_experts, rank=dist.get_world_size() - 1, ranks=dist.get_world_size())
        bias[last.global_ids().to(device)] -= 100.0
    for tensor in (logits, bias, drawn.x, *(t for w in (drawn.w1, drawn.w2) for t in (w.packed, w.scales))):
        dist.broadcast(tensor, 0)
    weights, experts = route_learned(logits, bias, router)
    return _Batch(logits, bias, replace(drawn, weights=weights, experts=experts))


def _experts(
    layer: Layer, x: Tensor, weights: Tensor, local: Tensor, w1: Mxfp4Weights, w2: Mxfp4Weights, limit: float
) -> Tensor:
    """The experts of one rank on tokens with its local numbers: bf16 ``[N, D]``."""
    mine = w1.num_experts
    rows = local_rows(x.shape[0], layer.router.n_experts, mine)
    tiles = [select_tile(architecture(x.device), rows, mine, local.shape[1], w.n, w.k) for w in (w1, w2)]
    plan = plan_dispatch(local, mine, block_m=tiles[0].block_m)
    return expert_layer(x, w1, w2, weights, plan, limit=limit, w1_tile=tiles[0], w2_tile=tiles[1])


def _one_rank(layer: Layer, batch: _Batch) -> Callable[[], Tensor]:
    """The whole batch on one rank that holds every expert: bf16 ``[M, D]``."""
    whole = batch.whole

    def step() -> Tensor:
        weights, experts = route_learned(batch.logits, batch.bias, layer.router)
        return _experts(layer, whole.x, weights, experts, whole.w1, whole.w2, whole.limit)

    return step


def _all_ranks(layer: Layer, batch: _Batch, placement: Placement, tokens: Sequence[int]) -> Callable[[], Tensor]:
    """This rank's tokens through the experts of all ranks: fp32 ``[tokens[rank], D]``."""
    rank, whole = dist.get_rank(), batch.whole
    one = ExpertMap.placed(
        layer.router.n_experts, rank=rank, ranks=len(tokens), placement=placement, device=whole.x.device
    )
    held = one.global_ids()
    w1, w2 = (Mxfp4Weights(w.packed[held].contiguous(), w.scales[held].contiguous()) for w in (whole.w1, whole.w2))
    mine = slice(sum(tokens[:rank]), sum(tokens[: rank + 1]))
    logits, x = batch.logits[mine].contiguous(), whole.x[mine].contiguous()

    def compute(everybody: Tensor, weights: Tensor, local: Tensor) -> Tensor:
        return _experts(layer, everybody, weights, local, w1, w2, whole.limit).float()

    def step() -> Tensor:
        weights, experts = route_learned(logits, batch.bias, layer.router)
        return expert_parallel(x, weights, experts, one, compute, capacity=max(1, *tokens))

    return step


def _exchange(batch: _Batch, tokens: Sequence[int]) -> Callable[[], Tensor]:
    """Gather and sum alone: the same tensors travel, nobody computes."""
    rank, whole, capacity = dist.get_rank(), batch.whole, max(1, *tokens)
    mine = slice(sum(tokens[:rank]), sum(tokens[: rank + 1]))
    x, weights, experts = (t[mine].contiguous() for t in (whole.x, whole.weights, whole.experts))
    parts = torch.zeros((len(tokens) * capacity, x.shape[1]), device=x.device)

    def step() -> Tensor:
        gather_tokens(x, weights, experts, capacity=capacity)
        return combine(parts, rows=x.shape[0], capacity=capacity)

    return step


# --- gates ---


def _gates(layer: Layer, device: str, seed: int) -> list[str]:
    """Every batch, placement and split against float64 and against one rank: one line per red comparison, on rank 0.

    Raises:
        ValueError: the batch with idle experts leaves none idle, or the other leaves some.
    """
    ranks, red = dist.get_world_size(), []
    for rows in layer.rows:
        for idle in (False, True):
            batch = _batch(layer, rows, device, seed, idle)
            whole, alone = batch.whole, _one_rank(layer, batch)()
            _check_idle(batch, idle and ranks > 1)
            rest = (False,) if idle else (False, True)
            for placement in PLACEMENTS:
                for no_token in rest:
                    tokens = shares(rows, ranks, idle=no_token)
                    y = _collected(_all_ranks(layer, batch, placement, tokens)())
                    if dist.get_rank():
                        continue
                    what = f"{layer.name}-{rows}, {placement}, tokens {tokens}{', idle experts' if idle else ''}"
                    red += [f"{what}: {c.detail}" for c in compared(whole, alone, y) if not c.passed]
    return red


def compared(whole: LayerInputs, alone: Tensor, y: Tensor) -> tuple[Comparison, Comparison]:
    """The ranks' rows against float64 on the checked rows, and against one rank's on all of them.

    Args:
        whole: the batch and all experts.
        alone: bf16 ``[M, D]``, one rank's.
        y: fp32 ``[M, D]``, everybody's rows in order.
    """
    y = y.to(alone.device)
    exact, plain = (rows.double() / whole.row_size for rows in (whole.exact, direct_w2_inputs.plain(whole)))
    size = alone.double().square().mean(dim=1, keepdim=True).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    return (
        compare.close("y against float64", in_row_units(whole, y), exact, _TOLERANCE, plain),
        compare.close("y against one rank", y.double() / size, alone.double() / size, _BETWEEN),
    )


def _check_idle(batch: _Batch, idle: bool) -> None:
    """Whether the last rank of a linear placement has a slot of this batch is as it was meant."""
    ranks = dist.get_world_size()
    last = ExpertMap.placed(len(batch.bias), rank=ranks - 1, ranks=ranks).global_ids()
    found = int(torch.isin(batch.whole.experts.cpu().long(), last).sum())
    if bool(found) is idle:
        raise ValueError(f"batch: the last rank has {found} slots, expected {'none' if idle else 'some'}")


def _collected(y: Tensor) -> Tensor:
    """Everybody's rows in rank order, on the CPU."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, y.cpu())
    return torch.cat(parts)


# --- times ---


def _sampler(run: Callable[[], object], device: torch.device, cushion: Tensor) -> Callable[[], float]:
    """One sample of a step, in microseconds, from behind an all-reduce that all ranks take part in."""
    together = torch.zeros(1, device=device)
    if device.type == "cpu":

        def rehearsed() -> float:
            dist.all_reduce(together)
            started = time.perf_counter_ns()
            run()
            return (time.perf_counter_ns() - started) / 1e3

        return rehearsed
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample() -> float:
        cushion.zero_()
        dist.all_reduce(together)
        start.record()
        run()
        end.record()
        end.synchronize()
        return 1e3 * start.elapsed_time(end)

    return sample


def _captured(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A step's graph, to replay. Its stream warmed it up; a watchdog of the backend may go on in its own thread."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        kept = run()

    def replay() -> Tensor:
        graph.replay()
        return kept

    return replay


def _timed(layer: Layer, steps: Mapping[str, Callable[[], Tensor]], device: torch.device, method: str) -> timing.Timing:
    """All variants in turns on all ranks; a step of several ranks takes as long as the slowest, per round."""
    cushion = torch.empty(_CUSHION_BYTES if device.type == "cuda" else 1, dtype=torch.uint8, device=device)
    runs: dict[str, Callable[[], object]] = {**steps}
    if method == "graph":
        runs = {name: _agreed_capture(name, step, device) for name, step in steps.items()}
    samplers = {name: _sampler(run, device, cushion) for name, run in runs.items()}
    # No limit of time: ranks that stop in different rounds would wait for each other for ever.
    timing.collect(samplers, rounds=layer.warmup, max_seconds=float("inf"))
    mine = timing.collect(samplers, rounds=layer.rounds, max_seconds=float("inf"))
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    slowest = {name: [max(times) for times in zip(*(found[name] for found in gathered), strict=True)] for name in mine}
    samples = {name: gathered[0][name] if name in (ONE, TWIN) else slowest[name] for name in mine}
    return timing.summarise(
        samples, baseline=ONE, again=TWIN, method=method, device_name=machines.current().name, rotations=1,
        flush_bytes=0,
    )  # fmt: skip


def _agreed_capture(name: str, step: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """A step's graph that has replayed the eager step's bits, on every rank or on none.

    Raises:
        RuntimeError: on all ranks, if one of them could not capture it or replays other bits.
    """
    eager, problem, replay = step().clone(), "", None
    try:
        replay = _captured(step)
    except RuntimeError as error:
        problem = f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}"
    if _everywhere(not problem, device) and replay is not None:
        found = compare.identical(f"{name}, replayed", replay(), eager)
        problem = "" if found.passed else found.detail
        if _everywhere(found.passed, device):
            return replay
    raise RuntimeError(problem or f"{name}: another rank could not capture it, or replayed other bits")


def _steps(layer: Layer, batch: _Batch) -> dict[str, Callable[[], Tensor]]:
    """The variants of a batch whose tokens are split evenly; one rank's whole layer twice."""
    ranks, rows = dist.get_world_size(), len(batch.logits)
    even = [len(part) for part in torch.arange(rows).tensor_split(ranks)]
    return {
        ONE: _one_rank(layer, batch),
        MANY: _all_ranks(layer, batch, "linear", even),
        "round robin": _all_ranks(layer, batch, "round_robin", even),
        ALONE: _exchange(batch, even),
        TWIN: _one_rank(layer, batch),
    }


def _lines(layer: Layer, rows: int, found: timing.Timing, seed: int, run: str) -> list[Record]:
    """One record per variant. Bytes and FLOPs are a rank's, for one draw of a uniform routing."""
    ranks, machine = dist.get_world_size(), machines.current()
    where = records.provenance(
        device=f"{machine.key}-x{ranks}", device_name=f"{ranks} x {machine.name}", mode=kernels.mode()
    )
    p = {"rows": rows, "experts": layer.router.n_experts, "top_k": layer.router.top_k, "hidden": layer.hidden,
         "inner": layer.inner}  # fmt: skip
    lines = []
    for name in found.quantiles:
        if name == TWIN:
            continue
        share = {**p, "ranks": 1 if name == ONE else ranks}
        exchanged = rows * layer.hidden * 2 * (2 + 4)  # bf16 rows and fp32 parts, each written and read
        lines.append(
            Record(
                chapter=CHAPTER,
                case=f"{layer.name}-{rows}",
                variant=name,
                **found.record_fields(name),
                bytes=exchanged if name == ALONE else expert_traffic.least_bytes(share),
                flops=0 if name == ALONE else expert_traffic.useful_flops(share),
                launches=None,
                bound_us=None,
                gate="passed",
                seed=seed,
                sources=records.hash_sources(MEASURED_MODULES),
                peers=None,
                run=run,
                **where,
            )
        )
    return lines


def record_rows(measured: Sequence[Record]) -> list[dict[str, Any]]:
    """What the chapter's page shows of these records: one row per device, batch and method.

    Args:
        measured: any records; all but this module's are left out.
    """
    names = {f"{FLASH.name}-{rows}": rows for rows in FLASH.rows}
    groups: dict[tuple[str, str, str], dict[str, Record]] = {}
    for record in records.latest(r for r in measured if r.chapter == CHAPTER and r.case in names):
        groups.setdefault((record.device_name, record.case, record.method), {})[record.variant] = record
    rows = []
    for (where, case, method), by in groups.items():
        best = by[MANY]
        rows.append(
            {
                "devices": where,
                "tokens": names[case],
                "method": method,
                "one rank, us": by[ONE].p50_us,
                "all ranks, us": best.p50_us,
                "round robin, us": by["round robin"].p50_us,
                "exchange alone, us": by[ALONE].p50_us,
                "ratio": best.ratio,
                "95 %": [best.ratio_low, best.ratio_high],
                "noise floor": best.noise_floor,
                "date": best.date[:10],
                "stale": any(records.is_stale(r) for r in by.values()),
            }
        )
    return rows


# --- the command ---


def _everywhere(ok: bool, device: torch.device) -> bool:
    """Whether every rank says so."""
    flag = torch.tensor(float(ok), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag.item())


def _measure(layer: Layer, device: torch.device, out: Path | None, seed: int) -> tuple[list[Record], list[str]]:
    """Time every batch by every method that works; rank 0 writes each batch's records as soon as it has them."""
    run, lines, notes = records.new_run(), [], []
    for method in ("events", "graph") if device.type == "cuda" else ("host clock, a rehearsal",):
        for rows in layer.rows:
            batch = _batch(layer, rows, str(device), case_seed(CHAPTER, f"{layer.name}-{rows}", seed), idle=False)
            try:
                found = _timed(layer, _steps(layer, batch), device, method)
            except RuntimeError as error:
                if method != "graph":
                    raise
                notes.append(f"{method}, {rows} rows: {error}")
                continue
            if dist.get_rank() == 0:
                made = _lines(layer, rows, found, seed, run)
                if out is not None:
                    records.write(out / made[0].device / f"{CHAPTER}.jsonl", made)
                lines += made
    return lines, notes


def main() -> None:
    """Entry point under torchrun: one JSON line from rank 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the records, required on GPUs")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    compiled = kernels.mode() == "compiled"
    if compiled and arguments.out is None:
        parser.error("--out: missing, expected a folder for the records")
    if not compiled and arguments.out is not None:
        parser.error("--out: got a folder, but nothing is recorded without a GPU; expected none")
    layer, device = FLASH if compiled else TINY, torch.device("cpu")
    if compiled:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if compiled else "gloo")
    try:
        red = _gates(layer, str(device), arguments.seed)
        green = _everywhere(not red, device)
        lines, notes = _measure(layer, device, arguments.out, arguments.seed) if green else ([], [])
        if dist.get_rank() == 0:
            shown = [
                {k: v for k, v in asdict(line).items() if k not in ("sources", "kind", "schema")} for line in lines
            ]
            found = {"backend": dist.get_backend(), "ranks": dist.get_world_size(), "red": red, "notes": notes}
            print(json.dumps({**found, "records": shown}), flush=True)
    finally:
        dist.destroy_process_group()
    sys.exit(0 if green else 1)


if __name__ == "__main__":
    main()
