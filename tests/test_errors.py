from __future__ import annotations

import pytest

from resnext_det.errors import DatasetError, reported


def test_an_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop, reported():
        raise DatasetError("a file\n  is gone")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: a file is gone\n"


def test_the_code_is_the_tool_s_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop, reported(code=1):
        raise DatasetError("gone")
    assert stop.value.code == 1


def test_ctrl_c_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop, reported(code=1):
        raise KeyboardInterrupt
    assert stop.value.code == 130
    assert capsys.readouterr().err == "stopped by Ctrl-C\n"


def test_other_errors_are_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError), reported():
        raise ZeroDivisionError
