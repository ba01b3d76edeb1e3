from __future__ import annotations

from pathlib import Path

import pytest

from resnext_det.errors import ConfigError
from resnext_det.visualize.inputs import find_sources


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    """A folder of files whose content nobody looks at."""
    root = tmp_path / "in"
    for name in ("b.PNG", "a.jpg", "clip.MOV", "notes.txt", "._a.jpg", "deep/c.jpg", "[1].jpg"):
        (root / name).parent.mkdir(exist_ok=True, parents=True)
        (root / name).write_text("")
    return root


def names(words: list[str | Path], output: Path) -> list[str]:
    return [each.file.name for each in find_sources([str(word) for word in words], output)]


def test_a_folder_stands_for_its_pictures_and_videos(folder: Path, tmp_path: Path) -> None:
    found = find_sources([str(folder)], tmp_path / "out")
    assert [(each.file.name, each.is_video, each.drawn) for each in found] == [
        ("[1].jpg", False, "[1].jpg"),
        ("a.jpg", False, "a.jpg"),
        ("b.PNG", False, "b.jpg"),
        ("clip.MOV", True, "clip.mp4"),
    ]


def test_patterns_are_expanded_and_names_with_brackets_are_none(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert names([folder / "*.jpg"], out) == ["[1].jpg", "a.jpg"]
    assert names([folder / "**" / "*"], out) == ["[1].jpg", "a.jpg", "b.PNG", "clip.MOV", "c.jpg"]
    assert names([folder / "[1].jpg"], out) == ["[1].jpg"]
    monkeypatch.chdir(folder)
    assert names(["?.jpg"], out) == ["a.jpg"]
    monkeypatch.setenv("HOME", str(folder))
    assert names(["~/deep/*.jpg"], out) == ["c.jpg"]


def test_a_file_that_is_named_is_taken_whatever_it_is_called(folder: Path, tmp_path: Path) -> None:
    (found,) = find_sources([str(folder / "notes.txt")], tmp_path / "out")
    assert not found.is_video and found.drawn == "notes.jpg"


def test_a_file_that_is_named_twice_comes_once(folder: Path, tmp_path: Path) -> None:
    words = [folder / "a.jpg", folder / "deep" / ".." / "a.jpg", folder / "a.*"]
    assert names(words, tmp_path / "out") == ["a.jpg"]


def test_files_of_the_same_name_are_drawn_apart(tmp_path: Path) -> None:
    given = ["x/a.jpg", "y/a.jpg", "z/A.png", "z/a_2.jpg", "x/a.mp4", "y/a.avi"]
    for name in given:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    found = find_sources([str(tmp_path / name) for name in given], tmp_path / "out")
    drawn = [each.drawn for each in found]
    assert drawn == ["a.jpg", "a_2.jpg", "A_3.jpg", "a_2_2.jpg", "a.mp4", "a_2.mp4"]
    assert len({name.lower() for name in drawn}) == len(drawn)


def test_names_as_long_as_a_file_system_takes_leave_room(tmp_path: Path) -> None:
    (tmp_path / ("ü" * 120 + ".jpg")).write_text("")
    (found,) = find_sources([str(tmp_path / "*.jpg")], tmp_path / "out")
    assert len(f".{found.drawn}.partial".encode()) <= 255


def test_a_second_run_takes_what_the_first_one_took(folder: Path) -> None:
    words, output = [folder, folder / "**" / "*"], folder / "out"
    before = names(words, output)
    output.mkdir()
    (output / "a.jpg").write_text("drawn")
    assert names(words, output) == before
    assert names(words, folder / "elsewhere") == [*before, "a.jpg"]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("nothing.jpg", "there is no file or folder .*nothing.jpg"),
        ("*.gif", r"the pattern .*\*\.gif matches no picture or video"),
        ("*.txt", "matches no picture or video, but 1 other entries"),
        ("empty", "empty has no picture or video in it"),
        ("out", "is the output folder as well"),
        ("out/a.jpg", "lies in the output folder"),
        ("out/*.jpg", "matches no picture or video"),
    ],
)
def test_what_stands_for_nothing_is_an_error(folder: Path, word: str, said: str) -> None:
    (folder / "empty").mkdir()
    (folder / "out").mkdir()
    (folder / "out" / "a.jpg").write_text("")
    with pytest.raises(ConfigError, match=said):
        find_sources([str(folder / word)], folder / "out")


def test_an_override_that_was_taken_for_a_file_is_recognised(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="put KEY VALUE before --input, or after --opts"):
        find_sources(["MODEL.WEIGHTS", "model.pth"], tmp_path)
