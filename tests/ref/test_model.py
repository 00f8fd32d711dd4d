"""The whole model: causality to the bit, any cut of a sequence, switches, bad input, MTP.

Whether it computes the right thing is checked against transformers, in test_model_vs_transformers.
"""

from __future__ import annotations

import functools
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from tiny_models import assert_close, random_tokens, random_weights, tiny
from torch import Tensor

from dsv4ref.config import ModelConfig
from dsv4ref.formats import Dialect
from dsv4ref.ref.model import Model, forward_ref
from dsv4ref.ref.mtp import MtpState, mtp_inputs_ref, mtp_ref, new_mtp_sequence
from dsv4ref.ref.numerics import DEEPSEEK, DEFAULT, STRUCTURE, Numerics
from dsv4ref.ref.state import State, empty_layer

CONFIG = tiny((0, 4, 128), original_seq_len=256, swiglu_limit=0.7)
COUNT = 262
CLOSE = 1e-5
"""Of logits of order 1, computed in fp32 with products of other shapes."""


@functools.cache
def model(numerics: Numerics = STRUCTURE) -> Model:
    return Model(CONFIG, random_weights(CONFIG, 11), numerics)


@functools.cache
def tokens() -> Tensor:
    return random_tokens(CONFIG, COUNT, 11)


@functools.cache
def prefill(numerics: Numerics = STRUCTURE) -> Tensor:
    return forward_ref(model(numerics), tokens())[0].logits


def in_chunks(sizes: list[int], numerics: Numerics = STRUCTURE) -> tuple[Tensor, State]:
    state, logits = model(numerics).new_sequence(), []
    for chunk in tokens()[: sum(sizes)].split(sizes):
        output, state = forward_ref(model(numerics), chunk, state)
        logits.append(output.logits)
    return torch.cat(logits), state


@pytest.mark.parametrize("numerics", [STRUCTURE, Numerics()], ids=["structure", "deepseek"])
@pytest.mark.parametrize("p", [0, 2, 3, 4, 30, 34, 35, 36, 126, 127, 128, 131, 254, 255, 256])
def test_the_past_does_not_depend_on_the_future(p: int, numerics: Numerics) -> None:
    """Other tokens after p: logits up to p are the same bits, and the next ones are not."""
    other = tokens().clone()
    other[p + 1 :] = (other[p + 1 :] + 1 + torch.arange(COUNT - p - 1) % 7) % CONFIG.vocab_size
    got, want = forward_ref(model(numerics), other)[0].logits, prefill(numerics)
    changed = (got != want).any(dim=1).nonzero().flatten()
    assert int(changed[0]) == p + 1, f"first changed position {int(changed[0])}, expected {p + 1}"


@pytest.mark.parametrize("first", [*range(1, 9), 126, 127, 128, 129, 130, 131, 255, 256, 257])
def test_decode_at_p_is_prefill_at_p(first: int) -> None:
    """A prompt of every remainder of 4 and many of 128, then tokens one by one until the next groups have closed."""
    logits, state = in_chunks([first] + [1] * min(9, COUNT - first))
    assert_close(logits, prefill()[: state.position], CLOSE, f"prompt of {first}: logits [position, token]")


@pytest.mark.parametrize(
    "sizes",
    [[64, 64, 64, 64], [127, 1, 127, 1], [128, 128], [129, 3, 2, 126], [5, 2, 3, 4, 6, 7, 100, 100], [2] * 131],
    ids=lambda sizes: "-".join(map(str, sizes[:5])),
)
def test_chunks_are_one_prefill(sizes: list[int]) -> None:
    """Chunked prefill, and decoding several tokens at a time."""
    logits, state = in_chunks(sizes)
    assert_close(logits, prefill()[: state.position], CLOSE, "logits [position, token]")


def test_with_formats_switched_on_cuts_agree_until_a_rounding_flips() -> None:
    """bf16 rounding turns the last bit of a sum into 2^-9 of it; here the mean over all logits stays small."""
    logits, _ = in_chunks([100, 1, 1, 60, 1, 1, 98], Numerics())
    difference = (logits - prefill(Numerics())).abs()
    assert difference.mean() < 0.02 * prefill(Numerics()).std()


def test_requests_do_not_see_each_other() -> None:
    """The same prompt before and after another request, ending inside a C4 group: equal bits, short prompts too."""
    for length in (2, 3, 6):
        fresh, _ = forward_ref(model(), tokens()[:length])
        _, state = forward_ref(model(), tokens()[20:29])
        forward_ref(model(), tokens()[29:33], state)
        again, state = forward_ref(model(), tokens()[:length])
        assert torch.equal(again.logits, fresh.logits)
        following, _ = forward_ref(model(), tokens()[length : length + 6], state)
        assert_close(following.logits, prefill()[length : length + 6], CLOSE)


def test_a_state_can_be_continued_twice() -> None:
    _, state = forward_ref(model(), tokens()[:130])
    first, _ = forward_ref(model(), tokens()[130:135], state)
    forward_ref(model(), tokens()[:7], state)
    again, _ = forward_ref(model(), tokens()[130:135], state)
    assert torch.equal(first.logits, again.logits)


def test_the_topk_drops_entries_from_the_context_where_the_configuration_says() -> None:
    everything = Model(replace(CONFIG, index_topk=10**6), model().tensors, STRUCTURE)
    want = forward_ref(everything, tokens())[0].logits
    changed = (prefill() != want).any(dim=1).nonzero().flatten()
    assert int(changed[0]) == CONFIG.first_dropping_context - 1


def test_float64_agrees() -> None:
    """What fp32 loses, on the structure: the scale of all other tolerances here."""
    exact = prefill(replace(STRUCTURE, dtype=torch.float64))
    assert exact.dtype is torch.float64
    assert_close(prefill(), exact, CLOSE)


@pytest.mark.parametrize(
    ("base", "change"),
    [
        (STRUCTURE, {"round_bf16": True}),
        (STRUCTURE, {"quantise_kv": "fp8"}),
        (STRUCTURE, {"quantise_index": "fp4"}),
        (STRUCTURE, {"quantise_index": "fp8"}),
        (STRUCTURE, {"quantise_linear_inputs": "fp8"}),
        (STRUCTURE, {"quantise_expert_inputs": "fp8"}),
        (STRUCTURE, {"clamp_shared": False}),
        (STRUCTURE, {"yarn_on_swa": True}),
        (STRUCTURE, {"q_norm_bf16": True}),
        (STRUCTURE, {"round_pooled": True}),
        (Numerics(), {"weight_before_w2": False}),
        (Numerics(), {"hadamard": False}),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_every_switch_does_something_and_none_breaks_the_model(base: Numerics, change: dict[str, Any]) -> None:
    got, want = prefill(replace(base, **change)), prefill(base)
    assert torch.isfinite(got).all()
    assert (got - want).abs().max() > 100 * CLOSE
    # Unrelated logits would correlate at 0; the shared clamp, at a limit that half of the values reach, costs most.
    assert torch.corrcoef(torch.stack((got.flatten(), want.flatten())))[0, 1] > 0.4


def test_switches_that_must_not_change_anything() -> None:
    """Both dialects hold the same values; a rotation of both sides of the indexer is none, without quantisation."""
    assert torch.equal(prefill(Numerics(kv_dialect=Dialect.FNUZ)), prefill(Numerics()))
    assert_close(prefill(replace(STRUCTURE, hadamard=True)), prefill(), CLOSE)
    assert_close(prefill(replace(STRUCTURE, weight_before_w2=True)), prefill(), CLOSE)


def test_the_defaults_are_deepseeks_choices_but_for_four() -> None:
    assert Model(CONFIG, model().tensors).numerics == DEFAULT == Numerics()
    assert (DEFAULT.quantise_kv, DEFAULT.quantise_index, DEFAULT.hadamard) == ("fp8", "fp4", True)
    assert (DEFAULT.clamp_shared, DEFAULT.weight_before_w2, DEFAULT.yarn_on_swa) == (True, True, False)
    differ = {item.name for item in fields(Numerics) if getattr(DEEPSEEK, item.name) != getattr(DEFAULT, item.name)}
    assert differ == {"quantise_linear_inputs", "quantise_expert_inputs", "q_norm_bf16", "round_pooled"}


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([3, 96]), "token_ids: got 96, expected 0 to 95"),
        (torch.tensor([-1, 3]), "token_ids: got -1, expected 0 to 95"),
        (torch.zeros(0, dtype=torch.int64), r"token_ids: got torch.int64 \(0,\), expected integers \[T\]"),
        (torch.zeros(1, 4, dtype=torch.int64), r"token_ids: got torch.int64 \(1, 4\)"),
        (torch.zeros(3), r"token_ids: got torch.float32 \(3,\)"),
    ],
)
def test_bad_tokens_are_refused(ids: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        forward_ref(model(), ids)


def test_tokens_in_a_list_are_refused() -> None:
    with pytest.raises(TypeError, match=r"token_ids: got list, expected a torch.Tensor of integers \[T\]"):
        forward_ref(model(), [1, 2])  # type: ignore[arg-type]


def test_positions_end_where_the_model_does() -> None:
    short = Model(replace(CONFIG, max_position=6), model().tensors, STRUCTURE)
    _, state = forward_ref(short, tokens()[:5])
    with pytest.raises(ValueError, match="got 2 tokens from position 5, expected at most 1: test has 6 positions"):
        forward_ref(short, tokens()[5:7], state)
    output, state = forward_ref(short, tokens()[5:6], state)
    assert_close(output.logits, prefill()[5:6], CLOSE)
    with pytest.raises(ValueError, match="expected at most 0"):
        forward_ref(short, tokens()[6:7], state)


def test_a_state_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="state: got 2 layers, expected 3 for test"):
        forward_ref(model(), tokens()[:2], State(0, model().new_sequence().layers[:2]))
    shuffled = State(0, model().new_sequence().layers[::-1])
    with pytest.raises(ValueError, match="state: layer 0 is made for ratio 128, expected 0"):
        forward_ref(model(), tokens()[:2], shuffled)


@pytest.mark.parametrize(
    ("layer", "part", "message"),
    [
        (0, "window", "layer 0's window holds rows 2 to 129, expected 5 to 131 at position 132"),
        (1, "compressed", "layer 1's compressed cache holds 32 entries, expected 33 at position 132"),
        (1, "index_keys", "layer 1's index_keys cache holds 32 entries, expected 33"),
        (2, "compressor", "layer 2's compressor has taken in 130 tokens, expected 132"),
    ],
)
def test_a_state_put_together_from_two_moments_is_refused(layer: int, part: str, message: str) -> None:
    """One cache of an earlier moment, or a position that no cache belongs to."""
    _, before = in_chunks([130])
    _, state = in_chunks([130, 2])
    layers = list(state.layers)
    layers[layer] = replace(layers[layer], **{part: getattr(before.layers[layer], part)})
    with pytest.raises(ValueError, match=message):
        forward_ref(model(), tokens()[132:134], State(132, tuple(layers)))
    with pytest.raises(ValueError, match="layer 0's window holds rows 4 to 131, expected 0 to 29 at position 30"):
        forward_ref(model(), tokens()[132:134], replace(state, position=30))


def test_a_window_that_has_forgotten_too_much_is_refused() -> None:
    _, state = in_chunks([132])
    layers = (replace(state.layers[0], window=state.layers[0].window.forget(6)), *state.layers[1:])
    with pytest.raises(ValueError, match="layer 0's window holds rows 6 to 131, expected 5 to 131 at position 132"):
        forward_ref(model(), tokens()[132:134], State(132, layers))


def test_wrong_weights_are_refused_when_the_model_is_made() -> None:
    with pytest.raises(ValueError, match=r"'norm.weight' is torch.float32 \[3\], expected \[128\]"):
        Model(CONFIG, model().tensors | {"norm.weight": torch.ones(3)})  # type: ignore[operator]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("quantise_kv", "fp4"),
        ("quantise_index", "int8"),
        ("dtype", torch.bfloat16),
        ("hadamard", 1),
        ("kv_dialect", "x"),
    ],
)
def test_unknown_numerics_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field}: got"):
        Numerics(**{field: value})  # type: ignore[arg-type]


# --- MTP -----------------------------------------------------------------------------------------------------------


def streams_of(count: int) -> Tensor:
    return forward_ref(model(), tokens()[:count])[0].streams


def test_mtp_inputs_join_the_next_token_with_every_stream() -> None:
    streams, config, tensors = streams_of(4), CONFIG, model().tensors
    embedded = tensors["embed.weight"][tokens()[1:5]]
    got = mtp_inputs_ref(streams, embedded, torch.arange(4), model(), config.n_layers)

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * tensors[f"mtp.0.{name}.weight"]

    e = norm(embedded, "enorm") @ tensors["mtp.0.e_proj.weight"].T
    e[0] = 0  # position 0 sees no token
    for i in range(4):
        h = norm(streams[:, i], "hnorm") @ tensors["mtp.0.h_proj.weight"].T
        assert_close(got[:, i], e + h, 1e-5, f"stream {i}")
    unmasked = Model(config, tensors, replace(STRUCTURE, mask_mtp_position_0=False))
    free = mtp_inputs_ref(streams, embedded, torch.arange(4), unmasked, config.n_layers)
    assert torch.equal(free[1:], got[1:])
    assert (free[0] - got[0]).abs().max() > 0.1


def test_mtp_position_by_position_is_mtp_at_once() -> None:
    streams = streams_of(140)
    want, _ = mtp_ref(model(), tokens()[1:141], streams)
    assert want.logits.shape == (140, CONFIG.vocab_size)
    assert want.streams.shape == streams.shape
    state, logits = new_mtp_sequence(model()), []
    for first, last in [(0, 126), *((p, p + 1) for p in range(126, 132)), (132, 140)]:
        output, state = mtp_ref(model(), tokens()[first + 1 : last + 1], streams[first:last], state)
        logits.append(output.logits)
    assert state.position == 140
    assert_close(torch.cat(logits), want.logits, CLOSE, "logits [position, token]")


def test_mtp_guesses_depend_on_the_next_token_and_on_nothing_later() -> None:
    streams, following = streams_of(12), tokens()[1:13].clone()
    want, _ = mtp_ref(model(), following, streams)
    following[7] = (following[7] + 1) % CONFIG.vocab_size
    got, _ = mtp_ref(model(), following, streams)
    changed = (got.logits != want.logits).any(dim=1).nonzero().flatten().tolist()
    assert changed == list(range(7, 12))


def test_mtp_bad_input_is_refused() -> None:
    streams = streams_of(3)
    with pytest.raises(ValueError, match="block: got 1, expected 0 to 0 for test"):
        mtp_ref(model(), tokens()[:3], streams, block=1)
    with pytest.raises(ValueError, match=r"streams: got shape \(2, 4, 128\), expected \(3, 4, 128\)"):
        mtp_ref(model(), tokens()[:3], streams[:2])
    with pytest.raises(ValueError, match="next_token_ids: got 96, expected 0 to 95"):
        mtp_ref(model(), torch.tensor([96, 0, 0]), streams)
    with pytest.raises(ValueError, match="state: is made for ratio 4, expected 0"):
        mtp_ref(model(), tokens()[:3], streams, MtpState(0, empty_layer(CONFIG, 4)))
    with pytest.raises(ValueError, match="layer 0's window holds rows 0 to -1, expected 0 to 4 at position 5"):
        mtp_ref(model(), tokens()[:3], streams, MtpState(5, empty_layer(CONFIG, 0)))


def test_a_model_without_mtp_needs_no_mtp_weights() -> None:
    config: ModelConfig = replace(CONFIG, n_mtp_layers=0, compress_ratios=CONFIG.main_ratios)
    tensors = {name: tensor for name, tensor in model().tensors.items() if not name.startswith("mtp.")}
    output, _ = forward_ref(Model(config, tensors, STRUCTURE), tokens()[:20])
    assert_close(output.logits, prefill()[:20], CLOSE)
