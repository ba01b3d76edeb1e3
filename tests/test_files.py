from __future__ import annotations

import os
from pathlib import Path

import pytest

from resnext_det.errors import ResNeXtError
from resnext_det.files import file_digest, open_regular, remove_leftovers, written_beside


@pytest.mark.parametrize("kind", ["FIFO", "device", "folder", "link to a FIFO"])
def test_opens_only_regular_files(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    if kind == "FIFO":
        os.mkfifo(file)  # would block forever
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


def test_follows_links(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    with open_regular(tmp_path / "link") as opened:
        assert opened.read() == b"content"


def test_writes_whole_files_or_none(tmp_path: Path) -> None:
    target = tmp_path / "folder" / "file.txt"
    with written_beside(target, durable=True) as beside:
        beside.write_text("old")
        assert not target.exists()
    with pytest.raises(KeyboardInterrupt), written_beside(target) as beside:
        beside.write_text("half of the new o")
        raise KeyboardInterrupt
    assert target.read_text() == "old"
    assert list(target.parent.iterdir()) == [target]
    with pytest.raises(ResNeXtError, match=r"inside\.txt cannot be written"):
        written_beside(target / "inside.txt").__enter__()


def test_removes_leftovers_of_killed_processes(tmp_path: Path) -> None:
    for name in (".a.pth.0123abcd.partial", "a.pth", ".b.json.0123abcd.partial"):
        (tmp_path / name).write_text("")
    remove_leftovers(tmp_path, "*.pth")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".b.json.0123abcd.partial", "a.pth"]
