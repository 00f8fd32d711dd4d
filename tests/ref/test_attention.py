"""One attention layer: the formula by loops, who sees whom, what is selected, what is stored."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tiny_models import assert_close, random_weights, tiny
from torch import Tensor

from dsv4ref.config import V4_FLASH, ModelConfig
from dsv4ref.formats import Dialect, kv_cache
from dsv4ref.ref.attention import (
    attend_row_ref,
    attention_ref,
    keys_ref,
    kv_format_ref,
    output_ref,
    queries_ref,
    select_entries_ref,
    update_rows_ref,
)
from dsv4ref.ref.numerics import STRUCTURE, Numerics
from dsv4ref.ref.rope import layer_frequencies, rotate_back_ref
from dsv4ref.ref.state import LayerState, empty_layer
from dsv4ref.ref.weights import Weights

CONFIG = tiny((0, 4, 128), n_hash_layers=0)
SWA_LAYER, C4_LAYER, C128_LAYER = 0, 1, 2
BOUNDARIES = [0, 2, 3, 4, 5, 31, 35, 36, 126, 127, 128, 129, 131, 132, 254, 255, 256, 257]


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return random_weights(CONFIG, 3)


def part(tensors: dict[str, Tensor], layer: int) -> Weights:
    return Weights(tensors, torch.float32, f"layers.{layer}.attn")


def inputs(count: int, seed: int = 0) -> Tensor:
    return torch.randn((count, CONFIG.hidden_size), generator=torch.Generator().manual_seed(seed))


def run(
    x: Tensor, tensors: dict[str, Tensor], layer: int, state: LayerState | None = None, first: int = 0
) -> tuple[Tensor, LayerState]:
    state = empty_layer(CONFIG, CONFIG.ratio(layer)) if state is None else state
    positions = first + torch.arange(x.shape[0])
    return attention_ref(x, part(tensors, layer), layer, positions, state, CONFIG, STRUCTURE)


def test_softmax_with_a_sink_by_loops(rng: torch.Generator) -> None:
    q, kv = (torch.randn(shape, generator=rng, dtype=torch.float64) * 2 for shape in ((3, 8), (5, 8)))
    sink = torch.tensor([0.3, -2.0, 4.0], dtype=torch.float64)
    got = attend_row_ref(q, kv, sink, 0.35)
    for h in range(3):
        scores = [0.35 * math.fsum(a * b for a, b in zip(q[h].tolist(), k, strict=True)) for k in kv.tolist()]
        total = math.fsum(math.exp(s) for s in scores) + math.exp(sink[h].item())
        want = torch.stack([math.exp(s) / total * kv[k] for k, s in enumerate(scores)]).sum(dim=0)
        assert_close(got[h], want, 1e-13, f"head {h}")


def test_sinks_at_the_ends(rng: torch.Generator) -> None:
    q, kv = torch.randn((2, 8), generator=rng), torch.randn((5, 8), generator=rng)
    got = attend_row_ref(q, kv, torch.tensor([-math.inf, math.inf]), 0.5)
    assert_close(got[0], torch.softmax(q[0] @ kv.T * 0.5, dim=0) @ kv, 1e-6)
    assert torch.count_nonzero(got[1]) == 0


def test_the_order_of_keys_does_not_matter_and_their_number_does(rng: torch.Generator) -> None:
    """A set with multiplicity: a token may count twice, raw in the window and inside an entry."""
    q, kv = (torch.randn(shape, generator=rng, dtype=torch.float64) for shape in ((3, 8), (20, 8)))
    sink, order = torch.randn(3, generator=rng, dtype=torch.float64), torch.randperm(20, generator=rng)
    want = attend_row_ref(q, kv, sink, 0.35)
    assert_close(attend_row_ref(q, kv[order], sink, 0.35), want, 1e-14)
    assert (attend_row_ref(q, torch.cat((kv, kv[:1])), sink, 0.35) - want).abs().max() > 1e-3


@pytest.mark.parametrize("token", [0, 1, 100, 128])
def test_a_window_holds_the_last_128_positions(token: int, tensors: dict[str, Tensor]) -> None:
    """A token reaches its own query and the 127 after it; bitwise nothing else."""
    x = inputs(270)
    want, _ = run(x, tensors, SWA_LAYER)
    x[token] += 1
    got, _ = run(x, tensors, SWA_LAYER)
    changed = [p for p in range(270) if not torch.equal(got[p], want[p])]
    assert changed == list(range(token, min(token + 128, 270)))


@pytest.mark.parametrize("token", [0, 3, 127, 128, 140])
def test_on_c128_every_token_reaches_all_later_queries(token: int, tensors: dict[str, Tensor]) -> None:
    """Through the window until its group closes, through the entry from then on: no gap, and no leak backwards."""
    x = inputs(300)
    want, _ = run(x, tensors, C128_LAYER)
    x[token] += 1
    got, _ = run(x, tensors, C128_LAYER)
    changed = [p for p in range(300) if not torch.equal(got[p], want[p])]
    reached_by_window, closes = token + 127, (token // 128 + 1) * 128 - 1
    assert closes <= reached_by_window
    last = 299 if closes < 300 else reached_by_window
    assert changed == list(range(token, last + 1))


def selections(tensors: dict[str, Tensor], layer: int, config: ModelConfig = CONFIG, count: int = 270) -> list[Tensor]:
    x, weights, ratio = inputs(count), part(tensors, layer), config.ratio(layer)
    positions, freqs = torch.arange(count), layer_frequencies(config, layer, STRUCTURE)
    _, qr = queries_ref(x, weights, positions, freqs, config, STRUCTURE)
    kv = keys_ref(x, weights, positions, freqs, config, STRUCTURE)
    state = update_rows_ref(x, kv, weights, ratio, freqs, empty_layer(config, ratio), config, STRUCTURE)
    return select_entries_ref(x, qr, weights, ratio, positions, freqs, state, config, STRUCTURE)


@pytest.mark.parametrize(("layer", "ratio"), [(SWA_LAYER, 0), (C4_LAYER, 4), (C128_LAYER, 128)])
def test_no_entry_is_selected_before_its_last_token(layer: int, ratio: int, tensors: dict[str, Tensor]) -> None:
    """As many as there are, up to the top-k on C4, all below (p + 1) // r, none twice."""
    for p, selected in enumerate(selections(tensors, layer)):
        visible = (p + 1) // ratio if ratio else 0
        wanted = min(visible, CONFIG.index_topk) if ratio == 4 else visible
        assert selected.dtype is torch.int64
        assert len(set(selected.tolist())) == selected.shape[0] == wanted, p
        if wanted:
            assert int(selected.min()) >= 0
            assert int(selected.max()) < visible, p


def test_the_closing_token_may_select_its_own_entry(tensors: dict[str, Tensor]) -> None:
    chosen = selections(tensors, C4_LAYER)
    closing = [p for p in BOUNDARIES if (p + 1) % 4 == 0 and p < 4 * CONFIG.index_topk]
    for p in closing:
        assert p // 4 in chosen[p].tolist(), p
        assert p // 4 not in chosen[p - 1].tolist(), p


def test_c4_selects_by_score(tensors: dict[str, Tensor]) -> None:
    """The selection binds, depends on the query, and is not simply the most recent entries."""
    chosen = selections(tensors, C4_LAYER)
    recent = [list(range((p + 1) // 4 - 8, (p + 1) // 4)) for p in range(200, 270)]
    assert any(sorted(chosen[p].tolist()) != recent[p - 200] for p in range(200, 270))
    assert len({tuple(sorted(chosen[p].tolist())) for p in range(200, 204)}) > 1


@pytest.mark.parametrize("layer", [SWA_LAYER, C4_LAYER, C128_LAYER])
@pytest.mark.parametrize("split", [1, 2, 3, 4, 127, 128, 129])
def test_the_state_carries_everything(layer: int, split: int, tensors: dict[str, Tensor]) -> None:
    x = inputs(261)
    want, _ = run(x, tensors, layer)
    first, state = run(x[:split], tensors, layer)
    second, state = run(x[split:259], tensors, layer, state, split)
    third, state = run(x[259:], tensors, layer, state, 259)
    assert_close(torch.cat((first, second, third)), want, 1e-5, "output [position, channel]")
    assert (state.window.first, state.window.end) == (261 - 128, 261)
    assert state.compressed is None or state.compressed.end == 261 // CONFIG.ratio(layer)


def test_query_heads_are_normed_over_all_dimensions(tensors: dict[str, Tensor]) -> None:
    """Rotation keeps lengths, so that every query head ends with a mean square of 1."""
    freqs = layer_frequencies(CONFIG, C4_LAYER, STRUCTURE)
    q, qr = queries_ref(inputs(9), part(tensors, C4_LAYER), torch.arange(9), freqs, CONFIG, STRUCTURE)
    assert q.shape == (9, CONFIG.n_heads, CONFIG.head_dim)
    assert_close(q.square().mean(dim=-1), torch.ones(9, CONFIG.n_heads), 1e-4)
    latent = inputs(9) @ tensors["layers.1.attn.wq_a.weight"].T
    rms = latent.square().mean(dim=-1, keepdim=True).sqrt()
    assert_close(qr, latent / rms * tensors["layers.1.attn.q_norm.weight"], 1e-4)


def test_keys_are_normed_then_rotated(tensors: dict[str, Tensor]) -> None:
    freqs, positions = layer_frequencies(CONFIG, C4_LAYER, STRUCTURE), torch.arange(3, 12)
    kv = keys_ref(inputs(9), part(tensors, C4_LAYER), positions, freqs, CONFIG, STRUCTURE)
    latent = inputs(9) @ tensors["layers.1.attn.wkv.weight"].T
    rms = (latent.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
    assert_close(rotate_back_ref(kv, positions, freqs), latent / rms * tensors["layers.1.attn.kv_norm.weight"], 1e-5)
    assert (rotate_back_ref(kv, positions, freqs) - kv).abs().max() > 0.1


def test_groups_of_heads_are_projected_apart(tensors: dict[str, Tensor], rng: torch.Generator) -> None:
    """Head h feeds rows of its own group only, at its own columns, after being rotated back."""
    o = torch.randn((3, CONFIG.n_heads, CONFIG.head_dim), generator=rng)
    positions, freqs = torch.tensor([7, 8, 9]), layer_frequencies(CONFIG, SWA_LAYER, STRUCTURE)
    got = output_ref(o, part(tensors, SWA_LAYER), positions, freqs, CONFIG, STRUCTURE)
    wo_a, wo_b = (tensors[f"layers.0.attn.{name}.weight"] for name in ("wo_a", "wo_b"))
    rotated, rank, per = rotate_back_ref(o, positions, freqs), CONFIG.o_lora_rank, CONFIG.heads_per_group
    z = torch.zeros(3, CONFIG.o_groups * rank)
    for h in range(CONFIG.n_heads):
        group, column = h // per, h % per * CONFIG.head_dim
        rows = slice(group * rank, (group + 1) * rank)
        z[:, rows] += rotated[:, h] @ wo_a[rows, column : column + CONFIG.head_dim].T
    assert_close(got, z @ wo_b.T, 1e-4)


def test_stored_keys_are_what_the_584_byte_cache_holds(rng: torch.Generator) -> None:
    """The simulated format is the real one, in both dialects, which hold the same values."""
    # Blocks of very different size: within a few binades, a block that is too wide would round the same.
    size = torch.exp(4 * torch.randn((20, 8), generator=rng)).repeat_interleave(64, dim=1)
    kv = torch.randn((20, 512), generator=rng) * size
    kv[3] = 0
    results = []
    for dialect in Dialect:
        got = kv_format_ref(kv, V4_FLASH, Numerics(kv_dialect=dialect))
        want = kv_cache.dequantise(*kv_cache.quantise(kv, dialect), dialect, torch.float32)
        assert torch.equal(got, want)
        assert torch.equal(kv_format_ref(got, V4_FLASH, Numerics(kv_dialect=dialect)), got), "idempotent"
        results.append(got)
    assert torch.equal(*results)
    assert not torch.equal(results[0][:, :448], kv.to(torch.bfloat16)[:, :448].float())
    assert torch.equal(results[0][:, 448:], kv[:, 448:].to(torch.bfloat16).float())
    assert kv_format_ref(kv, V4_FLASH, replace(Numerics(), quantise_kv="none")) is kv
