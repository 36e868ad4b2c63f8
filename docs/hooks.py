"""Hooks of MkDocs: pages made from the code and from files outside docs/, and the links between them.

Pages link to repository files as they do on GitHub, with relative paths. Here such a link becomes one to the
file's page, or plain text where the file has no page. A link to a file that does not exist is a warning, which
`mkdocs build --strict` turns into an error.
"""

import logging
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

log = logging.getLogger("mkdocs.hooks")

ROOT = Path(__file__).parents[1]
# Repository file -> its page on the site, and the page's name in the navigation.
INCLUDED = {
    "cluster/README.md": ("cluster.md", "Clusters"),
    "CONTRIBUTING.md": ("contributing.md", "Contributing"),
    "CHANGELOG.md": ("changelog.md", "Changelog"),
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?\)")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made here, to the site and to its navigation."""
    assert config.nav is not None
    for source, (name, title) in INCLUDED.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text(encoding="utf-8")))
        config.nav.append({title: name})
    pages = {f"api/{name}.md": text for name, text in api_pages().items()}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    config.nav.append({"API reference": [*pages]})
    rewrite(
        (ROOT / "README.md").read_text(encoding="utf-8"), "README.md", "index.md", files
    )  # its links only
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """Rewrite the links of a page."""
    here = page.file.src_uri
    source = next((source for source, (name, _) in INCLUDED.items() if name == here), f"docs/{here}")
    return rewrite(markdown, source, here, files)


def rewrite(markdown: str, source: str, here: str, files: Files) -> str:
    """Rewrite links between repository files as links between pages.

    Args:
        markdown: text with links.
        source: path of its file in the repository.
        here: path of its page on the site.
        files: all files of the site.

    Returns:
        The text with links that hold on the site.
    """

    def replace(match: re.Match[str]) -> str:
        image, text, target, anchor = match.groups()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        page = INCLUDED[path][0] if path in INCLUDED else path.removeprefix("docs/")
        if (path in INCLUDED or path.startswith("docs/")) and files.get_file_from_path(page) is not None:
            return f"{image}[{text}]({posixpath.relpath(page, posixpath.dirname(here) or '.')}{anchor or ''})"
        if not (ROOT / path).exists():
            log.warning("%s: link to %s, which does not exist", source, target)
        return text

    parts, end = [], 0
    for fence in FENCE.finditer(markdown):  # code is left alone
        parts += [LINK.sub(replace, markdown[end : fence.start()]), fence.group()]
        end = fence.end()
    return "".join([*parts, LINK.sub(replace, markdown[end:])])


def api_pages() -> dict[str, str]:
    """Write a page for every package, with an entry for every module in it.

    Returns:
        The text of every page by name, in the order of the navigation.
    """
    modules = [
        path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        for folder in ("pipeline", "jobs")
        for path in sorted((ROOT / folder).rglob("*.py"))
    ]
    groups: dict[str, list[str]] = {}
    for module in modules:
        package = module.removesuffix(".__init__")
        parent = package if module.endswith("__init__") else package.rpartition(".")[0]
        groups.setdefault(parent, []).append(package)
    pages = {}
    for package, members in groups.items():
        entries = [f"::: {name}" for name in members if name != package]
        own = f"::: {package}\n    options: {{members: false, show_root_heading: false}}\n"
        pages[package] = "\n\n".join([f"# {package}", own, *entries]) + "\n"
    return pages
