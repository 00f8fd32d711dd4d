"""Chapter 03 on several processes: torchrun runs this module, one process per rank, and rank 0 says what came out.

    torchrun --nproc-per-node 2 -m dsv4ref.optimizations.routing_ranks --case tiny-two-blocks

Every rank builds the case's inputs from the same seed, takes its share of the tokens and routes them, and the layer
(`dsv4ref.kernels.experts.expert_parallel`) exchanges tokens, computes this rank's experts and sums. Rank 0 compares the
collected rows with what one rank computes, and prints one JSON line. gloo and CPU tensors without a GPU, else NCCL.

A shared expert (here: twice its input) is added once. The batch runs twice: split unevenly, and with no token on the
last rank.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from typing import Any

from dsv4ref import kernels  # before triton: this import decides how kernels run

# isort: split
import torch
import torch.distributed as dist
from torch import Tensor

from dsv4ref.evidence import compare
from dsv4ref.kernels.experts.expert_map import ExpertMap
from dsv4ref.kernels.experts.expert_parallel import expert_parallel
from dsv4ref.optimizations import expert_routing
from dsv4ref.optimizations.base import case_seed
from dsv4ref.optimizations.routing_experts import Experts, routed
from dsv4ref.optimizations.routing_inputs import RoutingInputs

__all__ = ["launch_ranks", "run_ranks", "shares"]

_LAUNCHER = ("-m", "torch.distributed.run")


def run_ranks(ranks: int, case: str, *, seed: int, timeout: float = 120.0) -> dict[str, Any]:
    """Run a case under ``torch.distributed.run`` on this machine and return rank 0's line.

    Args:
        ranks: processes, at least 1.
        case: one of the chapter's with experts to compute and learned or grouped routing.
        seed: the run's seed.
        timeout: seconds until the processes are ended.

    Returns:
        ``passed, detail, backend, ranks``, and for both splits ``tokens`` and ``slots`` computed, per rank.

    Raises:
        RuntimeError: a process failed; the message ends with its last lines.
        subprocess.TimeoutExpired: they did not finish in time.
    """
    return launch_ranks(ranks, __name__, "--case", case, "--seed", str(seed), timeout=timeout)


def launch_ranks(ranks: int, module: str, *arguments: str, timeout: float = 120.0) -> dict[str, Any]:
    """Run a module under ``torch.distributed.run`` on this machine and return the JSON line that rank 0 prints.

    Args:
        ranks: processes, at least 1.
        module: run as ``-m``; its rank 0 prints one line of JSON.
        arguments: of the module.
        timeout: seconds until the processes are ended.

    Raises:
        RuntimeError: a process failed; the message ends with its last lines.
        subprocess.TimeoutExpired: they did not finish in time.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, *_LAUNCHER, "--nproc-per-node", str(ranks), "--master-addr", "127.0.0.1",
        "--master-port", str(port), "-m", module, *arguments,
    ]  # fmt: skip
    # The interpreter's choice is made anew in every process, and torchrun would warn about threads otherwise.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}
    environment.setdefault("OMP_NUM_THREADS", "1")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or len(lines) != 1:
        tail = "\n".join(done.stderr.splitlines()[-30:])
        raise RuntimeError(f"{ranks} ranks: exit status {done.returncode}, {len(lines)} answers\n{tail}")
    found: dict[str, Any] = json.loads(lines[0])
    return found


def shares(rows: int, ranks: int, *, idle: bool) -> list[int]:
    """Tokens per rank, uneven: each takes a third more than its even share while there are any; an idle last has none.

    Args:
        rows: M.
        ranks: R.
        idle: whether the last rank gets none.
    """
    busy = ranks - 1 if idle and ranks > 1 else ranks
    each = -(-rows * 4 // (busy * 3))
    found: list[int] = []
    for rank in range(busy):
        left = rows - sum(found)
        found.append(left if rank == busy - 1 else min(each, left))
    return found + [0] * (ranks - busy)


def _local_experts(moe: Experts, one: ExpertMap, computed: list[int]) -> Any:
    """This rank's experts: tokens whose local id is -1 are skipped."""
    owned = one.global_ids().cpu()

    def compute(x: Tensor, weights: Tensor, local: Tensor) -> Tensor:
        numbers = local.cpu().to(torch.int64)
        mine = numbers >= 0
        computed.append(int(mine.sum()))
        chosen = torch.where(mine, owned[numbers.clamp(min=0)] if len(owned) else numbers, -1)
        part = routed(replace(moe, x=x.cpu().to(torch.float64)), weights.cpu(), chosen)
        return part.to(x.device, torch.float32)

    return compute


def _shared(x: Tensor) -> Tensor:
    return 2.0 * x


def _work(case: str, seed: int) -> dict[str, Any] | None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = "cpu" if dist.get_backend() == "gloo" else f"cuda:{rank}"
    opt = expert_routing.OPTIMIZATION
    inputs = opt.make_inputs(opt.case(case), device, case_seed(opt.id, case, seed))
    if inputs.moe is None:
        raise ValueError(f"case: got {case!r}, expected one with experts to compute")
    splits = [_split(inputs, inputs.moe, device, shares(inputs.logits.shape[0], ranks, idle=i)) for i in (False, True)]
    if rank:
        return None
    want = opt.reference(inputs)
    alone, asked = want["routed"] + _shared(inputs.moe.x), int((want["experts"] >= 0).sum())
    found = [compare.close("y", y, alone, compare.TOLERANCES["routed_sum"]) for y, _, _ in splits]
    slots = [counts for _, _, counts in splits]
    return {
        "passed": all(c.passed for c in found) and all(sum(counts) == asked for counts in slots),
        "detail": "; ".join(f"{c.detail}; {sum(n)} of {asked} slots" for c, n in zip(found, slots, strict=True)),
        "backend": dist.get_backend(),
        "ranks": ranks,
        "tokens": [tokens for _, tokens, _ in splits],
        "slots": slots,
    }


def _split(inputs: RoutingInputs, moe: Experts, device: str, tokens: list[int]) -> tuple[Tensor, list[int], list[int]]:
    """The layer under one split of the tokens: everybody's rows, tokens and slots per rank."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    first = sum(tokens[:rank])
    mine = slice(first, first + tokens[rank])
    own = replace(inputs, logits=inputs.logits[mine].contiguous())
    if inputs.kind == "hash":
        own = replace(own, token_ids=inputs.token_ids[mine].contiguous())
    weights, experts = expert_routing.optimized_route(own)
    one = ExpertMap.placed(inputs.router.n_experts, rank=rank, ranks=ranks, device=device)
    x = moe.x[mine].to(device, torch.float32)
    computed: list[int] = []
    y = expert_parallel(
        x, weights, experts, one, _local_experts(moe, one, computed), capacity=max(1, *tokens), shared=_shared
    )

    parts: list[Any] = [None] * ranks
    dist.all_gather_object(parts, (y.cpu(), computed[0]))
    return torch.cat([part for part, _ in parts]), tokens, [count for _, count in parts]


def main() -> None:
    """Entry point under torchrun."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", default="tiny-two-blocks")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    compiled = kernels.mode() == "compiled"
    if compiled:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if compiled else "gloo")
    try:
        found = _work(arguments.case, arguments.seed)
        if found is not None:
            print(json.dumps(found), flush=True)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
