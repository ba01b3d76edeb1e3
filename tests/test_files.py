from __future__ import annotations

from pathlib import Path

import pytest

from resnext_det.errors import ResNeXtError
from resnext_det.files import written_beside


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "folder" / "file.txt"
    with written_beside(target) as beside:
        beside.write_text("old")
        assert not target.exists()
    with pytest.raises(KeyboardInterrupt), written_beside(target) as beside:
        beside.write_text("half of the new o")
        raise KeyboardInterrupt
    assert target.read_text() == "old"
    assert list(target.parent.iterdir()) == [target]


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    target = tmp_path / "file" / "inside.txt"
    with pytest.raises(ResNeXtError, match=r"inside\.txt cannot be written"):
        written_beside(target).__enter__()
