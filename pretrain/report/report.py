"""The report of a run or of several: one HTML page that needs nothing else, and a picture beside it."""

import math
from pathlib import Path

from data_pipeline.errors import RunError
from data_pipeline.files.atomic import disk_errors, write_atomic
from pretrain.metric_names import BITS_PER_BYTE, LOSS, MFU, TOKENS_PER_SECOND, TOKENS_SEEN, VALIDATION
from pretrain.report import html
from pretrain.report.plots import overview_png, panel_png, panels
from pretrain.run.run_summary import OF_SOURCES, RunData, load, verdict

SAMPLES_OPEN = 1
MOST_LINES = 50


def write_report(run_dirs: list[Path], out: Path | None) -> Path:
    """Read the runs and write a page about them, with pictures, as `write` does.

    Args:
        run_dirs: run folders; several are laid over each other and sorted by validation.
        out: the page; without it `report.html` in the run folder, or beside it for several.

    Returns:
        the page's path.

    Raises:
        RunError: a folder is not a run folder, or the page cannot be written; says what was expected. Or the page would
            have its picture's name.
    """
    if not run_dirs:
        raise RunError("a report needs at least one run folder")
    if out is None:
        out = (run_dirs[0] if len(run_dirs) == 1 else run_dirs[0].resolve().parent) / "report.html"
    if out.suffix.lower() == ".png":
        raise RunError(f"--out {out}: that would be the picture's name, and the report is a page: let it end in .html")
    if (out.exists() and not out.is_file()) or not out.name:
        raise RunError(f"--out {out}: name the page's file, such as report.html")
    runs = [load(path) for path in run_dirs]
    with disk_errors(out, RunError):
        write(runs, out)
    return out


def write(runs: list[RunData], out: Path) -> None:
    """Write the page `out`, a picture of all of it ending in .png, and each plot into a folder ending in -plots.

    Runs of one dataset are sorted by their loss, others by bits per byte: tokens are not the same there.
    """
    measure = VALIDATION if len(_datasets(runs)) == 1 else BITS_PER_BYTE
    runs = sorted(runs, key=lambda run: _value(run, measure))
    plots = out.with_name(f"{out.stem}-plots")
    plots.mkdir(parents=True, exist_ok=True)
    drawn = [(panel, panel_png(panel, runs)) for panel in panels(runs)]
    pictures = [html.Picture(panel.title, png, panel.wide) for panel, png in drawn]
    for picture in pictures:
        write_atomic(plots / f"{picture.title.lower().replace(' ', '-')}.png", picture.png)
    content = _one_run(runs[0], pictures) if len(runs) == 1 else _several_runs(runs, pictures)
    write_atomic(out.with_suffix(".png"), overview_png(runs, drawn))
    write_atomic(out, content)


def _one_run(run: RunData, pictures: list[html.Picture]) -> str:
    body = [html.heading(run.name, _status(run), verdict(run)), html.tiles(_tiles(run))]
    if pictures:
        body.append(html.section("Course", html.plots(pictures)))
    if run.points:
        body.append(
            html.section("Numbers", html.table(["metric", "first", "last", "lowest", "at step"], _numbers(run)))
        )
    if run.samples:
        newest = sorted(run.samples, key=lambda sample: sample.step or 0, reverse=True)
        texts = (
            html.folded(
                f"after step {sample.step}", html.text_block(str(sample.fields.get("text"))), opened=i < SAMPLES_OPEN
            )
            for i, sample in enumerate(newest)
        )
        body.append(html.section("Text it wrote", "\n".join(texts)))
    if run.warnings:
        texts_ = [str(warning.fields.get("text")) for warning in run.warnings]
        body.append(html.section("Warnings", html.listing(texts_[-MOST_LINES:])))
    if run.slowest:
        lines = [
            f"step {record.step:,}: rank {record.fields['rank']} on "
            f"{record.fields['host']} took {record.fields['ratio']:.2f} times the mean"
            for record in run.slowest
        ]
        body.append(html.section("Ranks that held up the others", html.listing(lines[-MOST_LINES:])))
    about = []
    if run.config:
        about.append(html.folded("config.yaml", html.text_block(run.config)))
    if run.facts:
        about.append(html.folded("Environment", html.facts(run.facts), opened=True))
    if about:
        body.append(html.section("How it was made", "\n".join(about)))
    return html.page(f"{run.name}: training report", body)


def _several_runs(runs: list[RunData], pictures: list[html.Picture]) -> str:
    columns = ["run", "status", "step", "training loss", "validation loss", "bits/byte", "tokens/s", "parameters"]
    rows = [
        [
            run.name,
            _status(run).lower(),
            f"{run.last_step:,}",
            *(_number(run.last(name)) for name in (LOSS, VALIDATION, BITS_PER_BYTE, TOKENS_PER_SECOND)),
            _number(run.facts.get("parameters")),
        ]
        for run in runs
    ]
    lines = _best(runs)
    body = [html.heading(f"{len(runs)} runs", None, lines), html.section("Runs", html.table(columns, rows))]
    if pictures:
        body.append(html.section("Course", html.plots(pictures)))
    body.append(html.section("Verdicts", html.listing([f"{run.name}: {' '.join(verdict(run))}" for run in runs])))
    configs = [html.folded(f"{run.name}: config.yaml", html.text_block(run.config)) for run in runs if run.config]
    if configs:
        body.append(html.section("How they were made", "\n".join(configs)))
    return html.page(f"{len(runs)} runs: training report", body)


def _best(runs: list[RunData]) -> tuple[str, ...]:
    """The first of the sorted runs, and what its lead means."""
    loss, bits = runs[0].last(VALIDATION), runs[0].last(BITS_PER_BYTE)
    if len(_datasets(runs)) == 1:
        return () if loss is None else (f"Lowest validation loss: {runs[0].name}, {_number(loss)} nats per token.",)
    differ = (
        "These runs were trained on different datasets: nats per token do not compare, and bits per byte do only where "
        "the held-out text is the same."
    )
    return (differ,) if bits is None else (differ, f"Fewest bits per byte: {runs[0].name}, {_number(bits)}.")


def _datasets(runs: list[RunData]) -> set[str]:
    """Fingerprints; runs that do not tell theirs count as of one."""
    found = (run.facts.get("dataset") for run in runs)
    return {str(dataset.get("fingerprint")) for dataset in found if isinstance(dataset, dict)} or {""}


def _value(run: RunData, measure: str) -> float:
    value = run.last(measure)
    return value if value is not None and not math.isnan(value) else math.inf


def _status(run: RunData) -> str:
    return str(run.end.fields.get("status")) if run.end else run.state.upper()


def _tiles(run: RunData) -> list[tuple[str, str]]:
    values = [
        ("training loss, nats/token", run.last(LOSS)),
        ("validation, bits/byte", run.last(BITS_PER_BYTE)),
        ("tokens per second", run.last(TOKENS_PER_SECOND)),
        ("model FLOPs utilisation", run.last(MFU)),
        ("tokens seen", run.last(TOKENS_SEEN)),
        ("parameters", run.facts.get("parameters")),
        ("ranks", run.facts.get("world_size")),
        ("attempts", len(run.starts) or None),
    ]
    return [(label, _number(value)) for label, value in values if value is not None]


def _numbers(run: RunData) -> list[list[str]]:
    """One row a metric; the gates' single sites are in the picture."""
    rows = []
    for name in sorted(name for name in run.points if name.count("/") <= 1 or name.startswith(OF_SOURCES)):
        points = run.points[name]
        finite = [point for point in points if math.isfinite(point.value)]
        lowest = min(finite, key=lambda point: point.value, default=None)
        rows.append(
            [
                name,
                _number(points[0].value),
                _number(points[-1].value),
                _number(lowest.value if lowest else None),
                f"{lowest.step:,}" if lowest else "–",
            ]
        )
    return rows


def _number(value: object) -> str:
    """A number for people: counts with separators, others with what matters of their digits."""
    if value is None:
        return "–"
    if not isinstance(value, int | float) or not math.isfinite(value):
        return str(value)
    if isinstance(value, int) or value == 0 or abs(value) >= 1000 or (value.is_integer() and abs(value) >= 10):
        return f"{value:,.0f}"
    return f"{value:.4f}" if abs(value) >= 1e-2 else f"{value:.2e}"
