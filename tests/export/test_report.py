"""The report's numbers are those that were put into it, in each of its three forms."""

from __future__ import annotations

import errno
import json
import math
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from mvlm.export import report as reports
from mvlm.export.errors import ExportError
from mvlm.export.recipe import Recipe, mobile
from mvlm.export.report import KindSummary, LayerQuantization, QuantizationReport, check_report_path, write_report

INT4 = "int4, groups of 128, hqq"
DOWN = "language_model mlp.down_proj"


def layer(name: str, kind: str, snr_db: float, num_bytes: int, shape=(10, 10), scheme: str = INT4) -> LayerQuantization:
    return LayerQuantization(name, kind, scheme, shape, snr_db, num_bytes)


#: 100 weights in each: 400 bytes of float32.
LAYERS = (
    layer("language_model.layers.0.mlp.down_proj", DOWN, 20.0, 60),
    layer("language_model.layers.1.mlp.down_proj", DOWN, 17.25, 60),
    layer("language_model.layers.2.mlp.down_proj", DOWN, 22.0, 70, scheme="int4, groups of 64, hqq"),
    layer("language_model.layers.0.mlp.up_proj", "language_model mlp.up_proj", 19.0, 60),
    layer("language_model.layers.1.mlp.up_proj", "language_model mlp.up_proj", 18.0, 60),
    layer("lm_head", "lm_head", 40.0, 1104, shape=(100, 10), scheme="int8 per channel"),
    layer("mm_projector.model.0", "mm_projector.model.0", math.inf, 400, scheme="float32"),
)
REPORT = QuantizationReport("tiny", mobile(), LAYERS)


def large_report() -> QuantizationReport:
    """The shape of a real one: 24 layers of 7 kinds, 23 of 6, and some that stand alone."""
    text = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    vision = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    layers = [
        layer(f"{part}.layers.{index}.{kind}", f"{part} {kind}", base + index / 10 + place, 60)
        for part, kinds, count, base in (("language_model", text, 24, 18), ("vision_tower", vision, 23, 36))
        for index in range(count)
        for place, kind in enumerate(kinds)
    ]
    return QuantizationReport("large", mobile(), (*layers, *LAYERS[-2:]))


class Page(HTMLParser):
    """A page as data: it complains of tags that are not closed, and keeps the text of some."""

    VOID = frozenset({"meta", "br", "line", "circle", "rect", "path", "polyline"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += attrs
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


SVG = "{http://www.w3.org/2000/svg}"


def plots(page: str) -> list[ElementTree.Element]:
    """The plots in a page, read as XML."""
    return [ElementTree.fromstring(svg) for svg in re.findall(r'<svg class="plot".*?</svg>', page, re.DOTALL)]


def point_titles(page: str) -> list[str]:
    return [
        point.find(f"{SVG}title").text for plot in plots(page) for point in plot.iter() if point.get("class") == "point"
    ]


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_kinds():
    down, up, lm_head, projector = REPORT.kinds()
    schemes = (INT4, "int4, groups of 64, hqq")
    assert down == KindSummary(
        DOWN, schemes, 3, 190, 1200, 17.25, 20.0, 22.0, worst="language_model.layers.1.mlp.down_proj"
    )
    assert (up.snr_db_min, up.snr_db_median, up.snr_db_max) == (18.0, 18.5, 19.0)
    assert up.worst == "language_model.layers.1.mlp.up_proj"
    assert (lm_head.count, lm_head.num_bytes, lm_head.float32_bytes) == (1, 1104, 4000)
    assert projector.snr_db_min == projector.snr_db_max == math.inf
    assert (REPORT.num_bytes, REPORT.float32_bytes) == (1814, 6400)


def test_worst_layers_come_without_the_exact():
    assert [layer.snr_db for layer in REPORT.worst(3)] == [17.25, 18.0, 19.0]
    assert len(REPORT.worst(100)) == len(LAYERS) - 1
    assert REPORT.worst(0) == ()


def test_table():
    lines = REPORT.table(worst=2).splitlines()
    header, *rows = lines[:6]
    assert header.split("  ")[0] == "kind"
    assert len({len(line) for line in rows[:-1]}) == 1, "the columns are aligned"
    assert re.split(r"\s{2,}", rows[0]) == [
        DOWN,
        "3",
        "int4, groups of 128, hqq / int4, groups of 64, hqq",
        "190",
        "15.8%",
        "17.2",
        "20.0",
        "22.0",
    ]
    assert re.split(r"\s{2,}", rows[2])[3:] == ["1,104", "27.6%", "40.0", "40.0", "40.0"]
    assert re.split(r"\s{2,}", rows[3])[4:] == ["100.0%", "exact", "exact", "exact"]
    assert re.split(r"\s{2,}", rows[4]) == ["total", "7", "1,814", "28.3%"]
    assert lines[6:] == [
        "compression: 6,400 bytes of float32 became 1,814, 3.53×",
        "lowest SNR:",
        f"   17.2 dB  language_model.layers.1.mlp.down_proj ({INT4})",
        f"   18.0 dB  language_model.layers.1.mlp.up_proj ({INT4})",
    ]


def test_json():
    document = json.loads(REPORT.to_json(), parse_constant=pytest.fail)
    assert document["model_name"] == "tiny"
    assert Recipe.from_json(json.dumps(document["recipe"])) == mobile()
    assert (document["num_bytes"], document["float32_bytes"]) == (1814, 6400)
    assert [kind["count"] for kind in document["kinds"]] == [3, 2, 1, 1]
    assert document["kinds"][0]["snr_db_median"] == 20.0
    assert document["kinds"][3]["snr_db_min"] is None
    assert document["layers"][1] == {
        "name": "language_model.layers.1.mlp.down_proj",
        "kind": DOWN,
        "scheme": INT4,
        "shape": [10, 10],
        "snr_db": 17.25,
        "num_bytes": 60,
        "float32_bytes": 400,
    }
    assert document["layers"][-1]["snr_db"] is None
    assert len(document["layers"]) == len(LAYERS)


@pytest.mark.parametrize("layers", [(), LAYERS[-1:]], ids=["none", "exact"])
def test_nothing_was_quantized(layers):
    report = QuantizationReport("tiny", mobile(), layers)
    assert "lowest SNR" not in report.table()
    assert len(json.loads(report.to_json())["layers"]) == len(layers)
    assert "All layers are exact." in Page(report.to_html()).text
    assert len(point_titles(report.to_html())) == len(layers)


# -- the page ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("report", [REPORT, large_report()], ids=["few layers", "many layers"])
def test_every_layer_is_one_point_of_the_plots(report):
    titles = point_titles(report.to_html())
    assert len(titles) == len(report.layers)
    assert sorted(title.split(":")[0] for title in titles) == sorted(layer.name for layer in report.layers)
    values = {title.split(":")[0]: title for title in titles}
    for layer in report.layers:
        snr = "exact" if layer.snr_db == math.inf else f"{layer.snr_db:.1f} dB"
        assert values[layer.name] == f"{layer.name}: {snr}, {layer.scheme}, {layer.num_bytes:,} bytes"


def test_points_are_where_their_numbers_say():
    """In each plot, further right is a higher layer number, further up a higher SNR."""
    for plot in plots(large_report().to_html())[:2]:
        circles = [element for element in plot.iter(f"{SVG}circle") if element.get("class") == "point"]
        where = {
            point.find(f"{SVG}title").text.split(":")[0]: (float(point.get("cx")), float(point.get("cy")))
            for point in circles
        }
        [first] = [name for name in where if ".0.q_proj" in name]
        by_number = sorted(
            (name for name in where if name.endswith("q_proj")), key=lambda name: int(name.split(".")[2])
        )
        assert by_number[0] == first
        assert [where[name] for name in by_number] == sorted((where[name] for name in by_number), key=lambda p: p[0])
        heights = [where[name][1] for name in by_number]
        assert heights == sorted(heights, reverse=True)
        _, _, width, height = map(float, plot.get("viewBox").split())
        assert all(0 < x < width and 0 < y < height for x, y in where.values())


def test_plots_have_series_axes_and_descriptions():
    page = large_report().to_html()
    text, vision, alone = plots(page)
    assert len(list(text.iter(f"{SVG}polyline"))) == 7
    assert len(list(vision.iter(f"{SVG}polyline"))) == 6
    for plot in (text, vision, alone):
        labels = [element.text for element in plot.iter(f"{SVG}text")]
        assert "SNR in dB" in labels
        assert plot.get("role") == "img"
        ids = plot.get("aria-labelledby").split()
        assert [plot.find(f"{SVG}{tag}").get("id") for tag in ("title", "desc")] == ids
        assert all(plot.find(f"{SVG}{tag}").text for tag in ("title", "desc"))
    assert "layer number" in [element.text for element in text.iter(f"{SVG}text")]
    assert "exact" in [element.text for element in alone.iter(f"{SVG}text")]
    assert "The lowest is 18.0 dB, of a language_model q_proj." in text.find(f"{SVG}desc").text
    identifiers = re.findall(r'\bid="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers))
    assert Page(page).tags["li"] == 7 + 6 + 2, "the legends"


def test_series_differ_by_more_than_colour():
    looks = {(reports._color(index), reports._shape(index, 0, 0, 4)) for index in range(32)}
    assert len(looks) == 32


def test_page_stands_alone():
    page = Page(REPORT.to_html())
    assert page.tags["script"] == page.tags["link"] == page.tags["img"] == 0
    assert not {name for name, _ in page.attributes} & {"src", "href", "onload", "onclick"}
    html = REPORT.to_html()
    assert "url(" not in html
    assert "@import" not in html
    assert set(re.findall(r"https?://[^\s\"'<]+", html)) == {"http://www.w3.org/2000/svg"}, "a name, not an address"
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html


def test_page_has_the_numbers():
    text = " ".join(Page(REPORT.to_html()).text.split())
    assert "7 layers: 6,400 bytes of float32 became 1,814, a compression of 3.53×." in text
    assert DOWN + "3 × int4, groups of 128, hqq / int4, groups of 64, hqq190" in text
    assert "17.2 dBlanguage_model.layers.1.mlp.down_proj" in text
    for name, value in json.loads(mobile().to_json()).items():
        assert f"{name}{value}" in text
    assert 'style="width: 100.00%"' in REPORT.to_html(), "the bar of the largest kind"
    assert f'style="width: {100 * 190 / 1104:.2f}%"' in REPORT.to_html()


def test_names_are_text_and_nothing_else():
    evil = "</title><script>alert('1')</script>&\x00\x1b\"x"
    report = QuantizationReport(
        evil, mobile(), (layer(f"a.0.{evil}", evil, 1.0, 1, scheme=evil), layer(evil, evil, 2, 1))
    )
    page = report.to_html()
    assert Page(page).tags["script"] == 0
    assert "\x00" not in page
    assert "\x1b" not in page
    assert len(point_titles(page)) == 2
    assert json.loads(report.to_json())["model_name"] == evil


# -- files ------------------------------------------------------------------------------------------------------------


def test_written_beside_each_other(tmp_path):
    path = tmp_path / "out.json"
    assert write_report(REPORT, path) == (path, tmp_path / "out.html")
    assert path.read_text() == REPORT.to_json() + "\n"
    assert (tmp_path / "out.html").read_text() == REPORT.to_html()
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", ["out.html", "out", "out.txt", ".json"])
def test_other_suffixes(name, tmp_path):
    with pytest.raises(ExportError, match=r"give a name that ends in \.json"):
        write_report(REPORT, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_not_writable(tmp_path):
    with pytest.raises(ExportError, match=r"there is no folder"):
        check_report_path(tmp_path / "none" / "out.json")
    (tmp_path / "out.html").mkdir()
    with pytest.raises(ExportError, match=r"out\.html: is a folder"):
        check_report_path(tmp_path / "out.json")


def test_full_disk(tmp_path, monkeypatch):
    path = tmp_path / "out.json"
    path.write_text("the old report")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_report(REPORT, path)
    assert path.read_text() == "the old report"
    assert list(tmp_path.iterdir()) == [path]


def test_suffix_in_capitals(tmp_path):
    assert [path.name for path in write_report(REPORT, Path(tmp_path / "OUT.JSON"))] == ["OUT.JSON", "OUT.html"]
