"""Each page loads one style sheet and one script, joined from the many of the theme.

Left out are the search tools where nothing is searched, and Font Awesome's script: its icons
come from fonts that hold only those in use.
"""

import logging
import re
from base64 import b64encode
from functools import cache
from hashlib import sha1
from io import BytesIO
from os.path import relpath
from pathlib import Path
from shutil import rmtree

from fontTools import subset
from sphinx.application import Sphinx

TAGS = {
    "css": re.compile(r'<link(?=[^>]*rel="stylesheet")[^>]*\shref="([^"?]+)[^>]*>'),
    "js": re.compile(r'<script[^>]*\ssrc="([^"?]+)[^>]*></script>'),
}
JOINED = {"css": '<link rel="stylesheet" href="{}">', "js": '<script src="{}"></script>'}
DONE = re.compile(r'href="[^"]*_static/book-[0-9a-f]{8}\.css"')
NEEDLESS = re.compile(
    r'<link rel="preload"[^>]*>'  # of scripts that are joined
    r"|<script>DOCUMENTATION_OPTIONS\.[^<]*</script>"  # of a version switcher
)
SEARCH = {"searchtools.js", "language_data.js", "searchindex.js"}
ICON_RULE = re.compile(r'((?:\.fa-[\w-]+:before,?)+)\{content:"[^"]*"\}')
ICON_FONT = re.compile(r"url\(\.\./([^)]+)\.woff2\) [^;}]*")


def join_assets(app: Sphinx, error: Exception | None) -> None:
    """Rewrite all finished pages and delete what they no longer load."""
    if error or app.builder.format != "html":
        return
    static = app.outdir / "_static"
    pages = [p for p in app.outdir.rglob("*.html") if static not in p.parents]
    icons = set(re.findall(r"\bfa-[\w-]+", "".join(p.read_text("utf-8") for p in pages)))

    @cache
    def join(kind: str, *pieces: Path) -> Path:
        """Write the pieces into one file, named by its content so that browsers may keep it."""
        text = {"css": "\n", "js": "\n;"}[kind].join(map(read, pieces))
        if kind == "css":
            text = slim_icons(text, icons, static)
        path = static / f"book-{sha1(text.encode()).hexdigest()[:8]}.{kind}"
        path.write_text(text, "utf-8")
        return path

    for page in pages:
        text = NEEDLESS.sub("", page.read_text("utf-8"))
        if DONE.search(text):
            continue  # a page that has not changed since the last build
        unused = {"fontawesome.js"} | (SEARCH if page.name != "search.html" else set())
        for kind, tag in TAGS.items():
            found = {m[0]: page.parent / m[1] for m in tag.finditer(text)}
            found = {tag: path for tag, path in found.items() if "/mathjax/" not in tag}
            pieces = dict.fromkeys(p.resolve() for p in found.values() if p.name not in unused)
            for tag in found:
                text = text.replace(tag, "")
            if pieces:
                link = JOINED[kind].format(relpath(join(kind, *pieces), page.parent))
                text = text.replace("</head>", f"{link}\n</head>", 1)
        page.write_text(text, "utf-8")
    for folder in ("locales", "scripts", "styles", "vendor"):
        rmtree(static / folder, ignore_errors=True)


def read(piece: Path) -> str:
    """Read a style sheet or script with all that it imports."""
    text = re.sub(r"(//|/\*)# sourceMappingURL=.*", "", piece.read_text("utf-8"))
    return re.sub(r'@import "([^"]*)";', lambda m: read(piece.parent / m[1]), text)


def slim_icons(css: str, used: set[str], static: Path) -> str:
    """Keep the icons in use, and put a font of just these into the style sheet."""

    def rule(match: re.Match) -> str:
        return match[0] if used & set(re.findall(r"fa-[\w-]+", match[1])) else ""

    def font(match: re.Match) -> str:
        options = subset.Options(flavor="woff")
        whole = subset.load_font(static / f"{match[1]}.ttf", options)
        part = subset.Subsetter(options)
        part.populate(unicodes=codes)
        part.subset(whole)
        file = BytesIO()
        subset.save_font(whole, file, options)
        return f'url(data:font/woff;base64,{b64encode(file.getvalue()).decode()}) format("woff")'

    if not (ICON_RULE.search(css) and ICON_FONT.search(css)):
        raise ValueError("the theme's style sheet holds its icons in another form than expected")
    css = ICON_RULE.sub(rule, css)
    codes = [int(code, 16) for code in re.findall(r'"\\([ef][0-9a-f]{3})"', css)]
    return ICON_FONT.sub(font, css)


def setup(app: Sphinx) -> None:
    """Rewrite pages when all else is finished: the theme writes a style sheet last."""
    logging.getLogger("fontTools").setLevel(logging.WARNING)
    app.connect("build-finished", join_assets, priority=900)
