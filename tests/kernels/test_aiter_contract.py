"""The signature contract: what a comparison finds, and that a genuine AITER is compared where there is one."""

from __future__ import annotations

import enum
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dsv4ref.kernels.aiter import contract
from dsv4ref.kernels.aiter.contract import CONTRACT, compare, find
from dsv4ref.kernels.aiter.library import AiterUnavailableError, Library, load_aiter, unavailable

GATING = CONTRACT["topk_gating"].text


def laid_out(text: str) -> Any:
    """An object whose topk_gating has these parameters."""
    names: dict[str, Any] = {"MlaVersion": enum.Enum("MlaVersion", ["V32"])}
    exec(f"def topk_gating({text}): ...", names)
    return SimpleNamespace(topk_gating=names["topk_gating"])


def test_a_genuine_aiter_has_the_contracts_signatures() -> None:
    reason = unavailable()
    if reason is not None:
        pytest.skip(f"nothing to compare with: {reason}")
    broken = [d for d in compare(load_aiter().module) if d.breaks]
    assert not broken, "\n".join(map(str, broken))


def test_every_signature_is_readable_and_names_its_source() -> None:
    assert len(CONTRACT) == 13
    for entry, signature in CONTRACT.items():
        parameters = signature.parameters()
        assert parameters
        assert set(signature.writes) <= set(parameters), entry
        assert signature.file.startswith("aiter/")
        assert signature.module.split(".")[0] == "aiter"


def test_the_same_signature_has_no_difference() -> None:
    assert compare(laid_out(GATING), ["topk_gating"]) == []


@pytest.mark.parametrize(
    ("text", "what", "breaks"),
    [
        (GATING.replace("need_renorm=True, ", ""), "need_renorm", True),
        (GATING.replace("need_renorm=True", "renormalize=True"), "renormalize", False),
        (GATING.replace("need_renorm=True", "need_renorm=False"), "need_renorm", True),
        (GATING + ", bias_dtype=None", "bias_dtype", False),
        ("tag, " + GATING, "tag", True),
        (GATING.replace("topk_weights, topk_indices", "topk_indices, topk_weights"), "order", False),
    ],
)
def test_a_change_is_found_and_said_to_break_or_not(text: str, what: str, breaks: bool) -> None:
    found = {d.what: d for d in compare(laid_out(text), ["topk_gating"])}
    assert what in found, found
    assert found[what].breaks is breaks, found[what]


def test_a_missing_function_and_a_hidden_signature_are_differences() -> None:
    (missing,) = compare(SimpleNamespace(), ["topk_gating"])
    assert missing.breaks
    assert missing.what == "function"
    (hidden,) = compare(SimpleNamespace(topk_gating=lambda *args, **kwargs: None), ["topk_gating"])
    assert hidden.breaks
    assert hidden.what == "signature"


def test_a_wrapper_that_keeps_its_function_is_looked_through() -> None:
    inner: Callable[..., Any] = laid_out(GATING).topk_gating

    @functools.wraps(inner)
    def outer(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    assert compare(SimpleNamespace(topk_gating=outer), ["topk_gating"]) == []


def test_a_default_that_is_an_enum_compares_by_name() -> None:
    names: dict[str, Any] = {"MlaVersion": enum.IntEnum("MlaVersion", ["V32", "V40"])}
    text = CONTRACT["get_mla_metadata_v1"].text
    exec(f"def get_mla_metadata_v1({text}): ...", names)
    library = SimpleNamespace(get_mla_metadata_v1=names["get_mla_metadata_v1"])
    assert compare(library, ["get_mla_metadata_v1"]) == []
    exec(f"def get_mla_metadata_v1({text.replace('V32', 'V40')}): ...", names)
    (difference,) = compare(SimpleNamespace(get_mla_metadata_v1=names["get_mla_metadata_v1"]), ["get_mla_metadata_v1"])
    assert (difference.what, difference.found) == ("mla_version", "default MlaVersion.V40")


def test_an_unknown_entry_is_refused() -> None:
    with pytest.raises(ValueError, match="entry: got 'mla', expected one of"):
        find(SimpleNamespace(), "mla")
    with pytest.raises(ValueError, match="entry: got 'mla', expected one of"):
        compare(SimpleNamespace(), ["mla"])


# --- finding the library ---


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(str(tmp_path))
    before = {name: sys.modules.pop(name) for name in _aiter_modules()}
    load_aiter.cache_clear()
    yield tmp_path
    for name in _aiter_modules():
        del sys.modules[name]
    sys.modules.update(before)
    load_aiter.cache_clear()


def _aiter_modules() -> list[str]:
    return [name for name in sys.modules if name.split(".")[0] == "aiter"]


def test_the_unrelated_package_is_refused_by_name(path: Path) -> None:
    (path / "aiter").mkdir()
    for name in ("__init__.py", "map_aiter.py"):
        (path / "aiter" / name).write_text("raise SystemExit('it must not be imported')")
    with pytest.raises(AiterUnavailableError, match=r"asynchronous-iterator library.*install AMD's: git clone"):
        load_aiter()


def test_genuine_files_without_an_amd_gpu_are_not_imported(path: Path) -> None:
    (path / "aiter" / "ops").mkdir(parents=True)
    (path / "aiter" / "jit").mkdir()
    (path / "aiter" / "jit" / "core.py").write_text("")
    (path / "aiter" / "__init__.py").write_text("raise RuntimeError('ROCm version file not found')")
    with pytest.raises(AiterUnavailableError, match="aiter: installed, but it needs an AMD GPU and torch sees"):
        load_aiter()


def test_an_import_that_raises_runtime_error_is_reported(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path / "aiter").mkdir()
    (path / "aiter" / "__init__.py").write_text("raise RuntimeError('ROCm version file not found')")
    monkeypatch.setattr("dsv4ref.kernels.aiter.library.unavailable", lambda: None)
    with pytest.raises(AiterUnavailableError, match="import failed with RuntimeError: ROCm version file not found"):
        load_aiter()


def test_a_function_that_the_library_lacks_is_named_with_its_place() -> None:
    library = Library("a library", SimpleNamespace(mla=SimpleNamespace()), "gfx950", 256, emulated=False)
    with pytest.raises(AttributeError, match=r"a library has no aiter\.mla\.mla_decode_fwd"):
        library.function("mla_decode_fwd")


def test_functions_of_a_real_package_are_imported_from_their_modules(path: Path) -> None:
    (path / "aiter").mkdir()
    (path / "aiter" / "__init__.py").write_text("")
    (path / "aiter" / "mla.py").write_text("def mla_decode_fwd(q): ...")
    aiter = importlib.import_module("aiter")
    assert find(aiter, "mla_decode_fwd").__name__ == "mla_decode_fwd"
    found = {d.entry for d in contract.compare(aiter) if d.what == "function"}
    assert found == set(CONTRACT) - {"mla_decode_fwd"}
