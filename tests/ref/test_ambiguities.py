"""The book's page on ambiguities names every switch of the reference, and states none that does not exist."""

from __future__ import annotations

import ast
import re
from dataclasses import fields
from pathlib import Path

from dsv4ref.ref.numerics import DEEPSEEK, DEFAULT, STRUCTURE, Numerics

PAGE = (Path(__file__).resolve().parents[2] / "book" / "ambiguities.md").read_text(encoding="utf-8")
SWITCHES = re.findall(r"`Numerics\((\w+)=([^)]+)\)`", PAGE)
# What arithmetic is done in, and whether activations are bfloat16 at all: no choice that implementations differ in.
NO_AMBIGUITY = {"dtype", "round_bf16"}


def test_every_switch_is_named_once() -> None:
    named = sorted(name for name, _ in SWITCHES)
    assert named == sorted({item.name for item in fields(Numerics)} - NO_AMBIGUITY)


def test_every_switch_gives_another_choice_than_the_default() -> None:
    for name, value in SWITCHES:
        other = Numerics(**{name: ast.literal_eval(value)})
        assert getattr(other, name) != getattr(DEFAULT, name), name


def test_other_names_on_the_page_exist() -> None:
    from dsv4ref.formats import ue8m0
    from dsv4ref.ref import sparse_attention, state

    named = {"DEEPSEEK": DEEPSEEK, "DEFAULT": DEFAULT, "STRUCTURE": STRUCTURE}
    assert all(f"`{name}`" in PAGE for name in named)
    assert "`sparse_attention_plain`" in PAGE
    assert callable(sparse_attention.sparse_attention_plain)
    for call, function in (("paged_sequence", state.paged_sequence), ("ue8m0.scale_byte", ue8m0.scale_byte)):
        (arguments,) = re.findall(rf"`{re.escape(call)}\(([^)]*)\)`", PAGE)
        assert set(re.findall(r"(\w+)=", arguments)) <= set(function.__annotations__), call
