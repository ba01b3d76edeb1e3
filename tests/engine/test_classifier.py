"""Classifiers trained on real handwritten digits, by the command, uninterrupted and killed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.data.samplers import TrainingSampler
from torch.nn import functional as F
from torchvision import transforms as library
from torchvision.models.resnet import Bottleneck, ResNet

from resnext_det import load_config
from resnext_det.backbones import build_classifier, build_detector
from resnext_det.config import recipe
from resnext_det.data.classification import Preprocessing, Views
from resnext_det.data.stream import Share, seeded
from resnext_det.engine.classifier import ClassifierTrainer, prepared, training_images
from resnext_det.engine.recorded_config import check_classes, check_same_function
from resnext_det.errors import ConfigError, DatasetError, ResNeXtError
from resnext_det.evaluation.classification import evaluate, load_classifier, validation_images
from resnext_det.evaluation.classified import results_file
from resnext_det.report.facts import weights_facts
from resnext_det.report.page import write_report
from resnext_det.weights.loading import load_weights
from resnext_det_cli import main
from tests.helpers.digits import write_cifar, write_folders

transforms: Any = library  # untyped

SMALL = (
    "MODEL.RESNETS.STEM_OUT_CHANNELS 8 MODEL.RESNETS.RES2_OUT_CHANNELS 16 CLASSIFICATION.CROP 32 "
    "CLASSIFICATION.RESIZE 36 SOLVER.IMS_PER_BATCH 8 SOLVER.BASE_LR 0.01 SOLVER.MAX_ITER 6 "
    "SOLVER.REFERENCE_WORLD_SIZE 2 SOLVER.CHECKPOINT_PERIOD 2 TEST.EVAL_PERIOD 4 "
    "SOLVER.EMA.ENABLED True SEED 3"
)


def command(data: Path, output: Path, *words: str) -> list[str]:
    found = ["pretrain", "--recipe", "folder", "--data", str(data), "--output", str(output)]
    return [*found, "--depth", "26", "--template", "8x4d", *SMALL.split(), *words]


def pretrain(data: Path, output: Path, *words: str) -> int:
    return main(command(data, output, *words))


# It forks before PyTorch starts threads, and imports everything only once.
SCRIPT = """
import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

from resnext_det.engine import classifier, setup
from resnext_det_cli import main


def train(words):
    os.setsid()  # with its workers
    sys.exit(main(words))


for words, rows in json.loads(sys.argv[1]):
    process = multiprocessing.get_context("fork").Process(target=train, args=(words,))
    process.start()
    log = Path(words[words.index("--output") + 1]) / "metrics.jsonl"
    while rows and not (log.exists() and log.read_bytes().count(b"\\n") >= rows):
        time.sleep(0.005)
        assert process.is_alive()
    if rows:
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == (-signal.SIGKILL if rows else 0)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training twice, of which one is killed after three rows of its log and resumed."""
    folder = tmp_path_factory.mktemp("classifiers")
    data = write_folders(folder / "data", most=40)
    whole, killed = folder / "whole", folder / "killed"
    jobs: list[tuple[list[str], int]] = [
        (command(data, whole, "DATALOADER.NUM_WORKERS", "0"), 0),
        (command(data, killed, "DATALOADER.NUM_WORKERS", "2"), 3),
        (["pretrain", "--output", str(killed), "--resume"], 0),  # the folder is enough
    ]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, json.dumps(jobs)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return folder


def content(folder: Path, name: str = "model_final.pth") -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / name, weights_only=True)
    return found


def test_a_killed_training_ends_like_an_uninterrupted_one(trained: Path) -> None:
    """Bit for bit: weights, their average and momentum."""
    one, other = (content(trained / name) for name in ("whole", "killed"))
    for first, second in (
        (one["model"], other["model"]),
        (one["trainer"]["_trainer"]["ema"], other["trainer"]["_trainer"]["ema"]),
    ):
        assert [name for name in first if not torch.equal(first[name], second[name])] == []
    states = [each["trainer"]["_trainer"]["optimizer"]["state"] for each in (one, other)]
    assert len(states[0]) > 50
    for key, state in states[0].items():
        assert torch.equal(state["momentum_buffer"], states[1][key]["momentum_buffer"])


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["imagenet1k", "cifar10", "cifar100"])
def test_numbers_of_the_paper(name: str) -> None:
    """Section 4 and appendix A; Nesterov and the decay of norms as in the authors' code."""
    cfg = load_config(recipe(name))
    solver, data = cfg.SOLVER, cfg.CLASSIFICATION
    images, decay, crop, resize = (
        (256, 1e-4, 224, 256) if name == "imagenet1k" else (128, 5e-4, 32, 32)
    )
    assert (images, 8) == (solver.IMS_PER_BATCH, solver.REFERENCE_WORLD_SIZE)
    assert solver.BASE_LR == 0.1 == solver.LR_PER_IMAGE * images
    assert (solver.GAMMA, solver.WARMUP_ITERS) == (0.1, 0)
    assert (solver.MOMENTUM, solver.NESTEROV) == (0.9, True)
    assert (decay, decay) == (solver.WEIGHT_DECAY, solver.WEIGHT_DECAY_NORM)
    assert solver.WEIGHT_DECAY_BIAS is None and solver.BIAS_LR_FACTOR == 1
    layout = "folder" if name == "imagenet1k" else name
    assert (layout, crop, resize) == (data.LAYOUT, data.CROP, data.RESIZE)
    assert cfg.TEST.BEST.METRIC == "top1"


@pytest.mark.parametrize("name", ["folder", "cifar10"])
def test_a_training_augments_as_its_recipe_says(name: str, tmp_path: Path) -> None:
    """As torchvision from the same seeds; lighting then adds the same to all pixels."""
    data = (write_folders if name == "folder" else write_cifar)(tmp_path)
    cfg = load_config(
        recipe(name), ["CLASSIFICATION.DATA", str(data), "DATALOADER.NUM_WORKERS", "0"]
    )
    batch = next(iter(ClassifierTrainer.build_train_loader(cfg, Share(0, 1, 1, 6), seed=5)))
    images = training_images(cfg)
    order = TrainingSampler(len(images), seed=5)._infinite_indices()
    bicubic = transforms.InterpolationMode.BICUBIC
    steps: list[Any] = [
        transforms.RandomResizedCrop(224, (0.08, 1), (3 / 4, 4 / 3), bicubic),
        transforms.RandomHorizontalFlip(),
        transforms.ColorJitter(0.4, 0.4, 0.4),
    ]
    if name == "cifar10":
        steps = [transforms.RandomCrop(32, 4, fill=(125, 123, 114)), steps[1]]
    for position, (sample, index) in enumerate(zip(batch, order)):
        with seeded(5, 0, position):
            expected = images.picture(index)
            for step in steps:
                expected = step(expected)
        added = sample["image"] - transforms.functional.pil_to_tensor(expected).float()
        assert added.flatten(1).std(1).max() < 1e-4
        assert bool((added[:, 0, 0].abs() > 1e-3).any()) == (name == "folder")
        assert sample["label"] == images.labels[index]


def test_eval_imagenet_gives_the_validation_figure(trained: Path) -> None:
    """From the file as it is."""
    last = rows(trained / "whole")[-1]
    assert {"top1", "top5", "loss", "ema/top1", "train/top1_error", "total_loss"} <= last.keys()
    for name, key in (("model_final.pth", "top1"), ("model_final_ema.pth", "ema/top1")):
        file = trained / "whole" / name
        found = evaluate(str(file), trained / "data" / "val", resize=36, crop=32, device="cpu")
        assert (found["top1"], found["images"]) == (last[key], 40)


def test_torchvision_computes_the_same_losses_and_scores() -> None:
    """With its own normalisation, of RGB images, on the tensors of our state dict."""
    words = "MODEL.RESNETS.DEPTH 26 MODEL.RESNETS.NUM_GROUPS 8 CLASSIFICATION.NUM_CLASSES 10"
    torch.manual_seed(0)
    ours: Any = build_classifier(load_config(recipe("folder"), words.split()))
    theirs = ResNet(Bottleneck, [2, 2, 2, 2], 10, groups=8, width_per_group=4)
    theirs.load_state_dict(ours.state_dict())
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    labels = torch.tensor([3, 1, 4, 9])
    normalize = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    inputs = normalize(images / 255)
    batch = [{"image": image, "label": int(label)} for image, label in zip(images, labels)]
    loss, expected = ours(batch)["loss_cls"], F.cross_entropy(theirs(inputs), labels)
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)
    loss.backward()
    expected.backward()  # type: ignore[no-untyped-call]
    gradient: Any = theirs.fc.weight.grad
    torch.testing.assert_close(ours.network.linear.weight.grad, gradient, rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        found, scores = ours.eval().scores(images), theirs.eval()(inputs)
    torch.testing.assert_close(found, scores, rtol=1e-3, atol=1e-4)


def test_a_run_can_be_tested_again(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its folder alone, in one process like in two, whose batch norms' statistics differ."""
    run = tmp_path / "run"
    assert pretrain(trained / "data", run, "--num-gpus", "2", "DATALOADER.NUM_WORKERS", "0") == 0
    last, before = rows(run)[-1], json.loads(results_file(run).read_text())
    words = ["pretrain", "--output", str(run), "--eval-only", "DATALOADER.NUM_WORKERS", "0"]
    assert main(words) == 0
    again = json.loads(results_file(run).read_text())
    assert again["figures"] == before["figures"]
    assert again["figures"] == {"all_classes": {"top1": last["top1"], "top5": last["top5"]}}
    losses = [[each["loss"] for each in found["worst"]] for found in (before, again)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert main([*words, "MODEL.WEIGHTS", str(run / "model_final_ema.pth")]) == 0
    average = json.loads(results_file(run).read_text())["figures"]["all_classes"]
    assert average == {"top1": last["ema/top1"], "top5": last["ema/top5"]}
    other = tmp_path / "data"
    shutil.copytree(trained / "data", other)
    for split in ("train", "val"):
        (other / split / "9").rename(other / split / "nine")
    with pytest.raises(SystemExit):
        main([*words, "--data", str(other)])
    assert "'9'; 1 only in" in capsys.readouterr().err


def test_detectors_start_from_it(trained: Path, tmp_path: Path) -> None:
    """MODEL.WEIGHTS takes a checkpoint, and its other task raises no objection."""
    file = trained / "whole" / "model_final.pth"
    sizes = "MODEL.RESNETS.STEM_OUT_CHANNELS 8 MODEL.RESNETS.RES2_OUT_CHANNELS 16"
    words = [*sizes.split(), "MODEL.WEIGHTS", str(file), "DATASETS.TEST", "()"]
    cfg = load_config("faster_rcnn_X_26_8x4d_FPN_toy", words)
    detector = build_detector(cfg)
    assert "torchvision layout" in load_weights(detector, cfg)
    check_same_function(cfg)
    check_classes(cfg)
    facts = dict(weights_facts(tmp_path, str(file), {}, trained=False))
    assert facts["Source"] == "pretrained on 10 classes of data, 6 iterations"
    stem: Any = detector.backbone.bottom_up.stem.conv1  # type: ignore[union-attr]
    ours = content(trained / "whole")["model"]["conv1.weight"].flip(1)  # RGB
    assert torch.equal(stem.weight, ours)


def test_one_process_repeats_what_two_do(trained: Path) -> None:
    """With norms of single images: batch norms would amplify the rounding of sums."""
    short = "SOLVER.MAX_ITER 2 TEST.EVAL_PERIOD 0 SOLVER.EMA.ENABLED False DATALOADER.NUM_WORKERS 0"
    short += " MODEL.RESNETS.NORM GN MODEL.RESNETS.STEM_OUT_CHANNELS 32 CLASSIFICATION.RESIZE 64"
    short += " MODEL.RESNETS.RES2_OUT_CHANNELS 64 CLASSIFICATION.CROP 64 --precision stock"
    for processes in (1, 2):
        words = [*short.split(), "--num-gpus", str(processes)]
        assert pretrain(trained / "data", trained / f"by_{processes}", *words) == 0
    one, other = (content(trained / f"by_{processes}")["model"] for processes in (1, 2))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
    assert rows(trained / "by_1")[0]["total_loss"] != rows(trained / "by_1")[1]["total_loss"]


def test_a_part_of_the_classes_is_tested_both_ways(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As ImageNet-5K's models on ImageNet-1K: among all classes, and among those of the images."""
    data = tmp_path / "data"
    shutil.copytree(trained / "data", data)
    for name in "789":
        shutil.rmtree(data / "val" / name)
    listed = tmp_path / "synsets.txt"
    listed.write_text("".join(f"{number}\n" for number in range(9)))
    words = ["--synsets", str(listed), "DATALOADER.NUM_WORKERS", "0", "SOLVER.MAX_ITER", "3"]
    words += ["MODEL.RESNETS.RES2_OUT_CHANNELS", "8"]  # as wide as the stem
    assert pretrain(data, tmp_path / "run", *words) == 0
    last = rows(tmp_path / "run")[-1]
    file = tmp_path / "run" / "model_final.pth"
    found = evaluate(str(file), data / "val", device="cpu")
    assert {"top1": last["7_way/top1"], "top5": last["7_way/top5"]} == found["7_way"]
    assert (found["top1"], found["top5"]) == (last["top1"], last["top5"])
    assert found["preprocessing"] == {**vars(Preprocessing(36, 32)), "ten_crop": False}
    weights, network, classes = load_classifier(file)
    assert classes == 9 and weights.pixels is not None
    views = validation_images(data / "val", 9, Preprocessing(36, 32), names=[*"012345678"])
    with torch.inference_mode():
        images = torch.stack([views[number][0][0] for number in range(len(views))])
        scores = network(weights.pixels.normalize(images))["linear"]
    truth = torch.tensor([views[number][1] for number in range(len(views))])
    assert last["loss"] == pytest.approx(float(F.cross_entropy(scores, truth)), rel=1e-4)
    right = [(scores[:, :count].argmax(1) == truth).double().mean().item() for count in (9, 7)]
    assert [100 * each for each in right] == pytest.approx([last["top1"], last["7_way/top1"]])
    ten = evaluate(str(file), data / "val", ten_crop=True, device="cpu")
    with torch.inference_mode():
        views = Views(views.images, Preprocessing(36, 32, ten_crop=True), views.chosen)
        crops = torch.cat([views[number][0] for number in range(len(views))])
        mean = network(weights.pixels.normalize(crops))["linear"].view(len(views), 10, 9).mean(1)
    assert ten["top1"] == pytest.approx(100 * (mean.argmax(1) == truth).double().mean().item())
    (data / "val" / "0").rename(data / "val" / "zero")
    with pytest.raises(DatasetError, match=r"1 only in .*val: 'zero'"):
        evaluate(str(file), data / "val", device="cpu")


@pytest.mark.slow
def test_a_narrow_resnext_29_learns_digits(tmp_path: Path) -> None:
    """To 98 % of a held-out fifth."""
    data = write_cifar(tmp_path)
    words = ["pretrain", "--recipe", "cifar10", "--data", str(data)]
    words += ["--output", str(tmp_path / "run")]
    narrow = "MODEL.RESNETS.STEM_OUT_CHANNELS 16 MODEL.RESNETS.RES2_OUT_CHANNELS 16"
    narrow += " SOLVER.IMS_PER_BATCH 64 SOLVER.REFERENCE_WORLD_SIZE 0 SOLVER.MAX_EPOCHS 12"
    narrow += " INPUT.RANDOM_FLIP none DATALOADER.NUM_WORKERS 0 TEST.EVAL_PERIOD 0"
    assert main([*words, "--template", "2x4d", *narrow.split()]) == 0
    assert rows(tmp_path / "run")[-1]["top1"] >= 98


def test_report_of_a_classifier(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained / "whole", run)
    last = rows(run)[-1]
    written = json.loads(results_file(run).read_text())
    text = write_report(run).read_text()
    assert written["figures"]["all_classes"] == {"top1": last["top1"], "top5": last["top5"]}
    assert f"<dt>Top-1 error</dt><dd>{100 - last['top1']:.2f} %</dd>" in text
    right = sum(each["images"] * each["top1"] for each in written["classes"]) / 40
    assert right == pytest.approx(last["top1"])
    counts = [each[2] for each in written["confusion"]]
    diagonal = [count for actual, said, count in written["confusion"] if actual == said]
    assert (100 * sum(diagonal) / 40, sum(counts)) == (last["top1"], 40)
    assert [each["loss"] for each in written["worst"]] == sorted(
        (each["loss"] for each in written["worst"]), reverse=True
    )
    assert text.count("data:image/jpeg;base64,") == 24 and "Error in %" in text
    assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org", "")
    hostile = "<script>alert(1)</script>"
    written["classes"][0]["name"] = written["worst"][0]["image"] = hostile
    written["confusion"] = [[hostile, hostile, 3]]
    results_file(run).write_text(json.dumps(written))
    assert hostile not in write_report(run).read_text()
    for key, value in (("worst", [{}]), ("classes", 3), ("confusion", [["a", "b", 1]])):
        results_file(run).write_text(json.dumps({**written, key: value}))
        with pytest.raises(DatasetError, match=r"classification\.json is malformed"):
            write_report(run)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["MODEL.META_ARCHITECTURE", "GeneralizedRCNN"], "this is no recipe of a classifier"),
        (["DATASETS.TEST", "('a','b')"], r"DATASETS.TEST is \('a', 'b'\): name one split"),
        (["DATALOADER.ASPECT_RATIO_GROUPING", "True"], "ASPECT_RATIO_GROUPING is True"),
        (["DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"], "must be TrainingSampler"),
        (["TEST.VALIDATION_LOSS", "True"], "VALIDATION_LOSS is True"),
        (["CLASSIFICATION.RESIZE", "200"], "RESIZE is 200, and CROP 224"),
        (["INPUT.FORMAT", "RGB"], "INPUT.FORMAT is RGB"),
        (["MODEL.PIXEL_STD", "[1.0,1.0,1.0]"], "but weights for detectors are trained with BGR"),
        (["CLASSIFICATION.LAYOUT", "cifar10", "CLASSIFICATION.SYNSETS", "a"], "SYNSETS needs"),
        (["CLASSIFICATION.DATA", "/none"], "does not have one folder of images for each class"),
        (["CLASSIFICATION.LAYOUT", "cifar10"], "cifar-10-batches-py does not exist"),
    ],
)
def test_refuses_what_cannot_train(words: list[str], said: str) -> None:
    with pytest.raises(ResNeXtError, match=said):
        prepared(load_config(recipe("folder"), words))


@pytest.mark.parametrize(
    "words",
    [
        ["MODEL.RESNEXT.PRE_ACTIVATION", "True"],
        ["MODEL.BACKBONE.FREEZE_AT", "1"],
        ["MODEL.RESNEXT.CHECKPOINT_STAGES", "['res2']"],
    ],
)
def test_cifars_network_refuses_settings_that_it_lacks(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="DEPTH is 29, the network for CIFAR"):
        build_classifier(load_config(recipe("cifar10"), words))
