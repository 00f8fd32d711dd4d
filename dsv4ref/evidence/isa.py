"""ISA evidence: cross-compile Triton kernels for AMD GPUs on any machine, and read registers, spills and LDS off them.

No GPU and no driver is needed: the PyPI triton wheel carries the AMD backend. Compilation happens in a child process
(`dsv4ref.evidence.isa_worker`) because a process that runs Triton's interpreter cannot compile, and in one child per
architecture because triton 3.6.0 keeps parts of the first target it compiles for: fp8 conversions for gfx950 come out
as gfx942's when both are compiled in one process, often without an error (found here; 3.7.1 does not do it). The child
sees this process's ``sys.path`` and environment, with the interpreter off. Triton caches results on disk
(``TRITON_CACHE_DIR``). Measured with triton 3.7.1 on two CPU cores: half a second to start the child (plus what the
kernels' modules import), then 0.1 s to 2 s per tile kernel cold and 2 ms warm.

Reading the counts (LLVM, "User Guide for AMDGPU Backend", code object metadata; `AMDGPUBaseInfo.cpp`):
on gfx90a and later VGPRs and AGPRs are one file of 512 registers per lane. ``.vgpr_count`` is the *total* that the code
uses, architectural VGPRs (rounded up to 4 when there are AGPRs) plus AGPRs, which is why it may exceed 256;
``.agpr_count`` is the AGPR part of it. What the hardware reserves is the kernel descriptor's
``.amdhsa_next_free_vgpr``. It is larger than the count when ``waves_per_eu`` is set: Triton asks LLVM for "N, N" waves,
and LLVM keeps the upper bound by reserving registers that the code never touches, so the option also caps occupancy
at N.
``.sgpr_count`` includes the six that VCC, XNACK and flat scratch take. ``.vgpr_spill_count`` counts the register
allocator's spill stores, not bytes; bytes of stack per lane are ``.private_segment_fixed_size``. Triton asks for LDS at
launch, so the metadata's group segment is 0 and the size is the one in Triton's own metadata.
Instruction counts are static: an instruction in a loop counts once.
"""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dsv4ref.evidence.isa_worker import JOB_MARK

ARCHS = ("gfx942", "gfx950")
MESSAGE_LINES = 12
MAX_WARPS = 16  # 1,024 threads of 64 lanes, the largest workgroup

_SCALAR_TYPES = (
    *("i1", "i8", "i16", "i32", "i64", "u1", "u8", "u16", "u32", "u64"),
    *("fp16", "bf16", "fp32", "fp64", "fp8e4nv", "fp8e4b8", "fp8e5", "fp8e5b16"),
)
# What MLIR dumps after a failed pass: the whole module and the pass pipeline, which push the cause out of sight.
_REPRODUCER = re.compile(r"^(?:#\w+ = .*\n)*module\b.*\{\n(?s:.*?)^#-\}\n", re.MULTILINE)


@dataclass(frozen=True)
class ArchCaps:
    """What one compute unit offers a kernel.

    Attributes:
        lds_bytes: LDS per CU, which is also the most one workgroup may ask for.
        lds_granule: bytes in which LDS is allocated.
        vgprs_per_lane: vector registers (VGPR + AGPR) per lane of a SIMD, shared by its waves.
        vgpr_granule: registers in which they are allocated.
        sgprs_per_simd: scalar registers of a SIMD, shared by its waves.
        source: where the figures stand.
    """

    arch: str
    lds_bytes: int
    lds_granule: int
    vgprs_per_lane: int
    vgpr_granule: int
    sgprs_per_simd: int
    max_waves_per_simd: int
    simds_per_cu: int
    wave_size: int
    source: str


def _gfx90a_family(arch: str, lds_bytes: int, lds_granule: int, lds_source: str) -> ArchCaps:
    """CDNA2 to CDNA4 share the register files and wave slots (LLVM: FeatureGFX90AInsts); LDS differs."""
    return ArchCaps(
        arch=arch,
        lds_bytes=lds_bytes,
        lds_granule=lds_granule,
        vgprs_per_lane=512,
        vgpr_granule=8,
        sgprs_per_simd=800,
        max_waves_per_simd=8,
        simds_per_cu=4,
        wave_size=64,
        source="LLVM AMDGPUBaseInfo.cpp, IsaInfo: getTotalNumVGPRs, getVGPRAllocGranule, getTotalNumSGPRs, "
        f"getMaxWavesPerEU, getEUsPerCU; LDS: {lds_source}",
    )


_CAPS = {
    "gfx942": _gfx90a_family(
        "gfx942", 65_536, 512, "LLVM AMDGPU.td; AMDGPUUsage.rst, GRANULATED_LDS_SIZE (128 dwords)"
    ),
    "gfx950": _gfx90a_family(
        "gfx950", 163_840, 1_280, "LLVM pull request 116309; AMDGPUUsage.rst, GRANULATED_LDS_SIZE (320 dwords)"
    ),
}


@dataclass(frozen=True)
class CompileRequest:
    """One kernel at one launch shape, described as the launcher's JIT would specialise it.

    Attributes:
        kernel: display name.
        module: importable module that holds the kernel.
        function: name of the ``@triton.jit`` function in it. ``@triton.autotune`` and ``@triton.heuristics`` are looked
            through: what they would choose must be given here.
        shape: label of the launch shape, e.g. ``"64x16 w8 s1"``.
        signature: runtime argument -> Triton type (``"*bf16"``, ``"i32"``, ``"fp32"``).
        constexprs: ``tl.constexpr`` argument -> value. Also runtime arguments that the JIT folds: an integer equal to
            1, or None. A string ``"tl.<name>"`` stands for that dtype of ``triton.language``; other strings are
            passed as they are. Declared defaults need not be repeated.
        num_warps: waves per workgroup, a power of two up to 16.
        num_stages: software pipelining depth.
        options: other options of the HIP backend (``waves_per_eu``, ``matrix_instr_nonkdim``, ``kpack``).
        divisible_by_16: runtime arguments whose value (pointers: address) is a multiple of 16.
        within_2gb: pointer arguments into storage of at most 2 GiB: for these the JIT lets the AMD backend use buffer
            instructions with 32-bit offsets. Leave a KV cache out of it.

    Raises:
        TypeError, ValueError: naming the field, what came and what was expected.
    """

    kernel: str
    module: str
    function: str
    shape: str
    signature: Mapping[str, str]
    constexprs: Mapping[str, int | bool | float | str | None]
    num_warps: int
    num_stages: int = 1
    options: Mapping[str, int | str | bool] = field(default_factory=dict)
    divisible_by_16: frozenset[str] = frozenset()
    within_2gb: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for name in ("kernel", "module", "function", "shape"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise ValueError(f"{name}: expected a non-empty string, got {value!r}")
        if self.num_warps not in (1, 2, 4, 8, MAX_WARPS):
            raise ValueError(f"num_warps: expected a power of two from 1 to {MAX_WARPS}, got {self.num_warps!r}")
        if not isinstance(self.num_stages, int) or self.num_stages < 1:
            raise ValueError(f"num_stages: expected an integer of at least 1, got {self.num_stages!r}")
        for name, kind in self.signature.items():
            if not isinstance(kind, str) or kind.removeprefix("*") not in _SCALAR_TYPES:
                types = ", ".join(_SCALAR_TYPES)
                raise ValueError(f"signature[{name!r}]: expected {types}, '*' before it for a pointer; got {kind!r}")
        for name, value in self.constexprs.items():
            if value is not None and not isinstance(value, (int, float, str)):
                raise TypeError(f"constexprs[{name!r}]: expected int, bool, float, str or None, got {value!r}")
        if both := sorted(self.signature.keys() & self.constexprs.keys()):
            raise ValueError(f"constexprs: {both} are also in signature; an argument is one or the other")
        if misplaced := sorted(self.options.keys() & {"num_warps", "num_stages", "arch"}):
            raise ValueError(f"options: {misplaced} have fields of their own")
        if stray := sorted(self.divisible_by_16 - self.signature.keys()):
            raise ValueError(f"divisible_by_16: expected names from signature {sorted(self.signature)}, got {stray}")
        pointers = {name for name, kind in self.signature.items() if kind.startswith("*")}
        if stray := sorted(self.within_2gb - pointers):
            raise ValueError(f"within_2gb: expected pointer arguments {sorted(pointers)}, got {stray}")


@dataclass(frozen=True)
class IsaRow:
    """What the compiler made of one request on one architecture; the module docstring says what the counts mean.

    Attributes:
        vgpr: vector registers per lane, AGPRs included. agpr: the AGPR part of them.
        vgpr_spills, sgpr_spills: spill stores of the register allocator.
        lds: bytes per workgroup. scratch: bytes of stack per lane.
        waves_per_simd: see `waves_per_simd`.
        mfma: matrix instructions, all kinds; mfma_kinds: the same by mnemonic.
        vgprs_allocated: registers per lane that the kernel descriptor reserves; `waves_per_simd` follows from these.
        triton: version that compiled.
    """

    kernel: str
    arch: str
    shape: str
    vgpr: int
    agpr: int
    sgpr: int
    vgpr_spills: int
    lds: int
    waves_per_simd: int
    mfma: int
    sgpr_spills: int
    scratch: int
    ds_reads: int
    ds_writes: int
    global_loads: int
    buffer_loads: int
    mfma_kinds: Mapping[str, int]
    num_warps: int
    vgprs_allocated: int
    triton: str

    def as_json(self) -> dict[str, Any]:
        """The row as JSON-ready dict, keys in the order of the fields."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class CompileFailure:
    """One request that did not compile; `misfit` if the request is at fault, not the compiler."""

    kernel: str
    shape: str
    arch: str
    message: str
    misfit: bool = False

    def __str__(self) -> str:
        return f"{self.kernel} [{self.shape}] on {self.arch}: {self.message}"


class IsaCompileError(RuntimeError):
    """The compiler failed on at least one request; `failures` has every one of them."""

    def __init__(self, failures: Sequence[CompileFailure]) -> None:
        self.failures = tuple(failures)
        super().__init__("\n".join(str(failure) for failure in self.failures))


def arch_caps(arch: str) -> ArchCaps:
    """Limits of one architecture.

    Raises:
        ValueError: unknown architecture; the message names the known ones.
    """
    if arch not in _CAPS:
        raise ValueError(f"arch: expected one of {', '.join(_CAPS)}, got {arch!r}")
    return _CAPS[arch]


def register_waves(vgpr: int, arch: str, sgpr: int = 0) -> int:
    """Waves that fit a SIMD's register files, work-groups and LDS aside: what LLVM prints as ``; Occupancy:``.

    Args:
        vgpr: registers per lane, AGPRs included, as allocated (`IsaRow.vgprs_allocated`).
        sgpr: scalar registers per wave (`IsaRow.sgpr`); 0 leaves them out of account.

    Source: LLVM AMDGPUBaseInfo.cpp, getNumWavesPerEUWithNumVGPRs and getOccupancyWithNumSGPRs.
    """
    caps = arch_caps(arch)
    if not 0 <= vgpr <= caps.vgprs_per_lane:
        raise ValueError(f"vgpr: expected 0 to {caps.vgprs_per_lane} registers per lane, got {vgpr}")
    if sgpr < 0:
        raise ValueError(f"sgpr: expected at least 0 registers, got {sgpr}")
    waves = min(caps.max_waves_per_simd, caps.vgprs_per_lane // _round_up(max(vgpr, 1), caps.vgpr_granule))
    return min(waves, caps.sgprs_per_simd // max(sgpr, 1))


def waves_per_simd(vgpr: int, lds: int, num_warps: int, arch: str, sgpr: int = 0) -> int:
    """Waves resident on the fullest SIMD of a CU when registers and LDS are the only limits.

    A workgroup is resident as a whole, its waves spread over the four SIMDs. So eight waves per workgroup (two per
    SIMD) with registers for three waves make two, and LDS counts in workgroups per CU. With fewer than four waves
    on the CU some SIMDs hold none; the figure is then 1.

    Args:
        vgpr: registers per lane, AGPRs included, as allocated (`IsaRow.vgprs_allocated`).
        lds: bytes per workgroup.
        num_warps: waves per workgroup.
        sgpr: scalar registers per wave; 0 leaves them out of account.

    Returns:
        Waves per SIMD; 0 when not even one workgroup fits.
    """
    caps = arch_caps(arch)
    if lds < 0:
        raise ValueError(f"lds: expected at least 0 bytes, got {lds}")
    if not 1 <= num_warps <= MAX_WARPS:
        raise ValueError(f"num_warps: expected 1 to {MAX_WARPS} waves per workgroup, got {num_warps}")
    workgroups = register_waves(vgpr, arch, sgpr) * caps.simds_per_cu // num_warps
    if lds:
        workgroups = min(workgroups, caps.lds_bytes // _round_up(lds, caps.lds_granule))
    return -(-workgroups * num_warps // caps.simds_per_cu)


def check_caps(rows: Sequence[IsaRow]) -> list[str]:
    """One line per cap that a row violates: VGPR spills, scratch, LDS. An empty list means all are met."""
    lines = []
    for row in rows:
        caps = arch_caps(row.arch)
        limits = (
            ("VGPR spills", row.vgpr_spills, 0),
            ("bytes of scratch per lane", row.scratch, 0),
            ("bytes of LDS", row.lds, caps.lds_bytes),
        )
        lines += [
            f"{row.kernel} [{row.shape}] on {row.arch}: {value:,} {what}, cap {cap:,}"
            for what, value, cap in limits
            if value > cap
        ]
    return lines


def compile_rows(requests: Sequence[CompileRequest], archs: Sequence[str] = ARCHS) -> list[IsaRow]:
    """Cross-compile every request for every architecture, in one child process per architecture.

    Args:
        requests: kernels at launch shapes.
        archs: from `ARCHS`.

    Returns:
        Rows, requests outermost.

    Raises:
        ValueError: unknown architecture, or a request that does not fit the kernel it names.
        IsaCompileError: the compiler failed; the message names kernel, shape, architecture and its last lines.
    """
    if isinstance(archs, str):
        raise TypeError(f"archs: expected a sequence of architecture names, got the string {archs!r}")
    if not archs:
        raise ValueError(f"archs: expected at least one of {', '.join(_CAPS)}, got none")
    for arch in archs:
        arch_caps(arch)
    return [
        row_from_amdgcn(
            answer["assembly"],
            kernel=request.kernel,
            shape=request.shape,
            arch=arch,
            lds=answer["lds"],
            num_warps=answer["num_warps"],
            triton=answer["triton"],
        )
        for request, arch, answer in _compile(requests, archs)
    ]


def amdgcn(request: CompileRequest, arch: str) -> str:
    """The assembly text of one request, for reading. Raises as `compile_rows`."""
    arch_caps(arch)
    ((_, _, answer),) = _compile([request], [arch])
    return answer["assembly"]


def row_from_amdgcn(
    assembly: str, *, kernel: str, shape: str, arch: str, lds: int, num_warps: int, triton: str
) -> IsaRow:
    """Read a row off the assembly text of one kernel.

    Args:
        assembly: text as LLVM prints it, with its ``.amdgpu_metadata`` section.
        lds: bytes per workgroup, which the text does not hold (Triton asks for it at launch).

    Raises:
        ValueError: the text is for another architecture, or a figure is missing or there more than once.
    """
    target = _metadata(assembly, "amdhsa.target", r"(\S+)")
    # The processor ends the triple, and features may follow: amdgcn-amd-amdhsa--gfx942:xnack+. Triton 3.9's LLVM writes
    # amdgpu9.42-amd-amdhsa-unknown-gfx942.
    if target.partition(":")[0].rpartition("-")[2] != arch:
        raise ValueError(f"assembly: expected code for {arch}, got target {target}")
    counts = {
        name: int(_metadata(assembly, f".{key}", r"(\d+)"))
        for name, key in (
            ("vgpr", "vgpr_count"),
            ("agpr", "agpr_count"),
            ("sgpr", "sgpr_count"),
            ("vgpr_spills", "vgpr_spill_count"),
            ("sgpr_spills", "sgpr_spill_count"),
            ("scratch", "private_segment_fixed_size"),
        )
    }
    allocated = int(_one(assembly, r"[ \t]*\.amdhsa_next_free_vgpr[ \t]+(\d+)", ".amdhsa_next_free_vgpr"))
    # A mnemonic stands alone on its line or is followed by operands; labels end in ':' and directives start with '.'.
    mnemonics = Counter(re.findall(r"^[ \t]*([a-z]\w*)(?=[ \t]|$)", assembly, re.MULTILINE))
    mfma_kinds = {name: mnemonics[name] for name in sorted(mnemonics) if name.startswith("v_mfma_")}

    def starting_with(prefix: str) -> int:
        return sum(count for name, count in mnemonics.items() if name.startswith(prefix))

    return IsaRow(
        kernel=kernel,
        arch=arch,
        shape=shape,
        **counts,
        lds=lds,
        waves_per_simd=waves_per_simd(allocated, lds, num_warps, arch, counts["sgpr"]),
        mfma=sum(mfma_kinds.values()),
        ds_reads=starting_with("ds_read"),
        ds_writes=starting_with("ds_write"),
        global_loads=starting_with("global_load_"),
        buffer_loads=starting_with("buffer_load_"),
        mfma_kinds=mfma_kinds,
        num_warps=num_warps,
        vgprs_allocated=allocated,
        triton=triton,
    )


def _round_up(value: int, granule: int) -> int:
    return -(-value // granule) * granule


def _metadata(assembly: str, key: str, value: str) -> str:
    """The value of a key in the YAML-like metadata section; the first key of a kernel follows a list dash."""
    return _one(assembly, rf"[ \t]*(?:- )?{re.escape(key)}:[ \t]+{value}", key)


def _one(assembly: str, line: str, name: str) -> str:
    """The group of the one line that matches; more than one would mean more than one kernel."""
    found = re.findall(rf"^{line}$", assembly, re.MULTILINE)
    if len(found) != 1:
        raise ValueError(f"assembly: expected one kernel with one {name} entry, got {len(found)} entries")
    return found[0]


def _compile(
    requests: Sequence[CompileRequest], archs: Sequence[str]
) -> list[tuple[CompileRequest, str, dict[str, Any]]]:
    """Compile each request for each architecture; return what the children answered, or raise for what failed."""
    if not requests:
        return []
    by_arch = {arch: _run_child(requests, arch) for arch in archs}
    outcomes = [(request, arch, by_arch[arch][i]) for i, request in enumerate(requests) for arch in archs]
    failures = [outcome for _, _, outcome in outcomes if isinstance(outcome, CompileFailure)]
    if misfits := [str(failure) for failure in failures if failure.misfit]:
        raise ValueError("\n".join(misfits))
    if failures:
        raise IsaCompileError(failures)
    return [(request, arch, outcome) for request, arch, outcome in outcomes if isinstance(outcome, dict)]


def _run_child(requests: Sequence[CompileRequest], arch: str) -> list[dict[str, Any] | CompileFailure]:
    """Have one child compile the requests for one architecture; one outcome per request."""
    jobs = [
        {
            "module": request.module,
            "function": request.function,
            "signature": dict(request.signature),
            "constexprs": dict(request.constexprs),
            "num_warps": request.num_warps,
            "num_stages": request.num_stages,
            "options": dict(request.options),
            "divisible_by_16": sorted(request.divisible_by_16),
            "within_2gb": sorted(request.within_2gb),
            "arch": arch,
            "wave_size": arch_caps(arch).wave_size,
        }
        for request in requests
    ]
    child = subprocess.run(
        # -P: a folder named like a library in the current directory must not shadow it.
        [sys.executable, "-P", "-m", "dsv4ref.evidence.isa_worker"],
        input=json.dumps(jobs),
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        env=_child_environment(),
        check=False,
    )
    answers = [json.loads(line) for line in child.stdout.splitlines()]
    # What the child printed before the first job, then during each job that it began.
    preamble, *printed = re.split(rf"^{JOB_MARK}\d+\n", child.stderr, flags=re.MULTILINE)
    if not printed:
        raise RuntimeError(f"the compiling process did not start: {_exit_text(child)}\n{_last_lines(preamble)}")

    outcomes: list[dict[str, Any] | CompileFailure] = []
    for index, request in enumerate(requests):
        if index < len(answers) and answers[index]["ok"]:
            outcomes.append(answers[index])
            continue
        misfit = False
        if index < len(answers):
            misfit = answers[index]["kind"] == "request"
            message = "\n".join(filter(None, (_last_lines(answers[index]["error"]), _last_lines(printed[index]))))
        elif index == len(answers):
            # LLVM aborts the process on errors that it calls fatal.
            message = f"the compiling process died: {_exit_text(child)}\n{_last_lines(printed[-1])}"
        else:
            message = "not tried: the compiling process died on an earlier request"
        outcomes.append(CompileFailure(request.kernel, request.shape, arch, message, misfit))
    return outcomes


def _child_environment() -> dict[str, str]:
    """This process's environment, changed so that the child imports the same modules and really compiles."""
    environment = dict(os.environ)
    environment["TRITON_INTERPRET"] = "0"
    environment["PYTHONPATH"] = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    # These two would compile for another GPU than the row says, or keep the assembly text out of Triton's cache.
    for name in ("TRITON_OVERRIDE_ARCH", "TRITON_STORE_BINARY_ONLY"):
        environment.pop(name, None)
    return environment


def _exit_text(child: subprocess.CompletedProcess[str]) -> str:
    if child.returncode < 0:
        return f"signal {signal.Signals(-child.returncode).name}"
    return f"exit status {child.returncode}"


def _last_lines(text: str) -> str:
    """The end of what the compiler said, with the lines that say "error" kept if they stand further up."""
    text = _REPRODUCER.sub("", text)
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    head = [line for line in lines[:-MESSAGE_LINES] if "error:" in line.lower()]
    return "\n".join(head[:MESSAGE_LINES] + lines[-MESSAGE_LINES:])
