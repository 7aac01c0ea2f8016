"""Checks a built site: every link within it leads somewhere, and no page asks another machine for anything.

python -m tools.site.links build/site
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

FROM_THE_TOP = {"404.html"}
"""Pages that are shown at any address, so that their links begin at the site's top."""
FETCHED = {
    "img": "src",
    "script": "src",
    "link": "href",
    "source": "src",
    "iframe": "src",
    "video": "src",
    "object": "data",
}
"""What a browser fetches by itself -> the attribute that says from where."""


@dataclass
class Seen(HTMLParser):
    """Collects what a page has for others to link to, and what it links to itself.

    Attributes:
        places: Names of its anchors.
        links: Addresses that a reader may follow.
        fetched: Addresses that the browser asks by itself.
    """

    places: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Takes in one element."""
        values = {name: value for name, value in attrs if value is not None}
        self.places |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if FETCHED.get(tag) in values:
            self.fetched.append(values[FETCHED[tag]])
        self.fetched += re.findall(r"url\(['\"]?([^'\")]+)", values.get("style", ""))


def problems(site: Path) -> Iterator[str]:
    """Names each link that leads nowhere, and each request to elsewhere.

    Args:
        site: Folder of the built site.
    """
    pages: dict[Path, Seen] = {}
    for file in sorted(site.rglob("*.html")):
        pages[file.resolve()] = seen = Seen()
        seen.feed(file.read_text(encoding="utf-8"))
    for file, seen in pages.items():
        called = file.relative_to(site.resolve()).as_posix()
        for address in seen.fetched:
            if address.startswith(("http:", "https:", "//")):
                yield f"{called} fetches {address}"
        if called in FROM_THE_TOP:
            continue
        for address in dict.fromkeys([*seen.links, *seen.fetched]):
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            target = target / "index.html" if target.is_dir() else target
            if not target.exists():
                yield f"{called} links to {address}, which is not there"
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].places:
                yield f"{called} links to {address}, and that page has no such place"
    for file in sorted(site.rglob("*.css")):
        for address in re.findall(
            r"(?:url\(|@import )['\"]?((?:https?:)?//[^'\")]+)", file.read_text(encoding="utf-8")
        ):
            yield f"{file.relative_to(site).as_posix()} fetches {address}"


def main(site: Path) -> int:
    """Prints every problem; the exit code says whether there is one."""
    found = list(problems(site))
    print("\n".join(found) or f"{len(list(site.rglob('*.html')))} pages; every link within leads somewhere.")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
