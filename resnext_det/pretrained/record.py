"""What a converted file says about itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from resnext_det.errors import WeightsError, plain, quoted
from resnext_det.pretrained.pixels import Pixels

T = TypeVar("T")


@dataclass(frozen=True)
class Record:
    """Where converted weights came from, and what they ask for.

    Attributes:
        source: the name of the file that was converted first.
        sha256: its digest.
        layout: its layout.
        depth: layers, such as 50.
        template: such as "32x4d".
        pixels: what the converted weights take for an image; None where that is not known.
        fused: batch norms hold weight and bias alone; only FrozenBN takes them.
        stride_in_1x1: where the source had its stride; None where that is not known.
        name: in the catalog, such as "resnext50_32x4d.tv_in1k"; None for a file that is not in it.
        licence: of the weights; None where it is not known.
        top1: published accuracy on ImageNet-1K in per cent; None where there is none.
        top5: the same, of the five best.
    """

    source: str
    sha256: str
    layout: str
    depth: int
    template: str
    pixels: Pixels | None
    fused: bool
    stride_in_1x1: bool | None
    name: str | None = None
    licence: str | None = None
    top1: float | None = None
    top5: float | None = None

    def plain(self) -> dict[str, Any]:
        """Return it in plain containers, as a file holds it."""
        return asdict(self)

    @classmethod
    def of(cls, content: Any) -> Record | None:
        """Read what a file holds; None where it holds nothing.

        Raises:
            WeightsError: it holds something else.
        """
        if content is None:
            return None
        try:
            fields: Mapping[str, Any] = dict(content)
            words = {
                key: plain(str(fields[key])) for key in ("source", "sha256", "layout", "template")
            }
            return cls(
                **words,
                depth=int(fields["depth"]),
                pixels=_pixels(fields["pixels"]),
                fused=bool(fields["fused"]),
                stride_in_1x1=_unless_none(bool, fields["stride_in_1x1"]),
                name=_unless_none(plain, fields["name"]),
                licence=_unless_none(plain, fields["licence"]),
                top1=_unless_none(float, fields["top1"]),
                top5=_unless_none(float, fields["top5"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise WeightsError(
                f"its record of where it came from cannot be read ({quoted(error)}); "
                "convert it again."
            ) from error


def _unless_none(kind: Callable[[Any], T], value: Any) -> T | None:
    return None if value is None else kind(value)


def _pixels(content: Any) -> Pixels | None:
    if content is None:
        return None
    return Pixels(
        str(content["order"]),
        float(content["range"]),
        tuple(float(value) for value in content["mean"]),  # type: ignore[arg-type]
        tuple(float(value) for value in content["std"]),  # type: ignore[arg-type]
    )
