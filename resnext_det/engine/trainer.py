"""The trainer: Detectron2's, with proof of the weights, named bad images and a progress bar."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, JSONWriter, TensorboardXWriter
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from resnext_det.data.checks import NamingDatasetMapper
from resnext_det.engine.hooks import Progress
from resnext_det.errors import ConfigError
from resnext_det.evaluation.evaluator import BoxEvaluator
from resnext_det.pretrained.loading import check_same_model, load_weights

logger = logging.getLogger(__name__)


# Iterations up to which every single one is written to metrics.jsonl.
_SHORT_TRAINING = 1000


class Trainer(DefaultTrainer):
    """Trains a detector as its config says; otherwise Detectron2's `DefaultTrainer`."""

    def resume_or_load(self, resume: bool = True) -> None:
        """Go on with the last checkpoint of OUTPUT_DIR, or load MODEL.WEIGHTS.

        Args:
            resume: go on with weights, optimizer, schedule and iteration of the last checkpoint,
                where there is one.

        Raises:
            WeightsError: MODEL.WEIGHTS does not fill the backbone, or the checkpoint is of another
                model.
        """
        if not (resume and self.checkpointer.has_checkpoint()):
            logger.info("%s", load_weights(self._bare_model(), self.cfg))
            return
        check_same_model(self._bare_model(), last_checkpoint(self.cfg))
        super().resume_or_load(resume=True)  # type: ignore[no-untyped-call]
        logger.info(
            "resumed from %s at iteration %d of %d",
            self.checkpointer.get_checkpoint_file(),
            self.start_iter,
            self.max_iter,
        )

    def _bare_model(self) -> nn.Module:
        model: nn.Module = self._trainer.model
        return model.module if isinstance(model, DistributedDataParallel) else model

    def build_hooks(self) -> list[HookBase]:
        """Return Detectron2's hooks and the progress display."""
        hooks: list[HookBase] = super().build_hooks()  # type: ignore[no-untyped-call]
        if not comm.is_main_process():
            return hooks
        # DefaultTrainer writes every 20 iterations, without a way to say otherwise, which leaves
        # a short training with hardly a curve.
        vars(hooks[-1])["_period"] = self._writing_period()
        return [*hooks, Progress()]

    def _writing_period(self) -> int:
        return 1 if self.max_iter <= _SHORT_TRAINING else 20

    def build_writers(self) -> list[EventWriter]:
        """Return writers of metrics.jsonl and TensorBoard's events."""
        output = Path(self.cfg.OUTPUT_DIR)
        output.mkdir(parents=True, exist_ok=True)
        window = self._writing_period()
        return [
            JSONWriter(str(output / "metrics.jsonl"), window_size=window),
            TensorboardXWriter(str(output), window_size=window),
        ]

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """Return Detectron2's loader, whose errors name the image."""
        return build_detection_train_loader(cfg, mapper=NamingDatasetMapper(cfg, True))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """Return Detectron2's loader for an evaluation, whose errors name the image."""
        mapper = NamingDatasetMapper(cfg, False)
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> BoxEvaluator:
        """Return the evaluator that writes metrics.json into OUTPUT_DIR."""
        return BoxEvaluator(dataset_name, Path(cfg.OUTPUT_DIR), {"weights": cfg.MODEL.WEIGHTS})


def evaluate(cfg: CfgNode, *, resume: bool = False) -> dict[str, Any]:
    """Evaluate MODEL.WEIGHTS on every data set of DATASETS.TEST.

    Args:
        cfg: the config.
        resume: evaluate the last checkpoint of OUTPUT_DIR instead of MODEL.WEIGHTS.

    Returns:
        {"bbox": {"AP": ...}} in percent, by data set where there are several.

    Raises:
        WeightsError: the weights do not fill the whole detector.
        ConfigError: `resume`, and there is no checkpoint in OUTPUT_DIR.
    """
    if resume:
        checkpoint = last_checkpoint(cfg)
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.WEIGHTS = str(checkpoint)
        cfg.freeze()
    model = build_model(cfg)
    logger.info("%s", load_weights(model, cfg, whole_detector=True))
    results: dict[str, Any] = Trainer.test(cfg, model)  # type: ignore[no-untyped-call]
    return results


def last_checkpoint(cfg: CfgNode) -> Path:
    """Return the last checkpoint of OUTPUT_DIR.

    Args:
        cfg: the run's config; only OUTPUT_DIR is read.

    Raises:
        ConfigError: there is none.
    """
    folder = Path(cfg.OUTPUT_DIR)
    pointer = folder / "last_checkpoint"
    if not pointer.is_file():
        raise ConfigError(
            f"--resume: there is no checkpoint in {folder} to go on from. Leave --resume out to "
            "start, or name the folder of the earlier run: OUTPUT_DIR FOLDER."
        )
    # The pointer names a file beside it; anything else in it is not followed.
    return folder / Path(pointer.read_text().strip()).name
