"""Every LazyConfig says what the yaml beside it says."""

from __future__ import annotations

import builtins
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import detectron2
import pytest
import torch
from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.data import build_detection_train_loader
from detectron2.engine import DefaultTrainer
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.solver import LRMultiplier, build_lr_scheduler, build_optimizer
from detectron2.structures import Boxes, Instances
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from resnext_det import model_zoo
from resnext_det.data.mapper import NamingDatasetMapper
from resnext_det.data.registered import datasets_root, register_datasets
from resnext_det.errors import ConfigError
from resnext_det.evaluation.evaluator import DetectionEvaluator

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
BASE = "base_resnext_fpn"
TOY = "faster_rcnn_X_26_8x4d_FPN_toy"
PAPER = "faster_rcnn_X_50_32x4d_FPN_paper"


class ParametersOnMeta(TorchFunctionMode):
    """Builds models without the memory and the time of their weights.

    Unlike under `torch.device("meta")`, what is made of numbers keeps its values: anchors and
    pixel statistics.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.empty, torch.ones, torch.zeros) and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


@dataclass(frozen=True)
class Twins:
    """A yaml and its LazyConfig, and the model of each."""

    cfg: CfgNode
    lazy: DictConfig
    of_cfg: nn.Module
    of_lazy: nn.Module


def light_model(config: CfgNode | DictConfig) -> nn.Module:
    with ParametersOnMeta():
        if isinstance(config, DictConfig):
            return instantiate(config.model)
        # `build_model` would then move the model to MODEL.DEVICE, which meta tensors refuse.
        return META_ARCH_REGISTRY.get(config.MODEL.META_ARCHITECTURE)(config)


@pytest.fixture(scope="module", params=model_zoo.names())
def twins(request: pytest.FixtureRequest) -> Twins:
    cfg, lazy = model_zoo.get_config(request.param), model_zoo.get_lazy_config(request.param)
    return Twins(cfg, lazy, light_model(cfg), light_model(lazy))


def settings(value: Any) -> Any:
    """Turn whatever a module or a mapper holds into plain values that `==` compares."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        numbers = None if value.is_meta else value.tolist()
        return tuple(value.shape), str(value.dtype), value.requires_grad, numbers
    if isinstance(value, nn.Module):
        return type(value)  # it has its own turn in named_modules
    if isinstance(value, (Mapping, DictConfig)):
        plain = {key: settings(each) for key, each in value.items()}
        if "loss_box_reg" in plain:
            # Detectron2 leaves the other loss out where it reads a yaml; its weight is then 1.
            plain.setdefault("loss_cls", 1.0)
        return plain
    if isinstance(value, (list, tuple, ListConfig)):
        return [settings(each) for each in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, type) or inspect.isroutine(value) or not hasattr(value, "__dict__"):
        return getattr(value, "__qualname__", repr(value))
    return type(value), settings(vars(value))


def attributes(module: nn.Module) -> dict[str, Any]:
    """Return a module's attributes; of its hooks, numbered as they come, the functions."""
    found = {key: value for key, value in vars(module).items() if key != "_modules"}
    before = found.pop("_load_state_dict_pre_hooks").values()
    after = found.pop("_load_state_dict_post_hooks").values()
    hooks = [*(hook.hook for hook in before), *after]
    return {**found, "hooks": [hook.__qualname__ for hook in hooks]}


def differences(first: nn.Module, second: nn.Module) -> list[str]:
    """Return what differs between two models, module by module; weights by shape alone."""
    modules, others = dict(first.named_modules()), dict(second.named_modules())
    found = [f"{name}: in one only" for name in modules.keys() ^ others.keys()]
    for name in modules.keys() & others.keys():
        one, other = modules[name], others[name]
        if type(one) is not type(other):
            found.append(f"{name}: {type(one)} and {type(other)}")
        held, held_too = (
            {key: settings(value) for key, value in attributes(each).items()}
            for each in (one, other)
        )
        for key in held.keys() | held_too.keys():
            if key not in held or key not in held_too or held[key] != held_too[key]:
                found.append(f"{name}.{key}: {held.get(key)} and {held_too.get(key)}")
    return found


def test_every_yaml_has_a_twin_and_every_twin_a_yaml() -> None:
    assert sorted({path.stem for path in CONFIGS.glob("*.py")} - {BASE}) == model_zoo.names()


def test_a_twin_says_only_what_differs() -> None:
    for name in set(model_zoo.names()) - {TOY}:
        assert len((CONFIGS / f"{name}.py").read_text().splitlines()) < 10


def test_both_have_the_same_tensors(twins: Twins) -> None:
    tensors, others = twins.of_cfg.state_dict(), twins.of_lazy.state_dict()
    assert list(tensors) == list(others)
    assert [each.shape for each in tensors.values()] == [each.shape for each in others.values()]
    trained, trained_too = (
        [name for name, each in model.named_parameters() if each.requires_grad]
        for model in (twins.of_cfg, twins.of_lazy)
    )
    assert trained == trained_too


def test_both_have_the_same_modules(twins: Twins) -> None:
    assert not differences(twins.of_cfg, twins.of_lazy)


@pytest.fixture(scope="module")
def right() -> nn.Module:
    return light_model(model_zoo.get_lazy_config(PAPER))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("backbone.bottom_up.depth", 101),
        ("backbone.bottom_up.template", "64x4d"),
        ("backbone.bottom_up.freeze_at", 1),
        ("backbone.bottom_up.norm", "BN"),
        ("backbone.bottom_up.stride_in_1x1", True),
        ("backbone.bottom_up.checkpoint_stages", ["res4"]),
        ("backbone.fuse_type", "avg"),
        ("proposal_generator.in_features", ["p2", "p3", "p4", "p5"]),
        ("proposal_generator.anchor_generator.sizes", [[32], [64], [128], [256], [500]]),
        ("proposal_generator.anchor_generator.strides", [4, 8, 16, 32, 32]),
        ("proposal_generator.anchor_generator.offset", 0.5),
        ("proposal_generator.anchor_matcher.thresholds", [0.3, 0.6]),
        ("proposal_generator.anchor_matcher.allow_low_quality_matches", False),
        ("proposal_generator.box2box_transform.weights", [1.0, 1.0, 1.0, 2.0]),
        ("proposal_generator.batch_size_per_image", 128),
        ("proposal_generator.positive_fraction", 0.25),
        ("proposal_generator.pre_nms_topk", [2000, 2000]),
        ("proposal_generator.post_nms_topk", [2000, 1000]),
        ("proposal_generator.nms_thresh", 0.6),
        ("proposal_generator.smooth_l1_beta", 0.1),
        ("proposal_generator.loss_weight", 2.0),
        ("roi_heads.batch_size_per_image", 256),
        ("roi_heads.proposal_matcher.thresholds", [0.6]),
        ("roi_heads.box_pooler.sampling_ratio", 2),
        ("roi_heads.box_pooler.pooler_type", "ROIAlign"),
        ("roi_heads.box_predictor.box2box_transform.weights", [1.0, 1.0, 1.0, 1.0]),
        ("roi_heads.box_predictor.test_score_thresh", 0.0),
        ("roi_heads.box_predictor.test_nms_thresh", 0.6),
        ("roi_heads.box_predictor.test_topk_per_image", 300),
        ("roi_heads.box_predictor.loss_weight", 2.0),
        ("pixel_mean", [123.675, 116.280, 103.530]),
        ("pixel_std", [1.0, 1.0, 1.0]),
        ("input_format", "RGB"),
    ],
)
def test_the_comparison_sees_a_wrong_value(right: nn.Module, key: str, value: object) -> None:
    lazy = model_zoo.get_lazy_config(PAPER)
    OmegaConf.update(lazy.model, key, value)
    assert differences(right, light_model(lazy))


def sgd(lazy: DictConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer as Detectron2's tool does."""
    own = lazy.optimizer.copy()
    own.params.model = model
    return instantiate(own)


def test_both_have_the_same_optimizer(twins: Twins) -> None:
    described = []
    for optimizer, model in (
        (build_optimizer(twins.cfg, twins.of_cfg), twins.of_cfg),
        (sgd(twins.lazy, twins.of_lazy), twins.of_lazy),
    ):
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        groups = [
            {**group, "params": [names[id(parameter)] for parameter in group["params"]]}
            for group in optimizer.param_groups
        ]
        described.append((type(optimizer), groups))
    assert described[0] == described[1]


@pytest.mark.parametrize("norm", ["BN", "GN"])
def test_norms_have_the_weight_decay_of_the_yaml(norm: str) -> None:
    """The shipped configs train no norm; one that does must not come out otherwise."""
    cfg, lazy = model_zoo.get_config(PAPER).clone(), model_zoo.get_lazy_config(PAPER)
    cfg.defrost()
    cfg.MODEL.RESNETS.NORM = lazy.model.backbone.bottom_up.norm = norm
    groups = [
        [(group["weight_decay"], len(group["params"])) for group in optimizer.param_groups]
        for optimizer in (
            build_optimizer(cfg, light_model(cfg)),
            sgd(lazy, light_model(lazy)),
        )
    ]
    assert groups[0] == groups[1]
    assert {decay for decay, _ in groups[0]} == {0.0, 0.0001}


def rates(cfg: CfgNode, lazy: DictConfig, iterations: list[int]) -> tuple[list[float], list[float]]:
    """Return the learning rates of both before these iterations."""
    weight = nn.Parameter(torch.zeros(1))
    optimizers = [
        torch.optim.SGD([weight], lr=rate) for rate in (cfg.SOLVER.BASE_LR, lazy.optimizer.lr)
    ]
    schedulers = [
        build_lr_scheduler(cfg, optimizers[0]),
        LRMultiplier(optimizers[1], instantiate(lazy.lr_multiplier), lazy.train.max_iter),
    ]
    found: tuple[list[float], list[float]] = [], []
    for scheduler, rate in zip(schedulers, found):
        for iteration in iterations:
            scheduler.last_epoch = iteration
            rate += scheduler.get_lr()
    return found


def test_both_have_the_same_learning_rate_in_every_iteration(twins: Twins) -> None:
    last = twins.cfg.SOLVER.MAX_ITER
    assert twins.lazy.train.max_iter == last
    assert twins.lazy.lr_multiplier.scheduler.num_updates == last
    near = [0, 1, 2, 25, 49, 50, 51, 500, 999, 1000, 1001, *twins.cfg.SOLVER.STEPS, last]
    near += [119_999, 120_001, 150_000, 229, 231]
    of_cfg, of_lazy = rates(twins.cfg, twins.lazy, sorted(n for n in near if n < last))
    assert of_cfg == of_lazy
    assert len(set(of_cfg)) > 5


def test_the_papers_learning_rates() -> None:
    lazy = model_zoo.get_lazy_config(PAPER)
    _, rate = rates(model_zoo.get_config(PAPER), lazy, [1000, 119_999, 120_000, 179_999])
    assert rate == pytest.approx([0.02, 0.02, 0.002, 0.002])


@pytest.mark.parametrize("gpus", [1, 4])
def test_the_schedule_moves_with_max_iter(gpus: int) -> None:
    """As the base says: three values do what SOLVER.REFERENCE_WORLD_SIZE does."""
    cfg = DefaultTrainer.auto_scale_workers(model_zoo.get_config(PAPER), gpus)
    lazy = model_zoo.get_lazy_config(PAPER)
    lazy.optimizer.lr, lazy.train.max_iter = cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER
    step = cfg.SOLVER.STEPS[0]
    of_cfg, of_lazy = rates(cfg, lazy, [0, 1, 1000, 4000, 9000, step - 1, step, step + 1])
    assert of_cfg == pytest.approx(of_lazy, rel=1e-12)


def test_both_run_the_same_way(twins: Twins) -> None:
    cfg, train = twins.cfg, twins.lazy.train
    assert train.eval_period == cfg.TEST.EVAL_PERIOD
    assert train.checkpointer.period == cfg.SOLVER.CHECKPOINT_PERIOD
    assert train.seed == cfg.SEED
    assert train.device == cfg.MODEL.DEVICE
    assert train.amp.enabled is cfg.SOLVER.AMP.ENABLED is False
    assert (train.init_checkpoint, train.output_dir) == (cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR)
    common = LazyConfig.load(
        str(Path(detectron2.__file__).parent / "model_zoo" / "configs" / "common" / "train.py")
    ).train
    assert set(common) <= set(train)
    assert train.ddp == common.ddp


def test_both_read_the_same_data(twins: Twins) -> None:
    cfg, train, test = twins.cfg, twins.lazy.dataloader.train, twins.lazy.dataloader.test
    assert tuple(train.dataset.names) == cfg.DATASETS.TRAIN
    assert (test.dataset.names,) == cfg.DATASETS.TEST
    assert twins.lazy.dataloader.evaluator.dataset == test.dataset.names
    # What is left out has its default, which is that of the key.
    assert train.dataset.get("filter_empty", True) is cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    assert test.dataset.filter_empty is False
    assert train.get("aspect_ratio_grouping", True) is cfg.DATALOADER.ASPECT_RATIO_GROUPING
    assert "sampler" not in train
    assert cfg.DATALOADER.SAMPLER_TRAIN == "TrainingSampler"
    assert train.total_batch_size == cfg.SOLVER.IMS_PER_BATCH
    assert train.num_workers == test.num_workers == cfg.DATALOADER.NUM_WORKERS
    for loader, is_train in ((train, True), (test, False)):
        mapper = instantiate(loader.mapper)
        expected = NamingDatasetMapper(cfg, is_train)
        assert type(mapper) is type(expected)
        assert settings(vars(mapper)) == settings(vars(expected))


def test_two_loads_are_independent_and_leave_nothing_behind() -> None:
    before, importing = set(sys.modules), builtins.__import__
    changed = model_zoo.get_lazy_config(PAPER)
    changed.model.backbone.out_channels = 64
    del changed.model.roi_heads.box_head
    assert model_zoo.get_lazy_config(PAPER).model.backbone.out_channels == 256
    assert "box_head" in model_zoo.get_lazy_config(PAPER).model.roi_heads
    assert builtins.__import__ is importing
    assert not [name for name in set(sys.modules) - before if "resnext_fpn" in name]


def test_an_unknown_name_lists_the_known_ones() -> None:
    for name in ("faster_rcnn_X_50", BASE, "Base-ResNeXt-FPN"):
        with pytest.raises(ConfigError, match=PAPER):
            model_zoo.get_lazy_config(name)


def seeded_model(config: CfgNode | DictConfig) -> nn.Module:
    seed_all_rng(1)
    if isinstance(config, DictConfig):
        model: nn.Module = instantiate(config.model).to(config.train.device)
        return model
    return build_model(config)


def test_one_seed_gives_both_the_same_weights_and_losses() -> None:
    models = [
        seeded_model(model_zoo.get_config(TOY)),
        seeded_model(model_zoo.get_lazy_config(TOY)),
    ]
    tensors, others = (model.state_dict() for model in models)
    assert all(torch.equal(tensors[name], others[name]) for name in tensors | others)
    truth = Instances((192, 256))
    truth.gt_boxes = Boxes(torch.tensor([[20.0, 30.0, 90.0, 110.0], [120.0, 40.0, 180.0, 90.0]]))
    truth.gt_classes = torch.tensor([1, 4])
    image = torch.randint(0, 256, (3, 192, 256), dtype=torch.uint8)
    losses = []
    for model in models:
        seed_all_rng(2)
        with EventStorage():
            losses.append(model([{"image": image, "instances": truth}]))
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4
    assert all(loss > 0 for loss in losses[0].values())


@pytest.fixture
def registered(datasets: Path) -> Iterator[None]:
    """The small toy data as the one that is registered in this process."""
    register_datasets(datasets)
    yield
    register_datasets(datasets_root())


def test_the_toy_twin_trains_as_its_yaml(registered: None) -> None:
    """Three iterations on the toy data, both from Detectron2's loader, give the same losses.

    This package's trainer has a stream of its own, in another order.
    """
    cfg, lazy = model_zoo.get_config(TOY).clone(), model_zoo.get_lazy_config(TOY)
    cfg.defrost()
    cfg.SOLVER.IMS_PER_BATCH = lazy.dataloader.train.total_batch_size = 2  # to save time
    histories = []
    for config in (cfg, lazy):
        model = seeded_model(config).train()
        if config is cfg:
            optimizer = build_optimizer(cfg, model)
            scheduler = build_lr_scheduler(cfg, optimizer)
            loader = build_detection_train_loader(cfg, mapper=NamingDatasetMapper(cfg, True))
        else:
            optimizer = sgd(lazy, model)
            multiplier = instantiate(lazy.lr_multiplier)
            scheduler = LRMultiplier(optimizer, multiplier, lazy.train.max_iter)
            loader = instantiate(lazy.dataloader.train)
        history = []
        with EventStorage():
            for batch, _ in zip(loader, range(3)):
                losses = model(batch)
                optimizer.zero_grad()
                sum(losses.values()).backward()
                optimizer.step()
                scheduler.step()
                files = [Path(record["file_name"]).name for record in batch]
                history.append((files, {name: loss.item() for name, loss in losses.items()}))
        histories.append(history)
    assert histories[0] == histories[1]
    assert [len(files) for files, _ in histories[1]] == [2, 2, 2]


def test_detectron2s_own_tool_trains_and_evaluates(datasets: Path, tmp_path: Path) -> None:
    """tools/lazyconfig_train_net.py, which knows nothing of this package."""
    script = Path(detectron2.__file__).parent.parent / "tools" / "lazyconfig_train_net.py"
    if not script.is_file():
        pytest.skip("this Detectron2 was installed without its tools")
    arguments = [
        *["--config-file", str(CONFIGS / f"{TOY}.py"), f"train.output_dir={tmp_path}"],
        *["train.max_iter=2", "train.log_period=1", "dataloader.train.total_batch_size=2"],
    ]
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        env={**os.environ, "DETECTRON2_DATASETS": str(datasets)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    # The figures and the training log, both called metrics.json, stand in each other's way nowhere.
    evaluated = json.loads((tmp_path / "inference" / "metrics.json").read_text())
    assert len(evaluated["datasets"]["toy_coco_minival"]["figures"]) == 12
    log = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert [entry["iteration"] for entry in log if "total_loss" in entry] == [0, 1]
    assert (tmp_path / "model_final.pth").is_file()
    # The run's own config.yaml builds again.
    saved = LazyConfig.load(str(tmp_path / "config.yaml"))
    assert not differences(light_model(saved), light_model(model_zoo.get_lazy_config(TOY)))
    evaluator = instantiate(saved.dataloader.evaluator)
    assert isinstance(evaluator, DetectionEvaluator)
    assert evaluator.output == tmp_path / "inference"
