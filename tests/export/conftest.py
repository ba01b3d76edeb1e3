"""One detector, exported in every format, and the images that show its objects."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.detectors import write_images, write_run


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_images(tmp_path_factory.mktemp("images") / "photographs")


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, "faster_rcnn_X_26_8x4d_FPN_toy")
    return folder
