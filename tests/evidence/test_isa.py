"""ISA evidence: what the child compiles, what is read off the assembly, and how failures come back."""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dsv4ref.evidence import isa
from dsv4ref.evidence.isa import CompileRequest, IsaRow

MATMUL = {"a": "*bf16", "b": "*bf16", "out": "*fp32", "K": "i32"}


def request_for(function: str, shape: str = "tiny", **changes: Any) -> CompileRequest:
    """A request for a kernel of isa_kernels: the vector add's arguments unless changed."""
    fields: dict[str, Any] = {
        "signature": {"x": "*fp32", "y": "*fp32", "out": "*fp32", "n": "i32"},
        "constexprs": {"BLOCK": 1024},
        "num_warps": 4,
        **changes,
    }
    return CompileRequest(kernel=function, module="isa_kernels", function=function, shape=shape, **fields)


def matmul(shape: str, M: int, N: int, **changes: Any) -> CompileRequest:
    constexprs = {"M": M, "N": N, **changes.pop("constexprs", {})}
    aligned = frozenset(MATMUL)
    return request_for(
        "matmul_tile", shape, signature=MATMUL, constexprs=constexprs, divisible_by_16=aligned, **changes
    )


REQUESTS = (
    request_for("vector_add", "add", divisible_by_16=frozenset({"x", "y", "out", "n"})),
    request_for(
        "vector_add",
        "add 2gb",
        divisible_by_16=frozenset({"x", "y", "out", "n"}),
        within_2gb=frozenset({"x", "y", "out"}),
    ),
    request_for("vector_add", "add unaligned"),
    matmul("dot", 64, 64),
    matmul("agpr", 256, 256, num_stages=2),
    matmul("staged", 64, 64, num_stages=3),
    matmul("padded", 64, 64, options={"waves_per_eu": 3}),
    matmul("fat", 512, 256),
    matmul("lds", 256, 128, constexprs={"BLOCK_K": 128}, num_warps=8, num_stages=2),
)


@pytest.fixture(scope="module", autouse=True)
def interpreting_parent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The situation of a CPU-only machine: this process interprets. The cache is empty: the child really compiles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        patch.syspath_prepend(str(Path(__file__).parent))
        yield


@pytest.fixture(scope="module")
def rows(interpreting_parent: None) -> dict[tuple[str, str], IsaRow]:
    """(shape, arch) -> row of every request above, all from one child process."""
    found = isa.compile_rows(REQUESTS)
    assert [(row.shape, row.arch) for row in found] == [(r.shape, arch) for r in REQUESTS for arch in isa.ARCHS]
    return {(row.shape, row.arch): row for row in found}


def comment(assembly: str, name: str) -> int:
    """A figure that LLVM prints after the code for people to read, e.g. ``; Occupancy: 8``."""
    (value,) = re.findall(rf"^; {name}: (\d+)", assembly, re.MULTILINE)
    return int(value)


# --- what the compiler made of the kernels ---------------------------------------------------------------------------


@pytest.mark.parametrize("arch", isa.ARCHS)
def test_vector_add_uses_neither_matrix_unit_nor_lds(rows: dict[tuple[str, str], IsaRow], arch: str) -> None:
    row = rows["add", arch]
    assert (row.mfma, dict(row.mfma_kinds), row.lds, row.ds_reads, row.ds_writes) == (0, {}, 0, 0, 0), row
    assert (row.vgpr_spills, row.sgpr_spills, row.scratch) == (0, 0, 0), row
    assert (row.agpr, row.waves_per_simd) == (0, 8), row
    assert isa.check_caps([row]) == []


@pytest.mark.parametrize("arch", isa.ARCHS)
def test_small_pointers_are_read_with_buffer_loads(rows: dict[tuple[str, str], IsaRow], arch: str) -> None:
    wide, small = rows["add", arch], rows["add 2gb", arch]
    assert wide.global_loads > 0, wide
    assert wide.buffer_loads == 0, wide
    assert small.global_loads == 0, small
    assert small.buffer_loads > 0, small


@pytest.mark.parametrize("arch", isa.ARCHS)
def test_aligned_pointers_are_read_four_words_at_a_time(rows: dict[tuple[str, str], IsaRow], arch: str) -> None:
    aligned, unaligned = rows["add", arch], rows["add unaligned", arch]
    # 1,024 elements over 256 lanes: four words each from two inputs.
    assert (aligned.global_loads, unaligned.global_loads) == (2, 8)


@pytest.mark.parametrize("arch", isa.ARCHS)
def test_bf16_dot_runs_on_the_matrix_unit_through_lds(rows: dict[tuple[str, str], IsaRow], arch: str) -> None:
    row = rows["dot", arch]
    assert row.mfma > 0, row
    assert sum(row.mfma_kinds.values()) == row.mfma, row
    assert all(kind.startswith("v_mfma_f32_") and "bf16" in kind for kind in row.mfma_kinds), row.mfma_kinds
    assert row.lds > 0, row
    assert row.ds_reads > 0, row
    assert row.ds_writes > 0, row
    assert isa.check_caps([row]) == []


@pytest.mark.parametrize("arch", isa.ARCHS)
def test_spilling_kernel_breaks_two_caps(rows: dict[tuple[str, str], IsaRow], arch: str) -> None:
    row = rows["fat", arch]
    assert row.vgpr_spills > 0, row
    assert isa.check_caps([row]) == [
        f"matmul_tile [fat] on {arch}: {row.vgpr_spills:,} VGPR spills, cap 0",
        f"matmul_tile [fat] on {arch}: {row.scratch:,} bytes of scratch per lane, cap 0",
    ]


def test_lds_of_96_kib_fits_gfx950_only(rows: dict[tuple[str, str], IsaRow]) -> None:
    over, fits = rows["lds", "gfx942"], rows["lds", "gfx950"]
    assert 65_536 < over.lds <= 163_840, over.lds
    assert 65_536 < fits.lds <= 163_840, fits.lds
    assert isa.check_caps([over, fits]) == [
        f"matmul_tile [lds] on gfx942: {over.lds:,} bytes of LDS, cap 65,536",
    ]
    assert over.waves_per_simd == 0, "no workgroup fits a gfx942 CU"
    assert fits.waves_per_simd == 2, "one workgroup of eight waves fits a gfx950 CU"


@pytest.mark.parametrize("arch", isa.ARCHS)
def test_pipeline_stages_reach_the_compiler(rows: dict[tuple[str, str], IsaRow], arch: str) -> None:
    assert rows["staged", arch].lds > rows["dot", arch].lds, "three stages hold more tiles in LDS than one"


def test_autotuned_kernel_takes_its_configuration_and_dtype_from_the_request() -> None:
    request = request_for(
        "convert",
        signature={"x": "*fp32", "out": "*fp8e4b8"},
        constexprs={"BLOCK": 1024, "DTYPE": "tl.float8e4b8"},
    )
    text = isa.amdgcn(request, "gfx942")
    # gfx942 packs two conversions to its own fp8 dialect per instruction: 1,024 elements are two of them per lane.
    assert len(re.findall(r"^\s+v_cvt_pk_fp8_f32", text, re.MULTILINE)) == 2


# --- the fields against the other places where the compiler states the same figure ------------------------------------


@pytest.mark.parametrize("arch", isa.ARCHS)
@pytest.mark.parametrize("shape", ["add", "agpr", "padded"])
def test_register_fields_agree_with_the_compilers_comments(
    rows: dict[tuple[str, str], IsaRow], shape: str, arch: str
) -> None:
    row = rows[shape, arch]
    text = isa.amdgcn(next(r for r in REQUESTS if r.shape == shape), arch)
    arch_vgpr, agpr = comment(text, "NumVgprs"), comment(text, "NumAgprs")
    assert row.vgpr == comment(text, "TotalNumVgprs")
    assert row.agpr == agpr
    # The unified file: AGPRs follow the architectural registers at a multiple of four, and count.
    assert row.vgpr == (-(-arch_vgpr // 4) * 4 + agpr if agpr else arch_vgpr), (row.vgpr, arch_vgpr, agpr)
    assert row.scratch == comment(text, "ScratchSize")
    assert row.sgpr == comment(text, "TotalNumSgprs")
    assert row.vgprs_allocated == comment(text, "NumVGPRsForWavesPerEU")
    assert isa.register_waves(row.vgprs_allocated, arch, row.sgpr) == comment(text, "Occupancy")


def test_total_above_256_registers_includes_agprs(rows: dict[tuple[str, str], IsaRow]) -> None:
    row = rows["agpr", "gfx942"]
    assert row.vgpr > 256, row
    assert row.agpr > 0, row
    assert row.waves_per_simd == 1, row


@pytest.mark.parametrize("arch", isa.ARCHS)
def test_waves_per_eu_reserves_registers_that_the_code_does_not_use(
    rows: dict[tuple[str, str], IsaRow], arch: str
) -> None:
    free, padded = rows["dot", arch], rows["padded", arch]
    assert free.vgprs_allocated == free.vgpr, free
    assert padded.vgprs_allocated > padded.vgpr, padded
    assert free.waves_per_simd > padded.waves_per_simd == 3, (free.waves_per_simd, padded.waves_per_simd)


# --- occupancy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vgpr", "lds", "num_warps", "arch", "waves"),
    [
        (1, 0, 4, "gfx942", 8),  # the slots are the limit
        (64, 0, 4, "gfx942", 8),
        (65, 0, 4, "gfx942", 7),  # granule: 65 registers take 72
        (128, 0, 4, "gfx942", 4),
        (100, 0, 4, "gfx942", 4),  # granule of eight: 104 registers, five times 104 are too many
        (129, 0, 4, "gfx942", 3),
        (129, 0, 8, "gfx942", 2),  # room for three waves, but a workgroup brings two per SIMD
        (256, 0, 4, "gfx942", 2),
        (275, 32_768, 4, "gfx942", 1),
        (276, 32_768, 4, "gfx950", 1),
        (512, 0, 4, "gfx942", 1),
        (264, 0, 8, "gfx942", 0),  # two waves per SIMD do not fit
        (242, 65_536, 8, "gfx942", 2),
        (32, 16_384, 4, "gfx942", 4),  # LDS for four workgroups
        (32, 10_700, 4, "gfx942", 6),  # granule of 512 bytes: 10,752
        (32, 10_900, 4, "gfx942", 5),  # 11,264, although six times 10,900 would fit
        (32, 16_384, 4, "gfx950", 8),  # 163,840 / 16,640 = nine workgroups, eight slots
        (32, 32_768, 4, "gfx950", 4),  # 1,280-byte granule: 33,280, so four workgroups and not five
        (32, 65_536, 1, "gfx942", 1),  # one wave on the whole CU
        (32, 13_107, 1, "gfx942", 1),
        (32, 8_192, 1, "gfx942", 2),  # eight waves on four SIMDs
        (32, 65_537, 4, "gfx942", 0),
        (32, 65_537, 4, "gfx950", 2),
    ],
)
def test_waves_per_simd(vgpr: int, lds: int, num_warps: int, arch: str, waves: int) -> None:
    assert isa.waves_per_simd(vgpr, lds, num_warps, arch) == waves


@pytest.mark.parametrize(("sgpr", "waves"), [(0, 8), (100, 8), (101, 7), (108, 7)])
def test_more_than_100_scalar_registers_cost_a_wave(sgpr: int, waves: int) -> None:
    assert isa.register_waves(32, "gfx942", sgpr) == waves


def test_occupancy_rejects_impossible_counts() -> None:
    with pytest.raises(ValueError, match=r"vgpr: expected 0 to 512 .* got 513"):
        isa.waves_per_simd(513, 0, 4, "gfx942")
    with pytest.raises(ValueError, match=r"lds: .* got -1"):
        isa.waves_per_simd(32, -1, 4, "gfx942")
    with pytest.raises(ValueError, match=r"num_warps: expected 1 to 16 .* got 17"):
        isa.waves_per_simd(32, 0, 17, "gfx942")


# --- failures come back named -----------------------------------------------------------------------------------------


def test_every_failure_names_kernel_shape_and_arch() -> None:
    failing = [
        request_for("undefined_name", "B64", signature={"x": "*fp32"}, constexprs={"BLOCK": 64}),
        REQUESTS[0],
        request_for("bad_instruction", "B128", signature={"x": "*fp32"}, constexprs={"BLOCK": 128}),
    ]
    with pytest.raises(isa.IsaCompileError) as caught:
        isa.compile_rows(failing, ["gfx950"])
    python, assembler = caught.value.failures
    assert str(python).startswith("undefined_name [B64] on gfx950: ")
    assert "no_such_name is not defined" in python.message
    assert str(assembler).startswith("bad_instruction [B128] on gfx950: ")
    assert "invalid instruction" in assembler.message, "LLVM's diagnostic is on the child's stderr"
    assert "invalid instruction" not in python.message, "diagnostics belong to one request"
    assert str(python) in str(caught.value)
    assert str(assembler) in str(caught.value)


def test_compiler_that_kills_the_process_is_blamed_on_the_request_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "import os, sys\nprint('LLVM ERROR: made up', file=sys.stderr, flush=True)\nos.abort()\n"
    (tmp_path / "aborting_module.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    aborting = dataclasses.replace(REQUESTS[0], kernel="doomed", module="aborting_module", shape="S")
    with pytest.raises(isa.IsaCompileError) as caught:
        isa.compile_rows([REQUESTS[0], aborting, REQUESTS[0]], ["gfx942"])
    death, untried = caught.value.failures
    assert str(death).startswith("doomed [S] on gfx942: the compiling process died: signal SIGABRT")
    assert "LLVM ERROR: made up" in death.message
    assert str(untried).startswith("vector_add [add] on gfx942: not tried")


def test_each_architecture_has_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # triton 3.6.0 compiles fp8 conversions for the first target of a process, whatever the second one is.
    source = "import os\nfrom isa_kernels import vector_add\n"
    source += f"with open({str(tmp_path / 'pids')!r}, 'a') as log:\n    print(os.getpid(), file=log)\n"
    (tmp_path / "logging_module.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    logged = dataclasses.replace(REQUESTS[0], module="logging_module")
    isa.compile_rows([logged, logged], ["gfx942", "gfx950"])
    pids = (tmp_path / "pids").read_text().split()
    assert len(pids) == len(set(pids)) == 2, pids


@pytest.mark.parametrize("arch", isa.ARCHS)
def test_conversion_code_does_not_depend_on_what_was_compiled_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arch: str
) -> None:
    request = request_for(
        "convert",
        signature={"x": "*bf16", "out": "*fp8e4nv"},
        constexprs={"BLOCK": 1024, "DTYPE": "tl.float8e4nv"},
    )
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "both"))
    isa.compile_rows([request], [*(other for other in isa.ARCHS if other != arch), arch])
    after = isa.amdgcn(request, arch)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "alone"))
    assert after == isa.amdgcn(request, arch)


def test_folder_we_stand_in_does_not_shadow_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "triton.py").write_text("raise SystemExit('shadowed')\n")
    monkeypatch.chdir(tmp_path)
    (row,) = isa.compile_rows([REQUESTS[0]], ["gfx942"])
    assert row.triton.startswith("3."), row


def test_triton_settings_of_this_process_do_not_change_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_OVERRIDE_ARCH", "gfx950")
    monkeypatch.setenv("TRITON_STORE_BINARY_ONLY", "1")
    text = isa.amdgcn(request_for("vector_add", constexprs={"BLOCK": 2048}), "gfx942")
    assert "amdgcn-amd-amdhsa--gfx942" in text


def test_printing_module_does_not_disturb_the_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "import os\nprint('hello')\nos.write(1, b'from C')\nfrom isa_kernels import vector_add\n"
    (tmp_path / "printing_module.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    (row,) = isa.compile_rows([dataclasses.replace(REQUESTS[0], module="printing_module")], ["gfx942"])
    assert row.waves_per_simd == 8


def test_cause_of_a_failed_pass_is_kept_and_the_module_dump_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dump = "made_up.cpp:801: cause\n#blocked = #ttg.x\nmodule attributes {a = {}} {\n" + "  tt.return\n" * 40
    dump += "}\n\n{-#\n  x: {\n  }\n#-}\nk.py:1:0: error: pass failed\n"
    source = f"import os\nos.write(2, {dump.encode()!r})\nraise RuntimeError('PassManager::run failed')\n"
    (tmp_path / "failing_module.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="PassManager::run failed") as caught:
        isa.compile_rows([dataclasses.replace(REQUESTS[0], module="failing_module")], ["gfx942"])
    assert str(caught.value).splitlines()[1:] == ["made_up.cpp:801: cause", "k.py:1:0: error: pass failed"]


MISFITS = (
    (dataclasses.replace(REQUESTS[0], module="no_such_module"), r"module 'no_such_module' does not import"),
    (request_for("no_such_kernel"), r"has no function 'no_such_kernel'; it has \[.*'vector_add'\]"),
    (request_for("not_a_kernel"), r"must be a @triton.jit function, got builtin_function_or_method"),
    (request_for("vector_add", signature={"x": "*fp32"}), r"arguments \['y', 'out', 'n'\] are given neither"),
    (request_for("vector_add", constexprs={"BLOCK": 64, "BLOK": 1}), r"arguments \['BLOK'\] are not in"),
    (
        request_for("vector_add", signature={**REQUESTS[0].signature, "BLOCK": "i32"}, constexprs={}),
        r"arguments \['BLOCK'\] are declared tl.constexpr",
    ),
    (request_for("vector_add", options={"waves_per_ue": 2}), r"options \['waves_per_ue'\] are not options"),
    (
        request_for("convert", signature={"x": "*fp32", "out": "*fp32"}, constexprs={"BLOCK": 64, "DTYPE": "tl.e4"}),
        r"constexpr DTYPE='tl.e4' does not name a dtype",
    ),
    (
        request_for(
            "unspecialised", signature={"x": "*i32", "n": "i32"}, constexprs={}, divisible_by_16=frozenset({"n"})
        ),
        r"divisible_by_16 names \['n'\], which the kernel declares do_not_specialize",
    ),
)


@pytest.fixture(scope="module")
def misfit_messages(interpreting_parent: None) -> list[str]:
    """What one call says about all the misfits and one good request, a paragraph each."""
    labelled = [dataclasses.replace(request, shape=f"case {i}") for i, (request, _) in enumerate(MISFITS)]
    with pytest.raises(ValueError) as caught:
        isa.compile_rows([REQUESTS[0], *labelled], ["gfx942"])
    return re.split(r"\n(?=\w+ \[case)", str(caught.value))


@pytest.mark.parametrize("case", range(len(MISFITS)))
def test_request_that_does_not_fit_its_kernel_says_how(misfit_messages: list[str], case: int) -> None:
    request, expected = MISFITS[case]
    assert len(misfit_messages) == len(MISFITS), misfit_messages
    assert misfit_messages[case].startswith(f"{request.kernel} [case {case}] on gfx942: ")
    assert re.search(expected, misfit_messages[case]), misfit_messages[case]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"shape": ""}, r"shape: expected a non-empty string, got ''"),
        ({"num_warps": 3}, r"num_warps: expected a power of two from 1 to 16, got 3"),
        ({"num_stages": 0}, r"num_stages: expected an integer of at least 1, got 0"),
        ({"signature": {"x": "*float"}}, r"signature\['x'\]: expected i1, .* got '\*float'"),
        ({"constexprs": {"BLOCK": 64, "n": 1}}, r"constexprs: \['n'\] are also in signature"),
        ({"options": {"num_warps": 8}}, r"options: \['num_warps'\] have fields of their own"),
        ({"divisible_by_16": frozenset({"z"})}, r"divisible_by_16: .* got \['z'\]"),
        ({"within_2gb": frozenset({"n"})}, r"within_2gb: expected pointer arguments .* got \['n'\]"),
    ],
)
def test_malformed_request_is_refused_before_any_process_starts(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        dataclasses.replace(REQUESTS[0], **changes)
    with pytest.raises(TypeError, match=r"constexprs\['BLOCK'\]"):
        request_for("vector_add", constexprs={"BLOCK": [1]})


def test_unknown_architecture_names_the_known_ones() -> None:
    for call in (
        lambda: isa.compile_rows([REQUESTS[0]], ["gfx90a"]),
        lambda: isa.amdgcn(REQUESTS[0], "gfx90a"),
        lambda: isa.arch_caps("gfx90a"),
    ):
        with pytest.raises(ValueError, match="expected one of gfx942, gfx950, got 'gfx90a'"):
            call()
    with pytest.raises(TypeError, match="archs: expected a sequence"):
        isa.compile_rows([REQUESTS[0]], "gfx942")
    with pytest.raises(ValueError, match="archs: expected at least one of gfx942, gfx950"):
        isa.compile_rows([REQUESTS[0]], [])


def test_no_requests_no_rows() -> None:
    assert isa.compile_rows([]) == []


# --- reading assembly -------------------------------------------------------------------------------------------------

ASSEMBLY = """
kernel:                                 ; @kernel, with v_mfma_ in a comment
ds_read_label:
\tds_read_b128 v[0:3], v4
\tds_read_b64_tr_b16 v[0:1], v4
\tds_write2st64_b64 v4, v[0:1], v[2:3] offset1:1
\tglobal_load_dwordx4 v[0:3], v4, s[0:1]
\tglobal_load_dwordx4 v[8:11], v4, s[0:1] offset:16
\tglobal_load_ushort v0, v4, s[0:1]
\tglobal_store_dword v4, v0, s[0:1]
\tbuffer_load_dwordx4 v[0:3], v4, s[0:3], 0 offen
\tv_mfma_f32_16x16x16_bf16 a[0:3], v[0:1], v[2:3], a[0:3]
\tv_mfma_f32_16x16x16_bf16 a[4:7], v[0:1], v[2:3], a[4:7]
\tv_mfma_f32_32x32x8_f16 a[0:15], v[0:1], v[2:3], a[0:15]
\t; v_mfma_f32_32x32x8_f16 in a comment
\ts_endpgm
\t.amdhsa_next_free_vgpr 276
\t.amdgpu_metadata
amdhsa.kernels:
  - .agpr_count:     20
    .private_segment_fixed_size: 24
    .sgpr_count:     40
    .sgpr_spill_count: 3
    .vgpr_count:     275
    .vgpr_spill_count: 7
amdhsa.target:   amdgcn-amd-amdhsa--gfx942
"""


def read(assembly: str, arch: str = "gfx942") -> IsaRow:
    return isa.row_from_amdgcn(assembly, kernel="k", shape="s", arch=arch, lds=32_768, num_warps=4, triton="0")


def test_row_holds_every_figure_of_the_text_under_its_stable_key() -> None:
    row = read(ASSEMBLY)
    expected = {
        "kernel": "k", "arch": "gfx942", "shape": "s", "vgpr": 275, "agpr": 20, "sgpr": 40, "vgpr_spills": 7,
        "lds": 32_768, "waves_per_simd": 1, "mfma": 3, "sgpr_spills": 3, "scratch": 24, "ds_reads": 2, "ds_writes": 1,
        "global_loads": 3, "buffer_loads": 1,
        "mfma_kinds": {"v_mfma_f32_16x16x16_bf16": 2, "v_mfma_f32_32x32x8_f16": 1},
        "num_warps": 4, "vgprs_allocated": 276, "triton": "0",
    }  # fmt: skip
    assert row.as_json() == expected
    assert list(row.as_json()) == list(expected), "the order of the keys is part of the format"
    assert json.loads(json.dumps(row.as_json())) == expected


def test_scalar_registers_of_the_row_count_towards_occupancy() -> None:
    few = ASSEMBLY.replace("next_free_vgpr 276", "next_free_vgpr 32")
    for sgpr, waves in ((100, 8), (108, 7)):
        text = few.replace(".sgpr_count:     40", f".sgpr_count:     {sgpr}")
        row = isa.row_from_amdgcn(text, kernel="k", shape="s", arch="gfx942", lds=0, num_warps=4, triton="0")
        assert row.waves_per_simd == waves, row


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("    .vgpr_count:     275\n", "", r"one \.vgpr_count entry, got 0"),
        ("    .sgpr_count:     40\n", "    .sgpr_count:     40\n    .sgpr_count:  41\n", r"\.sgpr_count entry, got 2"),
        ("\t.amdhsa_next_free_vgpr 276\n", "", r"one \.amdhsa_next_free_vgpr entry, got 0"),
        ("--gfx942", "--gfx950", r"expected code for gfx942, got target amdgcn-amd-amdhsa--gfx950"),
    ],
)
def test_text_that_cannot_be_read_is_refused(old: str, new: str, expected: str) -> None:
    assert ASSEMBLY.count(old) == 1
    with pytest.raises(ValueError, match=expected):
        read(ASSEMBLY.replace(old, new))


def test_target_features_after_the_architecture_are_accepted() -> None:
    assert read(ASSEMBLY.replace("--gfx942", "--gfx942:sramecc+:xnack-")).arch == "gfx942"


def test_caps_are_the_published_ones() -> None:
    for arch, lds in (("gfx942", 65_536), ("gfx950", 163_840)):
        caps = isa.arch_caps(arch)
        assert (caps.arch, caps.lds_bytes) == (arch, lds)
        assert (caps.vgprs_per_lane, caps.max_waves_per_simd, caps.simds_per_cu, caps.wave_size) == (512, 8, 4, 64)
        assert caps.lds_bytes % caps.lds_granule == 0
        assert "LLVM" in caps.source
