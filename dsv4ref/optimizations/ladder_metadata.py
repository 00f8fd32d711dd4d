"""What the host does about a device step's rows, apart from launching it: how long that takes, and what it launches.

In a steady state a step's inputs are the last step's outputs, on the device already, and the host has only to see that
(`dsv4ref.serving.device_decoder`). When a row changes it copies the rows; when a request leaves and another one takes
its slot, it writes block tables and open groups too. Nothing here runs a step of the model: an answer is made up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from dsv4ref.evidence import launches, timing
from dsv4ref.optimizations.ladder_attribution import Switches, features_of
from dsv4ref.ref.model import Model
from dsv4ref.serving.engine import DecodeEngine

__all__ = ["MetadataHost", "metadata_rows"]

_CONTEXT = 16  # tokens of a request's caches; its metadata costs the same however long it is
_REPEATS = 50


class MetadataHost:
    """The host's part of decode steps of one batch size, with requests that have joined and no model behind them.

    Args:
        model: shapes; its weights are not read by what is measured.
        switches: everything on; graphs are left out, since nothing is replayed.
        rows: batch size.
        device: of the buffers.
    """

    def __init__(self, model: Model, switches: Switches, rows: int, device: str) -> None:
        features = features_of(switches).without("captured_steps")
        self._engine = DecodeEngine(
            model, features, slots=rows + 1, max_length=_CONTEXT, chunk=_CONTEXT, device=device, buckets=(rows,),
            keep_logits=False,
        )  # fmt: skip
        assert self._engine.decoder is not None, "metadata is measured of device steps"
        self._decoder = self._engine.decoder
        self._positions: dict[int, int] = {}
        self._next = 0
        for _ in range(rows):
            self._join()
        self.steady()

    def steady(self) -> None:
        """A step whose rows are those of the step before, each one token further."""
        rows = self._decoder.rows(list(self._positions), list(self._positions.values()), [0] * len(self._positions))
        self._decoder.place(rows)
        self._decoder.remember(rows, [0] * len(rows))
        for owner in self._positions:
            self._positions[owner] += 1

    def another_row(self) -> None:
        """A step in which a row is another one than its buffers hold."""
        self._positions[next(iter(self._positions))] += 1
        self.steady()

    def another_request(self) -> None:
        """A step before which a request has left and another one has joined."""
        gone, _ = self._positions.popitem()
        self._decoder.leave(gone)
        self._engine.caches.close(gone)
        self._join()
        self.steady()

    @property
    def loads(self) -> int:
        """Steps so far for which rows were copied."""
        return self._decoder.loads

    def _join(self) -> None:
        self._decoder.join(self._next, self._engine.caches.open(self._next, _CONTEXT))
        self._positions[self._next] = 0
        self._next += 1


def metadata_rows(
    model: Model, switches: Switches, sizes: Sequence[int], *, device: str, repeats: int = _REPEATS
) -> list[dict[str, Any]]:
    """Host time and launches of a step's metadata, per batch size and per kind of step.

    Args:
        model: shapes.
        switches: everything on; with ``device_step``.
        sizes: batch sizes.
        device: "cpu" or "cuda".
        repeats: timed steps of each kind, at least 10.

    Returns:
        Rows with batch, step, host_us and host_us_ci (median and its 95 % interval), launches, loads (row copies per
        step), repeats.

    Raises:
        ValueError: fewer repeats.
    """
    if repeats < timing.MIN_ROUNDS:
        raise ValueError(f"repeats: got {repeats}, expected at least {timing.MIN_ROUNDS}, or intervals say nothing")
    found = []
    counted: launches.Method = "cuda-profiler" if _on_gpu(device) else "aten-dispatch+interpreter"
    for size in sizes:
        host = MetadataHost(model, switches, size, device)
        kinds: tuple[tuple[str, Callable[[], None]], ...] = (
            ("steady", host.steady),
            ("another row", host.another_row),
            ("another request", host.another_request),
        )
        for kind, step in kinds:
            step()  # warm
            before = host.loads
            sample = timing.host_sampler(step, torch.cuda.synchronize if _on_gpu(device) else _settled)
            samples = [sample() for _ in range(repeats)]
            loads = (host.loads - before) / repeats
            interval = timing.bootstrap_median(samples)
            found.append(
                {
                    "batch": size, "step": kind, "host_us": interval.median,
                    "host_us_ci": [interval.low, interval.high],
                    "launches": launches.count_launches(step, warmup=0, method=counted).total,
                    "loads": loads, "repeats": repeats,
                }
            )  # fmt: skip
    return found


def _on_gpu(device: str) -> bool:
    return torch.device(device).type == "cuda"


def _settled() -> None:
    """A CPU has nothing left to do once a call has returned."""
