"""Small detectors with random weights that behave like trained ones, as run folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode

from resnext_det import load_config
from resnext_det.backbones import build_detector
from resnext_det.benchmark.contenders import photograph, spread
from resnext_det.data.toy import CLASSES
from resnext_det.engine.checkpoints import Checkpointer


def write_run(folder: Path, config: str, *words: object) -> CfgNode:
    """Write the config and the checkpoint of a detector of images of 96 to 128 pixels."""
    small = ["INPUT.MIN_SIZE_TEST", 96, "INPUT.MAX_SIZE_TEST", 128, "OUTPUT_DIR", folder]
    small += ["MODEL.RESNEXT.PRECISION", "stock", "MODEL.WEIGHTS", folder / "model_final.pth"]
    cfg = load_config(config, [str(word) for word in (*small, *words)])
    torch.manual_seed(0)
    model = build_detector(cfg)
    spread(model, background=-1)
    Checkpointer(model, folder, config=cfg, class_names=CLASSES).save("model_final")
    (folder / "config.yaml").write_text(cfg.dump())
    return cfg


def write_images(folder: Path) -> list[Path]:
    """Write images that grow, shrink, are turned by EXIF and are grey."""
    folder.mkdir()
    sizes = [(60, 80), (80, 60), (150, 200), (96, 160), (50, 140)]
    for number, (height, width) in enumerate(sizes):
        picture = photograph(np.random.default_rng(number), height, width)
        exif = picture.getexif()
        exif[274] = number + 4
        picture.save(folder / f"{number}.jpg", quality=95, exif=exif)
    picture.convert("L").save(folder / "grey.png")
    return sorted(folder.iterdir())
