"""Web pages of results: their order, their safety, and how they look in a browser, narrow, dark and on paper.

The last part needs a Chromium on the machine and the package ``playwright``, which drives it.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import replace

import pandas as pd
import plotly.graph_objects as go
import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit import figures, pages
from toolkit.figures import labels
from toolkit.pages import Page, Section
from toolkit.pages.responses import side_by_side
from toolkit.types import Problem, Span

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
NAMES = ("edited", "edited: random heads", "edited: random direction 1", "a condition with a name of many words <b>")


def summary() -> pd.DataFrame:
    rows = []
    for i, name in enumerate(("base", *NAMES)):
        for metric, value, size in (("accuracy", 0.7, 0.05), ("think_tokens", 30.0, 3.0)):
            effect = size * (i == 1)
            ends = (value + effect, value + effect - size, value + effect + size, effect, effect - size / 2, effect + size / 2)
            rows.append((name, metric, *ends))
    columns = ["condition", "metric", "mean", "low", "high", "difference", "difference_low", "difference_high"]
    return pd.DataFrame(rows, columns=columns)


def doses(*names: str) -> go.Figure:
    rows = [
        (name, a, metric, 0.5, 0.4, 0.6)
        for name in names or ("length direction", "random direction")
        for a in (-1.0, 0.0, 1.0)
        for metric in ("closed", "looping", "perplexity")
    ]
    return figures.damage(pd.DataFrame(rows, columns=["direction", "strength", "metric", "mean", "low", "high"]))


def why(*shares: tuple) -> go.Figure:
    """Four panels in two rows, the first with a colour bar."""
    ends = {f"{name}{end}": [v] * 4 for name in ("effect", "difference") for end, v in (("", 0.5), ("_low", 0.2), ("_high", 0.9))}
    tables = {
        "heads": pd.DataFrame({"layer": [0, 0, 1, 1], "head": [0, 1] * 2, **ends}),
        "outputs": pd.DataFrame({"layer": [0, 1], "head": -1, "cosine": 0.3, "random": 0.2}),
        "steps": pd.DataFrame({"kind": ["step", "re-check", "failed step", "jump to the result"], **ends}),
        "undo": pd.DataFrame(shares, columns=["heads", "way", "measure", "share", "share_low", "share_high"]),
    }
    return figures.reasons(tables, "why")


def long_names() -> go.Figure:
    names = [
        f"claim {i}: the length direction of the layer predicts the length of other responses, better than random" for i in range(3)
    ]
    return go.Figure(
        go.Scatter(x=[1, 2, 3], y=names), {"xaxis_title": "effect in units of the smallest that matters (+ as claimed)"}
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    made = Page(
        title="A & <b>",
        verdict=["edited: thinks longer <i>.", "Random controls: no effect detectable."],
        main=Section("Main", "main text", (figures.length_accuracy(summary()),)),
        table=pd.DataFrame({f"column {i}": ["70.0 (+1.0 [-10.0, +12.0])"] * 4 for i in range(5)}, index=[*NAMES]),
        caption="caption",
        sections=[
            Section("Effects", "", (figures.differences(summary(), "think_tokens"), figures.differences(summary(), "accuracy"))),
            Section("Why", "", (why(("top", "put back", "think_tokens", 0.5, 0.2, 0.9)), why(), long_names())),
            Section("Damage", "", (doses("length direction"), doses())),
            Section("Transcripts", "", html="<div class='own'>transcript</div>"),
        ],
        made="made so",
        command="toolkit demo --out 'a b'",
    )
    return pages.write(made, tmp_path_factory.mktemp("page") / "report.html")


def test_a_page_reads_verdict_figure_table_transcripts_command_in_this_order(page):
    body = page.read_text().split("<body>")[1]
    order = [
        "verdict-box",
        "<h2>Main</h2>",
        "data-figure='0'",
        "<h2>Table</h2>",
        "class='own'",
        "<h2>How it was made</h2>",
        "class='command'",
    ]
    places = [body.index(mark) for mark in order]
    assert places == sorted(places)


def test_no_text_of_a_page_is_read_as_html_and_nothing_is_loaded(page):
    text = page.read_text()
    head, body = text.split("<body>")
    shown = body.split("<script")[0]
    assert "A &amp; &lt;b&gt;" in shown and "longer &lt;i&gt;" in shown and "many words &lt;b&gt;" in shown
    assert "<b>" not in shown.replace("class='own'", "") and "<i>" not in shown
    assert "toolkit demo --out &#x27;a b&#x27;" in shown
    assert not re.search(r"<(?:link|img|iframe)\b|<script[^>]+src=", head + shown)
    assert "default-src 'none'" in head and text.count("plotly.js v") == 1


def test_a_page_shows_the_explanation_of_a_figures_colours_below_its_title(page):
    caption = re.search(r"<figcaption>Accuracy against think length(.*?)</figcaption>", page.read_text())[1]
    note = "blue: clearly more accurate than base; dark grey: no clear difference; crosses: random controls"
    assert caption == f"<br><small>{note}</small>"


def test_a_page_without_verdict_has_no_empty_box(tmp_path):
    table = pd.DataFrame({"a <b>": ["1.5 [1.2, 1.8]"]}, index=pd.Index(["x"], name="row"))
    text = pages.write(Page(title="t", table=table, caption="c"), tmp_path / "p.html").read_text()
    body = text.split("<body>")[1]
    assert "verdict-box" not in body and "How it was made" not in body
    assert "<th>row</th><th>a &lt;b&gt;</th>" in body and "1.5<br><small>[1.2, 1.8]</small>" in body


def label_boxes(points, size):
    """Boxes of the labels of points at a size of the plot, in pixels, each with True if the label stands in the place of last resort."""
    texts = [f"condition {i}" for i in range(len(points))]
    placed = labels.placed(points, texts, (0.0, 1.0), (0.0, 1.0))
    assert [a["text"] for a in placed] == texts
    width, height = size
    boxes = []
    for (x, y), a in zip(points, placed, strict=True):
        dx, dy = (a["ax"], a["ay"]) if a["showarrow"] else (a["xshift"], -a["yshift"])
        wide, high = 0.6 * labels.FONT * len(a["text"]) + 4, 1.3 * labels.FONT + 2
        left, top = x * width + dx - wide / 2, (1 - y) * height + dy - high / 2
        boxes.append(((left, top, left + wide, top + high), dx == 0 and dy < 0 and not a["showarrow"]))
    return boxes


def covers(box, others, points, size):
    """True if a label leaves the plot, or covers a point or another label. Boxes that touch, but for rounding, do not cover one another."""
    width, height = size
    box = box[0] + 1e-6, box[1] + 1e-6, box[2] - 1e-6, box[3] - 1e-6
    dots = [(x * width - 6, (1 - y) * height - 6, x * width + 6, (1 - y) * height + 6) for x, y in points]
    outside = box[0] < 0 or box[1] < 0 or box[2] > width or box[3] > height
    return outside or any(labels.overlap(box, other) for other in [*others, *dots])


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=8))
def test_a_label_beside_a_text_covers_nothing_unless_there_is_no_free_place(points):
    size = labels.SIZES[-1]
    boxes = label_boxes(points, size)
    for i, (box, last_resort) in enumerate(boxes):
        assert last_resort or not covers(box, [other for other, _ in boxes[:i]], points, size)


@given(st.lists(st.tuples(*[st.sampled_from((0.1, 0.3, 0.5, 0.7, 0.9))] * 2), min_size=1, max_size=5, unique=True))
def test_labels_of_points_that_lie_apart_cover_nothing_at_any_size(points):
    for size in labels.SIZES:
        boxes = [box for box, _ in label_boxes(points, size)]
        for i, box in enumerate(boxes):
            assert not covers(box, boxes[:i], points, size)


def test_a_response_that_is_all_thinking_is_shown_once(tiny, rollout_of):
    problem, r = Problem("p", ({"role": "user", "content": "1+1=?"},), "2"), rollout_of(6)
    apart = side_by_side({"base": tiny}, problem, {"base": r})
    assert apart.count("class='part think'") == apart.count("class='part answer'") == 1
    whole = replace(r, think=Span(r.prompt_len, len(r.token_ids)), answer=Span(r.prompt_len, len(r.token_ids)))
    shown = side_by_side({"base": tiny}, problem, {"base": whole})
    assert shown.count("class='part think'") == shown.count("class='part") == 1
    none = side_by_side({"base": tiny}, problem, {"base": replace(r, think=None)})
    assert none.count("class='part answer'") == none.count("class='part") == 1


def test_controls_are_grey_and_clear_effects_blue_or_brown():
    table = summary()
    dots = figures.differences(table, "accuracy").data[0]
    colours = dict(zip(dots.y, dots.marker.color, strict=True))
    symbols = dict(zip(dots.y, dots.marker.symbol, strict=True))
    assert colours["edited"] == figures.COLOURS[0] and symbols["edited"] == "circle"
    assert {colours[n] for n in NAMES[1:3]} == {"#999999"} and symbols[NAMES[1]] == "x-open"
    worse = table.assign(
        difference=-table["difference"], difference_low=-table["difference_high"], difference_high=-table["difference_low"]
    )
    dots = figures.differences(worse, "accuracy").data[0]
    assert dict(zip(dots.y, dots.marker.color, strict=True))["edited"] == figures.COLOURS[1]


def test_shares_are_in_points_under_the_label_of_their_metric():
    figure = figures.differences(summary(), "accuracy")
    assert figure.layout.xaxis.title.text == "percentage points" and figure.layout.title.text.startswith("Accuracy: ")
    assert dict(zip(figure.data[0].y, figure.data[0].x, strict=True))["edited"] == pytest.approx(5.0)
    assert figures.differences(summary(), "think_tokens").layout.xaxis.title.text == "tokens"


def test_a_change_in_length_that_is_not_detectable_has_no_panel_of_shares_but_a_sentence():
    said = [note.text for note in why().layout.annotations]
    assert "no change in length detectable" in said
    assert "no change in length detectable" not in [
        n.text for n in why(("top", "alone", "think_tokens", 1.0, 0.5, 2.0)).layout.annotations
    ]


def test_random_directions_are_grey_in_dose_panels():
    lines = {t.name: t.line.color for t in doses().data if t.name}
    assert lines["random direction"] == "#999999" and lines["length direction"] == figures.COLOURS[0]


# --- in a browser ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright here: pip install playwright")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        )
        yield browser
        browser.close()


CUT_OFF = """() => [...document.querySelectorAll('.plot')].flatMap(plot => {
  const box = plot.getBoundingClientRect();
  return [...plot.querySelectorAll('text')].filter(t => t.textContent.trim() && !t.closest('.hoverlayer')).map(t => [t.textContent, t.getBoundingClientRect()])
    .filter(([, r]) => r.width && (r.left < box.left - 1 || r.right > box.right + 1 || r.top < box.top - 1 || r.bottom > box.bottom + 1))
    .map(([text]) => text); })"""
OVERPRINTED = """() => [...document.querySelectorAll('.plot')].flatMap(plot => {
  const texts = [...plot.querySelectorAll('text')].filter(t => t.textContent.trim()).map(t => [t.textContent, t.getBoundingClientRect()]).filter(([, r]) => r.width);
  const over = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 2 && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3;
  return texts.flatMap(([text, r], i) => texts.slice(i + 1).filter(([, s]) => over(r, s)).map(([other]) => [text, other])); })"""

UNDER_BUTTONS = """() => [...document.querySelectorAll('.plot')].flatMap(plot => {
  const bar = [...plot.querySelectorAll('.modebar-group')].map(group => group.getBoundingClientRect()).filter(r => r.width);
  const over = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 0 && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1;
  const parts = [...plot.querySelectorAll('text, .plotbg, .bg')].map(part => [part.textContent || 'panel', part.getBoundingClientRect()]);
  return parts.filter(([, r]) => r.width && bar.some(b => over(b, r))).map(([text]) => text); })"""
SCROLLED = "[...document.querySelectorAll('.wide')].filter(box => box.scrollWidth > box.clientWidth).map(box => box.textContent)"


@in_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 800, 400])
def test_nothing_is_cut_off_or_overprinted(chromium, page, width, scheme):
    tab = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    complaints: list[str] = []
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
    requests: list[str] = []
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(page.as_uri())
    tab.wait_for_selector("html[data-ready]")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate(CUT_OFF) == [] and tab.evaluate(OVERPRINTED) == []
    assert tab.evaluate("document.querySelectorAll('.modebar-group').length") > 4 and tab.evaluate(UNDER_BUTTONS) == []
    assert tab.evaluate(SCROLLED) == []
    assert complaints == [] and requests == [page.as_uri()]
    ground, ink = tab.evaluate("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
    brightness = [sum(map(int, re.findall(r"\d+", c)[:3])) for c in (ground, ink)]
    assert (brightness[0] > brightness[1]) == (scheme == "light")
    inverted = tab.evaluate("getComputedStyle(document.querySelector('.plot .svg-container')).filter")
    assert (inverted != "none") == (scheme == "dark")
    tab.close()


@in_browser
def test_a_grid_of_panels_becomes_one_column_with_the_colour_bar_beside_its_own_panel(chromium, page):
    tab = chromium.new_page(viewport={"width": 400, "height": 900})
    tab.goto(page.as_uri())
    tab.wait_for_selector("html[data-ready]")
    find = "[...document.querySelectorAll('.plot')].find(plot => plot.layout.xaxis4)"
    domains = tab.evaluate(f"['', 2, 3, 4].map(i => [{find}.layout[`xaxis${{i}}`].domain, {find}.layout[`yaxis${{i}}`].domain])")
    assert [x for x, _ in domains] == [[0, 1]] * 4
    tops = [top for _, (_, top) in domains]
    assert tops == sorted(tops, reverse=True) and len(set(tops)) == 4
    low, high = domains[0][1]
    bar = tab.evaluate(f"{find}.data[0].colorbar")
    assert bar["x"] > 1 and bar["y"] == pytest.approx((low + high) / 2) and bar["len"] == pytest.approx(high - low)
    tab.close()


@in_browser
def test_a_row_of_a_table_is_a_block_on_a_phone_that_names_every_column(chromium, page):
    tab = chromium.new_page(viewport={"width": 400, "height": 900})
    tab.goto(page.as_uri())
    tab.wait_for_selector("html[data-ready]")
    cells = "[...document.querySelectorAll('tbody tr')].map(row => [...row.cells].map(cell => getComputedStyle(cell, '::before').content))"
    assert tab.evaluate(cells) == [['""', *(f'"column {i}"' for i in range(5))]] * len(NAMES)
    assert tab.evaluate("getComputedStyle(document.querySelector('thead')).display") == "none"
    tab.close()


@in_browser
def test_panels_stand_below_one_another_where_the_window_is_narrow(chromium, page):
    def tops(width):
        tab = chromium.new_page(viewport={"width": width, "height": 900})
        tab.goto(page.as_uri())
        tab.wait_for_selector("html[data-ready]")
        found = tab.evaluate("[...document.querySelectorAll('.plot')].at(-1).layout.xaxis3.domain")
        tab.close()
        return found

    assert tops(400) == [0, 1] and tops(1400)[0] > 0.5


@in_browser
def test_a_page_fits_the_paper_in_dark_ink(chromium, page):
    tab = chromium.new_page(viewport={"width": 1400, "height": 900}, color_scheme="dark")
    tab.goto(page.as_uri())
    tab.wait_for_selector("html[data-ready]")
    tab.evaluate("dispatchEvent(new Event('beforeprint'))")
    tab.emulate_media(media="print")
    widths = tab.evaluate("[...document.querySelectorAll('.plot .main-svg')].map(svg => svg.getBoundingClientRect().width)")
    assert widths and max(widths) <= 700
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    tab.evaluate("dispatchEvent(new Event('afterprint'))")
    tab.emulate_media(media="screen")
    assert tab.evaluate("document.querySelector('.plot .main-svg').getBoundingClientRect().width") > 700
    tab.close()


def test_words_of_a_cell_stay_on_one_line_and_intervals_go_on_a_second():
    shown = pages.table_html(pd.DataFrame({"effect": ["+6.2 [-1.2, +16.2] points"], "verdict": ["not reproduced"]}))
    assert "<td data-column='verdict'><span>not reproduced</span></td>" in shown and "+6.2" in shown and "+6.2 [" not in shown
