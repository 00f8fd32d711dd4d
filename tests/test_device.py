"""Published cards, the live machine, packages that only share a name, and the capability vocabulary."""

import json
import math
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dsv4ref import device
from dsv4ref.device import CAPABILITIES, KNOWN_DEVICES, DeviceSpec, Machine, PackageCheck

MI300X, MI355X, H200 = (KNOWN_DEVICES[key] for key in ("mi300x", "mi355x", "h200"))

# --- published figures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "rates"),
    [
        (MI300X, {"bf16": 2048, "fp8": 4096}),
        (MI355X, {"bf16": 4096, "fp8": 8192, "fp4": 16384}),
    ],
    ids=["mi300x", "mi355x"],
)
def test_published_matrix_rates_are_units_times_flop_per_clock_times_clock(
    spec: DeviceSpec, rates: dict[str, int]
) -> None:
    assert spec.compute_units is not None
    assert spec.clock_mhz is not None
    for dtype, per_clock in rates.items():
        tflops = spec.compute_units * per_clock * spec.clock_mhz * 1e6 / 1e12
        published = getattr(spec, f"{dtype}_tflops")
        assert math.isclose(published, tflops, rel_tol=5e-5), f"{dtype}: published {published}, computed {tflops}"


def test_cards_differ_where_the_chapters_say_they_do() -> None:
    assert [s.compute_units for s in (MI300X, MI355X, H200)] == [304, 256, 132]
    assert [s.lds_bytes_per_workgroup for s in (MI300X, MI355X, H200)] == [65536, 163840, 232448]
    assert [s.wave_size for s in (MI300X, MI355X, H200)] == [64, 64, 32]
    assert [s.bandwidth_tb_s for s in (MI300X, MI355X, H200)] == [5.3, 8.0, 4.8]
    assert [s.fp4_tflops is not None for s in (MI300X, MI355X, H200)] == [False, True, False]
    assert H200.fp8_tflops == 2 * (H200.bf16_tflops or 0)


@pytest.mark.parametrize("spec", KNOWN_DEVICES.values(), ids=KNOWN_DEVICES)
def test_dialect_of_a_card_is_its_architectures(spec: DeviceSpec) -> None:
    assert spec.fp8_dialect == device.native_dialect(spec.arch)


def test_every_figure_needs_a_source_and_every_source_a_figure() -> None:
    with pytest.raises(ValueError, match=r"figures without a source \['wave_size'\]"):
        DeviceSpec(key="x", name="X", vendor="amd", arch="gfx942", wave_size=64, sources={})
    with pytest.raises(ValueError, match=r"sources without a figure \['fp4_tflops'\]"):
        DeviceSpec(key="x", name="X", vendor="amd", arch="gfx942", sources={"fp4_tflops": "data sheet"})


def test_unknown_device_key_names_the_nearest() -> None:
    assert device.get_device("mi355x") is MI355X
    with pytest.raises(ValueError, match=r"no device is called 'MI350X'; did you mean 'mi3(55|00)x'\?"):
        device.get_device("MI350X")


@pytest.mark.parametrize(
    ("arch", "dialect"),
    [
        ("gfx942", "e4m3fnuz"),
        ("gfx942:sramecc+:xnack-", "e4m3fnuz"),
        ("gfx950", "e4m3fn"),
        ("sm_90", "e4m3fn"),
        ("sm_90a", "e4m3fn"),
        ("sm_89", "e4m3fn"),
        ("sm_100", "e4m3fn"),
        ("sm_80", None),
        ("gfx90a", None),
        ("cpu", None),
    ],
)
def test_native_dialect(arch: str, dialect: str | None) -> None:
    assert device.native_dialect(arch) == dialect


@pytest.mark.parametrize("arch", ["", "MI300X", "sm90", "x86_64"])
def test_native_dialect_refuses_what_is_no_architecture(arch: str) -> None:
    with pytest.raises(ValueError, match="expected gfxNNN, sm_NN or cpu"):
        device.native_dialect(arch)


# --- the live machine -------------------------------------------------------------------------------------------------


def _properties(**changes: object) -> SimpleNamespace:
    """What torch's properties object holds on an MI300X; a stand-in, since no test machine has one."""
    values = {
        "name": "AMD Instinct MI300X",
        "gcnArchName": "gfx942:sramecc+:xnack-",
        "major": 9,
        "minor": 4,
        "multi_processor_count": 304,
        "total_memory": 206141652992,
        "L2_cache_size": 4194304,
        "warp_size": 64,
    }
    return SimpleNamespace(**(values | changes))


def _machine(**changes: object) -> Machine:
    return device._gpu_machine(_properties(**changes), rocm=True, count=8)


def test_amd_card_is_recognised_from_its_properties() -> None:
    machine = _machine()
    assert (machine.backend, machine.key, machine.spec) == ("rocm", "mi300x", MI300X)
    assert (machine.arch, machine.fp8_dialect, machine.torch_device) == ("gfx942", "e4m3fnuz", "cuda")
    assert machine.lds_bytes is None, "the properties above hold no LDS size"


@pytest.mark.parametrize(
    ("name", "arch", "units", "key"),
    [
        ("NVIDIA H200", "sm_90", 132, "h200"),
        ("NVIDIA H200 NVL", "sm_90", 132, None),
        ("NVIDIA H200 MIG 1g.18gb", "sm_90", 16, None),
        ("NVIDIA H100 80GB HBM3", "sm_90", 132, None),
        ("NVIDIA GH200 480GB", "sm_90", 132, None),
        ("AMD Instinct MI300X OAM", "gfx942", 304, "mi300x"),
        ("AMD Instinct MI300X", "gfx942", 38, None),
        ("AMD Instinct MI300X", "gfx950", 304, None),
        ("AMD Instinct MI300A", "gfx942", 228, None),
        ("AMD Instinct MI325X", "gfx942", 304, None),
        ("AMD Instinct MI355X", "gfx950", 256, "mi355x"),
    ],
)
def test_only_the_whole_card_of_that_name_matches(name: str, arch: str, units: int, key: str | None) -> None:
    spec = device.match_spec(name, arch, units)
    assert (spec.key if spec else None) == key


def test_partition_and_unknown_card_are_explained() -> None:
    partition = _machine(multi_processor_count=38)
    assert (partition.spec, partition.key) == (None, "amd-instinct-mi300x")
    assert "38 of 304 compute units, a partition" in device._notes(partition, "AMD")[0]
    other = _machine(name="AMD Instinct MI325X")
    assert "not in KNOWN_DEVICES" in device._notes(other, "AMD")[0]
    assert device._notes(_machine(), "AMD") == []


def test_driver_without_a_torch_that_uses_it_is_explained() -> None:
    cpu = device._cpu_machine()
    assert device._notes(cpu, None) == []
    assert "An AMD driver is loaded, but torch" in device._notes(replace(cpu, runtime=None), "AMD")[0]
    assert "is a CPU build" in device._notes(replace(cpu, runtime=None), "NVIDIA")[0]
    assert "was built for 12.8 and sees no GPU" in device._notes(replace(cpu, runtime="12.8"), "NVIDIA")[0]


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023\n", "535.129.03"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (x)\n", "580.95.05"),
        ("something else\n", None),
    ],
)
def test_nvidia_driver_version_is_read_from_proc(tmp_path: Path, text: str, version: str | None) -> None:
    (tmp_path / "version").write_text(text)
    assert device._nvidia_driver(tmp_path / "version") == version


def test_amd_driver_version_is_none_when_the_kernel_has_none(tmp_path: Path) -> None:
    assert device._amd_driver(tmp_path / "version") is None
    (tmp_path / "version").write_text("6.14.14\n")
    assert device._amd_driver(tmp_path / "version") == "6.14.14"


def test_cpu_machine_reads_this_host(tmp_path: Path) -> None:
    machine = device._cpu_machine()
    assert (machine.backend, machine.key, machine.torch_device, machine.arch) == ("cpu", "cpu", "cpu", "cpu")
    assert machine.compute_units >= 1
    assert machine.memory_bytes > 2**28
    assert (machine.torch, machine.python.count(".")) == (torch.__version__, 2)
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\n")
    assert device._cpu_name(tmp_path / "cpuinfo") == "Some CPU @ 2 GHz"
    assert device._cpu_name(tmp_path / "none") != ""


def test_machine_travels_to_another_process() -> None:
    machine = _machine()
    assert pickle.loads(pickle.dumps(machine)) == machine
    assert len({machine, _machine()}) == 1


def test_wrong_gpu_index_is_refused() -> None:
    with pytest.raises(ValueError, match="index: got 99"):
        device.current(99)


def test_import_and_card_leave_triton_unimported() -> None:
    code = (
        "import sys; from dsv4ref import config, device, diagnostics, settings; card = device.doctor_card(); "
        "bad = [n for n in ('triton', 'aiter', 'triton_kernels', 'vllm') if n in sys.modules]; "
        "assert not bad, bad; print(card['machine']['triton'])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert run.returncode == 0, run.stderr
    import triton

    assert run.stdout.strip() == triton.__version__


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: compares the live card with its driver")
def test_live_card_agrees_with_driver_and_published_figures() -> None:
    machine = device.current()
    properties: Any = torch.cuda.get_device_properties()
    assert (machine.name, machine.compute_units) == (properties.name, properties.multi_processor_count)
    assert machine.device_count == torch.cuda.device_count()
    assert machine.driver, "no driver version found"
    assert {"gpu", machine.backend} <= device.capabilities(machine)
    if machine.spec is None:
        pytest.skip(f"{machine.name} has no published spec here: {device._notes(machine, None)}")
    assert machine.spec.arch == machine.arch
    live = {"wave_size": machine.wave_size, "lds_bytes": machine.lds_bytes}
    if machine.backend == "cuda":  # torch on ROCm reports one die's L2 and no register file
        live["l2_bytes"] = machine.l2_bytes
        live["lds_bytes_per_workgroup"] = properties.shared_memory_per_block_optin
        live["register_file_bytes"] = 4 * properties.regs_per_multiprocessor
        transfers = 2 * properties.memory_clock_rate * 1e3
        live_tb_s = transfers * properties.memory_bus_width / 8 / 1e12
        assert live_tb_s == pytest.approx(machine.spec.bandwidth_tb_s, rel=0.01)
    for name, value in live.items():
        published = getattr(machine.spec, name)
        assert value in (None, published), f"{name}: the driver says {value}, the table {published}"
    usable = machine.memory_bytes / (machine.spec.hbm_bytes or 1)
    assert 0.9 < usable <= 1.0, f"the driver shows {usable:.3f} of the published memory"


# --- packages that only share a name ----------------------------------------------------------------------------------

GENUINE = {
    "aiter": ["__init__.py", "ops/attention.py", "jit/core.py", "mla.py"],
    "triton_kernels": ["__init__.py", "matmul_ogs.py", "numerics_details/mxfp.py", "routing.py"],
}
UNRELATED = {
    "aiter": ["__init__.py", "map_aiter.py", "iter_to_aiter.py", "join_aiters.py", "azip.py"],
    "triton_kernels": ["__init__.py", "add_vectors.py", "rotary_embedding.py", "utils/kernel_mapper.py"],
}
PYPI = {"aiter": ("aiter", "0.13.20191203"), "triton_kernels": ("triton_kernels", "0.1.0")}


def _install(site: Path, package: str, files: list[str], dist: tuple[str, str] | None = None) -> None:
    """Writes a package whose modules raise when they run, and its metadata."""
    for name in files:
        file = site / package / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("raise RuntimeError('detection must not import this')\n")
    if dist is not None:
        info = site / f"{dist[0].replace('-', '_')}-{dist[1]}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist[0]}\nVersion: {dist[1]}\n")


def _check(site: Path, package: str) -> PackageCheck:
    rows = {row.package: row for row in device.unrelated_packages([str(site)])}
    return rows[package]


@pytest.mark.parametrize("package", GENUINE)
def test_absent_package_says_what_to_install(tmp_path: Path, package: str) -> None:
    row = _check(tmp_path, package)
    assert (row.verdict, row.location, row.distribution) == ("absent", None, None)
    repository = {"aiter": "github.com/ROCm/aiter", "triton_kernels": "github.com/triton-lang/triton"}[package]
    assert repository in (row.install or "")


@pytest.mark.parametrize("package", GENUINE)
def test_pypi_package_of_the_same_name_is_unrelated(tmp_path: Path, package: str) -> None:
    _install(tmp_path, package, UNRELATED[package], PYPI[package])
    row = _check(tmp_path, package)
    assert (row.verdict, row.location) == ("unrelated", str(tmp_path / package))
    assert row.distribution == " ".join(PYPI[package]).replace("triton_kernels", "triton-kernels")
    assert "PyPI" in row.found
    assert "git clone" in (row.install or "")


@pytest.mark.parametrize("package", GENUINE)
@pytest.mark.parametrize("dist", [None, ("amd-aiter", "0.1.20")])
def test_genuine_package_is_known_by_its_files(tmp_path: Path, package: str, dist: tuple[str, str] | None) -> None:
    _install(tmp_path, package, GENUINE[package], dist if package == "aiter" else None)
    row = _check(tmp_path, package)
    assert (row.verdict, row.install) == ("genuine", None)
    assert row.distribution == ("amd-aiter 0.1.20" if dist and package == "aiter" else None)


def test_newer_triton_kernels_has_another_matmul_module(tmp_path: Path) -> None:
    _install(tmp_path, "triton_kernels", ["__init__.py", "matmul.py", "numerics_details/mxfp.py"])
    assert _check(tmp_path, "triton_kernels").verdict == "genuine"


@pytest.mark.parametrize("package", GENUINE)
def test_two_packages_in_one_folder_are_not_genuine(tmp_path: Path, package: str) -> None:
    _install(tmp_path, package, GENUINE[package])
    _install(tmp_path, package, UNRELATED[package], PYPI[package])
    row = _check(tmp_path, package)
    assert row.verdict == "unrelated"
    assert "two packages in one folder" in row.found


@pytest.mark.parametrize("package", GENUINE)
def test_incomplete_package_is_not_genuine(tmp_path: Path, package: str) -> None:
    _install(tmp_path, package, GENUINE[package][:2])
    row = _check(tmp_path, package)
    assert row.verdict == "unrelated"
    assert "unknown package" in row.found


def test_a_folder_or_a_module_of_the_name_is_no_package(tmp_path: Path) -> None:
    (tmp_path / "clone" / "aiter" / "csrc").mkdir(parents=True)
    assert "without __init__.py" in _check(tmp_path / "clone", "aiter").found
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "aiter.py").write_text("raise RuntimeError\n")
    row = _check(tmp_path / "flat", "aiter")
    assert (row.verdict, row.found) == ("unrelated", "a single module, no package")


def test_first_folder_on_the_path_decides(tmp_path: Path) -> None:
    _install(tmp_path / "a", "aiter", UNRELATED["aiter"])
    _install(tmp_path / "b", "aiter", GENUINE["aiter"])
    paths = [str(tmp_path / "a"), str(tmp_path / "b")]
    verdicts = [device.unrelated_packages(order)[0].verdict for order in (paths, paths[::-1])]
    assert verdicts == ["unrelated", "genuine"]


def test_copy_inside_vllm_is_reported_beside_the_pypi_package(tmp_path: Path) -> None:
    _install(tmp_path, "triton_kernels", UNRELATED["triton_kernels"], PYPI["triton_kernels"])
    _install(tmp_path, "vllm", ["__init__.py"] + [f"third_party/triton_kernels/{n}" for n in GENUINE["triton_kernels"]])
    assert _check(tmp_path, "triton_kernels").verdict == "unrelated"
    row = _check(tmp_path, "vllm.third_party.triton_kernels")
    assert (row.verdict, row.location) == ("genuine", str(tmp_path / "vllm" / "third_party" / "triton_kernels"))


def test_the_import_path_itself_is_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(tmp_path, "aiter", UNRELATED["aiter"], PYPI["aiter"])
    monkeypatch.syspath_prepend(str(tmp_path))
    row = device.unrelated_packages()[0]
    assert (row.package, row.verdict, row.distribution) == ("aiter", "unrelated", "aiter 0.13.20191203")
    assert "aiter" not in sys.modules


# --- capabilities -----------------------------------------------------------------------------------------------------

ROWS = [PackageCheck(name, "genuine", "x", None, "x", None) for name in ("aiter", "triton_kernels")]
NO_ROWS = [PackageCheck(name, "unrelated", "x", None, "x", "y") for name in ("aiter", "triton_kernels")]


def test_capabilities_of_each_kind_of_machine() -> None:
    amd = replace(_machine(), triton="3.7.1", system="Linux x86_64")
    assert device.capabilities(amd, ROWS) == {"cpu-interpreter", "gpu", "rocm", "gfx942", "aiter", "triton_kernels"}
    assert device.capabilities(amd, NO_ROWS) == {"cpu-interpreter", "gpu", "rocm", "gfx942"}
    hopper = replace(amd, backend="cuda", arch="sm_90")
    assert device.capabilities(hopper, ROWS) == {"cpu-interpreter", "gpu", "cuda", "sm_90", "triton_kernels"}
    blackwell = replace(hopper, arch="sm_100")
    assert device.capabilities(blackwell, NO_ROWS) == {"cpu-interpreter", "gpu", "cuda"}
    cpu = replace(device._cpu_machine(), triton="3.7.1", system="Linux x86_64")
    assert device.capabilities(cpu, ROWS) == {"cpu-interpreter"}
    assert device.capabilities(replace(cpu, triton=None), ROWS) == set()
    assert device.capabilities(replace(cpu, system="Darwin arm64"), ROWS) == set()


def test_capabilities_here_are_words_of_the_vocabulary() -> None:
    found = device.capabilities()
    assert found <= set(CAPABILITIES)
    assert "cpu-interpreter" in found
    assert ("gpu" in found) == torch.cuda.is_available()


def test_unmet_keeps_order_and_refuses_misspelt_names() -> None:
    assert device.unmet(["gfx950", "gpu", "aiter"], have={"gpu"}) == ("gfx950", "aiter")
    assert device.unmet(["cpu-interpreter"]) == ()
    with pytest.raises(ValueError, match=r"no capability is called 'gfx94'; did you mean 'gfx942'\?"):
        device.unmet(["gfx94"], have={"gpu"})


def test_doctor_card_is_plain_data() -> None:
    card = device.doctor_card()
    assert json.loads(json.dumps(card)) == card
    assert set(card) == {"machine", "spec", "capabilities", "packages", "notes"}
    assert card["machine"]["torch"] == torch.__version__
    assert card["capabilities"] == sorted(device.capabilities())
    assert [row["package"] for row in card["packages"]][:2] == ["aiter", "triton_kernels"]
