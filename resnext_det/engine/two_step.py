"""The paper's own detector: an RPN, its proposals, and a Fast R-CNN trained on them.

"For simplicity we do not share the features between RPN and Fast R-CNN" (arXiv 1611.05431v2,
appendix B): both start from the same ImageNet weights and learn their own backbone.

A folder holds both trainings, each an ordinary run folder, the proposals, and `two_step.json`: how
the run was started and what is finished, so that one that was killed continues.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils import comm

from resnext_det.backbones import build_detector
from resnext_det.checkpoint_file import RUN, run_record, write_checkpoint
from resnext_det.data import custom
from resnext_det.data.annotations import forget, read_json
from resnext_det.engine.evaluate import propose
from resnext_det.engine.hooks import SIGNALS, STOPPED, Interrupted
from resnext_det.engine.inference import renamed
from resnext_det.engine.recorded_config import changes, listed
from resnext_det.engine.setup import close_logs, set_up
from resnext_det.engine.trainer import Trainer
from resnext_det.errors import ConfigError, TrainingError, quoted
from resnext_det.evaluation.results_file import file_name_of
from resnext_det.files import write_json, write_text
from resnext_det.weights.loading import load_weights
from resnext_det.weights.reading import read_tensors

logger = logging.getLogger(__name__)

RECORD = "two_step.json"
RPN, PROPOSALS, FAST_RCNN = "rpn", "proposals", "fast_rcnn"
"""The stages, and their folders."""
FASTER_RCNN = "faster_rcnn"
"""The folder of the detector that --share makes of both."""

# What a continued run may change: none of it changes the result.
_FREE = (
    *("OUTPUT_DIR", "DATASETS.PROPOSAL_FILES_TRAIN", "DATASETS.PROPOSAL_FILES_TEST"),
    *("MODEL.DEVICE", "DATALOADER.NUM_WORKERS", "SOLVER.CHECKPOINT_PERIOD", "SOLVER.KEEP_LAST"),
)
_SHARED_STAGE = 4  # res4 is the last stage below an RPN on C4 features


@dataclass(frozen=True)
class TwoStep:
    """A run of both steps.

    Attributes:
        folder: of the run.
        rpn: the config of the RPN.
        fast_rcnn: the config of the Fast R-CNN.
        share: whether Fast R-CNN keeps the RPN's backbone, frozen, and learns res5 and above alone.
        arguments: of the command line, for the log and the data sets that it names by file.
    """

    folder: Path
    rpn: CfgNode
    fast_rcnn: CfgNode
    share: bool
    arguments: argparse.Namespace

    @classmethod
    def of(
        cls,
        folder: Path,
        rpn: CfgNode,
        fast_rcnn: CfgNode,
        arguments: argparse.Namespace,
        *,
        share: bool = False,
    ) -> TwoStep:
        """Give both configs their folders, and the second the files of proposals.

        Raises:
            ConfigError: the configs do not describe these two steps.
        """
        if rpn.MODEL.META_ARCHITECTURE != "ProposalNetwork" or not fast_rcnn.MODEL.LOAD_PROPOSALS:
            raise ConfigError(
                f"MODEL.META_ARCHITECTURE of the RPN is {rpn.MODEL.META_ARCHITECTURE} and "
                f"MODEL.LOAD_PROPOSALS of the Fast R-CNN {fast_rcnn.MODEL.LOAD_PROPOSALS}: they "
                "must be ProposalNetwork and True, as in rpn_X_50_32x4d_C4_paper and "
                "fast_rcnn_X_50_32x4d_C4_paper."
            )
        rpn, fast_rcnn = rpn.clone(), fast_rcnn.clone()
        for cfg, name in ((rpn, RPN), (fast_rcnn, FAST_RCNN)):
            cfg.defrost()
            cfg.OUTPUT_DIR = str(folder / name)
        for use in ("TRAIN", "TEST"):
            files = tuple(str(proposal_file(folder, name)) for name in fast_rcnn.DATASETS[use])
            fast_rcnn.DATASETS[f"PROPOSAL_FILES_{use}"] = files
        if share:
            for part in ("RESNETS", "RESNEXT"):
                if rpn.MODEL[part] != fast_rcnn.MODEL[part]:
                    raise ConfigError(
                        f"--share: both steps have one backbone, and MODEL.{part} differs between "
                        "their configs. Make it the same."
                    )
            fast_rcnn.MODEL.BACKBONE.FREEZE_AT = _SHARED_STAGE
        rpn.freeze()
        fast_rcnn.freeze()
        return cls(folder, rpn, fast_rcnn, share, arguments)

    @property
    def rpn_weights(self) -> Path:
        """The trained RPN."""
        return self.folder / RPN / "model_final.pth"

    def proposals(self) -> dict[str, Path]:
        """Return the files of proposals, by data set."""
        names = dict.fromkeys((*self.fast_rcnn.DATASETS.TRAIN, *self.fast_rcnn.DATASETS.TEST))
        return {name: proposal_file(self.folder, name) for name in names}

    def finished(self) -> list[str]:
        """Return the stages that an earlier run finished.

        Raises:
            ConfigError: it had other settings, or the folder holds something else.
        """
        file = self.folder / RECORD
        if not file.is_file():
            for name in (RPN, FAST_RCNN):
                if (self.folder / name / "last_checkpoint").exists():
                    raise ConfigError(
                        f"--output {quoted(self.folder)} holds a training of another command: "
                        "choose another folder."
                    )
            return []
        try:
            content = read_json(file)
            recorded = {RPN: str(content[RPN]), FAST_RCNN: str(content[FAST_RCNN])}
            shared, done = bool(content["share"]), [str(name) for name in content["finished"]]
        except (KeyError, TypeError) as error:
            raise TrainingError(f"{quoted(file)} is damaged: {quoted(error)}.") from error
        found = {
            f"{name}.{key}": values
            for name, cfg in ((RPN, self.rpn), (FAST_RCNN, self.fast_rcnn))
            for key, values in changes(recorded[name], cfg).items()
            if key not in _FREE
        }
        if shared != self.share:
            found["--share"] = shared, self.share
        if found:
            raise ConfigError(
                f"--output {quoted(self.folder)} holds a run with other settings: {listed(found)}. "
                "Restore them to continue it, or choose another folder."
            )
        return done

    def check_weights(self) -> None:
        """Load the weights of the second step once, since it may start days later.

        Raises:
            WeightsError: they do not fill its backbone, which includes res5.
            ConfigError: no detector can be built from its config.
        """
        cfg = self.fast_rcnn.clone()
        cfg.defrost()
        cfg.MODEL.DEVICE = "cpu"
        load_weights(build_detector(cfg), cfg)

    def record(self, finished: list[str]) -> None:
        """Write the record of this run, in the main process."""
        if comm.is_main_process():
            content = {
                RPN: self.rpn.dump(),
                FAST_RCNN: self.fast_rcnn.dump(),
                "share": self.share,
                "finished": finished,
            }
            write_json(self.folder / RECORD, content)
        comm.synchronize()


def proposal_file(folder: Path, dataset: str) -> Path:
    """Return the file of a data set's proposals in the folder of a run."""
    return folder / PROPOSALS / f"{file_name_of(dataset)}.safetensors"


def train_two_steps(run: TwoStep) -> None:
    """Run the stages that are not finished yet, in each process of a job.

    Raises:
        SystemExit: with code `STOPPED` after a signal; the next call continues.
    """
    custom.register_arguments(run.arguments)
    done = comm.all_gather(run.finished())[0]
    run.record(done)
    for name, stage in ((RPN, _train_rpn), (PROPOSALS, _propose), (FAST_RCNN, _train_fast_rcnn)):
        if name not in done:
            stage(run)
            done = [*done, name]
            run.record(done)
            close_logs()


def _train(cfg: CfgNode, arguments: argparse.Namespace) -> None:
    folder = set_up(cfg, arguments)
    if comm.is_main_process():
        custom.record(cfg, folder)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    trainer.train()


def _train_rpn(run: TwoStep) -> None:
    _train(run.rpn, run.arguments)


def _propose(run: TwoStep) -> None:
    """Write the proposals for all data sets of the second step."""
    cfg = renamed(run.rpn, str(run.rpn_weights))
    set_up(cfg, argparse.Namespace(**{**vars(run.arguments), "eval_only": True}))
    model = build_detector(cfg)
    logger.info("%s", load_weights(model, cfg, whole_detector=True))
    try:
        with SIGNALS.listening():
            # The training of the RPN ended with its figures.
            propose(cfg, model, run.proposals(), figures=False)
    except Interrupted:
        raise SystemExit(STOPPED) from None
    finally:
        forget()


def _train_fast_rcnn(run: TwoStep) -> None:
    cfg = run.fast_rcnn
    if run.share:
        weights = run.folder / "shared_backbone.pth"
        if comm.is_main_process() and not weights.is_file():
            write_checkpoint({"model": _shared(run)}, weights)
        comm.synchronize()
        cfg = renamed(cfg, str(weights))
    _train(cfg, run.arguments)
    if run.share and comm.is_main_process():
        _join(run)


def _shared(run: TwoStep) -> dict[str, Any]:
    """Return the RPN's backbone, and res5 from the weights that it started from."""
    model = build_detector(run.fast_rcnn)
    load_weights(model, run.fast_rcnn)
    learned = read_tensors(run.rpn_weights)
    return {
        name: learned[name] if name.startswith("backbone.") else tensor.cpu()
        for name, tensor in model.state_dict().items()
        if name.startswith(("backbone.", "roi_heads.res5."))
    }


def _join(run: TwoStep) -> None:
    """Write both steps, which have one backbone, as a Faster R-CNN in a run folder of its own."""
    folder = run.folder / FASTER_RCNN
    cfg = run.fast_rcnn.clone()
    cfg.defrost()
    cfg.OUTPUT_DIR = str(folder)
    for part in ("PROPOSAL_GENERATOR", "ANCHOR_GENERATOR", "RPN"):
        cfg.MODEL[part] = run.rpn.MODEL[part].clone()
        cfg.MODEL[part].defrost()
    cfg.MODEL.LOAD_PROPOSALS = False
    cfg.MODEL.RPN.POST_NMS_TOPK_TEST = cfg.DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST
    cfg.DATASETS.PROPOSAL_FILES_TRAIN = cfg.DATASETS.PROPOSAL_FILES_TEST = ()
    tensors = read_tensors(run.folder / FAST_RCNN / "model_final.pth")
    for name, tensor in read_tensors(run.rpn_weights).items():
        if name.startswith("proposal_generator."):
            tensors[name] = tensor
    record = run_record(cfg, custom.class_names(cfg))
    write_checkpoint({"model": tensors, RUN: record}, folder / "model_final.pth")
    write_text(folder / "config.yaml", cfg.dump())
    custom.record(cfg, folder)
    logger.info("both steps as one Faster R-CNN: %s", folder)
