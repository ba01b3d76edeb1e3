"""How time grows with the image, the batch, the regions, the processes and the network."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode

from resnext_det.benchmark.contenders import BF16, FP32, STOCK, Inputs, example, with_settings
from resnext_det.benchmark.measure import Row, Run, Setup, Table, alternate, fresh_processes
from resnext_det.console import progress_bar
from resnext_det.errors import ignore_others_warnings

CONTENDERS = (STOCK, FP32, BF16)
_SHAPE = 1.36  # width by height, that of 800 x 1088
_LONGEST_WAIT = 600  # seconds for another process to get ready

Variants = Iterable[tuple[str, CfgNode, Inputs]]


def growth(setup: Setup) -> list[Table]:
    """Measure inference along each axis, with a quarter of the rounds, but two at least."""
    cfg, sizes = setup.cfg, setup.sizes
    rounds = max(2, setup.rounds // 4)
    one, small = [example(*sizes.image)], example(*sizes.training)

    def table(title: str, axis: str, note: str, variants: Variants) -> Table:
        rows = []
        for case, changed, inputs in variants:
            runs: dict[str, Run] = {c.name: c.inference(changed, inputs) for c in CONTENDERS}
            seconds = alternate(runs, rounds, f"{axis} {case}")
            rows += [Row(case, name, each_round) for name, each_round in seconds.items()]
        return Table(title, note, rows, axis=axis)

    image = f"One image of {sizes.image[0]} x {sizes.image[1]} pixels"
    tables = [
        table(
            "Growth with the image",
            "shorter side, pixels",
            "One image, 1.36 times as wide as high.",
            ((str(n), cfg, [example(n, round(n * _SHAPE))]) for n in sizes.shorter_sides),
        ),
        table(
            "Growth with the batch",
            "images in a batch",
            f"Images of {sizes.training[0]} x {sizes.training[1]} pixels; times are of the batch.",
            ((str(n), cfg, [small] * n) for n in sizes.batches),
        ),
        table(
            "Growth with the regions",
            "regions per image",
            f"{image}; `MODEL.RPN.POST_NMS_TOPK_TEST` is the number of regions.",
            ((str(n), _with_regions(cfg, n), one) for n in sizes.proposals),
        ),
        table(
            "Growth with the network",
            "depth and template",
            f"{image}.",
            (
                (f"{depth} {groups}x{width}d", _with_network(cfg, depth, groups, width), one)
                for depth, groups, width in sizes.networks
            ),
        ),
    ]
    cores = torch.get_num_threads()
    if cores > 1 and cfg.MODEL.DEVICE == "cpu":
        note = (
            f"{image} for each process; {cores} threads are divided among them. Seconds per image."
        )
        rows = [
            Row(str(count), each.name, _shared(partial(each.inference, cfg, one), count, rounds))
            for count, each in progress_bar(
                [*itertools.product((1, 2), CONTENDERS)], desc="processes", unit="measurement"
            )
        ]
        tables.append(Table("Growth with the processes", note, rows, axis="processes"))
    return tables


def _with_regions(cfg: CfgNode, count: int) -> CfgNode:
    before = max(count, cfg.MODEL.RPN.PRE_NMS_TOPK_TEST)
    limits = {"MODEL.RPN.POST_NMS_TOPK_TEST": count, "MODEL.RPN.PRE_NMS_TOPK_TEST": before}
    return with_settings(cfg, limits)


def _with_network(cfg: CfgNode, depth: int, groups: int, width: int) -> CfgNode:
    settings: Mapping[str, object] = {
        "MODEL.RESNETS.DEPTH": depth,
        "MODEL.RESNETS.NUM_GROUPS": groups,
        "MODEL.RESNETS.WIDTH_PER_GROUP": width,
        "MODEL.WEIGHTS": "",
    }
    return with_settings(cfg, settings)


_own: dict[str, Any] = {}
"""What a process of `_shared` runs."""


def _shared(build: Callable[[], Run], count: int, rounds: int) -> list[float]:
    """Return the seconds per image of `count` processes that work at the same time."""
    context = fresh_processes()
    arguments = (build, context.Barrier(count), max(1, torch.get_num_threads() // count))
    with ProcessPoolExecutor(count, context, _prepare, arguments) as pool:
        seconds = []
        for _ in range(rounds):
            started = [pool.submit(_take_part) for _ in range(count)]
            seconds.append(max(each.result() for each in started) / count)
    return seconds


def _prepare(build: Callable[[], Run], barrier: Any, threads: int) -> None:
    ignore_others_warnings()
    torch.set_num_threads(threads)
    _own.update(run=build(), barrier=barrier)
    _own["run"]()


def _take_part() -> float:
    _own["barrier"].wait(_LONGEST_WAIT)  # so each process gets one, and all start together
    start = time.perf_counter()
    _own["run"]()
    return time.perf_counter() - start
