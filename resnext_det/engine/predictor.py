"""Run a trained detector on images."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.structures import Instances
from numpy.typing import NDArray
from PIL import Image

from resnext_det.backbones import build_detector
from resnext_det.checkpoint_file import read_run
from resnext_det.config import complete, config_of, load_config, parse_config
from resnext_det.config_rules import CLASSIFIER, refuse_impossible
from resnext_det.console import progress_bar
from resnext_det.data.resizing import FastResizeTransform, channels_first
from resnext_det.engine.evaluate import of_run
from resnext_det.engine.recorded_config import check_same_function
from resnext_det.errors import ConfigError, DatasetError, quoted
from resnext_det.evaluation.results_file import read_metrics
from resnext_det.image_files import SUFFIXES, ImageSource, picture_of
from resnext_det.images import as_array, check_pixel_format, read_picture
from resnext_det.prediction import Prediction, scaled
from resnext_det.weights.catalog import SCHEME
from resnext_det.weights.loading import load_weights, weights_file

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Record = dict[str, Any]
_List = list[Any] | tuple[Any, ...]  # of ImageSource


class Predictor:
    """Runs a trained detector on images, with the results of Detectron2's `DefaultPredictor`.

        detector = Predictor("output/run")
        found = detector("photo.jpg")
        found.boxes, found.scores, found.names

    Attributes:
        model: the detector.
        report: which weights were loaded, to print.
        class_names: in the order of the detector's outputs.
        category_ids: of these classes in the annotations; empty if unknown.
        connections: pairs of keypoints that a line connects.
    """

    def __init__(
        self,
        detector: str | Path | CfgNode,
        *,
        config: str | Path | None = None,
        device: str | None = None,
        precision: str | None = None,
        threshold: float | None = None,
        calibrated: bool = False,
        overrides: Sequence[str] = (),
    ) -> None:
        """Build the detector and load its weights.

        Args:
            detector: the folder of a run; a checkpoint, which records its config, or its
                address, as for MODEL.WEIGHTS; or a config with MODEL.WEIGHTS.
            config: of a checkpoint that records none, such as Detectron2's: a file, or the name of
                a shipped config or of Detectron2's ("COCO-Detection/retinanet_R_50_FPN_1x.yaml").
            device: "cpu", "cuda" or "cuda:1"; by default MODEL.DEVICE, or the CPU without a GPU.
            precision: of the model, "stock", "fp32", "bf16" or "fp16"; see MODEL.RESNEXT.PRECISION.
            threshold: lowest score to return, even below SCORE_THRESH_TEST, which is the default
                and what evaluations use.
            calibrated: whether to scale scores by the temperature that the run's evaluation found,
                so that of those at 0.7, for example, about 70 % are right; `threshold` is of these
                scores then.
            overrides: of the config: KEY, VALUE, KEY, VALUE, ... With TEST.AUG.ENABLED True, every
                image is detected as by Detectron2's `GeneralizedRCNNWithTTA`.

        Raises:
            DatasetError: `calibrated` without figures of an evaluation.
            ConfigError: no config is known, the network does not detect objects or does not take
                INPUT.FORMAT, it was trained with other settings, or there is no such device.
            WeightsError: the weights do not fill the whole detector.
        """
        cfg = _config(detector, config, _overrides(device, precision, overrides))
        self._temperature = _temperature(detector) if calibrated else None
        if threshold is not None:
            lowest = threshold
            if self._temperature is not None:
                lowest = float(scaled(np.array(threshold), 1 / self._temperature))
            cfg = with_threshold(cfg, lowest)
        self._threshold = threshold or 0.0
        check_pixel_format(cfg.INPUT.FORMAT, len(cfg.MODEL.PIXEL_MEAN))
        self._architecture = cfg.MODEL.META_ARCHITECTURE
        if self._architecture in ("ProposalNetwork", "SemanticSegmentor", CLASSIFIER):
            raise self._no_detections()
        if cfg.MODEL.LOAD_PROPOSALS:
            raise ConfigError(
                "MODEL.LOAD_PROPOSALS is True: this detector classifies regions of a file, which "
                "holds those of a data set. Evaluate it, or use a detector with an RPN."
            )
        refuse_impossible(cfg, training=False)
        check_same_function(cfg)
        self.model = build_detector(cfg).eval()
        self.report = load_weights(self.model, cfg, whole_detector=True)
        self._detect = (
            GeneralizedRCNNWithTTA(cfg, self.model) if cfg.TEST.AUG.ENABLED else self.model
        )
        self.connections = keypoint_connections(cfg)
        self.class_names, self.category_ids = _classes(cfg)
        tested = cfg.DATASETS.TEST[:1]
        self._stuff_names = [
            name for each in tested for name in MetadataCatalog.get(each).get("stuff_classes", [])
        ]
        self._resize = T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
        self._format = cfg.INPUT.FORMAT
        self._is_fast = complete(cfg).DATALOADER.DECODER == "fast"

    @overload
    def __call__(
        self, images: _List, *, order: str | None = None, batch: int = 1
    ) -> list[Prediction]: ...
    @overload
    def __call__(
        self, images: ImageSource, *, order: str | None = None, batch: int = 1
    ) -> Any: ...  # a list for a folder, else a Prediction
    def __call__(
        self,
        images: ImageSource | _List,
        *,
        order: str | None = None,
        batch: int = 1,
    ) -> Prediction | list[Prediction]:
        """Return the objects in an image, or for a list or a folder a list of them, in order.

        Args:
            images: a file, Pillow's image, an array (height, width, 3) or a tensor (3, height,
                width) of uint8; or a list of them; or a folder, whose images are read by name,
                without subfolders. Files and Pillow's images are rotated by their EXIF orientation.
            order: "RGB" or "BGR": the channels of arrays and tensors, which need it.
            batch: images at a time. In batches of more than one, padding to the largest image can
                change detections slightly.

        Raises:
            ConfigError: `order` is missing or unknown, or a folder holds no image.
            DatasetError: an image cannot be read, converted or resized; the error names it.
        """
        if isinstance(images, str | Path) and Path(images).is_dir():
            images = images_in(Path(images))
        if not isinstance(images, list | tuple):
            return next(self.stream([images], order=order))
        bar = progress_bar(images, desc="detecting", unit="image", disable=len(images) < 2)
        return list(self.stream(bar, order=order, batch=batch))

    def stream(
        self, images: Iterable[ImageSource], *, order: str | None = None, batch: int = 1
    ) -> Iterator[Prediction]:
        """Yield the objects in each of many images, reading as it goes; see `__call__`."""
        for several in batches(iter(images), batch):
            pictures = [
                read_picture(each) if isinstance(each, str | Path) else picture_of(each, order)
                for each in several
            ]
            found = self.detect([self.record(picture) for picture in pictures])
            for image, picture, one in zip(several, pictures, found):
                source = image if isinstance(image, str | Path) else picture
                yield dataclasses.replace(one, source=source)

    def record(self, picture: Image.Image) -> Record:
        """Return a Detectron2 record: the resized "image" as (C, H, W), and the original size.

        Args:
            picture: 8 bits per channel, upright, as from `resnext_det.image_files.picture_of`.

        Raises:
            DatasetError: the picture cannot be converted or resized.
        """
        width, height = picture.size
        try:
            pixels = as_array(picture, self._format)
            resizing = self._resize.get_transform(pixels)
            if self._is_fast:
                resizing = FastResizeTransform.replacing(resizing)
            image = channels_first(resizing.apply_image(pixels))
        except (ValueError, RuntimeError) as error:  # for example a strip that would vanish
            raise DatasetError(
                f"a picture of {width} x {height} pixels cannot be converted to "
                f"{self._format} and resized: {quoted(error)}"
            ) from error
        return {"image": image, "height": height, "width": width}

    @torch.no_grad()
    def detect(self, records: Sequence[Record]) -> list[Prediction]:
        """Return the objects in each picture of a batch of `record`s."""
        outputs = self._detect(list(records))
        if not all("instances" in output for output in outputs):
            raise self._no_detections()
        return [
            self._prediction(record, output["instances"].to("cpu"), self._stuff(output))
            for record, output in zip(records, outputs)
        ]

    def _stuff(self, output: dict[str, Any]) -> dict[str, NDArray[np.bool_]]:
        """Return the mask of each kind of stuff that a Panoptic FPN found."""
        if "panoptic_seg" not in output:
            return {}
        segments, described = output["panoptic_seg"]
        names = dict(enumerate(self._stuff_names))
        return {
            names.get(each["category_id"], f"stuff {each['category_id']}"): (
                (segments == each["id"]).cpu().numpy()
            )
            for each in described
            if not each["isthing"]
        }

    def _prediction(
        self, record: Record, found: Instances, stuff: dict[str, NDArray[np.bool_]]
    ) -> Prediction:
        scores = found.scores.numpy()
        if self._temperature is not None:
            scores = scaled(scores, self._temperature).astype(np.float32)
        result = Prediction(
            boxes=found.pred_boxes.tensor.numpy(),
            scores=scores,
            labels=found.pred_classes.numpy(),
            class_names=self.class_names,
            width=record["width"],
            height=record["height"],
            masks=found.pred_masks.numpy() if found.has("pred_masks") else None,
            keypoints=found.pred_keypoints.numpy() if found.has("pred_keypoints") else None,
            stuff=stuff,
            category_ids=self.category_ids,
            connections=self.connections,
        )
        return result.above(self._threshold) if self._threshold else result

    def _no_detections(self) -> ConfigError:
        return ConfigError(
            f"MODEL.META_ARCHITECTURE {self._architecture} does not detect objects with a box and "
            "a class: use the config and weights of a detector, such as GeneralizedRCNN."
        )


def _config(
    detector: str | Path | CfgNode, config: str | Path | None, overrides: Sequence[str]
) -> CfgNode:
    """Return the config of a detector, with its weights in MODEL.WEIGHTS."""
    if isinstance(detector, CfgNode):
        if config is not None:
            raise ConfigError(
                "the detector is a config already, and config= names another: give one of them."
            )
        return config_of(detector, overrides) if overrides else detector
    if config is None and Path(detector).is_dir():
        config, detector = of_run(Path(detector))
    weights = ["MODEL.WEIGHTS", str(detector)]
    if config is not None:
        return load_config(config, [*weights, *overrides])
    name = quoted(str(detector))
    if str(detector).startswith(SCHEME):
        raise ConfigError(
            f"{name} is a network trained on ImageNet, not a detector: train one from it, and name "
            "the folder of the training."
        )
    file = weights_file(CfgNode({"MODEL": {"WEIGHTS": str(detector)}}))
    if not file.is_file():
        raise ConfigError(f"{name} is neither the folder of a run nor a checkpoint.")
    run = read_run(file)
    if run is None or not run.config:
        raise ConfigError(
            f"{name} records no config, so another program wrote it, or it holds a backbone alone: "
            "pass config=, such as the config.yaml of its training."
        )
    values = parse_config(run.config, f"the config recorded in {name}")
    return config_of(values, [*weights, *overrides])


def _temperature(run: object) -> float:
    """Return the temperature that the evaluation of a run found."""
    if not isinstance(run, str | Path) or not Path(run).is_dir():
        raise ConfigError("calibrated=True is for the folder of an evaluated run.")
    found = {each.temperature for each in read_metrics(Path(run)).evaluations}
    temperature = found.pop() if len(found) == 1 else None
    if temperature is None or not 0 < temperature < math.inf:
        raise ConfigError(
            f"calibrated=True needs one temperature, and the evaluations of {quoted(Path(run))} "
            "found none or several: evaluate it on one data set (resnext-det eval --run FOLDER)."
        )
    return temperature


def _overrides(device: str | None, precision: str | None, more: Sequence[str]) -> list[str]:
    words = list(more)
    if precision is not None:
        words += ["MODEL.RESNEXT.PRECISION", precision]
    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = quoted(error).partition(". ")[0].partition(" device type at start")[0]
            raise ConfigError(f"device {quoted(device)} cannot be used: {reason}.") from error
        words += ["MODEL.DEVICE", device]
    return words


def images_in(folder: Path) -> list[Path]:
    """Return the images in a folder by name, without subfolders and hidden files.

    Raises:
        ConfigError: it holds none, or cannot be read.
    """
    try:
        names = sorted(folder.iterdir())
    except OSError as error:
        raise ConfigError(f"{quoted(folder)} cannot be read: {error.strerror}.") from error
    found = [
        file
        for file in names
        if not file.name.startswith(".") and file.suffix.lower() in SUFFIXES and file.is_file()
    ]
    if not found:
        raise ConfigError(f"{quoted(folder)} holds no image ({', '.join(sorted(SUFFIXES))}).")
    return found


def batches(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    """Yield lists of `size` items; the last may be shorter.

    Raises:
        ConfigError: the size is not 1 or more.
    """
    if size < 1:
        raise ConfigError(f"a batch of {size} images is impossible: give 1 or more.")
    while several := list(itertools.islice(items, size)):
        yield several


def with_threshold(cfg: CfgNode, score: float) -> CfgNode:
    """Return a copy of a config with SCORE_THRESH_TEST of at most `score`."""
    changed: CfgNode = cfg.clone()
    changed.defrost()
    for part in (changed.MODEL.ROI_HEADS, changed.MODEL.RETINANET):
        part.SCORE_THRESH_TEST = min(part.SCORE_THRESH_TEST, score)
    changed.freeze()
    return changed


def keypoint_connections(cfg: CfgNode) -> list[tuple[int, int]]:
    """Return the pairs of keypoints that a line connects, from the metadata of DATASETS.TEST."""
    if not cfg.MODEL.KEYPOINT_ON or not cfg.DATASETS.TEST:
        return []
    metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0])
    names = list(metadata.get("keypoint_names", []))
    return [
        (names.index(one), names.index(other))
        for one, other, _ in metadata.get("keypoint_connection_rules", [])
        if one in names and other in names
    ]


def _classes(cfg: CfgNode) -> tuple[list[str], list[int]]:
    """Return the names of the classes, and their category ids if the data set is known."""
    run = read_run(weights_file(cfg))
    names = list(run.class_names) if run is not None else []
    if not cfg.DATASETS.TEST:
        return names, []
    metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0])
    tested = list(metadata.get("thing_classes", []))
    positions = metadata.get("thing_dataset_id_to_contiguous_id", {})
    if names and names != tested:
        return names, []
    return tested, sorted(positions, key=positions.__getitem__)
