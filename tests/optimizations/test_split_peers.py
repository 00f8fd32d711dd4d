"""What chapter 18 says beside its peers: ratios the right way round, averaged over the right cases."""

from __future__ import annotations

import statistics
from dataclasses import replace

import pytest

from dsv4ref.evidence import records
from dsv4ref.evidence.records import Record
from dsv4ref.kernels.peers import FLASHMLA, FLASHMLA_PREFILL, VLLM_TRITON
from dsv4ref.optimizations import catalogue, split_peers

OPT = catalogue.get("split_k_decode")
SOME = next(r for r in records.shipped() if (r.chapter, r.variant) == (OPT.id, "optimized"))


def recorded(case: str, **times: float) -> list[Record]:
    """Records of one case, a line per variant; "flashmla", "prefill" and "vllm" stand for peers."""
    names = {
        "flashmla": f"peer: {FLASHMLA}", "prefill": f"peer: {FLASHMLA_PREFILL}", "vllm": f"peer: {VLLM_TRITON}",
        "bf16": "bf16 keys", "hopper": "bf16 keys, gluon",
    }  # fmt: skip
    prediction = OPT.predict(OPT.case(case), SOME.device)
    return [
        replace(
            SOME, case=case, variant=names.get(name, name), p20_us=us, p50_us=us, p80_us=us, flops=prediction.flops,
            bound_us=50.0,
        )
        for name, us in times.items()
    ]  # fmt: skip


MADE = [
    *recorded("flash-1", optimized=10.0, flashmla=20.0, vllm=40.0),
    *recorded("pro-64", optimized=10.0, flashmla=5.0, vllm=90.0),
    *recorded("heads-8-64", optimized=10.0, vllm=30.0),
    *recorded("flash-prompt", optimized=400.0, bf16=200.0, hopper=80.0, prefill=100.0, flashmla=300.0),
]


def test_means_are_of_a_groups_cases_that_a_peer_takes() -> None:
    rows = {(r["group"], r["ours"], r["peer"]): r for r in split_peers.peer_means(OPT, MADE)}
    assert list(rows) == [
        ("all heads", "optimized", FLASHMLA),
        ("all heads", "optimized", VLLM_TRITON),
        ("slices", "optimized", VLLM_TRITON),
        ("prompts", "bf16 keys", FLASHMLA),
        ("prompts", "bf16 keys, gluon", FLASHMLA),
        ("prompts", "optimized", FLASHMLA),
        ("prompts", "bf16 keys", FLASHMLA_PREFILL),
        ("prompts", "bf16 keys, gluon", FLASHMLA_PREFILL),
        ("prompts", "optimized", FLASHMLA_PREFILL),
    ]
    both = rows["all heads", "optimized", VLLM_TRITON]
    assert (both["cases"], both["from"], both["to"], both["aimed at"]) == (2, 4.0, 9.0, 5.0)
    assert both["peer / ours"] == pytest.approx(statistics.geometric_mean([4.0, 9.0])) == pytest.approx(6.0)
    assert rows["prompts", "bf16 keys", FLASHMLA_PREFILL]["peer / ours"] == pytest.approx(0.5)
    hopper = rows["prompts", "bf16 keys, gluon", FLASHMLA_PREFILL]
    assert hopper["peer / ours"] == pytest.approx(1.25)
    assert (hopper["aimed at"], hopper["target"]) == (0.5, 0.9)
    assert rows["prompts", "optimized", FLASHMLA_PREFILL]["aimed at"] is None


def test_a_decode_stands_beside_its_peers_and_a_gap_is_none() -> None:
    rows = {row["case"]: row for row in split_peers.peer_rows(OPT, MADE)}
    assert list(rows) == ["flash-1", "pro-64", "heads-8-64"]
    assert rows["pro-64"][f"{FLASHMLA} / plan"] == pytest.approx(0.5)
    assert rows["heads-8-64"][f"{FLASHMLA}, us"] is None
    assert rows["heads-8-64"][f"{VLLM_TRITON} / plan"] == pytest.approx(3.0)
    assert rows["heads-8-64"]["group"] == "slices"


def test_a_prompts_rows_say_rate_bound_and_ratio() -> None:
    rows = {row["variant"]: row for row in split_peers.prompt_rows(OPT, MADE)}
    assert list(rows) == [
        "optimized",
        "bf16 keys",
        "bf16 keys, gluon",
        f"peer: {FLASHMLA_PREFILL}",
        f"peer: {FLASHMLA}",
    ]
    keys = rows["bf16 keys"]
    assert keys["TFLOP/s"] == pytest.approx(4 * 4096 * 64 * 640 * 512 / 200e-6 / 1e12)
    assert keys["bound, %"] == pytest.approx(25.0)
    assert keys[f"{FLASHMLA_PREFILL} / this"] == pytest.approx(0.5)


def test_points_hold_flashmlas_prefill_over_every_variant_of_ours() -> None:
    made = [*recorded("pro-prompt", optimized=900.0, prefill=300.0), *MADE]
    rows = split_peers.point_rows(OPT, made)
    assert [(row["case"], row["heads"], row["keys"]) for row in rows] == [
        ("flash-prompt", 64, 640),
        ("pro-prompt", 128, 1152),
    ]
    assert (rows[0]["optimized"], rows[0]["bf16 keys"]) == (0.25, 0.5)
    assert rows[1]["optimized"] == pytest.approx(1 / 3)
    assert rows[1]["bf16 keys"] is None
    assert split_peers.point_rows(OPT, recorded("flash-prompt", optimized=1.0)) == []


def test_verdicts_say_reached_and_missed() -> None:
    made = [*recorded("flash-1", optimized=10.0, flashmla=6.0), *recorded("flash-prompt", bf16=100.0, prefill=40.0)]
    assert split_peers.verdicts(split_peers.peer_means(OPT, made)).splitlines() == [
        f"{SOME.device}, all heads, {FLASHMLA} / optimized 0.60; aimed at 0.45: reached; target 0.8: missed",
        f"{SOME.device}, prompts, {FLASHMLA_PREFILL} / bf16 keys 0.40; aimed at 0.5: missed; target 0.9: missed",
    ]
    assert split_peers.verdicts([]) == "no record stands beside a peer"


def test_goals_name_groups_variants_and_peers_that_exist() -> None:
    assert {group for group, _, _ in split_peers.GOALS} <= set(split_peers.GROUPS)
    assert split_peers.GOALS.keys() == split_peers.TARGETS.keys()
    assert all(split_peers.GOALS[key] <= split_peers.TARGETS[key] for key in split_peers.GOALS)
    cases = {split_peers.group_of(case.params) for case in OPT.cases.values() if case.measured}
    assert cases == set(split_peers.GROUPS)


def test_without_records_there_are_no_rows() -> None:
    assert split_peers.peer_rows(OPT, []) == []
    assert split_peers.prompt_rows(OPT, []) == []
    assert split_peers.peer_means(OPT, []) == []
