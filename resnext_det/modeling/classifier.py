"""A network with a classifier, trained and evaluated as Detectron2's models are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.modeling.backbone.resnet import ResNet
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor, nn
from torch.nn import functional as F


class ImageClassifier(nn.Module):
    """Normalizes images and classifies them; in training, the cross entropy is its loss."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, network: ResNet, mean: Sequence[float], std: Sequence[float]) -> None:
        """Initialize the model.

        Args:
            network: with a classifier, called "linear"; takes BGR images.
            mean: of the channels, BGR from 0 to 255.
            std: likewise.
        """
        super().__init__()
        self.network = network
        for name, values in (("pixel_mean", mean), ("pixel_std", std)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return the losses of a batch.

        Args:
            batch: dicts with "image", (3, H, W) in RGB from 0 to 255, and "label".
        """
        scores = self.scores(torch.stack([sample["image"] for sample in batch]))
        labels = torch.tensor([sample["label"] for sample in batch], device=scores.device)
        if has_event_storage():
            wrong = (scores.detach().argmax(1) != labels).float().mean()
            get_event_storage().put_scalar("train/top1_error", 100 * float(wrong))
        return {"loss_cls": F.cross_entropy(scores, labels)}

    def scores(self, images: Tensor) -> Tensor:
        """Return the scores of RGB images from 0 to 255, (N, 3, H, W): (N, classes) in float32."""
        images = images.to(self.pixel_mean.device).flip(1)
        scores: Tensor = self.network((images.float() - self.pixel_mean) / self.pixel_std)["linear"]
        return scores.float() if scores.dtype != torch.float64 else scores
