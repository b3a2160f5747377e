"""A benchmark as a picture: SVG, a block per figure and in it a bar per program and number of threads."""

from __future__ import annotations

import html
from collections.abc import Sequence

from mvlm.runtime.bench_output import FIGURES
from mvlm.runtime.bench_report import OURS, FigureResult, Report, Summary, number, short_ratio

_WIDTH = 920
_LEFT, _RIGHT = 324, 220
_TOP, _BOTTOM = 74, 40
_BAR, _GAP, _BLOCK = 17, 5, 40

# Colours in light and in dark mode, as in the report of an export; plain ones first, for programs without variables.
_STYLE = """
svg { --text: #1d1f23; --muted: #5b6068; --line: #d9dce1; --back: #ffffff; --ours: #2a6fc9; --theirs: #b9a08e; }
@media (prefers-color-scheme: dark) {
  svg { --text: #e8eaed; --muted: #a3a9b3; --line: #3a3f47; --back: #15171a; --ours: #6fa8f5; --theirs: #7d6a5c; }
}
.back { fill: #ffffff; fill: var(--back); }
text { font: 12px system-ui, sans-serif; fill: #1d1f23; fill: var(--text); }
.title { font-size: 16px; font-weight: 600; }
.figure { font-weight: 600; }
.muted { fill: #5b6068; fill: var(--muted); }
.ours { fill: #2a6fc9; fill: var(--ours); }
.theirs { fill: #b9a08e; fill: var(--theirs); }
.slower { opacity: .45; }
.axis { stroke: #d9dce1; stroke: var(--line); }
.whisker { stroke: #1d1f23; stroke: var(--text); stroke-width: 1.2; fill: none; }
"""


def plot_svg(report: Report) -> str:
    """The picture. Bars of a block share a scale; what a bar says is written beside it, too."""
    body: list[str] = []
    y = float(_TOP)
    names = [name for name in FIGURES if any(result.name == name for result in report.results)]
    for name in names:
        block, y = _block(name, [result for result in report.results if result.name == name], y)
        body += block
    height = y + _BOTTOM - _BLOCK + 34
    settings = report.settings
    subtitle = (
        f"{report.machine.cpu}, {report.machine.cores} cores; prompt of {settings.prompt_tokens} positions, "
        f"{settings.decode_tokens} tokens decoded; median of {settings.repeat} runs, whiskers from least to most"
    )
    content = "\n".join(body)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" width="{_WIDTH}"
height="{height:.0f}" role="img" aria-labelledby="title desc">
<title id="title">{_escaped(f"Benchmark of {report.model['name']}")}</title>
<desc id="desc">{_escaped(_description(report.results))}</desc>
<style>{_STYLE}</style>
<rect class="back" width="100%" height="100%"/>
<text class="title" x="20" y="30">{_escaped(report.model["name"])}</text>
<text class="muted" x="20" y="50">{_escaped(subtitle)}</text>
{content}
<text class="muted" x="20" y="{height - 16:.0f}">{_escaped(_footer(report))}</text>
</svg>
"""


def _block(name: str, results: Sequence[FigureResult], y: float) -> tuple[list[str], float]:
    figure = FIGURES[name]
    better = "more is better" if figure.higher_is_better else "less is better"
    largest = max(max(result.ours.max, *(other.theirs.max for other in result.against), 0.0) for result in results)
    scale = (_WIDTH - _LEFT - _RIGHT) / largest if largest > 0 else 0.0
    lines = [
        f'<text class="figure" x="20" y="{y + 13:.1f}">{_escaped(figure.title)}</text>',
        f'<text class="muted" x="20" y="{y + 29:.1f}">{figure.unit}, {better}</text>',
    ]
    start = y
    for result in results:
        threads = f"{result.threads} thread{'' if result.threads == 1 else 's'}"
        share = "" if result.share is None else f", {100 * result.share:.0f} % of {result.limit}"
        lines += _bar(f"{OURS}, {threads}", "ours", result.ours, scale, y, share)
        y += _BAR + _GAP
        for other in result.against:
            more = f", ours {short_ratio(name, other.ratio)}"
            kind = "theirs" if other.fastest else "theirs slower"
            lines += _bar(other.label, kind, other.theirs, scale, y, more)
            y += _BAR + _GAP
        y += _GAP
    y = max(y - _GAP, start + 34)
    lines.append(f'<path class="axis" d="M{_LEFT} {start - 4:.1f}V{y:.1f}"/>')
    return lines, y + _BLOCK - 24


def _bar(label: str, kind: str, summary: Summary, scale: float, y: float, more: str) -> list[str]:
    width = max(1.0, summary.median * scale)
    low, high, middle = _LEFT + summary.min * scale, _LEFT + summary.max * scale, y + _BAR / 2
    mark = "~" if summary.disturbed else ""
    return [
        f'<text x="{_LEFT - 8}" y="{middle + 4:.1f}" text-anchor="end">{_escaped(_shortened(label))}</text>',
        f'<rect class="{kind}" x="{_LEFT}" y="{y:.1f}" width="{width:.1f}" height="{_BAR}" rx="2"/>',
        f'<path class="whisker" d="M{low:.1f} {middle:.1f}H{high:.1f}M{low:.1f} {middle - 4:.1f}v8'
        f'M{high:.1f} {middle - 4:.1f}v8"/>',
        f'<text x="{max(_LEFT + width, high) + 8:.1f}" y="{middle + 4:.1f}">{number(summary.median)}{mark}'
        f'<tspan class="muted">{_escaped(more)}</tspan></text>',
    ]


def _shortened(label: str, limit: int = 22) -> str:
    return label if len(label) <= limit else label[: limit - 1] + "…"


def _footer(report: Report) -> str:
    versions = f"mvlm {report.versions.get('mvlm')}, ExecuTorch {report.versions.get('executorch')}, {report.started}"
    disturbed = any(result.ours.disturbed for result in report.results)
    return versions + ("; ~ other programs were busy" if disturbed else "")


def _description(results: Sequence[FigureResult]) -> str:
    parts = [
        f"{FIGURES[result.name].title} with {result.threads} threads: {number(result.ours.median)} "
        f"{FIGURES[result.name].unit}"
        + "".join(f", {other.label} {number(other.theirs.median)}" for other in result.against)
        for result in results
    ]
    return "; ".join(parts)


def _escaped(text: object) -> str:
    return html.escape(str(text))
