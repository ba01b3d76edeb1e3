"""The pages' templates, and what they need to print figures."""

from __future__ import annotations

import base64
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from resnext_det.report.facts import dataset_title


def rendered_page(template: str, **values: Any) -> str:
    """Return the page of a template of this folder."""
    environment = Environment(
        loader=PackageLoader("resnext_det.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "figure": lambda value: "\u2013" if value is None else f"{value:.1f}",
        "signed": lambda value: "\u2013" if value is None else f"{value:+.2f}",
        "dataset": dataset_title,
        "svg": lambda content: f"data:image/svg+xml;base64,{base64.b64encode(content).decode()}",
        "css": lambda colour: f"rgb{colour}",
    }
    return environment.get_template(template).render(**values)
