"""Arguments of the wrong type, refused before they end in an error of PyTorch's."""

from __future__ import annotations

from collections.abc import Sequence

from resnext_det.errors import ConfigError
from resnext_det.modeling.template import Template

# The config key of each argument, to be named in errors.
_KEYS = {
    "depth": "MODEL.RESNETS.DEPTH",
    "template": "the template",
    "in_channels": "the number of input channels",
    "stem_out_channels": "MODEL.RESNETS.STEM_OUT_CHANNELS",
    "res2_out_channels": "MODEL.RESNETS.RES2_OUT_CHANNELS",
    "norm": "MODEL.RESNETS.NORM",
    "res5_dilation": "MODEL.RESNETS.RES5_DILATION",
    "deform_on_per_stage": "MODEL.RESNETS.DEFORM_ON_PER_STAGE",
    "out_features": "MODEL.RESNETS.OUT_FEATURES",
    "freeze_at": "MODEL.BACKBONE.FREEZE_AT",
    "form": "MODEL.RESNEXT.FORM",
    "num_groups": "MODEL.RESNETS.NUM_GROUPS",
    "width_per_group": "MODEL.RESNETS.WIDTH_PER_GROUP",
    "in_features": "MODEL.FPN.IN_FEATURES",
    "out_channels": "MODEL.FPN.OUT_CHANNELS",
}
_POSITIVE = (
    *("in_channels", "stem_out_channels", "res2_out_channels", "out_channels"),
    *("num_groups", "width_per_group"),
)
_WHOLE = (*_POSITIVE, "depth", "res5_dilation", "freeze_at")
_LISTS = ("deform_on_per_stage", "out_features", "in_features")


def check_types(**arguments: object) -> None:
    """Refuse arguments of the wrong type; their ranges are checked where they are used.

    Args:
        arguments: by the names that `ResNeXt` gives them.

    Raises:
        ConfigError: the config key, the value, and what it must be.
    """
    for name, value in arguments.items():
        wanted = _wrong(name, value)
        if wanted:
            raise ConfigError(f"{_KEYS[name]} is {value!r}; it must be {wanted}.")


def _wrong(name: str, value: object) -> str | None:
    """Return what an argument must be, where it is not that."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if name in _POSITIVE:
        return None if whole and int(str(value)) > 0 else "a whole number of 1 or more"
    if name in _WHOLE:
        return None if whole else "a whole number"
    if name in _LISTS:
        listed = isinstance(value, Sequence) and not isinstance(value, str)
        return None if listed or (value is None and name == "out_features") else "a list"
    if name == "template":
        return None if isinstance(value, str | Template) else 'written as "32x4d"'
    if name == "form":
        return None if isinstance(value, str) else "a name, such as grouped"
    return None if value is None or isinstance(value, str) or callable(value) else "a name"
