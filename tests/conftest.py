"""What every test begins with."""

from __future__ import annotations

import pytest

from tests import support


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Give every test the same random numbers."""
    support.RNG.bit_generator.state = support.BEGIN
