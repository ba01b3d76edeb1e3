"""`resnext-det eval`: `train` with --eval-only."""

from resnext_det.commands.train import run as run
