"""A prompt's chunk: which keys its rows list, that both ways to read them are the same, and what a case must allow."""

from __future__ import annotations

import pytest
import torch

from dsv4ref.evidence import compare
from dsv4ref.formats import kv_cache
from dsv4ref.kernels.sparse_mla.prefill import sparse_mla_prefill
from dsv4ref.optimizations import catalogue, prefill_inputs

OPT = catalogue.get("split_k_decode")
CASE = OPT.case("tiny-prompt")


def test_every_row_has_its_window_and_distinct_entries_that_exist(device: str) -> None:
    step, workspace = prefill_inputs.build(CASE, device, 3)
    p, first = CASE.params, CASE.params["tokens"] - CASE.params["rows"]
    lists = workspace.indices.cpu()
    before = p["rows"] + p["swa"] - 1  # rows of the workspace that are the window's
    for t in range(p["rows"]):
        assert lists[t, : p["swa"]].tolist() == list(range(t, t + p["swa"]))
        entries = (lists[t, p["swa"] :] - before).tolist()
        assert len(set(entries)) == p["extra"]
        assert min(entries) >= 0, t
        assert max(entries) < (first + t + 1) // 4, t
    assert int(lists.max()) < workspace.kv.shape[0] == prefill_inputs.distinct_keys(p)
    assert step.extra is not None
    assert [scope.width for scope in step.scopes] == [p["swa"], p["extra"]]


def test_the_caches_and_the_workspace_hold_the_same_keys(device: str) -> None:
    step, workspace = prefill_inputs.build(CASE, device, 3)
    rows = CASE.params["rows"]
    listed = torch.cat([scope.indices.view(rows, scope.width) for scope in step.scopes], dim=1)
    assert step.extra is not None
    for t in range(rows):
        parts = [
            kv_cache.gather(scope.cache, scope.indices[scope.indptr[t] : scope.indptr[t + 1]]) for scope in step.scopes
        ]
        found = compare.identical("keys", workspace.kv[workspace.indices[t].long()], torch.cat(parts))
        assert found.passed, f"row {t}: {found.detail}"
    assert not torch.equal(listed, workspace.indices), "pages lie in another order than positions"


def test_the_prefill_over_the_workspace_passes_the_chapters_gate(device: str) -> None:
    inputs = OPT.make_inputs(CASE, device, 5)
    assert inputs.workspace is not None
    out, lse = sparse_mla_prefill(
        inputs.step.q, inputs.workspace.kv, inputs.workspace.indices, sink=inputs.sink, scale=inputs.step.scale,
        return_lse=True,
    )  # fmt: skip
    assert lse is not None
    assert OPT.yardstick is not None
    verdict = OPT.gate.judge(
        {"out": out, "lse": lse}, baseline=OPT.baseline(inputs), reference=OPT.reference(inputs),
        yardstick=OPT.yardstick(inputs),
    )  # fmt: skip
    assert verdict.passed, verdict.detail


def test_a_prompt_is_timed_both_ways_and_wrong_keys_are_refused(device: str) -> None:
    inputs = OPT.make_inputs(CASE, device, 5)
    assert list(OPT.timed(inputs))[:3] == ["baseline", "optimized", "bf16 keys"]
    assert inputs.workspace is not None
    inputs.workspace.kv.copy_(inputs.workspace.kv.roll(1, 0))
    with pytest.raises(RuntimeError, match=r"peer: differs from our result by .* expected 0.03 of it"):
        OPT.timed(inputs)


def test_a_prompt_shares_its_keys_and_a_decode_does_not() -> None:
    params = OPT.case("flash-prompt").params
    shared = OPT.predict(OPT.case("flash-prompt"), "h200").least_bytes
    assert shared == (4096 + 127 + 65536) * 584 + 2 * 4096 * 64 * 512 * 2
    assert not prefill_inputs.is_prompt(OPT.case("flash-1024").params)
    assert prefill_inputs.distinct_keys(params) < params["rows"] * (params["swa"] + params["extra"])


@pytest.mark.parametrize("short", [{"tokens": 25}, {"tokens": 144}, {"rows": 0}])
def test_a_prompt_too_short_for_full_lists_is_refused(short: dict[str, int]) -> None:
    fields = {"tokens": 160, "rows": 3, "heads": 8, "swa": 24, "extra": 36} | short
    with pytest.raises(ValueError, match=r"tokens: got \d+, expected enough for 24 window keys and 36 of one entry"):
        prefill_inputs.prompt_case("short", **fields)
