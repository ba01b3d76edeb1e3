"""Exporting a detector: written, compared with the detector, and only then kept."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from resnext_det.config import complete
from resnext_det.console import progress_bar
from resnext_det.data.checks import check_registered
from resnext_det.engine.predictor import Predictor
from resnext_det.environment import versions
from resnext_det.errors import ArtifactError, ConfigError, quoted
from resnext_det.export.compare import LOWEST_SCORE, compare
from resnext_det.export.formats import OPSET, needed, saver
from resnext_det.export.graph import Graph
from resnext_det.export.quantizers import QUANTIZERS
from resnext_det.export.quantizing import CALIBRATION_IMAGES, quantize
from resnext_det.files import file_digest, written_together
from resnext_det.images import read_picture
from resnext_det.runtime.description import Description
from resnext_det.runtime.engines import format_of, open_artifact
from resnext_det.weights.loading import weights_file

logger = logging.getLogger(__name__)

IMAGES = 20


def export(
    cfg: CfgNode,
    file: Path,
    *,
    images: Sequence[Path] = (),
    run: str = "",
    opset: int = OPSET,
    lose_at_most: float | None = None,
) -> Description:
    """Export the detector of a config and its weights.

    Args:
        cfg: with MODEL.WEIGHTS. The artifact computes in float32, whatever
            MODEL.RESNEXT.PRECISION is.
        file: to write; its suffix is that of the format.
        images: to compare on; by default some of DATASETS.TEST.
        run: the folder of the training, to record.
        opset: of ONNX, for the formats that need it.
        lose_at_most: compute in int8, if that costs at most so many points of AP.

    Returns:
        What the artifact says about itself, including the comparison.

    Raises:
        ArtifactError: the format cannot express the detector, the artifact detects something
            else, or int8 loses too much; nothing is left behind.
        ConfigError: the detector cannot be exported, or a package is missing.
        WeightsError: the weights do not fill the whole detector.
    """
    form = format_of(file)
    for package in {form.engine} | ({"onnx"} if form.name in ("onnx", "openvino") else set()):
        needed(package, form.name)
    if lose_at_most is not None:
        _check_int8(cfg, form.name)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNEXT.PRECISION = "stock"
    cfg.freeze()
    if cfg.INPUT.FORMAT not in ("BGR", "RGB"):
        raise ConfigError(
            f"INPUT.FORMAT is {quoted(cfg.INPUT.FORMAT)}; only BGR and RGB are exported."
        )
    predictor = Predictor(cfg)
    graph = Graph(predictor.model)
    logger.info("%s", predictor.report)
    files = list(images) or tested(cfg)
    example = _example(graph, _read(predictor, files))
    description = _described(cfg, predictor, run)
    save = saver(form.name, graph, example, opset)
    with written_together(file) as inside:
        save(description, inside)
        _, artifact = open_artifact(inside)
        bar = progress_bar(files, desc="comparing", unit="image")
        # Without any object, as engines differ on empty tensors.
        blank = torch.zeros_like(example) + torch.tensor(cfg.MODEL.PIXEL_MEAN).byte()
        comparison = compare(
            graph,
            artifact,
            itertools.chain([blank], _read(predictor, bar)),
            cfg.TEST.DETECTIONS_PER_IMAGE,
            [description.score_threshold],
        )
        logger.info("%s", comparison)
        known = {name: off for name, off in asdict(comparison).items() if off is not None}
        description = replace(description, comparison=known)
        save(description, inside)
        if lose_at_most is not None:
            trained = _spread(cfg.DATASETS.TRAIN[0], CALIBRATION_IMAGES)
            pixels = [image.numpy() for image in _read(predictor, trained)]
            quantize(cfg, description, inside, pixels, lose_at_most)
        written, _ = open_artifact(inside)
    return written


def _check_int8(cfg: CfgNode, form: str) -> None:
    if form not in QUANTIZERS:
        raise ConfigError(
            f"int8 is for {' and '.join(QUANTIZERS)}, not for {form}: --format openvino."
        )
    if cfg.MODEL.MASK_ON:
        raise ConfigError(
            "int8 is judged by the AP of boxes, which says nothing about masks: export without "
            "--int8, or boxes alone, with MODEL.MASK_ON False."
        )
    for key in ("TRAIN", "TEST"):
        if not cfg.DATASETS[key]:
            raise ConfigError(
                f"DATASETS.{key} is empty, and int8 is calibrated on images of DATASETS.TRAIN and "
                "judged on those of DATASETS.TEST: name a data set."
            )
        check_registered(cfg.DATASETS[key][0])
    QUANTIZERS[form].package()


def tested(cfg: CfgNode, count: int = IMAGES) -> list[Path]:
    """Return images of DATASETS.TEST, evenly spread.

    Raises:
        ConfigError: no data set is named.
        DatasetError: it is not registered, or its files are missing.
    """
    if not cfg.DATASETS.TEST:
        raise ConfigError(
            "DATASETS.TEST is empty, and the artifact is compared with the detector on images: "
            "name a folder of some, --images FOLDER."
        )
    return _spread(cfg.DATASETS.TEST[0], count)


def _spread(name: str, count: int) -> list[Path]:
    """Return images of a data set, evenly spread."""
    check_registered(name)
    records = DatasetCatalog.get(name)
    step = max(1, len(records) // count)
    return [Path(record["file_name"]) for record in records[::step][:count]]


def _read(predictor: Predictor, files: Iterable[Path]) -> Iterator[torch.Tensor]:
    """Yield the pixels of images as an evaluation gives them to the detector, (h, w, 3)."""
    for file in files:
        yield predictor.record(read_picture(file))["image"].permute(1, 2, 0).contiguous()


def _example(graph: Graph, images: Iterator[torch.Tensor]) -> torch.Tensor:
    """Return the first image with objects."""
    for image in images:
        with torch.no_grad():
            if (graph(image)[1] > LOWEST_SCORE).any():
                return image
    raise ArtifactError(
        f"the detector finds nothing above a score of {LOWEST_SCORE} in these images, so an "
        "artifact could not be compared with it: name images that show its objects, --images "
        "FOLDER."
    )


def _described(cfg: CfgNode, predictor: Predictor, run: str) -> Description:
    part = cfg.MODEL.RETINANET if "Retina" in cfg.MODEL.META_ARCHITECTURE else cfg.MODEL.ROI_HEADS
    weights = weights_file(cfg)
    return Description(
        class_names=tuple(predictor.class_names),
        category_ids=tuple(predictor.category_ids),
        pixel_format=cfg.INPUT.FORMAT,
        pixel_mean=tuple(map(float, cfg.MODEL.PIXEL_MEAN)),
        pixel_std=tuple(map(float, cfg.MODEL.PIXEL_STD)),
        shortest_side=cfg.INPUT.MIN_SIZE_TEST,
        longest_side=cfg.INPUT.MAX_SIZE_TEST,
        enlarge="opencv" if complete(cfg).DATALOADER.DECODER == "fast" else "pillow",
        score_threshold=float(part.SCORE_THRESH_TEST),
        architecture=cfg.MODEL.META_ARCHITECTURE,
        run=run,
        weights=weights.name,
        weights_sha256=file_digest(weights),
        precision="fp32",
        versions=versions(),
        comparison={},
        parts_sha256={},
    )
