"""Would more data help? Trains on a quarter, half and all of a run's images, and forecasts.

    %(prog)s --run output/photos
    %(prog)s --run output/photos --iterations 2000 --num-gpus 4
    %(prog)s --run output/photos --json SOLVER.IMS_PER_BATCH 8

It trains on a quarter, a half and all of the images, for a quarter of the run's iterations each by
default. The trainings and the forecast, how_much_data.json, go to RUN/how_much_data. The same
command continues what was interrupted.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from resnext_det_cli import flags

SHARES = 0.25, 0.5, 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=Path, required=True, metavar="RUN")
    parser.add_argument("--iterations", type=int, metavar="N", help="of each training")
    parser.add_argument("--seed", type=int, default=0, help="of the images that are left out")
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N", help="processes")
    parser.add_argument("--overwrite", action="store_true", help="replace earlier trainings")
    flags.add_json(parser)
    flags.add_overrides(parser)


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if arguments.iterations is not None and arguments.iterations < 1:
        parser.error(f"--iterations is {arguments.iterations}; it must be at least 1")
    if arguments.seed < 0:
        parser.error("--seed must be 0 or more")
    ours = {"OUTPUT_DIR", "DATASETS.TRAIN", "DATASETS.TEST", "SOLVER.MAX_ITER"}
    taken = sorted(ours & set(arguments.opts[::2]))
    if taken:
        parser.error(f"{', '.join(taken)} is set by this command; the length is --iterations")


def run(arguments: argparse.Namespace) -> int:
    """Train, and print the forecast; return the exit code of a training that stopped."""
    from resnext_det.console import json_alone

    with json_alone(arguments.json) as print_json:
        found = _forecast(arguments)
        if isinstance(found, int):
            return found
        print(f"\n{found.text()}")
        print_json(found.document())
    return 0


def _forecast(arguments: argparse.Namespace) -> Any:
    """Return the forecast, or the exit code of a training that stopped."""
    from resnext_det.data.annotations import read_annotations
    from resnext_det.data.dividing import nested
    from resnext_det.data.layouts import Part
    from resnext_det.errors import DatasetError, quoted
    from resnext_det.evaluation.annotations import read_ground_truth
    from resnext_det.evaluation.compare import read_baseline
    from resnext_det.evaluation.learning_curve import FILE, FOLDER, forecast
    from resnext_det.evaluation.results_file import metrics_file
    from resnext_det.files import write_json
    from resnext_det_cli import main

    folder = arguments.run / FOLDER
    settings, data = _settings(arguments)
    (train, images), (val, val_images) = data
    parts = nested(Part(read_annotations(train), images), SHARES, arguments.seed)
    counts = [part.annotated for part in parts]
    if len(set(counts)) < len(SHARES):  # refused by the forecast, but after the trainings
        raise DatasetError(
            f"a quarter, half and all of {quoted(train)} have {', '.join(map(str, counts))} images "
            "with objects, similar ones being kept together: three different numbers are needed."
        )
    if arguments.overwrite and folder.exists():  # all: an interruption must not mix old and new
        shutil.rmtree(folder)
    _check_plan(folder / "plan.json", [*settings, str(arguments.seed)], data)
    runs = []
    for share, part in zip(SHARES, parts):
        output = folder / f"{share:.0%}".replace("%", "_percent")
        print(f"{len(part.files):,} images: {output}")
        runs.append(output)
        if metrics_file(output) is not None:
            continue
        write_json(output / "train.json", part.document, indent=None)
        words = ["--train-json", output / "train.json", "--train-images", images]
        words += ["--test-json", val, "--test-images", val_images, *settings, "OUTPUT_DIR", output]
        if (output / "last_checkpoint").is_file():
            words.append("--resume")
        if code := main(["train", *map(str, words)]):
            return code
    truth = read_ground_truth(val, checked=True)
    found = forecast(truth, [read_baseline(each, truth) for each in runs], counts)
    write_json(folder / FILE, found.document())
    return found


def _settings(arguments: argparse.Namespace) -> tuple[list[str], list[tuple[Path, Path]]]:
    """Return words for `train`, and annotations and images of training and validation."""
    from detectron2.data import MetadataCatalog

    from resnext_det.config import load_config
    from resnext_det.data import custom
    from resnext_det.errors import ConfigError, quoted

    config = arguments.run / "config.yaml"
    if not config.is_file():
        raise ConfigError(
            f"--run {quoted(arguments.run)} holds no config.yaml: name the OUTPUT_DIR of a "
            "training."
        )
    cfg = load_config(str(config), arguments.opts)
    none = dict.fromkeys(("train_json", "train_images", "test_json", "test_images"))
    own = argparse.Namespace(**none, config_file=str(config), eval_only=False, opts=[])
    cfg = custom.from_arguments(cfg, own)
    data = []
    for key in ("TRAIN", "TEST"):
        names = cfg.DATASETS[key]
        metadata = MetadataCatalog.get(names[0]) if len(names) == 1 else None
        if metadata is None or not metadata.get("json_file") or not metadata.get("image_root"):
            raise ConfigError(
                f"DATASETS.{key} is {quoted(names)}: this command takes a run with one data set "
                "in COCO's format for each of training and validation."
            )
        data.append((Path(metadata.json_file), Path(metadata.image_root)))
    length = arguments.iterations or max(1, cfg.SOLVER.MAX_ITER // 4)
    scale = length / cfg.SOLVER.MAX_ITER
    steps = tuple(sorted({max(1, round(scale * each)) for each in cfg.SOLVER.STEPS}))
    overrides = {
        "SOLVER.MAX_ITER": length,
        "SOLVER.STEPS": tuple(each for each in steps if each < length),
        "SOLVER.WARMUP_ITERS": min(cfg.SOLVER.WARMUP_ITERS, length // 4),
        "SOLVER.CHECKPOINT_PERIOD": max(1, length // 4),
        "TEST.EVAL_PERIOD": 0,
    }
    words = ["--config-file", str(config), "--num-gpus", str(arguments.num_gpus)]
    words += [str(word) for pair in overrides.items() for word in pair]
    return [*words, *arguments.opts], data


def _check_plan(file: Path, settings: list[str], data: list[tuple[Path, Path]]) -> None:
    """Record what is trained; refuse to mix it with trainings of other settings or data."""
    from resnext_det.errors import ConfigError
    from resnext_det.files import file_digest, write_text

    plan = json.dumps({"words": settings, "data": [file_digest(each) for each, _ in data]})
    if file.is_file() and file.read_text(encoding="utf-8") != plan:
        raise ConfigError(
            f"{file.parent} holds trainings with other settings or data. Add --overwrite to "
            "replace them."
        )
    write_text(file, plan)
