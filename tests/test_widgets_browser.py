"""The widgets in JupyterLab, in a real browser: moving the slider and clicking a head change what the page shows.

Needs a Chromium on the machine, the package ``playwright``, which drives it, and JupyterLab. The server listens on this machine only.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
import torch

from toolkit.edits import steering
from toolkit.generate import Sampling, rollouts
from toolkit.lm import Condition
from toolkit.types import Direction, Problem

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here; on Debian: apt-get install -y --no-install-recommends chromium"
)
TOKEN, WAIT = "only-here", 180_000  # milliseconds that one step may take on a busy machine
PROMPT = "7+8-3=?"
CELLS = [
    """import torch
from toolkit import lm, tasks, widgets
from toolkit.types import Direction, HeadScores
model = lm.load("tiny-reasoner", device="cpu")
size = (model.layout.n_layers, model.layout.d_model)
vector = 20.0 * torch.randn(*size, generator=torch.Generator().manual_seed(0))
v = Direction(vector, "resid_post", "think", "by hand", 1, 1, model.provenance())
widgets.steer(model, v, "7+8-3=?", most=1.5)""",
    """score = torch.zeros(model.layout.n_layers, model.layout.n_heads).double()
score[2, 4] = 1.0
scores = HeadScores(score, "by_hand", "units", model.provenance())
widgets.head_map(model, scores, v, tasks.load("arithmetic", "test", 2), max_new_tokens=60)""",
]


def serve(folder: Path) -> tuple[subprocess.Popen, str]:
    """Start JupyterLab with all its files in ``folder``; return the process and its address when it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {f"JUPYTER{name}_DIR": str(folder / name) for name in ("_CONFIG", "_DATA", "_RUNTIME", "LAB_SETTINGS", "LAB_WORKSPACES")}
    env = {**os.environ, **own, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    options = ["--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}"]
    options += [f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={folder}", "--LabApp.news_url=None"]
    options += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], env=env, stdout=log, stderr=log)
    address, until = f"http://127.0.0.1:{port}", time.monotonic() + WAIT / 1000
    while time.monotonic() < until and process.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/api?token={TOKEN}", timeout=5)
            return process, address
        except OSError:
            time.sleep(0.5)
    process.kill()
    raise RuntimeError(f"JupyterLab did not start:\n{(folder / 'server.log').read_text()[-2000:]}")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The notebook of ``CELLS`` in a tab, with both widgets drawn."""
    pytest.importorskip("jupyterlab", reason="no JupyterLab here: pip install 'reasoning-length-toolkit[notebook]'")
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright here: pip install playwright")
    folder = tmp_path_factory.mktemp("lab")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, folder / "widgets.ipynb")
    process, address = serve(folder)
    try:
        with playwright.sync_playwright() as driver:
            browser = driver.chromium.launch(
                executable_path=CHROMIUM, args=["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
            )
            tab = browser.new_page(viewport={"width": 1400, "height": 2400})
            tab.set_default_timeout(WAIT)
            tab.goto(f"{address}/lab/tree/widgets.ipynb?token={TOKEN}")
            tab.locator("text=/Python 3 .*Idle/").wait_for()  # before that, a cell that is run is lost
            tab.locator(".jp-CodeCell").first.click()
            for _ in CELLS:
                tab.keyboard.press("Shift+Enter")
            tab.locator(".jp-CodeCell").nth(1).locator("text=Attends").wait_for()
            yield tab
            browser.close()
    finally:
        process.terminate()
        process.wait(30)


def text_of(lab, number: int) -> str:
    return lab.locator(".jp-CodeCell").nth(number).inner_text()


def test_moving_the_slider_shows_what_steering_generates(lab, tiny):
    vector = 20.0 * torch.randn(tiny.layout.n_layers, tiny.layout.d_model, generator=torch.Generator().manual_seed(0))
    v = Direction(vector, "resid_post", "think", "by hand", 1, 1, tiny.provenance())
    problem = Problem("prompt", ({"role": "user", "content": PROMPT},), "")

    def begins(*acts) -> str:
        greedy = Sampling(temperature=0.0, max_new_tokens=400)
        (r,) = rollouts(Condition(tiny, acts), [problem], greedy, progress=False)
        return tiny.text(r.token_ids[r.prompt_len :]).split("\n")[0][:12]

    assert "strength +0: " in text_of(lab, 0) and begins() in text_of(lab, 0) and "strength +1" not in text_of(lab, 0)
    strength = lab.locator(".jp-CodeCell").nth(0).locator(".widget-slider .widget-readout").first
    strength.click()
    lab.keyboard.press("Control+A")
    lab.keyboard.type("1")
    lab.keyboard.press("Enter")
    lab.locator("text=/strength \\+1(, cut.*)?: \\d+ think tokens/").wait_for()
    assert begins(steering(v, 1.0)) in text_of(lab, 0) and begins() in text_of(lab, 0)
    assert begins(steering(v, 1.0)) != begins()


def test_a_click_on_a_head_shows_it_and_the_switch_turns_it_off(lab):
    output = lab.locator(".jp-CodeCell").nth(1)
    assert "of layer 2:" in text_of(lab, 1) and text_of(lab, 1).count("think tokens") == 1
    x, y = lab.evaluate(
        "() => { const {xaxis, yaxis} = document.querySelector('.js-plotly-plot')._fullLayout; return [xaxis.d2p(0), yaxis.d2p(0)]; }"
    )
    plot = output.locator(".js-plotly-plot .nsewdrag").first
    plot.hover(position={"x": x, "y": y})
    output.locator(".js-plotly-plot .hovertext").first.wait_for()  # plotly knows the point once it is hovered over
    plot.click(position={"x": x, "y": y})
    output.locator("text=/of layer 0:/").wait_for()
    assert output.locator(".widget-dropdown select").first.evaluate("s => s.options[s.selectedIndex].text").startswith("0.0:")
    output.locator(".widget-checkbox input").first.check()
    output.locator("text=/head 0\\.0 off(, cut.*)?: \\d+ think tokens/").wait_for()
    assert re.search(r"unchanged: \d+ think tokens", text_of(lab, 1))
