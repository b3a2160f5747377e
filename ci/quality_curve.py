#!/usr/bin/env python3
"""What a bit buys: KL to the float model over bits a weight, our recipes beside llama.cpp's types, on the same text.

    pip install matplotlib==3.11.2                 # not for --markdown; into any venv, mvlm is not needed
    python ci/quality_curve.py                     # draws docs/quality.svg
    python ci/quality_curve.py --markdown          # prints the table of all figures, and draws nothing

Reads what tests/real/measure.py and ci/peer_quality.sh wrote. Bars are one standard error; lines join the best of a
kind.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OURS, THEIRS = "#1f5fbf", "#a8551e"
INK, MUTED, LINE = "#1d1f23", "#5b6068", "#d9dce1"

#: Kinds of points: what the legend says, colour, marker, and what fills it.
KINDS = {
    "mvlm": (OURS, "o", "white"),
    "mvlm, --calibrate quick": (OURS, "o", "#a8c5f0"),
    "mvlm, --calibrate": (OURS, "o", OURS),
    "llama.cpp": (THEIRS, "s", "white"),
    "llama.cpp with imatrix": (THEIRS, "s", THEIRS),
}
NOTE = (
    "R: SmolLM2-135M-Instruct, roughened. Bits are those of the layers' linears, scales included.\n"
    "llama.cpp's K types need rows of 256·n weights; most of R's have 576, and llama-quantize gives them larger types."
)


@dataclass(frozen=True)
class Point:
    """A model that was measured.

    Attributes:
        kind: a key of :data:`KINDS`.
        label: what stands at the point: what the kind does not say.
        figures: entry of the JSON file.
    """

    kind: str
    label: str
    figures: dict[str, object]

    @property
    def bits(self) -> float:
        """Bits a weight."""
        return float(self.figures["bits"])

    @property
    def kl(self) -> float:
        """Mean KL, in nats a token."""
        return float(self.figures["kl_mean"])


def read(path: Path, made_by: str) -> list[dict[str, object]]:
    """Entries of a file."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        sys.exit(f"{path}: cannot be read ({error}); {made_by} makes it")
    wanted = {"name", "bits", "bytes", "perplexity", "kl_mean", "kl_error", "kl_p99", "top1", "tokens"}
    for row in entries:
        if missing := wanted - row.keys():
            sys.exit(f"{path}: {row.get('name', row)} has no {', '.join(sorted(missing))}; {made_by} writes it")
    return entries


def points(mvlm: Sequence[dict[str, object]], llama: Sequence[dict[str, object]]) -> list[Point]:
    """All of both."""
    found = []
    for row in mvlm:
        name, _, how = str(row["name"]).partition(", ")
        calibration = {"": "mvlm", "quick": "mvlm, --calibrate quick"}.get(how, "mvlm, --calibrate")
        where = how.removeprefix("calibrated").strip() if calibration == "mvlm, --calibrate" else ""
        found.append(Point(calibration, f"{name} ({where})" if where else name, row))
    for row in llama:
        name, _, imatrix = str(row["name"]).partition(", ")
        found.append(Point("llama.cpp with imatrix" if imatrix else "llama.cpp", name, row))
    return found


def markdown(mvlm: Sequence[dict[str, object]], llama: Sequence[dict[str, object]]) -> str:
    """The table, ours first."""
    lines = [
        "| | bits a weight | MB | KL to float | 99 % below | perplexity | same top token |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for who, rows in (("mvlm", mvlm), ("llama.cpp", llama)):
        for row in rows:
            lines.append(
                f"| {who} {row['name']} | {row['bits']:.2f} | {row['bytes'] / 1e6:.0f} | "
                f"{row['kl_mean']:.4f} ± {row['kl_error']:.4f} | {row['kl_p99']:.2f} | {row['perplexity']:.1f} | "
                f"{row['top1']:.1%} |"
            )
    return "\n".join(lines)


def frontier(found: Sequence[Point]) -> list[Point]:
    """Those that no other beats with as few bits, from few bits to many."""
    best: list[Point] = []
    for point in sorted(found, key=lambda point: (point.bits, point.kl)):
        if not best or point.kl < best[-1].kl:
            best.append(point)
    return best


def draw(found: Sequence[Point]) -> bytes:
    """The picture, SVG."""
    import matplotlib
    from matplotlib import pyplot as plt
    from matplotlib.text import Text
    from matplotlib.ticker import FuncFormatter, NullFormatter
    from matplotlib.transforms import Bbox

    matplotlib.use("agg")
    matplotlib.rcParams.update(
        {"svg.hashsalt": "mvlm", "font.size": 10.5, "text.color": INK, "axes.labelcolor": INK, "path.simplify": True}
    )
    figure, axes = plt.subplots(figsize=(9.2, 6.2), layout="constrained", facecolor="white")
    axes.set_xscale("log")
    axes.set_yscale("log")
    for kind, (colour, marker, fill) in KINDS.items():
        members = [point for point in found if point.kind == kind]
        if not members:
            continue
        best = frontier(members)
        style = ":" if fill == "white" else "-"
        axes.plot([p.bits for p in best], [p.kl for p in best], color=colour, lw=1, alpha=0.45, ls=style)
        axes.errorbar(
            [p.bits for p in members],
            [p.kl for p in members],
            yerr=[float(p.figures["kl_error"]) for p in members],
            fmt=marker,
            ms=6.5,
            color=colour,
            mfc=fill,
            mew=1.4,
            elinewidth=1.2,
            capsize=2.5,
            label=kind,
        )
    axes.set_xlim(min(p.bits for p in found) * 0.94, max(p.bits for p in found) * 1.06)
    axes.set_ylim(min(p.kl for p in found) * 0.7, max(p.kl for p in found) * 1.5)
    for axis, ticks in (
        (axes.xaxis, (3, 3.5, 4, 4.5, 5, 5.5, *range(6, 17))),
        (axes.yaxis, (k * 10**e for e in range(-4, 2) for k in (1, 2, 5))),
    ):
        low, high = axis.get_view_interval()
        axis.set_ticks([tick for tick in ticks if low <= tick <= high])
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
        axis.set_tick_params(which="both", length=0, labelcolor=MUTED)
    axes.minorticks_off()
    axes.grid(color=LINE, lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("bits a weight")
    axes.set_ylabel("KL to the float model, nats a token")
    axes.set_title("What quantization costs: less is better", loc="left", fontsize=13, color=INK)
    legend = axes.legend(loc="upper right", frameon=True, framealpha=1, edgecolor=LINE)
    figure.supxlabel(NOTE, x=0.01, ha="left", fontsize=8.5, color=MUTED)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # labels are placed in the layout as it is now

    # Each label goes to the nearest place where it covers no point and no label; a thin line leads there if it is far.
    renderer = figure.canvas.get_renderer()
    inside = axes.get_window_extent(renderer)
    pixels = figure.dpi / 72  # of a point
    corners = [axes.transData.transform((p.bits, p.kl)) - 4.5 * pixels for p in found]
    taken = [Bbox.from_bounds(x, y, 9 * pixels, 9 * pixels) for x, y in corners]
    taken.append(legend.get_window_extent(renderer))
    offsets = sorted(product((8, -8, 0), range(-90, 91, 2)), key=lambda offset: (abs(offset[1]), -offset[0]))
    for point in sorted(found, key=lambda point: -point.kl):
        for right, up in offsets:
            label = axes.annotate(
                point.label,
                (point.bits, point.kl),
                (right, up),
                textcoords="offset points",
                ha={8: "left", -8: "right", 0: "center"}[right],
                va="center",
                fontsize=9.5,
                color=KINDS[point.kind][0],
                bbox={"fc": "white", "ec": "none", "alpha": 0.8, "pad": 0.5},
                arrowprops={"arrowstyle": "-", "lw": 0.6, "color": MUTED, "shrinkA": 1, "shrinkB": 4}
                if abs(up) > 12
                else None,
            )
            label.update_positions(renderer)
            box = Text.get_window_extent(label, renderer)  # of the words alone, without the line
            free = not any(box.padded(1.5 * pixels).overlaps(other) for other in taken)
            if free and inside.contains(box.x0, box.y0) and inside.contains(box.x1, box.y1):
                taken.append(box)
                break
            label.remove()
        else:
            sys.exit(f"no room for the label {point.label!r} at {point.bits:g} bits")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    # Half of it is indentation and decimals that no one sees.
    return re.sub(r"(?<!scale\(0)(\.\d{3})\d+", r"\1", re.sub(r"\n\s+", "\n", buffer.getvalue().decode())).encode()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    folder = ROOT / "build" / "quality"
    parser.add_argument("--mvlm", type=Path, default=folder / "mvlm.json", metavar="FILE", help="of measure.py")
    parser.add_argument("--llama", type=Path, default=folder / "llama.json", metavar="FILE", help="of peer_quality.sh")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "quality.svg", metavar="FILE", help="the picture")
    parser.add_argument("--markdown", action="store_true", help="print the table instead of drawing")
    options = parser.parse_args()
    mvlm = read(options.mvlm, "tests/real/measure.py --out build/quality")
    llama = read(options.llama, "ci/peer_quality.sh")
    if options.markdown:
        print(markdown(mvlm, llama))
        return 0
    try:
        picture = draw(points(mvlm, llama))
    except ImportError as error:
        sys.exit(f"{error}; pip install matplotlib==3.11.2")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    partial = options.out.with_name(options.out.name + ".partial")
    partial.write_bytes(picture)
    os.replace(partial, options.out)
    print(f"{options.out}: {len(picture) / 1000:.0f} KB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
