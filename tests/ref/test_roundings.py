"""The numerics ledger: which values are rounded to bfloat16, which pass through a storage format, and which stay as is.

Every part once more, in float64, where the order of a sum decides no rounding: each rounding is written out, and the
reference must give the same bits. One rounding too many, too few or at another place shows; see the list on `Numerics`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import random_tokens, random_weights, tiny
from torch import Tensor

from dsv4ref.ref.attention import (
    attend_row_ref,
    attention_ref,
    keys_ref,
    kv_format_ref,
    output_ref,
    queries_ref,
    update_rows_ref,
)
from dsv4ref.ref.compressor import compress_ref, place_entries_ref
from dsv4ref.ref.experts import moe_ref, route_ref, routed_experts_ref, shared_expert_ref
from dsv4ref.ref.hyper_connections import collapse_ref, hc_post_ref, hc_pre_ref, hc_weights_ref
from dsv4ref.ref.indexer import hadamard_ref, index_head_weights_ref, index_queries_ref
from dsv4ref.ref.model import Model, block_ref, forward_ref, head_ref
from dsv4ref.ref.mtp import mtp_inputs_ref, mtp_ref
from dsv4ref.ref.numerics import DEEPSEEK, fp4_round_trip, fp8_round_trip
from dsv4ref.ref.rope import layer_frequencies, rotate_back_ref, rotate_ref
from dsv4ref.ref.state import PlainRows, empty_layer
from dsv4ref.ref.weights import Weights

CONFIG = tiny((4, 0), swiglu_limit=0.7)
EVERYTHING = replace(DEEPSEEK, dtype=torch.float64)
# FP8 rounds to bfloat16 on its way, and would hide that a linear's input was not: once with it, once without.
INPUTS = {
    "fp8": EVERYTHING,
    "bf16": replace(EVERYTHING, quantise_linear_inputs="none", quantise_expert_inputs="none"),
}
both_inputs = pytest.mark.parametrize("inputs", INPUTS)
C4_LAYER, SWA_LAYER = 0, 1
POSITIONS = torch.arange(9)
TENSORS = random_weights(CONFIG, 21)
MODEL = Model(CONFIG, TENSORS, EVERYTHING)
FREQS = layer_frequencies(CONFIG, C4_LAYER, EVERYTHING)


def bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).to(x.dtype)


def fp8(x: Tensor) -> Tensor:
    """What a linear with FP8 weights makes of its input."""
    return fp8_round_trip(x, 128)


def read(x: Tensor, inputs: str) -> Tensor:
    return fp8(x) if inputs == "fp8" else x


def weight(name: str) -> Tensor:
    return TENSORS[f"{name}.weight"].double()


def norm(x: Tensor, name: str | None = None) -> Tensor:
    scaled = x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
    return scaled if name is None else scaled * weight(name)


def part(name: str) -> Weights:
    return Weights(TENSORS, torch.float64, name)


@pytest.fixture
def x(rng: torch.Generator) -> Tensor:
    """Normed input of a layer: bfloat16 values."""
    return bf16(torch.randn((9, CONFIG.hidden_size), generator=rng, dtype=torch.float64))


def same_bits(got: Tensor, want: Tensor, what: str) -> None:
    assert got.dtype is want.dtype is torch.float64
    different = (got != want).nonzero()[:1].tolist()
    assert not different, (
        f"{what} at {different[0]}: {got[tuple(different[0])].item()}, expected {want[tuple(different[0])].item()}"
    )


@pytest.mark.parametrize("q_norm_bf16", [True, False])
def test_queries(q_norm_bf16: bool, x: Tensor) -> None:
    numerics = replace(EVERYTHING, q_norm_bf16=q_norm_bf16)
    q, qr = queries_ref(x, part("layers.0.attn"), POSITIONS, FREQS, CONFIG, numerics)
    want_qr = bf16(norm(bf16(fp8(x) @ weight("layers.0.attn.wq_a").T), "layers.0.attn.q_norm"))
    same_bits(qr, want_qr, "query latent")
    heads = bf16(fp8(want_qr) @ weight("layers.0.attn.wq_b").T).view(9, CONFIG.n_heads, CONFIG.head_dim)
    mean = bf16(bf16(heads.square()).mean(dim=-1, keepdim=True))
    by_steps = bf16(heads * bf16(torch.rsqrt(bf16(mean + 1e-6))))
    normed = by_steps if q_norm_bf16 else bf16(norm(heads))
    same_bits(q, bf16(rotate_ref(normed, POSITIONS, FREQS)), "queries")


def test_window_keys(x: Tensor) -> None:
    unstored = replace(EVERYTHING, quantise_kv="none")
    kv = bf16(norm(bf16(fp8(x) @ weight("layers.0.attn.wkv").T), "layers.0.attn.kv_norm"))
    want = bf16(rotate_ref(kv, POSITIONS, FREQS))
    same_bits(keys_ref(x, part("layers.0.attn"), POSITIONS, FREQS, CONFIG, unstored), want, "keys")
    stored = keys_ref(x, part("layers.0.attn"), POSITIONS, FREQS, CONFIG, EVERYTHING)
    same_bits(stored, kv_format_ref(want, CONFIG, EVERYTHING), "stored keys")
    same_bits(stored, torch.cat((fp8_round_trip(want[:, :64], 64), want[:, 64:]), dim=1), "stored keys")


@pytest.mark.parametrize("round_pooled", [True, False])
def test_compressed_entries_and_indexer_keys(round_pooled: bool, x: Tensor) -> None:
    """Pooling reads the input unquantised and rounds nothing; rounding starts at the pooled row, or after its norm."""
    numerics, attn = replace(EVERYTHING, round_pooled=round_pooled), part("layers.0.attn")
    start = empty_layer(CONFIG, 4, torch.float64)
    kv = torch.zeros(9, CONFIG.head_dim, dtype=torch.float64)
    state = update_rows_ref(x, kv, attn, 4, FREQS, start, CONFIG, numerics)
    for name, before, rows in (
        ("compressor", start.compressor, state.compressed),
        ("indexer.compressor", start.index_compressor, state.index_keys),
    ):
        assert before is not None
        assert isinstance(rows, PlainRows)
        pooled, _ = compress_ref(x, attn.at(name), before)
        normed = bf16(norm(bf16(pooled) if round_pooled else pooled, f"layers.0.attn.{name}.norm"))
        entries = bf16(rotate_ref(normed, torch.tensor([0, 4]), FREQS))
        placed = place_entries_ref(
            pooled, 0, 4, TENSORS[f"layers.0.attn.{name}.norm.weight"].double(), FREQS, 1e-6, numerics
        )
        same_bits(placed, entries, f"{name}, before storage")
        if name == "compressor":
            want = torch.cat((fp8_round_trip(entries[:, :64], 64), entries[:, 64:]), dim=1)
        else:
            want = fp4_round_trip(bf16(hadamard_ref(entries)))
        same_bits(rows.data, want, name)


def test_indexer_queries_and_head_weights(x: Tensor, rng: torch.Generator) -> None:
    """The head weights' product is rounded, the scale that multiplies it is not; their input is never FP8."""
    qr = bf16(torch.randn((9, CONFIG.q_lora_rank), generator=rng, dtype=torch.float64))
    indexer = part("layers.0.attn.indexer")
    heads = bf16(fp8(qr) @ weight("layers.0.attn.indexer.wq_b").T).view(9, 64, 128)
    queries = bf16(hadamard_ref(bf16(rotate_ref(heads, POSITIONS, FREQS))))
    # FP4 is so coarse that it would hide the roundings before it.
    for quantised, want in (("none", queries), ("fp4", fp4_round_trip(queries)), ("fp8", fp8(queries))):
        numerics = replace(EVERYTHING, quantise_index=quantised)  # type: ignore[arg-type]
        got = index_queries_ref(qr, indexer, POSITIONS, FREQS, CONFIG, numerics)
        same_bits(got, want, f"indexer queries, {quantised}")
    want = bf16(x @ weight("layers.0.attn.indexer.weights_proj").T) * CONFIG.index_scale
    same_bits(index_head_weights_ref(x, indexer, CONFIG, EVERYTHING), want, "head weights")


@both_inputs
def test_output_projection(inputs: str, rng: torch.Generator) -> None:
    """``wo_a`` reads bfloat16 although it is stored in FP8; ``wo_b`` reads FP8."""
    o = bf16(torch.randn((9, CONFIG.n_heads, CONFIG.head_dim), generator=rng, dtype=torch.float64))
    got = output_ref(o, part("layers.0.attn"), POSITIONS, FREQS, CONFIG, INPUTS[inputs])
    grouped = bf16(rotate_back_ref(o, POSITIONS, FREQS)).view(9, CONFIG.o_groups, -1)
    per_group = weight("layers.0.attn.wo_a").view(CONFIG.o_groups, CONFIG.o_lora_rank, -1)
    z = bf16(torch.einsum("tgd,grd->tgr", grouped, per_group)).flatten(1)
    same_bits(got, bf16(read(z, inputs) @ weight("layers.0.attn.wo_b").T), "attention output")


def test_attention_rounds_its_output_and_no_probability(x: Tensor) -> None:
    attn, freqs = part("layers.1.attn"), layer_frequencies(CONFIG, SWA_LAYER, EVERYTHING)
    state = empty_layer(CONFIG, 0, torch.float64)
    got, _ = attention_ref(x, attn, SWA_LAYER, POSITIONS, state, CONFIG, EVERYTHING)
    q, _ = queries_ref(x, attn, POSITIONS, freqs, CONFIG, EVERYTHING)
    kv = keys_ref(x, attn, POSITIONS, freqs, CONFIG, EVERYTHING)
    sink = TENSORS["layers.1.attn.attn_sink"].double()
    o = torch.stack([attend_row_ref(q[p], kv[: p + 1], sink, CONFIG.softmax_scale) for p in range(9)])
    same_bits(got, output_ref(bf16(o), attn, POSITIONS, freqs, CONFIG, EVERYTHING), "attention output")


@both_inputs
@pytest.mark.parametrize("before", [True, False])
def test_routed_experts(before: bool, inputs: str, x: Tensor) -> None:
    """Each matrix's product is rounded, the sum over experts is not."""
    ffn = part("layers.1.ffn")
    route, experts = route_ref(x, torch.zeros(9, dtype=torch.int64), ffn.at("gate"), False, CONFIG)
    numerics = replace(INPUTS[inputs], weight_before_w2=before)
    got = routed_experts_ref(x, route, experts, ffn.at("experts"), 0.7, numerics)
    want = torch.zeros_like(x)
    for t in range(9):
        for w, expert in sorted(zip(route[t].tolist(), experts[t].tolist(), strict=True), key=lambda pair: pair[1]):
            w1, w2, w3 = (weight(f"layers.1.ffn.experts.{expert}.w{i}") for i in (1, 2, 3))
            row = read(x[t], inputs)
            gate, up = bf16(w1 @ row).clamp(max=0.7), bf16(w3 @ row).clamp(-0.7, 0.7)
            hidden = torch.nn.functional.silu(gate) * up
            y = bf16(w2 @ read(bf16(hidden * w if before else hidden), inputs))
            want[t] += y if before else y * w
    same_bits(got, want, "routed sum")


@both_inputs
def test_shared_expert_and_the_sum_of_both(inputs: str, x: Tensor) -> None:
    numerics, ffn, name = INPUTS[inputs], part("layers.1.ffn"), "layers.1.ffn.shared_experts"
    gate, up = (bf16(read(x, inputs) @ weight(f"{name}.w{i}").T) for i in (1, 3))
    hidden = bf16(torch.nn.functional.silu(gate.clamp(max=0.7)) * up.clamp(-0.7, 0.7))
    shared = bf16(read(hidden, inputs) @ weight(f"{name}.w2").T)
    same_bits(shared_expert_ref(x, ffn.at("shared_experts"), 0.7, numerics), shared, "shared expert")
    ids = torch.zeros(9, dtype=torch.int64)
    route, experts = route_ref(x, ids, ffn.at("gate"), False, CONFIG)
    routed = routed_experts_ref(x, route, experts, ffn.at("experts"), 0.7, numerics)
    same_bits(moe_ref(x, ids, ffn, False, CONFIG, numerics), bf16(routed + shared), "routed and shared")


def test_hyper_connections(rng: torch.Generator) -> None:
    """Weights are never rounded; what a half-block reads, and the new streams, are rounded once."""
    streams = bf16(torch.randn((9, 4, CONFIG.hidden_size), generator=rng, dtype=torch.float64))
    result = bf16(torch.randn((9, CONFIG.hidden_size), generator=rng, dtype=torch.float64))
    fn, base, scale = (TENSORS[f"layers.0.hc_attn_{name}"].double() for name in ("fn", "base", "scale"))
    pre, post, mix = hc_weights_ref(streams, fn, base, scale, CONFIG)
    u, got_post, got_mix = hc_pre_ref(streams, part("layers.0"), "attn", CONFIG, EVERYTHING)
    same_bits(u, bf16((pre[..., None] * streams).sum(dim=1)), "what the half-block reads")
    same_bits(got_post, post, "post")
    same_bits(got_mix, mix, "C")
    written = torch.stack(
        [post[:, j, None] * result + (mix[:, :, j, None] * streams).sum(dim=1) for j in range(4)], dim=1
    )
    same_bits(hc_post_ref(result, streams, post, mix, EVERYTHING), bf16(written), "streams")
    unrounded = collapse_ref(streams, Weights(TENSORS, torch.float64), CONFIG, replace(EVERYTHING, round_bf16=False))
    same_bits(collapse_ref(streams, Weights(TENSORS, torch.float64), CONFIG, EVERYTHING), bf16(unrounded), "collapsed")


@both_inputs
def test_a_block_rounds_its_norms(inputs: str, rng: torch.Generator) -> None:
    numerics, model = INPUTS[inputs], replace(MODEL, numerics=INPUTS[inputs])
    streams = bf16(torch.randn((9, 4, CONFIG.hidden_size), generator=rng, dtype=torch.float64))
    ids, block = random_tokens(CONFIG, 9, 1), part("layers.1")
    got, _ = block_ref(streams, ids, POSITIONS, 1, model, empty_layer(CONFIG, 0, torch.float64))
    u, post, mix = hc_pre_ref(streams, block, "attn", CONFIG, numerics)
    state, normed = empty_layer(CONFIG, 0, torch.float64), bf16(norm(u, "layers.1.attn_norm"))
    result, _ = attention_ref(normed, block.at("attn"), 1, POSITIONS, state, CONFIG, numerics)
    between = hc_post_ref(result, streams, post, mix, numerics)
    u, post, mix = hc_pre_ref(between, block, "ffn", CONFIG, numerics)
    result = moe_ref(bf16(norm(u, "layers.1.ffn_norm")), ids, block.at("ffn"), False, CONFIG, numerics)
    same_bits(got, hc_post_ref(result, between, post, mix, numerics), "streams")


def test_embedding_and_head() -> None:
    """The embedding is stored in bfloat16; logits are not rounded."""
    tokens = random_tokens(CONFIG, 9, 2)
    output, _ = forward_ref(MODEL, tokens)
    streams = bf16(TENSORS["embed.weight"][tokens].double())[:, None].repeat(1, 4, 1)
    for layer in (0, 1):
        state = empty_layer(CONFIG, CONFIG.ratio(layer), torch.float64)
        streams, _ = block_ref(streams, tokens, POSITIONS, layer, MODEL, state)
    same_bits(output.streams, streams, "streams")
    collapsed = collapse_ref(streams, MODEL.weights, CONFIG, EVERYTHING)
    same_bits(output.logits, bf16(norm(collapsed, "norm")) @ weight("head").T, "logits")


@both_inputs
def test_mtp(inputs: str, rng: torch.Generator) -> None:
    model = replace(MODEL, numerics=INPUTS[inputs])
    streams = bf16(torch.randn((9, 4, CONFIG.hidden_size), generator=rng, dtype=torch.float64))
    tokens = random_tokens(CONFIG, 9, 3)
    embedded = bf16(TENSORS["embed.weight"][tokens].double())
    masked = torch.cat((torch.zeros_like(embedded[:1]), embedded[1:]))
    e = bf16(read(bf16(norm(masked, "mtp.0.enorm")), inputs) @ weight("mtp.0.e_proj").T)
    h = bf16(read(bf16(norm(streams, "mtp.0.hnorm")), inputs) @ weight("mtp.0.h_proj").T)
    joined = mtp_inputs_ref(streams, embedded, POSITIONS, model, CONFIG.n_layers)
    same_bits(joined, bf16(e[:, None] + h), "joined streams")
    output, _ = mtp_ref(model, tokens, streams)
    result, _ = block_ref(joined, tokens, POSITIONS, 2, model, empty_layer(CONFIG, 0, torch.float64))
    same_bits(output.streams, result, "streams")
    same_bits(output.logits, head_ref(result, part("mtp.0"), model), "logits")
