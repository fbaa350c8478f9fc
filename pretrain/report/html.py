"""The page of a report: one HTML file that asks for nothing from anywhere. All text in it is escaped here."""

import base64
import html
from typing import Any, NamedTuple

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --dim: #59636e; --line: #d1d9e0; --card: #f6f8fa; --page: #fff;
  --good: #1a7f37; --bad: #cf222e; --wait: #9a6700; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --dim: #9198a1; --line: #30363d; --card: #161b22;
  --page: #0d1117; --good: #3fb950; --bad: #f85149; --wait: #d29922; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 2rem 1.2rem 4rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { margin: 0; font-size: 1.7rem; overflow-wrap: anywhere; } h2 { margin: 2.4rem 0 .8rem; font-size: 1.1rem; }
.status { font-size: .8rem; font-weight: 600; padding: .15rem .6rem; border: 1px solid; border-radius: 1rem;
  vertical-align: middle; margin-left: .6rem; }
.FINISHED { color: var(--good); } .FAILED { color: var(--bad); } .KILLED, .RUNNING { color: var(--wait); }
.verdict { font-size: 1.05rem; margin: .7rem 0 0; overflow-wrap: anywhere; }
.tiles, .plots { display: grid; gap: .8rem; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(135px, 1fr)); margin-top: 1.4rem; }
.plots { grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); }
.tile, figure, pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.tile { padding: .7rem .9rem; } .tile b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
.tile span, figcaption, .dim { color: var(--dim); font-size: .85rem; }
figure { margin: 0; padding: .7rem .8rem; } figcaption { font-weight: 600; } img { display: block; width: 100%; }
.wide { grid-column: 1 / -1; overflow-x: auto; } .wide img { min-width: 640px; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere; }
td:first-child, th:first-child { min-width: 9rem; }
th { color: var(--dim); font-size: .8rem; font-weight: 600; } .num { text-align: right; white-space: nowrap; }
pre { padding: .8rem 1rem; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere;
  font-size: .85rem; margin: .4rem 0; }
.facts { display: grid; grid-template-columns: auto 1fr; gap: .1rem .9rem; margin: 1rem 0 0; font-size: .9rem; }
.facts dt { color: var(--dim); } .facts dd { margin: 0; overflow-wrap: anywhere; }
.warning { border-left: 4px solid var(--wait); padding: .3rem .8rem; margin: .8rem 0 0; }
figure { position: relative; } .chart { touch-action: pan-y; user-select: none; cursor: crosshair; }
.chart text { fill: var(--dim); font-size: 11px; } .chart .name { fill: revert-layer; font-weight: 600; }
.chart .grid { stroke: var(--line); } .chart path { fill: none; stroke-width: 1.6; } .chart .raw { opacity: .25;
  stroke-width: .8; } .chart .dash { stroke-dasharray: 5 3; }
.chart .level, .mark line { stroke: var(--dim); stroke-dasharray: 2 2; }
.mark rect { fill: var(--dim); opacity: .15; }
.tip { position: absolute; top: 2.6rem; padding: .3rem .6rem; background: var(--page); border: 1px solid var(--line);
  border-radius: 6px; font-size: .8rem; pointer-events: none; font-variant-numeric: tabular-nums; }
.tip span, .tip b { display: block; } .tip i { display: inline-block; width: .6rem; height: .6rem; margin-right: .4rem;
  border-radius: 50%; }
summary { cursor: pointer; font-weight: 600; margin: 1rem 0 .3rem; }
"""


class Picture(NamedTuple):
    """A PNG with its title; `wide`: as wide as the page; `data`: of the chart that takes its place, as JSON in which no
    `<` is."""

    title: str
    png: bytes
    wide: bool
    data: str | None = None


def page(title: str, body: list[str], script: str) -> str:
    """A whole document around parts that are HTML already; `script` draws its charts."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + f"\n<script>\n{script}</script>\n</body>\n</html>\n"
    )


def heading(title: str, status: str | None, lines: tuple[str, ...]) -> str:
    """The title, a run's status as a chip, and the verdict."""
    chip = f'<span class="status {html.escape(status)}">{html.escape(status.lower())}</span>' if status else ""
    return f"<h1>{html.escape(title)}{chip}</h1>\n" + "\n".join(
        f'<p class="verdict">{html.escape(x)}</p>' for x in lines
    )


def section(title: str, content: str) -> str:
    """A part of the page."""
    return f"<h2>{html.escape(title)}</h2>\n{content}"


def tiles(pairs: list[tuple[str, str]]) -> str:
    """Large numbers: (label, number)."""
    cards = (f'<div class="tile"><span>{html.escape(k)}</span><b>{html.escape(v)}</b></div>' for k, v in pairs)
    return '<div class="tiles">' + "".join(cards) + "</div>"


def plots(pictures: list[Picture]) -> str:
    """A grid of pictures."""
    figures = (
        f'<figure class="{_width(picture)}"><figcaption>{html.escape(picture.title)}</figcaption>'
        f'<img alt="{html.escape(picture.title)}" '
        f'src="data:image/png;base64,{base64.b64encode(picture.png).decode()}">{_data(picture)}</figure>'
        for picture in pictures
    )
    return '<div class="plots">' + "\n".join(figures) + "</div>"


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A table; the columns after the first hold numbers."""
    head = "".join(f"<th{_align(index)}>{html.escape(column)}</th>" for index, column in enumerate(columns))
    lines = (
        "<tr>" + "".join(f"<td{_align(index)}>{html.escape(cell)}</td>" for index, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>\n' + "\n".join(lines) + "</table></div>"


def facts(tree: dict[str, Any]) -> str:
    """A table of names and values; nested names are joined by dots."""
    rows = "\n".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in _leaves(tree, "")
    )
    return f'<div class="scroll"><table>{rows}</table></div>'


def text_block(text: str) -> str:
    """Text as it is."""
    return f"<pre>{html.escape(text)}</pre>"


def folded(title: str, content: str, *, opened: bool = False) -> str:
    """A part that opens on a click."""
    return f"<details{' open' if opened else ''}><summary>{html.escape(title)}</summary>\n{content}</details>"


def listing(texts: list[str]) -> str:
    """A plain list."""
    return "<ul>" + "".join(f"<li>{html.escape(text)}</li>" for text in texts) + "</ul>"


def about(pairs: list[tuple[str, str]]) -> str:
    """What is to be known first: (label, text)."""
    rows = "".join(f"<dt>{html.escape(label)}</dt><dd>{html.escape(text)}</dd>" for label, text in pairs if text)
    return f'<dl class="facts">{rows}</dl>'


def warning(text: str) -> str:
    """A line that must not be missed."""
    return f'<p class="warning">{html.escape(text)}</p>'


def _data(picture: Picture) -> str:
    return f'<script type="application/json">{picture.data}</script>' if picture.data else ""


def _align(column: int) -> str:
    return ' class="num"' if column else ""


def _leaves(tree: dict[str, Any], prefix: str) -> list[tuple[str, str]]:
    leaves: list[tuple[str, str]] = []
    for name, value in tree.items():
        if isinstance(value, dict):
            leaves += _leaves(value, f"{prefix}{name}.")
        else:
            leaves.append((f"{prefix}{name}", str(value)))
    return leaves


def _width(picture: Picture) -> str:
    return "wide" if picture.wide else "plain"
