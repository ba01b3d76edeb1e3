"""docs/paper.md: a section for each table and figure of the paper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from resnext_det.paper.miniatures import definitions
from resnext_det.paper.statistics import MOST_SEEDS, interval, seeds_needed
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


def page(results: Mapping[str, Any]) -> str:
    """Return the whole page, in Markdown.

    Args:
        results: of the miniatures that have been run, by name, from `miniatures.collect`.
    """
    paper = published()
    timing = paper["timing"]
    seconds = " and ".join(
        f"{value:.2f} s for {name.replace(' ', ' layers, ')}"
        for name, value in timing["seconds"].items()
    )
    head = _HEAD.format(seconds=seconds, gpus=timing["gpus"], images=timing["images"])
    return "\n".join([head, *(_section(table, paper, results) for table in paper["tables"])])


def picture_name(name: str) -> str:
    """Return the file of an experiment's picture, beside the page."""
    return f"paper_{name}.png"


def _section(table: dict[str, Any], paper: dict[str, Any], results: Mapping[str, Any]) -> str:
    parts = [f"## {table['name']}: {table['title']}", table["claim"]]
    if "misread" in table:
        parts.append("\n".join(["Often misread:\n", *(f"- {each}" for each in table["misread"])]))
    if "rows" in table:
        parts.append(markdown(table_rows(table, paper)))
    parts += table.get("notes", ())
    parts.append("\n".join(["```bash", *commands(table, paper), "```"]))
    for name in table.get("miniatures", ()):
        parts += _miniature(name, results)
    return "\n\n".join(parts) + "\n"


def _miniature(name: str, results: Mapping[str, Any]) -> list[str]:
    """Return the paragraphs of an experiment in miniature."""
    defined = definitions()
    experiment = next(each for each in defined["experiments"] if each["name"] == name)
    about = defined["data"][experiment["data"]]["about"]
    parts = [f"### In miniature, on {experiment['data']}", f"On {about}"]
    parts += [experiment["note"]] if "note" in experiment else []
    command = f"`resnext-det paper --run output/paper --only {name}`"
    if name not in results:
        return [*parts, f"Not run here yet: {command}."]
    result = results[name]
    networks = {each["network"]: each for each in result["networks"]}
    metric = experiment.get("metric", "error")
    seeds = len(result["networks"][0]["error"])
    rows = [
        {
            "network": label,
            "parameters": f"{each['parameters']:,}",
            "multiply-adds": f"{each['multiply_adds'] / 1e6:.2f} M",
            "test error, mean": _mean(each["error"]),
            "training error, mean": _mean(each["train_error"]),
        }
        for label, each in networks.items()
    ]
    parts += [f"![errors]({picture_name(name)})", markdown(rows)]
    differences = [
        _difference(claim, networks, metric) for claim in experiment["claims"] if seeds > 1
    ]
    parts += ["\n".join(f"- {sentence}" for sentence in differences)] if differences else []
    minutes = sum(sum(each["seconds"]) for each in result["networks"]) / 60
    parts.append(
        f"{seeds} seeds, the same for each network; intervals are Student's, 95 %, over seeds. "
        f"Training errors are those of the last tenth of the updates. {command} took "
        f"{minutes:.1f} min of training in all on {result['hardware']}, {result['date']}."
    )
    if result["quick"]:
        parts.append("With `--quick`: a check that it runs. These errors mean nothing.")
    return parts


def _mean(errors: list[float]) -> str:
    mean, half = interval(errors)
    return f"{mean:.2f} \u00b1 {half:.2f}" if len(errors) > 1 else f"{mean:.2f}"


def _difference(claim: Mapping[str, str], networks: Mapping[str, Any], metric: str) -> str:
    """Return a sentence that says whether a claim of the paper shows, and what would show it."""
    worse, better = (networks[claim[side]][metric] for side in ("worse", "better"))
    differences = [one - other for one, other in zip(worse, better)]
    mean, half = interval(differences)
    kind = "test" if metric == "error" else "training"
    measured = (
        f"From {claim['worse']} to {claim['better']}, the {kind} error falls by {mean:.2f} points "
        f"(95 % interval {mean - half:.2f} to {mean + half:.2f}). "
    )
    if mean - half > 0:
        return measured + "The paper's order shows."
    if mean + half < 0:
        return measured + "The opposite of the paper's order."
    needed = seeds_needed(differences)
    seeds = f"{needed:,}" if needed else f"more than {MOST_SEEDS:,}"
    order = "The paper's order in the mean, but" if mean > 0 else "Not the paper's order, but"
    return (
        f"{measured}{order} within chance: with this spread, a difference of {abs(mean):.2f} "
        f"points takes {seeds} seeds to show (paired t-test, 5 %, power 80 %)."
    )
