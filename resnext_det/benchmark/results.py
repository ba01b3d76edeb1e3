"""The results of a benchmark: the machine, the settings, and a JSON file of all tables."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import detectron2
import torch

from resnext_det.benchmark.measure import Row, Table
from resnext_det.environment import commit, versions
from resnext_det.errors import ConfigError, quoted
from resnext_det.files import open_regular, write_json

FILE = "benchmark.json"
_INSTRUCTIONS = (
    *("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_bf16", "amx_fp16", "asimd", "sve", "bf16", "i8mm"),
)


@dataclass(frozen=True)
class Results:
    """What was measured, on what.

    Attributes:
        machine: versions, processor, threads, GPU.
        settings: config, overrides, rounds; "quick" if figures mean nothing.
        sections: the tables of each section.
        dates: when each section was measured, as YYYY-MM-DD.
    """

    machine: Mapping[str, Any]
    settings: Mapping[str, Any]
    sections: Mapping[str, Sequence[Table]]
    dates: Mapping[str, str]

    def adding(self, section: str, tables: Sequence[Table]) -> Results:
        """Return the results with a section more, or with new tables of one."""
        today = datetime.now(timezone.utc).date().isoformat()
        sections = {**self.sections, section: tables}
        return Results(self.machine, self.settings, sections, {**self.dates, section: today})

    def write(self, file: Path) -> None:
        """Write a JSON file, whole or not at all."""
        write_json(file, asdict(self))

    @classmethod
    def read(cls, file: Path) -> Results:
        """Read what `write` wrote.

        Raises:
            ConfigError: it is missing or something else.
        """
        try:
            with open_regular(file) as stream:
                content = json.load(stream)
            sections = {
                name: [
                    Table(**{**table, "rows": [Row(**row) for row in table["rows"]]})
                    for table in tables
                ]
                for name, tables in content.pop("sections").items()
            }
            return cls(sections=sections, **content)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"{quoted(file)} is no result of `resnext-det benchmark`: {quoted(error)}. "
                "Run the benchmark with this --output first."
            ) from error


def machine() -> dict[str, Any]:
    """Return the versions, processor and GPU of this process."""
    found: dict[str, Any] = {"versions": versions()}
    for engine in ("openvino", "onnxruntime"):
        if importlib.util.find_spec(engine):
            found["versions"][engine] = importlib.metadata.version(engine)
    if checkout := commit(Path(detectron2.__file__)):
        found["versions"]["detectron2"] += f" ({checkout})"
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.exists() else ""
    name = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*: (.+)$", text, re.MULTILINE)
    return found | {
        "processor": name[1] if name else platform.processor() or platform.machine(),
        "instructions": [each for each in _INSTRUCTIONS if flags and each in flags[1].split()],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }
