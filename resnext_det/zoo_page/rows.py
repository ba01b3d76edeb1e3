"""The shipped configs and their networks, as the lines of MODEL_ZOO.md tell of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from detectron2.config import CfgNode

from resnext_det.data.toy import ToySpec
from resnext_det.errors import WeightsError
from resnext_det.modeling.template import Template
from resnext_det.pretrained.catalog import ENTRIES, entry
from resnext_det.pretrained.catalog_entry import Entry
from resnext_det.pretrained.fit import Needs, check_config
from resnext_det.published.results import PAPER, PublishedResult, published_results, what_differs
from resnext_det.published.setting import COCO_TRAIN_IMAGES, TRAINVAL35K, setting_of
from resnext_det.zoo_page.results import OwnResult

_PAPERS_RECIPE = "a recipe close to the paper's"
STARTS_FROM = {
    (50, "1x64d"): ("resnet50.tv_in1k", _PAPERS_RECIPE),
    (50, "32x4d"): ("resnext50_32x4d.tv_in1k", _PAPERS_RECIPE),
    (101, "1x64d"): ("resnet101.tv_in1k", _PAPERS_RECIPE),
    (101, "32x4d"): ("resnext101_32x4d.mmpretrain_in1k", _PAPERS_RECIPE),
    (101, "64x4d"): (
        "resnext101_64x4d.gluon_in1k",
        "nearest to the accuracy of the authors' own among those for commercial use",
    ),
    (101, "32x8d"): ("resnext101_32x8d.tv_in1k", _PAPERS_RECIPE),
}
"""What a config is best started from, of all that fit and that allow commercial use, and why."""


@dataclass(frozen=True)
class Config:
    """A shipped config.

    Attributes:
        name: of the config.
        cfg: the config itself.
        parameters: of the detector, learnable ones.
        backbone_parameters: of its backbone.
        multiply_adds: of the detector, for one image.
        size: height and width of that image, as the network sees it, and regions in the heads.
        result: what it reached here, None where it was not trained.
    """

    name: str
    cfg: CfgNode
    parameters: int
    backbone_parameters: int
    multiply_adds: int
    size: tuple[int, int, int]
    result: OwnResult | None = None

    @property
    def images_per_batch(self) -> int:
        """Images of one update, over all processes."""
        return int(self.cfg.SOLVER.IMS_PER_BATCH)

    @property
    def base_lr(self) -> str:
        """Learning rate after the warm-up."""
        return f"{self.cfg.SOLVER.BASE_LR:g}"

    @property
    def warmup(self) -> str:
        """Length of the warm-up, and where it starts."""
        solver = self.cfg.SOLVER
        start = f"{solver.BASE_LR * solver.WARMUP_FACTOR:g}"
        return f"{solver.WARMUP_ITERS:,} iterations, from {start}"

    @property
    def falls(self) -> str:
        """Learning rates after each step, and the iterations of the steps."""
        solver = self.cfg.SOLVER
        rates = [solver.BASE_LR * solver.GAMMA**n for n in range(1, len(solver.STEPS) + 1)]
        return ", ".join(f"{rate:g} at {step:,}" for rate, step in zip(rates, solver.STEPS))

    @property
    def iterations(self) -> int:
        """Updates."""
        return int(self.cfg.SOLVER.MAX_ITER)

    @property
    def on_coco(self) -> bool:
        """Whether it is trained on COCO, and not on the toy data."""
        return setting_of(self.cfg).train_set == TRAINVAL35K

    @property
    def reached(self) -> str:
        """What it reached here, for a cell of the first table."""
        if self.result is None:
            return "not trained here"
        figures = f"{self.result.AP:.1f} (AP50 {self.result.AP50:.1f})"
        return figures if self.on_coco else f"{figures} on the toy data"

    @property
    def epochs(self) -> float:
        """How often the training sees each image."""
        images = COCO_TRAIN_IMAGES if self.on_coco else ToySpec().train_images
        return self.iterations * self.images_per_batch / images


@dataclass(frozen=True)
class Model:
    """A network, and the configs that are of it.

    Attributes:
        depth: layers.
        template: cardinality and width.
        configs: from the shortest training to the longest.
        notes: of all models, in the order of the page; their numbers are cited.
    """

    depth: int
    template: Template
    configs: Sequence[Config]
    notes: Sequence[str]

    @property
    def name(self) -> str:
        """Such as "ResNeXt-50 32x4d"."""
        return _model_name(self.depth, self.template)

    @property
    def anchor(self) -> str:
        """The part of an address that GitHub gives to the heading of this name."""
        return self.name.lower().replace(" ", "-")

    @property
    def compared_with(self) -> str:
        """The config that published results are compared with: the paper's, where there is one."""
        return min((c.name for c in self.configs), key=lambda name: not name.endswith("_paper"))

    @property
    def weights(self) -> tuple[Entry, str] | None:
        """The ImageNet weights to start from, and why."""
        name, why = STARTS_FROM.get((self.depth, str(self.template)), (None, ""))
        return None if name is None else (entry(name), why)

    @property
    def also(self) -> list[str]:
        """All other ImageNet-1K weights of the catalog that the configs take as they stand."""
        return [
            _short(each)
            for each in ENTRIES.values()
            if each.imagenet_1k_only
            and each not in (self.weights or ())
            and all(_fits(each, config.cfg) for config in self.configs)
        ]

    @property
    def published(self) -> list[tuple[PublishedResult, str, str]]:
        """What is published, what differs from `compared_with`, and the numbers of the notes."""
        setting = setting_of(next(c.cfg for c in self.configs if c.name == self.compared_with))
        return [
            (
                row,
                what_differs(row, setting),
                ", ".join(str(1 + self.notes.index(note)) for note in row.caveats),
            )
            for row in published_results(self.depth, self.template, setting)
        ]

    @property
    def in_paper(self) -> bool:
        """Whether the paper has a detector with this network."""
        return any(row.who == PAPER for row in published_results(self.depth, self.template))

    @property
    def published_range(self) -> str:
        """The paper's AP, and the lowest and the highest of others with FPN, by their norms."""
        by_kind: dict[str, list[float]] = {}
        for row in published_results(self.depth, self.template):
            grouped = "GN" in (row.setting.norm or "")
            kind = f"FPN with {row.setting.norm}" if grouped else row.setting.neck or ""
            by_kind.setdefault("paper" if row.who == PAPER else kind, []).append(row.AP)
        kinds = [kind for kind in by_kind if kind == "paper" or kind.startswith("FPN")]
        return "; ".join(f"{kind} {_range(by_kind[kind])}" for kind in kinds) or "nothing"


def _range(numbers: Sequence[float]) -> str:
    return " to ".join(dict.fromkeys(f"{number:.1f}" for number in (min(numbers), max(numbers))))


def _model_name(depth: int, template: Template) -> str:
    return f"ResNet-{depth}" if str(template) == "1x64d" else f"ResNeXt-{depth} {template}"


def _short(weights: Entry) -> str:
    facts = [f"{weights.accuracy.top1:.1f} %"] if weights.accuracy else []
    facts += [] if weights.commercial else ["non-commercial"]
    return f"`{weights.name}`" + (f" ({', '.join(facts)})" if facts else "")


def _fits(weights: Entry, cfg: CfgNode) -> bool:
    try:
        check_config(Needs.of_entry(weights), cfg)
    except WeightsError:
        return False
    return True
