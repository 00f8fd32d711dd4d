"""Compiles the Hopper kernel for sm_90 without a GPU, and prints what each launch shape costs; a child process.

The parent reads one JSON object per line: the variant, and what `ptxas -v` and the PTX say of it.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from dsv4ref.kernels import sparse_mla

# isort: split
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

IMPORTED_EARLY = f"{sparse_mla.__name__}.hopper_kernel" in sys.modules
hopper_kernel = importlib.import_module(f"{sparse_mla.__name__}.hopper_kernel")

KERNEL = hopper_kernel._hopper_decode_kernel
POINTERS = {
    "*bf16": ("q", "out"),
    "*fp32": ("lse", "sink", "cos", "sin", "parts", "part_lses"),
    "*i32": ("positions", "swa_indices", "swa_indptr", "extra_indices", "extra_indptr"),
    "*u8": ("swa_cache", "extra_cache"),
}
MULTIPLES_OF_16 = ("q_stride_t", "q_stride_h", "out_stride_t", "out_stride_h", "swa_block_stride", "extra_block_stride")
VARIANTS = {"one split": {"SPLIT": False}, "splits": {"SPLIT": True}}


def compiled(split: bool) -> triton.compiler.CompiledKernel:
    constexprs = {
        "SWA_BLOCK": 64, "EXTRA_BLOCK": 64, "HAS_EXTRA": True, "SPLIT": split, "HAS_SINK": not split,
        "HAS_LSE": not split, "HAS_ROPE": not split,
        "FOLLOW_REGISTERS": hopper_kernel.FOLLOW_REGISTERS, "FILL_REGISTERS": hopper_kernel.FILL_REGISTERS,
    }  # fmt: skip
    names = KERNEL.arg_names
    kinds = {name: kind for kind, group in POINTERS.items() for name in group}
    kinds |= dict.fromkeys(constexprs, "constexpr") | {"scale_log2": "fp32"}
    aligned = [n for n in names if kinds.get(n, "").startswith("*") or n in MULTIPLES_OF_16]
    source = GluonASTSource(
        fn=KERNEL,
        signature={name: kinds.get(name, "i32") for name in names},
        constexprs={(names.index(name),): value for name, value in constexprs.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": hopper_kernel.WARPS})


def assembled(ptx: str) -> str:
    """What ptxas says of the code, on registers, spills and wgmma."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
        command = [str(ptxas), "-v", "--gpu-name", "sm_90a", str(path), "-o", str(Path(folder) / "kernel.cubin")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def hasty_arrivals(ptx: str) -> int:
    """Arrivals at mbarriers without a meeting of the role's threads since its last fence."""
    steps = re.findall(r"fence\.proxy\.async|bar\.sync|mbarrier\.arrive\.shared", ptx)
    met, hasty = True, 0
    for step in steps:
        met = step == "bar.sync" or (met and step != "fence.proxy.async")
        hasty += step == "mbarrier.arrive.shared" and not met
    return hasty


def unawaited_copies(ptx: str) -> int:
    """Waits for groups of copies that leave copies out: those that stand in no group yet."""
    open_copies, found = False, 0
    for step in re.findall(r"cp\.async\.(c[ag]|commit_group|wait_group)", ptx):
        found += step == "wait_group" and open_copies
        open_copies = step in ("ca", "cg") or (open_copies and step != "commit_group")
    return found


def described(variant: str, kernel: triton.compiler.CompiledKernel, imported_early: bool) -> dict[str, object]:
    """What a parent reads of one variant of a Hopper kernel."""
    ptx, said = kernel.asm["ptx"], assembled(kernel.asm["ptx"])
    registers = re.search(r"Used (\d+) registers", said)
    spilt = re.search(r"(\d+) bytes spill stores", said)
    assert registers is not None, said
    assert spilt is not None, said
    return {
        "variant": variant,
        "imported_early": imported_early,
        "registers": int(registers[1]),
        "spill_bytes": int(spilt[1]),
        "serialised": "serialized" in said,
        "shared_bytes": kernel.metadata.shared,
        "wgmma": ptx.count("wgmma.mma_async"),
        "hasty_arrivals": hasty_arrivals(ptx),
        "unawaited_copies": unawaited_copies(ptx),
        "wide_loads": len(re.findall(r"ld\.global\.v4\.b32", ptx)),
        "copies_of_16": len(re.findall(r"cp\.async\.cg\.shared\.global \[.*\], \[.*\], 0x10", ptx)),
        "copies": len(re.findall(r"cp\.async\.c[ag]", ptx)),
    }


def main() -> None:
    for name, options in VARIANTS.items():
        print(json.dumps(described(name, compiled(bool(options["SPLIT"])), IMPORTED_EARLY)))


if __name__ == "__main__":
    main()
