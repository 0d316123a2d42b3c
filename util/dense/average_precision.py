"""Detections in COCO's result format, and their average precision, by pycocotools."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torchvision.ops import box_convert

from util.data.coco import Annotations, decode_mask, is_crowd, why_no_mask
from util.errors import unreadable_is_user_error

Result = dict[str, Any]  # image_id, category_id, score, bbox (left, top, width, height) and perhaps segmentation

MEASURES = {"AP": 0, "AP50": 1, "AP75": 2, "AP_small": 3, "AP_medium": 4, "AP_large": 5}  # places in COCOeval.stats
MASK_THRESHOLD = 0.5


def results_of(detections: dict[str, Tensor], index: int, annotations: Annotations) -> list[Result]:
    """What a torchvision detector found in image `index`, with the file's own ids, the most confident first.

    Detections of classes that the file does not have are left out: nothing in it says whether they are right.
    """
    image = annotations.image_ids[index]
    boxes = box_convert(detections["boxes"].cpu().double(), "xyxy", "xywh").numpy().round(2).tolist()
    categories = [annotations.category_ids[label - 1] for label in detections["labels"].tolist()]
    results = [
        {"image_id": image, "category_id": category, "bbox": box, "score": round(score, 5)}
        for category, box, score in zip(categories, boxes, detections["scores"].tolist())
    ]
    if "masks" in detections:
        for result, mask in zip(results, (detections["masks"][:, 0] > MASK_THRESHOLD).cpu().numpy()):
            result["segmentation"] = encode_mask(mask)
    return [result for result in results if result["category_id"] is not None]


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """A mask (height, width) as COCO's run lengths, which JSON can hold."""
    from pycocotools import mask as coco_mask

    encoded = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in encoded["size"]], "counts": encoded["counts"].decode()}


def average_precision(path: Path, results: list[Result], masks: bool) -> dict[str, float]:
    """COCO's measures in percent: `box_AP`, `box_AP50`, ..., with `masks` also `mask_AP`, ...

    AP is the mean over classes and over overlaps (IoU) of 50% to 95%; small, medium and large are below 32 x 32, up to
    96 x 96 and above 96 x 96 pixels. A measure without annotations is -1.

    Args:
        path: of the annotations; the model has seen all their images.
        results: of them.
    """
    from pycocotools.cocoeval import COCOeval

    content = json.loads(path.read_bytes())
    for image in content["images"]:  # as `read_annotations` takes them: pycocotools wants no floats, nor strings
        image |= {side: int(image[side]) for side in ("height", "width")}
    kinds = {"bbox": "box", "segm": "mask"} if masks else {"bbox": "box"}
    measured = {}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its own table
        for kind, name in kinds.items():
            truth = indexed(content, true_annotations(content, kind))
            # For masks without boxes, from which pycocotools would take a result's size
            unlike = "bbox" if kind == "segm" else "segmentation"
            own = [{key: value for key, value in result.items() if key != unlike} for result in results]
            found = truth.loadRes(own) if results else indexed(content, [])
            evaluation = COCOeval(truth, found, kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            for measure, place in MEASURES.items():
                value = float(evaluation.stats[place])
                measured[f"{name}_{measure}"] = value if value < 0 else 100 * value
    return measured


def indexed(content: dict[str, Any], annotations: list[dict[str, Any]]):
    """The images and categories of a file's content with these annotations, as a pycocotools COCO."""
    from pycocotools.coco import COCO

    coco = COCO()
    coco.dataset = {"images": content["images"], "categories": content["categories"], "annotations": annotations}
    coco.createIndex()
    return coco


def true_annotations(content: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """The annotations of a file's content as pycocotools compares their 'bbox' or 'segm': all with iscrowd and area.

    They are numbered from 1, since it takes a match with number 0 for none. Invalid masks are left out: after
    `read_annotations`, only crowds and boxes without area can have them.
    """
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    annotations = []
    for number, given in enumerate(content["annotations"], start=1):
        annotation, size = given | {"id": number, "iscrowd": int(is_crowd(given))}, sizes[given["image_id"]]
        if kind == "segm" and why_no_mask(given.get("segmentation"), *size):
            continue
        if not isinstance(given.get("area"), int | float):
            width, height = given["bbox"][2:]
            annotation["area"] = (
                width * height if kind == "bbox" else int(decode_mask(given["segmentation"], *size).sum())
            )
        annotations.append(annotation)
    return annotations


def write_results(path: str, results: list[Result]) -> None:
    """The results as a JSON file, which COCO's server and pycocotools read.

    Raises:
        UserError: it cannot be written.
    """
    with unreadable_is_user_error(f"--predictions {path} cannot be written"):
        Path(path).write_text(json.dumps(results), encoding="utf-8")
