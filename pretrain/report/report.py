"""The report of a run or of several: one HTML page that needs nothing else, and a picture beside it."""

import math
from datetime import datetime
from pathlib import Path

from data_pipeline.errors import RunError
from data_pipeline.files.atomic import disk_errors, write_atomic
from data_pipeline.secret import redact
from pretrain.metric_names import BITS_PER_BYTE, LABEL_SCORES, LOSS, MFU, TOKENS_PER_SECOND, TOKENS_SEEN, VALIDATION
from pretrain.report import compare, html
from pretrain.report.charts import data_of, script
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

    Runs are sorted by their validation loss; by bits per byte where data, tokenizer or validation differ.
    """
    measure = BITS_PER_BYTE if compare.warnings(runs) else VALIDATION
    runs = sorted(runs, key=lambda run: _value(run, measure))
    plots = out.with_name(f"{out.stem}-plots")
    plots.mkdir(parents=True, exist_ok=True)
    drawn = [(panel, panel_png(panel, runs)) for panel in panels(runs)]
    pictures = [html.Picture(panel.title, png, panel.wide, data_of(panel, runs)) for panel, png in drawn]
    for picture in pictures:
        write_atomic(plots / f"{picture.title.lower().replace(' ', '-')}.png", picture.png)
    content = _one_run(runs[0], pictures) if len(runs) == 1 else _several_runs(runs, pictures)
    write_atomic(out.with_suffix(".png"), overview_png(runs, drawn))
    write_atomic(out, content)


def _one_run(run: RunData, pictures: list[html.Picture]) -> str:
    body = [html.heading(run.name, _status(run), verdict(run)), html.about(_about(run)), html.tiles(_tiles(run))]
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
    return html.page(f"{run.name}: training report", body, script())


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
    told = compare.warnings(runs)
    body = [html.heading(f"{len(runs)} runs", None, _best(runs, compared=not told)), *map(html.warning, told)]
    body.append(html.section("Runs", html.table(columns, rows)))
    if different := compare.differing(runs):
        table = html.table(["setting", *(run.name for run in runs)], different)
        body.append(html.section("Settings in which they differ", table))
    if pictures:
        body.append(html.section("Course", html.plots(pictures)))
    body.append(html.section("Verdicts", html.listing([f"{run.name}: {' '.join(verdict(run))}" for run in runs])))
    configs = [html.folded(f"{run.name}: config.yaml", html.text_block(run.config)) for run in runs if run.config]
    if configs:
        body.append(html.section("How they were made", "\n".join(configs)))
    return html.page(f"{len(runs)} runs: training report", body, script())


def _best(runs: list[RunData], *, compared: bool) -> tuple[str, ...]:
    """The first of the sorted runs; by nats a token only where these may be compared."""
    loss, bits = runs[0].last(VALIDATION), runs[0].last(BITS_PER_BYTE)
    if compared:
        unit = f"nats per {runs[0].counted}"
        return () if loss is None else (f"Lowest validation loss: {runs[0].name}, {_number(loss)} {unit}.",)
    return () if bits is None else (f"Fewest bits per byte: {runs[0].name}, {_number(bits)}.",)


def _about(run: RunData) -> list[tuple[str, str]]:
    """When, how long, what and where."""
    if not run.starts:
        return []
    start, fields = run.starts[0], run.starts[-1].fields
    last = max([run.starts[-1].time, *(points[-1].time for points in run.points.values())])
    last = max(last, run.end.time) if run.end else last
    began = datetime.fromtimestamp(start.time / 1e3).astimezone()
    took = _duration((last - start.time) / 1e3)
    ranks, device, host = (fields.get(name) for name in ("world_size", "device", "host"))
    tags = fields.get("tags")
    commit = str(tags.get("git/commit", "")) if isinstance(tags, dict) else ""
    changed = int(tags.get("git/changed_files", 0)) if isinstance(tags, dict) else 0
    return [
        ("begun", f"{began:%F %H:%M %Z}"),
        ("took", f"{took} in {len(run.starts)} attempts, and between them" if run.starts[1:] else took),
        ("command", redact(str(fields.get("command") or ""))),
        ("commit", commit[:12] + (f", {changed} files changed" if changed else "")),
        ("hardware", f"{ranks} × {device}" + (f", {host}" if host else "") if device else ""),
    ]


def _duration(seconds: float) -> str:
    """In at most two units."""
    whole = round(seconds)
    for unit, size, below in (("d", 86400, "h"), ("h", 3600, "min"), ("min", 60, "s")):
        if whole >= size:
            rest = whole % size // {"h": 3600, "min": 60, "s": 1}[below]
            return f"{whole // size} {unit}" + (f" {rest} {below}" if rest else "")
    return f"{whole} s"


def _value(run: RunData, measure: str) -> float:
    value = run.last(measure)
    return value if value is not None and not math.isnan(value) else math.inf


def _status(run: RunData) -> str:
    return str(run.end.fields.get("status")) if run.end else run.state.upper()


def _tiles(run: RunData) -> list[tuple[str, str]]:
    values = [
        (f"training loss, nats/{run.counted}", run.last(LOSS)),
        ("validation, bits/byte", run.last(BITS_PER_BYTE)),
        *((f"validation, {said}", run.last(metric)) for metric, said in LABEL_SCORES.items()),
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
    """A number for people: counts with separators, others with the four digits that mean something."""
    if value is None:
        return "–"
    if not isinstance(value, int | float) or not math.isfinite(value):
        return str(value)
    if isinstance(value, int) or value == 0 or (value.is_integer() and abs(value) >= 10):
        return f"{value:,.0f}"
    if abs(value) >= 1000:
        return f"{float(f'{value:.4g}'):,.0f}"
    return f"{value:#.4g}" if abs(value) >= 1e-2 else f"{value:.2e}"
