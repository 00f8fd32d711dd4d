"""A checkpoint in the released format runs as it is loaded: FP8 and FP4 weights are read as their values."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_models import random_tokens, tiny

from dsv4ref.ref import checkpoint, checkpoint_writer
from dsv4ref.ref.model import Model, forward_ref
from dsv4ref.ref.mtp import mtp_ref
from dsv4ref.ref.numerics import STRUCTURE


def test_stored_and_dequantised_weights_give_the_same_bits(tmp_path: Path) -> None:
    config = tiny((0, 4, 128))
    checkpoint_writer.write_random(tmp_path / "model", config, seed=3)
    stored = checkpoint.load(tmp_path / "model", config)
    assert {torch.int8, torch.float8_e4m3fn, torch.int64} <= {tensor.dtype for tensor in stored.values()}
    numbers = checkpoint.load(tmp_path / "model", config, dequantise_to=torch.float32)
    tokens = random_tokens(config, 133, 0)
    got, want = (forward_ref(Model(config, tensors, STRUCTURE), tokens)[0] for tensors in (stored, numbers))
    assert want.logits.std() > 0.1
    assert torch.equal(got.logits, want.logits)
    guesses, _ = mtp_ref(Model(config, stored, STRUCTURE), tokens[1:], got.streams[:-1])
    expected, _ = mtp_ref(Model(config, numbers, STRUCTURE), tokens[1:], want.streams[:-1])
    assert torch.equal(guesses.logits, expected.logits)
