"""The report as one HTML file: escaped, complete without a network, and true to the report."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from hfcompress.report import html_grid, html_parts, html_plot
from hfcompress.report.html import embed_json, render_html
from tests import factories
from tests.report.contents import ATTACK, CUTS, plain

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """A page as its tags and its texts; fails where a tag is not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.inside: dict[str, list[str]] = {"script": [], "style": []}
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        (self.inside[self._open[-1]] if self._open and self._open[-1] in self.inside else self.texts).append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def ids(self) -> set[str | None]:
        return {attributes.get("id") for _, attributes in self.tags} - {None}

    def data(self) -> Any:
        return json.loads(self.inside["script"][0])


def test_the_page_needs_nothing_from_elsewhere(compared: dict[str, Any]) -> None:
    page = Page(render_html(compared | {"cuts": {"01-distill": CUTS}}))

    assert not {"link", "img", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.tags}
    names = {name for _, attributes in page.tags for name in attributes}
    assert not names & {"src", "href", "xlink:href", "srcset", "action", "data", "poster"}
    assert not [name for name in names if name.startswith("on")]
    (style,) = page.inside["style"]
    assert not re.search(r"@import|url\(|https?:", style)
    assert not re.search(r"https?:|fetch\(|XMLHttpRequest|innerHTML|eval\(", page.inside["script"][1])


def test_the_browser_is_told_to_load_nothing_and_to_run_the_pages_own_script_alone(old: dict[str, Any]) -> None:
    page = Page(render_html(old))
    (policy,) = [a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    digest = base64.b64encode(hashlib.sha256(page.inside["script"][1].encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_every_text_of_the_report_is_escaped(compared: dict[str, Any]) -> None:
    page = Page(render_html(compared))
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert page.text.count(ATTACK) > 20  # the title, the model's name, the label, the texts, the processor
    assert page.data() == compared


def test_characters_that_hide_text_are_spelled_out(old: dict[str, Any]) -> None:
    old["name"] = "a\u202eb\x1b[31m\ud800"
    page = Page(render_html(old))
    assert r"a\u202eb\x1b[31m\ud800" in page.text
    assert page.data() == old


def test_numbers_that_json_lacks_become_null() -> None:
    text = embed_json({"a": [float("nan"), float("inf"), 1.5], "b": "</script>"})
    assert json.loads(text) == {"a": [None, None, 1.5], "b": "</script>"}
    assert "<" not in text


def test_the_headline_is_the_verdict_on_the_last_model(compared: dict[str, Any]) -> None:
    found = html_parts.make_headline(compared)
    assert found["name"] == "02-quantize"
    assert found["badge"] == {"kind": "worse", "text": "loses more than 2%"}
    assert "It loses more than 2%." in found["sentence"]
    assert [(tile.name, tile.value) for tile in found["tiles"]] == [
        ("accuracy", "0.7500"), ("size", "16.0x smaller"), ("speed at batch 1", "2.85x faster"),
        ("speed at batch 8", "2.85x faster"),
    ]  # fmt: skip


def test_a_slower_and_larger_model_is_called_so(old: dict[str, Any]) -> None:
    old["rows"][2] |= {"compression": 0.5}
    old["rows"][2]["latency"][0] |= {"speedup": 0.8, "speedup_interval": [0.8, 0.8]}
    assert [tile.value for tile in html_parts.make_headline(old)["tiles"]][1:3] == ["2.00x larger", "1.25x slower"]


def test_what_broke_is_shown_with_examples(compared: dict[str, Any]) -> None:
    page = Page(render_html(compared))
    assert {"against-source", "changes", "confidence"} <= page.ids()
    assert "41 became wrong, 1 became right" not in page.text
    found = compared["rows"][2]["against_source"]
    assert f"{found['broken']} became wrong, {found['repaired']} became right" in page.text
    assert "A rare class has fewer than 30 items" in page.text
    assert "By tokens" in page.text
    assert "By part" in page.text
    assert [change["last"] for change in html_parts.list_changes(compared)] == [False, True]


def test_a_report_of_an_earlier_version_has_no_verdict(old: dict[str, Any]) -> None:
    page = Page(render_html(old))
    assert "This report is of an earlier version" in page.text
    assert page.ids() == {
        "models", "constant", "tradeoff", "waterfalls", "latency", "conditions", "tip", "data", "save",
    }  # fmt: skip


def test_a_busy_report_has_no_speedup(compared: dict[str, Any]) -> None:
    compared["machine"] |= factories.BUSY
    page = Page(render_html(compared))
    assert not re.search(r"2\.85|1\.90|3\.90|x faster|x slower|faster, batch", page.text)
    assert [panel.title for panel in html_plot.draw_panels(compared) if not panel.points] == [
        "median latency at batch 1", "median latency at batch 8",
    ]  # fmt: skip
    assert [waterfall.title for waterfall in html_parts.make_waterfalls(compared)] == ["size, MB"]
    cells = [cell for row in html_grid.make_latency_grid(compared)["rows"] for cell in row["cells"]]
    assert {(cell["speedup"], cell["share"]) for cell in cells} == {("", 0)}
    assert "hfcompress report RUN --measure" in page.text


def test_the_runtimes_share_of_a_speedup_is_told(old: dict[str, Any]) -> None:
    source, last = old["rows"][0]["latency"], old["rows"][2]["latency"]
    graph = {"runtime": "onnxruntime", "speedup_plain": 1.5}
    old["plain_runtime"] = {
        "latency": [entry | graph | {"speedup": 1.9, "p50_ms": entry["p50_ms"] / 1.9} for entry in source]
    }
    old["rows"][2]["latency"] = [entry | graph | {"p99_ms": 9.0} for entry in last]
    old["rows"][1]["latency"][0]["speedup_plain"] = 2.0
    grid = html_grid.make_latency_grid(old)
    assert [row["name"] for row in grid["rows"]] == ["source", "source in ONNX Runtime", "01-distill", "02-quantize"]
    assert [row["cells"][0]["speedup"] for row in grid["rows"]] == [
        "",
        "1.90x",
        "4.00x (3.90 to 4.10)",
        "2.85x (1.90 to 4.00)",
    ]
    told = "1.5x against the source in ONNX Runtime"
    assert [row["cells"][0]["plain"] for row in grid["rows"]] == ["", "", "", told]
    assert grid["rows"][3]["cells"][0]["tails"] == "p95 5.25 ms, p99 9.00 ms"
    assert "1.5x against the source in ONNX Runtime" in html_parts.make_headline(old)["tiles"][2].note
    grid = html_grid.make_latency_grid(old | {"machine": factories.BUSY})
    assert {(cell["speedup"], cell["plain"]) for row in grid["rows"] for cell in row["cells"]} == {("", "")}


def test_columns_with_one_value_stand_below_the_table(old: dict[str, Any]) -> None:
    table = html_parts.make_table(old)
    assert table.constant == [("parameters", "1.23M"), ("encoder", "7,654"), ("peak MB", "300")]
    assert table.headings == [
        "model", "accuracy", "95% interval", "of source", "MB", "smaller", "ms, batch 1", "faster, batch 1",
        "ms, batch 8", "faster, batch 8",
    ]  # fmt: skip
    assert [row[7].text for row in table.rows] == ["1.00x", "4.00x (3.90-4.10)", "2.85x (1.90-4.00)"]
    page = Page(render_html(old))
    assert "The same for all models: parameters: 1.23M; encoder: 7,654; peak MB: 300." in page.text
    headings = [a for tag, a in page.tags if tag == "th" and "aria-sort" in a]
    assert len(headings) == len(table.headings)


@pytest.mark.parametrize(
    ("text", "value"),
    [("7,654", 7654), ("1.23M", 1.23e6), ("-0.0120 (-0.03 to +0.01), worse", -0.012), ("+0.5", 0.5), ("99.1%", 99.1),
     ("3.90x (3.82-3.98)", 3.9), ("1.2e-05", 1.2e-5), ("0.918-0.950", 0.918), ("-", None), ("not shown", None)],
)  # fmt: skip
def test_a_cell_is_sorted_by_the_number_it_begins_with(text: str, value: float | None) -> None:
    assert html_parts.read_number(text) == value


def test_stages_are_held_against_the_one_before_and_compared_models_against_the_source(old: dict[str, Any]) -> None:
    size, *times = html_parts.make_waterfalls(old)
    assert [(bar.left, bar.saved, bar.added) for bar in size.bars] == [(100, 0, 0), (25, 75, 0), (6.25, 18.75, 0)]
    assert [bar.change for bar in size.bars] == ["", "4.00x smaller", "4.00x smaller"]
    assert [[bar.change for bar in time.bars] for time in times] == [["", "4.00x faster", "1.40x slower"]] * 2
    assert [(bar.left, bar.saved, bar.added) for bar in times[0].bars] == [(100, 0, 0), (25, 75, 0), (25, 0, 10)]
    del old["key"]
    assert [bar.change for bar in html_parts.make_waterfalls(old)[0].bars] == ["", "4.00x smaller", "16.0x smaller"]


def test_kept_units_and_sensitivity_are_maps(old: dict[str, Any]) -> None:
    rows = html_parts.make_kept_map(CUTS["kept"])
    assert [[cell["text"] for cell in row["cells"]] for row in rows] == [
        ["3 of 4", "48 of 64"], [], ["0 of 4", "1,024 of 2,048"],
    ]  # fmt: skip
    assert [[cell["share"] for cell in row["cells"]] for row in rows] == [[75, 75], [], [0, 50]]
    heads, ffn = html_parts.make_sensitivity_maps(CUTS["sensitivity"])
    assert [[cell["share"] for cell in row] for row in heads["rows"]] == [[10, 30], [0, 0]]
    assert [[cell["text"] for cell in row] for row in ffn["rows"]] == [["0.7000", "0.4500"], ["0.9000", "0.9000"]]
    page = Page(render_html(old | {"cuts": {"01-distill": CUTS}}))
    assert "stages" in page.ids()
    assert "layer cut" in page.text
    assert "It keeps layers 1 and 3 of 3" in page.text


def test_what_a_stage_says_is_markdown_that_holds_no_link_and_no_markup(old: dict[str, Any]) -> None:
    old["cuts"] = {"01-distill": CUTS | {"latency": {
        "source_ms": 4, "target_ms": 2, "predicted_ms": 2, "measured_ms": 2, "batch_size": 1, "length": 8,
        "device": f"[a](http://b) <http://c> {ATTACK}", "threads": 1, "dtype": "float32"}}}  # fmt: skip
    page = Page(render_html(old))
    assert not {"a", "img"} & {tag for tag, _ in page.tags}
    assert f"[a](http://b) <http://c> {ATTACK}" in page.text


@pytest.mark.parametrize("count", [2, 5, 12])
def test_labels_cover_no_point_and_no_other_label(count: int) -> None:
    draw = np.random.default_rng(count)
    figures = [(draw.uniform(0.85, 0.93), draw.uniform(1, 9), int(draw.uniform(1e6, 5e6))) for _ in range(count)]
    rows = [factories.report_row(f"{n:02d}-quantize", "quantize", *each) for n, each in enumerate(figures)]
    for panel in html_plot.draw_panels(plain(*rows)):
        boxes = [point.label.box for point in panel.points if point.label]
        assert len(boxes) >= min(count, 6)
        marks = [(p.x - 4, p.y - 4, p.x + 4, p.y + 4) for p in panel.points]
        for number, (left, top, right, bottom) in enumerate(boxes):
            assert 0 <= left < right <= html_plot.WIDTH
            assert 0 <= top < bottom <= html_plot.HEIGHT
            others = [*marks, *boxes[:number]]
            assert not [o for o in others if left < o[2] and o[0] < right and top < o[3] and o[1] < bottom]


def test_points_stand_where_their_figures_are(old: dict[str, Any]) -> None:
    panel = html_plot.draw_panels(old)[0]
    xs, ys = ([getattr(point, axis) for point in panel.points] for axis in "xy")
    assert xs[0] - xs[1] == pytest.approx(xs[1] - xs[2], abs=0.2)  # 4 MB, 1 MB, 0.25 MB on a logarithmic axis
    assert (ys[1] - ys[0]) / (ys[2] - ys[1]) == pytest.approx(4, rel=0.05)
    assert all(point.high < point.y < point.low for point in panel.points)
    assert [point.kind for point in panel.points] == ["source", "model", "last"]
    places = {text: x for x, text in panel.x_ticks}
    assert places["1"] == xs[1]
    assert [text for _, text in panel.y_ticks] == ["0.70", "0.75", "0.80", "0.85"]


def test_the_front_joins_what_no_other_model_beats(old: dict[str, Any]) -> None:
    old["rows"][1]["quality"]["accuracy"] = 0.5  # larger and worse than the last one
    panel = html_plot.draw_panels(old)[0]
    source, _, last = panel.points
    assert panel.front == f"{last.x},{last.y} {source.x},{source.y}"
    for row in old["rows"]:
        row["quality"] = {"mse": row["quality"]["accuracy"], "n": 48}
    panel = html_plot.draw_panels(old)[0]
    assert panel.front == " ".join(f"{p.x},{p.y}" for p in (panel.points[2], panel.points[1]))


@pytest.mark.parametrize(
    "change",
    [
        {"quality": {"accuracy": 0.0, "n": 48}, "quality_interval": [0.0, 0.0]},
        {"quality": {"pearson": float("nan"), "n": 48}, "quality_interval": [float("nan")] * 2},
        {"energy_wh_per_1k": 0.01},
        {"against_source": {"not_compared": "it was asked other units"}},
    ],
)
def test_unusual_rows_are_rendered(change: dict[str, Any]) -> None:
    rows = [factories.report_row(stage) | change for stage in ("/here/one", "org/two")]
    page = Page(render_html(plain(*rows)))
    assert "org/two" in page.text
    Page(render_html(plain(rows[0])))
