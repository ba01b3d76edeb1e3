"""The pages' templates, and what they need to print figures."""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
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
    script = resources.files("resnext_det.report").joinpath("patch.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.globals |= {"script": script, "script_digest": f"'sha256-{digest}'"}
    return environment.get_template(template).render(**values)
