"""What this machine is: published figures of the cards in the book, the live card, and which packages are genuine.

``KNOWN_DEVICES`` holds what vendors publish, each figure with its source; ``current`` reads the live machine from
torch; ``capabilities`` names what can run here; ``unrelated_packages`` finds PyPI packages that only share a name with
AITER or triton_kernels, without importing them; ``doctor_card`` is all of it as plain data.

Units: bytes, TB/s (10^12 bytes), TFLOP/s (10^12, dense, a multiply-add counts as two). Compute unit (CU) means SM, wave
means warp and LDS means shared memory on NVIDIA cards.
"""

from __future__ import annotations

import ctypes
import difflib
import importlib
import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import torch

Backend: TypeAlias = Literal["cuda", "rocm", "cpu"]
Verdict: TypeAlias = Literal["genuine", "unrelated", "absent"]

KIB, MIB, GIB = 2**10, 2**20, 2**30


@dataclass(frozen=True, kw_only=True)
class DeviceSpec:
    """Published figures of one card. None means the card has no such thing, or nobody published it.

    Args:
        key: short name, as records and tables use it.
        arch: compiler target, ``gfx942`` or ``sm_90`` style.
        compute_units: CUs or SMs of the whole card; ``xcds`` dies share them, each with an L2 of its own.
        wave_size: lanes of a wave; ``simds_per_cu`` and ``max_waves_per_simd`` bound occupancy.
        lds_bytes: LDS of one CU; ``lds_bytes_per_workgroup`` is what one workgroup may take of it.
        register_file_bytes: vector registers of one CU.
        l2_bytes: all L2 together; ``mall_bytes`` is the last-level Infinity Cache behind it.
        bandwidth_tb_s: peak memory bandwidth.
        matrix_shapes: the dense matrix instructions with fp32 sums and the largest K, ``"bf16 16x16x16"`` (M x N x K).
        bf16_tflops: peak dense matrix rate in bf16; likewise fp8 and fp4.
        clock_mhz: peak engine clock that the matrix rates assume.
        fp8_dialect: e4m3 encoding of the matrix units, ``e4m3fn`` or ``e4m3fnuz``.
        sources: field name -> where the figure comes from; every figure has one.
    """

    key: str
    name: str
    vendor: str
    arch: str
    compute_units: int | None = None
    xcds: int | None = None
    wave_size: int | None = None
    simds_per_cu: int | None = None
    max_waves_per_simd: int | None = None
    lds_bytes: int | None = None
    lds_bytes_per_workgroup: int | None = None
    register_file_bytes: int | None = None
    l2_bytes: int | None = None
    mall_bytes: int | None = None
    hbm_bytes: int | None = None
    bandwidth_tb_s: float | None = None
    matrix_shapes: tuple[str, ...] | None = None
    bf16_tflops: float | None = None
    fp8_tflops: float | None = None
    fp4_tflops: float | None = None
    clock_mhz: float | None = None
    fp8_dialect: str | None = None
    sources: Mapping[str, str] = field(compare=False, repr=False)

    def __post_init__(self) -> None:
        given = {f.name for f in fields(self) if f.default is None and getattr(self, f.name) is not None}
        if given != set(self.sources):
            raise ValueError(
                f"sources: figures without a source {sorted(given - set(self.sources))}, sources without a figure "
                f"{sorted(set(self.sources) - given)}; expected one source for each figure"
            )


def _sources(groups: Mapping[str, str]) -> Mapping[str, str]:
    """``{"field field": source}`` -> ``{field: source}``."""
    return {name: source for names, source in groups.items() for name in names.split()}


_ROCM_TABLE = "AMD ROCm documentation, GPU hardware specifications"
_LLVM = "LLVM AMDGPU backend, subtarget limits of gfx90a and later"
_MFMA = "LLVM AMDGPU backend, VOP3PInstructions.td: V_MFMA_F32_*"
_DATA_TYPES = "AMD ROCm documentation, data types and precision support"
_HOPPER = "NVIDIA, Tuning CUDA applications for the Hopper architecture"

# What both generations share: eight dies with 4 MiB of L2 each behind 256 MiB of Infinity Cache, and the wave limits.
_CDNA: dict[str, Any] = {
    "vendor": "amd",
    "xcds": 8,
    "wave_size": 64,
    "simds_per_cu": 4,
    "max_waves_per_simd": 8,
    "register_file_bytes": 512 * KIB,
    "l2_bytes": 32 * MIB,
    "mall_bytes": 256 * MIB,
}
_CDNA_SOURCES = {
    "compute_units xcds wave_size lds_bytes register_file_bytes l2_bytes mall_bytes hbm_bytes": _ROCM_TABLE,
    "simds_per_cu max_waves_per_simd lds_bytes_per_workgroup": _LLVM,
    "matrix_shapes": _MFMA,
    "fp8_dialect": _DATA_TYPES,
}

_SPECS = (
    DeviceSpec(
        key="mi300x",
        name="AMD Instinct MI300X",
        **_CDNA,
        arch="gfx942",
        compute_units=304,
        lds_bytes=64 * KIB,
        lds_bytes_per_workgroup=64 * KIB,
        hbm_bytes=192 * GIB,
        bandwidth_tb_s=5.3,
        matrix_shapes=("bf16 16x16x16", "bf16 32x32x8", "FP8 16x16x32", "FP8 32x32x16"),
        bf16_tflops=1307.4,
        fp8_tflops=2614.9,
        clock_mhz=2100.0,
        fp8_dialect="e4m3fnuz",
        sources=_sources(
            {
                **_CDNA_SOURCES,
                "bandwidth_tb_s bf16_tflops fp8_tflops clock_mhz": "AMD Instinct MI300X data sheet",
            }
        ),
    ),
    DeviceSpec(
        key="mi355x",
        name="AMD Instinct MI355X",
        **_CDNA,
        arch="gfx950",
        compute_units=256,
        lds_bytes=160 * KIB,
        lds_bytes_per_workgroup=160 * KIB,
        hbm_bytes=288 * GIB,
        bandwidth_tb_s=8.0,
        matrix_shapes=("bf16 16x16x32", "bf16 32x32x16", "FP8, FP6, FP4 16x16x128", "FP8, FP6, FP4 32x32x64"),
        bf16_tflops=2516.6,
        fp8_tflops=5033.2,
        fp4_tflops=10066.3,
        clock_mhz=2400.0,
        fp8_dialect="e4m3fn",
        sources=_sources(
            {
                **_CDNA_SOURCES,
                "bandwidth_tb_s clock_mhz": "AMD Instinct MI355X product page",
                "bf16_tflops fp8_tflops fp4_tflops": "AMD Instinct MI355X product page, there rounded to 2.5, 5 and "
                "10.1 PFLOPS; unrounded: 256 CUs x 4096, 8192 and 16384 FLOP per clock x 2.4 GHz",
            }
        ),
    ),
    DeviceSpec(
        key="h200",
        name="NVIDIA H200 SXM",
        vendor="nvidia",
        arch="sm_90",
        compute_units=132,
        wave_size=32,
        simds_per_cu=4,
        max_waves_per_simd=16,
        lds_bytes=228 * KIB,
        lds_bytes_per_workgroup=227 * KIB,
        register_file_bytes=256 * KIB,
        l2_bytes=60 * MIB,
        hbm_bytes=141 * GIB,
        bandwidth_tb_s=4.8,
        matrix_shapes=("bf16 64xNx16", "FP8 64xNx32", "N a multiple of 8 up to 256"),
        bf16_tflops=989.5,
        fp8_tflops=1979.0,
        fp8_dialect="e4m3fn",
        sources=_sources(
            {
                "wave_size simds_per_cu max_waves_per_simd": _HOPPER,
                "lds_bytes lds_bytes_per_workgroup register_file_bytes": _HOPPER,
                "compute_units l2_bytes": "CUDA driver, device properties of an H200 SXM",
                "hbm_bytes bandwidth_tb_s": "NVIDIA H200 data sheet (141 GB, 4.8 TB/s)",
                "bf16_tflops fp8_tflops": "NVIDIA H200 data sheet: 1,979 and 3,958 with sparsity, halved for dense",
                "matrix_shapes": "NVIDIA PTX ISA, wgmma.mma_async",
                "fp8_dialect": "NVIDIA PTX ISA, e4m3 alternate floating-point format",
            }
        ),
    ),
    DeviceSpec(key="cpu", name="CPU", vendor="host", arch="cpu", sources={}),
)

KNOWN_DEVICES: Mapping[str, DeviceSpec] = MappingProxyType({spec.key: spec for spec in _SPECS})

# What the driver calls a whole card of each kind. The NVL board is an H200 with other clocks.
_LIVE_NAMES: Mapping[str, str] = {"mi300x": r"\bMI300X\b", "mi355x": r"\bMI355X\b", "h200": r"\bH200\b(?!.*\bNVL\b)"}


def get_device(key: str) -> DeviceSpec:
    """The spec with this key.

    Raises:
        ValueError: no such key; the message names the nearest one.
    """
    spec = KNOWN_DEVICES.get(key)
    if spec is None:
        close = difflib.get_close_matches(key.lower(), KNOWN_DEVICES, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"key: no device is called {key!r}; {hint}Known: {', '.join(KNOWN_DEVICES)}")
    return spec


def native_dialect(arch: str) -> str | None:
    """The e4m3 encoding that an architecture's matrix units read.

    Args:
        arch: ``gfx942`` (feature suffixes such as ``:sramecc+`` allowed), ``sm_90`` or ``cpu``.

    Returns:
        ``"e4m3fn"``, ``"e4m3fnuz"``, or None where no native FP8 is known.

    Raises:
        ValueError: ``arch`` is none of these forms.
    """
    base = arch.split(":")[0]
    if match := re.fullmatch(r"sm_(\d+)[af]?", base):
        return "e4m3fn" if int(match[1]) >= 89 else None
    if re.fullmatch(r"gfx[0-9a-f]+", base):
        if base in ("gfx940", "gfx941", "gfx942"):
            return "e4m3fnuz"
        return "e4m3fn" if base in ("gfx950", "gfx1200", "gfx1201", "gfx1250") else None
    if base == "cpu":
        return None
    raise ValueError(f"arch: got {arch!r}, expected gfxNNN, sm_NN or cpu")


def match_spec(name: str, arch: str, compute_units: int) -> DeviceSpec | None:
    """The spec that a live card answers to, or None: an unknown card, or a partition of a known one.

    Args:
        name: the card as its driver names it.
        arch: its architecture, without feature suffixes.
        compute_units: compute units the driver shows; a partition (MIG, CPX) shows fewer and is not the card.
    """
    spec = _named_spec(name, arch)
    return spec if spec is not None and spec.compute_units == compute_units else None


def _named_spec(name: str, arch: str) -> DeviceSpec | None:
    for key, pattern in _LIVE_NAMES.items():
        if KNOWN_DEVICES[key].arch == arch and re.search(pattern, name):
            return KNOWN_DEVICES[key]
    return None


# --- the live machine -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine this process runs on; every value was read live, None where the driver does not tell.

    ``spec`` is the published card when it is recognised. ``runtime`` is the CUDA or HIP version torch was built with,
    ``driver`` the kernel driver's version. On a machine without a GPU the compute units are the CPUs this process may
    use and the memory is the host's.
    """

    backend: Backend
    spec: DeviceSpec | None
    name: str
    arch: str
    device_count: int
    compute_units: int
    wave_size: int | None
    memory_bytes: int
    l2_bytes: int | None
    lds_bytes: int | None
    fp8_dialect: str | None
    driver: str | None
    runtime: str | None
    torch: str
    triton: str | None
    python: str
    system: str

    @property
    def key(self) -> str:
        """The spec's key; for an unrecognised card its name in lower case with dashes."""
        return self.spec.key if self.spec else re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")

    @property
    def torch_device(self) -> str:
        """``"cuda"`` (also on ROCm) or ``"cpu"``."""
        return "cpu" if self.backend == "cpu" else "cuda"


def current(index: int | None = None) -> Machine:
    """Reads the machine: the given GPU, or torch's current one, or the CPU when torch sees no GPU.

    Args:
        index: torch's number of the GPU.

    Raises:
        ValueError: ``index`` names a GPU that torch does not see.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index is not None and not 0 <= index < count:
        raise ValueError(
            f"index: got {index}, expected 0 to {count - 1}" if count else f"index: got {index}, no GPU here"
        )
    if count == 0:
        return _cpu_machine()
    return _gpu_machine(torch.cuda.get_device_properties(index), rocm=torch.version.hip is not None, count=count)


def _software() -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "triton": _triton_version(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu_machine() -> Machine:
    return Machine(
        backend="cpu",
        spec=KNOWN_DEVICES["cpu"],
        name=_cpu_name(Path("/proc/cpuinfo")),
        arch="cpu",
        device_count=0,
        compute_units=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        wave_size=None,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        l2_bytes=None,
        lds_bytes=None,
        fp8_dialect=None,
        driver=None,
        runtime=torch.version.hip or torch.version.cuda,
        **_software(),
    )


def _gpu_machine(properties: Any, *, rocm: bool, count: int) -> Machine:
    """``properties`` is torch's device-properties object; older builds lack some of its attributes."""
    arch = properties.gcnArchName.split(":")[0] if rocm else f"sm_{properties.major}{properties.minor}"
    units = properties.multi_processor_count
    return Machine(
        backend="rocm" if rocm else "cuda",
        spec=match_spec(properties.name, arch, units),
        name=properties.name,
        arch=arch,
        device_count=count,
        compute_units=units,
        wave_size=getattr(properties, "warp_size", None),
        memory_bytes=properties.total_memory,
        l2_bytes=getattr(properties, "L2_cache_size", None),
        lds_bytes=getattr(properties, "shared_memory_per_multiprocessor", None),
        fp8_dialect=native_dialect(arch),
        driver=_amd_driver(Path("/sys/module/amdgpu/version"))
        if rocm
        else _nvidia_driver(Path("/proc/driver/nvidia/version")),
        runtime=torch.version.hip if rocm else torch.version.cuda,
        **_software(),
    )


def _cpu_name(cpuinfo: Path) -> str:
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.machine()


def _nvidia_driver(version_file: Path) -> str | None:
    if version_file.exists():
        match = re.search(r"Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", version_file.read_text())
        return match[1] if match else None
    return _nvml_driver_version()


def _nvml_driver_version() -> str | None:
    """The driver's version from NVML, for containers that hide /proc/driver."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    if nvml.nvmlInit_v2() != 0:
        return None
    text = ctypes.create_string_buffer(96)
    failed = nvml.nvmlSystemGetDriverVersion(text, len(text))
    nvml.nvmlShutdown()
    return None if failed else text.value.decode()


def _amd_driver(version_file: Path) -> str | None:
    # The driver inside the Linux kernel carries no version of its own; only AMD's separate package does.
    return version_file.read_text().strip() if version_file.exists() else None


def _triton_version() -> str | None:
    """Version of the installed Triton without importing it (importing fixes TRITON_INTERPRET for kernels)."""
    spec = _locate("triton", None)
    if spec is None:
        return None
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm"):
        found = _distribution_version(name, None)
        if found:
            return found
    match = re.search(r"""__version__\s*=\s*['"]([^'"]+)""", Path(spec.origin).read_text()) if spec.origin else None
    return match[1] if match else "unknown"


# --- packages that only share a name ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class PackageCheck:
    """What answers to an import name: ``verdict``, where it lies, what was found, and what to install instead."""

    package: str
    verdict: Verdict
    location: str | None
    distribution: str | None
    found: str
    install: str | None


@dataclass(frozen=True)
class _Signature:
    """Files that tell two packages of one name apart: all of ``genuine`` (each a choice), none of ``foreign``."""

    package: str
    genuine: tuple[tuple[str, ...], ...]
    foreign: tuple[str, ...]
    is_genuine: str
    is_foreign: str
    distributions: tuple[str, ...]
    install: str


_SIGNATURES = (
    _Signature(
        package="aiter",
        genuine=(("ops",), ("jit/core.py",)),
        foreign=("map_aiter.py", "iter_to_aiter.py", "join_aiters.py"),
        is_genuine="AMD's AITER (has ops/ and jit/)",
        is_foreign="the asynchronous-iterator library that PyPI calls aiter",
        distributions=("amd-aiter", "aiter"),
        install="git clone --recursive https://github.com/ROCm/aiter && cd aiter && python3 setup.py develop",
    ),
    _Signature(
        package="triton_kernels",
        genuine=(("matmul.py", "matmul_ogs.py"), ("numerics_details",)),
        foreign=("add_vectors.py", "utils/kernel_mapper.py"),
        is_genuine="Triton's own triton_kernels (has a matmul module and numerics_details/)",
        is_foreign="the kernel collection that PyPI calls triton-kernels",
        distributions=("triton-kernels",),
        install="git clone https://github.com/triton-lang/triton && pip install triton/python/triton_kernels",
    ),
)


def unrelated_packages(path: Sequence[str] | None = None) -> list[PackageCheck]:
    """Tells genuine AITER and triton_kernels from PyPI packages of the same name, without importing anything.

    PyPI's ``aiter`` (0.13.20191203) is an asynchronous-iterator library and its ``triton-kernels`` (0.1.0) a small
    kernel collection; the genuine ones come from the ROCm/aiter and triton-lang/triton repositories. The files of a
    package decide, not its metadata: a source checkout has none.

    Args:
        path: folders to look in, in order; Python's own import path when None.

    Returns:
        One row for each name, and one for the copy of triton_kernels inside vLLM when vLLM is installed.
    """
    importlib.invalidate_caches()
    checks = [_check_package(signature, path) for signature in _SIGNATURES]
    vllm = _package_folders(_locate("vllm", path))
    if vllm:
        bundled = [folder / "third_party" / "triton_kernels" for folder in vllm]
        checks.append(_judge(replace(_SIGNATURES[1], package="vllm.third_party.triton_kernels"), bundled, None))
    return checks


def _check_package(signature: _Signature, path: Sequence[str] | None) -> PackageCheck:
    spec = _locate(signature.package, path)
    versions = [(name, _distribution_version(name, path)) for name in signature.distributions]
    installed = ", ".join(f"{name} {version}" for name, version in versions if version) or None
    if spec is not None and not spec.submodule_search_locations:
        found = "a single module, no package"
        return PackageCheck(signature.package, "unrelated", spec.origin, installed, found, signature.install)
    check = _judge(signature, _package_folders(spec), installed)
    if check.verdict == "unrelated" and spec is not None and spec.origin is None:
        return replace(check, found="a folder of that name without __init__.py, no package")
    return check


def _judge(signature: _Signature, folders: Sequence[Path], installed: str | None) -> PackageCheck:
    present = [folder for folder in folders if folder.is_dir()]
    if not present:
        return PackageCheck(signature.package, "absent", None, installed, "not installed", signature.install)
    foreign = [name for name in signature.foreign if any((folder / name).exists() for folder in present)]
    genuine = all(
        any((folder / name).exists() for folder in present for name in choice) for choice in signature.genuine
    )
    where = str(present[0])
    if genuine and not foreign:
        return PackageCheck(signature.package, "genuine", where, installed, signature.is_genuine, None)
    if genuine:
        found = f"files of two packages in one folder ({', '.join(foreign)} came from the other); remove it first"
    elif foreign:
        found = f"{signature.is_foreign} (has {foreign[0]})"
    else:
        found = f"an unknown package: not {signature.is_genuine}"
    return PackageCheck(signature.package, "unrelated", where, installed, found, signature.install)


def _locate(package: str, path: Sequence[str] | None) -> ModuleSpec | None:
    """Where a top-level import would be found; runs no code of the package and ignores what is imported already."""
    if path is not None:
        return PathFinder.find_spec(package, list(path))
    for finder in sys.meta_path:
        spec = finder.find_spec(package, None)
        if spec is not None:
            return spec
    return None


def _package_folders(spec: ModuleSpec | None) -> list[Path]:
    return [Path(folder) for folder in spec.submodule_search_locations or ()] if spec is not None else []


def _distribution_version(name: str, path: Sequence[str] | None) -> str | None:
    where = sys.path if path is None else list(path)
    return next((found.version for found in importlib.metadata.distributions(name=name, path=where)), None)


# --- capabilities -----------------------------------------------------------------------------------------------------

# The vocabulary of a notebook's ``requires`` list and of chapter headers.
CAPABILITIES: Mapping[str, str] = MappingProxyType(
    {
        "cpu-interpreter": "Triton kernels run in Triton's CPU interpreter: Linux with Triton installed",
        "gpu": "torch sees a GPU of any vendor",
        "cuda": "torch sees an NVIDIA GPU",
        "rocm": "torch sees an AMD GPU",
        "sm_90": "the GPU is an NVIDIA Hopper (H100, H200)",
        "gfx942": "the GPU is an AMD CDNA 3 (MI300X, MI325X)",
        "gfx950": "the GPU is an AMD CDNA 4 (MI350X, MI355X)",
        "aiter": "genuine AITER is installed and torch sees an AMD GPU, without which it does not import",
        "triton_kernels": "Triton's own triton_kernels is installed and torch sees a GPU",
    }
)


def capabilities(machine: Machine | None = None, packages: Iterable[PackageCheck] | None = None) -> frozenset[str]:
    """What can run here, in the words of ``CAPABILITIES``.

    Args:
        machine: the machine to judge; ``current()`` when None.
        packages: its package rows; ``unrelated_packages()`` when None.
    """
    machine = current() if machine is None else machine
    rows = unrelated_packages() if packages is None else packages
    found = {machine.arch} & set(CAPABILITIES)
    if machine.triton is not None and machine.system.startswith("Linux"):
        found.add("cpu-interpreter")
    if machine.backend != "cpu":
        found |= {"gpu", machine.backend}
        genuine = {row.package for row in rows if row.verdict == "genuine"}
        found |= genuine & ({"aiter", "triton_kernels"} if machine.backend == "rocm" else {"triton_kernels"})
    return frozenset(found)


def unmet(requires: Iterable[str], have: Iterable[str] | None = None) -> tuple[str, ...]:
    """The capabilities of ``requires`` that are missing here, in their order.

    Args:
        requires: names from ``CAPABILITIES``.
        have: what there is; ``capabilities()`` when None.

    Raises:
        ValueError: a name is not in ``CAPABILITIES``: a misspelt requirement would skip for ever.
    """
    wanted = list(requires)
    for name in wanted:
        if name not in CAPABILITIES:
            close = difflib.get_close_matches(name, CAPABILITIES, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(CAPABILITIES)}"
            raise ValueError(f"requires: no capability is called {name!r}; {hint}")
    present = capabilities() if have is None else frozenset(have)
    return tuple(name for name in wanted if name not in present)


def doctor_card() -> dict[str, Any]:
    """The machine, its published card, capabilities, package checks and remarks, as plain data for JSON or a table."""
    machine = current()
    packages = unrelated_packages()
    card = asdict(machine)
    spec = card.pop("spec")
    return {
        "machine": {"key": machine.key, **card},
        "spec": spec,
        "capabilities": sorted(capabilities(machine, packages)),
        "packages": [asdict(row) for row in packages],
        "notes": _notes(machine, _driver_without_torch()),
    }


def _driver_without_torch() -> str | None:
    """The vendor whose kernel driver is loaded."""
    if Path("/proc/driver/nvidia/version").exists():
        return "NVIDIA"
    return "AMD" if Path("/dev/kfd").exists() else None


def _notes(machine: Machine, driver_vendor: str | None) -> list[str]:
    if machine.backend == "cpu":
        if driver_vendor is None:
            return []
        build = "is a CPU build" if machine.runtime is None else f"was built for {machine.runtime} and sees no GPU"
        return [f"An {driver_vendor} driver is loaded, but torch {machine.torch} {build}."]
    if machine.spec is not None:
        return []
    whole = _named_spec(machine.name, machine.arch)
    if whole is not None:
        return [
            f"{machine.name} shows {machine.compute_units} of {whole.compute_units} compute units, a partition: the "
            f"figures of {whole.key} do not apply."
        ]
    return [f"{machine.name} ({machine.arch}) is not in KNOWN_DEVICES: measure its roofs, there are no published ones."]
