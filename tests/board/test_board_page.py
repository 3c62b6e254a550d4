"""The board's page, in a real browser, from disk: what is drawn, what a click does, and what never happens.

Needs a Chromium on the machine and the package ``playwright``, which drives it.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from board_fixture import NASTY, NASTY_TEXT, board

from toolkit import store
from toolkit.board import reading
from toolkit.board.page import write_page
from toolkit.pages import embedded

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]
in_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here; on Debian: apt-get install -y --no-install-recommends chromium"
)


@pytest.fixture(scope="module")
def made():
    return board()


@pytest.fixture(scope="module")
def report(made, tmp_path_factory):
    return write_page(made, tmp_path_factory.mktemp("board") / "report.html")


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright here: pip install playwright")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Tab:
    """The page in a tab of its own, with all that it asked for and complained of."""

    def __init__(self, browser, report, width: int = 1280, fragment: str = ""):
        self.tab = browser.new_page(viewport={"width": width, "height": 900})
        self.complaints, self.requests = [], []
        self.tab.on("console", lambda m: self.complaints.append(m.text) if m.type in ("error", "warning") else None)
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.goto(report.as_uri() + fragment)
        self.tab.wait_for_selector("html[data-ready]")

    def __getattr__(self, name):
        return getattr(self.tab, name)

    def points(self) -> dict[str, list[float]]:
        """Name to (think tokens, accuracy) of every point in the figure, from what plotly drew."""
        return self.evaluate(
            "() => Object.fromEntries(document.getElementById('pareto')._fullData.flatMap("
            "t => (t.customdata || []).map((name, i) => [name, [t.x[i], t.y[i]]])))"
        )

    def drawn(self) -> int:
        """How many marks stand in the figure, the ring around the selected one left out."""
        return self.locator("#pareto .scatterlayer .points path.point").count() - 1

    def column(self, key: str) -> list[float]:
        """A column as shown, from top to bottom, below base."""
        index = self.evaluate(f"[...document.querySelectorAll('#numbers thead th')].findIndex(th => th.dataset.key === '{key}')")
        cells = self.locator(f"#numbers tbody tr:not(.base) > :nth-child({index + 1})")
        return [float(t) for t in (re.sub(r"[▲▼,]", "", x.split("\n")[0]).replace("−", "-") for x in cells.all_inner_texts())]

    def rows(self) -> list[str]:
        return self.evaluate("[...document.querySelectorAll('#numbers tbody tr')].map(r => r.dataset.condition)")

    def place(self, name: str) -> tuple[float, float]:
        """Where a point stands on the screen."""
        self.locator("#pareto").scroll_into_view_if_needed()
        x, y = self.evaluate(
            """name => { const g = document.getElementById('pareto'), box = g.getBoundingClientRect(), l = g._fullLayout;
            const t = g._fullData.find(t => (t.customdata || []).includes(name)), i = t.customdata.indexOf(name);
            return [box.left + l.xaxis._offset + l.xaxis.l2p(t.x[i]), box.top + l.yaxis._offset + l.yaxis.l2p(t.y[i])]; }""",
            name,
        )
        return x, y

    def head(self, key: str):
        return self.locator(f"#numbers thead th[data-key='{key}']")


@pytest.fixture(scope="module")
def opened(chromium, report):
    tab = Tab(chromium, report)
    yield tab
    tab.close()


@pytest.fixture
def tab(opened):
    """The opened page as it was at first: without a word in its address."""
    opened.evaluate("() => { location.hash = ''; return new Promise(done => setTimeout(done, 50)); }")
    return opened


# --- without a browser -----------------------------------------------------------------------------------------


def test_page_holds_plotly_once_and_the_board_as_data(made, report):
    source = report.read_text(encoding="utf-8")
    assert source.count("plotly.js v") == 1
    (data,) = re.findall(r'<script type="application/json" id="board">(.*?)</script>', source, re.S)
    assert json.loads(data) == json.loads(json.dumps(made))
    assert "<" not in data
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)\s*=\s*[\"']?(?!#)", source.replace(data, ""))[:1]


def test_values_without_a_number_and_arrays_are_embedded_as_json():
    np = pytest.importorskip("numpy")
    value = {"a": float("nan"), "b": np.array([1.0, np.inf]), "c": np.float32(0.5), 3: (1, None), "d": "</script>"}
    assert json.loads(embedded(value)) == {"a": None, "b": [1.0, None], "c": 0.5, "3": [1, None], "d": "</script>"}


def test_base_that_is_no_condition_is_refused(made, tmp_path):
    with pytest.raises(ValueError, match="'nobody' is not among the conditions"):
        write_page({**made, "base": "nobody"}, tmp_path / "report.html")


# --- in a browser ----------------------------------------------------------------------------------------------


@in_browser
def test_every_figure_is_drawn(tab, made):
    assert len(made["conditions"]) == tab.drawn() == len(tab.points()) == 45
    name = "DRPO"
    own = made["conditions"][name]["metrics"]
    assert tab.points()[name] == pytest.approx([own["think_tokens"]["mean"], own["accuracy"]["mean"]])
    assert tab.locator("#pareto .errorbars .xerror").count() == 45
    tab.uncheck("#bars")
    assert tab.locator("#pareto .errorbars .xerror").count() == 0
    for id in ("curve-accuracy", "curve-tokens"):  # four conditions at first, each three seeds and their mean
        assert tab.locator(f"#{id} .scatterlayer .trace").count() == 16
    tab.locator("#curve-names").get_by_role("button", name="PEAR").click()
    assert tab.locator("#curve-accuracy .scatterlayer .trace").count() == 20
    tab.locator("#gallery").scroll_into_view_if_needed()
    tab.wait_for_function("document.querySelectorAll('#gallery .main-svg').length >= 3")
    assert tab.locator("#gallery .barlayer .point").count() == 4


def natural(name: str) -> str:
    """A name without punctuation, its numbers in a width of their own: "budget 8" stands before "budget 16"."""
    return re.sub(r"\d+", lambda n: n[0].zfill(4), re.sub(r"[^a-z0-9 ]", "", name.lower()))


@in_browser
def test_sorting_is_by_number_and_says_so(tab):
    for key, best in (("think_tokens", "ascending"), ("accuracy", "descending"), ("aes", "descending")):
        tab.head(key).locator("button").click()
        values = tab.column(key)
        assert tab.head(key).get_attribute("aria-sort") == best and len(values) == 44
        assert values == sorted(values, reverse=best == "descending")
    tab.head("aes").locator("button").press("Enter")  # the keyboard turns it round, and keeps the place
    values = tab.column("aes")
    assert values == sorted(values) and tab.head("aes").get_attribute("aria-sort") == "ascending"
    assert tab.locator("#numbers thead th[aria-sort]").count() == 1
    assert tab.evaluate("document.activeElement.closest('th').dataset.key") == "aes"
    tab.head("name").locator("button").click()
    below = [n for n in tab.rows() if re.match("[A-Za-z]", n)]
    assert below[0] == "base" and below[1:] == sorted(below[1:], key=natural)


@in_browser
def test_groups_of_columns_and_marks_of_significance(tab, made):
    tab.locator("#groups").get_by_role("button", name="mechanism").click()
    assert [th.get_attribute("data-key") for th in tab.locator("#numbers thead th").all()] == [
        "name",
        "entropy",
        "checks",
        "failed",
    ]
    tab.locator("#groups").get_by_role("button", name="cost").click()
    assert "1.06M" in tab.locator("#numbers tbody tr[data-condition='DRPO']").inner_text()
    tab.locator("#groups").get_by_role("button", name="main").click()
    for name in ("DRPO", "random heads"):
        d = made["paired"][name]["accuracy"]
        cell = tab.locator(f"#numbers tbody tr[data-condition='{name}'] td").nth(1)
        assert (cell.locator(".flag").count() == 1) == (d["p_holm"] < 0.05) == ("sure" in (cell.get_attribute("class") or ""))
        weight = int(cell.evaluate("e => getComputedStyle(e).fontWeight"))
        assert (weight >= 600) == (d["p_holm"] < 0.05)
        assert f"{100 * d['mean']:+.1f}".replace("-", "−") in cell.inner_text()


@in_browser
def test_task_and_difficulty_redraw_figure_and_columns(tab, made):
    tab.locator("#tasks").get_by_role("button", name="lookup").click()
    tab.locator("#difficulties").get_by_role("button", name="hard").click()
    assert tab.drawn() == 45
    for name in ("base", "DRPO", NASTY):
        own = made["conditions"][name]["cells"]["lookup"]["hard"]
        assert tab.points()[name] == pytest.approx([own["think_tokens"]["mean"], own["accuracy"]["mean"]])
    tab.head("accuracy").locator("button").click()
    cells = [c["cells"]["lookup"]["hard"]["accuracy"]["mean"] for n, c in made["conditions"].items() if n != "base"]
    assert tab.column("accuracy") == pytest.approx(sorted((100 * c for c in cells), reverse=True), abs=0.051)
    tab.click("#reset")
    assert tab.points()["DRPO"][1] == pytest.approx(made["conditions"]["DRPO"]["metrics"]["accuracy"]["mean"])


@in_browser
def test_families_and_words_choose_conditions_in_figure_and_table(tab, made):
    tab.locator("#families").get_by_role("button", name="trained").click()
    rest = {n for n, c in made["conditions"].items() if c["family"] != "trained"}
    assert set(tab.rows()) == set(tab.points()) == rest
    tab.fill("#query", "steered")
    tab.wait_for_function("document.querySelectorAll('#numbers tbody tr').length < 10")
    found = {n for n in rest if "steered" in n}
    assert set(tab.rows()) == set(tab.points()) == found | {"base"}
    assert tab.inner_text("#status") == f"{len(found) + 1} of 45 conditions"


@in_browser
def test_hovering_and_clicking_a_point_show_its_numbers_and_its_transcript(tab, made):
    name = "naive price 2.5 %"
    tab.mouse.move(*tab.place(name))
    tab.wait_for_selector("#pareto .hoverlayer .hovertext")
    assert name in tab.locator("#pareto .hoverlayer").text_content()
    tab.mouse.click(*tab.place(name))
    tab.wait_for_selector(f"#transcripts [data-condition='{name}']")
    assert name in tab.inner_text("#card h3")
    example = made["examples"][0]["responses"]
    for condition in ("base", name):
        pane = tab.locator(f"#transcripts [data-condition='{condition}']")
        think, answer = example[condition]["text"].removeprefix("<think>").split("</think>")
        assert pane.locator(".think .text").inner_text() == think.strip()
        assert pane.locator(".answer .text").inner_text() == answer
        assert pane.locator(".verdict").inner_text() == ("✓ right" if example[condition]["correct"] else "✗ wrong")
    tab.click("#next")
    assert tab.input_value("#example") == "problem-1"


@in_browser
def test_the_csv_says_of_which_problems_a_column_is(chromium, report):
    heads = []
    for fragment in ("", "#t=lookup&d=hard"):
        tab = Tab(chromium, report, fragment=fragment)
        with tab.expect_download() as download:
            tab.click("#csv")
        heads.append([name.strip('"') for name in Path(download.value.path()).read_text().splitlines()[0].split(",")])
        tab.close()
    everything, filtered = ("\n".join(head) for head in heads)
    assert "accuracy\n" in everything and "(" not in everything
    assert (
        "accuracy (lookup; hard)_low" in filtered and "think_tokens (lookup; hard)\n" in filtered and "\naccuracy\n" not in filtered
    )
    assert "\nkl\n" in filtered  # the board has it for all problems only


@in_browser
def test_open_thinking_and_no_thinking_are_said(chromium, report):
    tab = Tab(chromium, report, fragment="#c=budget+8&e=problem-1")
    assert tab.inner_text("[data-condition='budget 8'] .name") == "thinking, never closed"
    tab.select_option("#condition", "asked not to think")
    assert tab.inner_text("[data-condition='asked not to think'] .name") == "response, without thinking"
    tab.close()


@in_browser
def test_text_of_the_board_is_never_read_as_html(tab):
    tab.select_option("#condition", NASTY)
    pane = tab.locator("#transcripts article").nth(1)
    think, answer = NASTY_TEXT.removeprefix("<think>").split("</think>")
    assert pane.locator(".think .text").inner_text() == think and pane.locator(".answer .text").inner_text() == answer
    assert tab.inner_text("#card h3").strip() == NASTY and "<b>not bold</b>" in tab.inner_text("#card")
    tab.mouse.move(*tab.place(NASTY))
    tab.wait_for_timeout(300)
    assert tab.evaluate("window.hacked") is None
    assert tab.locator("img, main svg [onload], main script").count() == 0
    assert f"{NASTY[:29]}…" in tab.locator("#pareto .annotation").all_text_contents()
    assert NASTY in tab.locator("#pareto .hoverlayer").text_content()


@in_browser
@pytest.mark.parametrize("width", [1280, 800])
def test_nothing_is_asked_of_a_network_nothing_complains_nothing_scrolls_sideways(chromium, report, width):
    tab = Tab(chromium, report, width)
    height = tab.evaluate("document.documentElement.scrollHeight")
    for top in range(0, height, 800):
        tab.evaluate(f"scrollTo(0, {top})")
        tab.wait_for_timeout(50)
    for group in ("damage", "budget", "mechanism", "cost", "main"):
        tab.locator("#groups").get_by_role("button", name=group).click()
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
    tab.locator("#gallery").scroll_into_view_if_needed()
    tab.wait_for_function("document.querySelectorAll('.modebar').length >= 6")
    buttons = tab.evaluate("[...document.querySelectorAll('.modebar-btn')].map(b => b.dataset.title)")
    assert buttons and not [title for title in buttons if re.search("share|cloud|edit", title, re.I)]  # they send the numbers away
    assert tab.requests == [report.as_uri()] and tab.complaints == []
    tab.close()


@in_browser
def test_the_address_keeps_what_was_chosen(tab, chromium, report):
    tab.locator("#tasks").get_by_role("button", name="lookup").click()
    tab.locator("#families").get_by_role("button", name="control").click()
    tab.head("think_tokens").locator("button").click()
    tab.select_option("#condition", "PEAR")
    fragment = tab.evaluate("location.hash")
    again = Tab(chromium, report, fragment=fragment)
    assert again.rows() == tab.rows() and again.points() == tab.points()
    assert again.inner_text("#card") == tab.inner_text("#card")
    again.close()
    odd = Tab(chromium, report, fragment="#c=nobody&t=%3Cb%3E&s=&off=%7B&k=[1]&g=x&unknown=1")
    assert odd.drawn() == 45 and odd.complaints == []
    odd.close()


@in_browser
def test_all_can_be_reached_with_the_keyboard(tab):
    tab.locator("#numbers tbody tr[data-condition='DRPO'] button").press("Enter")
    assert "DRPO" in tab.inner_text("#card h3") and tab.input_value("#condition") == "DRPO"
    assert tab.evaluate("document.activeElement.closest('tr').dataset.condition") == "DRPO"
    assert tab.locator("#numbers tr[data-condition='DRPO'] button").get_attribute("aria-pressed") == "true"
    outline = tab.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


@in_browser
@pytest.mark.parametrize("kept", [(), ("conditions", "metrics"), ("conditions",), ("curves", "methods"), ("figures", "provenance")])
def test_a_part_that_is_missing_leaves_its_section_out(chromium, made, tmp_path, kept):
    report = write_page({"title": "Part", **{key: made[key] for key in kept}}, tmp_path / "report.html")
    tab = Tab(chromium, report)
    sections = {"conditions": "table", "curves": "curves", "figures": "figures", "methods": "methods", "provenance": "provenance"}
    shown = {key for key, id in sections.items() if tab.locator(f"#{id}").is_visible()}
    assert shown == set(kept) & set(sections) and tab.complaints == []
    assert not tab.locator("#examples").is_visible()
    tab.close()


def test_a_board_of_base_alone_has_figures_that_json_can_store():
    alone = board()
    alone |= {"conditions": {"base": alone["conditions"]["base"]}, "paired": {}}
    shown = reading.sections(alone)
    assert [part["title"] for part in shown] == ["Chains of additions"]
    assert "NaN" not in json.dumps(shown, default=store.jsonable)
