"""The child process of `dsv4ref.evidence.isa`: compiles Triton kernels for AMD targets, without a GPU.

It exists because ``TRITON_INTERPRET`` is read when a kernel module (and triton.language itself) is imported: a process
that runs kernels in the interpreter cannot compile them any more. The parent starts this module with the interpreter
off. Protocol: a JSON list of jobs on stdin; one JSON object per job on stdout, in order, written as soon as it is
known; on stderr a line `JOB_MARK` + index before each job, so that what the compiler prints (MLIR and LLVM write to
the file descriptor, not to Python) can be told apart per job even if it kills the process.
"""

import importlib
import json
import os
import sys
from collections.abc import Mapping
from typing import Any

JOB_MARK = "\x1eisa job "


class RequestError(Exception):
    """The request does not fit the kernel it names (as opposed to: the compiler failed)."""


def _find_kernel(module_name: str, function: str) -> Any:
    """Import the module and return the JITFunction, looking through autotune and heuristics wrappers."""
    from triton.runtime.jit import JITFunction

    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise RequestError(f"module {module_name!r} does not import: {type(error).__name__}: {error}") from error
    try:
        kernel = getattr(module, function)
    except AttributeError:
        jitted = sorted(name for name, value in vars(module).items() if isinstance(value, JITFunction))
        raise RequestError(f"module {module_name!r} has no function {function!r}; it has {jitted}") from None
    # Autotuner and Heuristics keep what they wrap in `.fn`; so does JITFunction itself, hence the order of the tests.
    while not isinstance(kernel, JITFunction) and hasattr(kernel, "fn"):
        kernel = kernel.fn
    if not isinstance(kernel, JITFunction) or kernel.is_gluon():
        raise RequestError(
            f"{module_name}.{function} must be a @triton.jit function, got {type(kernel).__name__} "
            f"(TRITON_INTERPRET={os.environ.get('TRITON_INTERPRET')!r} in the compiling process)"
        )
    return kernel


def _bind_constexprs(kernel: Any, job: Mapping[str, Any]) -> dict[str, Any]:
    """Check that every kernel argument is described once; return the constexprs, declared defaults included."""
    import triton.language as tl

    params = {param.name: param for param in kernel.params}
    signature, constexprs = job["signature"], dict(job["constexprs"])
    if unknown := sorted((signature.keys() | constexprs.keys()) - params.keys()):
        raise RequestError(f"arguments {unknown} are not in the kernel's signature {list(params)}")
    if wrong := [name for name in signature if params[name].is_constexpr]:
        raise RequestError(f"arguments {wrong} are declared tl.constexpr: give them in constexprs")
    for name, value in constexprs.items():
        if isinstance(value, str) and value.startswith("tl."):
            constexprs[name] = getattr(tl, value[3:], None)
            if not isinstance(constexprs[name], tl.dtype):
                raise RequestError(f"constexpr {name}={value!r} does not name a dtype of triton.language")
    for name, param in params.items():
        if name not in constexprs and param.is_constexpr and param.has_default:
            constexprs[name] = param.default
    if missing := [name for name in params if name not in signature and name not in constexprs]:
        raise RequestError(f"arguments {missing} are given neither in signature nor in constexprs")
    unspecialised = [
        name
        for name in job["divisible_by_16"]
        if params[name].do_not_specialize or params[name].do_not_specialize_on_alignment
    ]
    if unspecialised:
        raise RequestError(f"divisible_by_16 names {unspecialised}, which the kernel declares do_not_specialize")
    return constexprs


def _compile(job: Mapping[str, Any]) -> dict[str, Any]:
    """Compile one job and return what the parent reads off it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend

    kernel = _find_kernel(job["module"], job["function"])
    constexprs = _bind_constexprs(kernel, job)
    target = GPUTarget("hip", job["arch"], job["wave_size"])
    backend = make_backend(target)
    # The backend drops option names it does not know, so a misspelt option would be measured as the default.
    known = backend.parse_options({}).__dict__
    if unknown := sorted(job["options"].keys() - known.keys()):
        raise RequestError(f"options {unknown} are not options of triton {triton.__version__}: {sorted(known)}")

    attributes = {}
    for index, name in enumerate(kernel.arg_names):
        # The letters are those of the JIT's own argument specialisation (BaseBackend and HIPBackend.parse_attr).
        letters = "D" * (name in job["divisible_by_16"]) + "S" * (name in job["within_2gb"])
        if letters:
            attributes[(index,)] = backend.parse_attr(letters)
    source = ASTSource(
        kernel, {name: job["signature"].get(name, "constexpr") for name in kernel.arg_names}, constexprs, attributes
    )
    options = {**job["options"], "num_warps": job["num_warps"], "num_stages": job["num_stages"]}
    compiled = triton.compile(source, target=target, options=options)
    return {
        "assembly": compiled.asm["amdgcn"],
        "lds": compiled.metadata.shared,
        "num_warps": compiled.metadata.num_warps,
        "triton": triton.__version__,
    }


def _describe(error: BaseException) -> str:
    """The error and its explicit causes, outermost first: Triton nests one per inlined device function."""
    parts = []
    cause: BaseException | None = error
    while cause is not None:
        parts.append(f"{type(cause).__name__}: {cause}")
        cause = cause.__cause__
    return "\n".join(parts)


def main() -> int:
    """Answer every job on stdin; failures are answers too, so the exit status is 0 unless the process dies."""
    # Imported modules and the compiler may print: only answers may reach the real stdout.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for index, job in enumerate(json.load(sys.stdin)):
        print(f"{JOB_MARK}{index}", file=sys.stderr, flush=True)
        try:
            answer = {"ok": True, **_compile(job)}
        except RequestError as error:
            answer = {"ok": False, "kind": "request", "error": str(error)}
        except Exception as error:
            answer = {"ok": False, "kind": "compile", "error": _describe(error)}
        sys.stdout.flush()
        print(json.dumps(answer), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
