"""Validate as a stage: a pipeline's folder, or two graphs, in; a report of where they differ out."""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from suture.core.errors import UserError
from suture.core.loads import check_loads
from suture.core.manifest import read_manifest
from suture.core.proof.prove import compare_two
from suture.core.reader import read_json
from suture.core.stage import Stage
from suture.core.weights import load_graph, weight_files, weights_root
from suture.runtime.graphs import open_embedding, open_graph
from suture.validate import golden
from suture.validate.bundle import write_bundle
from suture.validate.compare import DIFFERENT, FAILED, NOT_RUN, PASSED
from suture.validate.level import Level
from suture.validate.levels import compare_graphs, run_levels
from suture.validate.options import STDOUT, ValidateOptions
from suture.validate.pipeline import find_pipeline
from suture.validate.progress import Progress
from suture.validate.proven import level_of_two, refuse_other_inputs, subject_of, with_pair
from suture.validate.report import as_json, exit_status, make_report, verdict, write_report
from suture.validate.results import check_targets, write_results
from suture.validate.text_level import scenarios_for

REPORTS = ("report.json", "report.html", "summary.md")
COLORS = {PASSED: "green", DIFFERENT: "bold red", FAILED: "bold red", NOT_RUN: "dim"}
console = Console()


def bundle_pipeline(folder: Path, options: ValidateOptions, out: Path | None = None) -> int:
    """Writes what a machine with a GPU needs to run the pipeline's engine into `out` (default: folder/bundle), and says what
    to do with it. Returns the exit status."""
    pipeline = find_pipeline(folder, options.text)
    files = pipeline.decoder
    if files is None:
        raise UserError(folder, "has no part that writes tokens", "run its engines with suture.runtime.engine")
    for stage, path in (("surgery", files.portable), ("surgery", files.lowered), ("build", files.engine)):
        if path is None:
            raise UserError(files.part.folder / stage, "has no results", f"run python -m {stage} first")
    out = out or folder / "bundle"
    with Progress(console) as progress:
        progress.tell("writing the bundle")
        bundle = write_bundle(files.portable, files.lowered, files.engine, out,
                              lambda graph: scenarios_for(pipeline, graph, options.seed), options.tolerance,
                              pipeline.embed and open_embedding(pipeline.embed))  # fmt: skip
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    for each in bundle["left_out"]:
        _print(f"validate: left out: {each}")
    _print(f"validate: {out}, {size / 1e6:,.1f} MB. Copy it to a machine with a GPU, run\n    python run.py")
    _print(f"in it, and bring results.npz back to\n    python -m validate {folder} --import results.npz")
    return 0


def validate_pipeline(folder: Path, options: ValidateOptions, results: Path | None = None, force: bool = False) -> int:
    """Runs all levels on a pipeline's folder and writes folder/validate. Returns the exit status.

    `results`: of the folder's bundle, from a machine with a GPU."""
    pipeline = find_pipeline(folder, options.text, results)
    read = [*pipeline.files, *_weights(pipeline.graphs)]
    check_targets(options, read, folder / "validate")
    stage = Stage(
        "validate",
        folder / "validate",
        inputs=read,
        options={"text": options.text, "tolerance": options.tolerance, "seed": options.seed},
        writes=REPORTS,
    )
    title = pipeline.checkpoint.resolve().name if pipeline.checkpoint else folder.resolve().name
    return _run(stage, title, force, folder, lambda progress, save: run_levels(
        pipeline, options.tolerance, options.seed, lambda level, scenario: save(f"{level}-{scenario}"), progress,
        again=force or options.tolerance is not None or options.seed != 0,
    ), options)  # fmt: skip


def save_golden(folder: Path, golden_folder: Path, options: ValidateOptions, force: bool = False) -> int:
    """Writes what the pipeline's exported graphs compute, to be compared with later. Returns the exit status."""
    steps = golden.save(find_pipeline(folder, None), golden_folder, options.tolerance, options.seed, force)
    _print(f"validate: golden outputs of {steps} steps → {golden_folder}")
    return 0


def check_golden(folder: Path, golden_folder: Path, options: ValidateOptions) -> int:
    """The pipeline's graphs against golden outputs. Returns the exit status."""
    pipeline = find_pipeline(folder, None)
    check_targets(options, [*pipeline.files, *golden_folder.glob("*.json")])
    return _told(f"{golden_folder.name} ↔ {folder.name}", golden.check(pipeline, golden_folder, options.tolerance), options)


def validate_graphs(
    reference: Path, candidate: Path, options: ValidateOptions, out: Path | None = None, force: bool = False
) -> int:
    """Compares two graphs; with `out`, writes the same report there. Returns the exit status."""
    inputs = [reference, candidate, *_weights([reference, candidate])]
    check_targets(options, inputs, out)
    subjects = [subject_of(path) for path in (reference, candidate)]
    for path, each in zip((reference, candidate), subjects):
        check_loads(each.model, path, each.root)  # else nothing would be compared, and nothing differ
    decoders = all(each.signature.caches for each in subjects)
    refuse_other_inputs(*subjects, reference, candidate, decoders)

    def compare(progress: Progress, save: Callable[[str], Path] | None) -> list[Level]:
        def check() -> Level:
            pair = compare_two(*subjects, options.tolerance, options.seed)
            if not decoders:
                return level_of_two(pair)
            graphs = open_graph(reference), open_graph(candidate)
            return with_pair(compare_graphs(*graphs, options.tolerance, options.seed, save, progress.tell), pair)

        return [progress.level(f"{reference} ↔ {candidate}", check)]

    if out is None:
        with Progress(_console(options)) as progress:
            levels = compare(progress, None)
        return _told(f"{reference.name} ↔ {candidate.name}", levels, options)
    stage = Stage("validate", out, inputs, {"tolerance": options.tolerance, "seed": options.seed}, REPORTS)
    return _run(stage, f"{reference.name} ↔ {candidate.name}", force, None, compare, options)


def _run(stage: Stage, title: str, force: bool, folder: Path | None, check, options: ValidateOptions) -> int:
    found = (read_manifest(stage.out) or {}).get("verdict")
    if stage.up_to_date() and found in COLORS and not force:
        write_results(title, found, exit_status(found), read_json(stage.out / "report.json")["levels"], options)
        if options.json != STDOUT:
            _print(f"validate: up to date, {found} ({stage.out}/report.html)")
        return exit_status(found)
    started = time.monotonic()
    with stage.writing() as partial:
        (partial / "polygraphy").mkdir()

        def save(name: str) -> Path:
            return partial / "polygraphy" / f"{name.replace(' ', '-')}.json"

        with Progress(_console(options)) as progress:
            levels = check(progress, save)
            progress.tell("writing the report")
            write_report(make_report(title, levels, stage.identity["versions"], started, folder), partial, folder)
        stage.extra["verdict"] = verdict(levels)
    status = _told(title, levels, options)
    if options.json != STDOUT:
        _print(f"validate: {verdict(levels)} → {stage.out}/report.html", style=COLORS[verdict(levels)])
    return status


def _told(title: str, levels: list[Level], options: ValidateOptions) -> int:
    """Shows and writes what was found; returns its exit status."""
    found = verdict(levels)
    write_results(title, found, exit_status(found), [as_json(level) for level in levels], options)
    if options.json != STDOUT:
        _show(levels)
    return exit_status(found)


def _console(options: ValidateOptions) -> Console:
    """Where progress is told: beside a result on standard output nothing else stands there."""
    return Console(stderr=True) if options.json == STDOUT else console


def _weights(graphs: list[Path]) -> list[Path]:
    """The files that the graphs' weights lie in; of a graph that cannot be read, a level says so."""
    files = set()
    for path in graphs:
        with suppress(UserError):
            files |= {*weight_files(load_graph(path), weights_root(path))}
    return sorted(files)


def _print(line: str, style: str | None = None) -> None:
    console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


def _show(levels: list[Level]) -> None:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("level", "", "result", "worst error"):
        table.add_column(heading, overflow="fold")
    for level in levels:
        status = f"[{COLORS[level.status]}]{level.status}[/]"
        details = "".join(f"\n[dim]{escape(detail)}[/]" for detail in _details(level))
        table.add_row(str(level.number or ""), escape(level.title) + details, status, escape(level.worst))
    console.print(table)


def _details(level: Level) -> Iterator[str]:
    if level.reason:
        yield level.reason
    for scenario in level.comparison.scenarios if level.comparison else []:
        if scenario.reason:
            yield f"{scenario.name}: {scenario.reason}"
        elif scenario.status == DIFFERENT:
            yield f"{scenario.name}: " + ", ".join(scenario.exceeding(level.comparison.tolerance)[:4])
    for reading in level.tokens.readings if level.tokens else []:
        yield (f"{reading.name}: {reading.agreement:.2%} of the likeliest tokens alike, mean KL {reading.mean_kl}, "
               f"{reading.candidate_bits} bits a byte ({reading.reference_bits})")  # fmt: skip
