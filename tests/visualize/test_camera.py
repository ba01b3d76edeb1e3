"""There is no camera where tests run: that it is missing is what can be tested."""

from __future__ import annotations

from pathlib import Path

import pytest

from resnext_det.errors import ConfigError
from resnext_det.visualize.camera import open_camera


def test_a_camera_that_is_not_there_is_named() -> None:
    if Path("/dev/video93").exists():
        pytest.skip("there is a 94th camera")
    with pytest.raises(ConfigError, match=r"--webcam 93: .*Is it plugged in, free and allowed"):
        open_camera(93)
