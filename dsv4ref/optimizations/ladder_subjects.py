"""What takes turns in a ladder's rounds: one decode engine per set of switches, all from the same checkpoint.

Prompts are computed once, by one engine for all rungs. Every engine takes over its requests, tokens and caches as
they stand there (`dsv4ref.serving.checkpoints`), and goes back to them before each window: so all windows of all rungs
begin at the same positions over the same bytes, no engine wears out, and nothing is computed again.

The gate costs no run of its own. The steps that warm an engine up are steps of the timed rows, on the timed engine and
from that checkpoint, and their greedy tokens are held against those of everything off.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv4ref.optimizations import ladder_workload as workload
from dsv4ref.optimizations.ladder_attribution import Switches, features_of, names_of
from dsv4ref.optimizations.ladder_workload import Generated, Preset
from dsv4ref.ref.model import Model
from dsv4ref.serving.checkpoints import Checkpoint
from dsv4ref.serving.engine import DecodeEngine
from dsv4ref.serving.features import available, unavailable

__all__ = ["EngineSubject", "Oracle", "computed_prompts", "steps_for", "timed_oracle"]

_LEAST_STEPS = 2


_FOR_PROMPTS = ("grouped_experts", "resident_weights")
"""Switches that make the reference's prompts cheaper; which ones computed them is the same for every rung."""


def _new_engine(
    model: Model,
    preset: Preset,
    switches: Switches,
    device: torch.device | str,
    *,
    keep_logits: bool = False,
    prompt_rows: bool = False,
) -> DecodeEngine:
    features = features_of(switches)
    # One batch size is decoded, so one is captured.
    buckets = (preset.requests,) if features.device_step else None
    return DecodeEngine(
        model, features, slots=preset.requests, max_length=preset.max_length, chunk=preset.chunk, device=device,
        buckets=buckets, keep_logits=keep_logits, prompt_rows=prompt_rows,
    )  # fmt: skip


def computed_prompts(model: Model, preset: Preset, asked: Tensor, device: torch.device | str) -> Checkpoint:
    """The benchmark's requests behind their prompts, computed as the preset says.

    Args:
        model: the slice.
        preset: the benchmark.
        asked: int64 ``[requests, prompt]``.
        device: of the engine.
    """
    switches = frozenset(name for name in _FOR_PROMPTS if name not in unavailable(model))
    if preset.prompt_rows:
        switches = frozenset(names_of(available(model)))
    engine = _new_engine(model, preset, switches, device, prompt_rows=preset.prompt_rows)
    for prompt in asked:
        engine.submit(prompt, preset.output)
    while True:
        result = engine.step()
        _raise_failed(result)
        if not result.prefilled:
            break
    return engine.checkpoint()


def steps_for(step_s: float, preset: Preset) -> int:
    """Steps of a window, a power of two unless all of the preset's fit: the same in every run of about that speed.

    Args:
        step_s: seconds of one.
        preset: its ``sample_s`` and ``window``.
    """
    fitting = max(int(preset.sample_s / step_s), 1)
    return preset.window if fitting >= preset.window else max(_LEAST_STEPS, 1 << (fitting.bit_length() - 1))


@dataclass(frozen=True)
class Oracle:
    """Tokens and logits of everything off from the checkpoint, and by how much logits may differ from them.

    Args:
        generated: of everything off.
        budget: of `ladder_workload.gate_budget`.
        plain: requests with another token under plain bf16 attention, and the largest gap, as `excused`; over the steps
            of the budget.
        seconds: of its steps, the first ones of a fresh engine and no measurement.
    """

    generated: Generated
    budget: float
    plain: tuple[int, float]
    seconds: tuple[float, ...]

    def excused(self, found: Generated) -> tuple[int, float]:
        """Requests with another token than the oracle's, and the largest gap of `ladder_workload.gaps` among them."""
        return _widest(workload.gaps(found, self.generated))

    def reason(self, found: Generated) -> str | None:
        """None where a run's tokens are the oracle's, else what is wrong."""
        wrong = workload.divergent(found, self.generated, self.budget)
        total = len(self.generated.tokens)
        return f"{wrong} of {total} requests left the tokens of everything off" if wrong else None


def timed_oracle(model: Model, preset: Preset, start: Checkpoint, device: torch.device | str) -> Oracle:
    """Everything off over the warm-up's steps, and the straightforward bf16 attention for the budget."""
    engine = _new_engine(model, preset, frozenset(), device, keep_logits=True)
    off, seconds = _answers(engine, start, preset.warmup)
    workload.attend_plainly(engine)
    plain, _ = _answers(engine, start, preset.budget)
    first = {id: tokens[: preset.budget] for id, tokens in off.tokens.items()}
    apart = _widest(workload.gaps(plain, Generated(first, off.logits)))
    return Oracle(off, workload.gate_budget(plain, off), apart, tuple(seconds))


def _widest(gaps: Mapping[int, float]) -> tuple[int, float]:
    return len(gaps), max(gaps.values(), default=0.0)


def _answers(engine: DecodeEngine, start: Checkpoint, steps: int) -> tuple[Generated, list[float]]:
    """Tokens of so many steps from a checkpoint, logits where the engine keeps them, and the seconds of each step."""
    engine.restore(start)
    seen, seconds = Generated(), []
    for _ in range(steps):
        began = time.perf_counter()
        result = engine.step()
        seconds.append(time.perf_counter() - began)  # the step has read its tokens from the device
        _raise_failed(result)
        for id, token in result.tokens.items():
            seen.tokens.setdefault(id, []).append(token)
            if id in result.logits:
                seen.logits.setdefault(id, []).append(result.logits[id].float().cpu())
    return seen, seconds


def _raise_failed(result: Any) -> None:
    failed = [request for request in result.done if request.error is not None]
    if failed:
        raise RuntimeError(f"request {failed[0].id} failed: {failed[0].error}")


class EngineSubject:
    """One engine in its decode phase: every request decodes, nobody joins or leaves. A `ladder_runner.Subject`.

    Building it runs the warm-up, ``preset.warmup`` steps from the checkpoint.

    Args:
        model: the slice.
        preset: the benchmark.
        switches: which are on.
        start: of `computed_prompts`.
        device: of the engine.

    Attributes:
        on_gpu: whether steps are waited for and memory is counted.
        generated: the warm-up's tokens, for the gate.
        steps: of a window.
        engine_bytes: what building it left allocated on the GPU, weights shared with other engines left out unless it
            is the first to need them; None on the CPU.
    """

    def __init__(
        self, model: Model, preset: Preset, switches: Switches, start: Checkpoint, device: torch.device | str
    ) -> None:
        self._preset, self._start, self.on_gpu = preset, start, torch.device(device).type == "cuda"
        before = self._allocated()
        self._engine = _new_engine(model, preset, switches, device)
        self.generated, seconds = _answers(self._engine, start, preset.warmup)
        self.steps = steps_for(min(seconds), preset)
        after = self._allocated()
        self.engine_bytes = None if before is None or after is None else after - before
        self._made = preset.warmup

    @property
    def replayed(self) -> bool:
        """Whether its steps are replays of a graph."""
        return self._engine.decoder is not None and bool(self._engine.decoder.captured)

    @property
    def room(self) -> int:
        """Decode steps of a window at most, before the first request leaves."""
        longest = max(len(request.output) for request in self._start.requests)
        return self._preset.output - longest - 1 - self._untimed

    @property
    def context(self) -> int:
        """Tokens of the longest request."""
        return max(request.length for request in self._start.requests) + self._made

    @property
    def _untimed(self) -> int:
        """A device step takes requests over in the first step behind a checkpoint; nobody else does anything there."""
        return int(self._engine.decoder is not None)

    def renew(self) -> None:
        """Capture the step again where it is replayed; the work is the same, the memory of the graph is another.

        Graphs of the same work may differ in speed, by where their memory lies, for as long as they live. An engine
        with one capture would have one draw of that in all of its windows.
        """
        if self.replayed:
            assert self._engine.decoder is not None
            self._engine.decoder.capture(self._engine.operations)

    def rewind(self) -> None:
        """Back to the checkpoint; what that costs the next step is behind it."""
        self._engine.restore(self._start)
        self._made = 0
        for _ in range(self._untimed):
            self.step()

    def step(self) -> None:
        """One decode step of all requests.

        Raises:
            RuntimeError: the step decoded another number of rows: a request has left.
        """
        result = self._engine.step()
        _raise_failed(result)
        self._made += 1
        if result.decoded != self._preset.requests or result.prefilled or result.done:
            raise RuntimeError(
                f"step: decoded {result.decoded} rows, prefilled {result.prefilled}, {len(result.done)} left; "
                f"expected {self._preset.requests} decode rows and nothing else"
            )

    def window(self, steps: int) -> tuple[float, ...]:
        """Seconds of each decode step of a window, by the host's clock, the device idle before and after each.

        Python's cycle collector is off meanwhile: how long it takes depends on all engines there are, not on this one.

        Args:
            steps: at most; `steps` where that is fewer.
        """
        self.rewind()
        seconds = []
        collecting = gc.isenabled()
        gc.disable()
        try:
            for _ in range(min(steps, self.steps)):
                self._wait()
                began = time.perf_counter()
                self.step()
                self._wait()
                seconds.append(time.perf_counter() - began)
        finally:
            if collecting:
                gc.enable()
        return tuple(seconds)

    def host_and_device(self, steps: int, pairs: int) -> list[tuple[float, float]]:
        """Seconds of a step, and of the same step where the device never waits for the host; of replays on a GPU.

        The steps of either window are the same ones. In the second, graphs are launched one behind the other and nobody
        reads an answer before the last, so that its mean is the device's time alone, without a profiler.

        Args:
            steps: of a window, at most `room`.
            pairs: how many, taking turns.
        """
        decoder = self._engine.decoder
        assert decoder is not None, "host and device are told apart on replays"
        found = []
        for _ in range(pairs):
            stepped = sum(self.window(steps)) / min(steps, self.steps)
            self.rewind()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._wait()
            begin.record()
            for _ in range(min(steps, self.steps)):
                decoder.launch(self._preset.requests, self._engine.operations)
            end.record()
            self._wait()
            found.append((stepped, begin.elapsed_time(end) / 1e3 / min(steps, self.steps)))
        return found

    def step_bytes(self) -> int | None:
        """Bytes that one step allocates on top of what is there, at its peak; None on the CPU."""
        if not self.on_gpu:
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def _allocated(self) -> int | None:
        if not self.on_gpu:
            return None
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
