"""A run pushed to a stand-in for the Hugging Face Hub, and used from there."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from detectron2.modeling import build_model
from PIL import Image

from resnext_det import Predictor, hub, load_config
from resnext_det.checkpoint_file import RUN, read_run
from resnext_det.config import parse_config
from resnext_det.data import custom
from resnext_det.data.checks import CUSTOM
from resnext_det.engine.checkpoints import Checkpointer
from resnext_det.errors import ConfigError, WeightsError
from resnext_det.evaluation.results_file import read_metrics
from resnext_det.hub import Address
from resnext_det.report.model_card import model_card, repository, shared_config
from resnext_det_cli import main
from tests.conftest import ROOT
from tests.helpers.hub import TOKEN, Hub

huggingface_hub = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")

TOY = "faster_rcnn_X_26_8x4d_FPN_toy"
NAMES = ("circle", "square", "triangle", "star", "cross", "crescent")
THERE = Address("me/toy")
SECRET = "private_folder"  # in every path of the machine


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, datasets: Path) -> Path:
    """The evaluated run of a detector with random weights, on data sets given as files."""
    folder = tmp_path_factory.mktemp(SECRET) / "run"
    folder.mkdir()
    record = {
        **{"source": "theirs.pth", "sha256": "ab" * 32, "layout": "torchvision", "depth": 26},
        **{"template": "8x4d", "pixels": None, "fused": False, "stride_in_1x1": False},
        **{"name": None, "licence": "CC-BY-NC-4.0", "top1": 77.5, "top5": None},
    }
    torch.save({"model": {"a": torch.zeros(2)}, "resnext_det": record}, folder / "start.pth")
    words = ["MODEL.WEIGHTS", folder / "start.pth", "OUTPUT_DIR", folder, "INPUT.MIN_SIZE_TEST", 64]
    words += ["CLASSIFICATION.DATA", folder / "crops", "DATALOADER.NUM_WORKERS", 0]
    words += ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "INPUT.MAX_SIZE_TEST", 96]
    words += ["DATASETS.PROPOSAL_FILES_TEST", f"('{folder}/p.safetensors',)"]
    words += ["TEST.DETECTIONS_PER_IMAGE", 8, "WANDB.PROJECT", SECRET]
    cfg = load_config(TOY, [str(word) for word in words])
    annotations = datasets / "toy_coco" / "annotations"
    files = [annotations / f"instances_{split}2017.json" for split in ("train", "val")]
    copied = folder.parent / "annotations"
    copied.mkdir()
    for file in files:  # into a folder with the secret name
        (copied / file.name).write_bytes(file.read_bytes())
    toy = datasets / "toy_coco"
    cfg = custom.use(
        cfg,
        *(copied / "instances_train2017.json", toy / "train2017"),
        *(copied / "instances_val2017.json", toy / "val2017"),
    )
    torch.manual_seed(1)
    model = build_model(cfg)
    model.roi_heads.box_predictor.cls_score.weight.data *= 200  # else all are of one class
    Checkpointer(model, folder, config=cfg, class_names=NAMES).save("model_final", iteration=9)
    (folder / "config.yaml").write_text(cfg.dump())
    (folder / "log.txt").write_text(f"a log in {folder}")
    custom.record(cfg, folder)
    main(["eval", "--run", str(folder)])
    return folder


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub that this process takes for the real one, and an empty cache."""
    running = Hub()
    template = running.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", running.address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between attempts
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    hub.fetch.cache_clear()
    yield running
    running.close()
    hub.fetch.cache_clear()


@pytest.fixture(scope="module")
def pushed(run: Path) -> dict[str, bytes]:
    """The files of the repository."""
    with repository(run, THERE) as files:
        return {file.name: file.read_bytes() for file in files}


@pytest.fixture
def serving(there: Hub, pushed: dict[str, bytes]) -> Hub:
    """A hub with the repository."""
    there.commit(THERE.repository, dict(pushed))
    return there


def noise(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (60, 90, 3), np.uint8)
    return Image.fromarray(pixels)


def cached(tmp_path: Path) -> list[str]:
    """Return the files in the cache that hold content."""
    folder = tmp_path / "cache"
    return [file.name for file in folder.glob("*/snapshots/*/*") if file.is_file()] + [
        file.name for file in folder.glob("*/blobs/*") if not any(folder.glob("*/snapshots/*/*"))
    ]


def test_push_then_use(
    run: Path,
    there: Hub,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    datasets: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = sorted(run.iterdir())
    main(["push", "--run", str(run), "--to", "hf:me/toy", "--private"])
    assert there.private == {"me/toy": True}
    [commit] = there.commits["me/toy"]
    assert f"uploaded to hf://me/toy@{commit}\n" in capsys.readouterr().out
    assert sorted(there.files("me/toy")) == ["README.md", "config.yaml", "model.safetensors"]
    assert sorted(run.iterdir()) == before

    there.private.clear()  # downloads by the stand-in need no token
    expected = Predictor(run)(noise(0))
    detector = Predictor("hf://me/toy")
    found = detector(noise(0))
    assert len(found) == 8 and np.array_equal(found.boxes, expected.boxes)
    assert np.array_equal(found.scores, expected.scores)
    assert found.names == expected.names and set(found.names) <= set(NAMES)
    assert f"{tmp_path}/cache" in detector.report
    with pytest.raises(ConfigError, match=r"trained with other settings: MODEL\.PIXEL_STD"):
        Predictor("hf://me/toy", overrides=["MODEL.PIXEL_STD", "[1.0, 1.0, 1.0]"])

    there.close()
    hub.fetch.cache_clear()
    assert np.array_equal(Predictor(f"hf://me/toy@{commit}")(noise(0)).boxes, expected.boxes)
    assert np.array_equal(Predictor("hf://me/toy")(noise(0)).boxes, expected.boxes)

    monkeypatch.chdir(tmp_path)
    annotations = datasets / "toy_coco" / "annotations" / "instances_val2017.json"
    main(["eval", "--run", "hf://me/toy", "--test-json", str(annotations)])
    [own], [theirs] = read_metrics(run).evaluations, read_metrics(Path("output/toy")).evaluations
    assert theirs.kinds == own.kinds
    assert read_metrics(Path("output/toy")).weights == f"hf://me/toy@{commit}"
    noise(0).save("a.png")
    main(["predict", "--run", "hf://me/toy", "a.png", "--save", "--threshold", "0"])
    assert Path("output/toy/predicted/a.jpg").is_file()


def test_another_process_pushes_and_trains(
    run: Path, there: Hub, tmp_path: Path, datasets: Path
) -> None:
    """With the hub's own variables, as users set them; the training has another class."""
    environment = {
        **os.environ,
        **{"HF_ENDPOINT": there.address, "HF_HUB_CACHE": str(tmp_path / "cache")},
        **{"HF_HUB_DISABLE_XET": "1", "DETECTRON2_DATASETS": str(datasets)},
    }
    push = ["push", "--run", run, "--to", "hf://me/toy"]
    train = ["train", "--config-file", TOY, "MODEL.WEIGHTS", "hf://me/toy", "OUTPUT_DIR", tmp_path]
    train += ["SOLVER.MAX_ITER", "1", "SOLVER.STEPS", "()", "DATASETS.TEST", "()"]
    train += ["SOLVER.IMS_PER_BATCH", "2", "TEST.EVAL_PERIOD", "0", "DATALOADER.NUM_WORKERS", "0"]
    both = [[str(word) for word in words] for words in (push, train)]
    program = f"from resnext_det_cli import main; [main(words) for words in {both}]"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(there.files("me/toy")) == ["README.md", "config.yaml", "model.safetensors"]
    assert not there.private["me/toy"]
    assert "tensors of the detector loaded from" in (tmp_path / "log.txt").read_text()


def test_publishes_nothing_private(run: Path, pushed: dict[str, bytes]) -> None:
    length = int.from_bytes(pushed["model.safetensors"][:8], "little")
    header = pushed["model.safetensors"][8 : 8 + length]
    text = (header + pushed["config.yaml"] + pushed["README.md"]).decode()
    for word in (SECRET, str(run.parent.parent), str(Path.home()), "log.txt"):
        assert word not in text
    config = yaml.safe_load(pushed["config.yaml"])
    assert config["OUTPUT_DIR"] == "./output" and config["MODEL"]["WEIGHTS"] == "hf://me/toy"
    assert config["DATASETS"]["TRAIN"] == config["DATASETS"]["TEST"] == []
    assert config["MODEL"]["ROI_HEADS"]["NUM_CLASSES"] == 6


def test_paths_anywhere_in_a_config_are_left_out() -> None:
    cfg = load_config(TOY).clone()
    cfg.defrost()
    cfg.MODEL.ROI_BOX_HEAD.NAME = "/home/me/heads.py"
    cfg.TEST.EXPECTED_RESULTS = [["bbox", "AP", 1.0, "C:\\me"]]
    cfg.DATASETS.TRAIN = ("coco_2017_train", f"{CUSTOM}mine_01234567")
    cfg.TEST.BEST.METRIC = "bbox/AP50"
    text = shared_config(cfg, Address("you/toy"))
    assert "me" not in re.findall(r"\w+", text)
    shared = parse_config(text, "")
    assert shared["DATASETS"]["TRAIN"] == ["coco_2017_train"]
    assert shared["TEST"]["BEST"]["METRIC"] == "bbox/AP50"


def test_model_card(run: Path, pushed: dict[str, bytes]) -> None:
    """The hub's own reader finds the figures of the run in it."""
    card = huggingface_hub.ModelCard(pushed["README.md"].decode())
    assert card.data.license == "cc-by-nc-4.0" and card.data.pipeline_tag == "object-detection"
    [evaluation] = read_metrics(run).evaluations
    figures = evaluation.kinds["bbox"].figures
    found = {each.metric_name: each.metric_value for each in card.data.eval_results}
    named = {name.removeprefix("bbox "): value for name, value in found.items()}
    assert named == {name: round(figures[name] or 0, 2) for name in ("AP", "AP50", "AP75")}
    assert {each.dataset_name for each in card.data.eval_results} == {"instances_val2017"}
    assert "may not be used commercially" in card.text and 'Predictor("hf://me/toy")' in card.text
    assert "| instances\\_val2017 | 6 | bbox |" in card.text and "precision: fp32" in card.text
    assert "start.pth (theirs.pth, licence CC-BY-NC-4.0, 77.5 % top-1" in card.text
    assert "circle, square, triangle" in card.text
    with repository(run, THERE, "mit") as files:
        text = files[0].read_text()
    assert (
        "license: mit\n" in text and "mit. The training started from start.pth (theirs.pth" in text
    )


def test_model_card_names_changed_settings_and_hides_addresses(run: Path, tmp_path: Path) -> None:
    copied = copy_of(run, tmp_path)
    main(["eval", "--run", str(copied), "INPUT.MIN_SIZE_TEST", "80"])
    with repository(copied, THERE) as files:
        assert "INPUT.MIN_SIZE_TEST was 64 and is 80" in files[0].read_text()
    cfg = load_config(run / "config.yaml").clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = f"https://me:{SECRET}@{SECRET}/{SECRET}/x.pth?key={SECRET}"
    recorded = read_run(run / "model_final.pth")
    assert recorded is not None
    text = model_card(run, cfg, THERE, recorded, read_metrics(run))
    assert SECRET not in text and "| Started from | x.pth |" in text
    assert "license: unknown\n" in text


def copy_of(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def no_checkpoint(run: Path) -> None:
    for name in ("model_final.pth", "last_checkpoint"):
        (run / name).unlink()


def no_figures(run: Path) -> None:
    shutil.rmtree(run / "inference")


def other_weights(run: Path) -> None:
    content = torch.load(run / "model_final.pth")
    content["model"]["roi_heads.box_predictor.bbox_pred.bias"][0] += 1e-6
    torch.save(content, run / "model_final.pth")


def old_figures(run: Path) -> None:
    file = run / "inference" / "metrics.json"
    document = json.loads(file.read_text())
    del document["state_blake2b"]
    file.write_text(json.dumps(document))


def no_record(run: Path) -> None:
    content = torch.load(run / "model_final.pth")
    del content[RUN]
    torch.save(content, run / "model_final.pth")


def other_function(run: Path) -> None:
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("STRIDE_IN_1X1: false", "STRIDE_IN_1X1: true"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_checkpoint, "holds no checkpoint"),
        (no_figures, "holds no figures"),
        (other_weights, "are of other weights than"),
        (old_figures, "do not record theirs"),
        (no_record, "does not record its classes"),
        (other_function, "trained with other settings"),
    ],
)
def test_refuses_runs(
    spoil: Callable[[Path], None],
    message: str,
    run: Path,
    there: Hub,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copied = copy_of(run, tmp_path)
    spoil(copied)
    before = sorted(copied.rglob("*"))
    with pytest.raises(SystemExit):
        main(["push", "--run", str(copied), "--to", "hf:me/toy"])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not there.requests and sorted(copied.rglob("*")) == before


def test_dry_run_needs_no_hub(
    run: Path,
    there: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pushed: dict[str, bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    copied = copy_of(run, tmp_path)
    words = ["push", "--run", str(copied), "--to", "hf:me/toy"]
    main([*words, "--dry-run"])
    written = {file.name: file.read_bytes() for file in (copied / "hub").iterdir()}
    assert written == pushed
    assert len({file.stat().st_mode for file in (copied / "hub").iterdir()}) == 1
    size = len(pushed["model.safetensors"])
    assert f"model.safetensors {size:17,} bytes" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(words)
    assert "pip install huggingface_hub" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="pip install huggingface_hub"):
        Predictor("hf://me/toy")
    assert not there.requests


@pytest.mark.parametrize("status", [401, 403, 500])
def test_failed_uploads(
    status: int, run: Path, there: Hub, pushed: dict[str, bytes], tmp_path: Path
) -> None:
    files = []
    for name, content in pushed.items():
        files.append(tmp_path / name)
        files[-1].write_bytes(content)
    there.fail = lambda method, path: (status, "") if "/commit/" in path else None
    with pytest.raises(WeightsError, match=rf"^hf://me/toy .*{status}.*\.$"):
        hub.upload(files, THERE)
    assert not there.files("me/toy")


def test_never_uploads_private_files_to_a_public_repository(
    there: Hub, pushed: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_bytes(pushed["README.md"])
    there.commits["me/toy"], there.private["me/toy"] = {}, False
    with pytest.raises(ConfigError, match="exists and is public"):
        hub.upload([tmp_path / "README.md"], THERE, private=True)
    assert not there.commits["me/toy"]


def fails(status: int, code: str = "") -> Callable[[Hub], None]:
    def change(there: Hub) -> None:
        there.fail = lambda method, path: (status, code)

    return change


def has(name: str, content: bytes | None) -> Callable[[Hub], None]:
    return lambda there: there.commit("me/toy", {name: content}) and None


def names_local_file(there: Hub) -> None:
    config = f"_BASE_: {ROOT / 'configs' / TOY}.yaml\n"
    record = json.dumps({"class_names": NAMES, "versions": {}, "config": config})
    files = {"config.yaml": config.encode()}
    weights = safetensors.torch.save(TENSORS, {RUN: record})
    there.commit("me/toy", {**files, "model.safetensors": weights})


def cut(there: Hub) -> None:
    there.cut = 1


def too_large(there: Hub) -> None:
    def change(headers: dict[str, str]) -> None:
        if "X-Linked-Size" in headers:
            headers["X-Linked-Size"] = str(hub.LARGEST + 1)

    there.headers = change


def damaged(there: Hub) -> None:
    def change(headers: dict[str, str]) -> None:
        if "X-Linked-Etag" in headers:
            headers["X-Linked-Etag"] = f'"{"0" * 64}"'

    there.headers = change


TENSORS = {"a": torch.zeros(2)}
LONG = json.dumps({"class_names": [], "versions": {}, "config": "#" * (1 << 21)})
PICKLE = pickle.dumps({"model": {"a": np.zeros(2)}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (fails(401), r"does not exist, or you have no access to it \(401\): log in"),
        (fails(403, "GatedRepo"), "is gated"),
        (fails(404, "RepoNotFound"), r"does not exist, or you have no access to it \(404\)"),
        (fails(404, "RevisionNotFound"), "has no revision"),
        (fails(503), "the hub answered 503"),
        (Hub.close, "the hub cannot be reached"),
        (cut, "arrived incomplete"),
        (too_large, r"model.safetensors has 4\.0 GiB; at most"),
        (damaged, "model.safetensors was damaged in transit"),
        (has("config.yaml", b"#" * (1 << 21)), r"config.yaml has 2\.0 MiB; at most 1\.0 MiB"),
        (has("config.yaml", None), "has no config.yaml: hf:// takes repositories that"),
        (has("config.yaml", b"SEED: 1"), "config.yaml is not the config that"),
        (names_local_file, "names another file, _BASE_, which is not read"),
        (has("model.safetensors", None), "has no model.safetensors"),
        (has("model.safetensors", b""), "is not a safetensors file"),
        (has("model.safetensors", PICKLE), "is not a safetensors file"),
        (has("model.safetensors", b"\xff" * 7 + b"\x7f{"), "it may be truncated"),
        (has("model.safetensors", safetensors.torch.save(TENSORS)), "records no config"),
        (
            has("model.safetensors", safetensors.torch.save(TENSORS, {RUN: "[" * 10**5})),
            "its record of the run cannot be read",
        ),
        (
            has("model.safetensors", safetensors.torch.save(TENSORS, {RUN: LONG})),
            "its record of the run cannot be read",
        ),
    ],
)
def test_refused_downloads_leave_nothing(
    change: Callable[[Hub], None], message: str, serving: Hub, tmp_path: Path
) -> None:
    change(serving)
    with pytest.raises(WeightsError, match=message) as caught:
        hub.fetch(THERE)
    assert str(caught.value).startswith("hf://me/toy") and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert not cached(tmp_path)


def test_recovers_after_a_failure(serving: Hub, tmp_path: Path) -> None:
    serving.cut = 1
    with pytest.raises(WeightsError):
        hub.fetch(THERE)
    serving.cut = 0
    assert read_run(hub.fetch(THERE)).class_names == NAMES  # type: ignore[union-attr]
    assert len(cached(tmp_path)) == 2


def test_one_revision_per_process(serving: Hub, pushed: dict[str, bytes]) -> None:
    """And old ones by their commit."""
    first = hub.fetch(THERE)
    serving.commit("me/toy", {"README.md": b"changed"})
    assert hub.fetch(THERE) == first
    hub.fetch.cache_clear()
    assert hub.fetch(THERE) != first
    assert hub.fetch(Address("me/toy", first.parent.name)) == first


def test_both_files_are_of_one_commit(serving: Hub) -> None:
    first = next(iter(serving.commits["me/toy"]))

    def push(method: str, path: str) -> None:
        if path.endswith("model.safetensors"):
            serving.commit("me/toy", {"model.safetensors": b"newer"})

    serving.fail = push
    file = hub.fetch(THERE)
    assert file.parent.name == first and file.with_name("config.yaml").is_file()


@pytest.mark.parametrize(
    "text",
    [
        "hf:me",
        "hf://me/toy/x",
        "hf://me/toy@",
        "hf://../toy",
        "hf://me/..",
        "hf:/me/toy",
        "me/toy",
        "hf://me/toy@../x",
        "hf://me/toy@x/../../y",
        "hf://me/toy\n",
        "hf://m\u00e9/toy",
    ],
)
def test_refuses_addresses(text: str) -> None:
    with pytest.raises(ConfigError, match="must be hf://OWNER/NAME"):
        Address.of(text)


def test_addresses() -> None:
    assert Address.of("hf:me/toy") == Address.of("hf://me/toy") == THERE
    assert str(Address.of("hf://me/toy@refs/pr/1")) == "hf://me/toy@refs/pr/1"
