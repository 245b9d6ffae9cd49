"""The report in a real browser: every chart is drawn, nothing is asked of the network, the console is silent."""

import re
import shutil
import subprocess

import pytest
from test_analysis_frames import compose, two_gib_of_cache

from analysis import report

pytestmark = pytest.mark.browser
_CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def browsed(tmp_path_factory):
    if _CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install --no-install-recommends chromium")
    home = tmp_path_factory.mktemp("browser")
    folder = compose(home / "run", two_gib_of_cache, blocks=6)
    report.write(folder)
    log = home / "net.json"
    done = subprocess.run(
        [
            _CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={home / 'profile'}", f"--log-net-log={log}",
            "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
            "--virtual-time-budget=20000", "--dump-dom", (folder / "report.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=600, check=True,
    )  # fmt: skip
    return done.stdout, done.stderr, log.read_text()


def test_every_chart_is_drawn(browsed):
    dom, _, _ = browsed
    charts = re.findall(r'id="chart-(\w+)"', dom)
    assert charts == ["capacity", "contrast", "waterfall", "prediction", "phases", "timeline"]
    drawn = re.search(r'<body[^>]* data-drawn="(\d+)"', dom)
    assert drawn is not None
    assert int(drawn[1]) == len(charts)
    for key in charts:
        start = dom.index(f'id="chart-{key}"')
        assert "main-svg" in dom[start : dom.index("<figcaption>", start)]


def test_the_console_is_silent(browsed):
    assert [line for line in browsed[1].splitlines() if ":CONSOLE" in line] == []


def test_nothing_is_asked_of_the_network(browsed):
    asked = set(re.findall(r'"url":"(https?://[^"]+)"', browsed[2]))
    own = ("google.com", "googleapis.com", "gvt1.com")  # what the browser itself asks at start
    assert {url for url in asked if not url.split("/")[2].endswith(own)} == set()
