"""A record of a data set -> what the model takes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T

from resnext_det.data.keypoints import note_keypoints
from resnext_det.errors import DatasetError, quoted
from resnext_det.images import check_pixel_format, read_image, read_labels

Record = dict[str, Any]

_ADVICE = {
    True: "Replace the file, remove it from the annotations, or set DATALOADER.BAD_IMAGES skip.",
    False: "Replace the file, or remove it from the annotations.",
}


def _check_keypoints(cfg: CfgNode) -> None:
    for name in cfg.DATASETS.TRAIN:
        names = MetadataCatalog.get(name).get("keypoint_names")
        if names is None:
            raise DatasetError(
                f"MODEL.KEYPOINT_ON is True, and data set {quoted(name)} names no keypoints: add "
                '"keypoints" to the categories of its file, or keypoint_names and '
                "keypoint_flip_map to its metadata; or set MODEL.KEYPOINT_ON False."
            )
        if len(names) != cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS:
            raise DatasetError(
                f"data set {quoted(name)} has {len(names)} keypoints, and "
                "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is "
                f"{cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS}: set it to {len(names)}."
            )


class NamingDatasetMapper(DatasetMapper):
    """Detectron2's mapper with this package's reading of images, and errors that name the file.

    Masks, keypoints, proposals and semantic segmentation are Detectron2's; an object without
    keypoints counts as one whose keypoints are all unlabelled, as in COCO.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Return the arguments that a config stands for.

        Raises:
            ConfigError: INPUT.FORMAT is unknown, or does not fit MODEL.PIXEL_MEAN.
            DatasetError: a data set names no keypoints, or another number than the model has.
        """
        check_pixel_format(cfg.INPUT.FORMAT, len(cfg.MODEL.PIXEL_MEAN))
        if cfg.MODEL.KEYPOINT_ON and not is_train:
            # Detectron2 looks up how keypoints flip, in DATASETS.TRAIN, which may be empty.
            cfg = cfg.clone()
            cfg.defrost()
            cfg.MODEL.KEYPOINT_ON = False
        elif cfg.MODEL.KEYPOINT_ON:
            note_keypoints([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])
            _check_keypoints(cfg)
        arguments: dict[str, Any] = super().from_config(cfg, is_train)
        return arguments

    def __call__(self, dataset_dict: Record) -> Record | None:
        """Return what the model takes for one record of a data set.

        Args:
            dataset_dict: in Detectron2's format; it is not changed.

        Raises:
            DatasetError: the image cannot be read, is not of the size its record says, or has no
                pixel left after the resizing.
        """
        record = copy.deepcopy(dataset_dict)
        labels = None
        try:
            pixels = read_image(record["file_name"], self.image_format)
            if "sem_seg_file_name" in record:
                labels = read_labels(record.pop("sem_seg_file_name"))
        except DatasetError as error:
            raise DatasetError(f"{error} {_ADVICE[self.is_train]}") from error
        image, labels, transforms = self._augmented(record, pixels, labels)
        # A copy, since Pillow's own pixels cannot be written to.
        record["image"] = torch.as_tensor(np.array(image.transpose(2, 0, 1), order="C"))
        if labels is not None:
            record["sem_seg"] = torch.as_tensor(labels.astype("long"))
        if self.proposal_topk is not None:
            utils.transform_proposals(
                record, image.shape[:2], transforms, proposal_topk=self.proposal_topk
            )
        if not self.is_train:
            record.pop("annotations", None)
        elif "annotations" in record:
            if self.use_keypoint:
                self._complete_keypoints(record["annotations"])
            self._transform_annotations(  # type: ignore[no-untyped-call]
                record, transforms, image.shape[:2]
            )
        return record

    def _complete_keypoints(self, annotations: list[Record]) -> None:
        assert self.keypoint_hflip_indices is not None
        length = 3 * len(self.keypoint_hflip_indices)
        for annotation in annotations:
            if len(annotation.get("keypoints", ())) != length:
                annotation["keypoints"] = [0] * length

    def _augmented(
        self, record: Record, pixels: Any, labels: Any
    ) -> tuple[Any, Any, T.TransformList]:
        name = quoted(Path(record["file_name"]))
        try:
            utils.check_image_size(record, pixels)
        except ValueError as error:  # Detectron2's SizeMismatchError
            height, width = pixels.shape[:2]
            raise DatasetError(
                f"the image {name} is {width} x {height} pixels, and the annotations say "
                f"{quoted(record.get('width'), 20)} x {quoted(record.get('height'), 20)}. Correct "
                "them, or fetch the file again."
            ) from error
        augmented = T.AugInput(pixels, sem_seg=labels)
        try:
            transforms = self.augmentations(augmented)
        except (ValueError, RuntimeError) as error:
            # Such as a strip whose shorter side becomes 0 when the longer one is made to fit.
            height, width = pixels.shape[:2]
            raise DatasetError(
                f"the image {name} of {width} x {height} pixels cannot be resized or augmented: "
                f"{quoted(error)}. {_ADVICE[self.is_train]}"
            ) from error
        return augmented.image, augmented.sem_seg, transforms
