"""The built book in a real browser: what a reader's machine loads, sees and can reach."""

import base64
import gzip
import inspect
import json
import os
import resource
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urljoin, urlsplit

import pytest
import yaml
from axe_playwright_python.sync_playwright import Axe
from famous_bugs.bug import PARTS, bugs_of
from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).parents[2]
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text())
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text())
FILES = [TOC["root"], *(c["file"] for part in TOC["parts"] for c in part["chapters"])]
CHAPTERS = sorted(f"notebooks/{path.stem}" for path in (ROOT / "notebooks").glob("*.ipynb"))
PAGES = [f"{file}.html" for file in FILES] + ["search.html"]
JUPYTER_BOOK = Path(sys.executable).with_name("jupyter-book")
EXTENSIONS = {"local_extensions": {"_ext": str(ROOT / "book")}}
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
WCAG = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"], "resultTypes": ["violations"]}
NARROW = 390

UNSET_MATHS = r"""() => {
    const bad = [...document.querySelectorAll("mjx-merror, .math:not(:has(mjx-container))")]
        .map(e => e.textContent);
    const text = document.querySelector("#main-content").cloneNode(true);
    text.querySelectorAll("pre, code, script, .math").forEach(e => e.remove());
    return bad.concat(text.textContent.match(/\\[([]|\\begin|\$[^$\n]+\$/g) || []);
}"""
NO_ALT = "() => [...document.querySelectorAll('article img')].filter(i => !i.alt).map(i => i.src)"
NO_ICON = """() => [...document.querySelectorAll("[class*='fa-']")]
    .filter(i => getComputedStyle(i, "::before").content === "none").map(i => i.className)"""
CUT = """() => [...document.querySelectorAll("div.math, div.math mjx-container")]
    .filter(e => e.scrollWidth > e.clientWidth).map(e => e.textContent)"""
LOADED = "[document.URL, ...performance.getEntriesByType('resource').map(r => r.name)]"
MATHS_SET = "async () => { await window.MathJax?.startup?.promise }"


# What is tested: a clean build, served on localhost


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """Build the book as a newcomer does, but into another folder; give it and the seconds used.

    Seconds of processor time, which do not depend on what else runs.
    """
    folder = tmp_path_factory.mktemp("book")
    environ = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run("make", "book", f"BUILD={folder}", cwd=ROOT, env=environ)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return folder / "_build/html", seconds


@pytest.fixture(scope="session")
def site(build: tuple[Path, float]) -> Path:
    return build[0]


@pytest.fixture(scope="session")
def plain_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the first chapter as Jupyter Book does if nothing is configured."""
    folder = tmp_path_factory.mktemp("plain")
    shutil.copy(ROOT / f"{CHAPTERS[0]}.ipynb", folder / "chapter.ipynb")
    (folder / "_config.yml").write_text("execute: {execute_notebooks: 'off'}")
    (folder / "_toc.yml").write_text("{format: jb-book, root: chapter}")
    run(JUPYTER_BOOK, "build", folder)
    return folder / "_build/html"


def run(*command: str | Path, **options) -> None:
    """Run a command and show what it said if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Give the address at which a folder is served."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()


@pytest.fixture(scope="session")
def origin(site: Path) -> Iterator[str]:
    with serve(site) as address:
        yield address


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        reason = "NO CHROMIUM: none of the site's tests has run"
        pytest.fail(reason) if "CI" in os.environ else pytest.skip(reason)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS.split())
        yield browser
        browser.close()


# What is checked on each page: functions that list problems


@contextmanager
def visit(browser: Browser, address: str, theme: str = "light") -> Iterator[tuple[Page, list]]:
    """Open a page; give it with what went wrong, a list that grows while it is open."""
    origin, found = urljoin(address, "/"), []
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.add_init_script(f"localStorage.mode = localStorage.theme = '{theme}'")
    context.route(lambda url: not url.startswith(origin), lambda route: route.abort())
    page = context.new_page()
    page.on("pageerror", lambda error: found.append(f"script error: {error}"))
    page.on("console", lambda m: m.type == "error" and found.append(f"console: {m.text}"))
    page.on("request", lambda r: r.url.startswith(origin) or found.append(f"off site: {r.url}"))
    try:
        page.goto(address)
        page.evaluate(MATHS_SET)
        yield page, found
    finally:
        context.close()


def problems(page: Page) -> Iterator[str]:
    """Look at a page with the eyes of several readers."""
    yield from (f"maths not set: {source}" for source in page.evaluate(UNSET_MATHS))
    yield from (f"no alt text: {source}" for source in page.evaluate(NO_ALT))
    yield from (f"no icon: {name}" for name in page.evaluate(NO_ICON))
    for violation in Axe().run(page, options=WCAG).response["violations"]:
        yield f"{violation['id']}: {[node['html'] for node in violation['nodes']][:3]}"
    page.set_viewport_size({"width": NARROW, "height": 800})
    width = page.evaluate("document.documentElement.scrollWidth")
    if width > NARROW:
        yield f"too wide: {width} > {NARROW} px"
    yield from (f"formula cut off: {source}" for source in page.evaluate(CUT))


class Links(HTMLParser):
    """The anchors of a page, and the addresses that it names."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors, self.addresses = set(), set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.anchors.add(attributes.get("id"))
        self.addresses |= {attributes.get("href"), attributes.get("src")} - {None, "#", "#!"}


links_of = cache(Links)


def broken_links(path: Path, site: Path) -> Iterator[str]:
    """Follow the links of a page that stay within the site."""
    for address in links_of(path).addresses:
        parts = urlsplit(address)
        if parts.scheme or parts.netloc:
            continue
        target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
        if not target.is_relative_to(site) or not target.is_file():
            yield f"broken link: {address}"
        elif parts.fragment and unquote(parts.fragment) not in links_of(target).anchors:
            yield f"broken anchor: {address}"


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_page(browser: Browser, origin: str, name: str, theme: str) -> None:
    with visit(browser, origin + name, theme) as (page, found):
        found += problems(page)
        assert page.evaluate("document.documentElement.dataset.theme") == theme
        assert found == []


def test_menus_of_a_narrow_page_are_accessible(browser: Browser, origin: str) -> None:
    """They are the same on all pages."""
    with visit(browser, f"{origin}{TOC['root']}.html") as (page, _):
        page.set_viewport_size({"width": NARROW, "height": 800})
        page.locator(".primary-toggle:visible").first.click()
        page.wait_for_timeout(500)
        assert Axe().run(page, options=WCAG).response["violations"] == []


@pytest.mark.parametrize("name", PAGES)
def test_links(site: Path, name: str) -> None:
    assert list(broken_links(site / name, site)) == []


MUTATIONS = {
    "off site": "<script src='https://example.org/x.js'></script>",
    "script error": "<script>throw Error()</script>",
    "console: ": "<script>console.error('x')</script>",
    "console: Failed to load": "<img alt='x' src='gone.png'>",
    "maths not set: Undefined": r"<span class='math'>\(\nosuchmacro\)</span>",
    "maths not set: $": "<p>$x$</p>",
    "maths not set: x": "<p class='math tex2jax_ignore'>x</p>",
    "no alt text": "<img alt='' src='../_static/favicon.svg'>",
    "no icon": "<i class='fa-solid fa-unknown'></i>",
    "image-alt": "<div><img src='../_static/favicon.svg'></div>",
    "color-contrast": "<p style='background: #fff; color: #ccc'>pale</p>",
    "too wide": "<p style='width: 600px'>wide</p>",
    "formula cut off": r"<div class='math'>\(\rule{600px}{1em}\)</div>",
    "broken link": "<a href='gone.html'>gone</a>",
    "broken anchor": "<a href='#gone'>gone</a>",
    "broken anchor: index.html": "<a href='index.html#gone'>gone</a>",
}


@pytest.mark.parametrize("problem", MUTATIONS)
def test_a_broken_page_is_found(browser: Browser, site: Path, origin: str, problem: str) -> None:
    """Each check above can fail: break a good page, and it is the one that complains."""
    html = (site / "book/notation.html").read_text()
    mutant = site / "book" / f"mutant-{list(MUTATIONS).index(problem)}.html"
    mutant.write_text(html.replace("</article>", f"{MUTATIONS[problem]}</article>"))
    try:
        with visit(browser, f"{origin}book/{mutant.name}") as (page, found):
            found += [*problems(page), *broken_links(mutant, site)]
    finally:
        mutant.unlink()
    assert any(each.startswith(problem) for each in found), found


# What the book promises


def outputs(chapter: str) -> Iterator[tuple[dict, dict]]:
    """Give each stored output of a chapter with its cell."""
    for cell in json.loads((ROOT / f"{chapter}.ipynb").read_text())["cells"]:
        for output in cell.get("outputs", []):
            yield cell, output


def test_build_takes_less_than_30_seconds(build: tuple[Path, float]) -> None:
    assert build[1] < 30


def test_first_page_is_the_home_page(browser: Browser, site: Path, origin: str) -> None:
    assert f"url={TOC['root']}.html" in (site / "index.html").read_text()
    with visit(browser, f"{origin}{TOC['root']}.html") as (page, _):
        assert page.locator("h1:visible").inner_text().startswith(CONFIG["title"])


def test_home_figure_is_the_chapters(browser: Browser, site: Path, origin: str) -> None:
    with visit(browser, f"{origin}{TOC['root']}.html") as (page, _):
        shown = site / page.locator("article img").evaluate("i => new URL(i.src).pathname.slice(1)")
        alt = page.locator("article img").get_attribute("alt")
    drawn = [
        (base64.b64decode(output["data"]["image/png"]), cell["metadata"]["mystnb"]["image"]["alt"])
        for cell, output in outputs(CHAPTERS[0])
        if "image/png" in output.get("data", {})
    ]
    assert (shown.read_bytes(), alt) in drawn


def test_claims_are_those_that_the_chapters_print(browser: Browser, origin: str) -> None:
    printed = [
        line
        for chapter in CHAPTERS
        for _, output in outputs(chapter)
        if output["output_type"] == "stream"
        for line in "".join(output["text"]).splitlines()
        if line.startswith(("✓ ", "✗ not so: "))
    ]
    refuted = sum(line.startswith("✗") for line in printed)
    with visit(browser, f"{origin}book/claims.html") as (page, _):
        assert page.locator(".claim").all_text_contents() == printed
        count = page.locator(".claims-count").text_content()
    assert count == f"{len(printed) - refuted} claims hold. {refuted} common claims do not."


NUMBERS = {"A": 90, "B": 60, "C": 20, "D": 43}


def test_what_is_commonly_said_is_settled(browser: Browser, origin: str) -> None:
    """Each row has its place; that it leads to a section is what the build checks.

    A row with two halves that are settled in two places has two ids, such as d-22 and d-22b.
    """
    with visit(browser, f"{origin}book/commonly_said.html") as (page, _):
        ids = page.locator(".said").evaluate_all("items => items.map(i => i.id)")
        text = page.locator(".said strong").all_text_contents()
    assert len(ids) == len(set(ids))
    assert sorted({row.rstrip("b") for row in ids}) == [
        f"{s.lower()}-{i:02}" for s, n in NUMBERS.items() for i in range(1, n + 1)
    ]
    assert {"Holds.", "Depends.", "Not so.", "Cannot be checked."} == set(text)


def test_what_is_no_longer_settled_fails_the_build(tmp_path: Path) -> None:
    """A chapter, a section or what it shows may go only with the row that counts on it."""
    row = "{said: It is so, verdict: holds, section: a-section, text: is shown here}"
    lost = {
        "A-02: there is no section notebooks/01_a#gone": row.replace("a-section", "gone"),
        "A-03: notebooks/01_a#a-section does not show": row.replace("shown", "hidden"),
        "A-04: notebooks/01_a#a-section does not show": row.replace("text", "cell"),
        "A-05: notebooks/01_a#a-section does not show": row.replace("text", "source"),
    }
    rows = [f"{problem[:4]}: {row}" for problem, row in lost.items()]
    table = f"01_a: {{A-01: {row}, {', '.join(rows)}}}\n02_b: {{A-06: {row}}}"
    lost["A-06: there is no section 02_b#a-section"] = row
    files = {
        "_toc.yml": "{format: jb-book, root: book/said, chapters: [{file: notebooks/01_a}]}",
        "_config.yml": yaml.safe_dump({"sphinx": EXTENSIONS}),
        "book/said.md": "# Said\n\n```{commonly-said}\n```\n",
        "book/commonly_said.yml": table,
        "notebooks/01_a.md": "# A\n\n## A section\n\nIt is shown here.\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(AssertionError) as said:
        run(JUPYTER_BOOK, "build", tmp_path, "-W", "--keep-going")
    assert [problem for problem in lost if problem not in str(said.value)] == []
    assert "A-01: " not in str(said.value)


def test_famous_bugs_are_those_of_the_tests(browser: Browser, origin: str) -> None:
    bugs = [bug for part in PARTS for bug in bugs_of(part)]
    with visit(browser, f"{origin}book/famous_bugs.html") as (page, _):
        titles = page.locator("article h3").evaluate_all("all => all.map(h => h.firstChild.data)")
        codes = page.locator("article pre").all_text_contents()
    told = [inspect.getdoc(bug).splitlines()[0] for bug in bugs]
    straight = str.maketrans("’“”", '\'""')
    assert [title.translate(straight) for title in titles] == told
    for bug in bugs:
        for name in ("wrong", "right", "test"):
            assert textwrap.dedent(inspect.getsource(getattr(bug, name))) in codes


def test_status_shows_the_recorded_runs(browser: Browser, origin: str) -> None:
    runs = [json.loads(path.read_text()) for path in sorted((ROOT / "book/status").glob("*.json"))]
    with visit(browser, f"{origin}book/status.html") as (page, _):
        tests, notebooks, gpu = page.locator("article table").all()
        assert tests.locator("th").all_text_contents()[1:] == [
            f"Python {run['python']}, PyTorch {run['torch']}" for run in runs
        ]
        rows = [row.locator("td").all_text_contents() for row in notebooks.locator("tr").all()[1:]]
        times = {Path(name).stem: row[1:] for name, row in zip(CHAPTERS, rows, strict=False)}
        assert gpu.locator("td").first.inner_text()
    for name, shown in times.items():
        assert shown == [str(run["notebooks"].get(name, "not run")) for run in runs]


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_chapter_opens_elsewhere(browser: Browser, site: Path, origin: str, chapter: str) -> None:
    repository = CONFIG["repository"]["url"].removeprefix("https://github.com/")
    branch = CONFIG["repository"]["branch"]
    with visit(browser, f"{origin}{chapter}.html") as (page, _):
        links = page.locator("a").evaluate_all("links => links.map(a => a.href)")
        download = page.locator("a.btn-download-source-button").get_attribute("href")
    colab = "https://colab.research.google.com/github"
    binder = "https://mybinder.org/v2/gh"
    assert f"{colab}/{repository}/blob/{branch}/{chapter}.ipynb" in links
    assert f"{binder}/{repository}/{branch}?urlpath=lab/tree/{chapter}.ipynb" in links
    downloaded = (site / f"{chapter}.html").parent / download
    assert downloaded.read_bytes() == (ROOT / f"{chapter}.ipynb").read_bytes()


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_folded_cells_open_by_key(browser: Browser, origin: str, chapter: str) -> None:
    cells = json.loads((ROOT / f"{chapter}.ipynb").read_text())["cells"]
    folded = [c for c in cells if {"hide-cell", "hide-input"} & {*c["metadata"].get("tags", ())}]
    with visit(browser, f"{origin}{chapter}.html") as (page, _):
        folds = page.locator("details.hide").all()
        assert len(folds) == len(folded) > 0
        for fold in folds:
            assert not fold.locator("pre").first.is_visible()
            fold.locator("summary").press("Enter")
            assert fold.locator("pre").first.is_visible()


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_code_can_be_copied(browser: Browser, origin: str, chapter: str) -> None:
    with visit(browser, f"{origin}{chapter}.html") as (page, found):
        inputs = page.locator(".cell_input pre").count()
        assert page.locator(".cell_input button.copybtn").count() == inputs > 0
        page.locator(".cell_input button.copybtn").first.click()
        page.locator(".cell_input button.copybtn.success").wait_for()
        assert found == []


def test_search_by_key_finds_a_term(browser: Browser, origin: str) -> None:
    with visit(browser, f"{origin}{TOC['root']}.html") as (page, found):
        assert page.locator(".search-button__button:visible").count() == 1
        page.keyboard.press("Control+k")
        page.keyboard.type("saturation")
        page.keyboard.press("Enter")
        results = page.locator("#search-results li > a")
        results.first.wait_for()
        assert "Glossary" in results.all_text_contents()
        results.first.click()
        page.wait_for_load_state()
        assert "saturat" in page.locator("article").inner_text()
        assert found == []


def test_theme_is_switched_by_key_and_kept(browser: Browser, origin: str) -> None:
    with visit(browser, f"{origin}{TOC['root']}.html") as (page, found):
        theme = partial(page.evaluate, "document.documentElement.dataset.mode")
        seen = {theme()}
        for _ in range(2):
            page.locator(".theme-switch-button:visible").press("Enter")
            seen.add(theme())
        assert seen == {"light", "dark", "auto"}
        assert found == []


def weigh(browser: Browser, site: Path, name: str) -> tuple[int, int]:
    """Count the compressed bytes and the files that a page loads; figures and MathJax apart."""
    with serve(site) as address, visit(browser, address + name) as (page, _):
        loaded = {site / urlsplit(url).path[1:] for url in page.evaluate(LOADED)}
    apart = {"_images", "mathjax"}
    files = [path for path in loaded if path.is_file() and not apart & set(path.parts)]
    return sum(len(gzip.compress(path.read_bytes())) for path in files), len(files)


def test_page_is_light(browser: Browser, site: Path, plain_site: Path) -> None:
    """Against the same page as Jupyter Book builds it by default."""
    ours, files = weigh(browser, site, f"{CHAPTERS[0]}.html")
    theirs, _ = weigh(browser, plain_site, "chapter.html")
    assert theirs > 600_000
    assert ours / theirs < 0.2
    assert files <= 8


def test_image_without_alt_text_fails_the_build(tmp_path: Path) -> None:
    (tmp_path / "_toc.yml").write_text("{format: jb-book, root: page}")
    (tmp_path / "page.md").write_text("# Page\n\n![](dot.svg)\n")
    (tmp_path / "dot.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (tmp_path / "_config.yml").write_text(yaml.safe_dump({"sphinx": EXTENSIONS}))
    with pytest.raises(AssertionError, match="image without alt text"):
        run(JUPYTER_BOOK, "build", tmp_path, "-W", "--keep-going")
