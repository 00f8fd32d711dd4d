"""Many decode steps while requests join and leave: what the memory does meanwhile, and who has which blocks at the end.

The workload repeats a few lengths for ever, so that whatever an engine needs, it has needed within its first hundred
steps. What is compared is the least memory in use over a stretch of steps near the beginning and over one at the end:
prompts that are being computed come and go, a tensor that nobody lets go of stays.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
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
    """What a soak found.

    Args:
        steps: run.
        finished, cancelled: requests that left, by how.
        method: what counts as memory in use.
        early, late: bytes in use behind each step of either stretch: least and most.
        peak: most bytes at any moment of the run; None on the CPU.
        blocks: blocks that the engine's pools have.
        held: of them in use behind the last step of either stretch.
        lost: blocks that nobody holds and that are not free once everybody has left.
    """

    steps: int
    finished: int
    cancelled: int
    method: str
    early: tuple[int, int]
    late: tuple[int, int]
    peak: int | None
    blocks: int
    held: tuple[int, int]
    lost: int

    @property
    def growth(self) -> int:
        """Bytes by which the least memory in use has grown."""
        return self.late[0] - self.early[0]

    @property
    def reason(self) -> str | None:
        """None where nothing grew or was lost, else what."""
        if self.growth > 0:
            return f"the least memory in use grew by {self.growth} bytes over {self.steps} steps of joins and leaves"
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
    early: list[int] = []
    late: list[int] = []
    held: list[int] = []
    for step in range(plan.steps):
        progress("joins and leaves", step, plan.steps)
        while len(engine.waiting) + len(engine.running) <= plan.slots:
            prompt, output = plan.lengths[submitted % len(plan.lengths)]
            engine.submit(asked[submitted % len(plan.lengths)][:prompt], output)
            submitted += 1
        result = engine.step()
        for request in result.done:
            if request.error is not None:
                raise RuntimeError(f"request {request.id} failed: {request.error}")
        finished += sum(not request.cancelled for request in result.done)
        cancelled += sum(request.cancelled for request in result.done)
        for id in result.tokens:
            if id % _CANCELLED == _CANCELLED - 1 and id in engine.running:
                engine.cancel(id)
        for stretch, first in ((early, plan.stretch), (late, plan.steps - plan.stretch)):
            if first <= step < first + plan.stretch:
                stretch.append(_bytes_in_use(on_gpu))
        if step + 1 in (2 * plan.stretch, plan.steps):
            engine.check_blocks()
            held.append(blocks - sum(pool.spare for pool in pools))
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    for id in (*engine.running, *engine.waiting):
        engine.cancel(id)
    engine.run()
    engine.check_blocks()
    return Soak(
        plan.steps, finished, cancelled, "torch.cuda.memory_allocated" if on_gpu else "live tensors",
        _ends(early), _ends(late), peak, blocks, (held[0], held[1]), blocks - sum(pool.spare for pool in pools),
    )  # fmt: skip


def _ends(values: Sequence[int]) -> tuple[int, int]:
    return min(values), max(values)


def _bytes_in_use(on_gpu: bool) -> int:
    if on_gpu:
        return torch.cuda.memory_allocated()
    gc.collect()  # the interpreter leaves the arguments of a launch in a cycle
    stores = {
        store._cdata: store.nbytes()
        for store in (held.untyped_storage() for held in gc.get_objects() if issubclass(type(held), Tensor))
    }
    return sum(stores.values())
