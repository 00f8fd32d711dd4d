"""Kernels that the ISA tests compile. Only the compiling child imports this module: the tests name it."""
# Kernel arguments have no Python types, and one kernel uses an undefined name on purpose.
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def vector_add(x, y, out, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    tl.store(out + offsets, tl.load(x + offsets, mask) + tl.load(y + offsets, mask), mask)


@triton.jit
def matmul_tile(a, b, out, K, M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr = 32):
    """out [M, N] = a [M, K] @ b [K, N], one tile, fp32 accumulation: M * N sets the registers, BLOCK_K the LDS."""
    rows = tl.arange(0, M)
    columns = tl.arange(0, N)
    depth = tl.arange(0, BLOCK_K)
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, K, BLOCK_K):
        left = tl.load(a + rows[:, None] * K + start + depth[None, :])
        right = tl.load(b + (start + depth[:, None]) * N + columns[None, :])
        total = tl.dot(left, right, total)
    tl.store(out + rows[:, None] * N + columns[None, :], total)


@triton.autotune([triton.Config({"BLOCK": 256}), triton.Config({"BLOCK": 512})], key=[])
@triton.jit
def convert(x, out, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out + offsets, tl.load(x + offsets).to(DTYPE))


@triton.jit(do_not_specialize=["n"])
def unspecialised(x, n):
    tl.store(x, n)


@triton.jit
def undefined_name(x, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(x + offsets, tl.load(x + offsets) + no_such_name)  # noqa: F821


@triton.jit
def bad_instruction(x, BLOCK: tl.constexpr):
    """Gets through Triton and fails in LLVM's assembler, which complains on the file descriptor, not in Python."""
    offsets = tl.arange(0, BLOCK)
    value = tl.load(x + offsets)
    value = tl.inline_asm_elementwise("v_no_such_op $0, $1", "=v,v", [value], dtype=tl.float32, is_pure=True, pack=1)
    tl.store(x + offsets, value)


not_a_kernel = len
