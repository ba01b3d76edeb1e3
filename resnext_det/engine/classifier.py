"""Training a classifier of images with the trainer of detectors."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import nn

from resnext_det.backbones import build_classifier
from resnext_det.checkpoint_file import read_run
from resnext_det.config import complete
from resnext_det.config_rules import CLASSIFIER, refuse
from resnext_det.data.classification import (
    Augmented,
    LabelledImages,
    Preprocessing,
    Views,
    check_readable,
    check_same_labels,
    read_split,
    relabelled,
)
from resnext_det.data.stream import Share, build_stream
from resnext_det.engine.hooks import SIGNALS
from resnext_det.engine.inference import buffers_of_first_process
from resnext_det.engine.schedule import in_epochs
from resnext_det.engine.train_loop import unwrap
from resnext_det.engine.trainer import Trainer
from resnext_det.errors import ConfigError, WeightsError, quoted
from resnext_det.evaluation.classification import Predictions, predict
from resnext_det.evaluation.classified import write_results
from resnext_det.evaluation.results_file import INFERENCE
from resnext_det.modeling.cifar import DEPTH as CIFAR_DEPTH
from resnext_det.weights.loading import weights_file
from resnext_det.weights.pixels import OURS
from resnext_det.weights.reading import read_tensors

logger = logging.getLogger(__name__)


def training_images(cfg: CfgNode) -> LabelledImages:
    """Return the images of DATASETS.TRAIN."""
    data = cfg.CLASSIFICATION
    return read_split(Path(data.DATA), data.LAYOUT, cfg.DATASETS.TRAIN[0], data.SYNSETS)


def test_images(cfg: CfgNode) -> LabelledImages:
    """Return the images of DATASETS.TEST, with the labels of the training."""
    return relabelled(_test_split(cfg), training_images(cfg).classes)


def _test_split(cfg: CfgNode) -> LabelledImages:
    data = cfg.CLASSIFICATION
    return read_split(Path(data.DATA), data.LAYOUT, cfg.DATASETS.TEST[0])


def prepared(cfg: CfgNode, *, classes_given: bool = False, check_images: bool = True) -> CfgNode:
    """Check a recipe and its data, and adapt it to them: the number of classes, and the schedule.

    Args:
        cfg: of a recipe, CLASSIFICATION.DATA set.
        classes_given: refuse another CLASSIFICATION.NUM_CLASSES than the data's.
        check_images: read the header of every image.

    Raises:
        ConfigError: a setting that cannot be.
        DatasetError: no images, images that cannot be read, or other classes to test than to train.
    """
    cfg = complete(cfg)
    _check(cfg)
    train, val = training_images(cfg), _test_split(cfg)
    # Beside a list of classes, the images to test may be of some of them: ImageNet-1K's.
    some = bool(cfg.CLASSIFICATION.SYNSETS)
    sources = quoted(train.source), quoted(val.source)
    check_same_labels(train.classes, val.classes, *sources, subset=some)
    if check_images and cfg.DATALOADER.BAD_IMAGES != "skip":
        check_readable(train)
        check_readable(val)
    classes = len(train.classes)
    if classes_given and classes != cfg.CLASSIFICATION.NUM_CLASSES:
        raise ConfigError(
            f"CLASSIFICATION.NUM_CLASSES is {cfg.CLASSIFICATION.NUM_CLASSES}, and {train.source} "
            f"has {classes} classes. Leave it out: it follows from the data."
        )
    cfg = in_epochs(cfg, len(train)).clone()
    cfg.defrost()
    cfg.CLASSIFICATION.NUM_CLASSES = classes
    cfg.freeze()
    return cfg


def _check(cfg: CfgNode) -> None:
    model, data = cfg.MODEL, cfg.CLASSIFICATION
    problems = []
    if model.META_ARCHITECTURE != CLASSIFIER:
        problems.append(
            f"MODEL.META_ARCHITECTURE is {model.META_ARCHITECTURE}: this is no recipe of a "
            "classifier. Choose one of the recipes, or train the detector with resnext-det train."
        )
    for key in ("TRAIN", "TEST"):
        if len(cfg.DATASETS[key]) != 1:
            problems.append(
                f"DATASETS.{key} is {tuple(cfg.DATASETS[key])}: name one split, such as train."
            )
    if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        problems.append(
            "DATALOADER.ASPECT_RATIO_GROUPING is True, but the crops of a classifier are square: "
            "set it False."
        )
    if cfg.DATALOADER.SAMPLER_TRAIN != "TrainingSampler":
        problems.append("DATALOADER.SAMPLER_TRAIN must be TrainingSampler to train a classifier.")
    if cfg.TEST.VALIDATION_LOSS:
        problems.append(
            "TEST.VALIDATION_LOSS is True: the tests of a classifier always give its loss; leave "
            "the key out."
        )
    if data.RESIZE < data.CROP:
        problems.append(
            f"CLASSIFICATION.RESIZE is {data.RESIZE}, and CROP {data.CROP}: the shorter side must "
            "not be smaller than the crop."
        )
    given = (tuple(model.PIXEL_MEAN), tuple(model.PIXEL_STD))
    is_ours = given == (OURS.mean, OURS.std) or model.RESNETS.DEPTH == CIFAR_DEPTH
    if OURS.order != cfg.INPUT.FORMAT or not is_ours:
        problems.append(
            f"INPUT.FORMAT is {cfg.INPUT.FORMAT}, MODEL.PIXEL_MEAN and PIXEL_STD are {given}, but "
            f"weights for detectors are trained with {OURS}: leave these keys out."
        )
    refuse(*problems)


class ClassifierTrainer(Trainer):
    """Trains the classifier of a recipe. Its checkpoints have torchvision's layout.

    The config must be `prepared`.
    """

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Return the classifier, on MODEL.DEVICE."""
        return build_classifier(cfg)

    @classmethod
    def class_names(cls, cfg: CfgNode) -> list[str]:
        """Return the classes in the order of the model's outputs."""
        return list(training_images(cfg).classes)

    @classmethod
    def build_train_loader(
        cls, cfg: CfgNode, share: Share | None = None, seed: int = 0, start: int = 0
    ) -> Any:
        """Return an infinite loader of one process's training data, from update `start` on."""
        if share is None:
            images = cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()
            share = Share(comm.get_rank(), comm.get_world_size(), comm.get_world_size(), images)
        images, data = training_images(cfg), cfg.CLASSIFICATION
        mapper = Augmented(
            images,
            augmentation=data.AUGMENTATION,
            crop=data.CROP,
            flip=cfg.INPUT.RANDOM_FLIP,
            colour_jitter=data.COLOR_JITTER,
            lighting=data.LIGHTING,
            # Zero once it is normalized, as in RX (datasets/transforms.lua).
            padding=cfg.MODEL.PIXEL_MEAN[::-1],
        )
        return build_stream(cfg, mapper, share, seed, start, images.records())

    def _tested(self, model: nn.Module, folder: str = INFERENCE) -> dict[str, Any]:
        with buffers_of_first_process(model):
            found = test(self.cfg, model)
        _log(found, f"iteration {self.iter + 1}")
        if not found:
            return {}
        if folder == INFERENCE and self.iter + 1 == self.max_iter:
            weights = f"{self.cfg.OUTPUT_DIR}, iteration {self.iter + 1}"
            write_results(Path(self.cfg.OUTPUT_DIR), found, test_images(self.cfg), weights)
        figures: dict[str, Any] = {kind: each.figures for kind, each in found.items()}
        return {**figures.pop(""), "loss": float(found[""].losses.mean()), **figures}


def evaluate(cfg: CfgNode) -> None:
    """Test a checkpoint of `ClassifierTrainer`, MODEL.WEIGHTS, and write the results.

    Args:
        cfg: `prepared`.

    Raises:
        WeightsError: the checkpoint cannot be read, or is of another model.
        DatasetError: it was trained on other classes.
    """
    file, model = weights_file(cfg), ClassifierTrainer.build_model(cfg)
    try:
        model.load_state_dict(read_tensors(file))
    except RuntimeError as error:
        raise WeightsError(f"{file} is of another model: {quoted(error, 400)}") from error
    images = test_images(cfg)
    if (run := read_run(file)) and run.class_names:
        names = quoted(file), quoted(images.source)
        check_same_labels(run.class_names, images.classes, *names, subset=False)
    found = test(cfg, model)
    _log(found, str(file))
    if found:
        write_results(Path(cfg.OUTPUT_DIR), found, images, str(file))


def _log(found: Mapping[str, Predictions], what: str) -> None:
    for kind, each in found.items():
        logger.info(
            "%s: top-1 error %.2f %%, top-5 error %.2f %% (%s)",
            what,
            100 - each.top1,
            100 - each.top5,
            kind or f"{len(each.labels):,} images",
        )


def test(cfg: CfgNode, model: nn.Module) -> dict[str, Predictions]:
    """Classify the images of DATASETS.TEST, each process its share.

    Returns:
        The predictions under "" and, if only some of the learned classes are tested, those among
        these classes under a name such as "1000_way"; empty but on the main process.

    Raises:
        WeightsError: scores that are not finite.
    """
    images, data = test_images(cfg), cfg.CLASSIFICATION
    mine = range(comm.get_rank(), len(images), comm.get_world_size())
    views = Views(images, Preprocessing(data.RESIZE, data.CROP), mine)
    classifier: Any = unwrap(model)
    classifier.eval()
    among: dict[str, list[int] | None] = {"": None}
    shown = [images.classes.index(name) for name in _test_split(cfg).classes]
    if len(shown) < len(images.classes):
        among[f"{len(shown)}_way"] = shown
    found = predict(
        classifier.scores,
        views,
        workers=cfg.DATALOADER.NUM_WORKERS,
        among=list(among.values()),
        interrupting=SIGNALS.interrupting,
    )
    parts = comm.gather(found)
    return {kind: Predictions.joined(each) for kind, each in zip(among, zip(*parts))}
