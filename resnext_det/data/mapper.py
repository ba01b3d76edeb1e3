"""The dataset mapper: from a record of a data set to the model's input."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import BoxMode

from resnext_det.config import complete
from resnext_det.config_rules import refuse, wrong
from resnext_det.data.keypoints import note_keypoints
from resnext_det.data.proposals import STORED
from resnext_det.data.records import Record
from resnext_det.data.resizing import FastAugInput, channels_first
from resnext_det.errors import DatasetError, quoted
from resnext_det.images import check_pixel_format, read_image, read_labels


class NamingDatasetMapper(DatasetMapper):
    """Detectron2's mapper with this package's image reader, and errors that name the file.

    As in COCO, an object without keypoints counts as one whose keypoints are all unlabelled.
    """

    @configurable  # type: ignore[untyped-decorator]
    def __init__(self, *args: Any, decoder: str = "fast", **kwargs: Any) -> None:
        """Build a mapper from a config or from values.

        Args:
            args: as for Detectron2's mapper.
            decoder: as DATALOADER.DECODER.
            kwargs: as for Detectron2's mapper.

        Raises:
            ConfigError: the decoder is unknown.
        """
        refuse(wrong("DATALOADER.DECODER", decoder))
        super().__init__(*args, **kwargs)
        self.is_fast = decoder == "fast"

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Return the arguments for a config.

        Raises:
            ConfigError: INPUT.FORMAT is unknown or does not fit MODEL.PIXEL_MEAN.
            DatasetError: a data set has no keypoints, or not as many as the model.
        """
        check_pixel_format(cfg.INPUT.FORMAT, len(cfg.MODEL.PIXEL_MEAN))
        if cfg.MODEL.KEYPOINT_ON and not is_train:
            # Detectron2 looks up the flips of keypoints in DATASETS.TRAIN, which may be empty.
            cfg = cfg.clone()
            cfg.defrost()
            cfg.MODEL.KEYPOINT_ON = False
        elif cfg.MODEL.KEYPOINT_ON:
            note_keypoints([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])
            _check_keypoints(cfg)
        arguments: dict[str, Any] = super().from_config(cfg, is_train)
        return {**arguments, "decoder": complete(cfg).DATALOADER.DECODER}

    def __call__(self, dataset_dict: Record) -> Record | None:
        """Return the model's input for a record in Detectron2's format, which is not changed.

        Raises:
            DatasetError: the image cannot be read, has another size than its record, or cannot be
                augmented.
        """
        record = self._copied(dataset_dict)
        labels = None
        try:
            pixels = read_image(record["file_name"], self.image_format, fast=self.is_fast)
            if "sem_seg_file_name" in record:
                labels = read_labels(record.pop("sem_seg_file_name"))
        except DatasetError as error:
            raise DatasetError(f"{error} {self._advice}") from error
        image, labels, transforms = self._augmented(record, pixels, labels)
        record["image"] = channels_first(image)
        if labels is not None:
            record["sem_seg"] = torch.as_tensor(labels.astype("long"))
        if self.proposal_topk is not None:
            stored = record.pop(STORED, None)
            if stored is not None:
                record["proposal_boxes"], record["proposal_objectness_logits"] = stored.read()
                record["proposal_bbox_mode"] = BoxMode.XYXY_ABS
            utils.transform_proposals(
                record, image.shape[:2], transforms, proposal_topk=self.proposal_topk
            )
        if "annotations" in record:
            if self.keypoint_hflip_indices is not None:
                unlabelled = [0] * (3 * len(self.keypoint_hflip_indices))
                for annotation in record["annotations"]:
                    if len(annotation.get("keypoints", ())) != len(unlabelled):
                        annotation["keypoints"] = unlabelled
            self._transform_annotations(record, transforms, image.shape[:2])
        return record

    def _transform_annotations(
        self, record: Record, transforms: T.TransformList, size: tuple[int, int]
    ) -> None:
        """Replace the annotations by instances, as Detectron2 does, but all boxes in one call."""
        objects = [each for each in record["annotations"] if each.get("iscrowd", 0) == 0]
        modes = {each["bbox_mode"] for each in objects}
        is_plain = all(
            isinstance(each["bbox"], list) and len(each["bbox"]) == 4 for each in objects
        )
        if self.use_instance_mask or self.use_keypoint or len(modes) != 1 or not is_plain:
            super()._transform_annotations(record, transforms, size)  # type: ignore[no-untyped-call]
            return
        del record["annotations"]
        given: Any = torch.tensor([each["bbox"] for each in objects])
        given = BoxMode.convert(given, modes.pop(), BoxMode.XYXY_ABS)
        boxes = transforms.apply_box(given.double().numpy()).clip(min=0)
        found = [
            {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": each["category_id"]}
            for box, each in zip(np.minimum(boxes, (*size, *size)[::-1]), objects)
        ]
        record["instances"] = utils.filter_empty_instances(
            utils.annotations_to_instances(found, size)
        )

    def _copied(self, given: Record) -> Record:
        """Copy a record without the annotations that the model doesn't read: most are polygons."""
        record = {key: value for key, value in given.items() if key != "annotations"}
        if self.is_train and "annotations" in given:
            unread = () if self.use_instance_mask else ("segmentation",)
            record["annotations"] = [
                {key: value for key, value in each.items() if key not in unread}
                for each in given["annotations"]
            ]
        return copy.deepcopy(record)

    @property
    def _advice(self) -> str:
        skip = "; or set DATALOADER.BAD_IMAGES skip" if self.is_train else ""
        return f"Replace the file or remove it from the annotations{skip}."

    def _augmented(
        self, record: Record, pixels: Any, labels: Any
    ) -> tuple[Any, Any, T.TransformList]:
        height, width = pixels.shape[:2]
        name = quoted(Path(record["file_name"]))
        try:
            utils.check_image_size(record, pixels)
        except utils.SizeMismatchError as error:
            raise DatasetError(
                f"the image {name} has {width} x {height} pixels, but its annotations say "
                f"{quoted(record.get('width'), 20)} x {quoted(record.get('height'), 20)}. Correct "
                "them or replace the file."
            ) from error
        augmented = (FastAugInput if self.is_fast else T.AugInput)(pixels, sem_seg=labels)
        try:
            transforms = self.augmentations(augmented)
        except (ValueError, RuntimeError) as error:
            # Such as a strip whose shorter side is scaled to 0.
            raise DatasetError(
                f"the image {name} of {width} x {height} pixels cannot be resized or augmented: "
                f"{quoted(error)}. {self._advice}"
            ) from error
        return augmented.image, augmented.sem_seg, transforms


def _check_keypoints(cfg: CfgNode) -> None:
    number = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    for name in cfg.DATASETS.TRAIN:
        names = MetadataCatalog.get(name).get("keypoint_names")
        if names is None:
            raise DatasetError(
                f"MODEL.KEYPOINT_ON is True, but data set {quoted(name)} names no keypoints: add "
                '"keypoints" to the categories of its file, or keypoint_names and '
                "keypoint_flip_map to its metadata; or set MODEL.KEYPOINT_ON False."
            )
        if len(names) != number:
            raise DatasetError(
                f"data set {quoted(name)} has {len(names)} keypoints, but "
                f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {number}: set it to {len(names)}."
            )
