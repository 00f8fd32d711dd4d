"""The chapters' panels: closed-form models drawn for the values a slider has. Pure functions, no kernels.

Each returns SVG; `panels.panel` wires it to sliders in JupyterLab and `panels.frames` freezes it for the book.
"""

from __future__ import annotations

from dsv4ref import config
from dsv4ref.device import get_device
from dsv4ref.kernels.sparse_mla.launch import PUBLISHED, STATIC, LaunchShape, choose, select_launch
from dsv4ref.optimizations import catalogue, decode_model
from dsv4ref.optimizations.base import Case
from dsv4ref.show import panels

__all__ = ["launch_explorer", "output_explorer", "projection_explorer"]

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
