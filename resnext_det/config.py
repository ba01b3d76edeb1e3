"""The config keys of this package, and a reader of yaml configs that never runs code."""

from __future__ import annotations

import ast
import contextlib
import copy
import difflib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import detectron2.model_zoo
import torch
import yaml
from detectron2.config import CfgNode, get_cfg

from resnext_det.config_rules import (
    KNOWN_ARCHITECTURES,
    leaves,
    refuse,
    unread_because,
    value_of,
    wrong,
)
from resnext_det.errors import ConfigError, plain, quoted
from resnext_det.files import open_regular

Tree = dict[str, Any]

_MOST_BYTES = 2**20
_MOST_FILES = 32  # a config and its bases, each as often as it is named
_MOST_VALUES = 100_000
_RECIPE = "pretrain_"  # begins the name of a config of `resnext-det pretrain`


def add_resnext_config(cfg: CfgNode) -> None:
    """Add the keys of this package to a Detectron2 config, in place.

    None of them describes the shape of the network: MODEL.RESNETS does.
    """
    cfg.MODEL.RESNEXT = CfgNode()
    # Form of the blocks (the paper's Fig. 3): "grouped" (c), the fast one, "concatenated" (b) or
    # "aggregated" (a). All are the same function, and weights are converted on loading.
    cfg.MODEL.RESNEXT.FORM = "grouped"
    # Norm and ReLU before each convolution, as in the paper's ResNet-200 (1603.05027).
    cfg.MODEL.RESNEXT.PRE_ACTIVATION = False
    # In classifiers: False removes the blocks' shortcuts, for the paper's ablation (section 5.1).
    cfg.MODEL.RESNEXT.SHORTCUTS = True
    # Stages with activation checkpointing, such as ["res3", "res4"]: less memory, more time, the
    # same gradients. MODEL.RPN.HEAD_NAME "CheckpointedRPNHead" does the same for the RPN.
    cfg.MODEL.RESNEXT.CHECKPOINT_STAGES = []
    # Start the last norm of every block at 0, for training from scratch (1706.02677, section 5.1).
    cfg.MODEL.RESNEXT.ZERO_INIT_RESIDUAL = False
    # "fp32", "bf16" or "fp16" compute faster than Detectron2; "stock" computes as it does, bit for
    # bit. Only this package's commands, Trainer and Predictor read it, for any detector; other
    # programs call `modeling.fast.accelerate(model)`.
    cfg.MODEL.RESNEXT.PRECISION = "fp32"
    # Every published ResNeXt has its stride in the 3x3 convolution, so the backbone refuses
    # MODEL.RESNETS.STRIDE_IN_1X1 True (Detectron2's default) above cardinality 1
    # unless this is set.
    cfg.MODEL.RESNEXT.ALLOW_STRIDE_IN_1X1 = False
    # Evaluate, demonstrate or resume a detector under settings that change what it computes, such
    # as other pixel statistics or anchors than those its checkpoint records; or resume its training
    # in another precision.
    cfg.MODEL.RESNEXT.ALLOW_OTHER_FUNCTION = False
    # Image classification, `resnext-det pretrain`. The layout of the data: "folder" (torchvision's
    # ImageFolder: DATA/SPLIT/CLASS/IMAGE), "cifar10" or "cifar100" (the official files), or "coco"
    # (crops of the objects of a detection data set). DATASETS.TRAIN and TEST name the splits.
    cfg.CLASSIFICATION = CfgNode({"LAYOUT": "folder", "DATA": ""})
    # With "folder", a file that lists the class folders to take, one a line; "" takes all.
    cfg.CLASSIFICATION.SYNSETS = ""
    # The command sets it from the data.
    cfg.CLASSIFICATION.NUM_CLASSES = 1000
    # In training: "inception" (random area and aspect ratio), "padded" (random place after padding)
    # or "none"; the side of the crop, also in tests; jitter of brightness, contrast and saturation;
    # noise along the principal components of colour. INPUT.RANDOM_FLIP flips.
    cfg.CLASSIFICATION.AUGMENTATION = "inception"
    cfg.CLASSIFICATION.CROP = 224
    cfg.CLASSIFICATION.COLOR_JITTER = 0.4
    cfg.CLASSIFICATION.LIGHTING = 0.1
    # In tests, the shorter side before the central crop.
    cfg.CLASSIFICATION.RESIZE = 256
    # The rest is read by this package's trainer only.
    # In classification: passes over the training images; SOLVER.MAX_ITER, STEPS, WARMUP_ITERS,
    # CHECKPOINT_PERIOD and TEST.EVAL_PERIOD are stretched in proportion (periods to a pass or
    # more). 0 leaves them alone.
    cfg.SOLVER.MAX_EPOCHS = 0.0
    # On another number of processes than REFERENCE_WORLD_SIZE: "accumulate" gradients over its
    # micro-batches (the same images per update, the same learning rate, the same iterations),
    # "linear" (Detectron2's rule: batch, learning rate, iterations and periods), or "none".
    cfg.SOLVER.SCALING = "accumulate"
    # Images per micro-batch, to save memory; 0 leaves it to SCALING.
    cfg.SOLVER.IMS_PER_MICRO_BATCH = 0
    # How many of its micro-batches a process computes at once. Above 1, a large GPU is used better,
    # but images are padded to a common size and sampled with other random numbers.
    cfg.SOLVER.MICRO_BATCHES_PER_PASS = 1
    # Add the gradients of micro-batches in their own order, so that an update has the same bits on
    # any number of processes. Batch norms' statistics and RetinaNet's normalizer then are means
    # over micro-batches.
    cfg.SOLVER.EXACT_SUM = False
    # The linear rule: learning rate per image of a batch. Twice this or more causes a warning.
    cfg.SOLVER.LR_PER_IMAGE = 0.02 / 16
    # With SOLVER.AMP.ENABLED: "float16" (GPU only) or "bfloat16".
    cfg.SOLVER.AMP.PRECISION = "float16"
    # How many updates with a non-finite loss to skip before aborting.
    cfg.SOLVER.SKIP_BAD_UPDATES = 0
    # How many periodic checkpoints to keep, besides the best and the final one; 0 keeps all.
    cfg.SOLVER.KEEP_LAST = 5
    # A moving average of the weights, saved and evaluated with them.
    cfg.SOLVER.EMA = CfgNode({"ENABLED": False, "DECAY": 0.9998})
    # "fast" decodes JPEGs with simplejpeg and enlarges images with OpenCV, "pillow" does both as
    # Detectron2 does. Pixels differ by 1 of 255 at most.
    cfg.DATALOADER.DECODER = "fast"
    # On an image that cannot be read: "stop", or "skip", which counts and reports it.
    cfg.DATALOADER.BAD_IMAGES = "stop"
    # The metric of the best checkpoint, such as "bbox/AP" or "bbox/AP50" ("" for none), and how
    # many evaluations without a better one end the training (0 for never).
    cfg.TEST.BEST = CfgNode({"METRIC": "bbox/AP", "PATIENCE": 0})
    # Which library computes COCO's figures: "hotcoco", or "pycocotools", about a hundred times
    # slower. CROSS_CHECK runs both, and makes any difference an error.
    cfg.TEST.ENGINE = "hotcoco"
    cfg.TEST.CROSS_CHECK = False
    # Compute the losses on the first data set of DATASETS.TEST with each evaluation.
    cfg.TEST.VALIDATION_LOSS = False
    # Weights & Biases, besides metrics.jsonl and TensorBoard; needs `pip install wandb`.
    cfg.WANDB = CfgNode({"ENABLED": False, "PROJECT": "resnext_det"})


def complete(cfg: CfgNode) -> CfgNode:
    """Return a config with the default of every key that it lacks.

    Configs of Detectron2's model zoo lack all keys of this package, older configs some.

    Returns:
        The config itself if it is complete, else a copy, frozen if `cfg` is.
    """
    if all(value_of(cfg, key) is not None or default is None for key, default in _DEFAULTS.items()):
        return cfg
    full: CfgNode = cfg.clone()
    full.defrost()
    for key, default in _DEFAULTS.items():
        node, name = _parent(full, key)
        node.setdefault(name, copy.deepcopy(default))
    if cfg.is_frozen():
        full.freeze()
    return full


def _parent(cfg: CfgNode, key: str) -> tuple[CfgNode, str]:
    """Return the group of a key, created if missing, and the key's name in it."""
    *path, name = key.split(".")
    for part in path:
        cfg = cfg.setdefault(part, CfgNode())
    return cfg, name


def _all_keys() -> CfgNode:
    cfg = get_cfg()
    add_resnext_config(cfg)
    return cfg


_DEFAULTS: dict[str, Any] = dict(leaves(_all_keys()))


def load_config(file: str | Path, overrides: Sequence[str] = ()) -> CfgNode:
    """Read a yaml config, apply overrides and freeze it.

    MODEL.DEVICE "cuda" becomes "cpu" if there is no GPU. A single number or name becomes a list of
    one where a list is expected.

    Args:
        file: a path, or the name of a shipped config (see `resnext_det.model_zoo.names`), or of one
            of Detectron2's, such as "COCO-Detection/retinanet_R_50_FPN_1x.yaml".
        overrides: KEY, VALUE, KEY, VALUE, ... as on the command line.

    Raises:
        ConfigError: the file is missing or not a config, or keys or values are refused; the
            error names all of them.
    """
    return config_of(read_config(locate_config(file)), overrides)


def config_of(values: Tree, overrides: Sequence[str] = ()) -> CfgNode:
    """Return a frozen config of the values of `read_config` or `parse_config`; see `load_config`.

    Raises:
        ConfigError: as for `load_config`.
    """
    if len(overrides) % 2:
        raise ConfigError(
            f"overrides come in pairs, KEY VALUE, and these are {len(overrides)} words: "
            f"{quoted(' '.join(overrides))}"
        )
    given = dict(leaves(values))
    given.update(zip(overrides[::2], overrides[1::2]))
    cfg, problems = _all_keys(), []
    for key, value in given.items():
        if key in _DEFAULTS:
            value = _fitted(value, _DEFAULTS[key])
            problems.append(wrong(key, value))
            node, name = _parent(cfg, key)
            node[name] = value
        elif isinstance(value_of(cfg, key), CfgNode):
            problems.append(f"{key} is a group of keys, and {quoted(value)} is a single value.")
        else:
            nearest = difflib.get_close_matches(key[:200], list(_DEFAULTS), n=1, cutoff=0.5)
            hint = f"; did you mean {nearest[0]}?" if nearest else "."
            problems.append(f"there is no config key {plain(key)}{hint}")
    refuse(*problems)
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    cfg.freeze()
    return cfg


def _fitted(value: Any, default: Any) -> Any:
    """Convert a value to the type of the default where its meaning is clear."""
    if isinstance(value, str):  # from the command line, or a tuple in yaml
        read = value
        with contextlib.suppress(ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            read = ast.literal_eval(value)
        if isinstance(default, str) and read is not None and not isinstance(read, str):
            return value  # a folder called 2024
        value = read
    if isinstance(default, float) and type(value) is int and abs(value) < 2**53:
        return float(value)
    if isinstance(default, list | tuple):
        if isinstance(value, list | tuple):
            return type(default)(value)
        kinds = (str,) if not default or isinstance(default[0], str) else (int, float)
        # Lists of two to four are coordinates, channels or stages: one value alone is a mistake.
        if isinstance(value, kinds) and type(value) is not bool and len(default) not in (2, 3, 4):
            return type(default)([value])
    return value


def idle_settings(cfg: CfgNode) -> dict[str, str]:
    """Return the changed settings that nothing reads.

    Returns:
        By key, the key that would have to be set differently for it to be read. Empty for an
        architecture that is not Detectron2's.
    """
    cfg = complete(cfg)
    if cfg.MODEL.META_ARCHITECTURE not in KNOWN_ARCHITECTURES:
        return {}
    changed = [
        key for key, default in _DEFAULTS.items() if _listed(value_of(cfg, key)) != _listed(default)
    ]
    decides = {key: unread_because(cfg, key) for key in changed}
    return {key: reason for key, reason in decides.items() if reason is not None}


def _listed(value: Any) -> Any:
    """Return a value without tuples, which a dumped config does not keep inside of tuples."""
    return [_listed(each) for each in value] if isinstance(value, list | tuple) else value


def idle_warning(cfg: CfgNode) -> str | None:
    """Return one line about settings that have no effect, or None; see `idle_settings`."""
    idle = idle_settings(cfg)
    if not idle:
        return None
    shown = ", ".join(
        f"{key} (see {decides})" if decides else key for key, decides in list(idle.items())[:5]
    )
    more = f" and {len(idle) - 5} more" if len(idle) > 5 else ""
    return f"these settings have no effect in this config: {shown}{more}"


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which also reads the one expression of Detectron2's own configs."""


_RETINANET_SIZES = "[[x, x * 2**(1.0/3), x * 2**(2.0/3) ] for x in [32, 64, 128, 256, 512 ]]"


def _anchor_sizes(loader: _Loader, node: Any) -> list[list[float]]:
    """Return the value of the expression in Base-RetinaNet.yaml."""
    if loader.construct_sequence(node) != [_RETINANET_SIZES]:
        raise yaml.YAMLError("!!python/object/apply:eval would run code: write the values out")
    return [[x, x * 2 ** (1.0 / 3), x * 2 ** (2.0 / 3)] for x in (32, 64, 128, 256, 512)]


_Loader.add_constructor("tag:yaml.org,2002:python/object/apply:eval", _anchor_sizes)


def parse_config(text: str, name: str) -> Tree:
    """Read the text of one yaml config.

    Args:
        text: any content.
        name: of the text in errors, fit to print.

    Returns:
        The values, nested as in the text, `_BASE_` included.

    Raises:
        ConfigError: not yaml of keys and values, or yaml that would run code.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if _size(node, {}) > _MOST_VALUES:
            raise yaml.YAMLError(f"more than {_MOST_VALUES:,} values once aliases are expanded")
        values = loader.construct_document(node) if node else {}
        if isinstance(values, dict):
            return values
        problem = "it must hold keys and values, such as SOLVER: {BASE_LR: 0.02}."
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError) as error:
        problem = quoted(error)
    raise ConfigError(f"{name} cannot be read as a config: {problem}")


def _size(node: Any, known: dict[int, float]) -> float:
    """Return the number of values in a node with aliases expanded; infinite if it holds itself."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = math.inf  # while it is counted: to meet it now is to be inside it
        parts = [part for each in node.value for part in (each if type(each) is tuple else [each])]
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(node)]


def read_config(file: Path, _opened: list[Path] | None = None) -> Tree:
    """Read a yaml config and its bases.

    Args:
        file: the config. Its `_BASE_` names a file, or a list of them, relative to its own folder
            or among Detectron2's configs, such as "COCO-Detection/retinanet_R_50_FPN_1x.yaml".

    Returns:
        The values, nested as in the files; a file's values replace those of its bases.

    Raises:
        ConfigError: a file is missing, too large or not a config, or `_BASE_` is an address.
    """
    opened = [] if _opened is None else _opened
    opened.append(file)
    if len(opened) > _MOST_FILES:
        raise ConfigError(f"{quoted(file)}: more than {_MOST_FILES} bases; does one name itself?")
    try:
        with open_regular(file) as stream:
            content = stream.read(_MOST_BYTES + 1)
        text = content.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{quoted(file)} cannot be read as a config: {quoted(error)}") from error
    if len(content) > _MOST_BYTES:
        raise ConfigError(f"{quoted(file)} is not a config: over {_MOST_BYTES:,} bytes.")
    values = parse_config(text, quoted(file))
    bases = values.pop("_BASE_", [])
    merged: Tree = {}
    for base in bases if isinstance(bases, list) else [bases]:
        _overlay(read_config(_locate_base(base, file), opened), merged)
    _overlay(values, merged)
    return merged


def _locate_base(base: object, file: Path) -> Path:
    problem = "there is no such file, neither beside it nor among Detectron2's configs."
    with contextlib.suppress(RuntimeError, OSError, ValueError):  # a name that no file can have
        if not isinstance(base, str) or not base:
            problem = "it must be the path of a yaml file, or a list of paths."
        elif "://" in base:
            problem = "configs are not fetched: download the file and name its path."
        elif (beside := file.parent / Path(base).expanduser()).is_file():
            return beside
        else:
            return Path(detectron2.model_zoo.get_config_file(base))
    raise ConfigError(f"{quoted(file)}: _BASE_ is {quoted(base)}; {problem}")


def _overlay(values: Mapping[str, Any], under: Tree) -> None:
    """Put values over those of a base, in place."""
    for name, value in values.items():
        if isinstance(value, dict) and isinstance(under.get(name), dict):
            _overlay(value, under[name])
        else:
            under[name] = value


def locate_config(file: str | Path) -> Path:
    """Return the path of a config, given its path or the name of a shipped one or Detectron2's.

    Raises:
        ConfigError: it is neither.
    """
    with contextlib.suppress(ValueError, OSError):  # a name that no file can have
        if Path(file).is_file():
            return Path(file)
    if str(file).endswith(".yaml"):
        with contextlib.suppress(RuntimeError, ValueError, OSError):
            return Path(detectron2.model_zoo.get_config_file(str(file)))
    name = str(file).removeprefix("configs/").removesuffix(".yaml")
    return shipped_config(name)


def shipped_names() -> list[str]:
    """Return the names of the shipped configs, sorted, without the Base configs."""
    found = (path.stem for path in _folder().glob("*.yaml"))
    return sorted(name for name in found if not name.startswith(("Base-", _RECIPE)))


def recipe(name: str) -> Path:
    """Return the config of a recipe of `resnext-det pretrain`.

    Raises:
        ConfigError: there is no such recipe.
    """
    found = {path.stem.removeprefix(_RECIPE): path for path in _folder().glob(f"{_RECIPE}*.yaml")}
    if name in found:
        return found[name]
    raise ConfigError(f"there is no recipe {quoted(name)}; choose {', '.join(sorted(found))}.")


def shipped_config(name: str) -> Path:
    """Return the path of a shipped config.

    Args:
        name: one of `shipped_names()`, such as "faster_rcnn_X_50_32x4d_FPN_paper".

    Raises:
        ConfigError: there is no such config.
    """
    if name in shipped_names():
        return _folder() / f"{name}.yaml"
    raise ConfigError(
        f"there is no config {quoted(name)}. Name a file, or a shipped config: "
        f"{', '.join(shipped_names())}"
    )


def _folder() -> Path:
    """Return the folder of the configs: in the installed package, or beside it in a checkout."""
    here = Path(__file__).resolve().parent
    for folder in (here / "configs", here.parent / "configs"):
        if (folder / "Base-ResNeXt-FPN.yaml").is_file():
            return folder
    raise ConfigError(f"the configs of resnext_det are missing beside {here}; install it again.")
