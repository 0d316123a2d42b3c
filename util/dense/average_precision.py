"""Detections in COCO's result format, and their average precision, by pycocotools."""

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from util.data.coco import Annotations
from util.errors import unreadable_is_user_error

Result = dict[str, Any]  # image_id, category_id, score, bbox (left, top, width, height) and perhaps segmentation

MEASURES = {"AP": 0, "AP50": 1, "AP75": 2, "AP_small": 3, "AP_medium": 4, "AP_large": 5}  # places in COCOeval.stats
MASK_THRESHOLD = 0.5


def results_of(detections: dict[str, Tensor], index: int, annotations: Annotations) -> list[Result]:
    """What a torchvision detector found in image `index`, with the file's own ids, the surest first.

    Detections of classes that the file does not have are left out: nothing in it says whether they are right.
    """
    boxes = detections["boxes"].cpu().double().numpy()
    boxes[:, 2:] -= boxes[:, :2]
    scores, labels = detections["scores"].tolist(), detections["labels"].tolist()
    results = []
    for i, (box, score, label) in enumerate(zip(boxes.round(2).tolist(), scores, labels)):
        category = annotations.category_ids[label - 1]
        if category == -1:
            continue
        result = {
            "image_id": annotations.image_ids[index],
            "category_id": category,
            "bbox": box,
            "score": round(score, 5),
        }
        if "masks" in detections:
            result["segmentation"] = encode_mask((detections["masks"][i, 0] > MASK_THRESHOLD).cpu().numpy())
        results.append(result)
    return results


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """A mask (height, width) as COCO's run lengths, which JSON can hold."""
    from pycocotools import mask as coco_mask

    encoded = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in encoded["size"]], "counts": encoded["counts"].decode()}


def average_precision(path: Path, results: list[Result], masks: bool) -> dict[str, float]:
    """COCO's measures in percent: `box_AP`, `box_AP50`, ..., with `masks` also `mask_AP`, ...

    AP is the mean over classes and over overlaps (IoU) of 50% to 95%; small, medium and large are below 32 x 32, up to
    96 x 96 and above 96 x 96 pixels. A measure that no annotation is for is -1.

    Args:
        path: of the annotations, all images of which were looked at.
        results: of them.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    measured = {}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its own table
        truth = COCO(os.fspath(path))
        for kind, name in {"bbox": "box", "segm": "mask"}.items() if masks else [("bbox", "box")]:
            found = truth.loadRes([dict(result) for result in results]) if results else COCO()
            if not results:
                found.dataset = {"images": truth.dataset["images"], "categories": truth.dataset["categories"]}
                found.dataset["annotations"] = []
                found.createIndex()
            evaluation = COCOeval(truth, found, kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            for measure, place in MEASURES.items():
                value = float(evaluation.stats[place])
                measured[f"{name}_{measure}"] = value if value < 0 else 100 * value
    return measured


def write_results(path: str, results: list[Result]) -> None:
    """The results as a JSON file, which COCO's server and pycocotools read.

    Raises:
        UserError: it cannot be written.
    """
    with unreadable_is_user_error(f"--predictions {path} cannot be written"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(results), encoding="utf-8")
