"""The compressor by loops, entry by entry, and its state over every way to cut a sequence."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tiny_models import assert_close
from torch import Tensor

from dsv4ref.ref.compressor import CompressorState, compress_ref, empty_state, place_entries_ref
from dsv4ref.ref.numerics import STRUCTURE
from dsv4ref.ref.rope import frequencies, rotate_ref
from dsv4ref.ref.weights import Weights

WIDTH, DIM = 12, 5


def parameters(rng: torch.Generator, ratio: int, channels: int, dim: int = DIM) -> dict[str, Tensor]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    return {
        "ape": normal(ratio, channels),
        "wkv.weight": normal(channels, WIDTH),
        "wgate.weight": normal(channels, WIDTH),
        "norm.weight": normal(dim),
    }


def tokens(rng: torch.Generator, count: int) -> Tensor:
    return torch.randn((count, WIDTH), generator=rng, dtype=torch.float64)


def run(x: Tensor, tensors: dict[str, Tensor], state: CompressorState) -> tuple[Tensor, CompressorState]:
    return compress_ref(x, Weights(tensors, torch.float64), state)


def start(ratio: int, overlap: bool) -> CompressorState:
    return empty_state(ratio, DIM, overlap, torch.float64)


def by_loops(x: Tensor, tensors: dict[str, Tensor], ratio: int, overlap: bool) -> list[list[float]]:
    """The entries of a whole sequence, number by number."""
    wkv, wgate, ape = (tensors[name].tolist() for name in ("wkv.weight", "wgate.weight", "ape"))

    def project(matrix: list[list[float]], p: int, channel: int) -> float:
        return math.fsum(a * b for a, b in zip(matrix[channel], x[p].tolist(), strict=True))

    entries = []
    for j in range(x.shape[0] // ratio):
        entry = []
        for c in range(DIM):
            rows = [(p, c + DIM if overlap else c) for p in range(ratio * j, ratio * j + ratio)]
            if overlap and j:
                rows += [(p, c) for p in range(ratio * j - ratio, ratio * j)]
            gates = [math.exp(project(wgate, p, channel) + ape[p % ratio][channel]) for p, channel in rows]
            values = [project(wkv, p, channel) for p, channel in rows]
            entry.append(math.fsum(g * v for g, v in zip(gates, values, strict=True)) / math.fsum(gates))
        entries.append(entry)
    return entries


@pytest.mark.parametrize(("ratio", "overlap", "count"), [(4, True, 14), (4, True, 3), (128, False, 260), (3, False, 8)])
def test_entries_by_loops(ratio: int, overlap: bool, count: int, rng: torch.Generator) -> None:
    tensors, x = parameters(rng, ratio, DIM * (1 + overlap)), tokens(rng, count)
    pooled, state = run(x, tensors, start(ratio, overlap))
    want = by_loops(x, tensors, ratio, overlap)
    assert_close(pooled, torch.tensor(want, dtype=torch.float64).view(-1, DIM), 1e-12, "entry [j, channel]")
    assert state.entries == count // ratio
    assert state.kv.shape[0] == state.score.shape[0] == count % ratio


def sequences_of_calls(count: int) -> list[list[int]]:
    return [[1] * count, [count - 1, 1], [1, count - 1], *([n, count - n] for n in range(2, min(12, count - 1)))]


@pytest.mark.parametrize(("ratio", "overlap", "count"), [(4, True, 19), (128, False, 259)])
def test_any_cut_gives_the_same_entries_and_state(ratio: int, overlap: bool, count: int, rng: torch.Generator) -> None:
    tensors, x = parameters(rng, ratio, DIM * (1 + overlap)), tokens(rng, count)
    want, want_state = run(x, tensors, start(ratio, overlap))
    cuts = sequences_of_calls(count)
    if ratio == 128:
        cuts += [[126, 133], [127, 132], [128, 131], [129, 130], [255, 4], [256, 3], [5, 123, 128, 3]]
    for cut in cuts:
        state, pooled = start(ratio, overlap), []
        for part in x.split(cut):
            entries, state = run(part, tensors, state)
            pooled.append(entries)
        assert_close(torch.cat(pooled), want, 1e-12, f"cut {cut[:4]}: entry [j, channel]")
        for name in ("kv", "score", "previous_kv", "previous_score"):
            assert_close(getattr(state, name), getattr(want_state, name), 1e-12, f"cut {cut[:4]}: {name}")
        assert state.entries == want_state.entries


def test_an_entry_appears_with_its_last_token(rng: torch.Generator) -> None:
    for ratio, overlap in ((4, True), (128, False)):
        tensors, state = parameters(rng, ratio, DIM * (1 + overlap)), start(ratio, overlap)
        for p in range(2 * ratio + 1):
            pooled, state = run(tokens(rng, 1), tensors, state)
            assert pooled.shape == (((p + 1) % ratio == 0), DIM)


def test_which_tokens_an_entry_depends_on(rng: torch.Generator) -> None:
    """C4: its own group and the one before. C128: its own. Bitwise, and nothing else."""
    for ratio, overlap in ((4, True), (128, False)):
        tensors, x = parameters(rng, ratio, DIM * (1 + overlap)), tokens(rng, 3 * ratio + 1)
        want, _ = run(x, tensors, start(ratio, overlap))
        for p in range(0, x.shape[0], 1 if ratio == 4 else 41):
            other = x.clone()
            other[p] += 1
            got, _ = run(other, tensors, start(ratio, overlap))
            changed = {j for j in range(3) if not torch.equal(got[j], want[j])}
            reached = {p // ratio, p // ratio + 1} if overlap else {p // ratio}
            assert changed == reached & {0, 1, 2}, f"ratio {ratio}, token {p}"


def test_the_first_entry_has_no_previous_group(rng: torch.Generator) -> None:
    tensors, x = parameters(rng, 4, 2 * DIM), tokens(rng, 4)
    pooled, state = run(x, tensors, start(4, True))
    assert torch.isfinite(pooled).all()
    # What a state that was not reset does: the same tokens after another sequence.
    _, stale = run(tokens(rng, 4), tensors, start(4, True))
    leaked, _ = run(x, tensors, replace(stale, entries=0))
    assert (leaked - pooled).abs().max() > 1e-2
    assert torch.isfinite(state.previous_score).all()
    assert torch.isneginf(start(4, True).previous_score).all()


def test_states_are_values(rng: torch.Generator) -> None:
    """Continuing from a state does not change it: two continuations of one prefix do not see each other."""
    tensors = parameters(rng, 4, 2 * DIM)
    _, state = run(tokens(rng, 6), tensors, start(4, True))
    x = tokens(rng, 5)
    first, _ = run(x, tensors, state)
    run(tokens(rng, 7), tensors, state)
    again, _ = run(x, tensors, state)
    assert torch.equal(first, again)


def test_entries_are_normed_then_rotated_to_the_groups_first_position(rng: torch.Generator) -> None:
    dim, ratio, freqs = 8, 4, frequencies(160000.0, 4)
    pooled = torch.randn((3, dim), generator=rng, dtype=torch.float64)
    norm = torch.randn(dim, generator=rng, dtype=torch.float64)
    numerics = replace(STRUCTURE, dtype=torch.float64)
    got = place_entries_ref(pooled, 5, ratio, norm, freqs, 1e-6, numerics)
    for row in range(3):
        rms = math.sqrt(pooled[row].square().mean().item() + 1e-6)
        normed = pooled[row] / rms * norm
        want = rotate_ref(normed[None], torch.tensor([(5 + row) * ratio]), freqs)[0]
        assert_close(got[row], want, 1e-12, f"entry {5 + row}")
    assert torch.equal(
        place_entries_ref(pooled, 5, ratio, norm, freqs, 1e-6, replace(numerics, round_pooled=True)),
        place_entries_ref(pooled.to(torch.bfloat16).double(), 5, ratio, norm, freqs, 1e-6, numerics),
    )
