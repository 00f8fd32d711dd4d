"""What the decode kernel becomes on sm_90, compiled without a GPU: its conversions, and who computes the scores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache

import pytest

LOOPS, KEYS, THREADS = 2, 32, 256  # one loop per scope; tiles of 32 keys; eight warps

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
found = {"mode": request.constexprs["EXTRA_MODE"]}
for mode in ("native_fn", "packed_fn"):
    constexprs = {**request.constexprs, "SWA_MODE": mode, "EXTRA_MODE": mode}
    kinds = {n: request.signature.get(n, "constexpr") for n in function.arg_names}
    aligned = {(function.arg_names.index(n),): [["tt.divisibility", 16]] for n in request.divisible_by_16}
    source = ASTSource(function, kinds, {(function.arg_names.index(n),): v for n, v in constexprs.items()}, aligned)
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": request.num_warps})
    names = re.findall(r"^\\s*(?:@%p\\d+ )?((?:cvt|mul|wgmma\\.mma_async)\\.[a-z0-9.]+)", code.asm["ptx"], re.MULTILINE)
    found[mode] = {"counts": collections.Counter(names), "cubin": len(code.asm["cubin"])}
print(json.dumps(found))
"""


@cache
def compiled() -> dict:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    child = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, env=environment, check=False)
    if child.returncode:
        pytest.fail(child.stderr[-2000:])
    return json.loads(child.stdout.splitlines()[-1])


def total(mode: str, *parts: str) -> int:
    """How many PTX instructions have all these parts in their names."""
    return sum(n for name, n in compiled()[mode]["counts"].items() if all(part in name for part in parts))


def test_codes_are_converted_in_pairs_and_never_from_fp16_to_bf16_one_by_one() -> None:
    assert compiled()["mode"] == "packed_fn"
    assert compiled()["packed_fn"]["cubin"] > 0
    counts = compiled()["packed_fn"]["counts"]
    pairs = LOOPS * KEYS * 512 // THREADS // 2
    assert total("packed_fn", "cvt.rn.f16x2.e4m3x2") == pairs, counts
    assert total("packed_fn", "mul", "bf16x2") == pairs, counts
    assert total("packed_fn", "cvt", ".bf16.f16") == 0, counts


@pytest.mark.parametrize(("mode", "groups"), [("native_fn", 1), ("packed_fn", 2)])
def test_warp_groups_share_the_scores_where_the_products_are_kept_apart(mode: str, groups: int) -> None:
    """Columns of keys that a warp group multiplies per step of 16 dims: all of them in a chain, its share if apart."""
    counts = {name: n for name, n in compiled()[mode]["counts"].items() if name.startswith("wgmma")}
    columns = sum(n * int(name.split("m64n")[1].split("k16")[0]) for name, n in counts.items() if "n256" not in name)
    assert columns == LOOPS * (512 // 16) * KEYS // groups, counts
