"""The report in a real browser: it renders, sorts and filters, and asks for nothing but itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from resnext_det.evaluation.annotations import read_ground_truth
from resnext_det.evaluation.detections import read_detections
from resnext_det.evaluation.results_file import DatasetMetrics, read_metrics
from resnext_det.report.details import read_details
from resnext_det.report.gallery import LOWEST
from resnext_det.report.matching import Labelled, Outcome, compare
from resnext_det.report.page import write_report

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine")

FROM = (0.05, 0.37, 0.5, 0.8, 1.0)  # positions of the slider


@dataclass
class Opened:
    """A page that is open, and what went wrong in it or was asked for."""

    page: Page
    evaluation: DatasetMetrics
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def script(self, text: str, argument: Any = None) -> Any:
        """Return what a function in the page returns."""
        return self.page.evaluate(text, argument)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with playwright.sync_playwright() as started:
        # As root, as in most containers, Chromium has no sandbox.
        opened = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def run(evaluated_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser") / "run"
    shutil.copytree(evaluated_run, folder)
    write_report(folder)
    return folder


@pytest.fixture()
def opened(browser: Browser, run: Path, request: pytest.FixtureRequest) -> Iterator[Opened]:
    """Return the open report; the parameter tells what kind of screen it is on."""
    context = browser.new_context(**getattr(request, "param", {}))
    found = Opened(context.new_page(), read_metrics(run).evaluations[0])
    found.page.on("console", lambda message: found.complaints.append(message.text))
    found.page.on("pageerror", lambda error: found.complaints.append(str(error)))
    found.page.on("dialog", lambda dialog: found.complaints.append(dialog.message))
    context.on("request", lambda asked: found.requests.append(asked.url))
    address = (run / "report.html").as_uri()
    found.page.goto(address)
    yield found
    found.page.wait_for_timeout(50)
    context.close()
    assert found.complaints == []
    # Pictures are in the page: what is asked for beside the page itself is in data: addresses.
    assert [url for url in found.requests if not url.startswith("data:")] == [address]


def test_the_figures_are_seen(opened: Opened) -> None:
    seen = opened.page.locator(".headline dd").all_inner_texts()
    figures = opened.evaluation.figures
    assert [text.replace("\n", "") for text in seen] == [
        f"{figures[name]:.1f}%" for name in ("AP", "AP50", "AP75")
    ]
    pictures = opened.script(
        "() => Promise.all([...document.querySelectorAll('image')].map(async (each) => {"
        "const one = new Image(); one.src = each.href.baseVal; await one.decode();"
        "return one.naturalWidth; }))"
    )
    assert len(pictures) == 14 and min(pictures) > 100
    assert opened.page.locator(".side.predicted use").count() == 14


def test_the_table_of_classes_sorts_by_every_column_both_ways(opened: Opened) -> None:
    names = ("name", "AP", "AP50", "APs", "APm", "APl", "AR", "best", "instances")
    buttons = opened.page.locator(".sortable thead button")
    assert buttons.count() == len(names)
    by_name = {each.name: each for each in opened.evaluation.per_class}
    details = read_details(opened.evaluation.details)
    assert details is not None
    for column, name in enumerate(names):
        orders = []
        for _ in range(2):
            buttons.nth(column).click()
            cell = opened.page.locator(".sortable thead th").nth(column)
            upwards = cell.get_attribute("aria-sort") == "ascending"
            assert opened.page.locator(".sortable [aria-sort]").count() == 1
            shown = [by_name[key] for key in rows(opened)]
            assert len(shown) == len(by_name)
            if name == "name":
                # "class 2" comes before "class 10".
                keys = [each.name for each in shown if each.name.startswith(("class", "a", "z"))]
                expected = ["a\u2028line", "apple", "class 1", "class 2", "class 10", "zebra"]
                assert keys == (expected if upwards else expected[::-1])
            elif name == "best":
                check_order([details.best_score(each.name) for each in shown], upwards)
            else:
                check_order([getattr(each, name) for each in shown], upwards)
            orders.append(upwards)
        assert sorted(orders) == [False, True]


def rows(opened: Opened) -> list[str]:
    """Return the classes that are seen in the table, from the top."""
    found: list[str] = opened.script(
        "() => [...document.querySelectorAll('.sortable tbody tr')]"
        ".filter((row) => row.checkVisibility()).map((row) => row.cells[0].dataset.value)"
    )
    return found


def check_order(values: list[Any], upwards: bool) -> None:
    numbers = [value for value in values if value is not None]
    assert values[: len(numbers)] == numbers  # what has no number is last
    assert numbers == sorted(numbers, reverse=not upwards)


def test_the_table_of_classes_is_filtered_by_name(opened: Opened) -> None:
    search = opened.page.get_by_label("Find")
    search.fill("CLASS 1")
    assert sorted(rows(opened)) == ["class 1", "class 10"]
    assert opened.page.locator(".classes output").inner_text() == "2 of 12 classes"
    search.fill("</script>")
    assert rows(opened) == ["</script><script>alert(1)</script>"]
    search.fill("no such class")
    assert rows(opened) == []
    search.fill("")
    assert len(rows(opened)) == 12


def test_the_curves_of_a_class_can_be_chosen(opened: Opened, run: Path) -> None:
    details = json.loads((run / "details_toy_val.json").read_text())
    chart = opened.page.locator(".recall").first
    choices = chart.locator("option").all()
    values = [choice.get_attribute("value") for choice in choices]
    assert set(values) == set(details["curves"])
    for value in values:
        chart.locator("select").select_option(value)
        curves = details["curves"][value]
        means = [f"{np.mean(curves[key]):.1f}" for key in ("0.50", "0.75", "0.50:0.95")]
        assert chart.locator(".legend b").all_inner_texts() == means
        first = chart.locator("path").first.get_attribute("d")
        assert first.startswith(f"M0 {round(2.4 * (100 - curves['0.50'][0]), 1):g}L")
    assert len({chart.locator("path").nth(n).get_attribute("d") for n in range(3)}) > 1


def boxes(run: Path) -> dict[str, tuple[list[Labelled], list[Labelled]]]:
    """Return true boxes and predictions by file name, read anew."""
    evaluation = read_metrics(run).evaluations[0]
    truth = read_ground_truth(evaluation.annotations)
    detections = read_detections(evaluation.detections, truth)
    found: dict[str, tuple[list[Labelled], list[Labelled]]] = {}
    for image_id, name in zip(truth.image_ids.tolist(), truth.file_names):
        true = [
            Labelled(box, number, crowd=crowd)
            for owner, box, number, crowd in zip(
                truth.objects.image_ids.tolist(),
                truth.objects.boxes.tolist(),
                truth.objects.category_ids.tolist(),
                truth.objects.crowds.tolist(),
            )
            if owner == image_id
        ]
        predicted = [
            Labelled(each["bbox"], each["category_id"], each["score"])
            for each in detections.results()
            if each["image_id"] == image_id
        ]
        found[name] = true, sorted(predicted, key=lambda each: -each.score)
    return found


# What the gallery shows, picture by picture.
SHOWN = """() => Object.fromEntries([...document.querySelectorAll('.pair')].map((figure) => {
  const states = (side) => [...figure.querySelectorAll(`.${side} .box`)].reverse()
    .filter((box) => box.checkVisibility())
    .map((box) => [Number(box.dataset.category), box.dataset.state,
      !box.className.includes('faint')]);
  return [figure.querySelector('.file').textContent, {
    visible: figure.checkVisibility(), truth: states('true'), predictions: states('predicted'),
    counts: figure.querySelector('.counts').textContent,
    score: figure.querySelector('.score').textContent,
  }];
}))"""


def move(opened: Opened, value: float) -> None:
    """Move the slider as a user does."""
    opened.page.get_by_label("Score from").fill(f"{value}")


def states(kinds: list[bool | None], good: str, bad: str) -> list[str]:
    return ["crowd" if kind is None else good if kind else bad for kind in kinds]


def counts(outcome: Outcome) -> str:
    found, right = outcome.found, outcome.right
    text = f"{found.count(True)} of {len(found) - found.count(None)} found, "
    text += f"{right.count(False)} false"
    return text + (f", {outcome.confused} confused" if outcome.confused else "")


@pytest.mark.parametrize("lowest", FROM)
def test_right_and_wrong_are_true_wherever_the_slider_stands(
    opened: Opened, run: Path, lowest: float
) -> None:
    move(opened, lowest)
    shown = opened.script(SHOWN)
    assert len(shown) == 14
    for name, (truth, predictions) in boxes(run).items():
        outcome = compare(truth, [each for each in predictions if each.score >= lowest])
        picture = shown[name]
        found = states(outcome.found, "found", "missed")
        assert picture["truth"] == [[t.category, state, True] for t, state in zip(truth, found)]
        right = states(outcome.right, "right", "wrong")
        assert [state for _, state, _ in picture["predictions"]] == right
        assert picture["counts"] == counts(outcome)
        assert float(picture["score"]) == pytest.approx(outcome.score, abs=0.00501)
    assert opened.page.locator(".pictures .from").inner_text() == f"{lowest:.2f}"


def test_predictions_below_the_lowest_score_are_not_in_the_page(opened: Opened, run: Path) -> None:
    count = sum(each.score >= LOWEST for _, found in boxes(run).values() for each in found)
    assert opened.page.locator(".predicted .box").count() == count


def test_pictures_are_filtered_by_class(opened: Opened, run: Path) -> None:
    select = opened.page.locator(".pictures select")
    everything = boxes(run)
    numbers = [
        value
        for value in opened.script(
            "() => [...document.querySelector('.pictures select').options].map((one) => one.value)"
        )
        if value
    ]
    assert len(numbers) == 12
    few = 14
    for number in map(int, numbers):
        select.select_option(str(number))
        for lowest in (0.3, 0.9):
            move(opened, lowest)
            shown = opened.script(SHOWN)
            expected = {
                name
                for name, (truth, found) in everything.items()
                if any(each.category == number for each in truth)
                or any(each.category == number and each.score >= lowest for each in found)
            }
            visible = {name for name, picture in shown.items() if picture["visible"]}
            assert visible == expected
            said = opened.page.locator(".pictures .shown").inner_text()
            assert said == f"{len(expected)} of 14 pictures"
            few = min(few, len(expected))
            for name in visible:
                truth, found = everything[name]
                outcome = compare(
                    [each for each in truth if each.category == number],
                    [each for each in found if each.category == number and each.score >= lowest],
                )
                of_all = counts(outcome).partition(", ")[0]
                assert shown[name]["counts"].startswith(of_all)
                marked = shown[name]["truth"] + shown[name]["predictions"]
                assert all(clear == (category == number) for category, _, clear in marked)
    assert few < 14
    select.select_option("")
    assert all(picture["visible"] for picture in opened.script(SHOWN).values())


def test_labels_lie_in_their_picture_and_apart(opened: Opened) -> None:
    apart = """() => [...document.querySelectorAll('.side')].map((side) => {
      const field = side.getBoundingClientRect();
      const labels = [...side.querySelectorAll('.label')]
        .filter((label) => label.checkVisibility({ visibilityProperty: true }))
        .map((label) => label.getBoundingClientRect());
      const inside = labels.every((one) => one.left >= field.left - 1
        && one.right <= field.right + 1 && one.top >= field.top - 1
        && one.bottom <= field.bottom + 1);
      const covered = labels.some((one, index) => labels.slice(index + 1).some((other) =>
        one.left < other.right - 0.5 && other.left < one.right - 0.5
        && one.top < other.bottom - 0.5 && other.top < one.bottom - 0.5));
      return [labels.length, inside, covered];
    })"""
    for lowest in (0.5, 0.05):
        move(opened, lowest)
        found = opened.script(apart)
        assert sum(count for count, _, _ in found) > 40
        assert all(inside and not covered for _, inside, covered in found)
    opened.page.get_by_role("button", name="Enlarge").first.click()
    opened.page.wait_for_function("document.querySelector('.pair').offsetWidth > 900")
    opened.page.wait_for_timeout(100)
    assert all(inside and not covered for _, inside, covered in opened.script(apart))


def test_everything_is_reached_by_the_keyboard(opened: Opened) -> None:
    opened.page.locator("nav a").last.focus()
    reached = set()
    for _ in range(60):
        opened.page.keyboard.press("Tab")
        reached.add(
            opened.script(
                "() => document.activeElement.closest('button')?.textContent"
                " ?? document.activeElement.type ?? document.activeElement.tagName"
            )
        )
    assert {"select-one", "range", "search", "Class", "AR", "Objects", "Enlarge"} <= reached
    opened.page.get_by_label("Score from").focus()
    opened.page.keyboard.press("ArrowRight")
    assert opened.page.locator(".pictures .from").inner_text() == "0.51"
    opened.page.get_by_role("button", name="AP50").focus()
    opened.page.keyboard.press("Enter")
    by_name = {each.name: each for each in opened.evaluation.per_class}
    check_order([by_name[name].AP50 for name in rows(opened)], upwards=False)


@pytest.mark.parametrize(
    "opened", [{"viewport": {"width": 360, "height": 740}, "has_touch": True}], indirect=True
)
def test_a_phone_scrolls_one_way_only(opened: Opened) -> None:
    assert opened.script("() => document.documentElement.scrollWidth") <= 360
    wide = "() => [...document.querySelectorAll('.card, .pair, .controls')].filter((each) =>"
    wide += " each.getBoundingClientRect().right > innerWidth).length"
    assert opened.script(wide) == 0
    move(opened, 0.05)
    assert opened.script("() => document.documentElement.scrollWidth") <= 360


@pytest.mark.parametrize(
    "opened", [{"viewport": {"width": 360, "height": 740}, "has_touch": True}], indirect=True
)
def test_a_phone_has_letters_to_read_and_room_for_pictures(opened: Opened) -> None:
    heights = opened.script(
        "() => [...document.querySelectorAll('.recall svg text')]"
        ".map((text) => text.getBoundingClientRect().height)"
    )
    # The box of a text is about 1.15 of its size.
    assert min(heights) > 11.5
    opened.page.locator(".pair").last.scroll_into_view_if_needed()
    bottom = "() => document.querySelector('.controls').getBoundingClientRect().bottom"
    assert opened.script(bottom) < 0


LABELS = """() => [...document.querySelectorAll('.chosen + .label')]
  .filter((label) => label.checkVisibility({ visibilityProperty: true }))
  .map((label) => label.textContent)"""


@pytest.mark.parametrize(
    "opened", [{"viewport": {"width": 360, "height": 740}, "has_touch": True}], indirect=True
)
def test_a_tap_on_a_box_shows_its_label_and_the_next_that_of_the_box_beneath(
    opened: Opened,
) -> None:
    move(opened, 0.05)
    # Where a box without room for its label is, some number of taps shows it.
    box = opened.page.locator(".box:not([hidden]):has(+ .label.covered)").first
    wanted = box.evaluate("(one) => one.nextElementSibling.textContent")
    box.scroll_into_view_if_needed()
    place = box.bounding_box()
    assert place is not None
    middle = place["x"] + place["width"] / 2, place["y"] + place["height"] / 2
    seen: list[str] = []
    for _ in range(30):
        opened.page.touchscreen.tap(*middle)
        shown = opened.script(LABELS)
        assert len(shown) <= 1
        if not shown:
            break
        seen += shown
    assert wanted in seen
    assert opened.script(LABELS) == []
    opened.page.touchscreen.tap(*middle)
    assert opened.script(LABELS) == seen[:1]
    opened.page.touchscreen.tap(5, 5)
    assert opened.script(LABELS) == []
    # One that the slider hides is not chosen any more.
    opened.page.locator(".predicted .box:not([hidden])").last.tap()
    assert len(opened.script(LABELS)) == 1
    opened.script(
        "() => { const slider = document.querySelector('.pictures input'); slider.value = 1;"
        "slider.dispatchEvent(new Event('input')); }"
    )
    assert opened.page.locator(".chosen").count() == 0
    # A first tap is none from the keyboard, which would have chosen this box already.
    first = opened.page.locator(".pair").nth(1).locator(".true .box").last
    first.tap(force=True)
    assert "chosen" in (first.get_attribute("class") or "")


def test_the_arrow_keys_go_from_box_to_box(opened: Opened) -> None:
    opened.page.get_by_label("Score from").focus()
    opened.page.keyboard.press("Tab")
    pair = opened.page.locator(".pair").first
    boxes = pair.locator(".box:not([hidden]) + .label").all_text_contents()
    assert len(boxes) > 2
    seen = []
    for _ in boxes:
        seen += opened.script(LABELS)
        assert opened.page.locator(".pictures .told").text_content() == seen[-1]
        opened.page.keyboard.press("ArrowRight")
    assert sorted(seen) == sorted(boxes)
    assert opened.script(LABELS) == seen[-1:]
    opened.page.keyboard.press("ArrowLeft")
    assert opened.script(LABELS) == seen[-2:-1]
    opened.page.keyboard.press("Tab")
    assert opened.script(LABELS) == []
    button = opened.page.get_by_role("button", name="Enlarge").first
    button.press("Enter")
    assert pair.get_by_role("button").inner_text() == "Reduce"
    assert pair.get_by_role("button").get_attribute("aria-pressed") is None


def test_long_names_leave_the_picture_to_be_seen(
    browser: Browser, evaluated_run: Path, tmp_path: Path
) -> None:
    shutil.copytree(evaluated_run, tmp_path / "run")
    document = json.loads((tmp_path / "run" / "metrics.json").read_text())
    (entry,) = document["datasets"].values()
    truth = json.loads(Path(entry["annotations"]).read_text())
    for each in truth["categories"]:
        each["name"] = f"{each['name']} with a very long name " * 6
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    entry.update(annotations=str(tmp_path / "truth.json"), annotations_sha256="")
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(document))
    page = browser.new_page()
    page.goto(write_report(tmp_path / "run").as_uri())
    widths = page.evaluate(
        "() => [...document.querySelectorAll('.label')].map((one) => one.offsetWidth)"
    )
    # 12 letters of 11 pixels, or twice 7, and the words and numbers beside them.
    assert 130 < max(widths) < 14 * 11 + 60
    page.close()


@pytest.mark.parametrize(
    ("opened", "dark"),
    [({"color_scheme": "light"}, False), ({"color_scheme": "dark"}, True)],
    indirect=["opened"],
)
def test_both_colour_schemes_can_be_read(opened: Opened, dark: bool) -> None:
    colour = "(name) => { const one = document.createElement('canvas').getContext('2d');"
    colour += " one.fillStyle = getComputedStyle(document.body)[name]; return one.fillStyle; }"
    page, ink = (
        sum(bytes.fromhex(opened.script(colour, name)[1:])) / 3
        for name in ("backgroundColor", "color")
    )
    assert abs(page - ink) > 180
    assert (page < 60) == dark
    line = opened.script("() => getComputedStyle(document.querySelector('.recall path')).stroke")
    assert (line == "rgb(242, 243, 245)") == dark


# The least contrast of the numbers in the table of confused classes, as WCAG defines it.
CONTRAST = """(share) => {
  const paint = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const luminance = (colour) => {
    paint.fillStyle = colour;
    paint.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...paint.getImageData(0, 0, 1, 1).data].map((value) => value / 255)
      .map((one) => one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  return Math.min(...[...document.querySelectorAll('.heat tbody td:not(.none)')].map((cell) => {
    if (share !== null && !cell.matches('.zero')) {
      cell.style.setProperty('--share', share);
      cell.classList.toggle('strong', share > 0.5);
    }
    const style = getComputedStyle(cell);
    const [one, other] = [luminance(style.color), luminance(style.backgroundColor)];
    if (style.opacity !== '1') return 0;
    return (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
  }));
}"""


@pytest.mark.parametrize(
    "opened", [{"color_scheme": "light"}, {"color_scheme": "dark"}], indirect=True
)
def test_the_numbers_of_confused_classes_can_be_read_on_every_shade(opened: Opened) -> None:
    for share in (None, 0.05, 0.3, 0.5, 0.51, 0.74, 1.0):
        assert opened.script(CONTRAST, share) >= 4.5, share


def many_classes(run: Path, output: Path) -> None:
    """Write a page on 30 classes, by giving the run's details more of them."""
    shutil.copytree(run, output)
    path = output / "details_toy_val.json"
    details = json.loads(path.read_text())
    counts = np.random.default_rng(0).integers(0, 3, (31, 31))
    counts[3, 7], counts[4] = 500, 0
    details["confusion"]["classes"] = [f"kind {n}" for n in range(30)] + ["background"]
    details["confusion"]["counts"] = counts.tolist()
    path.write_text(json.dumps(details))
    write_report(output)


def test_the_map_of_many_classes_tells_each_cell(
    browser: Browser, run: Path, tmp_path: Path
) -> None:
    many_classes(run, tmp_path / "many")
    page = browser.new_page()
    page.goto((tmp_path / "many" / "report.html").as_uri())
    pair = page.locator(".pairs tbody tr").first.inner_text().split("\t")
    counts = json.loads((tmp_path / "many" / "details_toy_val.json").read_text())
    row = np.array(counts["confusion"]["counts"])[3]
    share = f"{100 * 500 / row.sum():.1f} %"
    assert pair == ["kind 3", "kind 7", "500", share]
    field = page.locator(".map svg")
    field.scroll_into_view_if_needed()
    side = field.bounding_box()
    assert side is not None
    place = (side["x"] + side["width"] * 7.5 / 31, side["y"] + side["height"] * 3.5 / 31)
    page.mouse.move(*place)
    told = page.locator(".map output")
    assert told.inner_text() == f"kind 3, detected as kind 7: 500, {share} of the row"
    field.focus()
    page.keyboard.press("ArrowDown")
    assert told.inner_text() == "kind 4, detected as kind 7: 0"
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowRight")
    assert told.inner_text().startswith(f"kind 3, detected as kind 8: {row[8]}")
    # The shades go up with the share of the row, and the greatest is this cell's.
    shades = [float(each.get_attribute("fill-opacity")) for each in page.locator(".map path").all()]
    assert shades == sorted(shades)
    assert page.locator(".map path").last.get_attribute("d") == "M7 3h1v1h-1z"
    page.close()


@pytest.mark.parametrize(
    "opened", [{"viewport": {"width": 390, "height": 844}, "has_touch": True}], indirect=True
)
def test_a_picture_fills_the_screen_of_a_phone(opened: Opened) -> None:
    pair = opened.page.locator(".pair").first
    pair.get_by_role("button").tap()
    assert pair.bounding_box() == {"x": 0, "y": 0, "width": 390, "height": 844}
    assert opened.script("() => document.querySelector('.pair.wide .sides').offsetWidth") == 780
    pair.get_by_role("button", name="Reduce").tap()
    assert opened.script("() => document.documentElement.scrollWidth") == 390


def test_the_best_threshold_is_of_the_chosen_class(opened: Opened) -> None:
    details = read_details(opened.evaluation.details)
    assert details is not None
    chart = opened.page.locator(".recall").nth(1)
    for name in ("", "zebra", "class 10"):
        chart.locator("select").select_option(name)
        best = details.scores[name].best
        assert best is not None
        assert chart.locator("output").inner_text() == f"Highest F1 at a score of {best:.2f}"
        assert float(chart.locator(".best").get_attribute("x1") or "") == pytest.approx(300 * best)
        assert chart.locator("path").nth(2).get_attribute("d") == details.scores[name].curves[2][1]
