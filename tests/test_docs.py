"""The documentation's site: it is whole, its links lead somewhere, nothing comes from elsewhere."""

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import typer
from ruamel.yaml import YAML

import isim
from isim import cli
from isim.data import prepared
from isim.experiments import overlay, preset
from isim.passes import export

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
COMMANDS = tuple(typer.main.get_command(cli.app).commands)
SECTIONS = tuple(overlay.plain((overlay.FOLDER / "base.yaml").read_text()))
BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
# Tags, and the attributes by which a browser fetches what they show or run.
FETCHED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}


def build(config, site):
    """Run `mkdocs build` on a config: exit code, all that it prints."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", config]
    done = subprocess.run(
        [*command, "--site-dir", site], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs") / "site"
    code, printed = build(ROOT / "mkdocs.yml", folder)
    assert code == 0, printed
    return folder


class Page(HTMLParser):
    """Attributes of a page: ids, targets of links, what is fetched."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.fetched = set(), [], []
        self.text, self.inside = [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.inside += [tag] if tag in ("pre", "code") else []
        self.ids.add(values.get("id") or values.get("name"))
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        if values.get(FETCHED.get(tag)):
            self.fetched.append(values[FETCHED[tag]])

    def handle_endtag(self, tag):
        if tag in self.inside:
            self.inside.remove(tag)

    def handle_data(self, data):
        if "pre" not in self.inside:
            self.text.append(data)


@pytest.fixture(scope="module")
def pages(site):
    # The page of errors is for servers: its addresses begin at their root.
    return {path: Page(path) for path in site.glob("*.html") if path.name != "404.html"}


def test_every_page_is_in_the_navigation(pages):
    made = {path.stem for path in pages} - {"commands", "parameters", "presets"}
    assert made == {path.stem for path in DOCS.glob("*.md")}
    reached = {Path(link).name for link in pages[next(iter(pages))].links}
    assert {path.name for path in pages} <= {urlsplit(name).path for name in reached}


def test_links_lead_to_a_page_and_to_a_heading_there(pages):
    lost = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target in pages and parts.fragment:
                found = unquote(parts.fragment) in pages[target].ids
            else:
                found = target.exists()
            if not found:
                lost.append(f"{path.name}: {link}")
    assert lost == []


def test_pages_are_named_by_links(pages):
    """In all but the page that tells which files to edit."""
    named = {
        path.stem: found
        for path, page in pages.items()
        if (found := re.findall(r"docs/[\w-]+\.md", " ".join(page.text)))
    }
    assert {*named} == {"architecture"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[no page](nowhere.md)", "nowhere.md"),
        ("[no heading](#nowhere)", "#nowhere"),
        ("[absolute](/docs/index.md)", "absolute link"),
        (None, 'not included in the "nav"'),
    ],
)
def test_a_broken_link_or_a_forgotten_page_fails_the_build(text, words, tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text(f"# Page\n\n{text or ''}\n")
    if text is None:
        (docs / "other.md").write_text("# Other\n")
    own = {"INHERIT": str(ROOT / "mkdocs.yml"), "docs_dir": str(docs), "hooks": [], "plugins": []}
    own |= {"theme": {"name": "mkdocs"}, "nav": [{"Page": "index.md"}]}
    with (tmp_path / "mkdocs.yml").open("w") as file:
        YAML().dump(own, file)
    code, printed = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert code != 0 and words in printed, printed


def test_nothing_is_fetched_from_another_host(site, pages):
    for path, page in pages.items():
        assert page.fetched, path
        for address in page.fetched:
            parts = urlsplit(address)
            local = parts.scheme == "data" or (not parts.scheme and not parts.netloc)
            assert local, f"{path.name} fetches {address}"
            assert parts.scheme == "data" or (path.parent / parts.path).exists(), address
    for style in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(?:https?:)?//|@import", style.read_text()), style


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_the_search_works_from_the_disk(site):
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=8000")
    address = f"{(site / 'index.html').as_uri()}?q=threshold"
    command = [BROWSER, *options, "--dump-dom", address]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "md-search-result__item" in done.stdout


@pytest.mark.parametrize(
    ("page", "headings"),
    [
        ("commands", [f"isim-{name}" for name in COMMANDS]),
        ("parameters", SECTIONS),
        ("presets", preset.titles()),
        ("reference", [f"isim.api.{name}" for name in isim.__all__]),
    ],
)
def test_all_that_there_is_has_a_heading(page, headings, site, pages):
    assert headings
    assert {*headings} - pages[site / f"{page}.html"].ids == set()


def test_every_parameter_is_listed(site):
    text = re.sub(r"<[^>]*>", "", (site / "parameters.html").read_text())
    base = (overlay.FOLDER / "base.yaml").read_text()
    for line in base[base.index("prepare:") :].splitlines():
        assert re.sub(r"[<>&\"']", "", line) in re.sub(r"&\w+;|&#\d+;|[\"']", "", text), line


def test_every_environment_variable_is_documented():
    code = "".join(path.read_text() for path in (ROOT / "isim").rglob("*.py"))
    page = (DOCS / "environment.md").read_text()
    assert {*re.findall(r"ISIM_[A-Z]+", code)} == {*re.findall(r"^\| `(ISIM_[A-Z]+)`", page, re.M)}


def test_the_readme_links_to_what_is_there():
    text = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert [link for link in links if not (ROOT / link).exists()] == []
    assert {*DOCS.glob("*.md")} - {ROOT / link for link in links} == {
        DOCS / name for name in ("index.md", "reference.md")
    }


def test_the_examples_of_training_elsewhere_run(copies, tmp_path, monkeypatch):
    root = copies()
    for item in prepared.load(root).split("train"):
        target = root / f"data/masks/{item.id}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(item.mask, target)
    monkeypatch.chdir(root)
    (root / "photos").symlink_to(next((root / "data/prepared").rglob("JPEGImages")))
    text = (DOCS / "training-elsewhere.md").read_text()
    commands = re.findall(r"isim export (\w+) ([\w.]+)", text)
    assert {form for form, _ in commands} == {"yolo", "coco", "voc"}
    for form, dest in commands:
        export.run(form, Path(dest), export.Options(source="data/masks"), root)
    names: dict = {}
    for example in re.findall(r"```python\n(.*?)```", text, re.S):
        # Mask R-CNN enlarges images to 800 pixels otherwise: a minute.
        exec(example.replace("num_classes=classes", "num_classes=classes, min_size=64"), names)
    assert names["losses"]["loss_mask"] > 0 and names["loss"] > 0
    shown = sum(bool(item.class_ids.size) for item in prepared.load(root).split("train"))
    assert len(names["shown"]) == shown
