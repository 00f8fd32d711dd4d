"""JupyterLab itself: notebooks open in a browser and run from top to bottom, and panels answer to the keyboard."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import nbformat
import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser

# The start page, and chapters that run in seconds: with kernels and panels, with records, without any.
CHAPTERS = (
    "00_start_here.ipynb",
    "05_decode_launch_shape.ipynb",
    "10_graph_clean_scratch.ipynb",
    "16_shrink_tail_fill.ipynb",
)
PANELS = "05_decode_launch_shape.ipynb"
NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
PROBE = NOTEBOOKS.parent / "book" / "bookkit" / "probe.js"
SERVER_S, RUN_S, STOP_S = 30, 180, 15
CLICK_MS = 40_000  # a loaded machine with two cores

SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},  # all cells in the page: the test reads their prompts
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},  # no network, no question
}

# One line of state per look at the page: cells that have run, cells waiting or running, cells that failed.
STATE = """() => {
  const prompts = [...document.querySelectorAll('.jp-CodeCell .jp-InputArea-prompt')].map(p => p.textContent.trim());
  return {
    ran: prompts.filter(p => /^\\[\\d+\\]:?$/.test(p)).length,
    waiting: prompts.filter(p => p.includes('*')).length,
    failed: [...document.querySelectorAll('.jp-OutputArea-output')].map(e => e.textContent)
      .filter(text => text.includes('Traceback (most recent call last)')).map(text => text.slice(-400)),
  };
}"""


def missing() -> str:
    """Why this machine cannot run the test; empty when it can."""
    for module, extra in (("jupyterlab", "lab"), ("playwright", "test")):
        if importlib.util.find_spec(module) is None:
            return f"needs {module}: pip install -e '.[{extra}]'"
    return "" if shutil.which("chromium") else "needs chromium on PATH"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A JupyterLab over a copy of the notebooks: the address of one, with the token, and the folder of the copy."""
    if reason := missing():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(NOTEBOOKS, folder / "notebooks", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for plugin, values in SETTINGS.items():
        path = folder / "settings" / "@jupyterlab" / f"{plugin}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(values))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}",
        f"--ServerApp.root_dir={folder / 'notebooks'}",
    ]  # fmt: skip
    # The reader's own settings, workspaces and running servers stay out of it.
    own = {
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "IPYTHONDIR": "ipython",
    }
    environ = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    environ |= {name: str(folder / value) for name, value in own.items()}
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(
            command, cwd=folder, env=environ, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        _await_server(server, f"http://127.0.0.1:{port}/api?token={token}", folder / "server.log")
        yield f"http://127.0.0.1:{port}/lab/tree/{{}}?token={token}&reset", folder / "notebooks"
    finally:
        _stop(server)


def _await_server(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + SERVER_S
    while True:
        try:
            with direct.open(url, timeout=2):
                return
        except OSError as error:
            if server.poll() is not None or time.monotonic() > deadline:
                said = log.read_text(errors="replace")[-2000:]
                raise AssertionError(f"JupyterLab did not answer ({error}):\n{said}") from error
            time.sleep(0.2)


def _stop(server: subprocess.Popen[bytes]) -> None:
    """Asked to stop, the server shuts its kernels down; kernels left by a killed one notice and end by themselves."""
    server.terminate()
    try:
        server.wait(STOP_S)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait(STOP_S)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(chromium: Browser, lab: tuple[str, Path], chapter: str) -> Iterator[Page]:
    """A chapter, open in JupyterLab with its kernel ready; the kernel ends with it."""
    tab = chromium.new_page(viewport={"width": 1400, "height": 1000})
    try:
        tab.set_default_timeout(CLICK_MS)
        tab.goto(lab[0].format(chapter))
        tab.locator(".jp-NotebookPanel .jp-CodeCell").first.wait_for()
        # A run asked for before the kernel has answered this page is dropped without a word.
        tab.locator("#jp-main-statusbar").get_by_text("Python 3 (ipykernel) | Idle").wait_for()
        yield tab
        menu(tab, "Kernel", "Shut Down All Kernels…")
        tab.locator(".jp-Dialog .jp-mod-warn").click()
    finally:
        tab.close()


def menu(page: Page, name: str, entry: str) -> None:
    page.locator("#jp-MainMenu").get_by_text(name, exact=True).click()
    page.locator(".lm-Menu").get_by_text(entry, exact=True).click()


def run_all(page: Page, path: Path) -> None:
    """Restart the kernel and run every cell; each has run, none has failed, none is left waiting."""
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    menu(page, "Run", "Restart Kernel and Run All Cells…")
    page.locator(".jp-Dialog .jp-mod-warn").click()
    deadline = time.monotonic() + RUN_S
    state = page.evaluate(STATE)
    while not state["failed"] and (state["ran"] < len(code) or state["waiting"]):
        assert time.monotonic() < deadline, f"after {RUN_S} s: {state}, expected {len(code)} cells to have run"
        time.sleep(0.5)
        state = page.evaluate(STATE)
    assert state["failed"] == []
    assert state["ran"] == len(code)


@pytest.mark.parametrize("chapter", [name for name in CHAPTERS if name != PANELS])
def test_notebook_restarts_and_runs_in_jupyterlab(chromium: Browser, lab: tuple[str, Path], chapter: str) -> None:
    with opened(chromium, lab, chapter) as page:
        run_all(page, lab[1] / chapter)


def test_panels_answer_to_the_keyboard_and_read_in_both_themes(chromium: Browser, lab: tuple[str, Path]) -> None:
    with opened(chromium, lab, PANELS) as page:
        run_all(page, lab[1] / PANELS)
        move_panels(page)
        # The same outputs, not drawn anew, on the dark theme: they take the page's colours or bring readable ones.
        page.evaluate(PROBE.read_text(encoding="utf-8"))
        for theme, light in (("JupyterLab Light", "true"), ("JupyterLab Dark", "false")):
            menu(page, "Settings", "Theme")
            page.locator(".lm-Menu").get_by_text(theme, exact=True).click()
            page.wait_for_function("light => document.body.dataset.jpThemeLight === light", arg=light)
            worst = page.evaluate("bookProbe.contrast('.jp-OutputArea-output')")
            assert worst["ratio"] >= 4, f"{theme}: contrast {worst['ratio']:.2f} at {worst['text']!r}"


def move_panels(page: Page) -> None:
    # The panel: its first slider sets the rows; the picture beside it is drawn anew by the kernel.
    panel = page.locator(".jp-OutputArea-output:has(.noUi-handle)").first
    panel.scroll_into_view_if_needed()
    picture = panel.locator("svg").first
    before = picture.get_attribute("aria-label")
    readout = panel.locator(".widget-readout").first.inner_text()
    handle = panel.locator(".noUi-handle").first
    handle.focus()
    handle.press("ArrowRight")
    page.wait_for_function(
        "([svg, before]) => svg.isConnected ? svg.getAttribute('aria-label') !== before : true",
        arg=[picture.element_handle(), before],
    )
    after = panel.locator("svg").first.get_attribute("aria-label")
    assert panel.locator(".widget-readout").first.inner_text() != readout
    assert before
    assert after
    assert after != before

    # The frames need no kernel: another slider, moved the same way, shows another picture.
    frames = page.locator(".dsv4-frames").first
    shown = frames.locator(".dsv4-frame:not([hidden])")
    first = shown.get_attribute("data-label")
    frames.locator('input[type="range"]').focus()
    page.keyboard.press("ArrowRight")
    assert shown.count() == 1
    assert shown.get_attribute("data-label") != first
