"""The adapters: every call binds to the contract by keyword, and what has no kernel is refused before any call."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from aiter_calls import FP8, build

from dsv4ref.kernels.aiter import adapters, operators
from dsv4ref.kernels.aiter.adapters import UnsupportedError
from dsv4ref.kernels.aiter.contract import CONTRACT
from dsv4ref.kernels.aiter.emulation import MlaVersion, emulated_library
from dsv4ref.kernels.aiter.library import Library
from dsv4ref.kernels.aiter.plan import PLAN_ORDER, DecodeShape


class RecordingAiter:
    """Laid out like AITER: binds every call to the contract's signature, notes it, and computes nothing."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        for entry, signature in CONTRACT.items():
            place = self
            for part in signature.module.split(".")[1:]:
                if not hasattr(place, part):
                    setattr(place, part, SimpleNamespace())
                place = getattr(place, part)
            setattr(place, entry, self._recorder(entry))

    def _recorder(self, entry: str) -> Callable[..., Any]:
        names: dict[str, Any] = {"MlaVersion": MlaVersion}
        exec(f"def f({CONTRACT[entry].text}): ...", names)
        signature = inspect.signature(names["f"])

        def record(*args: Any, **kwargs: Any) -> Any:
            assert not args, f"{entry}: positional arguments {args}"
            bound = signature.bind(**kwargs).arguments
            self.calls.append((entry, bound))
            if entry == "get_mla_metadata_info_v1":
                return emulated_library(compute_units=4).module.get_mla_metadata_info_v1(**kwargs)
            rows = next((v for v in bound.values() if isinstance(v, torch.Tensor)), torch.zeros(1, 1))
            lse = torch.zeros(rows.shape[:2]) if bound.get("return_lse") else None
            return torch.ones(rows.shape) if entry.startswith("pa_") else (torch.zeros(1), lse)

        return record


def recording(arch: str = "gfx950") -> tuple[Library, RecordingAiter]:
    module = RecordingAiter()
    return Library("a recorder", module, arch, 4, emulated=True), module


def i32(*size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.int32)


def bf16(*size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.bfloat16)


def fp8(*size: int) -> torch.Tensor:
    return torch.zeros(size).to(FP8)


# --- the persistent decode ---


def test_plan_and_decode_pass_every_choice_by_name(rng: torch.Generator) -> None:
    library, seen = recording()
    call = build(library, [3, 2], rng)
    seen.calls.clear()
    call.fill()
    call.run()
    (fill, planned), (run, ran) = seen.calls
    assert (fill, run) == ("get_mla_metadata_v1", "mla_decode_fwd")
    for name in PLAN_ORDER:
        assert planned[name] is call.plan.by_name()[name]
        assert ran["work_meta_data" if name == "work_metadata_ptrs" else name] is call.plan.by_name()[name]
    assert (planned["dtype_q"], planned["dtype_kv"]) == (FP8, FP8)
    assert (planned["topk"], planned["page_size"], planned["kv_granularity"]) == (64, 1, 16)
    assert ran["num_kv_splits"] == library.compute_units, "None may leave the persistent path"
    assert ran["o"] is call.arguments["out"]


def test_a_ragged_shape_is_planned_with_a_negative_topk(rng: torch.Generator) -> None:
    library, seen = recording()
    call = build(library, [3, 2], rng, layout="ragged")
    call.fill()
    assert dict(seen.calls)["get_mla_metadata_v1"]["topk"] == -1
    assert dict(seen.calls)["get_mla_metadata_info_v1"]["is_sparse"] is False


@pytest.mark.parametrize(
    ("arch", "heads", "message"),
    [
        ("gfx942", 16, "no LSE for 16 heads.*nearest supported: 16 heads, length 1, fp8/fp8, not persistent, with LSE"),
        ("gfx950", 64, "no LSE for 64 heads.*nearest supported: 32 heads"),
    ],
)
def test_an_lse_that_does_not_exist_is_refused_before_the_call(
    arch: str, heads: int, message: str, rng: torch.Generator
) -> None:
    library, seen = recording(arch)
    native = torch.float8_e4m3fnuz if arch == "gfx942" else FP8
    shape = DecodeShape(2, heads, 64, native, native)
    plan = adapters.allocate_plan(library, shape, torch.device("cpu"))
    seen.calls.clear()
    arguments = {**build(recording()[0], [3, 2], rng).arguments}
    with pytest.raises(UnsupportedError, match=message) as caught:
        adapters.mla_decode(library, shape, plan, **arguments)
    assert caught.value.answer.nearest is not None
    assert not seen.calls


def test_heads_without_a_kernel_are_refused_before_the_call() -> None:
    library, seen = recording()
    with pytest.raises(UnsupportedError, match="no kernel with heads 24"):
        adapters.plan_sizes(library, DecodeShape(2, 24, 64, FP8, FP8))
    assert not seen.calls


def test_the_other_fp8_dialect_is_refused() -> None:
    shape = DecodeShape(2, 16, 64, torch.float8_e4m3fnuz, torch.float8_e4m3fnuz)
    with pytest.raises(TypeError, match=r"q_dtype: got torch\.float8_e4m3fnuz, expected torch\.float8_e4m3fn, the fp8"):
        adapters.plan_sizes(recording()[0], shape)
    assert adapters.plan_sizes(recording("gfx942")[0], shape)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("q", bf16(2, 16, 512), TypeError, "q: got torch.bfloat16, expected torch.float8_e4m3fn"),
        ("kv", fp8(200, 1, 512), ValueError, r"kv: got shape \[200, 1, 512\], expected \[slots, 1, 1, 512\]"),
        ("out", torch.zeros(2, 16, 512), TypeError, "out: got torch.float32, expected torch.bfloat16"),
        ("qo_indptr", i32(2), ValueError, r"qo_indptr: got shape \[2\], expected \[3\]"),
        ("kv_indptr", i32(3).long(), TypeError, "kv_indptr: got torch.int64, expected torch.int32"),
        ("kv_indices", i32(127), ValueError, r"kv_indices: got shape \[127\], expected \[128\]"),
        ("kv_indices", i32(256)[::2], ValueError, "kv_indices: got strides"),
        ("kv_last_page_lens", i32(3), ValueError, "kv_last_page_lens"),
        ("q_scale", None, TypeError, "q_scale: got NoneType, expected a torch.Tensor"),
        ("kv_scale", torch.ones(2), ValueError, "kv_scale: got shape"),
    ],
)
def test_a_wrong_argument_is_refused_by_name_before_the_call(
    name: str, value: Any, error: type[Exception], message: str, rng: torch.Generator
) -> None:
    library, seen = recording()
    call = build(library, [3, 2], rng)
    seen.calls.clear()
    with pytest.raises(error, match=message):
        call.run(**{name: value})
    assert not seen.calls


def test_an_output_on_its_query_is_refused(rng: torch.Generator) -> None:
    call = build(recording()[0], [3, 2], rng)
    shared = torch.zeros(2 * 16 * 512, dtype=torch.bfloat16)
    q = shared.view(torch.uint8)[: 2 * 16 * 512].view(FP8).view(2, 16, 512)
    with pytest.raises(ValueError, match="out: its memory range overlaps q's"):
        call.run(q=q, out=shared.view(2, 16, 512))


def test_a_plan_for_another_batch_is_refused(rng: torch.Generator) -> None:
    library = recording()[0]
    call, other = build(library, [3, 2], rng), build(library, [1, 1, 1], rng)
    call.plan = other.plan
    with pytest.raises(ValueError, match=r"plan.work_info_set: got shape \[6, 8\], expected \[5, 8\]"):
        call.fill()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 0}, "rows: got 0, expected a whole number from 1 on"),
        ({"topk": 1.5}, "topk: got 1.5"),
        ({"q_dtype": torch.float16}, "q_dtype: got torch.float16, expected"),
        ({"layout": "paged"}, "layout: got 'paged', expected 'fixed' or 'ragged'"),
        ({"kv_granularity": 12}, "kv_granularity: got 12, expected a power of two"),
        ({"value_dim": 576}, r"value_dim: got 576, expected at most dim \(512\)"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecodeShape(**{"rows": 2, "heads": 16, "topk": 64, "q_dtype": FP8, "kv_dtype": FP8, **change})


# --- the other entries ---

PACKED: dict[str, Any] = {
    "q": fp8(2, 64, 512), "q_rope": bf16(2, 64, 64), "kv": fp8(5, 1, 1, 512), "kv_rope": bf16(5, 1, 1, 64),
    "out": bf16(2, 64, 512), "qo_indptr": i32(3), "kv_indptr": i32(3), "kv_indices": i32(7), "query_length": 1,
}  # fmt: skip
V4_NM = {**PACKED, "sink": torch.zeros(64), "num_kv_splits": 1, "shortest": 3}
SPARSE: dict[str, Any] = {
    "q": bf16(2, 16, 512),
    "pool": bf16(5, 512),
    "kv_indices": i32(7),
    "sink": torch.zeros(16),
    "sm_scale": 0.1,
}
SPARSE |= {"kv_indptr": torch.tensor([0, 7, 7], dtype=torch.int32)}
ROUTING: dict[str, Any] = {
    "logits": torch.zeros(2, 256),
    "bias": torch.zeros(256),
    "weights": torch.zeros(2, 6),
    "ids": i32(2, 6),
}
ROUTING |= {"renormalise": True, "scale": 1.5}
TOPK = {"logits": torch.zeros(2, 9), "indices": i32(2, 4), "k": 4, "stable": True}
LOGITS = {"q": fp8(2, 64, 128), "k": fp8(9, 128), "k_scales": torch.ones(9), "weights": torch.ones(2, 64)}
LOGITS |= {"starts": i32(2), "ends": i32(2)}
PAGED = {"q": fp8(2, 1, 64, 128), "cache": torch.zeros(3, 64, 1, 132, dtype=torch.uint8), "weights": torch.ones(2, 64),
         "out": torch.zeros(2, 100), "context_lens": i32(2), "block_table": i32(2, 2), "max_length": 100,
         "block_size": 64}  # fmt: skip

CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "mla_decode_fwd_v4_nm": (adapters.mla_decode_v4_nm, V4_NM),
    "pa_decode_sparse": (operators.sparse_decode, SPARSE),
    "pa_prefill_sparse": (operators.sparse_prefill, SPARSE),
    "biased_grouped_topk": (operators.biased_grouped_topk, {**ROUTING, "groups": 8, "topk_groups": 4}),
    "topk_gating": (operators.topk_gating, {**ROUTING, "score": "sqrtsoftplus"}),
    "top_k_per_row_prefill": (
        operators.topk_rows_prefill,
        {**TOPK, "starts": i32(2), "ends": i32(2), "values": torch.zeros(2, 4)},
    ),
    "top_k_per_row_decode": (operators.topk_rows_decode, {**TOPK, "lengths": i32(2), "next_n": 1}),
    "fp8_mqa_logits": (operators.mqa_logits, LOGITS),
    "deepgemm_fp8_paged_mqa_logits": (operators.paged_mqa_logits, PAGED),
}


@pytest.mark.parametrize("entry", CALLS)
def test_a_call_binds_to_the_contract(entry: str) -> None:
    library, seen = recording()
    function, arguments = CALLS[entry]
    function(library, **arguments)
    ((called, bound),) = seen.calls
    assert called == entry
    for name in CONTRACT[entry].writes:
        assert any(bound[name] is value for value in arguments.values()), f"{name} is not the caller's buffer"


@pytest.mark.parametrize(("splits", "direct"), [(1, 1), (2, 0)])
def test_the_packed_decode_writes_the_callers_buffer_with_one_split_and_with_several(splits: int, direct: int) -> None:
    """The kernel's default leaves one split's result in fp32 scratch; several splits refuse to write bf16 directly."""
    library, seen = recording()
    adapters.mla_decode_v4_nm(library, **{**V4_NM, "num_kv_splits": splits, "shortest": 64})
    ((_, bound),) = seen.calls
    assert bound["out_16_nosplit"] == direct, f"{splits} splits: {bound['out_16_nosplit']}, expected {direct}"


def test_the_experimental_v40_decode_binds_to_the_contract(rng: torch.Generator) -> None:
    library, seen = recording()
    plan = build(library, [3, 2], rng).plan
    seen.calls.clear()
    adapters.mla_decode_v40(
        library, plan, **PACKED, kv_last_page_lens=i32(2), sm_scale=0.1, sink=torch.zeros(64), return_lse=True
    )
    ((entry, bound),) = seen.calls
    assert entry == "mla_v40_decode_fwd"
    assert bound["work_info_set"] is plan.work_info_set
    assert "work_metadata_ptrs" not in bound


def test_every_entry_of_the_contract_has_an_adapter() -> None:
    persistent = {"get_mla_metadata_info_v1", "get_mla_metadata_v1", "mla_decode_fwd", "mla_v40_decode_fwd"}
    assert set(CALLS) | persistent == set(CONTRACT)


@pytest.mark.parametrize(
    ("entry", "changes", "message"),
    [
        ("mla_decode_fwd_v4_nm", {"num_kv_splits": 4, "shortest": 100}, "num_kv_splits: got 4 for lists of 100 keys"),
        ("mla_decode_fwd_v4_nm", {"sink": torch.zeros(64).double()}, "sink: got torch.float64, expected torch.float32"),
        ("mla_decode_fwd_v4_nm", {"query_length": 3}, "no kernel with query length 3"),
        ("mla_decode_fwd_v4_nm", {"kv": fp8(1).expand(5, 1, 1, 512)}, "kv: got strides"),
        (
            "pa_decode_sparse",
            {"kv_scales": torch.ones(5, 8)},
            "pool: got torch.bfloat16, expected torch.float8_e4m3fnuz",
        ),
        ("pa_decode_sparse", {"q": bf16(2, 24, 512)}, "no kernel with heads 24"),
        ("biased_grouped_topk", {"groups": 3}, "groups: got 3, expected 1, 2, 4 or 8"),
        ("biased_grouped_topk", {"logits": bf16(2, 256)}, "bias: got torch.float32, expected torch.bfloat16"),
        ("topk_gating", {"score": "softplus"}, "score: got 'softplus', expected 'sqrtsoftplus'"),
        ("topk_gating", {"logits": torch.zeros(2, 256).half(), "bias": bf16(256)}, "bias: got torch.bfloat16"),
        ("topk_gating", {"ids": i32(2, 6).long()}, "ids: got torch.int64, expected torch.int32"),
        ("top_k_per_row_decode", {"indices": i32(2, 5)}, r"indices: got shape \[2, 5\], expected \[2, 4\]"),
        ("fp8_mqa_logits", {"q": fp8(2, 48, 128)}, "q: got 48 heads of 128 dims, expected powers of two"),
        ("deepgemm_fp8_paged_mqa_logits", {"block_size": 32}, "cache: got shape"),
    ],
)
def test_what_an_entry_cannot_do_is_refused_before_the_call(entry: str, changes: dict[str, Any], message: str) -> None:
    library, seen = recording()
    function, arguments = CALLS[entry]
    with pytest.raises((ValueError, TypeError), match=message):
        function(library, **{**arguments, **changes})
    assert not seen.calls


def test_packed_rows_stay_below_24_bits() -> None:
    many = torch.empty(2**23, 1, 1, 512, dtype=FP8, device="meta")
    arguments: dict[str, Any] = {n: v.to("meta") if isinstance(v, torch.Tensor) else v for n, v in V4_NM.items()}
    with pytest.raises(ValueError, match="kv: got 8388608 slots, expected fewer than 8388608"):
        adapters.mla_decode_v4_nm(recording()[0], **{**arguments, "kv": many})


def test_rows_without_keys_are_zeroed_after_the_sparse_decode() -> None:
    out = operators.sparse_decode(recording()[0], **SPARSE)
    assert (out[0] == 1).all()
    assert (out[1] == 0).all()


def test_the_sparse_prefill_is_refused_on_gfx942() -> None:
    with pytest.raises(ValueError, match="pa_prefill_sparse cannot take a sink on gfx942"):
        operators.sparse_prefill(recording("gfx942")[0], **SPARSE)
