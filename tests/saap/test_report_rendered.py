"""The report as a browser draws it: nothing cut, spilling, overlapping or faint, in light, dark, narrow, wide, print.

Runs where a Chromium or Chrome is on the path, or named by the environment variable CHROME. ``probe.js`` measures the
page in a copy of it.
"""

import html
import json
import os
import re
import shutil
import subprocess
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from saap.evaluate import Evaluation
from saap.report import describe_pruning
from saap.report_data import Losses
from saap.report_page import render
from tests.saap.test_report import large
from tests.saap.tiny import tiny_model

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROME = os.environ.get("CHROME") or next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(CHROME is None, reason=f"none of {', '.join(NAMES)} is on the path and CHROME is unset")

# without a sandbox, which containers and root have not: the only page it opens is ours
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run",
    "--enable-logging=stderr",
)  # fmt: skip
LONG = "organisation/" + "a-model-of-a-very-long-name-" * 7
PAGE_WIDTH, PAGE_HEIGHT = 739, 979  # pixels of a US letter page at 96 dpi within Chromium's margins of 1 cm
PROBE = Path(__file__).with_name("probe.js")
Browser = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Browser:
    profile = tmp_path_factory.mktemp("profile")

    def run(page: Path, *options: str, width: int = 1400, dark: bool = False) -> "subprocess.CompletedProcess[str]":
        colours = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
        command = [str(CHROME), *QUIET, f"--user-data-dir={profile}", f"--window-size={width},1000", colours, *options]
        return subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)

    return run


@cache
def page(names: tuple[str, str]) -> str:
    """A report with everything in it that is long, many or large."""
    plan, scores = large(80)
    spread = {name: getattr(scores, name).flip(0) / getattr(scores, name).max() for name in ("attention", "mlp")}
    # labels as wide as they get: several decades, and the smallest one that is written out
    scores = replace(scores, fluctuation={name: values**9 for name, values in spread.items()})
    text = "It was a long way home. " * 12 + "x" * 300
    dense = Evaluation(12.345, 2.5, 128_000, 64, 2048, 69 * 10**9, 69 * 10**9, 138 * 10**9, 327_680, 1234.5, text,
                       "bfloat16", "NVIDIA H100 80GB HBM3", text)  # fmt: skip
    pruned = replace(dense, perplexity=9e12, parameters=55 * 10**9, against=dense)
    described = describe_pruning(
        LONG, plan, tiny_model("llama", torch.bfloat16), scores=scores, evaluation=pruned,
        baselines=[(name, pruned) for name in ("llm_pruner_vector", "block_influence", "b" * 60)],
        timings={"calibrate": 1234.5, "score": 0.1, "evaluate": 5000.0},
        files={"calibration": "text-" * 30 + ".jsonl", "evaluation": f"hub:organisation/{'d' * 100}"},
    )  # fmt: skip
    falling = [30 / (step + 1) ** 1.5 for step in range(2000)]
    losses = Losses("KL divergence", falling, [(200 * n, falling[n]) for n in range(1, 11)], 1200)
    return render(replace(described, names=names, losses=losses)).replace("<details>", "<details open>")


def measure(browser: Browser, folder: Path, text: str, **options: Any) -> dict[str, Any]:
    """What ``probe.js`` finds in a page."""
    copy = folder / "probed.html"
    copy.write_text(text.replace("</body>", f"<script>{PROBE.read_text()}</script></body>"), encoding="utf-8")
    done = browser(copy, "--dump-dom", **options)
    written = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert written, done.stderr
    return json.loads(html.unescape(written[1])) | {"console": re.findall(r".*CONSOLE.*", done.stderr)}


def assert_readable(found: dict[str, Any]) -> None:
    assert found["texts"] > 800 and found["scrollWidth"] == found["width"]
    assert {name: value for name, value in found.items() if isinstance(value, list) and value} == {}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [500, 1400])  # headless windows are no narrower
def test_a_report_is_readable(browser: Browser, tmp_path, width: int, dark: bool) -> None:
    found = measure(browser, tmp_path, page((LONG, LONG + "pruned")), width=width, dark=dark)
    assert (found["width"], found["dark"]) == (width, dark)
    assert_readable(found)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_dark_page_is_dark(browser: Browser, tmp_path, dark: bool) -> None:
    (tmp_path / "page.html").write_text(page(("dense", "pruned")), encoding="utf-8")
    browser(tmp_path / "page.html", f"--screenshot={tmp_path / 'shot.png'}", dark=dark)
    corner = first_pixel((tmp_path / "shot.png").read_bytes())
    assert max(corner) < 40 if dark else min(corner) > 250


def first_pixel(png: bytes) -> tuple[int, ...]:
    """Red, green and blue of the upper left corner, where every filter of a PNG leaves a pixel as it is."""
    data, place = b"", 8
    while place < len(png):
        length = int.from_bytes(png[place : place + 4], "big")
        if png[place + 4 : place + 8] == b"IDAT":
            data += png[place + 8 : place + 8 + length]
        place += length + 12  # the length, the name and the checksum
    return tuple(zlib.decompress(data)[1:4])


def test_nothing_is_cut_on_paper(browser: Browser, tmp_path) -> None:
    text = page(("dense", "pruned"))
    as_printed = text.replace("@media print", "@media all")
    assert as_printed != text
    found = measure(browser, tmp_path, as_printed, width=PAGE_WIDTH)
    assert_readable(found)
    assert found["tallest"] <= PAGE_HEIGHT  # figures are kept whole, so they must fit a page
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    browser(tmp_path / "page.html", f"--print-to-pdf={tmp_path / 'page.pdf'}", "--no-pdf-header-footer", dark=True)
    pdf = (tmp_path / "page.pdf").read_bytes()
    assert pdf.startswith(b"%PDF") and 4 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 12


FAULTS = {
    "outside": "main { width: 2000px; max-width: none; }",
    "spilling": ".facts .value { white-space: nowrap; width: 20px; }",
    "overlapping": "figcaption { margin-bottom: -1.2em; }",
    "faint": ".note { color: #999; }",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(browser: Browser, tmp_path, fault: str) -> None:
    text = page((LONG, LONG)).replace("</style>", FAULTS[fault] + "</style>")
    text = text.replace("</body>", "<script>console.error('planted')</script></body>")
    found = measure(browser, tmp_path, text)
    assert found[fault] and any("planted" in line for line in found["console"])
