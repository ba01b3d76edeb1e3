from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import pytest

from resnext_det import load_config
from resnext_det.engine.setup import check_folder, close_logs, quieten_detectron2, set_up
from resnext_det.errors import ConfigError


def test_overwrites_training_only_if_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = load_config("faster_rcnn_X_26_8x4d_FPN_toy", ["OUTPUT_DIR", str(tmp_path)])
    check_folder(cfg, resume=False, overwrite=False)
    # A scheduler may always use the same command, --resume included.
    check_folder(cfg, resume=True, overwrite=False)
    assert "holds no training to continue" in caplog.text
    (tmp_path / "last_checkpoint").write_text("model_0000004.pth")
    with pytest.raises(ConfigError, match="--resume to continue it, --overwrite to"):
        check_folder(cfg, resume=False, overwrite=False)
    check_folder(cfg, resume=False, overwrite=True)
    check_folder(cfg, resume=True, overwrite=False, weights_given=True)
    assert "loading the last checkpoint instead of MODEL.WEIGHTS" in caplog.text


@pytest.mark.parametrize(
    ("error", "on_terminal"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:5] Connection closed by peer"), False),
        (ConfigError("refused"), False),
        (ZeroDivisionError("a bug"), True),
    ],
)
def test_terminal_shows_tracebacks_of_unexplained_errors_only(
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


def test_a_second_run_in_a_process_logs_once(tmp_path: Path) -> None:
    for name in ("one", "two"):
        cfg = load_config("faster_rcnn_X_26_8x4d_FPN_toy", ["OUTPUT_DIR", str(tmp_path / name)])
        set_up(cfg, argparse.Namespace(eval_only=True, config_file=""))
        assert len(logging.getLogger("resnext_det").handlers) == 2  # the terminal and log.txt
    close_logs()
