"""What authors are promised: documented in one place, and the page's own decoder works."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from vlmfix import extend
from vlmfix.decoders import parse
from vlmfix.testing import DecoderContract

PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()
INTERFACE = PAGE[PAGE.index("\n## The interface") :]
CODE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_every_name_is_there_and_documented():
    assert sorted(extend.__all__) == [*extend.__all__]
    listed = set(re.findall(r"`(\w+)`", INTERFACE))
    assert listed == set(extend.__all__)
    for name in extend.__all__:
        assert getattr(extend, name).__doc__
    public = {name for name in vars(extend) if not name.startswith("_")}
    assert public == {*extend.__all__, "annotations"}


@pytest.fixture(scope="session")
def page(tmp_path_factory):
    """The page's two files."""
    folder = tmp_path_factory.mktemp("page")
    for name, text in zip(("mine.py", "test_mine.py"), CODE, strict=True):
        (folder / name).write_text(text)
    return folder


def test_the_pages_test_names_what_it_tests(page, monkeypatch):
    monkeypatch.syspath_prepend(str(page))
    made = importlib.import_module("test_mine").TestAmplify
    assert issubclass(made, DecoderContract)
    assert made.decoder == f"{page}/mine.py:Amplify:alpha=2"


class TestThePagesDecoder(DecoderContract):
    @pytest.fixture(autouse=True)
    def _page(self, page):
        type(self).decoder = f"{page}/mine.py:Amplify:alpha=2,layers=all"
        type(self).neutral = f"{page}/mine.py:Amplify:alpha=0"

    @pytest.fixture
    def method(self, _page):
        return parse(self.decoder)
