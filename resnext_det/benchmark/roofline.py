"""How far each part of a detector is from the machine's limit, and what its time goes to."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.profiler import profile

from resnext_det.benchmark.contenders import BF16, FP32, STOCK, Inputs, example
from resnext_det.benchmark.measure import Row, Run, Setup, Table, alternate, synchronize
from resnext_det.modeling.complexity import Part, detector_complexity
from resnext_det.modeling.fast import DTYPES

CONTENDERS = {STOCK: "fp32", FP32: "fp32", BF16: "bf16"}
"""The contenders and the precision whose peak limits them."""

_REST = "proposals, NMS, rest"
_TOTAL = "whole detector"
# The modules of each part, and those below them that belong to another.
_MODULES = {
    "backbone": (["backbone.bottom_up"], []),
    "FPN": (["backbone"], ["backbone.bottom_up"]),
    "RPN head": (["proposal_generator.rpn_head"], []),
    "RoIAlign": (["roi_heads.box_pooler"], []),
    "box head": (["roi_heads.box_head", "roi_heads.box_predictor"], []),
}
_LABELS = {"stem": "backbone", "box predictor": "box head"}
_TOP = 8


def roofline(setup: Setup) -> list[Table]:
    """Compare each part's multiply-adds per second with the peak of matrix products."""
    cfg, (height, width) = setup.cfg, setup.sizes.image
    inputs: Inputs = [example(height, width)]
    products = matrix_products(setup)
    peaks = peaks_of(products)

    models: dict[str, Any] = {each.name: each.build(cfg).eval() for each in CONTENDERS}
    counted = detector_complexity(
        models[STOCK.name], height, width, regions=cfg.MODEL.RPN.POST_NMS_TOPK_TEST
    )
    watches = {name: Stopwatch(model, inputs) for name, model in models.items()}
    runs: dict[str, Run] = dict(watches)
    alternate(runs, setup.rounds, "roofline")
    limits = {each.name: peaks[precision] for each, precision in CONTENDERS.items()}
    seconds = {name: watch.seconds(setup.rounds) for name, watch in watches.items()}
    parts = Table(
        "Roofline",
        f"One image of {height} x {width} pixels with {counted.regions:,} regions: the "
        "multiply-adds of each part, its time, and the share of the peak (above) that it reaches. "
        "Counted are those of direct convolutions: Winograd's algorithm, which ours uses for large "
        "3x3 ones, needs a quarter, so a part may exceed 100 %. RoIAlign, NMS and the norms, "
        "activations and additions of the other parts have none that are counted.",
        part_rows(seconds, multiply_adds_by_part(counted.parts), limits),
    )
    total = multiply_adds_by_part(counted.parts)[_TOTAL]
    limit = Table(
        "The limit",
        f"All {total / 1e9:.0f} G multiply-adds at the peak of each precision, and nothing else: "
        "how fast a detector without Winograd's algorithm could be on this machine at best. If "
        "bf16 is no faster than fp32 here, as without AMX, it saves memory only.",
        [
            Row("whole detector", STOCK.name, seconds[STOCK.name][_TOTAL]),
            *(Row("whole detector", f"limit of {n}", [total / p]) for n, p in peaks.items()),
        ],
    )
    rows = []
    for name, watch in watches.items():
        rows += operators(name, torch.no_grad()(partial(watch.model, inputs)))
    note = "The operators that take the most time of one pass, by `torch.profiler`."
    return [products, limit, parts, Table("Profile", note, rows, compared=False)]


def matrix_products(setup: Setup) -> Table:
    """Measure the machine's peak in each precision."""
    side, device = setup.sizes.matrix, setup.cfg.MODEL.DEVICE
    runs: dict[str, Run] = {}
    for name in ("fp32", "bf16", "fp16"):
        one, other = (torch.randn(side, side, device=device).to(DTYPES[name]) for _ in range(2))
        runs[name] = lambda one=one, other=other: one @ other  # type: ignore[misc]
    seconds = alternate(runs, setup.rounds, "matrix products")
    rows = [
        Row(f"{side} x {side}", name, times, {"G multiply-adds/s": side**3 / min(times) / 1e9})
        for name, times in seconds.items()
    ]
    note = "The product of two square matrices by `torch.matmul`; the last column is the fastest."
    return Table("The machine's peak", note, rows)


def peaks_of(products: Table) -> dict[str, float]:
    """Return the multiply-adds per second of each precision."""
    return {row.name: 1e9 * float(row.more["G multiply-adds/s"]) for row in products.rows}


class Stopwatch:
    """Runs a detector and adds up the time in its parts."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self.model, self._inputs = model, inputs
        self._rounds: list[defaultdict[str, float]] = []
        self._started: dict[str, float] = {}
        for owned, excluded in _MODULES.values():
            for name in {*owned, *excluded}:
                self._watch(name)

    def _watch(self, name: str) -> None:
        try:
            module = self.model.get_submodule(name)
        except AttributeError:  # a detector of another architecture
            return
        if name in self._started:
            return
        self._started[name] = 0.0

        def start(*_: Any) -> None:
            synchronize()
            self._started[name] = time.perf_counter()

        def stop(*_: Any) -> None:
            synchronize()
            self._rounds[-1][name] += time.perf_counter() - self._started[name]

        module.register_forward_pre_hook(start)
        module.register_forward_hook(stop)

    @torch.no_grad()
    def __call__(self) -> None:
        """Detect the objects in the inputs."""
        self._rounds.append(defaultdict(float))
        start = time.perf_counter()
        self.model(self._inputs)
        synchronize()
        self._rounds[-1][_TOTAL] = time.perf_counter() - start

    def seconds(self, rounds: int) -> dict[str, list[float]]:
        """Return the seconds of the last rounds, by part."""
        found: defaultdict[str, list[float]] = defaultdict(list)
        for times in self._rounds[-rounds:]:
            rest = times[_TOTAL]
            for part, (owned, excluded) in _MODULES.items():
                if all(name in self._started for name in owned):
                    spent = sum(times[n] for n in owned) - sum(times[n] for n in excluded)
                    found[part].append(spent)
                    rest -= spent
            found[_REST].append(rest)
            found[_TOTAL].append(times[_TOTAL])
        return dict(found)


def multiply_adds_by_part(parts: Sequence[Part]) -> dict[str, int]:
    """Return the multiply-adds of the parts that a stopwatch tells apart, and of all."""
    counts: Counter[str] = Counter()
    for part in parts:
        label = "backbone" if part.name.startswith("res") else _LABELS.get(part.name, part.name)
        counts[label if label in _MODULES else _REST] += part.multiply_adds
    return {**counts, _TOTAL: counts.total()}


def part_rows(
    seconds: Mapping[str, Mapping[str, list[float]]],
    multiply_adds: Mapping[str, int],
    limits: Mapping[str, float],
) -> list[Row]:
    """Return a row for each part and contender.

    Args:
        seconds: by contender and part.
        multiply_adds: by part.
        limits: the multiply-adds per second that a contender's precision allows.
    """
    rows = []
    for part in next(iter(seconds.values())):
        for name, parts in seconds.items():
            row = Row(part, name, parts[part])
            if count := multiply_adds.get(part, 0):
                rate = count / row.median
                more = {
                    "G multiply-adds": count / 1e9,
                    "G/s": rate / 1e9,
                    "% of peak": 100 * rate / limits[name],
                }
                row = Row(part, name, parts[part], more)
            rows.append(row)
    return rows


def operators(name: str, run: Run) -> list[Row]:
    """Return the operators that take the most time of one run."""
    with profile() as profiler:
        run()
        synchronize()
    cuda = torch.cuda.is_available()
    own = [
        (event.key, (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6)
        for event in profiler.key_averages()
    ]
    total = sum(seconds for _, seconds in own)
    top = sorted(own, key=lambda pair: -pair[1])[:_TOP]
    return [Row(name, key, [spent], {"% of the pass": 100 * spent / total}) for key, spent in top]
