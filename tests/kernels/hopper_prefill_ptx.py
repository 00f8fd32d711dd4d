"""Compiles Hopper's prefill for sm_90 without a GPU, and prints what it costs; a child process, as `hopper_ptx`."""

from __future__ import annotations

import importlib
import json
import sys

from dsv4ref.kernels import sparse_mla

# isort: split
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

IMPORTED_EARLY = f"{sparse_mla.__name__}.hopper_prefill_kernel" in sys.modules
hopper_prefill_kernel = importlib.import_module(f"{sparse_mla.__name__}.hopper_prefill_kernel")

from hopper_ptx import described  # noqa: E402

KERNEL = hopper_prefill_kernel._hopper_prefill_kernel
POINTERS = {
    "*bf16": ("q", "kv", "out"),
    "*fp32": ("lse", "sink", "cos", "sin"),
    "*i32": ("indices", "lengths"),
    "*i64": ("positions",),
}
MULTIPLES_OF_16 = ("q_stride_t", "q_stride_h", "kv_stride", "out_stride_t", "out_stride_h")
VARIANTS = {"served": {"HAS_LENGTHS": True, "HAS_ROPE": True}, "bare": {"HAS_LENGTHS": False, "HAS_ROPE": False}}


def compiled(options: dict[str, bool]) -> triton.compiler.CompiledKernel:
    constexprs = {
        **options, "HAS_SINK": True, "HAS_LSE": options["HAS_LENGTHS"],
        "SUM_REGISTERS": hopper_prefill_kernel.SUM_REGISTERS, "FILL_REGISTERS": hopper_prefill_kernel.FILL_REGISTERS,
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
    return triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": hopper_prefill_kernel.WARPS}
    )  # fmt: skip


def main() -> None:
    for name, options in VARIANTS.items():
        print(json.dumps(described(name, compiled(options), IMPORTED_EARLY)))


if __name__ == "__main__":
    main()
