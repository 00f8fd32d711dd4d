"""Triton's CPU interpreter made faithful to the GPU in bfloat16 and float8, and the choice between it and the compiler.

``configure()`` decides once per process how ``@triton.jit`` functions run: compiled for the visible GPU, or interpreted
on the CPU by ``triton.runtime.interpreter``. The interpreter keeps bf16 as uint16 codes and fp8 as uint8 codes, and as
shipped it computes on those codes. What is wrong, in which release, and what mends it here:

=========  ===============================  ========================================================================
seen in    mended by                        defect of the plain interpreter
=========  ===============================  ========================================================================
3.6 - 3.9  create_dot                       tl.dot multiplies bf16 codes, lets fp8 NaN codes in as finite numbers,
                                            multiplies fp16 without BLAS, and fp32 on contending BLAS threads
3.6 - 3.9  binary_op, unary_op, create_fma  bf16 arithmetic and comparisons act on codes
3.6 - 3.9  ReduceOps                        bf16 tl.sum adds codes
3.9        ReduceOps, ScanOps               bf16 tl.argmax, tl.argmin, tl.cumsum and tl.cumprod act on codes
                                            (until 3.8 they promote bf16 to fp32)
3.6 - 3.9  _convert_float, cast_impl        fp32 -> bf16 truncates; integer <-> bf16 copies the code
3.6 - 3.9  _convert_float                   fp32 -> fp8 rounds ties away from zero, loses the carry into the
                                            exponent, truncates subnormals, overflows to arbitrary codes
3.6 - 3.9  _convert_float                   e4m3fn 0x7F and 0xFF decode to +-480, fnuz 0x80 to a number
3.6 - 3.9  binary_op                        a comparison's result claims the operands' type: a mask cast from or
                                            to bf16 is read as codes
3.6 - 3.7  _patch_lang_core                 fp8e4b8 and fp8e5b16 have no IR type ("fail to convert")
3.6 - 3.8  get_bf16                         tl.full(..., value, tl.bfloat16) finds no get_bf16
3.6 - 3.7  create_maxnumf, create_minnumf,  tl.maximum, tl.minimum and tl.clamp return NaN where the GPU
           create_clampf                    (PropagateNan.NONE) returns the other operand
=========  ===============================  ========================================================================

Here operands are decoded, computed in fp32 and rounded to nearest even, once per operation; ``tl.dot`` accumulates in
fp32 and ``tl.sum`` over bf16 rounds once at the end (a GPU rounds at every level of its tree, so it is less exact).

fp32 -> fp8 saturates, infinities included, because that is what Triton compiles to: ``cvt.rn.satfinite`` on NVIDIA (PTX
ISA, section cvt), compare-and-select with the largest code in AMD's software path, and FP16_OVFL set in the MODE
register around AMD's conversion instructions (triton-lang/triton#7337; what those make of an infinity is not measured
here). Inside the finite range every cast gives torch's bits; outside it torch 2.13 gives NaN for the fnuz dialects and
infinity for e5m2. Arithmetic on fp8 does not compile for any GPU and raises here. Up to triton 3.9, compiled e5m2 ->
bf16 casts, and e4m3 ones in AMD's software path, turn NaN and infinity into finite numbers (triton-lang/triton#11784;
e5m2 measured on H200); here they keep them.

Not emulated: TF32 rounding of fp32 ``tl.dot`` operands, reduced-precision fp8 accumulators (Hopper), minimum dot sizes,
``fp8e4b15``. Speed measured here says nothing about any kernel.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Mode = Literal["compiled", "interpreted"]
Array = npt.NDArray[Any]

ENV_VARIABLE: Final = "TRITON_INTERPRET"
_TRUE_WORDS: Final = frozenset({"1", "true", "yes", "on", "y"})  # the words Triton's own knob accepts
_mode: Mode | None = None


def configure() -> Mode:
    """Decide once how Triton kernels run in this process, and mend the interpreter if they are interpreted.

    ``TRITON_INTERPRET`` decides where it is set. Otherwise kernels are compiled if torch sees a CUDA or ROCm device
    and interpreted if not; the variable is then set to 1, for Triton and for child processes.
    ``TRITON_INTERPRET=0`` keeps the compiler on a machine without a GPU, for cross-compilation.

    Returns:
        "compiled" or "interpreted"; later calls return the first answer.

    Raises:
        RuntimeError: Triton was imported in the other mode before this call, or this Triton lacks an internal name
            that the shim mends.
    """
    global _mode
    if _mode is None:
        wanted = _wanted_mode()
        loaded = _loaded_mode()
        if loaded is not None and loaded != wanted:
            raise RuntimeError(
                f"triton was imported in {loaded} mode before dsv4ref.kernels, which needs {wanted} mode here: "
                f"import dsv4ref.kernels before triton (or set {ENV_VARIABLE}={int(wanted == 'interpreted')} in the "
                "environment) and restart the process or the notebook kernel"
            )
        if wanted == "interpreted":
            os.environ[ENV_VARIABLE] = "1"
            _install()
        _mode = wanted
    return _mode


def mode() -> Mode:
    """Return the mode that ``configure()`` chose.

    Returns:
        "compiled" or "interpreted".

    Raises:
        RuntimeError: ``configure()`` has not run (importing ``dsv4ref.kernels`` runs it).
    """
    if _mode is None:
        raise RuntimeError("the Triton mode is not decided yet: import dsv4ref.kernels, which calls configure()")
    return _mode


def _wanted_mode() -> Mode:
    value = os.environ.get(ENV_VARIABLE, "")
    if value:
        return "interpreted" if value.lower() in _TRUE_WORDS else "compiled"
    import torch  # only here: with the variable set, the choice needs no torch; torch itself does not import triton

    return "compiled" if torch.cuda.is_available() else "interpreted"


def _loaded_mode() -> Mode | None:
    """How an already imported Triton decorated its own helpers; the variable may have changed since."""
    standard = sys.modules.get("triton.language.standard")
    if standard is None:
        return None
    modes: dict[str, Mode] = {"JITFunction": "compiled", "InterpretedFunction": "interpreted"}
    kind = type(standard.max).__name__
    if kind not in modes:
        raise RuntimeError(f"triton.language.max is a {kind}, expected one of {sorted(modes)}: unknown Triton release")
    return modes[kind]


# ---- number formats: codes <-> float32, vectorised ------------------------------------------------------------------


@dataclass(frozen=True)
class _Float8:
    """An 8-bit float: 1 sign bit, ``7 - mantissa_bits`` exponent bits, then the mantissa."""

    mantissa_bits: int
    bias: int
    max_code: int  # code of the largest finite magnitude
    fnuz: bool = False  # no negative zero: 0x80 is the one NaN
    has_infinity: bool = False

    def table(self) -> Array:
        """The values of all 256 codes, float32 [256]."""
        code = np.arange(256)
        exponent = (code & 0x7F) >> self.mantissa_bits
        mantissa = (code & ((1 << self.mantissa_bits) - 1)) + np.where(exponent > 0, 1 << self.mantissa_bits, 0)
        magnitude = np.ldexp(mantissa.astype(np.float32), np.maximum(exponent, 1) - self.bias - self.mantissa_bits)
        magnitude[(code & 0x7F) > self.max_code] = np.nan
        if self.has_infinity:
            magnitude[(code & 0x7F) == self.max_code + 1] = np.inf
        if self.fnuz:
            magnitude[0x80] = np.nan
        return np.where(code < 0x80, magnitude, -magnitude)


_FLOAT8: Final = {  # Triton's dtype name -> format
    "fp8e4nv": _Float8(mantissa_bits=3, bias=7, max_code=0x7E),  # float8_e4m3fn, max 448
    "fp8e4b8": _Float8(mantissa_bits=3, bias=8, max_code=0x7F, fnuz=True),  # float8_e4m3fnuz, max 240
    "fp8e5": _Float8(mantissa_bits=2, bias=15, max_code=0x7B, has_infinity=True),  # float8_e5m2, max 57344
    "fp8e5b16": _Float8(mantissa_bits=2, bias=16, max_code=0x7F, fnuz=True),  # float8_e5m2fnuz, max 57344
}
_FLOAT8_VALUES: Final = {name: fmt.table() for name, fmt in _FLOAT8.items()}
_CODED: Final = frozenset({"bf16", *_FLOAT8})
_PLAIN: Final = frozenset({"fp16", "fp32", "fp64"})


def _decode(data: Array, name: str) -> Array:
    """Codes of a bf16 or fp8 tensor to their exact float32 values; arrays of other types pass through."""
    if name not in _CODED:
        return data
    expected = np.uint16 if name == "bf16" else np.uint8
    if data.dtype != expected:
        raise TypeError(f"interpreted {name} tensor holds {data.dtype}, expected {np.dtype(expected)} codes")
    if name == "bf16":
        return (data.astype(np.uint32) << 16).view(np.float32)
    return _FLOAT8_VALUES[name][data]


def _encode(values: Array, name: str, toward_zero: bool = False) -> Array:
    """Round numbers to the codes of bf16 or fp8: to nearest even, or toward zero."""
    with np.errstate(all="ignore"):
        values = np.asarray(values).astype(np.float32, copy=False)  # integers and fp64 go through fp32, as in torch
        return (_encode_bf16 if name == "bf16" else _encode_float8)(values, name, toward_zero)


def _encode_bf16(values: Array, name: str, toward_zero: bool) -> Array:
    bits = values.view(np.uint32)
    high = bits >> 16
    rounded = high if toward_zero else (bits + (0x7FFF + (high & 1))) >> 16
    # A NaN must not carry into infinity or lose its only mantissa bits: keep sign and payload, set the quiet bit.
    return np.where(np.isnan(values), high | 0x40, rounded).astype(np.uint16)


def _encode_float8(values: Array, name: str, toward_zero: bool) -> Array:
    fmt = _FLOAT8[name]
    min_exponent = 1 - fmt.bias
    nan = np.isnan(values)
    largest = _FLOAT8_VALUES[name][fmt.max_code]
    magnitude = np.where(nan, np.float32(0), np.minimum(np.abs(values), largest))  # saturates
    normal = np.maximum(magnitude, np.ldexp(np.float32(1), min_exponent))  # subnormals and zero share an exponent
    exponent = np.frexp(normal)[1] - 1  # frexp's fraction lies in [0.5, 1)
    steps = np.ldexp(magnitude, fmt.mantissa_bits - exponent)  # magnitude in units of its last place; exact
    steps = np.trunc(steps) if toward_zero else np.rint(steps)
    # A normal number's hidden bit adds one to the exponent field, and so does a carry out of the mantissa.
    code = steps.astype(np.int32) + ((exponent - min_exponent) << fmt.mantissa_bits)
    sign = np.where(np.signbit(values) & ~(fmt.fnuz & (code == 0)), 0x80, 0)
    return np.where(nan, 0x80 if fmt.fnuz else sign | 0x7F, sign | code).astype(np.uint8)


# ---- replacements: each factory gets the original and triton.runtime.interpreter, and returns the mended function ----

Original = Callable[..., Any]


def _refuse_float8(*handles: Any) -> None:
    for handle in handles:
        name = handle.dtype.scalar.name
        if name in _FLOAT8:
            raise TypeError(f"arithmetic on {name} does not compile for any GPU: cast to float32 first")


def _convert_float(original: Original, interp: Any) -> Original:
    def convert(data: Array, source: Any, target: Any, rounding_mode: Any) -> Array:
        names = {source.name, target.name}
        if not names & _CODED:
            return original(data, source, target, rounding_mode)
        if not names <= _CODED | _PLAIN:
            raise NotImplementedError(f"the interpreter shim has no conversion from {source.name} to {target.name}")
        values = _decode(data, source.name)
        if target.name in _CODED:
            return _encode(values, target.name, rounding_mode == interp._ir.ROUNDING_MODE.RTZ)
        return values.astype(interp._get_np_dtype(target))

    return convert


def _cast_impl(original: Original, interp: Any) -> Original:
    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        with np.errstate(all="ignore"):  # a GPU raises no floating-point warnings
            if source.name not in _CODED and target.name not in _CODED:
                return original(self, src, dst_type)
            values = _decode(src.data, source.name)
            if target.name in _CODED:
                return interp.TensorHandle(_encode(values, target.name), target)
            return interp.TensorHandle(values.astype(interp._get_np_dtype(target)), target)

    return cast_impl


def _binary_op(original: Original, interp: Any) -> Original:
    def binary_op(self: Any, lhs: Any, rhs: Any, op: Callable[..., Array]) -> Any:
        _refuse_float8(lhs, rhs)
        dtype = lhs.dtype.scalar
        with np.errstate(all="ignore"):
            if dtype.name == "bf16":
                data = op(_decode(lhs.data, "bf16"), _decode(rhs.data, "bf16"))
                data = data if data.dtype == np.bool_ else _encode(data, "bf16")
            else:
                data = original(self, lhs, rhs, op).data
        return interp.TensorHandle(data, interp.tl.int1 if data.dtype == np.bool_ else dtype)

    return binary_op


def _unary_op(original: Original, interp: Any) -> Original:
    def unary_op(self: Any, arg: Any, op: Callable[..., Array]) -> Any:
        _refuse_float8(arg)
        with np.errstate(all="ignore"):
            if arg.dtype.scalar.name != "bf16":
                return original(self, arg, op)
            return interp.TensorHandle(_encode(op(_decode(arg.data, "bf16")), "bf16"), arg.dtype.scalar)

    return unary_op


def _create_fma(original: Original, interp: Any) -> Original:
    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        _refuse_float8(x, y, z)
        with np.errstate(all="ignore"):
            if z.dtype.scalar.name != "bf16":
                return original(self, x, y, z)
            # The product of two bf16 numbers is exact in fp32, so this rounds like an fp32 fma.
            total = _decode(x.data, "bf16") * _decode(y.data, "bf16") + _decode(z.data, "bf16")
            return interp.TensorHandle(_encode(total, "bf16"), z.dtype.scalar)

    return create_fma


def _create_maxnumf(original: Original, interp: Any) -> Original:
    return lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax)


def _create_minnumf(original: Original, interp: Any) -> Original:
    return lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin)


def _create_clampf(original: Original, interp: Any) -> Original:
    def create_clampf(self: Any, arg: Any, low: Any, high: Any, propagate_nans: Any) -> Any:
        drops_nan = propagate_nans == interp._ir.PROPAGATE_NAN.NONE
        upper, lower = (np.fmin, np.fmax) if drops_nan else (np.minimum, np.maximum)
        return self.binary_op(self.binary_op(arg, low, lower), high, upper)

    return create_clampf


def _create_dot(original: Original, interp: Any) -> Original:
    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        a_name, b_name = a.dtype.scalar.name, b.dtype.scalar.name
        if not {a_name, b_name} <= _CODED | {"fp16", "fp32"}:
            return original(self, a, b, d, input_precision, max_num_imprecise_acc)
        with np.errstate(all="ignore"):
            total = _matmul(_decode(a.data, a_name), _decode(b.data, b_name)) + d.data.astype(np.float32, copy=False)
            return interp.TensorHandle(total.astype(d.data.dtype, copy=False), d.dtype.scalar)

    return create_dot


def _matmul(lhs: Array, rhs: Array) -> Array:
    """fp32 product on one thread: tiles are small, and BLAS threads that contend for busy cores cost milliseconds."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # astype copies, so that torch gets writable memory with positive strides
        product = torch.from_numpy(lhs.astype(np.float32)) @ torch.from_numpy(rhs.astype(np.float32))
        return product.numpy()
    finally:
        torch.set_num_threads(threads)


def _get_bf16(original: Original | None, interp: Any) -> Original:
    return lambda self, value: self.create_fp_trunc(self.get_fp32(value), interp.tl.bfloat16)


def _reduction(original: Original, interp: Any) -> Original:
    def reduction(self: Any, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        tensor = tensor[0] if isinstance(tensor, tuple) else tensor
        _refuse_float8(tensor.handle)
        if tensor.dtype.name != "bf16":
            return original(self, tensor, *args, **kwargs)
        fp32 = interp.tl.float32

        def narrow(result: Any) -> Any:
            if isinstance(result, (tuple, list)):
                return type(result)(narrow(item) for item in result)
            is_index = result.dtype != fp32
            return result if is_index else self.to_tensor(_encode(result.handle.data, "bf16"), tensor.dtype)

        wide = self.to_tensor(_decode(tensor.handle.data, "bf16"), fp32)
        return narrow(original(self, wide, *args, **kwargs))

    return reduction


def _patch_lang_core(original: Original, interp: Any) -> Original:
    def patch_lang_core(lang: Any, scope: Any) -> None:
        original(lang, scope)
        to_ir = lang.dtype.to_ir

        def to_ir_with_fnuz(self: Any, builder: Any) -> Any:
            if self.name == "fp8e4b8":
                return builder.get_fp8e4b8_ty()
            if self.name == "fp8e5b16":
                return builder.get_fp8e5b16_ty()
            return to_ir(self, builder)

        scope.set_attr(lang.dtype, "to_ir", to_ir_with_fnuz)

    return patch_lang_core


class _Patch(NamedTuple):
    owner: str  # class in triton.runtime.interpreter; "" for the module itself
    name: str
    replacement: Callable[[Any, Any], Original]
    required: bool = True  # whether every supported Triton has the name


_PATCHES: Final = (
    _Patch("", "_convert_float", _convert_float),
    _Patch("", "_patch_lang_core", _patch_lang_core),
    _Patch("InterpreterBuilder", "cast_impl", _cast_impl),
    _Patch("InterpreterBuilder", "binary_op", _binary_op),
    _Patch("InterpreterBuilder", "unary_op", _unary_op),
    _Patch("InterpreterBuilder", "create_fma", _create_fma),
    _Patch("InterpreterBuilder", "create_maxnumf", _create_maxnumf),
    _Patch("InterpreterBuilder", "create_minnumf", _create_minnumf),
    _Patch("InterpreterBuilder", "create_clampf", _create_clampf),
    _Patch("InterpreterBuilder", "create_dot", _create_dot),
    _Patch("InterpreterBuilder", "get_bf16", _get_bf16, required=False),
    _Patch("ReduceOps", "sum", _reduction),
    _Patch("ReduceOps", "min_max", _reduction),
    _Patch("ScanOps", "cumsum", _reduction),
    _Patch("ScanOps", "cumprod", _reduction),
)
# Names the replacements use without replacing them.
_USED_NAMES: Final = (
    "TensorHandle",
    "_get_np_dtype",
    "_ir.ROUNDING_MODE.RTZ",
    "_ir.PROPAGATE_NAN.NONE",
    "tl.int1",
    "tl.float32",
    "tl.bfloat16",
    "InterpreterBuilder.create_fp_to_fp",
    "InterpreterBuilder.create_fp_trunc",
    "InterpreterBuilder.get_fp32",
    "InterpreterBuilder.get_fp8e4b8_ty",
    "InterpreterBuilder.get_fp8e5b16_ty",
    "ReduceOps.to_tensor",
    "ScanOps.to_tensor",
)


def _install() -> None:
    """Apply every patch, or none: all names are looked up before the first is replaced."""
    import triton
    from triton.runtime import interpreter as interp

    required = [f"{patch.owner}.{patch.name}".lstrip(".") for patch in _PATCHES if patch.required]
    for path in (*required, *_USED_NAMES):
        _lookup(interp, path, triton.__version__)
    for patch in _PATCHES:
        owner = getattr(interp, patch.owner) if patch.owner else interp
        setattr(owner, patch.name, patch.replacement(getattr(owner, patch.name, None), interp))


def _lookup(module: ModuleType, path: str, version: str) -> None:
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part, None)
        if found is None:
            raise RuntimeError(
                f"triton {version} has no triton.runtime.interpreter.{path}, which dsv4ref.kernels.interpreter needs: "
                "the shim is written for triton 3.6 to 3.9, so install one of those or adapt it"
            )
