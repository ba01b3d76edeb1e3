"""The trainer: Detectron2's DefaultTrainer, deterministic on any number of processes."""

from __future__ import annotations

import functools
import logging
import weakref
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import build_augmentation
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase, hooks
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn

from resnext_det.backbones import build_detector
from resnext_det.checkpoint_file import RUN, write_checkpoint
from resnext_det.config import complete, idle_warning
from resnext_det.config_rules import STOCK, refuse_impossible
from resnext_det.data.annotations import forget
from resnext_det.data.checks import check_agreement, configured_classes
from resnext_det.data.custom import class_names
from resnext_det.data.mapper import NamingDatasetMapper
from resnext_det.data.stream import (
    SeededDataset,
    Share,
    build_stream,
    build_test_stream,
    seed_all,
    seeded,
    training_records,
)
from resnext_det.engine.checkpoints import Checkpointer, PeriodicCheckpointer
from resnext_det.engine.hooks import (
    SIGNALS,
    STOPPED,
    EarlyStop,
    Evaluation,
    Interrupted,
    PreciseBN,
    Progress,
    StopOnSignal,
    Throughput,
    validation_losses,
)
from resnext_det.engine.inference import evaluate_datasets, renamed
from resnext_det.engine.recorded_config import check_classes, check_same_function, listed
from resnext_det.engine.schedule import scale
from resnext_det.engine.train_loop import (
    TrainLoop,
    check_batch_norms,
    distributed,
    shared_seed,
    unwrap,
)
from resnext_det.engine.writers import Writers, build_writers, writing_period
from resnext_det.evaluation.coco import Engine
from resnext_det.evaluation.evaluator import DetectionEvaluator
from resnext_det.evaluation.results_file import INFERENCE
from resnext_det.weights.loading import load_weights

logger = logging.getLogger(__name__)

GLOBAL_NORM = "global_norm"
"""SOLVER.CLIP_GRADIENTS.CLIP_TYPE that clips the total norm, in addition to Detectron2's types."""


class Trainer(DefaultTrainer):
    """Trains a detector from a config.

    Detectron2's `DefaultTrainer`, to be used and subclassed like it.
    """

    _trainer: TrainLoop
    checkpointer: Checkpointer  # type: ignore[assignment]  # another of fvcore's kind

    def __init__(self, cfg: CfgNode) -> None:
        """Build model, optimizer and hooks from a config, scaled by SOLVER.SCALING.

        Raises:
            ConfigError: a setting is impossible.
            DatasetError: DATASETS.TEST has different classes than DATASETS.TRAIN.
        """
        # DefaultTrainer.__init__ builds a loop and a loader of its own, and DDP for GPUs only.
        TrainerBase.__init__(self)
        refuse_impossible(cfg, comm.get_world_size())
        cfg, self.plan = scale(cfg, comm.get_world_size())
        self.cfg = cfg
        if configured_classes(cfg) is not None:
            check_agreement([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        self._trainer = self._build_loop(distributed(model), optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)  # type: ignore[no-untyped-call]
        self.checkpointer = Checkpointer(
            self._trainer.model,
            cfg.OUTPUT_DIR,
            config=cfg,
            class_names=self.class_names(cfg),
            trainer=weakref.proxy(self),
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.register_hooks(list(self.build_hooks()))

    def _build_loop(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainLoop:
        plan, solver, model_precision = self.plan, self.cfg.SOLVER, self.cfg.MODEL.RESNEXT.PRECISION
        autocast = getattr(torch, solver.AMP.PRECISION) if solver.AMP.ENABLED else None
        share = Share(
            comm.get_rank(), plan.processes, plan.micro_batches, plan.images_per_micro_batch
        )
        check_batch_norms(model, share, exact=solver.EXACT_SUM)
        clip = solver.CLIP_GRADIENTS
        clips_total = clip.ENABLED and clip.CLIP_TYPE == GLOBAL_NORM
        return TrainLoop(
            model,
            functools.partial(self.build_train_loader, self.cfg, share),
            optimizer,
            share,
            shared_seed(self.cfg.SEED),
            Path(self.cfg.OUTPUT_DIR),
            precision=autocast,
            scaled=autocast is torch.float16 or model_precision == "fp16",
            max_norm=clip.CLIP_VALUE if clips_total else None,
            ema_decay=solver.EMA.DECAY if solver.EMA.ENABLED else None,
            skip=solver.SKIP_BAD_UPDATES,
            per_pass=solver.MICRO_BATCHES_PER_PASS,
            exact=solver.EXACT_SUM,
        )

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Return the detector, on MODEL.DEVICE."""
        return build_detector(cfg)

    @classmethod
    def class_names(cls, cfg: CfgNode) -> list[str]:
        """Return the classes of the training data, in the order of the model's outputs."""
        return class_names(cfg)

    def resume_or_load(self, resume: bool = True) -> None:
        """Resume from the newest intact checkpoint in OUTPUT_DIR, or load MODEL.WEIGHTS.

        Raises:
            WeightsError: MODEL.WEIGHTS does not fill the backbone, or the checkpoint is of another
                model.
            TrainingError: all checkpoints are damaged.
        """
        solver = [dict(group) for group in self._trainer.optimizer.param_groups]
        base_lrs = list(self.scheduler.base_lrs)
        resumed = self.checkpointer.resume() if resume else None
        if resumed is None:
            logger.info("%s", load_weights(unwrap(self._trainer.model), self.cfg))
            check_same_function(self.cfg, allow=True)
            return
        # The config's values replace the checkpoint's; momentum buffers stay.
        for group, built in zip(self._trainer.optimizer.param_groups, solver):
            group.update({key: value for key, value in built.items() if key != "params"})
        self.scheduler.base_lrs = base_lrs
        if isinstance(self.scheduler, LRMultiplier):
            rates = self.scheduler.get_lr()  # of the next iteration
            self.scheduler._last_lr = list(rates)
            for group, rate in zip(self._trainer.optimizer.param_groups, rates):
                group["lr"] = rate
        if resumed.changes:
            logger.info("resumed with changed settings: %s", listed(resumed.changes))
        self.start_iter = resumed.iteration + 1
        logger.info(
            "resumed from %s at iteration %d of %d", resumed.file, self.start_iter, self.max_iter
        )

    def train(self) -> dict[str, Any] | None:  # type: ignore[override]  # as DefaultTrainer's
        """Train until SOLVER.MAX_ITER, early stopping, or a signal.

        Returns:
            The last results if the config has TEST.EXPECTED_RESULTS, as in Detectron2.

        Raises:
            SystemExit: with code `STOPPED`, after a signal; the training is saved.
        """
        # MODEL.WEIGHTS may have been trained on other classes.
        unwrap(self._trainer.model).class_names = self.class_names(self.cfg)  # type: ignore[assignment]
        results: dict[str, Any] | None = None
        try:
            self._log_plan(self._trainer.start_loader(self.start_iter))
            with SIGNALS.listening():
                results = super().train()  # type: ignore[no-untyped-call]
        except Interrupted:
            self.checkpointer.save(f"model_{self.iter:07d}", iteration=self.iter)
            logger.info(
                "stopped after %d of %d iterations; --resume continues (exit code %d)",
                self.iter + 1,
                self.max_iter,
                STOPPED,
            )
            raise SystemExit(STOPPED) from None
        except EarlyStop as reason:
            logger.info("stopped early: %s", reason)
            self.iter -= 1  # it stopped before this iteration
            self.checkpointer.save("model_final", iteration=self.iter)
        finally:
            self._trainer.close()
        ema = self._trainer.ema
        if ema is not None and comm.is_main_process():
            content = {"model": ema.module.state_dict(), RUN: self.checkpointer.run_record()}
            write_checkpoint(content, Path(self.cfg.OUTPUT_DIR) / "model_final_ema.pth")
        skipped = sum(comm.all_gather(self._trainer.skipped_images))
        if skipped:
            logger.warning("%d images could not be read and were skipped", skipped)
        return results

    def _log_plan(self, loader: Any) -> None:
        if not comm.is_main_process():
            return
        data = getattr(loader, "dataset", None)
        if not isinstance(data, SeededDataset):  # of a subclass's own loader
            data = training_records(self.cfg)
        logger.info("the plan:\n%s", self.plan.describe(len(data)))
        for warning in (*self.plan.warnings, idle_warning(self.cfg)):
            if warning:
                logger.warning("%s", warning)

    def build_hooks(self) -> list[HookBase]:
        """Return the hooks, in Detectron2's order."""
        solver, test = self.cfg.SOLVER, self.cfg.TEST
        found: list[HookBase] = [hooks.IterationTimer(), hooks.LRScheduler()]
        if test.PRECISE_BN.ENABLED and get_bn_modules(self._trainer.model):
            # The same images in every process, with a seed that makes them others than training's.
            share = Share(0, 1, 1, self._trainer.share.images)
            loader = self.build_train_loader(self.cfg, share, self._trainer.seed + 1)
            found.append(
                PreciseBN(test.EVAL_PERIOD, self._trainer.model, loader, test.PRECISE_BN.NUM_ITER)  # type: ignore[no-untyped-call]
            )
        found.append(Throughput(solver.IMS_PER_BATCH))
        is_main = comm.is_main_process()
        if is_main:
            found += [
                Progress(self.max_iter),
                PeriodicCheckpointer(
                    self.checkpointer,
                    solver.CHECKPOINT_PERIOD,
                    max_to_keep=solver.KEEP_LAST or None,
                ),
            ]
        found.append(
            Evaluation(
                self._evaluate,
                test.EVAL_PERIOD,
                # Tagged as the last checkpoint, too, from which a resume continues.
                lambda: self.checkpointer.save("model_best", iteration=self.iter),
                test.BEST.METRIC,
                test.BEST.PATIENCE,
            )
        )
        if is_main:
            period = writing_period(self.max_iter)
            found.append(Writers(self.build_writers(), period))  # type: ignore[no-untyped-call]
        return [*found, StopOnSignal()]

    def _evaluate(self) -> dict[str, Any]:
        """Evaluate the weights, and as configured their average, augmented images and losses."""
        results = self._tested(self._trainer.model)
        if self.cfg.TEST.AUG.ENABLED and self.iter + 1 == self.max_iter:
            results = {**results, **self.test_with_TTA(self.cfg, self._trainer.model)}
        self._last_eval_results = results
        if self._trainer.ema is not None:
            average = self._tested(self._trainer.ema.module, f"{INFERENCE}_ema")
            results = {**results, "ema": average}
        if self.cfg.TEST.VALIDATION_LOSS:
            # With annotations, and without augmentation.
            augmentations = build_augmentation(self.cfg, is_train=False)
            mapper = NamingDatasetMapper(self.cfg, True, augmentations=augmentations)
            loader = build_test_stream(self.cfg, self.cfg.DATASETS.TEST[0], mapper)
            batches = SIGNALS.interrupting(loader)
            words = self._trainer.seed, 2, self.iter
            with seeded(*words):
                seed_all(*words)  # proposals are sampled, on a GPU too
                losses = validation_losses(unwrap(self._trainer.model), batches)
            results = {**results, "validation": losses}
        return results

    def _tested(self, model: nn.Module, folder: str = INFERENCE) -> dict[str, Any]:
        # Results name these weights instead of MODEL.WEIGHTS, which training started from.
        weights = f"{self.cfg.OUTPUT_DIR}, iteration {self.iter + 1}"
        return self._test_into(folder, renamed(self.cfg, weights), model)

    def build_writers(self) -> list[EventWriter]:
        """Return writers of metrics.jsonl, TensorBoard's events and, if enabled, wandb's."""
        return build_writers(self.cfg)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """Return Detectron2's optimizer; the loop itself clips the total gradient norm.

        Unless MODEL.RESNEXT.PRECISION is stock, its update is torch's fused one, which takes a
        third of the time on a CPU and rounds differently. Not run on a GPU.
        """
        fused = complete(cfg).MODEL.RESNEXT.PRECISION != STOCK
        if cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE == GLOBAL_NORM:
            cfg = cfg.clone()
            cfg.defrost()
            cfg.SOLVER.CLIP_GRADIENTS.ENABLED = False
        optimizer: torch.optim.Optimizer = super().build_optimizer(cfg, model)  # type: ignore[no-untyped-call]
        if fused:
            for group in optimizer.param_groups:
                group.update(foreach=False, fused=True)
        return optimizer

    @classmethod
    def build_train_loader(
        cls, cfg: CfgNode, share: Share | None = None, seed: int = 0, start: int = 0
    ) -> Any:
        """Return an infinite loader of one process's training data, from update `start` on.

        Without a share, a process computes its part of SOLVER.IMS_PER_BATCH at once.
        """
        if share is None:
            images = cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()
            share = Share(comm.get_rank(), comm.get_world_size(), comm.get_world_size(), images)
        return build_stream(cfg, NamingDatasetMapper(cfg, True), share, seed, start)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> dict[str, Any]:
        """Evaluate a model; an evaluation that was killed continues after its last predictions.

        Raises:
            DatasetError: the data has different classes than the model.
        """
        if evaluators is not None:
            check_classes(cfg, learned=getattr(unwrap(model), "class_names", ()))
            found: dict[str, Any] = super().test(cfg, model, evaluators)  # type: ignore[no-untyped-call]
            return found
        return cls._test_into(INFERENCE, cfg, model)

    @classmethod
    def _test_into(cls, folder: str, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
        """Evaluate a model, and write into a folder of OUTPUT_DIR."""
        check_classes(cfg, learned=getattr(unwrap(model), "class_names", ()))
        # Detectron2 allows subclasses whose `build_evaluator` takes no folder.
        output = {}
        if folder != INFERENCE:
            output["output_folder"] = str(Path(cfg.OUTPUT_DIR) / folder)
        try:
            return evaluate_datasets(
                cfg,
                model,
                functools.partial(cls.build_evaluator, cfg, **output),
                functools.partial(cls.build_test_loader, cfg),
            )
        finally:
            forget()

    @classmethod
    def test_with_TTA(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
        """Evaluate a GeneralizedRCNN with test-time augmentation, as Detectron2's train_net.py.

        Returns:
            As `test`, with names that end in "_TTA"; files go to OUTPUT_DIR/inference_TTA.
        """
        augmented = GeneralizedRCNNWithTTA(cfg, unwrap(model))
        results = cls._test_into(f"{INFERENCE}_TTA", cfg, augmented)
        return {f"{name}_TTA": figures for name, figures in results.items()}

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """Return Detectron2's test loader, with a mapper whose errors name the image."""
        return build_test_stream(cfg, dataset_name, NamingDatasetMapper(cfg, False))

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> DetectionEvaluator:
        """Return the evaluator of a data set; it writes to OUTPUT_DIR/inference by default."""
        folder = Path(cfg.OUTPUT_DIR) / INFERENCE if output_folder is None else Path(output_folder)
        test = complete(cfg).TEST
        return DetectionEvaluator(
            dataset_name,
            folder,
            {"weights": cfg.MODEL.WEIGHTS},
            Engine(test.ENGINE, test.CROSS_CHECK),
            test.KEYPOINT_OKS_SIGMAS,
        )
