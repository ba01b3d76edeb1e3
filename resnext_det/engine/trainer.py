"""The trainer: Detectron2's, whose updates depend on nothing but the weights and the iteration."""

from __future__ import annotations

import contextlib
import functools
import logging
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.data.detection_utils import build_augmentation
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase, hooks
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn

from resnext_det.backbones import build_detector
from resnext_det.checkpoint_file import RUN, read_run, write_checkpoint
from resnext_det.config import complete, idle_warning
from resnext_det.config_rules import refuse_impossible
from resnext_det.data.annotations import forget, serve
from resnext_det.data.checks import check_agreement, configured_classes
from resnext_det.data.custom import class_names
from resnext_det.data.mapper import NamingDatasetMapper
from resnext_det.data.stream import (
    Share,
    build_stream,
    seeded,
    training_records,
    with_lasting_workers,
)
from resnext_det.engine.checkpoints import Checkpointer, Checkpoints, checkpoint_bytes
from resnext_det.engine.evaluation_hook import Evaluation, Goal, validation_losses
from resnext_det.engine.hooks import Progress, Throughput
from resnext_det.engine.inference import evaluate_datasets, renamed
from resnext_det.engine.recorded_config import check_classes, check_same_function, listed
from resnext_det.engine.schedule import scale
from resnext_det.engine.stopping import SIGNALS, Abandoned, Interrupted, Stop, StopOnSignal
from resnext_det.engine.train_loop import (
    GLOBAL_NORM,
    Arithmetic,
    TrainLoop,
    distributed,
    shared_seed,
    unwrap,
)
from resnext_det.engine.writers import History, Writers, build_writers, writing_period
from resnext_det.evaluation.coco import Engine
from resnext_det.evaluation.evaluator import DetectionEvaluator
from resnext_det.evaluation.results_file import INFERENCE
from resnext_det.files import free_bytes
from resnext_det.weights.loading import load_weights

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """Trains a detector as its config says.

    A Detectron2 `DefaultTrainer` to those who use it or subclass it; its methods have the meaning
    they have there.
    """

    _trainer: TrainLoop
    checkpointer: Checkpointer

    def __init__(self, cfg: CfgNode) -> None:
        """Build model, optimizer, data and hooks.

        Args:
            cfg: the run's config; SOLVER.SCALING tells what it becomes on this many processes.

        Raises:
            ConfigError: a schedule that cannot be run.
            DatasetError: DATASETS.TEST has other classes than DATASETS.TRAIN.
        """
        # DefaultTrainer.__init__ builds a loop and a loader of its own, without a way to say
        # otherwise, and its create_ddp_model cannot be told that there is no GPU.
        TrainerBase.__init__(self)
        refuse_impossible(cfg, comm.get_world_size())
        cfg, self.plan = scale(cfg, comm.get_world_size())
        if configured_classes(cfg) is not None:
            check_agreement([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        share = Share(
            comm.get_rank(),
            comm.get_world_size(),
            self.plan.micro_batches,
            self.plan.images_per_micro_batch,
        )
        self._trainer = TrainLoop(
            distributed(model),
            functools.partial(self.build_train_loader, cfg, share),
            optimizer,
            share,
            shared_seed(cfg.SEED),
            Path(cfg.OUTPUT_DIR),
            Arithmetic.of(cfg),
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)  # type: ignore[no-untyped-call]
        self.checkpointer = Checkpointer(
            self._trainer.model,
            cfg.OUTPUT_DIR,
            config=cfg,
            class_names=class_names(cfg),
            provenance=self._provenance,
            trainer=weakref.proxy(self),
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self._checkpoints = Checkpoints(
            self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.KEEP_LAST
        )
        self._stop_on_signal = StopOnSignal(self._checkpoints.save_now)
        self.register_hooks(list(self.build_hooks()))

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Return the detector, on MODEL.DEVICE."""
        return build_detector(cfg)

    def resume_or_load(self, resume: bool = True) -> None:
        """Go on with the last good checkpoint of OUTPUT_DIR, or load MODEL.WEIGHTS.

        Args:
            resume: go on with weights, optimizer, schedule and iteration of the last checkpoint,
                where there is one.

        Raises:
            WeightsError: MODEL.WEIGHTS does not fill the backbone, or the checkpoint is of another
                model.
            TrainingError: there are checkpoints, and all of them are damaged.
        """
        solver = [dict(group) for group in self._trainer.optimizer.param_groups]
        base_lrs = list(self.scheduler.base_lrs)
        found = self.checkpointer.resume() if resume else None
        if found is None:
            logger.info("%s", load_weights(unwrap(self._trainer.model), self.cfg))
            if self.cfg.MODEL.WEIGHTS:
                check_same_function(self.cfg, allow=True)
            return
        self._put_in_force(solver, base_lrs)
        self._find_best(found.file.parent)
        if found.changes:
            logger.info("resumed with other settings: %s", listed(found.changes))
        self.start_iter = found.iteration + 1
        logger.info(
            "resumed from %s at iteration %d of %d", found.file, self.start_iter, self.max_iter
        )

    def _put_in_force(self, solver: list[dict[str, Any]], base_lrs: list[float]) -> None:
        """Replace the solver's values of a checkpoint by the config's; momentum buffers stay.

        Args:
            solver: the optimizer's parameter groups, as built from the config.
            base_lrs: of the scheduler, likewise.
        """
        for group, built in zip(self._trainer.optimizer.param_groups, solver):
            group.update({key: value for key, value in built.items() if key != "params"})
        self.scheduler.base_lrs = base_lrs
        if isinstance(self.scheduler, LRMultiplier):
            rates = self.scheduler.get_lr()  # of the iteration that comes next
            self.scheduler._last_lr = list(rates)
            for group, rate in zip(self._trainer.optimizer.param_groups, rates):
                group["lr"] = rate

    def _find_best(self, folder: Path) -> None:
        """Look up the best checkpoint of a training that stock Detectron2 continued meanwhile."""
        evaluation = next((each for each in self._hooks if isinstance(each, Evaluation)), None)
        file = folder / "model_best.pth"
        if evaluation is None or evaluation.best is not None or not file.is_file():
            return
        run = read_run(file)
        if run is not None and run.best is not None and run.iteration is not None:
            evaluation.best, evaluation.best_iteration = run.best, run.iteration

    def train(self) -> dict[str, Any] | None:  # type: ignore[override]  # as DefaultTrainer's
        """Train up to SOLVER.MAX_ITER, until patience is at its end, or until a signal.

        Returns:
            The last evaluation's results, where the config expects some, as in Detectron2.

        Raises:
            SystemExit: a signal ended the training; the code is `stopping.STOPPED`.
        """
        self._tell_plan()
        # MODEL.WEIGHTS may have learned others, and no longer says what this model learns.
        unwrap(self._trainer.model).class_names = class_names(self.cfg)  # type: ignore[assignment]
        try:
            with SIGNALS.listening():
                results: dict[str, Any] | None = super().train()  # type: ignore[no-untyped-call]
        except Stop as stop:
            logger.info("the training ends: %s", stop)
            if stop.code:
                raise SystemExit(stop.code) from None
            self._checkpoints.save_final()
            results = None
        finally:
            self._trainer.close()
        self._export_average()
        skipped = sum(comm.all_gather(self._trainer.skipped_images))
        if skipped:
            logger.warning("%d images could not be read, and were skipped", skipped)
        return results

    def run_step(self) -> None:
        """Compute one update; one that was dropped because of a signal ends the training."""
        try:
            super().run_step()  # type: ignore[no-untyped-call]
        except Abandoned as signal:
            self.iter -= 1
            self._stop_on_signal.stop(signal.number)

    def _provenance(self) -> dict[str, Any]:
        """Return what a checkpoint says beside config, classes and versions."""
        evaluation = next((each for each in self._hooks if isinstance(each, Evaluation)), None)
        return {"best": None if evaluation is None else evaluation.best}

    def _tell_plan(self) -> None:
        if not comm.is_main_process():
            return
        images = len(training_records(self.cfg))
        size = checkpoint_bytes(unwrap(self._trainer.model), self.cfg)
        free = free_bytes(Path(self.cfg.OUTPUT_DIR))
        logger.info("the plan:\n%s", self.plan.describe(images, size, free))
        shortage = self.plan.shortage(size, free)
        for warning in (*self.plan.warnings, idle_warning(self.cfg), shortage):
            if warning:
                logger.warning("%s", warning)

    def _export_average(self) -> None:
        ema = self._trainer.ema
        if ema is not None and comm.is_main_process():
            content = {"model": ema.module.state_dict(), RUN: self.checkpointer.run_record()}
            write_checkpoint(content, Path(self.cfg.OUTPUT_DIR) / "model_final_ema.pth")

    def build_hooks(self) -> list[HookBase]:
        """Return Detectron2's hooks where they serve, and this package's where they do more."""
        cfg = self.cfg
        goal = Goal(cfg.TEST.BEST.METRIC, cfg.TEST.BEST.PATIENCE)
        found: list[HookBase] = [hooks.IterationTimer(), hooks.LRScheduler()]
        if cfg.TEST.PRECISE_BN.ENABLED and get_bn_modules(self._trainer.model):
            found.append(self._precise_bn())
        found += [Throughput(cfg.SOLVER.IMS_PER_BATCH), History()]
        is_main = comm.is_main_process()
        if is_main:
            found.append(Progress())  # before evaluations, which are no training time
        # Before the evaluation: a crash in it loses nothing.
        found.append(self._checkpoints)
        expected = bool(cfg.TEST.EXPECTED_RESULTS)
        found.append(
            Evaluation(self._evaluate, cfg.TEST.EVAL_PERIOD, goal, self._save_best, expected)
        )
        build = self.build_writers if is_main else list[EventWriter]
        found.append(Writers(build, writing_period(self.max_iter)))
        return [*found, self._stop_on_signal]

    def _precise_bn(self) -> HookBase:
        share = Share(comm.get_rank(), comm.get_world_size(), 1, self._trainer.share.images)
        # Images of their own, so that those of the training are not used up.
        loader = self.build_train_loader(self.cfg, share, self._trainer.seed + 1)
        period, batches = self.cfg.TEST.EVAL_PERIOD, self.cfg.TEST.PRECISE_BN.NUM_ITER
        return hooks.PreciseBN(period, self._trainer.model, loader, batches)

    def _evaluate(self) -> dict[str, Any]:
        """Evaluate the weights, their moving average, and the losses, as far as is asked for.

        A signal drops the evaluation: it is done again when the training is resumed.
        """
        try:
            # Alone, there is no exchange to drop in the middle of.
            alone = comm.get_world_size() == 1
            with SIGNALS.obeyed_at_once() if alone else contextlib.nullcontext():
                return self._evaluated()
        except Interrupted:
            self._stop_on_signal.stop(SIGNALS.agreed())
        except Abandoned as signal:
            self._stop_on_signal.stop(signal.number)

    def _evaluated(self) -> dict[str, Any]:
        results = self._tested(self._trainer.model)
        if self.cfg.TEST.AUG.ENABLED and self.iter + 1 == self.max_iter:
            results = {**results, **self.test_with_TTA(self.cfg, self._trainer.model)}
        self._last_eval_results = results
        if self._trainer.ema is not None:
            average = self._tested(self._trainer.ema.module, f"{INFERENCE}_ema")
            results = {**results, "ema": average}
        if self.cfg.TEST.VALIDATION_LOSS:
            with seeded(self._trainer.seed, 2, self.iter):  # proposals are sampled
                losses = validation_losses(unwrap(self._trainer.model), self._validation_batches())
            results = {**results, "validation": losses}
        return results

    def _tested(self, model: nn.Module, folder: str = INFERENCE) -> dict[str, Any]:
        # For what is written: MODEL.WEIGHTS is what the training began with.
        weights = f"{self.cfg.OUTPUT_DIR}, iteration {self.iter + 1}"
        return self._test_into(folder, renamed(self.cfg, weights), model)

    def _validation_batches(self) -> Iterable[list[dict[str, Any]]]:
        # With annotations, and without augmentation.
        serve(self.cfg.DATASETS.TEST)
        mapper = NamingDatasetMapper(
            self.cfg, True, augmentations=build_augmentation(self.cfg, is_train=False)
        )
        loader = build_detection_test_loader(self.cfg, self.cfg.DATASETS.TEST[0], mapper=mapper)
        return SIGNALS.interrupting(with_lasting_workers(loader))

    def _save_best(self) -> None:
        # It is the newest one as well, and named as such: a resume goes on from it.
        self.checkpointer.save("model_best", iteration=self.iter)

    def build_writers(self) -> list[EventWriter]:
        """Return writers of metrics.jsonl, TensorBoard's events and, where wanted, wandb's."""
        return build_writers(self.cfg)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """Return Detectron2's optimizer; the loop itself clips by the norm of all gradients."""
        if cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE == GLOBAL_NORM:
            cfg = cfg.clone()
            cfg.defrost()
            cfg.SOLVER.CLIP_GRADIENTS.ENABLED = False
        optimizer: torch.optim.Optimizer = super().build_optimizer(cfg, model)  # type: ignore[no-untyped-call]
        return optimizer

    @classmethod
    def build_train_loader(
        cls, cfg: CfgNode, share: Share | None = None, seed: int = 0, start: int = 0
    ) -> Any:
        """Return the endless training data of a process, whose errors name the image.

        Args:
            cfg: the run's config.
            share: of this process; None for the whole of Detectron2's batch, as `cfg` alone says.
            seed: of order and augmentation.
            start: updates that were done before.
        """
        if share is None:
            share = Share(
                comm.get_rank(),
                comm.get_world_size(),
                1,
                cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size(),
            )
        return build_stream(cfg, NamingDatasetMapper(cfg, True), share, seed, start)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> dict[str, Any]:
        """Evaluate a model; one that was killed in it goes on from the predictions there are.

        Args:
            cfg: the config; DATASETS.TEST names the data sets.
            model: with its weights.
            evaluators: as in Detectron2: one, or one for each data set; None for this package's.

        Raises:
            DatasetError: the data has other classes than the model.
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
        # A subclass whose evaluators take no folder, as Detectron2 allows, can do without this one.
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
        """Evaluate a model on augmented images, as Detectron2's tools/train_net.py does.

        Args:
            cfg: the config; TEST.AUG says how images are augmented.
            model: a GeneralizedRCNN with its weights.

        Returns:
            As `test`, under names that end in "_TTA"; files go to OUTPUT_DIR/inference_TTA.
        """
        augmented = GeneralizedRCNNWithTTA(cfg, unwrap(model))
        results = cls._test_into(f"{INFERENCE}_TTA", cfg, augmented)
        return {f"{name}_TTA": figures for name, figures in results.items()}

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """Return Detectron2's loader for an evaluation, whose errors name the image."""
        serve([dataset_name])
        mapper = NamingDatasetMapper(cfg, False)
        loader = build_detection_test_loader(cfg, dataset_name, mapper=mapper)
        return with_lasting_workers(loader)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> DetectionEvaluator:
        """Return the evaluator of a data set, as Detectron2's tools/train_net.py does.

        Args:
            cfg: the config.
            dataset_name: of DATASETS.TEST.
            output_folder: for metrics.json and the detections; OUTPUT_DIR/inference by default.
        """
        folder = Path(cfg.OUTPUT_DIR) / INFERENCE if output_folder is None else Path(output_folder)
        description = {"weights": cfg.MODEL.WEIGHTS}
        test = complete(cfg).TEST
        engine = Engine(test.ENGINE, test.CROSS_CHECK)
        return DetectionEvaluator(
            dataset_name, folder, description, engine, test.KEYPOINT_OKS_SIGMAS
        )
