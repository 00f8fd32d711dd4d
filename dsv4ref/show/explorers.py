"""The chapters' panels: closed-form models drawn for the values a slider has. Pure functions, no kernels.

Each returns SVG; `panels.panel` wires it to sliders in JupyterLab and `panels.frames` freezes it for the book.
"""

from __future__ import annotations

import torch

from dsv4ref import config
from dsv4ref.device import get_device
from dsv4ref.formats import Dialect, fp8, ue8m0
from dsv4ref.kernels.aiter.emulation import emulated_library
from dsv4ref.kernels.aiter.plan import PLAN_ORDER, DecodeShape
from dsv4ref.kernels.sparse_mla.launch import PUBLISHED, STATIC, LaunchShape, choose, select_launch
from dsv4ref.optimizations import catalogue, decode_model, recast
from dsv4ref.optimizations.base import Case
from dsv4ref.serving.scratch import scratch_sizes
from dsv4ref.show import panels

__all__ = [
    "byte_explorer",
    "launch_explorer",
    "output_explorer",
    "projection_explorer",
    "recast_explorer",
    "scratch_explorer",
    "value_explorer",
]

_SHAPES = (LaunchShape(32, 16, 4), LaunchShape(64, 16, 8), LaunchShape(64, 64, 8))


def launch_explorer(rows: int = 64, heads: int = 64, extra: int = 512, device: str = "mi300x") -> str:
    """Modelled time of one decode launch under several launch shapes; the selected and the published one are marked.

    Args:
        rows: query rows.
        heads: query heads per row.
        extra: slots per row in the extra scope; the SWA scope has 128.
        device: key of a device with published figures.
    """
    spec = get_device(device)
    selected = select_launch(spec.arch, rows, heads, extra)
    published = choose(PUBLISHED, rows, heads, extra).shape
    params = {"rows": rows, "heads": heads, "swa": 128, "extra": extra}
    items = {}
    for shape in dict.fromkeys((STATIC, *_SHAPES, published, selected)):
        marks = {"static": STATIC, "published": published, "selected": selected}
        names = ", ".join(name for name, marked in marks.items() if marked == shape)
        items[f"{shape}{f' ({names})' if names else ''}"] = decode_model.decode_time_us(params, shape, spec)
    title = f"Modelled decode, {rows} rows x {heads} heads, 128 + {extra} keys, {spec.name}"
    return panels.bars(items, title=title, unit="us")


def output_explorer(rows: int = 256, heads: int = 64, extra: int = 512, device: str = "mi300x") -> str:
    """Modelled time of the decode and of the copy that pass-through removes.

    Args: as `launch_explorer`.
    """
    spec = get_device(device)
    case = catalogue.get("output_passthrough").cases["flash-256"]
    params = {**case.params, "rows": rows, "heads": heads, "extra": extra}
    prediction = catalogue.get("output_passthrough").predict(Case("explored", params), device)
    assert prediction.baseline_us is not None
    assert prediction.optimized_us is not None
    items = {"decode": prediction.optimized_us, "copy": prediction.baseline_us - prediction.optimized_us}
    return panels.bars(items, title=f"Modelled, {rows} rows x {heads} heads, {spec.name}", unit="us")


def projection_explorer(rows: int = 256, model: str = "v4-flash", device: str = "mi300x") -> str:
    """Modelled bytes of one projection call before and after, per layer.

    Args:
        rows: tokens in the step.
        model: "v4-flash" or "v4-pro".
        device: key of a device with published figures.
    """
    m = config.get_model(model)
    opt = catalogue.get("cached_projection")
    params = {
        **opt.cases["flash-256"].params,
        "rows": rows,
        "groups": m.o_groups,
        "rank": m.o_lora_rank,
        "width": m.wo_a_input_width,
    }
    p = opt.predict(Case("explored", params), device)
    items = {
        "dequantise every step": p.baseline_bytes / 1e6,
        "fingerprint, then product": p.optimized_bytes / 1e6,
        "product alone": p.least_bytes / 1e6,
    }
    return panels.bars(items, title=f"Traffic of wo_a per layer and step, {model}, {rows} tokens", unit="MB")


def recast_explorer(exponent: int = -6, dialect: str = "e4m3fn", cast: str = "clamped") -> str:
    """What becomes of a block's codes under one scale when its numbers are cast back to FP8 with scale 1.

    Args:
        exponent: of the block's scale, -127 to 127.
        dialect: "e4m3fn" or "e4m3fnuz", of the codes read and written.
        cast: "clamped", or "bare" for torch's own cast.
    """
    (row,) = recast.class_rows(Dialect.of(dialect), [exponent], clamp=cast == "clamped")
    items = {name: row[name] for name in recast.CLASSES}
    title = f"{dialect}, scale 2^{exponent} dropped, {cast} cast: all codes that are numbers"
    return panels.bars(items, title=title, unit="%", limit=100.0)


_FIELDS = (("sign", 1, "#CC79A7"), ("exponent", 4, "#E69F00"), ("mantissa", 3, "#56B4E9"))


def scratch_explorer(rows: int = 64, heads: int = 16, topk: int = 512, device: str = "mi355x") -> str:
    """What one scratch holds, in KiB, its plan sized as the emulation of AITER sizes it for the device's CUs.

    Args:
        rows: query rows.
        heads: query heads on a rank, 16 or 32.
        topk: longest key list.
        device: key of a device with published figures.
    """
    spec = get_device(device)
    library = emulated_library(compute_units=spec.compute_units or 1)
    fp8_dtype = Dialect.FN.dtype
    sizes = scratch_sizes(library, DecodeShape(rows, heads, topk, fp8_dtype, fp8_dtype))
    groups = {"q": "query, fp8", "out": "output, bf16", "kv_indices": "lists"}
    items = dict.fromkeys([*groups.values(), "plan", "lengths and constants"], 0.0)
    for name, (size, dtype) in sizes.items():
        group = groups.get(name, "plan" if name in PLAN_ORDER else "lengths and constants")
        items[group] += torch.Size(size).numel() * dtype.itemsize / 2**10
    return panels.bars(items, title=f"One scratch, {rows} rows x {heads} heads, lists of {topk}", unit="KiB")


def byte_explorer(byte: int = 0x76, scale: int = 127) -> str:
    """One byte under one scale byte, read in both dialects, as SVG.

    Args:
        byte: the code, 0 to 255.
        scale: the UE8M0 byte, 0 to 255.
    """
    factor = float(ue8m0.decode(torch.tensor([scale], dtype=torch.uint8)))
    lines = [f"scale byte {scale}: " + ("NaN" if factor != factor else f"2^{scale - 127}")]
    for dialect, bias in ((Dialect.FN, 7), (Dialect.FNUZ, 8)):
        value = float(fp8.decode(torch.tensor([byte], dtype=torch.uint8), dialect))
        lines.append(f"{dialect.value}: {_formula(byte, bias, value)}; with its scale {_plain(value * factor)}")
    boxes, x = [], 16
    for name, width, colour in _FIELDS:
        for _ in range(width):
            bit = byte >> (7 - (x - 16) // 40) & 1
            boxes.append(
                f'<rect x="{x}" y="34" width="36" height="34" fill="{colour}" fill-opacity="0.45" '
                f'stroke="currentColor" stroke-opacity="0.5"/><text x="{x + 18}" y="57" font-size="18" '
                f'text-anchor="middle">{bit}</text>'
            )
            x += 40
        boxes.append(f'<text x="{x - 20 * width - 2}" y="86" text-anchor="middle">{name}</text>')
    return _svg(f"byte 0x{byte:02X}", lines, "".join(boxes), top=112)


def _formula(byte: int, bias: int, value: float) -> str:
    exponent, mantissa = byte >> 3 & 15, byte & 7
    if value != value:
        return "NaN"
    sign = "-" if byte & 0x80 else ""
    if exponent:
        return f"{sign}{8 + mantissa}/8 x 2^({exponent} - {bias}) = {_plain(value)}"
    return f"{sign}{mantissa}/8 x 2^(1 - {bias}) = {_plain(value)}"


def value_explorer(value: float = 300.0) -> str:
    """One number written in both dialects with scale 1: clamped first, and as torch casts it, as SVG.

    Args:
        value: what to write.
    """
    lines = []
    for dialect in Dialect:
        clamped = fp8.encode(torch.tensor([value]), dialect)
        cast = torch.tensor([value]).to(dialect.dtype).view(torch.uint8)
        both = [f"0x{int(c):02X} = {_plain(float(fp8.decode(c, dialect)))}" for c in (clamped, cast)]
        lines.append(f"{dialect.value}: clamped {both[0]}; torch's bare cast {both[1]}")
    return _svg(f"{_plain(value)} in 8 bits, scale 1", lines, "", top=46)


def _plain(value: float) -> str:
    return "NaN" if value != value else f"{value:.6g}"


def _svg(title: str, lines: list[str], inside: str, top: int) -> str:
    texts = "".join(f'<text x="16" y="{top + 22 * i}">{line}</text>' for i, line in enumerate(lines))
    return (
        f'<svg viewBox="0 0 640 {top + 22 * len(lines)}" role="img" aria-label="{title}. {". ".join(lines)}" '
        'font-family="sans-serif" font-size="14" fill="currentColor" '
        'style="width:100%;max-width:640px;height:auto">'
        f'<text x="16" y="20" font-weight="bold">{title}</text>{inside}{texts}</svg>'
    )


# --- the chapter ---
