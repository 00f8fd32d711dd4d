"""Whether a capture is on, and on which stream: the emulated answers of a machine without a GPU."""

from __future__ import annotations

import pytest
import torch

from dsv4ref.kernels.capture import current_stream, emulated_capture, emulated_stream, is_capturing

CPU = torch.device("cpu")


def test_an_emulated_capture_announces_itself_and_ends() -> None:
    assert not is_capturing()
    with emulated_capture():
        assert is_capturing()
    assert not is_capturing()


def test_an_emulated_capture_ends_when_its_body_raises() -> None:
    with pytest.raises(KeyError), emulated_capture():
        raise KeyError
    assert not is_capturing()


def test_emulated_streams_nest() -> None:
    assert current_stream(CPU) == 0
    with emulated_stream(3):
        with emulated_stream(5):
            assert current_stream(CPU) == 5
        assert current_stream(CPU) == 3
    assert current_stream(CPU) == 0


@pytest.mark.gpu
def test_a_gpus_streams_are_told_apart() -> None:
    device = torch.device("cuda")
    here = current_stream(device)
    with torch.cuda.stream(torch.cuda.Stream()):
        assert current_stream(device) != here
    assert current_stream(device) == here
