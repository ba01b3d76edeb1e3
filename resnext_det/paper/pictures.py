"""Pictures of the miniatures' results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from resnext_det.paper.statistics import interval
from resnext_det.visualize.curves import COLOURS, rendered

_SIZE = (6.0, 3.4)  # inches


def picture(kind: str, result: Mapping[str, Any]) -> bytes:
    """Return a PNG of an experiment.

    Args:
        kind: "bars", each network's mean test error and interval; "sizes", the same over its
            parameters, a line for each cardinality; "curves", errors over the updates.
        result: of `miniatures.collect`.
    """
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    {"bars": _bars, "sizes": _sizes, "curves": _curves}[kind](axes, result["networks"])
    axes.set_ylabel("top-1 error in %")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return rendered(figure, "png")


def _bars(axes: Axes, networks: list[dict[str, Any]]) -> None:
    for number, network in enumerate(networks):
        mean, half = interval(network["error"])
        axes.plot(
            [number] * len(network["error"]), network["error"], "o", color=COLOURS[0], alpha=0.35
        )
        axes.errorbar(number, mean, half, fmt="_", color=COLOURS[1], markersize=18, capsize=4)
    names = [network["network"].replace(", ", "\n") for network in networks]
    axes.set_xticks(range(len(networks)), names, fontsize=9)


def _sizes(axes: Axes, networks: list[dict[str, Any]]) -> None:
    groups: dict[str, list[dict[str, Any]]] = {}
    for network in networks:
        cardinality = network["network"].split()[-1].partition("x")[0]
        groups.setdefault(cardinality, []).append(network)
    for (cardinality, members), colour in zip(groups.items(), COLOURS):
        parameters = [network["parameters"] for network in members]
        means, halves = zip(*(interval(network["error"]) for network in members))
        label = f"cardinality {cardinality}"
        axes.errorbar(parameters, means, halves, fmt="o-", color=colour, capsize=4, label=label)
    axes.set_xscale("log")
    axes.set_xlabel("parameters")


def _curves(axes: Axes, networks: list[dict[str, Any]]) -> None:
    for network, colour in zip(networks, COLOURS):
        for key, style, label in (("train_curve", "--", "train"), ("test_curve", "o-", "test")):
            updates, errors = zip(*network[key])
            axes.plot(updates, errors, style, color=colour, label=f"{network['network']}, {label}")
    axes.set_xlabel("updates")
    axes.set_ylim(bottom=0)
