"""Makes the helpers of this folder importable: the tests run with --import-mode=importlib."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from rclpy_side import Ros
from shells import ONLY_HERE, Graph, graph


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graph]:
    """A graph of the rclpy shell that the test's own process sees, too."""
    for name, value in ONLY_HERE.items():
        monkeypatch.setenv(name, value)
    with graph("rclpy") as made:
        yield made


@pytest.fixture
def ros(found: Graph) -> Iterator[Ros]:
    """A ROS node of the test, in the domain of its graph."""
    made = Ros(found.domain)
    yield made
    made.close()
