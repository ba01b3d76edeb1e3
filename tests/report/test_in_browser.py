"""The report in a real browser: it loads nothing, can be read everywhere, and saves a patch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from resnext_det.data.patch import apply_patch
from resnext_det.evaluation.results_file import read_metrics
from resnext_det.report.page import write_report

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

# The lowest contrast of any text with the background behind it, as WCAG defines it.
CONTRAST = """() => {
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const luminance = (colours) => {
    colours.forEach((colour) => { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); });
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((value) => value / 255)
      .map((one) => one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const texts = [...document.querySelectorAll('h1, h2, h3, p, th, td, dt, dd, figcaption')];
  return Math.min(...texts.map((text) => {
    const behind = [];
    for (let one = text; one; one = one.parentElement) {
      behind.unshift(getComputedStyle(one).backgroundColor);
    }
    const [one, other] = [luminance([getComputedStyle(text).color]), luminance(behind)];
    return (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
  }));
}"""


@pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed")
def test_report_in_a_browser(evaluated_run: Path, tmp_path: Path) -> None:
    address = write_report(evaluated_run, tmp_path / "report.html").as_uri()
    desktop, phone = {"width": 1280, "height": 900}, {"width": 360, "height": 740}
    with playwright.sync_playwright() as started:
        # Chromium has no sandbox for root, the user of most containers.
        browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        for size in (desktop, phone):
            for scheme in ("light", "dark"):
                context = browser.new_context(viewport=size, color_scheme=scheme)
                page = context.new_page()
                complaints: list[str] = []
                requests: list[str] = []
                page.on("console", lambda message, seen=complaints: seen.append(message.text))
                page.on("dialog", lambda dialog, seen=complaints: seen.append(dialog.message))
                context.on("request", lambda asked, seen=requests: seen.append(asked.url))
                page.goto(address)
                widths = page.evaluate(
                    "() => Promise.all([...document.images].map((image) =>"
                    " image.decode().then(() => image.naturalWidth)))"
                )
                assert len(widths) > 20 and min(widths) > 100
                assert page.evaluate("() => document.documentElement.scrollWidth") <= size["width"]
                assert page.evaluate(CONTRAST) >= 4.5
                dark = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
                assert (dark == "rgb(19, 21, 24)") == (scheme == "dark")
                assert complaints == []
                assert [url for url in requests if not url.startswith("data:")] == [address]
                context.close()
        browser.close()


@pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed")
def test_answers_become_a_patch(evaluated_run: Path, tmp_path: Path) -> None:
    address = write_report(evaluated_run, tmp_path / "report.html").as_uri()
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(address)
        button = page.get_by_role("button", name="Download the patch")
        assert button.is_disabled()
        answers = page.get_by_role("radio", name="yes").all()
        for each in answers[1:4]:
            each.check()
        page.get_by_role("radio", name="no").nth(2).check()
        status = page.get_by_role("status").text_content()
        assert status == f"3 of {len(answers)} answered, 2 labels to change"
        expected = [json.loads(str(answers[at].get_attribute("data-edit"))) for at in (1, 3)]
        with page.expect_download() as download:
            button.click()
        assert download.value.suggested_filename == "patch_instances_val2017.json"
        download.value.save_as(tmp_path / "patch.json")
        browser.close()
    assert json.loads((tmp_path / "patch.json").read_text())["edits"] == expected
    annotations = read_metrics(evaluated_run).evaluations[0].annotations
    _, counts = apply_patch(tmp_path / "patch.json", annotations)
    assert counts.total() >= 2
