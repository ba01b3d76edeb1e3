"""The service in the documentation."""

from __future__ import annotations

import io
import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.runtime.test_runtime import DESCRIPTION, write

PAGE = Path(__file__).resolve().parents[2] / "docs" / "deployment.md"


class Refused(Exception):
    """A substitute for fastapi.HTTPException."""


class App:
    """A substitute for fastapi.FastAPI, used if FastAPI is not installed."""

    def post(self, path: str) -> Any:
        return lambda function: function


def test_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run as it is printed, with a stand-in for FastAPI."""
    (code,) = re.findall(r"```python\n(\"\"\"uvicorn.*?)```", PAGE.read_text(), re.DOTALL)
    stand_in: Any = types.ModuleType("fastapi")
    stand_in.FastAPI, stand_in.HTTPException, stand_in.UploadFile = App, Refused, object
    monkeypatch.setitem(sys.modules, "fastapi", stand_in)
    monkeypatch.setenv("DETECTOR", str(write(tmp_path / "dog.onnx", DESCRIPTION.text())))
    service: dict[str, Any] = {}
    exec(compile(code, "service.py", "exec"), service)
    assert len(code.splitlines()) <= 36

    picture = io.BytesIO()
    Image.fromarray(np.full((20, 30, 3), 204, np.uint8)).save(picture, "PNG")
    picture.seek(0)
    answer = service["detect"](types.SimpleNamespace(file=picture))
    (found,) = answer["objects"]
    assert (answer["width"], answer["height"], found["name"]) == (30, 20, "dog")
    assert (found["score"], found["box"]) == (pytest.approx(0.8), [0, 0, 30, 20])
    with pytest.raises(Refused) as caught:
        service["detect"](types.SimpleNamespace(file=io.BytesIO(b"no image")))
    assert caught.value.args[0] == 400
