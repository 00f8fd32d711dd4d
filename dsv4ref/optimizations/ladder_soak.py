"""Many decode steps while requests join and leave: what the memory does meanwhile, and who has which blocks at the end.

The workload repeats a few lengths for ever, so that whatever an engine needs, it has needed within its first hundred
steps. Memory is compared where it must be the same to the byte: with nobody in the engine, once behind those steps and
once behind the last one.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4ref.optimizations import ladder_workload as workload
from dsv4ref.optimizations.ladder_attribution import Switches, features_of
from dsv4ref.optimizations.ladder_workload import SoakPlan
from dsv4ref.ref.model import Model
from dsv4ref.serving.engine import DecodeEngine

__all__ = ["Soak", "run_soak"]

_CANCELLED = 7  # one request in so many is cancelled once it has an answer's beginning


@dataclass(frozen=True)
class Soak:
    """What a soak found; pairs are behind the mark and behind the last step.

    Args:
        steps: run, those in which the engine was emptied left out.
        mark: the step of the first look.
        finished, cancelled: requests that left, by how.
        method: what counts as memory in use.
        busy: bytes in use with all slots taken.
        idle: bytes in use once everybody has left.
        peak: most bytes at any moment of the run; None on the CPU.
        blocks: blocks that the engine's pools have.
        held: of them in use while busy.
        lost: blocks that are not free once everybody has left.
    """

    steps: int
    mark: int
    finished: int
    cancelled: int
    method: str
    busy: tuple[int, int]
    idle: tuple[int, int]
    peak: int | None
    blocks: int
    held: tuple[int, int]
    lost: int

    @property
    def growth(self) -> int:
        """Bytes by which an engine with nobody in it has grown."""
        return self.idle[1] - self.idle[0]

    @property
    def reason(self) -> str | None:
        """None where nothing grew or was lost, else what."""
        if self.growth > 0:
            return f"an empty engine grew by {self.growth} bytes between steps {self.mark} and {self.steps}"
        return f"{self.lost} of {self.blocks} blocks did not come back" if self.lost else None


def run_soak(
    model: Model,
    switches: Switches,
    plan: SoakPlan,
    *,
    device: str,
    seed: int,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Soak:
    """Run an engine through joins, leaves and cancellations.

    Args:
        model: the slice.
        switches: which are on.
        plan: how long, and with what.
        device: "cpu" or "cuda".
        seed: of the prompts.
        progress: called with what runs, steps done and steps in all.

    Raises:
        RuntimeError: a request failed, or the account of blocks is wrong.
    """
    longest = max(prompt + output for prompt, output in plan.lengths)
    engine = DecodeEngine(
        model, features_of(switches), slots=plan.slots, max_length=longest, chunk=longest, device=device,
        keep_logits=False,
    )  # fmt: skip
    pools = (engine.caches.window_pool, engine.caches.page_pool)
    blocks = sum(pool.blocks for pool in pools)
    if on_gpu := torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    asked = workload.prompts(model.config, len(plan.lengths), longest, seed)
    submitted, finished, cancelled = 0, 0, 0
    busy: list[int] = []
    idle: list[int] = []
    held: list[int] = []

    def step() -> None:
        nonlocal finished, cancelled
        result = engine.step()
        for request in result.done:
            if request.error is not None:
                raise RuntimeError(f"request {request.id} failed: {request.error}")
        finished += sum(not request.cancelled for request in result.done)
        cancelled += sum(request.cancelled for request in result.done)
        for id in result.tokens:
            if id % _CANCELLED == _CANCELLED - 1 and id in engine.running:
                engine.cancel(id)

    for number in range(1, plan.steps + 1):
        progress("joins and leaves", number, plan.steps)
        while len(engine.waiting) + len(engine.running) <= plan.slots:
            prompt, output = plan.lengths[submitted % len(plan.lengths)]
            engine.submit(asked[submitted % len(plan.lengths)][:prompt], output)
            submitted += 1
        step()
        if number in (plan.mark, plan.steps):
            engine.check_blocks()
            held.append(blocks - sum(pool.spare for pool in pools))
            busy.append(_bytes_in_use(on_gpu))
            while not engine.idle:
                step()
            engine.check_blocks()
            idle.append(_bytes_in_use(on_gpu))
    return Soak(
        plan.steps, plan.mark, finished, cancelled, "torch.cuda.memory_allocated" if on_gpu else "live tensors",
        (busy[0], busy[1]), (idle[0], idle[1]), torch.cuda.max_memory_allocated() if on_gpu else None, blocks,
        (held[0], held[1]), blocks - sum(pool.spare for pool in pools),
    )  # fmt: skip


def _bytes_in_use(on_gpu: bool) -> int:
    if on_gpu:
        return torch.cuda.memory_allocated()
    gc.collect()  # the interpreter leaves the arguments of a launch in a cycle
    stores = {
        store._cdata: store.nbytes()
        for store in (held.untyped_storage() for held in gc.get_objects() if issubclass(type(held), Tensor))
    }
    return sum(stores.values())
