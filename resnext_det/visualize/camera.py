"""Cameras, through FFmpeg. Not tried with a camera: there was none where this was written."""

from __future__ import annotations

import sys

from resnext_det.errors import ConfigError, DatasetError
from resnext_det.visualize.video_reading import VideoReader, require_av


def open_camera(number: int) -> VideoReader:
    """Open a camera; use what is returned in a with statement.

    Args:
        number: of the camera, from 0, as the system counts them.

    Raises:
        ConfigError: there is no such camera, it is in use or may not be used, or there is no PyAV.
    """
    name = f"camera {number}"
    try:
        form, url, options = _where(number)
        return VideoReader(url, name, form, options)
    except DatasetError as error:
        raise ConfigError(
            f"--webcam {number}: {error.args[0].partition('. ')[0]}. Is it plugged in, free and "
            "allowed? Others are counted from 0: --webcam 1 is the second. A video file is named "
            "with --input."
        ) from error


def _where(number: int) -> tuple[str, str, dict[str, str]]:
    """Return FFmpeg's name of the system's cameras, and that of this one."""
    if sys.platform == "darwin":
        # Its default, 29.97 frames a second, is what many cameras do not have.
        return "avfoundation", f"{number}:none", {"framerate": "30"}
    if sys.platform == "win32":
        devices = [
            each
            for each in require_av().enumerate_input_devices("dshow")
            if "video" in each.media_types
        ]
        if not 0 <= number < len(devices):
            raise DatasetError(f"there are {len(devices)} cameras")
        return "dshow", f"video={devices[number].description}", {}
    return "video4linux2", f"/dev/video{number}", {}
