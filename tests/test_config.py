"""Configs: read as data, every key honoured, refused, or said to have no effect."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import detectron2.model_zoo
import pytest
import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.modeling import build_model

from resnext_det import add_resnext_config, load_config, model_zoo
from resnext_det.config import complete, idle_settings, idle_warning, read_config
from resnext_det.config_rules import RULES, refuse_impossible, value_of
from resnext_det.engine.trainer import Trainer
from resnext_det.errors import ConfigError

TOY = "faster_rcnn_X_26_8x4d_FPN_toy"
PAPER = "faster_rcnn_X_50_32x4d_FPN_paper"
ZOO = Path(detectron2.model_zoo.get_config_file("Base-RetinaNet.yaml")).parent
RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"

# By config: depth, groups, width, and the parameters that Detectron2's own builder gives (FrozenBN
# has none).
SHIPPED = {
    "faster_rcnn_R_50_FPN_paper": (50, 1, 64, 41_699_936),
    "faster_rcnn_R_101_FPN_paper": (101, 1, 64, 60_639_840),
    "faster_rcnn_X_50_32x4d_FPN_paper": (50, 32, 4, 41_156_704),
    "faster_rcnn_X_101_32x4d_FPN_paper": (101, 32, 4, 60_235_872),
    "faster_rcnn_X_101_64x4d_FPN_paper": (101, 64, 4, 99_448_416),
    "faster_rcnn_X_101_32x8d_FPN_paper": (101, 32, 8, 104_784_480),
    **{f"faster_rcnn_X_50_32x4d_FPN_{end}": (50, 32, 4, 41_156_704) for end in ("1x", "3x", "128")},
    **{f"faster_rcnn_X_101_32x4d_FPN_{end}": (101, 32, 4, 60_235_872) for end in ("1x", "3x")},
    "faster_rcnn_X_26_8x4d_FPN_toy": (26, 8, 4, 2_107_396),
    "rpn_R_50_C4_paper": (50, 1, 64, 18_012_412),
    "rpn_R_101_C4_paper": (101, 1, 64, 36_952_316),
    "rpn_X_50_32x4d_C4_paper": (50, 32, 4, 17_895_164),
    "rpn_X_101_32x4d_C4_paper": (101, 32, 4, 36_974_332),
    "fast_rcnn_R_50_C4_paper": (50, 1, 64, 24_276_561),
    "fast_rcnn_R_101_C4_paper": (101, 1, 64, 43_216_465),
    "fast_rcnn_X_50_32x4d_C4_paper": (50, 32, 4, 23_733_329),
    "fast_rcnn_X_101_32x4d_C4_paper": (101, 32, 4, 42_812_497),
    "faster_rcnn_X_50_32x4d_C4_128": (50, 32, 4, 33_233_037),
    "rpn_X_26_8x4d_C4_toy": (26, 8, 4, 843_129),
    "fast_rcnn_X_26_8x4d_C4_toy": (26, 8, 4, 999_807),
}


def test_shipped_configs_build() -> None:
    """On the meta device: shapes and parameters without the memory."""
    assert model_zoo.names() == sorted(SHIPPED)
    for name, (*shape, parameters) in SHIPPED.items():
        cfg = model_zoo.get_config(name)
        resnets = cfg.MODEL.RESNETS
        assert shape == [resnets.DEPTH, resnets.NUM_GROUPS, resnets.WIDTH_PER_GROUP]
        assert cfg.MODEL.DEVICE == "cuda" if torch.cuda.is_available() else "cpu"
        with torch.device("meta"):
            cfg = cfg.clone()
            cfg.defrost()
            cfg.MODEL.DEVICE = "meta"
            model = build_model(cfg)
        assert sum(parameter.numel() for parameter in model.parameters()) == parameters, name


@pytest.mark.parametrize("name", [name for name in SHIPPED if name.endswith("_paper")])
def test_the_papers_schedule(name: str) -> None:
    """Section 5.4 and appendix B: 120k iterations, and at a tenth of the rate on to 180k.

    RPN, whose schedule is that of joint training: 8 GPUs, 2 images each, 256 anchors, 0.02. Fast
    R-CNN: 8 GPUs, 1 image each, 64 regions, 0.005. Sizes and tests are py-faster-rcnn's.
    """
    cfg = model_zoo.get_config(name)
    solver = cfg.SOLVER
    assert (solver.GAMMA, solver.REFERENCE_WORLD_SIZE) == (0.1, 8)
    assert cfg.MODEL.RESNETS.NORM == "FrozenBN"
    if name.startswith("fast_rcnn"):
        assert (solver.IMS_PER_BATCH, solver.BASE_LR) == (8, 0.005)
        assert cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE == 64
        assert cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST == 0.3
        assert cfg.DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST == 300
    else:
        assert (solver.IMS_PER_BATCH, solver.BASE_LR) == (16, 0.02)
        assert cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE == 256
    if "_C4_" in name:
        assert (cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST) == ((600,), 600)
        assert (cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TEST) == (1000, 1000)
    assert (solver.STEPS, solver.MAX_ITER) == ((120_000,), 180_000)
    assert (solver.MOMENTUM, solver.WEIGHT_DECAY, solver.NESTEROV) == (0.9, 0.0001, False)
    assert cfg.DATASETS.TRAIN == ("coco_2014_train", "coco_2014_valminusminival")
    assert cfg.DATASETS.TEST == ("coco_2014_minival",)
    assert cfg.MODEL.RESNETS.STRIDE_IN_1X1 is False


def written(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    file = folder / name
    file.write_text(text)
    return file


def refusal(file: str | Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as refused:
        load_config(file, overrides)
    text = str(refused.value)
    assert text.isprintable() and len(text) < 1200
    return text


def test_reads_detectron2s_configs_as_it_does() -> None:
    for file in ZOO.rglob("*.yaml"):
        expected = get_cfg()
        add_resnext_config(expected)
        expected.merge_from_file(str(file))
        expected.MODEL.DEVICE = "cpu"
        assert load_config(file, ["MODEL.DEVICE", "cpu"]) == expected, file


def test_bases(tmp_path: Path) -> None:
    """By path and by the name in Detectron2's zoo; later bases and the file itself win."""
    written(tmp_path, "SOLVER: {MAX_ITER: 1, BASE_LR: 1.0, GAMMA: 0.5}", "a.yaml")
    written(tmp_path, "SOLVER: {MAX_ITER: 2, BASE_LR: 2.0}", "b.yaml")
    file = written(tmp_path, "_BASE_: [a.yaml, b.yaml]\nSOLVER: {MAX_ITER: 3}")
    assert read_config(file) == CfgNode.load_yaml_with_base(str(file))
    assert read_config(file) == {"SOLVER": {"MAX_ITER": 3, "BASE_LR": 2.0, "GAMMA": 0.5}}
    expected = detectron2.model_zoo.get_config(RETINANET).MODEL.ANCHOR_GENERATOR.SIZES
    for base in (RETINANET, ZOO / RETINANET):
        cfg = load_config(written(tmp_path, f"_BASE_: {base}\nSOLVER: {{MAX_ITER: 7}}\n"))
        assert expected == cfg.MODEL.ANCHOR_GENERATOR.SIZES
        assert cfg.SOLVER.MAX_ITER == 7


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ("mine.yaml", "does one name itself"),
        ("[other.yaml]", "does one name itself"),
        *[(f"{scheme}://a/b.yaml", "not fetched") for scheme in ("https", "s3", "detectron2")],
        ("none.yaml", "there is no such file"),
        ("5", "the path of a yaml file"),
        ("[[a]]", "the path of a yaml file"),
        ('"a\\0b"', "there is no such file"),
        ("x" * 10_000, "there is no such file"),
    ],
)
def test_refuses_impossible_bases(
    base: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(*arguments: Any) -> None:
        raise AssertionError("something was fetched")

    monkeypatch.setattr("socket.socket.connect", connect)
    written(tmp_path, "_BASE_: mine.yaml", "other.yaml")
    assert said in refusal(written(tmp_path, f"_BASE_: {base}\n"))


LAUGHS = "a0: &a0 [x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)


@pytest.mark.parametrize(
    "text",
    [
        *["!!python/object/apply:os.mkdir ['ran']", "A: !!python/name:os.system"],
        *["A: !!python/object/apply:eval [\"__import__('os').mkdir('ran')\"]"],
        *["[" * 5000, "A: " + "[" * 5000 + "]" * 5000, "{a: " * 5000, LAUGHS, "a: &a {b: *a}"],
        *["\x00", "A: \x1b[2J", "!!binary x", "just words", "- 1", "MODEL: [", "1: 2"],
        *["A: " + "9" * 5000, "a: " + "x" * 2**21, "SOLVER: 3", "MODEL: [1]", "VERSION: 1"],
        *["SOLVER: {MAX_ITER: {A: 1}}", f"{'K' * 10**5}: 1", "SOLVER: {[1]: 2}"],
    ],
    ids=lambda text: text[:20].encode("unicode_escape").decode(),
)
def test_refuses_hostile_yaml(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refusal(written(tmp_path, text))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


def test_refuses_bases_that_multiply(tmp_path: Path) -> None:
    for number in range(30):
        written(tmp_path, f"_BASE_: [{number + 1}.yaml, {number + 1}.yaml]", f"{number}.yaml")
    written(tmp_path, "", "30.yaml")
    assert "more than 32 bases" in refusal(tmp_path / "0.yaml")


def test_refuses_what_is_not_a_regular_file(tmp_path: Path) -> None:
    assert PAPER in refusal(tmp_path) and PAPER in refusal("/dev/zero")
    written(tmp_path, "", "utf16.yaml").write_bytes("SOLVER: {}".encode("utf-16"))
    assert "cannot be read" in refusal(tmp_path / "utf16.yaml")


@pytest.mark.parametrize("value", ["x" * 10**5, "(" * 10_000, "-" * 10_000 + "1", "{[]: 1}"])
def test_cuts_hostile_overrides(value: str) -> None:
    for key in ("SOLVER.MAX_ITER", "MODEL.ANCHOR_GENERATOR.SIZES", "NO.SUCH.KEY"):
        assert key in refusal(TOY, key, value)
    refusal(TOY, value, "1")


def test_reads_what_it_writes(tmp_path: Path) -> None:
    cfg = load_config(TOY)
    shared = [1.0, 1.0, 1.0, 1.0]  # written once, with an alias
    cfg.defrost()
    cfg.MODEL.RPN.BBOX_REG_WEIGHTS = cfg.MODEL.RETINANET.BBOX_REG_WEIGHTS = shared
    assert "*id001" in cfg.dump()
    assert tuple(shared) == load_config(written(tmp_path, cfg.dump())).MODEL.RPN.BBOX_REG_WEIGHTS


def test_names_all_that_is_wrong(tmp_path: Path) -> None:
    file = written(tmp_path, "SOLVER: {GAMMA: x, MAXITER: 3}\nDATALOADER: {NUM_WORKERS: -1}")
    said = refusal(file, "MODEL.PIXEL_MEAN", "0.5", "TEST.EVAL_PERIOD", "-1", "SEED", "None")
    for part in (
        *("6 settings", "SOLVER.GAMMA is 'x'; it must be a number above 0 and up to 1."),
        *("MAXITER; did you mean SOLVER.MAX_ITER?", "NUM_WORKERS is -1", "PIXEL_MEAN is 0.5"),
        *("TEST.EVAL_PERIOD is -1", "SEED is None"),
    ):
        assert part in said
    assert "pairs" in refusal(TOY, "SOLVER.BASE_LR")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("INPUT.MIN_SIZE_TRAIN", "320", (320,)),
        ("DATASETS.TRAIN", "coco_2017_train", ("coco_2017_train",)),
        ("MODEL.FPN.IN_FEATURES", "res5", ["res5"]),
        ("MODEL.ROI_HEADS.IOU_THRESHOLDS", "0.6", [0.6]),
        ("SOLVER.BASE_LR", "1", 1.0),
        ("OUTPUT_DIR", "'2024'", "2024"),
        ("SOLVER.STEPS", "[10, 20]", (10, 20)),
    ],
)
def test_converts_clear_values(key: str, value: str, expected: object, tmp_path: Path) -> None:
    nested: Any = yaml.safe_load(value)
    for name in reversed(key.split(".")):
        nested = {name: nested}
    file = written(tmp_path, yaml.safe_dump(nested))
    for cfg in (load_config(file), load_config(TOY, [key, value])):
        found = value_of(cfg, key)
        assert found == expected and type(found) is type(expected)
    assert load_config(TOY, ["OUTPUT_DIR", "2024"]).OUTPUT_DIR == "2024"


def keys(cfg: CfgNode, prefix: str = "") -> Iterator[str]:
    for name, value in cfg.items():
        if isinstance(value, CfgNode):
            yield from keys(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_every_key_has_a_rule() -> None:
    """The default meets it, and something else does not."""
    cfg = get_cfg()
    add_resnext_config(cfg)
    assert set(keys(cfg)) == set(RULES)
    for key in keys(cfg):
        assert RULES[key].holds(value_of(cfg, key)), key
        if key != "GLOBAL.HACK":
            assert not RULES[key].holds({"a": 1}), key
    refused = {
        "SOLVER.BASE_LR": (0, -1, "x", True, float("nan"), float("inf"), None),
        "SOLVER.MAX_ITER": (0, 1.5, True, 2**40),
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": (-0.1, 1.1),
        "MODEL.RPN.IN_FEATURES": ([], [1], "p2"),
        "MODEL.RPN.IOU_LABELS": ([0, 2], [0]),
        "MODEL.ANCHOR_GENERATOR.SIZES": ([32], [[]], [[-1]]),
        "MODEL.DEVICE": ("gpu", ""),
        "MODEL.PIXEL_STD": ([0.0], []),
        "SOLVER.SCALING": ("auto",),
        "INPUT.CROP.SIZE": ([0.5],),
    }
    for key, values in refused.items():
        assert not any(RULES[key].holds(value) for value in values), key


def test_complete_adds_missing_keys() -> None:
    plain = get_cfg()
    plain.SOLVER.MAX_ITER = 7
    plain.freeze()
    full = get_cfg()
    add_resnext_config(full)
    full.SOLVER.MAX_ITER = 7
    found = complete(plain)
    assert found == full
    assert found.is_frozen() and "SCALING" not in plain.SOLVER
    assert complete(found) is found
    partial = full.clone()
    partial.MODEL.RESNEXT = CfgNode({"FORM": "aggregated"})
    assert complete(partial).MODEL.RESNEXT == {**full.MODEL.RESNEXT, "FORM": "aggregated"}


class Recorder(CfgNode):  # type: ignore[misc]
    """A config that records which of its keys are read."""

    read: ClassVar[set[str]] = set()

    @classmethod
    def of(cls, cfg: CfgNode, prefix: str = "") -> Recorder:
        found = cls()
        found.__dict__["prefix"] = prefix
        for name, value in cfg.items():
            node = cls.of(value, f"{prefix}{name}.") if isinstance(value, CfgNode) else value
            dict.__setitem__(found, name, node)
        return found

    def __getitem__(self, name: str) -> Any:
        self.read.add(self.__dict__.get("prefix", "") + name)
        return super().__getitem__(name)


SMALL = [
    *("SOLVER.MAX_ITER", "1", "SOLVER.WARMUP_ITERS", "0", "SOLVER.STEPS", "()", "SEED", "1"),
    *("SOLVER.IMS_PER_BATCH", "1", "SOLVER.REFERENCE_WORLD_SIZE", "0"),
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64", "DATALOADER.NUM_WORKERS", "0"),
    *("MODEL.DEVICE", "cpu"),
]


@pytest.fixture()
def val(datasets: Path) -> Iterator[list[str]]:
    """Overrides that train and test on the small toy data set."""
    toy = datasets / "toy_coco"
    file = toy / "annotations" / "instances_val2017.json"
    register_coco_instances("config_val", {}, str(file), str(toy / "val2017"))
    yield ["DATASETS.TRAIN", "('config_val',)", "DATASETS.TEST", "('config_val',)"]
    DatasetCatalog.remove("config_val")


def test_names_the_keys_that_a_training_does_not_read(
    val: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By experiment: every key is read by a training, or `idle_settings` names it."""
    monkeypatch.setattr(Recorder, "read", set())
    cfg = load_config(TOY, [*SMALL, *val, "OUTPUT_DIR", str(tmp_path)])
    Trainer(Recorder.of(cfg)).train()
    # Read by tools, by default_setup and for a checkpoint.
    elsewhere = {"VERSION", "CUDNN_BENCHMARK", "FLOAT32_PRECISION", "MODEL.WEIGHTS"}
    elsewhere |= {"TEST.EXPECTED_RESULTS", "MODEL.RESNEXT.ALLOW_OTHER_FUNCTION"}
    cfg = cfg.clone()
    cfg.defrost()
    for key in sorted(set(RULES) - Recorder.read - elsewhere):
        *path, name = key.split(".")
        node = value_of(cfg, ".".join(path)) if path else cfg
        kept, node[name] = node[name], "something else"
        assert key in idle_settings(cfg)
        node[name] = kept


def test_trains_a_config_of_detectron2s_zoo(val: list[str], tmp_path: Path) -> None:
    cfg = detectron2.model_zoo.get_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
    augmented = ["TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(64, 96)"]
    words = [*SMALL, *val, *augmented, "MODEL.WEIGHTS", "", "OUTPUT_DIR", str(tmp_path)]
    cfg.merge_from_list(words)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert (tmp_path / "model_final.pth").is_file()
    assert set(trainer._last_eval_results) == {"bbox", "bbox_TTA"}
    for folder in ("inference", "inference_TTA"):
        assert (tmp_path / folder / "metrics.json").is_file()


def test_warns_of_settings_without_effect(tmp_path: Path) -> None:
    assert idle_warning(load_config(TOY)) is None
    dumped = tmp_path / "config.yaml"  # as a training writes it
    dumped.write_text(load_config(TOY).dump())
    assert idle_warning(load_config(str(dumped))) is None
    given = ["MODEL.RETINANET.NUM_CLASSES", "3", "TEST.AUG.MIN_SIZES", "5", "GLOBAL.HACK", "2.0"]
    found = idle_warning(load_config(TOY, given)) or ""
    for part in (
        "MODEL.RETINANET.NUM_CLASSES (see MODEL.META_ARCHITECTURE)",
        "TEST.AUG.MIN_SIZES (see TEST.AUG.ENABLED)",
        "GLOBAL.HACK",
    ):
        assert part in found


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("TEST.AUG.ENABLED True MODEL.META_ARCHITECTURE RetinaNet", "META_ARCHITECTURE RetinaNet"),
        ("TEST.AUG.ENABLED True MODEL.KEYPOINT_ON True", "MODEL.KEYPOINT_ON True"),
        ("TEST.AUG.ENABLED True MODEL.LOAD_PROPOSALS True", "MODEL.LOAD_PROPOSALS True"),
        ("MODEL.LOAD_PROPOSALS True", "MODEL.PROPOSAL_GENERATOR.NAME RPN"),
        ("MODEL.PROPOSAL_GENERATOR.NAME PrecomputedProposals", "LOAD_PROPOSALS is False"),
        (
            "MODEL.LOAD_PROPOSALS True MODEL.PROPOSAL_GENERATOR.NAME PrecomputedProposals",
            "PROPOSAL_FILES_TRAIN names 0 files for the 1 data sets",
        ),
        ("MODEL.ROI_BOX_HEAD.USE_FED_LOSS True", "USE_SIGMOID_CE True"),
        (
            "MODEL.ROI_BOX_HEAD.USE_FED_LOSS True MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE True",
            "class_image_count",
        ),
        ("INPUT.MIN_SIZE_TRAIN_SAMPLING range", "the smallest and the largest"),
        ("INPUT.CROP.ENABLED True INPUT.CROP.SIZE [300,300]", "fractions from 0 to 1"),
        ("MODEL.FPN.NORM SyncBN", "naiveSyncBN"),
        ("MODEL.PIXEL_STD [1.0]", "MODEL.PIXEL_STD 1"),
        ("VIS_PERIOD 1", "opencv-python-headless, or set VIS_PERIOD 0"),
    ],
)
def test_refuses_impossible_settings(
    words: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refuse_impossible(load_config(TOY, SMALL), processes=2)
    with pytest.raises(ConfigError) as refused:
        refuse_impossible(load_config(TOY, [*SMALL, *words.split()]), processes=2)
    assert said in str(refused.value)
