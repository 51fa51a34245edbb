"""Options and fixtures shared by all tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.hunyuan_video import HunyuanVideo
from pipelines.launch import LocalLauncher
from pipelines.open_sora_plan_family import OpenSoraPlan


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", default=False, help="also run tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--run-slow"):
        return
    skip = pytest.mark.skip(reason="slow: run with --run-slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random HunyuanVideo checkpoint of the real classes, 4 heads."""
    from tools.make_tiny_checkpoint import make_hunyuan_video

    return make_hunyuan_video(tmp_path_factory.mktemp("tiny") / "hunyuan-video", seed=0)


@pytest.fixture(scope="session")
def launcher() -> Iterator[LocalLauncher]:
    """One zygote for all pipelines of the session: its imports take seconds, a fork takes milliseconds."""
    shared = LocalLauncher((*HunyuanVideo.preload, *OpenSoraPlan.preload))
    yield shared
    shared.close()
