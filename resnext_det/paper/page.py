"""docs/paper.md: a section for each table and figure of the paper."""

from __future__ import annotations

from typing import Any

from resnext_det.paper.tables import commands, markdown, published, table_rows

_HEAD = """# The paper, table by table

`resnext-det paper` writes this page from `resnext_det/paper/published.yaml`, the built networks and
the shipped recipes. It follows *Aggregated Residual Transformations for Deep Neural Networks*
([arXiv 1611.05431v2](https://arxiv.org/abs/1611.05431v2)).

Parameters and multiply-adds are counted on the networks that the commands build: ImageNet's at 224
x 224 pixels, CIFAR's at 32 x 32. Errors are in per cent, on one central crop of a validation image;
"320" is a crop of 320 pixels instead of 224.

GPU-hours are those of the paper's hardware, the M40. It times a mini-batch of {images} images on
{gpus} of them for two networks only (section 5.1): {seconds}.
A star marks hours computed from these in proportion to multiply-adds and to the images that the
recipe trains on: from ResNet-101's for cardinality 1, else from ResNeXt-101's.

Commands are those of `.venv/bin`, in the repository. A folder such as `output/imagenet1k_50_1x64d`
occurs in several tables: train it once. The data are described in [Pretraining](pretraining.md) and
[Training](training.md).
"""


def page() -> str:
    """Return the whole page, in Markdown."""
    paper = published()
    timing = paper["timing"]
    seconds = " and ".join(
        f"{value:.2f} s for {name.replace(' ', ' layers, ')}"
        for name, value in timing["seconds"].items()
    )
    head = _HEAD.format(seconds=seconds, gpus=timing["gpus"], images=timing["images"])
    return "\n".join([head, *(_section(table, paper) for table in paper["tables"])])


def _section(table: dict[str, Any], paper: dict[str, Any]) -> str:
    parts = [f"## {table['name']}: {table['title']}", table["claim"]]
    if "misread" in table:
        parts.append("\n".join(["Often misread:\n", *(f"- {each}" for each in table["misread"])]))
    if "rows" in table:
        parts.append(markdown(table_rows(table, paper)))
    parts += table.get("notes", ())
    parts.append("\n".join(["```bash", *commands(table, paper), "```"]))
    return "\n\n".join(parts) + "\n"
