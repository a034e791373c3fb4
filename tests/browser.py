"""A page in headless Chromium: its DOM after its script, and what a script of the test reports."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest


def in_browser(path: Path, tmp_path: Path) -> str:
    """The page's DOM after its script, without whose end the test fails; the test is skipped where no Chromium is."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium here: the page's script was not run")
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         f"--user-data-dir={tmp_path}/browser", "--dump-dom", path.as_uri()],
        capture_output=True, text=True,
    )  # fmt: skip
    assert 'data-ready="yes"' in done.stdout and "data-error" not in done.stdout.split("<head>")[0], done.stderr
    return done.stdout


def report_of(dom: str):
    """What a test's script wrote into the element "report"."""
    return json.loads(html.unescape(re.search(r'<pre id="report">(.*?)</pre>', dom, re.DOTALL)[1]))


REPORT = """
function report(values) {
  const pre = document.createElement("pre");
  pre.id = "report";
  pre.textContent = JSON.stringify(values);
  document.body.append(pre);
}
"""


def with_script(page: str, script: str) -> str:
    return page.replace("</html>", f"<script>{REPORT}{script}</script></html>")
