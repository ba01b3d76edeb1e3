"""Draw what a trained detector finds on images, or on all images of a folder."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from resnext_det import load_config
from resnext_det.engine.predictor import Predictor
from resnext_det.errors import reported
from resnext_det.evaluation.drawing import draw_detections


def main() -> None:
    """Parse the arguments, detect, draw, write detections.json; a bad file is named and skipped."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--input", nargs="+", type=Path, required=True, help="images or folders")
    parser.add_argument("--output", type=Path, required=True, help="a folder")
    parser.add_argument("--threshold", type=float, default=0.5, help="lowest score drawn")
    parser.add_argument("--opts", nargs="*", default=[], metavar="KEY VALUE", help="overrides")
    arguments = parser.parse_args()
    with reported():
        predictor = Predictor(load_config(arguments.config_file, arguments.opts))
    print(predictor.report)
    arguments.output.mkdir(parents=True, exist_ok=True)
    found, skipped = {}, []
    for file in tqdm(images(arguments.input), unit="image", disable=None):
        try:
            picture = Image.open(file).convert("RGB")
        except OSError as error:
            skipped.append(f"{file}: {error}")
            continue
        detections = [d for d in predictor(picture) if d.score >= arguments.threshold]
        drawn = draw_detections(
            picture,
            [d.box for d in detections],
            [d.name for d in detections],
            [d.score for d in detections],
        )
        drawn.save(arguments.output / f"{file.stem}.jpg", quality=92)
        found[str(file)] = [vars(d) for d in detections]
    (arguments.output / "detections.json").write_text(json.dumps(found, indent=1))
    print(f"{len(found)} images drawn into {arguments.output}")
    if skipped:
        sys.exit("error: skipped " + "; ".join(skipped))


def images(inputs: list[Path]) -> list[Path]:
    """Return the files named, and the files of the folders named."""
    nested = (sorted(path.iterdir()) if path.is_dir() else [path] for path in inputs)
    return [file for files in nested for file in files]


if __name__ == "__main__":
    main()
