"""The page in a browser: what a click on the filter and the sort shows, at two widths."""

import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest

from isim.data import prepared
from isim.reporting.page import render
from isim.runtime import devices

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def row(**changes):
    names = ("doubt", "agreement", "stable", "coverage", "parts", "iou")
    found = dict.fromkeys(names) | {"id": "a", "splits": "train", "empty": 0, "covering": 0}
    return found | changes


def test_the_gallery_has_thousandths_and_nothing_where_nothing_is_known():
    line = {"size": [40, 30], "layers": ["mask", "ground truth"], "pixels": [[0, 900], [2, 300]]}
    dispute = [{"class": "dog", "tagged": False, "probability": 0.9, "usual": 0.5}]
    found = render.gallery(
        [row(doubt=0.25, coverage=0.25, parts=3), row(id="b")],
        [line, {"size": [5, 5], "layers": []}],
        [[1], None],
        {"a": dispute},
        classes=("cat", "dog"),
        colors=("#800000", "#008000"),
    )
    first, second = found["images"]
    assert first[:7] == ["a", "train", 30, 40, [1], [[1, 250]], [0, 3]]
    assert first[7:] == [250, None, None, 250, 3, None, 0, 0, [[1, 0, 900]]]
    assert second[4] is None and second[5] == second[6] == second[-1] == []


@pytest.fixture(scope="module")
def page(finished_project, tmp_path_factory, record, tiny):
    """The page of a finished project; its first class has a name with markup."""
    from isim.stages import report

    root = tmp_path_factory.mktemp("page") / "project"
    shutil.copytree(finished_project, root)
    for name in ("dataset.json", "labels.csv"):
        path = root / "data/prepared" / name
        path.write_text(path.read_text().replace("badger", "<b>badger's"))
    with pytest.MonkeyPatch.context() as monkeypatch, devices.intra_op_threads(1):
        record(monkeypatch)
        report.run(tiny.report, root)
    return root


@contextmanager
def opened(root, width):
    """The page in headless Chromium, `width` pixels wide, without a network."""
    api = pytest.importorskip("playwright.sync_api")
    binary = next(filter(None, map(shutil.which, BROWSERS)), None)
    if binary is None:
        pytest.skip("no Chromium is installed")
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=binary, args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": width, "height": 900}, offline=True)
        tab = context.new_page()
        tab.faults = []
        tab.on("pageerror", lambda error: tab.faults.append(str(error)))
        tab.on("requestfailed", lambda request: tab.faults.append(request.url))
        tab.goto((root / "reports/index.html").as_uri())
        yield tab
        assert tab.faults == []
        browser.close()


def names(tab):
    return tab.locator("#cards .name").all_text_contents()


def test_filter_sort_and_picture_answer_to_clicks(page):
    data = prepared.load(page)
    every = {item.id: item for items in data.splits.values() for item in items}
    with opened(page, 1400) as tab:
        assert len(names(tab)) == len(every) == 24
        tab.select_option("#sort", "name")
        assert names(tab) == sorted(every)
        tab.select_option("#class", label="<b>badger's")
        shown = set(names(tab))
        tagged = {id_ for id_, item in every.items() if item.image_label[0]}
        assert tagged <= shown < set(every)
        assert tab.locator("#count").text_content() == f"{len(shown)} of 24 images"
        tab.select_option("#split", "val")
        assert {name[:3] for name in names(tab)} == {"val"}
        tab.fill("#search", "no such name")
        assert "No image fits" in tab.locator("#cards").text_content()
        tab.fill("#search", "")
        tab.locator(".card").first.click()
        assert tab.locator("dialog img").count() >= 1 and tab.locator("dialog").is_visible()
        tab.click("#close")
        assert not tab.locator("dialog").is_visible()


@pytest.mark.parametrize("width", [1400, 400])
def test_nothing_is_wider_than_the_window_and_pictures_are_there(width, page):
    with opened(page, width) as tab:
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        tab.wait_for_function(
            "[...document.querySelectorAll('#cards img')].slice(0, 2)"
            ".every(image => image.complete && image.naturalWidth)"
        )
        sizes = [tab.locator("#cards .frame").nth(n).bounding_box() for n in range(4)]
        assert len({(round(s["width"]), round(s["height"])) for s in sizes}) == 1
        small = tab.evaluate(
            "[...document.querySelectorAll('main *')].filter(e => e.childNodes.length === 1 &&"
            " e.firstChild.nodeType === 3 && e.getClientRects().length &&"
            " parseFloat(getComputedStyle(e).fontSize) < 11).map(e => e.outerHTML)"
        )
        assert small == []


def test_templates_are_files_of_the_package():
    folder = Path(render.__file__).parent / "templates"
    assert {path.name for path in folder.iterdir()} == {"index.html.j2", "page.css", "page.js"}
