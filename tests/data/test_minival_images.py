"""Images in the official zip files: listed, and unpacked without trust."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import stat
import sys
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from resnext_det.data.coco.preparing import prepare_minival
from resnext_det.data.coco.unpacking import plan_unpacking, unpack
from resnext_det.errors import DatasetError

sys.path.append(str(Path(__file__).parent))  # tests are no package to import from
from generated_coco import SMALL, GeneratedCoco, generate


@pytest.fixture(scope="module")
def generated() -> GeneratedCoco:
    return generate()


@pytest.fixture
def coco(tmp_path: Path, generated: GeneratedCoco) -> Path:
    """All annotations, no image."""
    for split in ("train2014", "val2014", "train2017", "val2017"):
        file = tmp_path / "coco" / "annotations" / f"instances_{split}.json"
        generated.write(split, file)
    return tmp_path / "coco"


def images(generated: GeneratedCoco, split: str) -> dict[str, bytes]:
    names = [generated.image_name(split, number) for number in generated.ids(split)]
    return {f"{split}/{name}": name.encode() * (1 + at % 3) for at, name in enumerate(names)}


def pack(file: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{file.stem}/", b"")
        for name, content in members.items():
            archive.writestr(name, content)
    return file


def below(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder.parent)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def prepare(coco: Path, **more: Any) -> tuple[bool, str]:
    lines: list[str] = []
    ready = prepare_minival(coco, lines.append, counts=SMALL, **more)
    return ready, "\n".join(lines)


def test_images_in_a_zip_file_are_named_with_the_command_to_unpack_them(
    coco: Path, generated: GeneratedCoco
) -> None:
    pack(coco / "val2014.zip", images(generated, "val2014"))
    ready, said = prepare(coco)
    assert not ready
    assert f"prepare_minival.py --coco {coco} --unpack val2014" in said
    assert not (coco / "val2014").exists()
    ready, said = prepare(coco, unpacked=["val2014"], dry_run=True)
    assert ready
    assert "would unpack 40 images" in said
    assert not (coco / "val2014").exists()
    assert prepare(coco, unpacked=["val2014"])[0]
    assert below(coco / "val2014") == images(generated, "val2014")


@pytest.mark.parametrize(
    ("there", "unpacked"),
    [
        (("val2014", "train2014", "val2017", "train2017"), {"val2014", "train2014"}),
        (("val2017", "train2017"), {"val2017", "train2017"}),
        (("val2017",), {"val2017"}),
        (("val2014", "train2017"), {"val2014", "train2017"}),
    ],
)
def test_without_names_one_year_is_unpacked(
    there: tuple[str, ...], unpacked: set[str], coco: Path, generated: GeneratedCoco
) -> None:
    """Both years hold the same images: once is enough, and what is there already is."""
    for split in there:
        pack(coco / f"{split}.zip", images(generated, split))
    assert prepare(coco, unpacked=[])[0]
    folders = {path.name for path in coco.iterdir() if path.is_dir()}
    assert folders == {*unpacked, "annotations"}
    said = prepare(coco, unpacked=[])[1]
    assert "unpacking" not in said


def test_unpacking_goes_on_where_it_was_killed(coco: Path, generated: GeneratedCoco) -> None:
    """Images that are whole stay as they are; those cut short are unpacked again."""
    wanted = images(generated, "val2014")
    pack(coco / "val2014.zip", wanted)

    def killed() -> None:
        replace, done = Path.replace, []

        def killing(self: Path, target: Path) -> Path:
            done.append(target)
            if len(done) == 15:
                os.kill(os.getpid(), signal.SIGKILL)
            return replace(self, target)

        Path.replace = killing  # type: ignore[assignment, method-assign]
        prepare(coco, unpacked=["val2014"])

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    found = {name: content for name, content in below(coco / "val2014").items() if "/." not in name}
    assert len(found) == 14
    assert found.items() <= wanted.items()
    cut = coco / next(iter(found))
    cut.write_bytes(b"")
    dates = {name: (coco / name).stat().st_mtime_ns for name in found if coco / name != cut}
    ready, said = prepare(coco, unpacked=["val2014"])
    assert ready
    assert "unpacking 27 images" in said
    assert "13 are there already" in said
    assert below(coco / "val2014") == wanted
    assert {name: (coco / name).stat().st_mtime_ns for name in dates} == dates


STRANGER = "val2014/COCO_val2014_000000999999.jpg"


class Hostile(NamedTuple):
    name: str
    content: bytes
    said: str


@pytest.mark.parametrize(
    "hostile",
    [
        Hostile("../escaped.jpg", b"x", "1 names that lead out"),
        Hostile("val2014/../../escaped.jpg", b"x", "1 names that lead out"),
        Hostile("/tmp/escaped.jpg", b"x", "1 names that lead out"),
        Hostile("val2014\\..\\escaped.jpg", b"x", "1 names that lead out"),
        Hostile(
            "val2014/COCO_val2014_000000999999.jpg", b"x", "has 41 images, and val2014 only 40"
        ),
        Hostile("val2014/COCO_val2014_000000999999.jpg", bytes(9 << 20), "unpack to 9,437,184 by"),
    ],
    ids=["up", "inside up", "absolute", "backslash", "too many", "bomb"],
)
def test_hostile_names_and_sizes_are_refused(
    hostile: Hostile, coco: Path, generated: GeneratedCoco
) -> None:
    members = {**images(generated, "val2014"), hostile.name: hostile.content}
    pack(coco / "val2014.zip", members)
    before = below(coco.parent)
    with pytest.raises(DatasetError, match=hostile.said):
        prepare(coco, unpacked=["val2014"])
    assert below(coco.parent) == before


def test_an_image_twice_is_refused(coco: Path, generated: GeneratedCoco) -> None:
    members = images(generated, "val2014")
    file = pack(coco / "val2014.zip", members)
    with (
        zipfile.ZipFile(file, "a") as archive,
        pytest.warns(UserWarning, match="Duplicate name"),
    ):
        archive.writestr(next(iter(members)), b"other")
    with pytest.raises(DatasetError, match="images twice"):
        prepare(coco, unpacked=["val2014"])


def test_names_of_no_image_stay_packed(coco: Path, generated: GeneratedCoco) -> None:
    """What a desktop leaves in archives, another split's images, digits that are no ASCII ones."""
    wanted = images(generated, "val2014")
    strange = [
        "__MACOSX/val2014/._COCO_val2014_000000000001.jpg",
        "val2014/.DS_Store",
        "val2014/run.sh",
        "train2014/COCO_train2014_000000000001.jpg",
        "val2014/COCO_val2014_00000000000\u0661.jpg",
        "val2014/sub/COCO_val2014_000000000001.jpg",
    ]
    file = pack(coco / "val2014.zip", {**wanted, **dict.fromkeys(strange, b"x")})
    link = zipfile.ZipInfo("val2014/link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(link, "/etc")
    ready, said = prepare(coco, unpacked=["val2014"])
    assert ready
    assert "7 other names stay packed" in said
    assert below(coco / "val2014") == wanted
    assert not (coco / "__MACOSX").exists()


def test_a_bomb_that_lies_about_its_size_ends_in_an_error(
    coco: Path, generated: GeneratedCoco
) -> None:
    content = images(generated, "val2014")
    name = sorted(content)[0]
    file = pack(coco / "val2014.zip", {**content, name: bytes(3_000_001)})
    size = (3_000_001).to_bytes(4, "little")
    packed = file.read_bytes()
    assert packed.count(size) == 2
    file.write_bytes(packed.replace(size, (5).to_bytes(4, "little")))
    with pytest.raises(DatasetError, match="is damaged"):
        prepare(coco, unpacked=["val2014"])
    assert f"{name}" not in below(coco / "val2014")
    assert not list((coco / "val2014").glob(".*"))


def test_a_damaged_image_ends_in_an_error_and_is_not_there(
    coco: Path, generated: GeneratedCoco
) -> None:
    members = {name: os.urandom(2000) for name in images(generated, "val2017")}
    file = pack(coco / "val2017.zip", members)
    packed = bytearray(file.read_bytes())
    packed[len(packed) // 2] ^= 255
    file.write_bytes(packed)
    with pytest.raises(DatasetError, match=r"val2017\.zip is damaged"):
        prepare(coco, unpacked=["val2017"])
    found = below(coco / "val2017")
    assert 0 < len(found) < len(members)
    assert found.items() <= members.items()


def test_the_disk_is_asked_first(
    coco: Path, generated: GeneratedCoco, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = pack(coco / "val2017.zip", images(generated, "val2017"))
    usage = shutil.disk_usage(coco)._replace(free=65 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    unpack(plan_unpacking(file, coco / "val2017", SMALL))
    shutil.rmtree(coco / "val2017")
    usage = usage._replace(free=1 << 20)
    with pytest.raises(DatasetError, match=r"no room for 12 images .* 0\.0 GiB are free"):
        plan_unpacking(file, coco / "val2017", SMALL)
    assert not (coco / "val2017").exists()


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_folder_that_is_none_is_named(kind: str, coco: Path, generated: GeneratedCoco) -> None:
    pack(coco / "val2017.zip", images(generated, "val2017"))
    if kind == "file":
        (coco / "val2017").write_text("")
    else:
        (coco / "val2017").symlink_to(coco / "nowhere")
    with pytest.raises(DatasetError, match=r"val2017 is no folder, but .* Move it away\.$"):
        prepare(coco, unpacked=["val2017"])
    ready = prepare(coco)[0]
    assert not ready
    (coco / "annotations" / "instances_val2014.json").unlink()
    (coco / "annotations" / "instances_minival2014.json").unlink()
    assert "val2017 is no folder, but a file or a link to nothing: move it away" in prepare(coco)[1]


def test_links_to_nothing_are_unpacked_over(coco: Path, generated: GeneratedCoco) -> None:
    wanted = images(generated, "val2017")
    pack(coco / "val2017.zip", wanted)
    (coco / "val2017").mkdir()
    for name in list(wanted)[:2]:
        (coco / name).symlink_to(coco / "nowhere")
    assert prepare(coco, unpacked=["val2017"])[0]
    assert below(coco / "val2017") == wanted
    assert not (coco / "nowhere").exists()


def test_a_zip_file_that_is_not_there_is_named(coco: Path) -> None:
    with pytest.raises(DatasetError, match=r"--unpack val2014: .*val2014\.zip is not there"):
        prepare(coco, unpacked=["val2014"])


def test_an_archive_without_images_is_refused(coco: Path) -> None:
    pack(coco / "val2014.zip", {"readme.txt": b"none"})
    with pytest.raises(DatasetError, match=r"has no images of val2014"):
        prepare(coco, unpacked=["val2014"])
