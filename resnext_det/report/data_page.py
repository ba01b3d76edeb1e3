"""One self-contained HTML page about a folder of data, before anything is trained on it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from resnext_det.data.folder import Folder
from resnext_det.data.survey import FEWEST, Survey
from resnext_det.errors import DatasetError
from resnext_det.files import write_text
from resnext_det.images import read_picture
from resnext_det.report.gallery import data_uri
from resnext_det.report.templates import rendered_page
from resnext_det.visualize.curves import COLOURS, rendered

_MOST_PAIRS = 12


@dataclass(frozen=True)
class Pair:
    """An image of train beside its double in another split, as data URIs."""

    title: str
    names: tuple[str, str]
    pictures: tuple[str, str]


def write_data_page(file: Path, folder: Folder, found: Survey) -> None:
    """Write the page, whole or not at all.

    Raises:
        ResNeXtError: it cannot be written.
    """
    findings = [("splits together", each) for each in found.findings]
    findings += [(split, each) for split, one in found.health.items() for each in one.findings]
    heading = "Objects at the training size, and anchors"
    page = rendered_page(
        "data.html.j2",
        title=folder.path.name or "data",
        layout=folder.layout,
        notes=folder.notes,
        found=found,
        pairs=_pairs(found),
        findings=sorted(findings, key=lambda each: each[1].severity),
        most=max(
            (count for counts in found.classes.values() for count in counts.values()), default=0
        ),
        fewest=FEWEST,
        charts={heading: _shapes(found)} if len(found.boxes) else {},
    )
    write_text(file, page)


def _pairs(found: Survey) -> list[Pair]:
    pairs: list[Pair] = []
    for each in found.shared:
        if len(pairs) == _MOST_PAIRS:
            break
        try:
            pictures = [data_uri(read_picture(file), [], [], []) for file in each.files]
        except DatasetError:
            continue  # unreadable images are among the findings
        kind = "identical" if each.identical else "nearly identical"
        title = f"{kind}, train and {each.split}"
        pairs.append(Pair(title, each.names, (pictures[0], pictures[1])))
    return pairs


def _shapes(found: Survey) -> bytes:
    """Draw how many objects have which width and height, and the anchors' among them."""
    sides = np.maximum(found.boxes[:, 2:], 1)
    figure = Figure(figsize=(5.2, 4.2), layout="constrained")
    axes = figure.add_subplot()
    highest = max(1024.0, float(sides.max()))
    bins = np.geomspace(min(4.0, float(sides.min())), highest, 40)
    axes.hist2d(sides[:, 0], sides[:, 1], bins=[bins, bins], cmap="Blues", cmin=1, rasterized=True)
    shown = {"anchors": found.anchors, "better ones": found.better[0] if found.better else None}
    for (name, anchors), colour, marker in zip(shown.items(), COLOURS[1:], "x+"):
        if anchors is None:
            continue
        levels = max(len(anchors.sizes), len(anchors.ratios))
        shapes = np.array(
            [
                (size / ratio**0.5, size * ratio**0.5)
                for level in range(levels)
                for size, ratio in itertools.product(
                    anchors.sizes[level % len(anchors.sizes)],
                    anchors.ratios[level % len(anchors.ratios)],
                )
            ]
        )
        axes.scatter(shapes[:, 0], shapes[:, 1], s=28, color=colour, marker=marker, label=name)
    axes.set(xscale="log", yscale="log", xlabel="width in pixels", ylabel="height in pixels")
    axes.spines[["top", "right"]].set_visible(False)
    return rendered(figure, "svg")
