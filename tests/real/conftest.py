"""The published checkpoints as fixtures."""

from __future__ import annotations

import pytest

from tests.real.folders import real_vlm
from tests.real.published import PUBLISHED


@pytest.fixture(params=PUBLISHED)
def name(request):
    """A key of ``PUBLISHED``."""
    return request.param


@pytest.fixture
def vlm(name):
    """The model of that checkpoint."""
    return real_vlm(name)
