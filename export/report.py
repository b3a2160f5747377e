"""Report: what quantization did to each layer, for the terminal, for programs and as a page to look at.

Knows nothing of how layers were quantized: whoever does that says what came of it in a :class:`LayerQuantization`.
"""

from __future__ import annotations

import html
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mvlm.export.errors import ExportError
from mvlm.export.files import atomic_write, check_writable
from mvlm.export.recipe import Recipe


@dataclass(frozen=True)
class LayerQuantization:
    """What became of one weight.

    Attributes:
        name: of its module, ``language_model.layers.3.mlp.down_proj``.
        kind: of what sort it is: ``language_model mlp.down_proj``, ``lm_head``, ``vision_tower mlp.fc1``, …
        scheme: ``int4, groups of 128, hqq``, ``int8 per channel``, ``float32``, …
        shape: of the weight.
        snr_db: of the dequantized weight ŵ against the float32 one w: 10 log10(Σ w² / Σ (w - ŵ)²); inf if exact.
        num_bytes: in the .pte, scales included.
    """

    name: str
    kind: str
    scheme: str
    shape: tuple[int, ...]
    snr_db: float
    num_bytes: int

    @property
    def float32_bytes(self) -> int:
        """Bytes of the weight before it was quantized."""
        return 4 * math.prod(self.shape)


@dataclass(frozen=True)
class KindSummary:
    """What became of all weights of a kind.

    Attributes:
        kind: see :class:`LayerQuantization`.
        schemes: that occur in it; more than one if a width did not allow for the group that was asked for.
        count: of layers.
        num_bytes: in the .pte.
        float32_bytes: before.
        snr_db_min: of its layers, in dB; likewise ``snr_db_median`` and ``snr_db_max``. They are not pooled: energies
            cannot be had back from dB.
        worst: name of the layer with the lowest.
    """

    kind: str
    schemes: tuple[str, ...]
    count: int
    num_bytes: int
    float32_bytes: int
    snr_db_min: float
    snr_db_median: float
    snr_db_max: float
    worst: str


@dataclass(frozen=True)
class QuantizationReport:
    """What became of all weights of a model.

    Attributes:
        model_name: for people.
        recipe: that it was quantized by.
        layers: in the model's order.
    """

    model_name: str
    recipe: Recipe
    layers: tuple[LayerQuantization, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all layers in the .pte."""
        return sum(layer.num_bytes for layer in self.layers)

    @property
    def float32_bytes(self) -> int:
        """Bytes of all layers before."""
        return sum(layer.float32_bytes for layer in self.layers)

    def kinds(self) -> tuple[KindSummary, ...]:
        """A summary per kind, in the order in which they first occur."""
        layers_of: dict[str, list[LayerQuantization]] = {}
        for layer in self.layers:
            layers_of.setdefault(layer.kind, []).append(layer)
        return tuple(_summary(kind, layers) for kind, layers in layers_of.items())

    def worst(self, count: int) -> tuple[LayerQuantization, ...]:
        """The layers with the lowest SNR, the lowest first, without those that are exact."""
        inexact = [layer for layer in self.layers if layer.snr_db != math.inf]
        return tuple(sorted(inexact, key=lambda layer: layer.snr_db)[:count])

    def table(self, worst: int = 5) -> str:
        """For the terminal: a row per kind, the totals, and the layers with the lowest SNR by name."""
        rows = [("kind", "layers", "scheme", "bytes", "of float32", "SNR dB min", "median", "max")]
        rows += [
            (
                summary.kind,
                f"{summary.count:,}",
                " / ".join(summary.schemes),
                f"{summary.num_bytes:,}",
                _share(summary.num_bytes, summary.float32_bytes),
                _decibels(summary.snr_db_min),
                _decibels(summary.snr_db_median),
                _decibels(summary.snr_db_max),
            )
            for summary in self.kinds()
        ]
        share = _share(self.num_bytes, self.float32_bytes)
        rows.append(("total", f"{len(self.layers):,}", "", f"{self.num_bytes:,}", share, "", "", ""))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join(
                f"{cell:{side}{width}}" for cell, side, width in zip(row, "<><>>>>>", widths, strict=True)
            ).rstrip()
            for row in rows
        ]
        lines.append(
            f"compression: {self.float32_bytes:,} bytes of float32 became {self.num_bytes:,}, "
            f"{_ratio(self.float32_bytes, self.num_bytes)}"
        )
        worst_layers = self.worst(worst)
        if worst_layers:
            lines.append("lowest SNR:")
            lines += [f"  {_decibels(layer.snr_db):>5} dB  {layer.name} ({layer.scheme})" for layer in worst_layers]
        return "\n".join(lines)

    def to_json(self) -> str:
        """One JSON document; an SNR that is infinite, because a layer is exact, is null."""
        document = {
            "model_name": self.model_name,
            "recipe": json.loads(self.recipe.to_json()),
            "num_bytes": self.num_bytes,
            "float32_bytes": self.float32_bytes,
            "kinds": [_strict(asdict(summary)) for summary in self.kinds()],
            "layers": [_strict(asdict(layer) | {"float32_bytes": layer.float32_bytes}) for layer in self.layers],
        }
        return json.dumps(document, indent=2, allow_nan=False)

    def to_html(self) -> str:
        """One page that needs nothing but a browser: plots of the SNR, bytes per kind, lowest SNR, recipe."""
        return _page(self)


def check_report_path(path: Path) -> None:
    """Checks, before minutes of work, that a report can be written to ``path``.

    Raises:
        ExportError: it does not end in .json, or it or the page beside it cannot be written.
    """
    if path.suffix.lower() != ".json":
        raise ExportError(
            f"{path}: a report is written as JSON, with a page for people beside it; give a name that ends in .json, "
            f"such as {path.with_suffix('.json') if path.name else 'report.json'}"
        )
    check_writable(path)
    check_writable(path.with_suffix(".html"))


def write_report(report: QuantizationReport, path: Path) -> tuple[Path, Path]:
    """Writes ``path``, which ends in .json, and the page beside it; returns both paths.

    Raises:
        ExportError: see :func:`check_report_path`.
        OSError: the disk is full; what was there before is left as it was.
    """
    check_report_path(path)
    page = path.with_suffix(".html")
    for file_path, content in ((path, report.to_json() + "\n"), (page, report.to_html())):
        with atomic_write(file_path) as file:
            file.write(content.encode())
    return path, page


def _summary(kind: str, layers: Sequence[LayerQuantization]) -> KindSummary:
    decibels = [layer.snr_db for layer in layers]
    return KindSummary(
        kind=kind,
        schemes=tuple(dict.fromkeys(layer.scheme for layer in layers)),
        count=len(layers),
        num_bytes=sum(layer.num_bytes for layer in layers),
        float32_bytes=sum(layer.float32_bytes for layer in layers),
        snr_db_min=min(decibels),
        snr_db_median=statistics.median(decibels),
        snr_db_max=max(decibels),
        worst=min(layers, key=lambda layer: layer.snr_db).name,
    )


def _strict(fields: dict[str, Any]) -> dict[str, Any]:
    """Without numbers that JSON lacks."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in fields.items()
    }


def _decibels(value: float) -> str:
    return "exact" if value == math.inf else f"{value:.1f}"


def _share(num_bytes: int, float32_bytes: int) -> str:
    return f"{num_bytes / float32_bytes:.1%}" if float32_bytes else "–"


def _ratio(float32_bytes: int, num_bytes: int) -> str:
    return f"{float32_bytes / num_bytes:.2f}×" if num_bytes else "–"


# -- the page ---------------------------------------------------------------------------------------------------------

#: Colours of series in light and in dark mode, and the shapes of their points: series differ in both, so that nobody
#: needs to tell colours apart.
_SERIES = (
    ("#2a6fc9", "#6fa8f5", "circle"),
    ("#c8501e", "#f08a5b", "square"),
    ("#12805c", "#3fc595", "triangle"),
    ("#8149c4", "#b794f0", "diamond"),
    ("#96700a", "#d9b13b", "circle"),
    ("#c12f75", "#f07fb2", "square"),
    ("#0a7f94", "#45c3d8", "triangle"),
    ("#5f6368", "#b4b9c0", "diamond"),
)

_WIDTH, _HEIGHT = 760, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 14, 44
#: Height of the strip above the axis for layers that are exact, whose SNR is infinite.
_STRIP = 30

_STYLE = """
:root { color-scheme: light dark; --text: #1d1f23; --muted: #5b6068; --line: #d9dce1; --back: #ffffff; --bar: #2a6fc9;
  SERIES_LIGHT }
@media (prefers-color-scheme: dark) {
  :root { --text: #e8eaed; --muted: #a3a9b3; --line: #3a3f47; --back: #15171a; --bar: #6fa8f5; SERIES_DARK }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem 1rem 3rem; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .25rem; }
p { margin: .25rem 0; }
.muted { color: var(--muted); }
.scroll { overflow-x: auto; }
svg.plot { display: block; width: 100%; min-width: 34rem; height: auto; font: 12px system-ui, sans-serif; }
.grid { stroke: var(--line); stroke-width: 1; }
.axis { fill: var(--muted); }
.path { fill: none; stroke-width: 1.5; opacity: .55; }
.point { stroke: var(--back); stroke-width: 1; }
.point:hover { stroke: var(--text); stroke-width: 2; }
.legend { display: flex; flex-wrap: wrap; gap: .15rem 1.1rem; list-style: none; margin: .25rem 0 0; padding: 0;
  font-size: .875rem; }
.legend svg { width: .8rem; height: .8rem; margin-right: .4rem; vertical-align: -.05rem; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; }
th, td { text-align: left; padding: .3rem .75rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; color: var(--muted); white-space: nowrap; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.name { overflow-wrap: anywhere; min-width: 11rem; }
th.number { text-align: right; }
td .bar { display: block; height: .5rem; margin: .2rem 0; background: var(--bar); border-radius: 0 3px 3px 0;
  min-width: 2px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.25rem; margin: 0; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
"""


def _page(report: QuantizationReport) -> str:
    light = " ".join(f"--series{index}: {series[0]};" for index, series in enumerate(_SERIES))
    dark = " ".join(f"--series{index}: {series[1]};" for index, series in enumerate(_SERIES))
    style = _STYLE.replace("SERIES_LIGHT", light).replace("SERIES_DARK", dark)
    title = f"Quantization of {_escaped(report.model_name)}"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
<p>{len(report.layers):,} layers: {report.float32_bytes:,} bytes of float32 became {report.num_bytes:,},
a compression of {_ratio(report.float32_bytes, report.num_bytes)}.</p>
<h2>Signal-to-noise ratio of each layer</h2>
<p class="muted">Of the weights after quantization against those before, in decibels: higher is better, and 6 dB more
are half the error. Point at a mark to see which layer it is.</p>
{"".join(_plots(report.layers))}
<h2>Bytes and signal-to-noise ratio by kind of layer</h2>
{_kinds_table(report.kinds())}
<h2>Lowest signal-to-noise ratios</h2>
{_worst_table(report.worst(10))}
<h2>Recipe</h2>
{_recipe_list(report.recipe)}
</body>
</html>
"""


def _escaped(text: object) -> str:
    """As text in HTML and SVG, in which control characters may not even be written as entities."""
    return html.escape("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text)))


def _plots(layers: Iterable[LayerQuantization]) -> list[str]:
    """A plot per stack of layers, a series per kind in it; layers that stand alone come together in a last one."""
    stacks: dict[str, dict[str, list[tuple[int, LayerQuantization]]]] = {}
    alone: list[LayerQuantization] = []
    for layer in layers:
        parts = layer.name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
        # What follows the number tells a layer in a stack from, say, the second linear of a projector.
        if number is None or number == len(parts) - 1:
            alone.append(layer)
        else:
            stack = stacks.setdefault(".".join(parts[:number]), {})
            stack.setdefault(layer.kind, []).append((int(parts[number]), layer))
    plots = [_stack_plot(index, name, series) for index, (name, series) in enumerate(stacks.items())]
    if alone:
        plots.append(_alone_plot(len(plots), alone))
    return plots


@dataclass(frozen=True)
class _Scale:
    """The vertical axis of a plot.

    Attributes:
        low: decibels at the bottom.
        high: decibels at the top.
        step: between two ticks.
        exact: whether there is a strip for exact layers above the top.
    """

    low: float
    high: float
    step: float
    exact: bool

    @classmethod
    def of(cls, layers: Iterable[LayerQuantization]) -> _Scale:
        """Just wide enough for the layers: 4-bit layers lie 20 dB below 8-bit ones, and 1 dB is worth seeing."""
        decibels = [layer.snr_db for layer in layers]
        finite = [value for value in decibels if math.isfinite(value)] or [0.0, 10.0]
        step = max(0.5, _round_step((max(finite) - min(finite)) / 5))
        low, high = math.floor(min(finite) / step), math.ceil(max(finite) / step)
        return cls(low * step, max(high, low + 1) * step, step, math.inf in decibels)

    @property
    def top(self) -> float:
        return _TOP + (_STRIP if self.exact else 0)

    def y(self, decibels: float) -> float:
        if decibels == math.inf:
            return _TOP
        value = decibels if math.isfinite(decibels) else self.low
        return self.top + (self.high - value) / (self.high - self.low) * (_HEIGHT - _BOTTOM - self.top)

    def axis(self) -> str:
        """Grid lines and their labels."""
        marks = []
        for index in range(round((self.high - self.low) / self.step) + 1):
            value = self.low + index * self.step
            marks.append((self.y(value), f"{value:g}"))
        if self.exact:
            marks.append((self.y(math.inf), "exact"))
        lines = [
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="axis" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
            for y, label in marks
        ]
        middle = (self.top + _HEIGHT - _BOTTOM) / 2
        lines.append(
            f'<text class="axis" transform="translate(13 {middle:.1f}) rotate(-90)" text-anchor="middle">'
            "SNR in dB</text>"
        )
        return "\n".join(lines)


def _round_step(step: float) -> float:
    """The next 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step)) if step > 0 else 1.0
    return next((factor * power for factor in (1, 2, 5) if factor * power >= step), 10 * power)


def _stack_plot(plot: int, stack: str, series: dict[str, list[tuple[int, LayerQuantization]]]) -> str:
    numbers = [number for points in series.values() for number, _ in points]
    scale = _Scale.of(layer for points in series.values() for _, layer in points)
    first, last = min(numbers), max(numbers)

    def x(number: int) -> float:
        inner = _WIDTH - _LEFT - _RIGHT - 24
        return _LEFT + 12 + (inner / 2 if first == last else (number - first) / (last - first) * inner)

    step = max(1, round(_round_step((last - first) / 16)))
    body = [scale.axis()]
    for number in range(-(-first // step) * step, last + 1, step):
        body.append(
            f'<text class="axis" x="{x(number):.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{number}</text>'
        )
    body.append(
        f'<text class="axis" x="{(_LEFT + _WIDTH - _RIGHT) / 2:.1f}" y="{_HEIGHT - 6}" text-anchor="middle">'
        "layer number</text>"
    )
    legend = []
    for index, (kind, points) in enumerate(series.items()):
        points = sorted(points, key=lambda point: point[0])
        corners = " ".join(f"{x(number):.1f},{scale.y(layer.snr_db):.1f}" for number, layer in points)
        body.append(f'<polyline class="path" stroke="{_color(index)}" points="{corners}"/>')
        body += [_point(index, x(number), scale.y(layer.snr_db), layer) for number, layer in points]
        # The heading has the stack's name already.
        legend.append((index, kind.removeprefix(stack.split(".")[0]).strip() or kind))
    lowest = min((layer for points in series.values() for _, layer in points), key=lambda layer: layer.snr_db)
    description = (
        f"{len(series)} kinds of layers over the layer numbers {first} to {last}. "
        f"The lowest is {_decibels(lowest.snr_db)} dB, of a {lowest.kind}."
    )
    return (
        f"<h3>{_escaped(stack)}</h3>\n{_svg(plot, f'SNR of the layers in {stack}', description, body)}{_legend(legend)}"
    )


def _alone_plot(plot: int, layers: Sequence[LayerQuantization]) -> str:
    """Layers that belong to no stack, side by side; the legend names them."""
    width = (_WIDTH - _LEFT - _RIGHT) / len(layers)
    scale = _Scale.of(layers)
    body, legend = [scale.axis()], []
    for index, layer in enumerate(layers):
        x = _LEFT + (index + 0.5) * width
        body.append(_point(index, x, scale.y(layer.snr_db), layer))
        body.append(
            f'<text class="axis" x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{index + 1}</text>'
        )
        legend.append((index, f"{index + 1}: {layer.kind}"))
    body.append(
        f'<text class="axis" x="{(_LEFT + _WIDTH - _RIGHT) / 2:.1f}" y="{_HEIGHT - 6}" text-anchor="middle">'
        "number in the legend</text>"
    )
    description = f"{len(layers)} layers that belong to no stack."
    return f"<h3>Layers that stand alone</h3>\n{_svg(plot, 'SNR of single layers', description, body)}{_legend(legend)}"


def _svg(plot: int, title: str, description: str, body: Sequence[str]) -> str:
    content = "\n".join(body)
    return f"""<div class="scroll"><svg class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img"
aria-labelledby="plot{plot}-title plot{plot}-desc" xmlns="http://www.w3.org/2000/svg">
<title id="plot{plot}-title">{_escaped(title)}</title>
<desc id="plot{plot}-desc">{_escaped(description)}</desc>
{content}
</svg></div>
"""


def _color(index: int) -> str:
    return f"var(--series{index % len(_SERIES)})"


def _shape(index: int, x: float, y: float, r: float) -> str:
    """The mark of a series: tag and attributes, without the end of the tag."""
    # After all colours were used, the shapes move on by one.
    shapes = ("circle", "square", "triangle", "diamond")
    name = _SERIES[index % len(_SERIES)][2]
    match shapes[(shapes.index(name) + index // len(_SERIES)) % len(shapes)]:
        case "circle":
            return f'circle cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}"'
        case "square":
            return f'rect x="{x - r:.1f}" y="{y - r:.1f}" width="{2 * r:.1f}" height="{2 * r:.1f}"'
        case "triangle":
            return f'path d="M{x:.1f} {y - 1.2 * r:.1f}l{1.2 * r:.1f} {2.2 * r:.1f}h{-2.4 * r:.1f}z"'
        case _:
            r *= 1.3
            return f'path d="M{x:.1f} {y - r:.1f}l{r:.1f} {r:.1f}l{-r:.1f} {r:.1f}l{-r:.1f} {-r:.1f}z"'


def _point(index: int, x: float, y: float, layer: LayerQuantization) -> str:
    shape = _shape(index, x, y, 4)
    snr = _decibels(layer.snr_db) + ("" if layer.snr_db == math.inf else " dB")
    title = f"{layer.name}: {snr}, {layer.scheme}, {layer.num_bytes:,} bytes"
    return f'<{shape} class="point" fill="{_color(index)}"><title>{_escaped(title)}</title></{shape.split()[0]}>'


def _legend(entries: Iterable[tuple[int, str]]) -> str:
    items = "\n".join(
        f'<li><svg viewBox="0 0 12 12" aria-hidden="true" xmlns="http://www.w3.org/2000/svg">'
        f'<{_shape(index, 6, 6, 4.5)} fill="{_color(index)}"/></svg>{_escaped(label)}</li>'
        for index, label in entries
    )
    return f'<ul class="legend">\n{items}\n</ul>\n'


def _kinds_table(kinds: Sequence[KindSummary]) -> str:
    largest = max((summary.num_bytes for summary in kinds), default=0) or 1
    rows = "\n".join(
        f'<tr><td class="name">{_escaped(summary.kind)}<br>'
        f'<span class="muted">{summary.count:,} × {_escaped(" / ".join(summary.schemes))}</span>'
        f'<span class="bar" style="width: {100 * summary.num_bytes / largest:.2f}%"></span></td>'
        f'<td class="number">{summary.num_bytes:,}<br>'
        f'<span class="muted">{_share(summary.num_bytes, summary.float32_bytes)}</span></td>'
        f'<td class="number">{_decibels(summary.snr_db_min)}</td>'
        f'<td class="number">{_decibels(summary.snr_db_median)}</td>'
        f'<td class="number">{_decibels(summary.snr_db_max)}</td></tr>'
        for summary in kinds
    )
    return f"""<div class="scroll"><table>
<thead><tr><th rowspan="2">kind</th><th class="number">bytes</th><th class="number" colspan="3">SNR in dB</th></tr>
<tr><th class="number">of float32</th><th class="number">min</th><th class="number">median</th>
<th class="number">max</th></tr></thead>
<tbody>
{rows}
</tbody></table></div>"""


def _worst_table(layers: Sequence[LayerQuantization]) -> str:
    if not layers:
        return "<p>All layers are exact.</p>"
    rows = "\n".join(
        f'<tr><td class="number">{_decibels(layer.snr_db)} dB</td><td class="name">{_escaped(layer.name)}<br>'
        f'<span class="muted">{_escaped(layer.scheme)}</span></td>'
        f'<td class="number">{" × ".join(map(str, layer.shape))}</td></tr>'
        for layer in layers
    )
    return f"""<div class="scroll"><table>
<thead><tr><th class="number">SNR</th><th>layer</th><th class="number">shape</th></tr></thead>
<tbody>
{rows}
</tbody></table></div>"""


def _recipe_list(recipe: Recipe) -> str:
    fields = json.loads(recipe.to_json())
    rows = "\n".join(f"<dt>{_escaped(name)}</dt><dd>{_escaped(value)}</dd>" for name, value in fields.items())
    return f"<dl>\n{rows}\n</dl>"
