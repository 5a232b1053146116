"""What all tests of training runs do without."""

import pytest

from tdm_r1.training import progress


@pytest.fixture(autouse=True)
def blank_curves(monkeypatch):
    """Leave curves.png empty: to draw it takes a short run as long as its iterations.

    test_pages.py, test_demo.py and the runs of two ranks draw.
    """
    monkeypatch.setattr(progress, "write_curves", lambda output: (output / "curves.png").touch())
