from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager

from resnext_det import load_config
from resnext_det.engine.setup import check_folder, quieten_detectron2
from resnext_det.errors import ConfigError


def begun(folder: Path, weights: str = "a.pth") -> CfgNode:
    """The config of a training that has written a checkpoint into a folder."""
    cfg = config(folder, weights)
    (folder / "config.yaml").write_text(cfg.dump())
    (folder / "last_checkpoint").write_text("model_0000004.pth")
    return cfg


def config(folder: Path, weights: str = "a.pth") -> CfgNode:
    words = ["OUTPUT_DIR", str(folder), "MODEL.WEIGHTS", weights]
    return load_config("faster_rcnn_X_26_8x4d_FPN_toy", words)


def test_a_training_is_not_written_over(tmp_path: Path) -> None:
    cfg = begun(tmp_path)
    with pytest.raises(ConfigError, match="--resume to continue it, --overwrite to"):
        check_folder(cfg, resume=False, overwrite=False)
    check_folder(cfg, resume=True, overwrite=False)
    check_folder(cfg, resume=False, overwrite=True)
    check_folder(config(tmp_path / "other"), resume=False, overwrite=False)


def test_a_resume_without_a_training_begins_one_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """So that a job which is queued again may always have the same command."""
    with caplog.at_level(logging.WARNING):
        check_folder(config(tmp_path / "new"), resume=True, overwrite=False)
    assert "holds no training to continue; a new one begins" in caplog.text


def test_other_weights_are_not_resumed_in_silence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    begun(tmp_path, "a.pth")
    other = config(tmp_path, "b.pth")
    with pytest.raises(
        ConfigError, match=r"began with MODEL.WEIGHTS 'a\.pth'; 'b\.pth' would not be"
    ):
        check_folder(other, resume=True, overwrite=False, weights_given=True)
    # Of the config file, and not of the command line: nobody asked for it.
    check_folder(other, resume=True, overwrite=False, weights_given=False)
    with caplog.at_level(logging.INFO):
        check_folder(config(tmp_path), resume=True, overwrite=False, weights_given=True)
    assert "MODEL.WEIGHTS is not read again" in caplog.text


@pytest.mark.parametrize(
    "content",
    [None, "", "MODEL: 3", ": : :", "[1", "_BASE_: http://127.0.0.1:9/base.yaml\n"],
    ids=["none", "empty", "no group", "no yaml", "half", "an address"],
)
def test_a_folder_whose_config_tells_no_weights_is_resumed_with_a_warning(
    content: str | None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And nothing is fetched: Detectron2's own reader opens an address in _BASE_."""
    cfg = begun(tmp_path)
    (tmp_path / "config.yaml").unlink()
    if content is not None:
        (tmp_path / "config.yaml").write_text(content)
    fetched: list[str] = []
    monkeypatch.setattr(PathManager, "open", lambda path, *_, **__: fetched.append(path))
    check_folder(cfg, resume=True, overwrite=False, weights_given=True)
    assert not fetched
    assert "does not say which weights the training began with" in caplog.text


@pytest.mark.parametrize(
    ("error", "on_terminal"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:5] Connection closed by peer"), False),
        (ConfigError("refused"), False),
        (ZeroDivisionError("a bug"), True),
    ],
)
def test_the_terminal_shows_tracebacks_of_unexplained_errors_only(
    error: Exception, on_terminal: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = (tmp_path / "log.txt").open("w")
    handlers = [logging.StreamHandler(sys.stderr), logging.StreamHandler(log)]  # as Detectron2's
    detectron2 = logging.getLogger("detectron2")
    for handler in handlers:
        detectron2.addHandler(handler)
    try:
        quieten_detectron2()
        try:
            raise error
        except Exception:
            logging.getLogger("detectron2.engine.train_loop").exception("Exception during training")
    finally:
        for handler in handlers:
            detectron2.removeHandler(handler)
        log.close()
    assert ("Traceback" in capsys.readouterr().err) == on_terminal
    assert "Traceback" in (tmp_path / "log.txt").read_text()
