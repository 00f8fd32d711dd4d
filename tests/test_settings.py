"""Environment variables: one table, parsed at call time, one clear error each."""

import re
from pathlib import Path

import pytest

from dsv4ref import settings
from dsv4ref.settings import ENV, LaunchShape


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENV:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("DSV4REF_SEED", "17", 17),
        ("DSV4REF_SEED", str(2**63 - 1), 2**63 - 1),
        ("DSV4REF_LOG", "summary", "summary"),
        ("DSV4REF_LOG", "off", "off"),
        ("DSV4REF_LAUNCH_SHAPE", "64x64x8x2", LaunchShape(64, 64, 8, 2)),
        ("DSV4REF_LAUNCH_SHAPE", "4x64x4", LaunchShape(4, 64, 4, None)),
        ("TRITON_INTERPRET", "1", True),
        ("TRITON_INTERPRET", "0", False),
    ],
)
def test_good_value_is_parsed(monkeypatch: pytest.MonkeyPatch, name: str, text: str, value: object) -> None:
    monkeypatch.setenv(name, text)
    got = settings.get(name)
    assert (got, type(got)) == (value, type(value))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("DSV4REF_SEED", "abc"),
        ("DSV4REF_SEED", "-1"),
        ("DSV4REF_SEED", "1_0"),
        ("DSV4REF_SEED", "0x10"),
        ("DSV4REF_SEED", str(2**63)),
        ("DSV4REF_LOG", "Full"),
        ("DSV4REF_LOG", "1"),
        ("DSV4REF_LAUNCH_SHAPE", "64x64"),
        ("DSV4REF_LAUNCH_SHAPE", "64x64x8x2x1"),
        ("DSV4REF_LAUNCH_SHAPE", "64x48x8"),
        ("DSV4REF_LAUNCH_SHAPE", "0x64x8"),
        ("DSV4REF_LAUNCH_SHAPE", "64x64x8x0"),
        ("DSV4REF_LAUNCH_SHAPE", "64X64X8"),
        ("DSV4REF_RECORDS", "/no/such/folder"),
        ("TRITON_INTERPRET", "2"),
    ],
)
def test_bad_value_names_variable_value_and_expectation(monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    monkeypatch.setenv(name, text)
    with pytest.raises(ValueError, match=rf"^{name}: got {re.escape(repr(text))}, expected \S+"):
        settings.get(name)


def test_dump_folder_may_be_missing_but_not_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DSV4REF_SHAPE_DUMP", str(tmp_path / "new" / "folder"))
    assert settings.get("DSV4REF_SHAPE_DUMP") == tmp_path / "new" / "folder"
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("DSV4REF_SHAPE_DUMP", str(file))
    with pytest.raises(ValueError, match=r"^DSV4REF_SHAPE_DUMP: .*a file"):
        settings.get("DSV4REF_SHAPE_DUMP")


def test_records_folder_must_exist_and_home_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "records").mkdir()
    monkeypatch.setenv("DSV4REF_RECORDS", "~/records")
    assert settings.get("DSV4REF_RECORDS") == tmp_path / "records"


@pytest.mark.parametrize("name", sorted(ENV))
@pytest.mark.parametrize("text", [None, ""])
def test_unset_and_empty_give_the_default(monkeypatch: pytest.MonkeyPatch, name: str, text: str | None) -> None:
    if text is not None:
        monkeypatch.setenv(name, text)
    assert settings.get(name) == ENV[name].default
    assert not settings.any_set(name.encode())


def test_value_is_read_at_call_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings.get("DSV4REF_SEED") == 0
    monkeypatch.setenv("DSV4REF_SEED", "5")
    assert settings.get("DSV4REF_SEED") == 5
    monkeypatch.setenv("DSV4REF_SEED", "6")
    assert settings.get("DSV4REF_SEED") == 6


def test_any_set_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    names = (b"DSV4REF_SEED", b"DSV4REF_LOG")
    assert not settings.any_set(*names)
    monkeypatch.setenv("DSV4REF_LOG", "off")
    assert settings.any_set(*names)
    assert not settings.any_set(b"DSV4REF_SEED")
    monkeypatch.delenv("DSV4REF_LOG")
    assert not settings.any_set(*names)


def test_unknown_setting_name_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'DSV4REF_SEED'"):
        settings.get("DSV4REF_SEEDS")
    with pytest.raises(ValueError, match="known: DSV4REF_SEED, "):
        settings.get("PATH")


def test_unknown_variables_are_reported_with_the_nearest_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSV4REF_SHAPEDUMP", "x")
    assert {"name": "DSV4REF_SHAPEDUMP", "nearest": "DSV4REF_SHAPE_DUMP"} in settings.unknown()
    environ = {"DSV4REF_ZZZZZZZZZZ": "1", "DSV4REF_SEED": "1", "OTHER_SEED": "1", "DSV4REF_LOGS": "1"}
    assert settings.unknown(environ) == [
        {"name": "DSV4REF_LOGS", "nearest": "DSV4REF_LOG"},
        {"name": "DSV4REF_ZZZZZZZZZZ", "nearest": None},
    ]


@pytest.mark.parametrize("shape", [LaunchShape(16, 32, 4), LaunchShape(64, 16, 8, 3)])
def test_launch_shape_text_round_trips(monkeypatch: pytest.MonkeyPatch, shape: LaunchShape) -> None:
    monkeypatch.setenv("DSV4REF_LAUNCH_SHAPE", str(shape))
    assert settings.get("DSV4REF_LAUNCH_SHAPE") == shape


def test_table_documents_every_variable_and_marks_tritons_own() -> None:
    table = settings.rows()
    assert [row["name"] for row in table] == list(ENV)
    assert all(set(row) == {"name", "type", "default", "owner", "meaning"} and all(row.values()) for row in table)
    assert [row["name"] for row in table if row["owner"] != "dsv4ref"] == ["TRITON_INTERPRET"]
    assert {row["name"]: row["default"] for row in table} == {
        "DSV4REF_SEED": "0",
        "DSV4REF_SHAPE_DUMP": "unset",
        "DSV4REF_LOG": "off",
        "DSV4REF_LAUNCH_SHAPE": "unset",
        "DSV4REF_RECORDS": "unset",
        "TRITON_INTERPRET": "0",
    }


@pytest.mark.parametrize("text", ["1", "true", "TRUE", "on", "yes", "y", "0", "false", "off", "no", "n"])
def test_interpreter_switch_is_read_as_triton_reads_it(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    import triton

    monkeypatch.setenv("TRITON_INTERPRET", text)
    ours, theirs = settings.get("TRITON_INTERPRET"), triton.knobs.runtime.interpret
    assert ours == theirs, f"{text!r}: dsv4ref reads {ours}, Triton {theirs}"
