"""The command line: ``dsv4ref`` or ``python -m dsv4ref``.

Exit codes: 0 all good; 1 a gate failed, a hazard was not caught, a cap is exceeded or a notebook is off; 2 bad input,
in one line that says what was expected. Listings take ``--json``; their rows are stable.

Heavy imports happen inside commands, because which device is asked for decides how kernels are imported.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console

__all__ = ["app", "main"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="DeepSeek-V4 inference optimisations: proved, broken, predicted, measured.",
)

Ids = Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="Chapters; all of them if none is named.")]
Json = Annotated[bool, typer.Option("--json", help="Rows as a JSON array.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the inputs; default DSV4REF_SEED, else 0.")]
Target = Annotated[
    Literal["cpu", "cuda"] | None, typer.Option(help="Where kernels run; default: a GPU if there is one.")
]

# Off a terminal (CI logs, pipes) tables keep their columns instead of folding at 80.
_console = Console(width=None if sys.stdout.isatty() else 180)
_errors = Console(stderr=True, highlight=False)


def _refuse(message: object) -> NoReturn:
    _errors.print(f"dsv4ref: {message}", markup=False, soft_wrap=True)
    raise typer.Exit(2)


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Around calls that check what the user gave: their refusal becomes one line and exit code 2."""
    try:
        yield
    except typer.Exit:  # a RuntimeError by descent, and already said
        raise
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        _refuse(error)


def _note(line: str) -> None:
    _errors.print(line, markup=False, soft_wrap=True)


def _show(rows: Sequence[Mapping[str, Any]], columns: Sequence[Any], as_json: bool, caption: str) -> None:
    if as_json:
        print(json.dumps(list(rows), indent=1, ensure_ascii=False))
        return
    from dsv4ref.show import tables

    _console.print(tables.rich_table(rows, columns, caption))


def _prepare(target: str | None) -> str:
    """Choose where kernels run before they are imported; "cpu" means the interpreter, on a GPU machine too."""
    import torch

    from dsv4ref import settings

    with _refusals():  # a bad variable is refused here, not from inside a kernel's launcher
        for name in settings.ENV:
            settings.get(name)
    has_gpu = torch.cuda.is_available()
    chosen = target or ("cuda" if has_gpu else "cpu")
    if chosen == "cuda" and not has_gpu:
        _refuse("--device: got cuda, but torch sees no GPU here; expected cpu")
    if chosen == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    with _refusals():
        import dsv4ref.kernels  # noqa: F401
    return chosen


def _seed(seed: int | None) -> int:
    from dsv4ref import settings

    if seed is not None and seed < 0:
        _refuse(f"--seed: got {seed}, expected a whole number from 0 on")
    with _refusals():
        return settings.get("DSV4REF_SEED") if seed is None else seed


def _records() -> tuple[Any, ...]:
    from dsv4ref import settings
    from dsv4ref.evidence import records

    with _refusals():
        return records.shipped(extra=settings.get("DSV4REF_RECORDS"))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show what this machine is, what runs here, and packages that only share a name with what is needed."""
    from dsv4ref import device, settings

    card = device.doctor_card()
    card["environment"] = {
        "set": [r for r in settings.rows() if os.environ.get(r["name"])],
        "unknown": settings.unknown(),
    }
    if as_json:
        print(json.dumps(card, indent=1, ensure_ascii=False, default=str))
        return
    from dsv4ref.show import tables

    facts = [{"fact": key, "value": value} for key, value in card["machine"].items() if key != "spec"]
    _console.print(tables.rich_table(facts, ["fact", "value"], "This machine"))
    known = [{"capability": n, "here": "yes" if n in card["capabilities"] else "no", "meaning": text}
             for n, text in device.CAPABILITIES.items()]  # fmt: skip
    _console.print(tables.rich_table(known, ["capability", "here", "meaning"], "What can run here"))
    packages = [row if isinstance(row, Mapping) else vars(row) for row in card["packages"]]
    _console.print(tables.rich_table(packages, ["package", "verdict", "found", "install"], "Packages"))
    for note in card["notes"]:
        _console.print(f"- {note}", markup=False)
    for row in card["environment"]["unknown"]:
        near = f", did you mean {row['nearest']}?" if row["nearest"] else ""
        _console.print(f"- {row['name']} is set but unknown{near}", markup=False)


@app.command("list")
def list_chapters(as_json: Json = False) -> None:
    """List the chapters: part, gate, notebook, devices with records."""
    from dsv4ref.optimizations import catalogue

    rows = catalogue.rows(_records())
    _show(rows, ["number", "id", "title", "part", "gate", "notebook", "devices"], as_json, "Chapters")


@app.command()
def verify(
    ids: Ids = None,
    device: Target = None,
    cases: Annotated[Literal["tiny", "all"], typer.Option(help="Interpreter-sized cases, or all that fit.")] = "tiny",
    seed: Seed = None,
    as_json: Json = False,
) -> None:
    """Run the gates; exit 1 if one fails."""
    where = _prepare(device)
    from dsv4ref.optimizations import catalogue, chapter
    from dsv4ref.show import tables

    with _refusals():
        chapters = catalogue.select(ids or ())
    run_seed = _seed(seed)
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    for opt in chapters:
        for case in opt.cases.values():
            if cases == "tiny" and not case.tiny:
                continue
            if where == "cpu" and case.needs_gpu:
                left_out.append(f"{opt.id}/{case.name}")
                continue
            rows += chapter.gate_rows(opt, [case.name], target=where, seed=run_seed)
    _show(rows, tables.GATES, as_json, f"Gates on {where}, seed {run_seed}")
    if left_out:
        _note(f"not run: too large for the CPU interpreter, they need a GPU: {', '.join(left_out)}")
    raise typer.Exit(0 if all(row["passed"] for row in rows) else 1)


@app.command()
def hazards(ids: Ids = None, device: Target = None, seed: Seed = None, as_json: Json = False) -> None:
    """Run the planted bugs through the gates; exit 1 if one is not caught."""
    where = _prepare(device)
    from dsv4ref.optimizations import catalogue, chapter
    from dsv4ref.show import tables

    with _refusals():
        chapters = catalogue.select(ids or ())
    run_seed = _seed(seed)
    rows = [row for opt in chapters for row in chapter.hazard_rows(opt, target=where, seed=run_seed)]
    _show(rows, tables.HAZARDS, as_json, f"Planted bugs on {where}, seed {run_seed}")
    raise typer.Exit(0 if all(row["caught"] for row in rows) else 1)


@app.command()
def measure(
    out: Annotated[Path, typer.Option(help="Folder for the records: OUT/<device>/<chapter>.jsonl.")],
    ids: Ids = None,
    seed: Seed = None,
) -> None:
    """Verify on this machine's GPU, then time and append records; exit 1 on a red gate, which stops the chapter."""
    from dsv4ref.evidence import timing

    with _refusals():
        timing.require_gpu("measure")
    _prepare("cuda")
    from dsv4ref.optimizations import catalogue
    from dsv4ref.optimizations import measure as measuring

    with _refusals():
        chapters = catalogue.select(ids or ())
    run_seed = _seed(seed)
    red = False
    for opt in chapters:
        try:
            for record in measuring.measure(opt, out, seed=run_seed, progress=_note):
                ratio = (
                    ""
                    if record.ratio is None
                    else f"  {record.ratio:.3f}x [{record.ratio_low:.3f}, {record.ratio_high:.3f}]"
                )
                _note(
                    f"{record.chapter} {record.case} {record.variant}: {record.p50_us:.1f} us ({record.method}){ratio}"
                )
        except measuring.RedGateError as error:
            red = True
            _note(f"red gate, nothing measured: {error}")
    raise typer.Exit(1 if red else 0)


@app.command()
def profile(
    id: Annotated[str, typer.Argument(metavar="ID", help="The chapter.")],
    out: Annotated[Path, typer.Option(help="Folder for the profiles: OUT/<device>/<chapter>.jsonl.")],
    case: Annotated[list[str], typer.Option(help="A case to profile; may be given several times.")],
    variant: Annotated[list[str] | None, typer.Option(help="A variant that the chapter times; all if none.")] = None,
    seed: Seed = None,
) -> None:
    """Verify, then count with Nsight Compute (ncu) what limits each launch; exit 1 on a red gate. NVIDIA only."""
    from dsv4ref.evidence import profiles, timing

    with _refusals():
        timing.require_gpu("profile")
        profiles.require_program()
    _prepare("cuda")
    from dsv4ref.optimizations import catalogue, watch
    from dsv4ref.optimizations.measure import RedGateError

    run_seed = _seed(seed)
    with _refusals():
        try:
            for found in watch.profile(
                catalogue.get(id), case, out, seed=run_seed, variants=variant or (), progress=_note
            ):  # fmt: skip
                _note(f"{found.case} {found.variant}: {found.kernel}, {found.us:.1f} us: {found.limit}")
        except RedGateError as error:
            _note(f"red gate, nothing profiled: {error}")
            raise typer.Exit(1) from error


@app.command()
def sanitize(
    id: Annotated[str, typer.Argument(metavar="ID", help="The chapter.")],
    out: Annotated[Path, typer.Option(help="Folder for what the tools say: OUT/<device>/<chapter>.jsonl.")],
    case: Annotated[list[str] | None, typer.Option(help="A case to run; the tiny ones if none.")] = None,
    tool: Annotated[list[str] | None, typer.Option(help="memcheck or racecheck; both if not given.")] = None,
    seed: Seed = None,
) -> None:
    """Run what the gate compares under compute-sanitizer; exit 1 if a tool reports anything. NVIDIA only."""
    from dsv4ref.evidence import sanitizer, timing

    with _refusals():
        tools = sanitizer.tools(tool or ())
        timing.require_gpu("sanitize")
        sanitizer.require_program()
    _prepare("cuda")
    from dsv4ref.optimizations import catalogue, watch

    run_seed = _seed(seed)
    clean = True
    with _refusals():
        for found in watch.sanitize(
            catalogue.get(id), case or (), out, seed=run_seed, tools=tools, progress=_note
        ):  # fmt: skip
            clean &= found.clean
            _note(f"{found.case} {found.tool}: {found.errors} errors, {found.warnings} warnings")
            for place, count in found.findings.items():
                _note(f"  {count} x {place}")
    raise typer.Exit(0 if clean else 1)


@app.command()
def ladder(
    out: Annotated[Path, typer.Option(help="Folder of journal, traces and report; a run that was killed continues.")],
    preset: Annotated[
        str, typer.Option(help="h200-short, h200-slice (the sources' 1024 requests), or tiny: a rehearsal.")
    ] = "h200-short",
    device: Target = None,
    repeats: Annotated[int | None, typer.Option(help="Rounds; may grow when a run continues.")] = None,
    order: Annotated[str, typer.Option(help="source, reverse, or switches with commas.")] = "source",
    attribution: Annotated[
        str, typer.Option(help="ladder, orders (two, and each switch left out), or shapley (every set of switches).")
    ] = "ladder",
    switches: Annotated[str | None, typer.Option(help="Only these, with commas; default all there are.")] = None,
    begin: Annotated[
        str | None,
        typer.Option("--from", help="First rung: everything up to this switch on, or off; default the preset's."),
    ] = None,
    seconds: Annotated[float, typer.Option(help="No round ends later than this; run again to continue.")] = math.inf,
    seed: Seed = None,
    as_json: Json = False,
) -> None:
    """Turn the engine's switches on one by one, gates first, rounds interleaved; exit 1 if a gate is red."""
    where = _prepare(device)
    from dataclasses import replace

    from rich.progress import Progress

    from dsv4ref.optimizations import ladder_benchmark as benchmark
    from dsv4ref.optimizations.ladder_runner import REHEARSAL
    from dsv4ref.optimizations.ladder_workload import get_preset
    from dsv4ref.show import tables

    with _refusals():
        chosen = get_preset(preset)
    if begin is not None:
        chosen = replace(chosen, begin=None if begin == "off" else begin)
    if where == "cpu" and not chosen.rehearsal:
        _refuse(f"--preset: got {preset}, which needs a GPU; expected tiny on a CPU")
    run_seed = _seed(seed)
    only = None if switches is None else [name.strip() for name in switches.split(",")]
    with _refusals(), Progress(console=_errors, transient=True, disable=not _errors.is_terminal) as bar:
        task = bar.add_task("ladder", total=1)

        def progress(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        found = benchmark.run_ladder(
            chosen, out, device=where, seed=run_seed, repeats=repeats, order=order, which=attribution, switches=only,
            max_seconds=seconds, progress=progress,
        )  # fmt: skip
    rows = [{"order": name, **row} for name, listed in found.rungs.items() for row in listed]
    if as_json:
        _show(rows, [], True, "")
    else:
        facts = [{"fact": key, "value": value} for key, value in chosen.facts().items()]
        _show(facts, ["fact", "value"], False, f"{chosen.name}: {chosen.about}")
        _show(rows, tables.LADDER, False, f"The ladder on {where}, seed {run_seed}, decode steps only")
        if found.contributions is not None:
            views = [column for column in found.contributions[0] if column != "switch"]
            note = REHEARSAL if chosen.rehearsal else ""
            shares = [{"switch": row["switch"], **{v: tables.interval(row[v]) for v in views}, "note": note}
                      for row in found.contributions]  # fmt: skip
            _show(shares, list(shares[0]), False, f"Saved of a step, % of {rows[0]['rung']}, 95 % interval")
        listed: tuple[tuple[Sequence[Mapping[str, Any]], str], ...] = (
            (found.inside, "A step from inside"),
            (found.captures, "Pairs of captures of the same step, everything on"),
            (found.traces, f"Read back from the traces in {out}"),
            (found.metadata, "The host's part of a step: metadata"),
            ([] if found.soak is None else [vars(found.soak)], "Joins and leaves"),
        )
        for part, title in listed:
            if part:
                _show(part, list(part[0]), False, title)
        if chosen.rehearsal:
            _note(REHEARSAL)
    for name, reason in found.gates.items():
        if reason is not None:
            _note(f"red gate, not reported: {name}: {reason}")
    if found.soak is not None and found.soak.reason is not None:
        _note(f"red gate: {found.soak.reason}")
    if not found.complete:
        _note(f"stopped after {rows[0]['rounds']} rounds; run the same command again to continue")
    raise typer.Exit(0 if found.green else 1)


@app.command()
def report(
    as_json: Json = False,
    html: Annotated[Path | None, typer.Option(help="Also write the scoreboard as one HTML file.")] = None,
) -> None:
    """Print the scoreboard from records: claimed, predicted, measured, peers, stale or not."""
    from dsv4ref.optimizations import catalogue, ladder_report
    from dsv4ref.optimizations.report import report_rows
    from dsv4ref.show import tables

    rows = report_rows(_records())
    if html is not None:
        with _refusals():
            html.write_text(tables.scoreboard_html(rows), encoding="utf-8")
    _show(rows, tables.scoreboard_columns(rows), as_json, "Scoreboard: ratio = baseline / optimised")
    for (device, preset), found in ({} if as_json else ladder_report.shipped_reports()).items():
        age = "STALE" if ladder_report.is_stale(found) else "current"
        title = f"The ladder {preset} on {device}, {found['where']['date']}, {age}"
        _show(ladder_report.figures(found), tables.RUNGS, False, title)
    without = [id for id in catalogue.load() if id not in {row["id"] for row in rows}]
    if without:
        _note(f"no record yet: {', '.join(without)}")


@app.command()
def isa(
    kernels: Annotated[list[str] | None, typer.Argument(metavar="[KERNEL]...", help="Kernels; all if none.")] = None,
    arch: Annotated[list[str] | None, typer.Option(help="gfx942, gfx950; both if not given.")] = None,
    as_json: Json = False,
) -> None:
    """Cross-compile the kernels and show registers, spills, LDS, waves and MFMA; exit 1 over a cap."""
    from dsv4ref.evidence import isa as evidence
    from dsv4ref.optimizations import catalogue
    from dsv4ref.show import tables

    archs = arch or list(evidence.ARCHS)
    rows = []
    with _refusals():
        for name in archs:
            evidence.arch_caps(name)
            requests = {(r.kernel, r.shape): r for opt in catalogue.load().values() for r in opt.kernels(name)}
            known = sorted({kernel for kernel, _ in requests})
            if unknown := sorted(set(kernels or ()) - set(known)):
                _refuse(f"KERNEL: got {', '.join(unknown)}, expected one of {', '.join(known)}")
            chosen = [r for r in requests.values() if not kernels or r.kernel in kernels]
            rows += evidence.compile_rows(chosen, (name,))
    _show([row.as_json() for row in rows], tables.ISA, as_json, "Cross-compiled, no GPU needed")
    violations = evidence.check_caps(rows)
    for line in violations:
        _note(line)
    raise typer.Exit(1 if violations else 0)


@app.command()
def census(
    model: Annotated[str, typer.Argument(metavar="flash|pro|tiny", help="The model, also by its full name.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="A row per kind of tensor, not per dtype.")] = False,
    as_json: Json = False,
) -> None:
    """Derive every tensor of a model's checkpoint from its configuration and add up the bytes."""
    from dsv4ref.config import get_model
    from dsv4ref.ref import census as listing

    with _refusals():
        config = get_model(model if model.startswith("v4-") else f"v4-{model}")
        sums = listing.totals(config)
    caption = f"{config.name}: {sums[-1]['tensors']:,} tensors, {sums[-1]['bytes']:,} bytes"
    if tensors:
        kinds = listing.rows(config)
        if not as_json:
            kinds = [{**row, "shape": " x ".join(map(str, row["shape"]))} for row in kinds]
        _show(kinds, ["tensor", "shape", "dtype", "count", "bytes"], as_json, caption)
    else:
        _show(sums, ["dtype", "tensors", "elements", "bytes"], as_json, caption)


@app.command()
def notebooks(
    check: Annotated[bool, typer.Option("--check", help="Say what is off; exit 1 if anything is.")] = False,
    fix: Annotated[bool, typer.Option("--fix", help="Bring every notebook into normal form.")] = False,
    execute: Annotated[Path | None, typer.Option(help="Run this notebook and keep its headline outputs.")] = None,
    folder: Annotated[Path, typer.Option(help="Where the notebooks are.")] = Path("notebooks"),
    timeout: Annotated[float, typer.Option(help="Seconds a cell may take under --execute.")] = 600.0,
) -> None:
    """Hold the notebooks to their rules."""
    if sum((check, fix, execute is not None)) != 1:
        _refuse("notebooks: expected exactly one of --check, --fix, --execute NOTEBOOK")
    with _refusals():
        from dsv4ref import notebooks as rules
    if execute is not None:
        with _refusals():
            rules.execute(execute, timeout=timeout)
        return
    with _refusals():
        if fix:
            for path in rules.fix(folder):
                _note(f"rewritten: {path}")
        findings = rules.check(folder)
    for finding in findings:
        _note(str(finding))
    raise typer.Exit(1 if findings else 0)


@app.command("new-chapter")
def new_chapter(
    id: Annotated[str, typer.Argument(metavar="ID", help="Python identifier in lower case, e.g. split_k_decode.")],
    number: Annotated[int | None, typer.Option(help="Place in the book; by default behind all others.")] = None,
    title: Annotated[str | None, typer.Option(help="Heading; by default the ID in words.")] = None,
    part: Annotated[str, typer.Option(help="Part of the book: I, II, III, IV or V.")] = "V",
) -> None:
    """Create a chapter that works: module, kernels, notebook and exercise tests of a toy, to replace piece by piece."""
    with _refusals():
        from dsv4ref import new_chapter as template

        chapter = template.plan(id, number=number, title=title, part=part)
        files = template.create(chapter)
    for path in files:
        print(path.relative_to(chapter.root).as_posix())
    _note(f"It works as it is: dsv4ref verify {id}; dsv4ref hazards {id}. Next: book/add-a-chapter.md.")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def lab(
    context: typer.Context,
    folder: Annotated[Path, typer.Option(help="Where the notebooks are.")] = Path("notebooks"),
) -> None:
    """Open JupyterLab at the start notebook; further arguments go to jupyter lab."""
    start = folder / "00_start_here.ipynb"
    if not start.is_file():
        _refuse(f"--folder: no {start.name} in {folder}, expected the notebooks folder of a checkout")
    if shutil.which("jupyter-lab", path=str(Path(sys.executable).parent)) is None:
        _refuse("JupyterLab is not installed here; expected dsv4ref with its lab extra: pip install -e .[lab]")
    # The file is for the browser that opens by itself, the address for the link that is printed for any other.
    address = f"--LabApp.default_url=/lab/tree/{start.name}"
    command = [sys.executable, "-m", "jupyterlab", str(start), address, *context.args]
    # As under make test: on tensors this small a second thread costs more than it gives, most of all on a busy machine.
    raise typer.Exit(subprocess.call(command, env={"OMP_NUM_THREADS": "1"} | os.environ))


def main() -> None:
    """Entry point of the ``dsv4ref`` command."""
    try:
        code = app(standalone_mode=False)
    except Exception as error:
        # Typer's usage errors know their text and exit code; everything else is a bug and keeps its traceback.
        if not hasattr(error, "format_message"):
            raise
        message = " ".join(error.format_message().split())
        if message:
            _errors.print(f"dsv4ref: {message}", markup=False, soft_wrap=True)
        code = getattr(error, "exit_code", 2)
    sys.exit(code if isinstance(code, int) else 0)
