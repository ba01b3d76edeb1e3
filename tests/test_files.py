from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from resnext_det.errors import ResNeXtError
from resnext_det.files import file_digest, open_regular, written_beside


@pytest.mark.parametrize("kind", ["FIFO", "device", "folder", "link to a FIFO"])
def test_only_regular_files_are_opened(kind: str, tmp_path: Path) -> None:
    """A FIFO that nobody writes to would block for ever."""
    file = tmp_path / "file"
    if kind == "FIFO":
        os.mkfifo(file)
    elif kind == "device":
        file = Path("/dev/zero")
    elif kind == "folder":
        file.mkdir()
    else:
        os.mkfifo(tmp_path / "fifo")
        file.symlink_to("fifo")
    for read in (open_regular, file_digest):
        with pytest.raises(OSError) as raised:
            read(file)
        assert raised.value.filename == str(file)


def test_a_regular_file_is_opened_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    with open_regular(tmp_path / "link") as opened:
        assert opened.read() == b"content"
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "none")


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


def test_what_a_killed_run_left_is_removed_a_day_later(tmp_path: Path) -> None:
    """Of the same file alone, and not what another process may be writing just now."""
    target = tmp_path / "a.json"
    stale = tmp_path / ".a.json.0123abcd.partial"
    kept = [
        tmp_path / ".a.json.fresh000.partial",
        tmp_path / ".a.json.0123abce.partial",
        tmp_path / ".b.a.json.0123abcd.partial",
        tmp_path / ".a.json.b.0123abcd.partial",
        tmp_path / ".axjson.0123abcd.partial",
    ]
    for file in (stale, *kept):
        file.write_text("")
        if file != kept[1]:
            os.utime(file, (time.time() - 25 * 3600,) * 2)
    with written_beside(target) as beside:
        beside.write_text("new")
    assert sorted(tmp_path.iterdir()) == sorted([target, *kept])


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    target = tmp_path / "file" / "inside.txt"
    with pytest.raises(ResNeXtError, match=r"inside\.txt cannot be written"):
        written_beside(target).__enter__()
