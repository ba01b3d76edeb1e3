"""Every LazyConfig says the same as the yaml beside it."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
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
TOYS = {TOY, "rpn_X_26_8x4d_C4_toy", "fast_rcnn_X_26_8x4d_C4_toy"}
PAPER = "faster_rcnn_X_50_32x4d_FPN_paper"


class ParametersOnMeta(TorchFunctionMode):
    """Builds models without the memory and the time of their weights.

    Unlike under `torch.device("meta")`, tensors made from numbers keep their values: anchors and
    pixel statistics.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.empty, torch.ones, torch.zeros) and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def light_model(config: CfgNode | DictConfig) -> nn.Module:
    with ParametersOnMeta():
        if isinstance(config, DictConfig):
            return instantiate(config.model)
        # `build_model` would then move the model to MODEL.DEVICE, which meta tensors refuse.
        return META_ARCH_REGISTRY.get(config.MODEL.META_ARCHITECTURE)(config)


def settings(value: Any) -> Any:
    """Turn the content of a module or a mapper into plain values that `==` compares."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        numbers = None if value.is_meta else value.tolist()
        return tuple(value.shape), str(value.dtype), value.requires_grad, numbers
    if isinstance(value, nn.Module):
        return type(value)  # compared on its own, see named_modules
    if isinstance(value, (Mapping, DictConfig)):
        plain = {key: settings(each) for key, each in value.items()}
        if "loss_box_reg" in plain:
            # From a yaml Detectron2 leaves the other loss out, so its weight is 1.
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
    """Return a module's attributes, with its hooks as a list of functions."""
    found = {key: value for key, value in vars(module).items() if key != "_modules"}
    before = found.pop("_load_state_dict_pre_hooks").values()
    after = found.pop("_load_state_dict_post_hooks").values()
    hooks = [*(hook.hook for hook in before), *after]
    return {**found, "hooks": [hook.__qualname__ for hook in hooks]}


def differences(first: nn.Module, second: nn.Module) -> list[str]:
    """Return what differs between two models, module by module; weights only by shape."""
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


def sgd(lazy: DictConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer as Detectron2's tool does."""
    own = lazy.optimizer.copy()
    own.params.model = model
    return instantiate(own)


def groups(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[dict[str, Any]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        {**group, "params": [names[id(parameter)] for parameter in group["params"]]}
        for group in optimizer.param_groups
    ]


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


def test_every_yaml_has_a_short_twin() -> None:
    twins = {path.stem: path for path in CONFIGS.glob("*.py") if not path.match("base_*")}
    assert sorted(twins) == model_zoo.names()
    for name in set(twins) - TOYS:
        assert len(twins[name].read_text().splitlines()) < 13
    for name in ("faster_rcnn_X_50", BASE, "Base-ResNeXt-FPN"):
        with pytest.raises(ConfigError, match=PAPER):
            model_zoo.get_lazy_config(name)


@pytest.mark.parametrize("name", model_zoo.names())
def test_twins_are_equal(name: str) -> None:
    cfg, lazy = model_zoo.get_config(name), model_zoo.get_lazy_config(name)
    of_cfg, of_lazy = light_model(cfg), light_model(lazy)
    assert list(of_cfg.state_dict()) == list(of_lazy.state_dict())
    assert not differences(of_cfg, of_lazy)

    optimizers = build_optimizer(cfg, of_cfg), sgd(lazy, of_lazy)
    assert type(optimizers[0]) is type(optimizers[1])
    assert groups(optimizers[0], of_cfg) == groups(optimizers[1], of_lazy)
    last = cfg.SOLVER.MAX_ITER
    assert lazy.train.max_iter == lazy.lr_multiplier.scheduler.num_updates == last
    near = {0, 1, 25, 49, 50, 51, 500, 999, 1000, 1001, 119_999, 120_001, 229, 231}
    near |= set(cfg.SOLVER.STEPS)
    of_cfg_rates, of_lazy_rates = rates(cfg, lazy, sorted(n for n in near if n < last))
    assert of_cfg_rates == of_lazy_rates
    assert len(set(of_cfg_rates)) > 5

    train = lazy.train
    assert train.eval_period == cfg.TEST.EVAL_PERIOD
    assert train.checkpointer.period == cfg.SOLVER.CHECKPOINT_PERIOD
    assert (train.seed, train.device) == (cfg.SEED, cfg.MODEL.DEVICE)
    assert train.amp.enabled is cfg.SOLVER.AMP.ENABLED is False
    assert (train.init_checkpoint, train.output_dir) == (cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR)
    common = Path(detectron2.__file__).parent / "model_zoo" / "configs" / "common" / "train.py"
    assert set(LazyConfig.load(str(common)).train) <= set(train)

    loader, test = lazy.dataloader.train, lazy.dataloader.test
    assert tuple(loader.dataset.names) == cfg.DATASETS.TRAIN
    assert (test.dataset.names,) == cfg.DATASETS.TEST
    assert lazy.dataloader.evaluator.dataset == test.dataset.names
    # A value that is left out has its default, which is that of the key.
    assert loader.dataset.get("filter_empty", True) is cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    assert test.dataset.filter_empty is False
    assert loader.get("aspect_ratio_grouping", True) is cfg.DATALOADER.ASPECT_RATIO_GROUPING
    assert ("sampler" in loader, cfg.DATALOADER.SAMPLER_TRAIN) == (False, "TrainingSampler")
    assert loader.total_batch_size == cfg.SOLVER.IMS_PER_BATCH
    assert loader.num_workers == test.num_workers == cfg.DATALOADER.NUM_WORKERS
    for each, is_train in ((loader, True), (test, False)):
        mapper, expected = instantiate(each.mapper), NamingDatasetMapper(cfg, is_train)
        assert type(mapper) is type(expected)
        assert settings(vars(mapper)) == settings(vars(expected))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("backbone.bottom_up.freeze_at", 1),
        ("proposal_generator.anchor_generator.sizes", [[32], [64], [128], [256], [500]]),
        ("roi_heads.proposal_matcher.thresholds", [0.6]),
        ("pixel_std", [1.0, 1.0, 1.0]),
    ],
)
def test_the_comparison_sees_a_wrong_value(key: str, value: object) -> None:
    right, wrong = model_zoo.get_lazy_config(PAPER), model_zoo.get_lazy_config(PAPER)
    OmegaConf.update(wrong.model, key, value)
    assert differences(light_model(right), light_model(wrong))


def test_norms_have_the_weight_decay_of_the_yaml() -> None:
    """The shipped configs train no norm, but a changed one may."""
    cfg, lazy = model_zoo.get_config(PAPER).clone(), model_zoo.get_lazy_config(PAPER)
    cfg.defrost()
    cfg.MODEL.RESNETS.NORM = lazy.model.backbone.bottom_up.norm = "GN"
    of_cfg, of_lazy = light_model(cfg), light_model(lazy)
    found = groups(build_optimizer(cfg, of_cfg), of_cfg)
    assert found == groups(sgd(lazy, of_lazy), of_lazy)
    assert {group["weight_decay"] for group in found} == {0.0, 0.0001}


def test_the_schedule_moves_with_max_iter() -> None:
    """As the base says: three values do what SOLVER.REFERENCE_WORLD_SIZE does."""
    cfg = DefaultTrainer.auto_scale_workers(model_zoo.get_config(PAPER), 4)
    lazy = model_zoo.get_lazy_config(PAPER)
    lazy.optimizer.lr, lazy.train.max_iter = cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER
    step = cfg.SOLVER.STEPS[0]
    of_cfg, of_lazy = rates(cfg, lazy, [0, 1, 1000, 4000, 9000, step - 1, step, step + 1])
    assert of_cfg == pytest.approx(of_lazy, rel=1e-12)


@pytest.fixture
def registered(datasets: Path) -> Iterator[None]:
    """Register the small toy data set in this process."""
    register_datasets(datasets)
    yield
    register_datasets(datasets_root())


def seeded_model(config: CfgNode | DictConfig) -> nn.Module:
    seed_all_rng(1)
    if isinstance(config, DictConfig):
        model: nn.Module = instantiate(config.model).to(config.train.device)
        return model
    return build_model(config)


def test_the_toy_twin_trains_as_its_yaml(registered: None) -> None:
    """Two iterations with Detectron2's loader give the same losses.

    This package's trainer has its own order of images.
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
            for batch, _ in zip(loader, range(2)):
                losses = model(batch)
                optimizer.zero_grad()
                sum(losses.values()).backward()
                optimizer.step()
                scheduler.step()
                files = [Path(record["file_name"]).name for record in batch]
                history.append((files, {name: loss.item() for name, loss in losses.items()}))
        histories.append(history)
    assert histories[0] == histories[1]
    assert [len(files) for files, _ in histories[1]] == [2, 2]


def test_detectron2s_own_tool_trains_and_evaluates(datasets: Path, tmp_path: Path) -> None:
    """tools/lazyconfig_train_net.py, which does not know this package."""
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
    # Figures and training log are both called metrics.json, in different folders.
    evaluated = json.loads((tmp_path / "inference" / "metrics.json").read_text())
    assert len(evaluated["datasets"]["toy_coco_minival"]["figures"]) == 12
    log = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert [entry["iteration"] for entry in log if "total_loss" in entry] == [0, 1]
    assert (tmp_path / "model_final.pth").is_file()
    # The run's config.yaml builds the same model.
    saved = LazyConfig.load(str(tmp_path / "config.yaml"))
    assert not differences(light_model(saved), light_model(model_zoo.get_lazy_config(TOY)))
    evaluator = instantiate(saved.dataloader.evaluator)
    assert isinstance(evaluator, DetectionEvaluator)
    assert evaluator.output == tmp_path / "inference"
