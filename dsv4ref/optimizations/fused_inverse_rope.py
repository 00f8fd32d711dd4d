"""Chapter 19: turn the output back to the query's position in fp32, inside the kernel that writes it.

Keys are values too, so an attention output carries rotated dims, and the last 64 have to be turned back before the
output projection. Baseline: the decode writes bf16, then about a dozen PyTorch operators read, rotate and rewrite it.
Optimised: the same decode rotates its fp32 accumulators, in the reduce or, at one split, in the epilogue, and rounds
once. Between the two stands one launch over the finished output (`kernels.sparse_mla.rotate`), which kernels that
cannot rotate still need.

Rotation is linear, and the same for every part of a row. So it commutes with the merge of splits and with the sink's
factor, and may be done once, at the very end, before the rounding.

Source: vllm#45103 (one launch for the operators), vllm#57435 and vllm#57451 (inside the reduce; H09).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dsv4ref import config
from dsv4ref.device import DeviceSpec
from dsv4ref.evidence import compare, records
from dsv4ref.evidence.gates import Check, Gate
from dsv4ref.evidence.isa import CompileRequest
from dsv4ref.evidence.records import Record
from dsv4ref.formats.kv_cache import HEAD_DIM, NOPE_DIM, ROPE_DIM
from dsv4ref.kernels.sparse_mla import QueryRotation, SplitPlan, SplitScratch, plan_for, plan_splits, split_k_decode
from dsv4ref.kernels.sparse_mla.rotate import HEADS_PER_PROGRAM, WARPS, rotate_rows
from dsv4ref.kernels.sparse_mla.splits import SHAPES, Machine, staged_bytes
from dsv4ref.optimizations import decode_inputs, decode_model
from dsv4ref.optimizations.base import Case, Hazard, Optimization, Prediction
from dsv4ref.optimizations.decode_inputs import DecodeInputs, decode_case
from dsv4ref.optimizations.split_model import partial_request, reduce_request
from dsv4ref.ref.numerics import Numerics
from dsv4ref.ref.rope import layer_frequencies, rotate_back_ref

__all__ = [
    "ADDED",
    "EAGER_LAUNCHES",
    "LAUNCH_US",
    "OPTIMIZATION",
    "RotationInputs",
    "StepState",
    "added_rows",
    "compiled_without_guards",
    "decode",
    "eager_bytes",
    "eager_rotation",
    "finish",
    "plan_on",
    "rotation_bytes",
    "rotation_times_us",
    "rounded_twice_and_once",
    "roundings",
    "summary",
]

EAGER_LAUNCHES = 13
"""Operators that launch work in one `eager_rotation`, counted without a GPU; a test counts them. vllm#45103 has ~10."""

LAUNCH_US = 2.0
"""Assumed cost of one small launch inside a graph, microseconds, as in chapter 06."""

ADDED = (
    "case", "device", "splits", "decode", "inside", "one launch", "model, one launch", "operators", "model, operators",
)  # fmt: skip
"""Columns of `added_rows`."""

_SWA_LAYER, _COMPRESSED_LAYER = 0, 2
_NEAR, _FAR = (0, 4_096), (65_536, 262_144)
_TABLE_BYTES_PER_READER = 2 * ROPE_DIM // 2 * 4


@dataclass(frozen=True)
class RotationInputs:
    """A decode step, where its queries stand, the frequencies of its layer and of the other kind of layer, splits."""

    step: DecodeInputs
    rotation: QueryRotation
    freqs: Tensor
    other_freqs: Tensor
    splits: int | None

    @property
    def positions(self) -> Tensor:
        """Absolute positions of the query rows, int64 ``[T]``."""
        return self.rotation.positions


def _frequencies(layer: int, device: str) -> Tensor:
    return layer_frequencies(config.V4_FLASH, layer, Numerics()).to(device)


@functools.lru_cache(maxsize=4)
def _tables(layer: int, length: int, device: str) -> QueryRotation:
    """A layer's tables for positions 0 to ``length`` - 1, shared by every input; its one position is a placeholder."""
    return QueryRotation.of(torch.zeros(1, dtype=torch.int64, device=device), _frequencies(layer, device), length)


def _positions(kind: str, rows: int, generator: torch.Generator) -> Tensor:
    if kind == "start":
        return torch.zeros(rows, dtype=torch.int64)
    low, high = {"near": _NEAR, "far": _FAR, "speculative": _FAR}[kind]
    drawn = torch.randint(low + 1, high - 1, (rows,), generator=generator)
    if kind == "speculative":  # two tokens of each request: the one that was accepted, and the draft behind it
        return drawn[: (rows + 1) // 2].repeat_interleave(2)[:rows] + torch.arange(rows) % 2
    return drawn


def _build(case: Case, device: str, seed: int) -> RotationInputs:
    p = case.params
    positions = _positions(p["positions"], p["rows"], torch.Generator().manual_seed(seed)).to(device)
    layer, other = (_SWA_LAYER, _COMPRESSED_LAYER) if p["extra"] is None else (_COMPRESSED_LAYER, _SWA_LAYER)
    length = _NEAR[1] if p["positions"] in ("start", "near") else _FAR[1]
    step = decode_inputs.build(case, device, seed)
    rotation = replace(_tables(layer, length, device), positions=positions)
    return RotationInputs(step, rotation, _frequencies(layer, device), _frequencies(other, device), p["splits"])


# --- the paths ---


def decode(
    inputs: RotationInputs, rotation: QueryRotation | None = None, **memory: Any
) -> tuple[Tensor, Tensor | None]:
    """The split decode of the inputs' step, by the portable kernel.

    Args:
        inputs: the step.
        rotation: turns the output in the kernel that writes it; None leaves it as it is.
        memory: ``out``, ``lse``, ``return_lse``, ``scratch``, as `split_k_decode`.
    """
    s = inputs.step
    return split_k_decode(
        s.q, s.swa, s.extra, sink=s.sink, scale=s.scale, rotation=rotation, splits=inputs.splits, path="triton",
        **memory,
    )  # fmt: skip


def eager_rotation(x: Tensor, rotation: QueryRotation) -> Tensor:
    """Turn outputs back with PyTorch operators, as upstream did and as its fallback still does: fp32 inside.

    Args:
        x: bf16 ``[T, H, 512]``.
        rotation: positions of the T rows, all inside the tables.

    Returns:
        bf16 ``[T, H, 512]``, new memory.
    """
    return _turn(x, rotation.positions, rotation.cos, rotation.sin)


def _turn(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.to(torch.float32)
    c, s = cos.index_select(0, positions)[:, None], sin.index_select(0, positions)[:, None]  # [T, 1, 32]
    a, b = wide[..., NOPE_DIM::2], wide[..., NOPE_DIM + 1 :: 2]  # [T, H, 32]
    turned = torch.stack((a * c + b * s, b * c - a * s), dim=-1).flatten(-2)
    out = wide.clone()
    out[..., NOPE_DIM:] = turned
    return out.to(x.dtype)


def _named(outputs: tuple[Tensor, Tensor | None]) -> dict[str, Tensor]:
    out, lse = outputs
    assert lse is not None
    return {"out": out, "lse": lse}


def _turned_after(inputs: RotationInputs, turn: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The decode's outputs with something done to the rounded ``out``."""
    found = _named(decode(inputs, return_lse=True))
    return {**found, "out": turn(found["out"])}


def _baseline(inputs: RotationInputs) -> dict[str, Tensor]:
    return _turned_after(inputs, lambda out: eager_rotation(out, inputs.rotation))


def _optimized(inputs: RotationInputs) -> dict[str, Tensor]:
    return _named(decode(inputs, inputs.rotation, return_lse=True))


def _reference(inputs: RotationInputs) -> dict[str, Tensor]:
    found = decode_inputs.reference(inputs.step)
    return {**found, "out": rotate_back_ref(found["out"], inputs.positions, inputs.freqs)}


def _yardstick(inputs: RotationInputs) -> dict[str, Tensor]:
    """Plain PyTorch rounds the attention to bf16, turns it in fp32, and rounds again."""
    found = decode_inputs.plain(inputs.step)
    turned = rotate_back_ref(found["out"].to(torch.float32), inputs.positions, inputs.freqs)
    return {**found, "out": turned.to(torch.bfloat16)}


def _timed(inputs: RotationInputs) -> Mapping[str, Callable[[], object]]:
    s = inputs.step
    out, places = torch.empty_like(s.q), plan_for(s.q, s.swa, s.extra, splits=inputs.splits, path="triton").splits
    scratch = SplitScratch.allocate(places * s.q.shape[0] * s.q.shape[1], s.q.device)

    def unturned() -> Tensor:
        return decode(inputs, out=out, scratch=scratch)[0]

    return {
        "baseline": lambda: eager_rotation(unturned(), inputs.rotation),
        "optimized": lambda: decode(inputs, inputs.rotation, out=out, scratch=scratch),
        "one launch after": lambda: rotate_rows(unturned(), inputs.rotation),
        "decode, not rotated": unturned,
    }


def roundings(inputs: RotationInputs) -> dict[str, float]:
    """Error norms of the turned dims against float64, by the path that turned them.

    The eager path and the one launch after the decode round twice, the fused one once; all share what the attention
    itself rounds.
    """
    right = _reference(inputs)["out"]
    paths = {
        "eager after": _baseline(inputs)["out"],
        "one launch after": rotate_rows(decode(inputs)[0], inputs.rotation),
        "fused": _optimized(inputs)["out"],
    }
    return {name: compare.error_norm(out[..., NOPE_DIM:], right[..., NOPE_DIM:]) for name, out in paths.items()}


def rounded_twice_and_once(x: Tensor, positions: Tensor, freqs: Tensor) -> tuple[float, float]:
    """Error norms of a rotation alone: round to bf16, turn, round; and turn, round.

    Args:
        x: float64 ``[T, ..., R]``, exact.
        positions: integer ``[T]``.
        freqs: fp32 ``[R / 2]``.
    """
    right = rotate_back_ref(x, positions, freqs)
    twice = rotate_back_ref(x.to(torch.bfloat16).to(x.dtype), positions, freqs).to(torch.bfloat16)
    return compare.error_norm(twice, right), compare.error_norm(right.to(torch.bfloat16), right)


# --- prediction ---

_HEAD_BYTES: Mapping[str, int] = {
    "to fp32": HEAD_DIM * (2 + 4),
    "four products": 4 * ROPE_DIM // 2 * (4 + 4),
    "sum and difference": 2 * ROPE_DIM // 2 * (4 + 4 + 4),
    "pairs interleaved": ROPE_DIM * (4 + 4),
    "clone": HEAD_DIM * (4 + 4),
    "written into the clone": ROPE_DIM * (4 + 4),
    "to bf16": HEAD_DIM * (4 + 2),
}
"""Bytes of one head of one row that each operator of `eager_rotation` reads and writes."""


def _vectors(params: Mapping[str, Any]) -> int:
    return int(params["rows"] * params["heads"])


def eager_bytes(params: Mapping[str, Any]) -> int:
    """Bytes `eager_rotation` moves if each operator reads its inputs once and writes its output once; tables aside."""
    return _vectors(params) * sum(_HEAD_BYTES.values())


def rotation_bytes(params: Mapping[str, Any]) -> dict[str, int]:
    """Bytes that each way of turning the output moves beyond the decode; the fused one only reads its tables."""
    whole, turned = 2 * HEAD_DIM * 2, 2 * ROPE_DIM * 2
    return {
        "eager": eager_bytes(params),
        "one launch, whole heads": _vectors(params) * whole,
        "one launch, in place": _vectors(params) * turned,
        "fused": 0,
    }


def rotation_times_us(params: Mapping[str, Any], spec: DeviceSpec) -> dict[str, float]:
    """Modelled microseconds that each way adds to the decode: its bytes at published bandwidth, and its launches."""
    assert spec.bandwidth_tb_s is not None
    launches = {"eager": EAGER_LAUNCHES, "one launch, whole heads": 1, "one launch, in place": 1, "fused": 0}
    return {
        way: moved / (spec.bandwidth_tb_s * 1e6) + launches[way] * LAUNCH_US
        for way, moved in rotation_bytes(params).items()
    }


def added_rows(opt: Optimization, measured: Iterable[Record]) -> list[dict[str, Any]]:
    """What each way of turning the output added to the decode in the records, beside the model of it.

    Args:
        opt: this chapter.
        measured: its records; devices without published figures are left out.

    Returns:
        Rows with the columns of `ADDED`, microseconds: differences of medians with and without the rotation.
    """
    times: dict[tuple[str, str], dict[str, float]] = {}
    for record in measured:
        if record.chapter == opt.id and decode_model.spec_for(record.device) is not None:
            times.setdefault((record.case, record.device), {})[record.variant] = record.p50_us
    found = []
    for (case, device), seen in times.items():
        spec = decode_model.spec_for(device)
        assert spec is not None
        params, decoded = opt.case(case).params, seen["decode, not rotated"]
        modelled = rotation_times_us(params, spec)
        found.append(
            {
                "case": case,
                "device": device,
                "splits": plan_on(params, spec).splits,
                "decode": decoded,
                "inside": seen["optimized"] - decoded,
                "one launch": seen["one launch after"] - decoded,
                "model, one launch": modelled["one launch, in place"],
                "operators": seen["baseline"] - decoded,
                "model, operators": modelled["eager"],
            }
        )
    return found


def summary(opt: Optimization, measured: Iterable[Record]) -> str:
    """The records in one line per device: what each way added, least to most; empty without records.

    Args: as `added_rows`.
    """
    rows, lines = added_rows(opt, measured), []
    for device in dict.fromkeys(row["device"] for row in rows):
        here = [row for row in rows if row["device"] == device]
        ways = {way: [row[way] for row in here] for way in ("inside", "one launch", "operators")}
        added = ", ".join(f"{way} {min(us):.1f} to {max(us):.1f} us" for way, us in ways.items())
        dearer = sum(row["inside"] >= row["one launch"] for row in here)
        lines.append(
            f"{device}, added to the decode: {added}; inside no cheaper than one launch in {dearer} of {len(here)}"
        )
    return "\n".join(lines)


def plan_on(params: Mapping[str, Any], spec: DeviceSpec | None) -> SplitPlan:
    """The split decode's plan for a case on a card; on one without figures, a single pass at the static shape."""
    machine = None if spec is None else Machine.of(spec)
    return plan_splits(
        machine, params["rows"], params["heads"], params["swa"], params["extra"] or 0, splits=params["splits"]
    )


def _predict(case: Case, device: str) -> Prediction:
    p = case.params
    spec = decode_model.spec_for(device)
    plan = plan_on(p, spec)
    staged = 2 * staged_bytes(p["rows"], p["heads"], plan.splits) if plan.splits > 1 else 0
    decoded = decode_model.key_bytes(p, plan.launch) + 2 * decode_model.vector_bytes(p) + staged
    readers = _vectors(p) if plan.splits > 1 else plan.launch.workgroups(p["rows"], p["heads"])
    launches = 2 if plan.splits > 1 else 1
    added = rotation_times_us(p, spec) if spec else None
    return Prediction(
        baseline_bytes=decoded + eager_bytes(p),
        optimized_bytes=decoded + readers * _TABLE_BYTES_PER_READER,
        least_bytes=decode_model.least_bytes(p),
        flops=decode_model.decode_flops(p),
        baseline_launches=launches + EAGER_LAUNCHES,
        optimized_launches=launches,
        baseline_us=plan.time_us + added["eager"] if added else None,
        optimized_us=plan.time_us + added["fused"] if added else None,
        bound_us=decode_model.bound(p, spec).time_us if spec else None,
        reason=f"{EAGER_LAUNCHES} operators that move {sum(_HEAD_BYTES.values()):,} bytes a head go; in their "
        "place a few multiplications on numbers that are in registers already",
    )


def _rotate_request() -> CompileRequest:
    """The rotation in one launch, over bf16 outputs, with rows to leave alone."""
    pointers = {"x": "*bf16", "positions": "*i64", "cos": "*fp32", "sin": "*fp32", "first": "*i32"}
    strides = ["x_stride_t", "x_stride_h", "cos_stride", "sin_stride"]
    sizes = dict.fromkeys([*strides, "num_positions", "num_heads"], "i32")
    return CompileRequest(
        kernel="rotate_rows",
        module="dsv4ref.kernels.sparse_mla.rotate",
        function="_rotate_rows_kernel",
        shape=f"{HEADS_PER_PROGRAM} heads w{WARPS}",
        signature={**pointers, **sizes},
        constexprs={"HAS_FIRST": True, "BLOCK_H": HEADS_PER_PROGRAM},
        num_warps=WARPS,
        divisible_by_16=frozenset(pointers) | frozenset(sizes),
    )


def _requests(arch: str) -> tuple[CompileRequest, ...]:
    """Each place the rotation can stand, with it and without: the reduce, and the epilogue of the widest tile."""
    widest = SHAPES[arch][-1].launch
    reduces = (reduce_request(arch, rotation=rotation) for rotation in (False, True))
    whole = (partial_request(widest, arch, split=False, rotation=rotation) for rotation in (False, True))
    return (*reduces, *whole, _rotate_request())


# --- hazards ---


@dataclass
class StepState:
    """What the host knows of a step when the output projection begins: how many leading rows are turned already."""

    turned: int


def finish(out: Tensor, state: StepState, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the rows that no kernel has turned. Their number is read on the host, so this must not run compiled.

    Args:
        out: bf16 ``[T, H, 512]``; rows from ``state.turned`` on still owe a rotation.
        state: of this step.
        positions, cos, sin: as `QueryRotation`.
    """
    late = state.turned
    return torch.cat([out[:late], _turn(out[late:], positions[late:], cos, sin)])


def compiled_without_guards() -> Callable[[Tensor, StepState, Tensor, Tensor, Tensor], Tensor]:
    """`finish` as torch.compile makes it when every guard is dropped, which is how vLLM compiles; nothing traced yet.

    The "eager" backend runs the traced operators as they are, so that no compiler is needed to see what tracing does.
    """
    torch.compiler.reset()
    return torch.compile(
        finish, backend="eager", options={"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    )  # fmt: skip


def _frozen_count(inputs: RotationInputs) -> dict[str, Tensor]:
    """Traced in a step whose rows the decode had all turned; then a step in which it turned none."""
    tables = inputs.positions, inputs.rotation.cos, inputs.rotation.sin
    compiled = compiled_without_guards()
    compiled(decode(inputs, inputs.rotation)[0], StepState(turned=len(inputs.positions)), *tables)
    return _turned_after(inputs, lambda out: compiled(out, StepState(turned=0), *tables))


def _turned_by(rotation: Callable[[RotationInputs], QueryRotation]) -> Callable[[RotationInputs], dict[str, Tensor]]:
    """The fused path, turned by something else."""
    return lambda inputs: _named(decode(inputs, rotation(inputs), return_lse=True))


def _by_half_split_pairs(inputs: RotationInputs) -> dict[str, Tensor]:
    """Pair i is (x[i], x[i + 32]) of the last 64 dims, as in GPT-NeoX and Llama."""

    def turn(out: Tensor) -> Tensor:
        paired = out[..., NOPE_DIM:].unflatten(-1, (2, ROPE_DIM // 2)).transpose(-1, -2).flatten(-2)
        turned = eager_rotation(torch.cat([out[..., :NOPE_DIM], paired], dim=-1), inputs.rotation)
        halves = turned[..., NOPE_DIM:].unflatten(-1, (ROPE_DIM // 2, 2)).transpose(-1, -2).flatten(-2)
        return torch.cat([turned[..., :NOPE_DIM], halves], dim=-1)

    return _turned_after(inputs, turn)


def _forward(inputs: RotationInputs) -> QueryRotation:
    return replace(inputs.rotation, sin=-inputs.rotation.sin)


def _row_index(inputs: RotationInputs) -> QueryRotation:
    return replace(inputs.rotation, positions=torch.arange(len(inputs.positions), device=inputs.positions.device))


def _request_position(inputs: RotationInputs) -> QueryRotation:
    """Each request's length minus one, for all of its tokens."""
    last = inputs.positions.clone()
    last[0::2][: len(last) // 2] = last[1::2]
    return replace(inputs.rotation, positions=last)


def _other_table(inputs: RotationInputs) -> QueryRotation:
    return QueryRotation.of(inputs.positions, inputs.other_freqs, inputs.rotation.cos.shape[0])


def _rounded_positions(inputs: RotationInputs) -> QueryRotation:
    """Tables built in the activations' dtype: the position is rounded to bf16 before it meets the frequency."""
    length = inputs.rotation.cos.shape[0]
    rounded = torch.arange(length, device=inputs.freqs.device).to(torch.bfloat16).to(torch.float32)
    angles = rounded[:, None] * inputs.freqs
    return replace(inputs.rotation, cos=torch.cos(angles), sin=torch.sin(angles))


# --- cases ---


def _case(case: Case, positions: str, splits: int | None = None, **changes: Any) -> Case:
    return replace(case, params={**case.params, "positions": positions, "splits": splits}, **changes)


_ODD = {case.name: case for case in decode_inputs.tiny_and_odd_cases()}
_CASES = (
    _case(_ODD["tiny"], "near", 2, about="two splits: turned in the reduce"),
    _case(
        decode_case("tiny-one-split", rows=3, heads=8, swa=24, extra=20, tiny=True), "near", 1,
        about="one split: turned in the epilogue",
    ),
    _case(
        decode_case("tiny-speculative", rows=4, heads=8, swa=24, extra=20, tiny=True), "speculative", 3,
        about="two tokens a request, past 65,536",
    ),
    _case(_ODD["tiny-ragged"], "far", 2, about="empty rows, holes, a row of invalid slots only; past 65,536"),
    _case(_ODD["tiny-c128"], "far", 1, about="C128 layer, 16 heads"),
    _case(_ODD["tiny-swa-only"], "near", 2, about="SWA-only layer: theta 10,000, no YaRN; odd heads"),
    _case(
        decode_case("tiny-start", rows=2, heads=8, swa=1, extra=0, tiny=True), "start", 1,
        about="position 0: the rotation is the identity",
    ),
    _case(_ODD["window-edges"], "near"),
    _case(_ODD["flash-tp4-3"], "far"),
    _case(_ODD["pro-tp4-3"], "far"),
    _case(_ODD["flash-74"], "far"),
    _case(_ODD["flash-321"], "far"),
    *(_case(case, "far", needs_gpu=True) for case in decode_inputs.production_cases()),
)  # fmt: skip

OPTIMIZATION = Optimization(
    id="fused_inverse_rope",
    number=19,
    title="Inverse RoPE in the epilogue",
    part="V after the sources",
    sources=("vllm#45103", "vllm#57435", "vllm#57451"),
    cases={case.name: case for case in _CASES},
    make_inputs=_build,
    reference=_reference,
    yardstick=_yardstick,
    baseline=_baseline,
    optimized=_optimized,
    gate=Gate((Check("out", "budget", "attention_bf16"), Check("lse", "budget", "lse_fp32"))),
    hazards={
        "frozen-count": Hazard(
            title="the number of turned rows is frozen when the projection is traced",
            story="Which rows still owe a rotation depends on the batch: prefill rows do, and decode paths that do not "
            "fuse. Read as a Python number inside a compiled function without guards, it keeps the traced step's "
            "value, and rows are turned twice or not at all.",
            source="vllm#57451, about an early revision of vllm#57435",
            ids=("H09",),
            case="tiny",
            planted=_frozen_count,
        ),
        "half-split": Hazard(
            title="pairs are taken from both halves instead of side by side",
            story="DeepSeek turns neighbours (interleaved, GPT-J); Llama's kernels turn x[i] with x[i + 32]. The "
            "tables are the same, cos then sin, and give no hint.",
            source="hw-native-sys/pypto-lib#186, review (an automated one takes the layout for halves); vllm#45103 "
            "guards its kernel for the layout",
            ids=(),
            case="tiny",
            planted=_by_half_split_pairs,
        ),
        "forward": Hazard(
            title="the output is turned on instead of back",
            story="The forward kernel is at hand, and the sign of the sine is the whole difference. Lengths stay, the "
            "nope dims stay, and position 0 is right.",
            source="no report of this very bug; the inverse is a flag of the forward rotation in vLLM",
            ids=(),
            case="tiny-one-split",
            planted=_turned_by(_forward),
        ),
        "row-index": Hazard(
            title="the row's index stands for its position",
            story="A kernel that has the row at hand takes it for the position. A test whose rows stand at positions "
            "0, 1, 2, ... is green.",
            source="no report of this very bug",
            ids=(),
            case="tiny",
            planted=_turned_by(_row_index),
        ),
        "request-position": Hazard(
            title="all tokens of a request are turned to its last position",
            story="Length minus one is the position only while a request brings one token. With a draft token the "
            "first of the two is turned one step too far.",
            source="no report of this very bug; chapter 07 plants its like for lengths",
            ids=(),
            case="tiny-speculative",
            planted=_turned_by(_request_position),
        ),
        "other-table": Hazard(
            title="the output is turned by the table of another kind of layer",
            story="Layers without compression have theta 10,000 and no YaRN, all others theta 160,000 with YaRN. One "
            "table for all is right on most layers, and short prompts do not show the rest.",
            source="Avarok-Cybersecurity/atlas#276 (one table, outputs included); vllm#54815, sglang#34788, "
            "ml-explore/mlx-lm#1189 (queries and keys)",
            ids=(),
            case="tiny-swa-only",
            planted=_turned_by(_other_table),
        ),
        "rounded-positions": Hazard(
            title="the tables are built from bf16 positions",
            story="bf16 counts 256 integers, then every second, then every fourth. A module cast to bf16 takes its "
            "position buffer along.",
            source="huggingface/candle#3520, sgl-project/sglang-jax#1473 (frequencies), transformers#29285",
            ids=(),
            case="tiny-one-split",
            planted=_turned_by(_rounded_positions),
        ),
    },
    predict=_predict,
    claims=records.published("fused_inverse_rope"),
    timed=_timed,
    measured_modules=(
        *decode_model.MEASURED_MODULES,
        "dsv4ref.kernels.sparse_mla.split_decode",
        "dsv4ref.kernels.sparse_mla.splits",
        "dsv4ref.kernels.sparse_mla.merge",
        "dsv4ref.kernels.sparse_mla.rotate",
    ),
    kernels=_requests,
)
