"""Tells mkdocs what is generated: pages of methods, notebooks, the files of the repository, and ``llms.txt``."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from tools.site.method import KINDS, completed, kind
from tools.site.notebooks import page_of
from vlmfix.decoders.index import HOMES

ROOT = Path(__file__).parents[2]
ROOT_PAGES = {"CHANGELOG.md": "changes.md", "CONTRIBUTING.md": "contributing.md"}
"""Files of the repository that are pages too."""

NOTEBOOK = re.compile(r"\]\(((?:\.\./)*notebooks/\w+)\.ipynb\)")
"""A link to a notebook, which has a page in the site."""
_told: dict[str, str] = {}
"""The Markdown of each page as it was built, by the page's address."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Lists the methods in the navigation, by what they change."""
    groups: dict[str, list[dict[str, str]]] = {one: [] for one in dict.fromkeys(KINDS.values())}
    for name in HOMES:
        groups[kind(name)].append({name: f"methods/{name}.md"})
    for entry in config.nav or []:
        if "Methods" in entry:
            entry["Methods"] = [{title: pages} for title, pages in groups.items()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds pages whose text is not in ``docs/``, or not as Markdown."""
    for source, page in ROOT_PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    files.append(File.generated(config, "api/decoders.md", content=_decoders()))
    for file in [one for one in files if one.src_uri.endswith(".ipynb")]:
        content = page_of((ROOT / "docs" / file.src_uri).read_bytes(), file.name + ".ipynb")
        files.append(File.generated(config, file.src_uri.replace(".ipynb", ".md"), content=content))
    return files


def _decoders() -> str:
    """Writes the page of all decoders' classes, without what they share."""
    intro = (
        "The classes behind the names of the command line, with their parameters. What they share is "
        "[`Decoder`](extend.md#vlmfix.extend.Decoder); each has [a page of its own](../methods.md)."
    )
    classes = [
        f"::: {home.replace(':', '.')}\n    options:\n      members: false\n      show_symbol_type_toc: false"
        for home in HOMES.values()
    ]
    return "\n\n".join(["# vlmfix.decoders", intro, *classes]) + "\n"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Completes the pages of methods, and keeps what each page says."""
    folder, _, name = page.file.src_uri.rpartition("/")
    if folder == "methods":
        markdown = completed(name.removesuffix(".md"), markdown)
    markdown = NOTEBOOK.sub(r"](\1.md)", markdown)
    _told[page.file.dest_uri] = markdown
    return markdown


def on_post_build(config: MkDocsConfig) -> None:
    """Writes ``llms.txt``, a list of all pages with their first sentence, and each page's Markdown beside it."""
    site = Path(config.site_dir)
    lines = [f"# {config.site_name}", "", f"> {config.site_description}", ""]
    for address, markdown in _told.items():
        plain = re.sub(r"<figure.*?</figure>\n*", "", markdown, flags=re.DOTALL)
        beside = site / address.replace(".html", ".md")
        beside.write_text(plain, encoding="utf-8")
        title = next((line[2:] for line in plain.splitlines() if line.startswith("# ")), address)
        lines.append(f"- [{title}]({beside.relative_to(site).as_posix()}): {_sentence(plain)}")
    (site / "llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _sentence(markdown: str) -> str:
    """Returns the first sentence of a page's first paragraph."""
    blocks = re.sub(r"```.*?```", "", markdown, flags=re.DOTALL).split("\n\n")
    prose = next((block for block in blocks if re.match(r"[A-Z`\[*]", block.strip())), "")
    words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", " ".join(prose.split()))
    return re.split(r"(?<=[.!?]) (?=[A-Z`])", words)[0]
