"""Configs as files: read as Detectron2 reads them, but as data, and refused in one short line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import detectron2.model_zoo
import pytest
import yaml
from detectron2.config import CfgNode, get_cfg

from resnext_det import add_resnext_config, load_config
from resnext_det.config_files import evaluate, read_config
from resnext_det.errors import ConfigError

ZOO = Path(
    detectron2.model_zoo.get_config_file("COCO-Detection/rpn_R_50_FPN_1x.yaml")
).parent.parent
RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
OF_ZOO = sorted(str(path.relative_to(ZOO)) for path in ZOO.rglob("*.yaml"))


@pytest.mark.parametrize("name", OF_ZOO)
def test_detectron2s_own_configs_are_read_as_it_reads_them(name: str) -> None:
    expected = get_cfg()
    add_resnext_config(expected)
    expected.merge_from_file(str(ZOO / name))
    expected.MODEL.DEVICE = "cpu"
    assert load_config(ZOO / name, ["MODEL.DEVICE", "cpu"]) == expected


def written(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    file = folder / name
    file.write_text(text)
    return file


def refusal(file: Path, overrides: list[str] | None = None) -> str:
    with pytest.raises(ConfigError) as refused:
        load_config(file, overrides or [])
    text = str(refused.value)
    assert text.isprintable()
    assert len(text) < 1000
    return text


def test_a_base_of_detectron2_by_path_and_by_name(tmp_path: Path) -> None:
    """Its sizes are an expression under a tag that PyYAML's unsafe loader evaluates."""
    expected = detectron2.model_zoo.get_config(RETINANET).MODEL.ANCHOR_GENERATOR.SIZES
    relative = Path("..", *[".."] * len(tmp_path.parts), *(ZOO / RETINANET).parts[1:])
    for base in (RETINANET, str(ZOO / RETINANET), str(relative)):
        cfg = load_config(written(tmp_path, f"_BASE_: {base}\nSOLVER: {{MAX_ITER: 7}}\n"))
        assert expected == cfg.MODEL.ANCHOR_GENERATOR.SIZES
        assert cfg.SOLVER.MAX_ITER == 7


def test_later_bases_and_the_file_itself_win(tmp_path: Path) -> None:
    written(tmp_path, "SOLVER: {MAX_ITER: 1, BASE_LR: 1.0, GAMMA: 0.5}", "a.yaml")
    written(tmp_path, "SOLVER: {MAX_ITER: 2, BASE_LR: 2.0}", "b.yaml")
    file = written(tmp_path, "_BASE_: [a.yaml, b.yaml]\nSOLVER: {MAX_ITER: 3}")
    assert read_config(file) == CfgNode.load_yaml_with_base(str(file))
    assert read_config(file) == {"SOLVER": {"MAX_ITER": 3, "BASE_LR": 2.0, "GAMMA": 0.5}}


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ("mine.yaml", "based on it in turn"),
        ("[other.yaml]", "based on it in turn"),
        *[(f"{scheme}://a/b.yaml", "an address") for scheme in ("http", "https", "s3", "file")],
        ("detectron2://a/b.yaml", "an address"),
        ("none.yaml", "there is no such file"),
        ("5", "the path of a yaml file"),
        ("{a: b}", "the path of a yaml file"),
        ("[[a]]", "the path of a yaml file"),
        ('"a\\0b"', "there is no such file"),
        (f"{'x' * 10_000}", "there is no such file"),
    ],
)
def test_a_base_that_cannot_be_is_refused(
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
        *["[" * 5000, "A: " + "[" * 5000 + "]" * 5000, "{a: " * 5000, "- " * 5000],
        *[LAUGHS, "a: &a [*a]", "a: &a {b: *a}", "1: 2", "SOLVER: {1: 2}", "SOLVER: {[1]: 2}"],
        *["\x00", "A: \x1b[2J", "? {", "!!binary x", "A: !!python/name:os.system", "just words"],
        *["A: " + "9" * 5000, "%YAML 9.9", "a: " + "x" * 2**21, "SOLVER: 3", "MODEL: [1]"],
        *["SOLVER: {MAX_ITER: {A: 1}}", f"{'K' * 10**5}: 1", '"\\x1b[31m": 1'],
        *["VERSION: 1\nMODEL: {WEIGHT: [1]}", "VERSION: 9", "VERSION: x", "VERSION: {}"],
        "!!python/object/apply:os.system ['touch ran']",
    ],
    ids=lambda text: text[:20].encode("unicode_escape").decode(),
)
def test_what_is_no_config_is_refused_in_a_short_line(text: str, tmp_path: Path) -> None:
    assert "mine.yaml" in refusal(written(tmp_path, text)) or "VERSION" in text


@pytest.mark.parametrize("value", ["x" * 10**5, "(" * 10_000, "-" * 10_000 + "1", "{[]: 1}"])
def test_a_hostile_value_is_cut(value: str, tmp_path: Path) -> None:
    for key in ("SOLVER.MAX_ITER", "MODEL.ANCHOR_GENERATOR.SIZES", "SOLVER.STEPS", "NO.SUCH.KEY"):
        assert key in refusal(written(tmp_path, ""), [key, value])
        refusal(written(tmp_path, ""), [value, key])
    text = yaml.safe_dump({"SOLVER": {"GAMMA": ["\x1b[2J" * 10**4] * 9}})
    assert "SOLVER.GAMMA" in refusal(written(tmp_path, text))


def test_a_folder_or_a_pipe_is_no_config(tmp_path: Path) -> None:
    assert "no config file" in refusal(tmp_path)
    assert "no config file" in refusal(Path("/dev/zero"))
    written(tmp_path, "", "utf16.yaml").write_bytes("SOLVER: {}".encode("utf-16"))
    assert "cannot be read" in refusal(tmp_path / "utf16.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "1 + 2 * 3 - 4 / 5 // 2 ** 3",
        "-(2 ** -1)",
        "[[x, x * 2**(1.0/3)] for x in [32, 64]]",
        "(1, [2.5, ()])",
        "[[x * y for y in (1, 2)] for x in [3, 4]]",
    ],
)
def test_arithmetic_is_computed_as_python_does(text: str) -> None:
    assert evaluate(text) == eval(text)


@pytest.mark.parametrize(
    "text",
    [
        *["__import__('os').system('touch ran')", "open('ran', 'w')", "x", "'a'", "True", "1j", ""],
        *["9 ** 9 ** 9", "10 ** 400", "2.0 ** 5000", "1 / 0", "(-1) ** 0.5", "1e999", "[1] * 9"],
        *["[x for x in [1] if x]", "[x for x in 3]", "[x for x, y in [[1, 2]]]", "(lambda: 1)()"],
        *["[" * 300 + "]" * 300, "[1][0]", "1 if 1 else 2", "{1: 2}", "1 << 99"],
        "[[[[[1 for a in b] for b in c] for c in d] for d in e] for e in [1]]",
        "[" + ",".join(["[x for x in [1,2,3,4,5,6,7,8,9]]"] * 30) + "] for",
        "[[[[[1 for a in [1,1,1,1,1,1,1,1]] for b in [1,1,1,1,1,1,1,1]] for c in [1,1,1,1,1,1,1,1]]"
        " for d in [1,1,1,1,1,1,1,1]] for e in [1,1,1,1,1,1,1,1]]",
    ],
)
def test_nothing_else_is_computed(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="no code is run"):
        evaluate(text)
    document = yaml.safe_dump([text]).strip()
    said = refusal(written(tmp_path, f"A: !!python/object/apply:eval {document}"))
    assert "apply:eval" in said
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("INPUT.MIN_SIZE_TRAIN", "320", (320,)),
        ("SOLVER.STEPS", "30", (30,)),
        ("TEST.AUG.MIN_SIZES", "800", (800,)),
        ("DATASETS.TRAIN", "coco_2017_train", ("coco_2017_train",)),
        ("MODEL.FPN.IN_FEATURES", "res5", ["res5"]),
        ("MODEL.ROI_HEADS.IOU_THRESHOLDS", "0.6", [0.6]),
        ("SOLVER.BASE_LR", "1", 1.0),
        ("OUTPUT_DIR", "2024", "2024"),
        ("SOLVER.STEPS", "[10, 20]", (10, 20)),
    ],
)
def test_what_is_meant_is_taken(key: str, value: str, expected: object, tmp_path: Path) -> None:
    given = yaml.safe_load(value) if not value.startswith("2024") else value
    nested: Any = given
    for name in reversed(key.split(".")):
        nested = {name: nested}
    file = written(tmp_path, yaml.safe_dump(nested))
    for cfg in (load_config(file), load_config(written(tmp_path, "", "empty.yaml"), [key, value])):
        found: Any = cfg
        for name in key.split("."):
            found = found[name]
        assert found == expected
        assert type(found) is type(expected)


def test_all_that_is_wrong_is_named_at_once(tmp_path: Path) -> None:
    file = written(tmp_path, "SOLVER: {GAMMA: x, MAXITER: 3}\nDATALOADER: {NUM_WORKERS: -1}")
    said = refusal(file, ["MODEL.PIXEL_MEAN", "0.5", "TEST.EVAL_PERIOD", "-1", "SEED", "None"])
    for part in ("6 settings", "GAMMA is 'x'", "MAXITER; did you mean SOLVER.MAX_ITER?"):
        assert part in said
    for key in ("DATALOADER.NUM_WORKERS", "MODEL.PIXEL_MEAN", "TEST.EVAL_PERIOD", "SEED is empty"):
        assert key in said
