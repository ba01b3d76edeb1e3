"""MODEL_ZOO.md: what the shipped configs cost, how they are trained, and what is published."""

from __future__ import annotations

import functools
import importlib.resources
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from jinja2 import Environment, StrictUndefined
from tqdm import tqdm

from resnext_det import model_zoo
from resnext_det.data.toy import ToySpec
from resnext_det.modeling.complexity import detector_complexity
from resnext_det.modeling.resnext import template_of
from resnext_det.modeling.stages import STAGES
from resnext_det.modeling.template import Template
from resnext_det.published.results import published_results
from resnext_det.published.setting import COCO_TRAIN_IMAGES
from resnext_det.zoo_page.results import OwnResult
from resnext_det.zoo_page.rows import STARTS_FROM, Config, Model

_EXAMPLE = "faster_rcnn_X_50_32x4d_FPN_paper"


def count_configs(results: Mapping[str, OwnResult]) -> list[Config]:
    """Return every shipped config, its detector built and counted: about 10 seconds, once.

    No data set is read, and no GPU used: the counts are the same on every machine.

    Args:
        results: what the configs reached here, by name, see `read_results`.
    """
    bar = tqdm(model_zoo.names(), desc="counting", unit="config", leave=False, disable=None)
    return [replace(_counted(name), result=results.get(name)) for name in bar]


def render(configs: Sequence[Config]) -> str:
    """Return the page about configs, see `count_configs`."""
    models = _models(configs)
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    template = importlib.resources.files("resnext_det.zoo_page").joinpath("page.md.j2")
    return environment.from_string(template.read_text(encoding="utf-8")).render(
        models=models,
        sizes=_sizes(configs),
        coco_images=COCO_TRAIN_IMAGES,
        toy_images=ToySpec().train_images,
        notes=models[0].notes,
        results=[c.result for c in sorted(configs, key=lambda c: c.name) if c.result],
        trained_on_coco=any(c.result and c.on_coco for c in configs),
        example=_EXAMPLE,
        example_weights=STARTS_FROM[50, "32x4d"][0],
    )


@functools.cache
def _counted(name: str) -> Config:
    cfg = model_zoo.get_config(name)
    complexity = detector_complexity(cfg)
    return Config(
        name,
        cfg,
        parameters=complexity.total.parameters,
        backbone_parameters=sum(
            part.parameters for part in complexity.parts if part.name in ("stem", *STAGES)
        ),
        multiply_adds=complexity.total.multiply_adds,
        size=(complexity.height, complexity.width, complexity.regions),
    )


def _models(configs: Iterable[Config]) -> list[Model]:
    """Return the configs by network: on COCO first, then by depth and by multiply-adds."""

    def network(config: Config) -> tuple[bool, int, int, str]:
        depth, template = config.cfg.MODEL.RESNETS.DEPTH, template_of(config.cfg)
        return not config.on_coco, depth, template.network(depth).multiply_adds, str(template)

    ordered = sorted(configs, key=lambda c: (network(c), c.epochs, c.name))
    groups = [(key, list(group)) for key, group in itertools.groupby(ordered, key=network)]
    networks = [(depth, Template(notation)) for (_, depth, _, notation), _ in groups]
    notes = list(
        dict.fromkeys(
            note for each in networks for row in published_results(*each) for note in row.caveats
        )
    )
    return [Model(*each, group, notes) for each, (_, group) in zip(networks, groups)]


def _sizes(configs: Sequence[Config]) -> list[dict[str, object]]:
    """Return the sizes that detectors were counted at, the commonest first, and of which."""
    by_size: dict[tuple[int, int, int], list[Config]] = {}
    for config in configs:
        by_size.setdefault(config.size, []).append(config)
    found: list[dict[str, object]] = []
    for (height, width, regions), group in sorted(by_size.items(), key=lambda i: -len(i[1])):
        given = group[0].cfg.INPUT
        image, seen = f"{given.MIN_SIZE_TEST} x {given.MAX_SIZE_TEST}", f"{height} x {width}"
        names = ", ".join(f"`{config.name}`" for config in group)
        found.append(
            {
                "image": image,
                "padding": "" if seen == image else f", padded to {seen} for the network,",
                "regions": regions,
                "names": f" for {names}" if found else "",
            }
        )
    return found
