"""Hooks of MkDocs: the site is docs/ and a few files of the repository that stand outside of it.

README.md is the front page. A link out of docs/ that reads well on GitHub (``../CONTRIBUTING.md``, ``../bench/x.png``)
is turned to a page of the site or to a copy in it. With ``--strict`` a link to nothing fails, and so does a page that
would fetch anything.
"""

import posixpath
import re
import tempfile
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority, get_plugin_logger
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
FRONT = "README.md"
PAGES = {FRONT: "index.md", "CHANGELOG.md": "CHANGELOG.md", "CONTRIBUTING.md": "CONTRIBUTING.md"}
"""Files of the root that are pages, and what they are called in the site."""
COPIES = "files"
"""Where copies of other files stand in the site."""
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")
FETCHED = "https://unpkg.com/iframe-worker/shim"
FETCHES = re.compile(r"<(?:script|img|link rel=.stylesheet.)[^>]*(?:src|href)=.(https?://[^\"' >]+)")
CODE = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.DOTALL | re.MULTILINE)

PACKAGE = tempfile.TemporaryDirectory(prefix="scalelong-docs-")  # gone when the program ends
log = get_plugin_logger("scalelong")


@event_priority(100)
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Shows mkdocstrings the package as it reads packages: with an __init__.py in every folder, which ours have not."""
    package = Path(PACKAGE.name) / "scalelong"
    for source in (ROOT / "src" / "scalelong").iterdir():
        for path in [source, *source.rglob("*.py")] if source.is_dir() else [source]:
            target = package / path.relative_to(ROOT / "src" / "scalelong")
            folder = target if path.is_dir() else target.parent
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "__init__.py").touch()
            if path.is_file():
                target.write_bytes(path.read_bytes())
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [PACKAGE.name]
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds the pages and the files that stand outside of docs/."""
    documents = {ROOT / name: name for name in PAGES}
    documents |= {Path(file.abs_src_path or ""): f"docs/{file.src_uri}" for file in files.documentation_pages()}
    copies = set()
    for path, name in documents.items():
        copies |= {target for link in links_in(path) if is_copied(target := target_of(name, link))}
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    for name in sorted(copies):
        files.append(File.generated(config, f"{COPIES}/{name}", abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns the links of a page from where they lead in the repository to where that is in the site."""
    here = page.file.src_uri
    name = next((name for name, uri in PAGES.items() if uri == here), f"docs/{here}")

    def turned(link: re.Match[str]) -> str:
        target = target_of(name, link[2])
        if target is None:
            return link[0]
        if not (ROOT / target).exists():
            log.warning("%s links to %s, which is not there", name, target)
        return f"{link[1]}{posixpath.relpath(place_of(target), posixpath.dirname(here) or '.')}{link[3]}"

    parts = CODE.split(markdown)
    return "".join(part if number % 2 else LINK.sub(turned, part) for number, part in enumerate(parts))


def links_in(path: Path) -> list[str]:
    text = CODE.sub("", path.read_text(encoding="utf-8"))
    return [link[2] for link in LINK.finditer(text)]


def target_of(name: str, link: str) -> str | None:
    """The file of the repository that a link in one of its files leads to; None if it leads out of it."""
    if re.match(r"[a-z]+:", link):
        return None
    return posixpath.normpath(posixpath.join(posixpath.dirname(name), link))


def is_copied(target: str | None) -> bool:
    return target is not None and target not in PAGES and not target.startswith("docs/") and (ROOT / target).is_file()


def place_of(target: str) -> str:
    """Where a file of the repository is in the site."""
    if target in PAGES:
        return PAGES[target]
    return target.removeprefix("docs/") if target.startswith("docs/") else f"{COPIES}/{target}"


def on_post_page(output: str, *, page: Page, config: MkDocsConfig) -> str:
    """Puts our own script in the place of the one that the theme would fetch for search in pages from a file."""
    own = posixpath.relpath("theme/worker.js", posixpath.dirname(page.file.dest_uri) or ".")
    output = output.replace(FETCHED, own)
    for fetched in FETCHES.findall(output):
        log.warning("%s fetches %s", page.file.dest_uri, fetched)
    return output


def on_post_template(output: str, *, template_name: str, config: MkDocsConfig) -> str:
    """The same for the page that says that there is no such page."""
    return output.replace(FETCHED, "theme/worker.js") if template_name == "404.html" else output
