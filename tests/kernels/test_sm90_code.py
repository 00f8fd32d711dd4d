"""What the decode kernel becomes on sm_90, compiled without a GPU: its conversions, who computes the scores, and what
holding keys in halves spares shared memory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import cache
from typing import Any

import pytest

KEYS, THREADS = 32, 256  # tiles of 32 keys; eight warps
LOOPS = {"native": 2, "whole": 2, "halves": 1}  # one per scope, or one for both
LANES, BANK_GROUPS = 32, 8  # of a warp; of 16 bytes each, which one store of a quarter warp fills

# In a child: a process that runs the interpreter cannot compile.
CHILD = """
import collections, importlib, json, re
from dsv4ref import kernels
from dsv4ref.kernels.sparse_mla.launch import LaunchShape
from dsv4ref.optimizations import decode_model
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

request = decode_model.compile_request(LaunchShape(64, 32, 8), "sm_90")
function = getattr(importlib.import_module(request.module), request.function)
found = {"chosen": [request.constexprs["EXTRA_MODE"], request.constexprs["HALVES"]]}
variants = {"native": ("native_fn", False), "whole": ("packed_fn", False), "halves": ("packed_fn", True)}
for name, (mode, halves) in variants.items():
    constexprs = {**request.constexprs, "SWA_MODE": mode, "EXTRA_MODE": mode, "HALVES": halves}
    kinds = {n: request.signature.get(n, "constexpr") for n in function.arg_names}
    aligned = {(function.arg_names.index(n),): [["tt.divisibility", 16]] for n in request.divisible_by_16}
    source = ASTSource(function, kinds, {(function.arg_names.index(n),): v for n, v in constexprs.items()}, aligned)
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": request.num_warps})
    names = re.findall(r"^\\s*(?:@%p\\d+ )?([a-z][a-z0-9_]*\\.[a-z0-9._:]+)", code.asm["ptx"], re.MULTILINE)
    text = code.asm["ptx"]
    starts = {m[1]: m.end() for m in re.finditer(r"^([$]L__BB\\d+_\\d+):", text, re.MULTILINE)}
    jumps = [(m[1], m.start()) for m in re.finditer(r"\\bbra(?:\\.uni)?\\s+([$]L__BB\\d+_\\d+);", text)]
    back = [(starts[label], end) for label, end in jumps if starts[label] < end]
    outer = [(a, b) for a, b in back if not any(c <= a and b < d or c < a and b <= d for c, d in back)]
    loops = [text[a:b] for a, b in outer]
    stored = re.findall(r"ttg.local_alloc %\\S+ : \\(tensor<32x(\\d+)xbf16, (#\\w+)>\\)", code.asm["ttgir"])
    layouts = dict(re.findall(r"^(#\\w+) = (#ttg.blocked<.*>)$", code.asm["ttgir"], re.MULTILINE))
    found[name] = {
        "counts": collections.Counter(names), "cubin": len(code.asm["cubin"]),
        "loops": [[loop.count(n) for n in ("ld.shared.v4", "bar.sync")] for loop in loops if "wgmma.mma" in loop],
        "stored": [[int(dims), layouts.get(layout)] for dims, layout in stored],
    }
print(json.dumps(found))
"""


@cache
def compiled() -> dict[str, Any]:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    child = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, env=environment, check=False)
    if child.returncode:
        pytest.fail(child.stderr[-2000:])
    return json.loads(child.stdout.splitlines()[-1])


def total(variant: str, *parts: str) -> int:
    """How many PTX instructions have all these parts in their names."""
    return sum(n for name, n in compiled()[variant]["counts"].items() if all(part in name for part in parts))


def test_sm_90_decodes_in_pairs_and_holds_keys_in_halves() -> None:
    assert compiled()["chosen"] == ["packed_fn", True]


@pytest.mark.parametrize("variant", ["whole", "halves"])
def test_codes_are_converted_in_pairs_and_never_from_fp16_to_bf16_one_by_one(variant: str) -> None:
    assert compiled()[variant]["cubin"] > 0
    counts = compiled()[variant]["counts"]
    pairs = LOOPS[variant] * KEYS * 512 // THREADS // 2
    assert total(variant, "cvt.rn.f16x2.e4m3x2") == pairs, counts
    assert total(variant, "mul", "bf16x2") == pairs, counts
    assert total(variant, "cvt", ".bf16.f16") == 0, counts


@pytest.mark.parametrize(("variant", "groups"), [("native", 1), ("whole", 2), ("halves", 2)])
def test_warp_groups_share_the_scores_where_the_products_are_kept_apart(variant: str, groups: int) -> None:
    """Columns of keys that a warp group multiplies per step of 16 dims: all of them in a chain, its share if apart."""
    products = {name: n for name, n in compiled()[variant]["counts"].items() if name.startswith("wgmma.mma_async")}
    columns = {name: int(name.split("m64n")[1].split("k16")[0]) for name in products}
    scores = sum(n * columns[name] for name, n in products.items() if columns[name] <= KEYS)  # PV has columns of dims
    assert scores == LOOPS[variant] * (512 // 16) * KEYS // groups, products


def test_one_loop_for_both_scopes_sends_the_rope_to_half_the_columns_and_adds_up_rows_without_a_barrier() -> None:
    loops = {variant: compiled()[variant]["loops"] for variant in ("whole", "halves")}
    assert {variant: len(found) for variant, found in loops.items()} == {"whole": 2, "halves": 1}
    ((whole_reads, whole_barriers), *others), ((reads, barriers),) = loops["whole"], loops["halves"]
    assert others == [[whole_reads, whole_barriers]]
    assert whole_reads - reads == KEYS * 256 * 2 // 16 // THREADS, "16 bytes of the rope for each 8 columns"
    assert barriers < whole_barriers, loops


def conflicts(dims: int, layout: str) -> int:
    """The worst number of lanes that meet in one group of banks, over what a warp's 16-byte store has to have.

    A row of keys is cut into 128-byte chunks, each its own region of the tile, in which the eight pieces of 16 bytes
    are permuted by the row (the 128-byte swizzle of a warp group product).
    """
    per_thread, threads = (
        [int(n) for n in re.findall(rf"{name} = \[(\d+), (\d+)\]", layout)[0]]
        for name in ("sizePerThread", "threadsPerWarp")
    )
    assert per_thread[0] == 1, layout
    assert dims == per_thread[1] * threads[1], "a warp's rows are whole"
    worst = 0
    for step in range(per_thread[1] // 8):
        groups = [0] * BANK_GROUPS
        for lane in range(LANES):
            row, piece = lane // threads[1], lane % threads[1] * (per_thread[1] // 8) + step
            groups[piece % 8 ^ row % 8] += 1
        worst = max(worst, *groups)
    return worst * BANK_GROUPS // LANES


def test_a_warps_stores_of_half_rows_meet_no_other_in_a_bank() -> None:
    keys = {variant: compiled()[variant]["stored"] for variant in ("whole", "halves")}
    assert [conflicts(*stored) for stored in keys["whole"]] == [2] * LOOPS["whole"], keys
    assert [conflicts(*stored) for stored in keys["halves"]] == [1] * 2 * LOOPS["halves"], keys
