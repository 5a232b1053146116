"""Pictures -> objects: the one interface behind the GenEval reward, and what stands behind it.

H, W: a picture's height and width. Boxes are (x0, y0, x1, y1) in pixels.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image

from tdm_r1 import shapes
from tdm_r1.errors import ConfigError

BATCH = 8
# Other spellings of COCO's classes -> GenEval's.
_ALIASES = {
    "remote": "tv remote", "mouse": "computer mouse", "keyboard": "computer keyboard",
    "motorbike": "motorcycle", "aeroplane": "airplane", "sofa": "couch", "tvmonitor": "tv",
    "pottedplant": "potted plant", "diningtable": "dining table", "hair dryer": "hair drier",
}  # fmt: skip


class Detected(NamedTuple):
    """One object: class, confidence in [0, 1], box, and a bool mask where the detector has one."""

    label: str
    score: float
    box: tuple[float, float, float, float]
    mask_HW: np.ndarray | None = None


class Detector(Protocol):
    """Finds objects of the classes `labels` in RGB pictures of any sizes."""

    labels: tuple[str, ...]

    def __call__(self, images: Sequence[Image.Image], threshold: float) -> list[list[Detected]]:
        """The objects of each picture with score > threshold, most confident first."""
        ...


class ShapesDetector:
    """The embedded world's checker: circles, squares and triangles, all of confidence 1."""

    labels: tuple[str, ...] = shapes.SHAPES

    def __call__(self, images: Sequence[Image.Image], threshold: float) -> list[list[Detected]]:
        found = []
        for image in images:
            objects, _ = shapes.detect(np.asarray(image.convert("RGB")))
            found.append([Detected(d.shape, 1.0, d.box) for d in objects if d.shape])
        return found


class ModelDetector:
    """A model of transformers for object detection or for instance segmentation.

    Detection: DETR, RT-DETR, D-FINE, YOLOS, ...; masks as well: Mask2Former, MaskFormer, ... All
    pictures of a call are scaled as the model's image processor says, `BATCH` at a time; boxes and
    masks are of the picture's own size. Of a mask, the box is its extent.
    """

    def __init__(self, name_or_dir: str, device: str = "auto") -> None:
        """Raises ConfigError for what is no such model, cannot be had, or has no class names."""
        self.device = pick_device(device)
        self.processor, self.model, self.masks = _load_detector(name_or_dir)
        self.model.to(self.device).eval()
        names = self.model.config.id2label
        self.names = {int(i): _ALIASES.get(name, name) for i, name in names.items()}
        self.labels = tuple(dict.fromkeys(self.names.values()))
        if all(name.startswith("LABEL_") for name in self.labels):
            raise ConfigError(
                f"detector {name_or_dir} does not name its classes: {self.labels[:3]}"
            )

    def to(self, device: torch.device) -> None:
        """Move the model."""
        self.device = device
        self.model.to(device)

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], threshold: float) -> list[list[Detected]]:
        found: list[list[Detected]] = []
        for start in range(0, len(images), BATCH):
            part = [image.convert("RGB") for image in images[start : start + BATCH]]
            inputs = self.processor(images=part, return_tensors="pt").to(self.device)
            sizes = [(image.height, image.width) for image in part]
            outputs = self.model(**inputs)
            read = self._read_masks if self.masks else self._read_boxes
            found += [
                sorted(objects, key=lambda d: -d.score)
                for objects in read(outputs, threshold, sizes)
            ]
        return found

    def _read_boxes(self, outputs: Any, threshold: float, sizes: list) -> list[list[Detected]]:
        results = self.processor.post_process_object_detection(
            outputs, threshold=threshold, target_sizes=sizes
        )
        return [
            [
                Detected(self.names[label], score, tuple(box))
                for label, score, box in zip(
                    *(result[key].tolist() for key in ("labels", "scores", "boxes")), strict=True
                )
            ]
            for result in results
        ]

    def _read_masks(self, outputs: Any, threshold: float, sizes: list) -> list[list[Detected]]:
        process = self.processor.post_process_instance_segmentation
        # Overlapping objects keep their masks where the processor can say so.
        binary = "return_binary_maps" in inspect.signature(process).parameters
        options = {"return_binary_maps": True} if binary else {}
        results = process(outputs, threshold=threshold, target_sizes=sizes, **options)
        return [_segments(result, self.names, threshold) for result in results]


@lru_cache(maxsize=2)
def load_detector(name: str, device: str = "auto") -> Detector:
    """Return the detector of a name: "shapes", or a directory or Hub id for `ModelDetector`."""
    return ShapesDetector() if name == "shapes" else ModelDetector(name, device)


def pick_device(device: str) -> torch.device:
    """ "auto" -> the current CUDA device if there is one, else the CPU. Raises ConfigError."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device is {device!r}; allowed: auto, cpu, cuda, cuda:N") from error


def _load_detector(name: str) -> tuple[Any, Any, bool]:
    """(image processor, model, whether it predicts masks)."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    kinds: list[tuple[bool, Any]] = [
        (False, auto.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES),
        (True, auto.MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES),
        (True, auto.MODEL_FOR_INSTANCE_SEGMENTATION_MAPPING_NAMES),
    ]
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        stored = (config.architectures or [""])[0]
        masks = [m for m, names in kinds if names.get(config.model_type) == stored]
        if not masks:
            raise ConfigError(
                f"detector {name} is a {stored or config.model_type}; allowed: a transformers "
                "model for object detection or instance segmentation"
            )
        processor = transformers.AutoImageProcessor.from_pretrained(name)
        model = getattr(transformers, stored).from_pretrained(name)
    except (OSError, ImportError, ValueError, RuntimeError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(f"cannot load the detector {name!r}: {reason}") from error
    return processor, model, masks[0]


def _segments(result: dict, names: dict[int, str], threshold: float) -> list[Detected]:
    """One picture's segments; `segmentation` is one mask each, or one map of their ids."""
    maps = result["segmentation"]
    found = []
    for index, segment in enumerate(result["segments_info"]):
        mask = maps[index] > 0 if maps.ndim == 3 else maps == segment["id"]
        mask_HW = mask.cpu().numpy()
        if segment["score"] > threshold and mask_HW.any():
            label = names[segment["label_id"]]
            found.append(Detected(label, segment["score"], _extent(mask_HW), mask_HW))
    return found


def _extent(mask_HW: np.ndarray) -> tuple[float, float, float, float]:
    rows, columns = np.flatnonzero(mask_HW.any(axis=1)), np.flatnonzero(mask_HW.any(axis=0))
    return (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
