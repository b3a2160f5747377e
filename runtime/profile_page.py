"""The profile as a picture and as a page: an icicle, in which every box is as wide as it took time.

From top to bottom: all calls, method, phase, layer, instruction. Pictures and page need nothing but a browser, and no
script; what is in a box is told by a tooltip, and all that matters by the page's tables too.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from mvlm.runtime.profile_facts import InstructionTime, Layers, Part, Profile, Time, milliseconds, shares
from mvlm.runtime.profile_program import BETWEEN

#: Colours of kinds of work in light mode, under white text, and in dark mode, under dark text.
_COLORS = (
    ("#2a6fc9", "#6fa8f5"),
    ("#b84a1b", "#f08a5b"),
    ("#12795a", "#3fc595"),
    ("#8149c4", "#b794f0"),
    ("#86640a", "#d9b13b"),
    ("#b92d70", "#f07fb2"),
    ("#0a7789", "#45c3d8"),
    ("#7d5140", "#d3a18d"),
    ("#4c5fb0", "#98a8ec"),
    ("#5a7a1e", "#a3c95f"),
)
#: Kinds beyond those that have a colour of their own.
_OTHER = ("#5f6368", "#b4b9c0")

_WIDTH, _ROW, _MARGIN = 1200, 26, 8
#: Of 12-pixel text, about; a label that does not fit its box is cut, or left out.
_CHARACTER = 6.6
#: Below this width a box is no more than a hairline, and its time is that of its parent.
_HAIRLINE = 0.05

#: Text, text beside it, lines, background, frames (methods, phases, layers), time between, text on a kind's colour.
_INK = {
    "text": ("#1d1f23", "#e8eaed"),
    "muted": ("#5b6068", "#a3a9b3"),
    "line": ("#c9cdd4", "#4a505a"),
    "back": ("#ffffff", "#15171a"),
    "frame": ("#e9ecf1", "#2b2f36"),
    "gap": ("#f6f7f9", "#1e2125"),
    "on-kind": ("#ffffff", "#15171a"),
}

_CHART_STYLE = """
svg.icicle { color-scheme: light dark; font: 12px system-ui, sans-serif; }
.icicle rect { stroke-width: .75; }
.icicle .back { stroke: none; }
.icicle text { pointer-events: none; }
.icicle g:hover > rect { stroke-width: 1.75; }
"""

_PAGE_STYLE = """
:root { color-scheme: light dark; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 80rem; padding: 1.5rem 1rem 3rem; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .25rem; }
p { margin: .25rem 0; overflow-wrap: anywhere; }
.muted { color: var(--muted); }
.scroll { overflow-x: auto; }
svg.icicle { display: block; width: 100%; min-width: 50rem; height: auto; }
.swatch { display: inline-block; width: .8rem; height: .8rem; margin-right: .45rem; border: 1px solid var(--line);
  border-radius: 2px; vertical-align: -.05rem; }
table { border-collapse: collapse; font-size: .875rem; }
th, td { text-align: left; padding: .3rem 1.25rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; color: var(--muted); }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.phase { padding-left: 1.25rem; }
"""


def escaped(text: object) -> str:
    """As text in HTML and SVG, in which control characters may not even be written as entities."""
    return html.escape("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text)))


# -- the tree ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Box:
    """A box of the icicle.

    Attributes:
        name: of what it stands for.
        total_ns: that it took.
        count: of calls or runs.
        level: row of its top, 0 for all calls.
        kind: of work, of boxes that are instructions or the time between them.
        children: in the order in which they run; together they take no longer than it.
    """

    name: str
    total_ns: float
    count: int
    level: int
    kind: str | None = None
    children: tuple[Box, ...] = field(default_factory=tuple)


#: Rows: all calls, method, phase, layer, instruction.
_LEVELS = 5
_METHOD, _PHASE, _LAYER, _INSTRUCTION = 1, 2, 3, 4


def boxes(profile: Profile) -> Box:
    """The icicle of a profile: its uppermost box, which is all calls."""
    methods = []
    for whole, _ in profile.methods():
        parts = [part for part in profile.parts if part.method.name == whole.name]
        if parts[0].phase is None and len(parts) == 1:
            children = _part_boxes(parts[0])
        else:
            children = tuple(
                Box(part.phase or "other calls", part.total_ns, len(part.calls), _PHASE, None, _part_boxes(part))
                for part in parts
            )
        total = sum(part.total_ns for part in parts)
        methods.append(Box(whole.name, total, whole.count, _METHOD, None, children))
    return Box("all calls", profile.total_ns, len(profile.recording.calls), 0, None, tuple(methods))


def _part_boxes(part: Part) -> tuple[Box, ...]:
    """Layers and instructions of a part, and what is between them."""
    found: list[Box] = []
    number = 0
    stacks = {stack.start: (index, stack) for index, stack in enumerate(part.method.stacks)}
    while number < len(part.method.instructions):
        if number in stacks:
            index, stack = stacks[number]
            for layer in range(stack.count):
                first = stack.start + layer * stack.period
                inside = _instruction_boxes(part, range(first, first + stack.period), _INSTRUCTION)
                name = f"layer {index}.{layer}" if index else f"layer {layer}"
                found.append(Box(name, part.layer_ns(index, layer), len(part.calls), _LAYER, None, inside))
            number = stack.stop
        else:
            found += _instruction_boxes(part, range(number, number + 1), _LAYER)
            number += 1
    found.append(Box(BETWEEN, part.between_ns, len(part.calls), _LAYER, BETWEEN))
    return tuple(found)


def _instruction_boxes(part: Part, numbers: Iterable[int], level: int) -> tuple[Box, ...]:
    instructions = part.method.instructions
    return tuple(
        Box(
            f"{number}: {instructions[number].name}",
            part.instruction_ns[number],
            part.instruction_count[number],
            level,
            instructions[number].kind,
        )
        for number in numbers
        if number in part.instruction_ns
    )


# -- the picture ------------------------------------------------------------------------------------------------------


def _kinds(profile: Profile) -> dict[str, int | None]:
    """Kind of work -> number of its colour; the kinds that take most have one each. Time between has none."""
    ranked = [work.time.name for work in profile.work() if work.time.name != BETWEEN]
    return {kind: index if index < len(_COLORS) else None for index, kind in enumerate(ranked)}


def _chart_colors(mode: int) -> str:
    """Rules for light mode, 0, or dark mode, 1. Not every program that shows SVG knows CSS variables."""
    ink = {name: colors[mode] for name, colors in _INK.items()}
    kinds = [*((f"kind{index}", colors[mode]) for index, colors in enumerate(_COLORS)), ("kind-other", _OTHER[mode])]
    boxes = [*kinds, *((name, ink[name]) for name in ("frame", "gap", "back"))]
    rules = [
        f".icicle text {{ fill: {ink['text']}; }}",
        f".icicle .on-kind {{ fill: {ink['on-kind']}; }}",
        f".icicle rect {{ stroke: {ink['back']}; }}",
        f".icicle g:hover > rect {{ stroke: {ink['text']}; }}",
        *(f".{name} {{ fill: {color}; background: {color}; }}" for name, color in boxes),
    ]
    return "\n".join(rules)


def _style(page: bool) -> str:
    """The style sheet of a picture that stands alone, or of the page."""

    def mode(index: int) -> str:
        variables = " ".join(f"--{name}: {colors[index]};" for name, colors in _INK.items())
        return _chart_colors(index) + (f"\n:root {{ {variables} }}" if page else "")

    dark = f"@media (prefers-color-scheme: dark) {{\n{mode(1)}\n}}"
    return f"<style>{_CHART_STYLE}{mode(0)}\n{dark}\n{_PAGE_STYLE if page else ''}</style>"


def _color(index: int | None) -> str:
    """Class of a kind of work."""
    return "kind-other" if index is None else f"kind{index}"


@dataclass(frozen=True)
class _Chart:
    """Draws boxes under a root."""

    root: Box
    kinds: dict[str, int | None]
    whole_ns: float

    def svg(self, identifier: str, title: str, style: str = "") -> str:
        top = self.root.level
        height = (_LEVELS - top) * _ROW + 2 * _MARGIN
        body = "\n".join(self._box(self.root, (), _MARGIN, _WIDTH - 2 * _MARGIN, top))
        description = (
            f"Each box is as wide as it took time, {milliseconds(self.root.total_ns / 1e6)} ms in all; below it is "
            f"what it consists of. {self._longest()}"
        )
        return f"""<svg class="icicle" viewBox="0 0 {_WIDTH} {height}" role="img"
aria-labelledby="{identifier}-title {identifier}-desc" xmlns="http://www.w3.org/2000/svg">
<title id="{identifier}-title">{escaped(title)}</title>
<desc id="{identifier}-desc">{escaped(description)}</desc>
{style}<rect class="back" x="0" y="0" width="{_WIDTH}" height="{height}"/>
{body}
</svg>
"""

    def _longest(self) -> str:
        children = sorted(self.root.children, key=lambda box: -box.total_ns)[:3]
        names = ", ".join(f"{box.name} {self._share(box):.1%}" for box in children)
        return f"The longest in it, of all calls: {names}." if names else ""

    def _share(self, box: Box) -> float:
        return box.total_ns / self.whole_ns if self.whole_ns else 0.0

    def _box(self, box: Box, above: tuple[str, ...], x: float, width: float, top: int) -> list[str]:
        if width < _HAIRLINE:
            return []
        # Where a level is left out, no phases or no layers, what is above or below reaches over it.
        below = min((child.level for child in box.children), default=_LEVELS)
        y, height = _MARGIN + (box.level - top) * _ROW, (below - box.level) * _ROW
        color = {None: "frame", BETWEEN: "gap"}.get(box.kind) or _color(self.kinds[box.kind])
        path = (*above, box.name) if box.level else ()
        lines = [
            f'<g><rect class="{color}" x="{x:.2f}" y="{y}" width="{width:.2f}" height="{height}"/>'
            f"<title>{escaped(self._tooltip(box, path))}</title>"
        ]
        on_kind = ' class="on-kind"' if box.kind is not None and box.kind != BETWEEN else ""
        if label := self._label(box, width - 8):
            lines.append(f'<text{on_kind} x="{x + 4:.2f}" y="{y + height / 2 + 4:.1f}">{escaped(label)}</text>')
        lines.append("</g>")
        drawn = ["".join(lines)]
        at = x
        for child in box.children:
            share = child.total_ns / box.total_ns if box.total_ns else 0.0
            drawn += self._box(child, path, at, width * share, top)
            at += width * share
        return drawn

    def _tooltip(self, box: Box, path: tuple[str, ...]) -> str:
        where = " › ".join(path) or box.name
        mean = box.total_ns / 1e3 / box.count if box.count else 0.0
        kind = f"\n{box.kind}" if box.kind not in (None, BETWEEN) else ""
        return (
            f"{where}{kind}\n".replace("\n", ", ")
            + f"{milliseconds(box.total_ns / 1e6)} ms, {self._share(box):.1%} of all, "
            + f"{box.count:,} {'time' if box.count == 1 else 'times'} {mean:,.1f} µs"
        )

    def _label(self, box: Box, room: float) -> str:
        """As much of the name as fits: with the time, without, only what tells it from its neighbours, the start."""
        characters = int(room / _CHARACTER)
        name = box.name.split(": ", 1)[-1] if box.kind else box.name
        short = _short(name)
        for label in (f"{name}  {milliseconds(box.total_ns / 1e6)} ms", name, short):
            if len(label) <= characters:
                return label
        return f"{short[: characters - 1]}…" if characters >= 4 else ""


def _short(name: str) -> str:
    """``256 → 768`` for a linear, ``attention`` for ``mvlm::attention.out``, ``3`` for layer 3."""
    if name.startswith(("linear ", "linears ")):
        return name.split(" ", 1)[1].split(", int")[0].split(", float")[0]
    return name.split("::")[-1].split(".")[0] if "::" in name else name.removeprefix("layer ")


def to_svg(profile: Profile) -> str:
    """The icicle as a picture that stands alone."""
    kinds = _kinds(profile)
    return _Chart(boxes(profile), kinds, profile.total_ns).svg("icicle", _title(profile), _style(page=False) + "\n")


def _title(profile: Profile) -> str:
    return f"Where the time went: {profile.program.model_name or profile.program.path.name}"


# -- the page ---------------------------------------------------------------------------------------------------------


def to_html(profile: Profile, top: int = 15) -> str:
    """One page that needs nothing but a browser: the icicle, one of each part, and tables.

    Args:
        profile: to show.
        top: how many of the longest instructions to list.
    """
    root, kinds = boxes(profile), _kinds(profile)
    title = escaped(_title(profile))
    charts = [_Chart(root, kinds, profile.total_ns).svg("all", "All calls")]
    details = [box for method in root.children for box in (_with_phases(method) or [method])]
    if len(details) > 1:
        for index, box in enumerate(details):
            charts.append(f"<h3>{escaped(_detail_name(root, box))}</h3>")
            chart = _Chart(box, kinds, profile.total_ns)
            charts.append(chart.svg(f"part{index}", _detail_name(root, box)))
    notes = "".join(f"<p>Note: {escaped(note)}.</p>\n" for note in profile.notes())
    path = escaped(profile.recording.path)
    instructions = profile.instructions()
    layers = "".join(_layer_tables(stack) for stack in profile.layers())
    inside = profile.inside()
    sections = [
        ("Methods", _methods_table(profile)),
        ("Kinds of work", _work_table(profile, kinds)),
        ("Layers", layers),
        ("Longest instructions", _instructions_table(instructions[:top]) if top else ""),
        ("Inside delegates, as they report it", _inside_table(inside[: max(top, 1)]) if inside else ""),
    ]
    body = "".join(f"<h2>{heading}</h2>\n{content}" for heading, content in sections if content)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
{_style(page=True)}
</head>
<body>
<h1>{title}</h1>
<p>{milliseconds(profile.total_ns / 1e6)} ms in {len(profile.recording.calls):,} calls of
{escaped(profile.program.path)}, as {path} has it. Loading is not in it.</p>
{notes}<h2>All calls</h2>
<p class="muted">Each box is as wide as it took time; below it is what it consists of, in the order in which it runs.
Point at a box to see its name and numbers. Colours are those of the kinds of work below.</p>
<div class="scroll">
{"".join(charts)}</div>
{body}</body>
</html>
"""


def _with_phases(method: Box) -> list[Box]:
    return [box for box in method.children if box.level == _PHASE]


def _detail_name(root: Box, box: Box) -> str:
    """``vision_encoder``, ``text_decoder, decode``."""
    if box.level == _METHOD:
        return box.name
    [method] = [method for method in root.children if any(child is box for child in method.children)]
    return f"{method.name}, {box.name}"


def _html_table(header: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> str:
    """A table of cells that are HTML; the first ``texts`` columns are text, the others numbers."""

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f"<{tag}>{cell}</{tag}>" if column < texts else f'<{tag} class="number">{cell}</{tag}>'
            for column, cell in enumerate(row)
        )

    body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"""<div class="scroll"><table>
<thead><tr>{cells("th", header)}</tr></thead>
<tbody>
{body}
</tbody></table></div>
"""


def _numbers(time: Time) -> tuple[str, ...]:
    return f"{time.count:,}", milliseconds(time.total_ms), f"{time.share:.1%}", f"{time.mean_us:,.1f}"


_NUMBERS = ("count", "ms", "of all", "mean µs")


def _methods_table(profile: Profile) -> str:
    rows = []
    for whole, phases in profile.methods():
        rows.append((escaped(whole.name), *_numbers(whole)))
        rows += [(f'<span class="phase">{escaped(phase)}</span>', *_numbers(time)) for phase, time in phases]
    loads = ", ".join(
        f"{escaped(load.method or 'a method')} {milliseconds(load.total_ns / 1e6)} ms"
        for load in profile.recording.loads
    )
    loading = f'<p class="muted">Loading: {loads}.</p>\n' if loads else ""
    return _html_table(("method", *_NUMBERS), rows) + loading


def _work_table(profile: Profile, kinds: dict[str, int | None]) -> str:
    parts = [part.name for part in profile.parts] if len(profile.parts) > 1 else []
    rows = []
    for work in profile.work():
        color = "gap" if work.time.name == BETWEEN else _color(kinds[work.time.name])
        swatch = f'<span class="swatch {color}"></span>'
        by_part = [milliseconds(ms) if ms else "" for ms in work.part_ms] if parts else []
        rows.append((swatch + escaped(work.time.name), *_numbers(work.time)[:3], *by_part))
    return _html_table(("kind", *_NUMBERS[:3], *map(escaped, parts)), rows)


def _layer_tables(layers: Layers) -> str:
    header = [cell for part in layers.parts for cell in (f"{escaped(part)} ms", "share")]
    stack = f", stack {layers.number + 1}" if layers.number else ""

    def table(first: str, names: Sequence[str], times: Sequence[Sequence[float]]) -> str:
        by_part = [shares([row[part] for row in times]) for part in range(len(layers.parts))]
        rows = [
            (
                escaped(name),
                *(cell for part, ms in enumerate(row) for cell in (milliseconds(ms), f"{by_part[part][index]:.1%}")),
            )
            for index, (name, row) in enumerate(zip(names, times, strict=True))
        ]
        return _html_table((first, *header), rows)

    return (
        f"<h3>{escaped(layers.method)}{stack}</h3>\n"
        + table("layer", [str(index) for index in range(len(layers.layer_ms))], layers.layer_ms)
        + '<p class="muted">The same time by what is in a layer:</p>\n'
        + table("in all its layers", [name for name, _ in layers.places], [ms for _, ms in layers.places])
    )


def _instructions_table(instructions: Iterable[InstructionTime]) -> str:
    rows = [
        (escaped(row.time.name), escaped(row.part), row.layer or "", str(row.number), *_numbers(row.time))
        for row in instructions
    ]
    return _html_table(("instruction", "in", "layer", "number", *_NUMBERS), rows, texts=2)


def _inside_table(inside: Iterable[Time]) -> str:
    return _html_table(("operator", *_NUMBERS), [(escaped(time.name), *_numbers(time)) for time in inside])
