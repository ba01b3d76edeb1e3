from __future__ import annotations

from pathlib import Path

import pytest
import torch

from resnext_det.checkpoints.folder import candidates, last_good, name_last, prune
from resnext_det.checkpoints.writing import checksum_file, export_weights, write_checkpoint
from resnext_det.errors import ConfigError, TrainingError


def save(folder: Path, iteration: int, name: str = "") -> Path:
    file = folder / f"{name or f'model_{iteration:07d}'}.pth"
    content = {"model": {"w": torch.ones(4)}, "optimizer": {}, "iteration": iteration}
    write_checkpoint(content, file)
    return file


def names(folder: Path) -> list[str]:
    return [file.name for file in candidates(folder)]


def test_the_last_one_comes_first_then_the_newest(tmp_path: Path) -> None:
    for iteration in (9, 19, 29):
        save(tmp_path, iteration)
    save(tmp_path, 24, "model_best")
    save(tmp_path, 34, "model_final")
    save(tmp_path, 99, "sub/model_0000099")
    export_weights({"w": torch.ones(4)}, tmp_path / "model_final_ema.pth")
    (tmp_path / ".model_0000039.pth").write_bytes(save(tmp_path, 9).read_bytes())
    order = ["model_final", "model_0000029", "model_best", "model_0000019", "model_0000009"]
    assert names(tmp_path) == [f"{name}.pth" for name in order]
    name_last(tmp_path, "model_0000019.pth")
    first = order.pop(3)
    assert names(tmp_path) == [f"{name}.pth" for name in (first, *order)]
    assert last_good(tmp_path) == tmp_path / "model_0000019.pth"


def test_one_that_is_damaged_is_passed_over_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = [save(tmp_path, iteration) for iteration in (9, 19, 29)]
    name_last(tmp_path, files[2].name)
    for file in files[1:]:
        file.write_bytes(file.read_bytes()[:-100])
    assert last_good(tmp_path) == files[0]
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    for record, file in zip(caplog.records, [files[2], files[1]]):
        text = record.getMessage()
        assert f"{file} is damaged" in text and f"goes on from {files[0]} instead" in text


def test_none_good_is_an_error_that_names_them_all(tmp_path: Path) -> None:
    for iteration in (9, 19):
        save(tmp_path, iteration).write_bytes(b"")
    name_last(tmp_path, "model_0000029.pth")
    with pytest.raises(TrainingError) as caught:
        last_good(tmp_path)
    for name in ("model_0000009.pth", "model_0000019.pth", "model_0000029.pth"):
        assert name in str(caught.value)


def test_a_folder_without_checkpoints_has_none(tmp_path: Path) -> None:
    (tmp_path / "model_final.pth.sha256").write_text("")
    for folder in (tmp_path, tmp_path / "missing"):
        assert last_good(folder) is None


@pytest.mark.parametrize(
    "text",
    ["../outside/model_0000099.pth", "{outside}", "model_0000029.pth", "..", "", "\0\n\xff", "/"],
)
def test_the_name_of_the_last_one_is_not_followed_elsewhere(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    outside = save(tmp_path / "outside", 99)
    run = tmp_path / "run"
    good = save(run, 9)
    text = text.replace("{outside}", str(outside))
    (run / "last_checkpoint").write_text(text, encoding="latin1")
    assert last_good(run) == good
    assert "last_checkpoint names" in caplog.text and "goes on from" in caplog.text
    good.unlink()
    with pytest.raises(TrainingError, match="which is not there"):
        last_good(run)


def test_a_name_of_any_length_is_looked_at_in_part(tmp_path: Path) -> None:
    save(tmp_path, 9)
    (tmp_path / "last_checkpoint").write_text("x" * 10_000_000)
    assert last_good(tmp_path) == tmp_path / "model_0000009.pth"


def test_the_oldest_are_removed_with_their_checksums(tmp_path: Path) -> None:
    for iteration in (9, 19, 29, 39, 10_000_009):
        save(tmp_path, iteration)
    others = ["model_final", "model_best", "model_12", "my_model_0000001", "model_0000001_ema"]
    for name in others:
        save(tmp_path, 1, name)
    name_last(tmp_path, "model_0000009.pth")
    prune(tmp_path, 0)
    assert len(list(tmp_path.glob("*.pth"))) == 10
    prune(tmp_path, 2, ["model_0000019"])
    left = {f"{name}.pth" for name in others}
    left |= {f"model_{iteration:07d}.pth" for iteration in (9, 19, 39, 10_000_009)}
    assert {file.name for file in tmp_path.glob("*.pth")} == left
    assert {file.name for file in tmp_path.glob("*.sha256")} == {f"{name}.sha256" for name in left}


def test_those_of_an_earlier_training_neither_count_nor_go(tmp_path: Path) -> None:
    files = [save(tmp_path, iteration) for iteration in (9, 19, 29, 39, 89999)]
    prune(tmp_path, 2, up_to=29)
    assert [file.exists() for file in files] == [False, True, True, True, True]
    assert not checksum_file(files[0]).exists()


def test_a_negative_number_of_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="KEEP_LAST is -1"):
        prune(tmp_path, -1)
