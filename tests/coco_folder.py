"""Small folders in COCO's format: drawn shapes with exact masks on photographs; ways to spoil and to measure them."""

import argparse
import contextlib
import io
import json
import random
from pathlib import Path

import numpy as np
from photos import PHOTOS, data_args
from PIL import Image, ImageDraw

COLOURS = {"disc": (250, 60, 60), "square": (40, 80, 250)}
CATEGORIES = [{"id": 7, "name": "disc"}, {"id": 3, "name": "square"}]  # neither sorted nor without gaps


def make_coco(folder: Path, train: int = 8, val: int = 5, size: tuple[int, int] = (64, 72), seed: int = 0) -> Path:
    """`annotations/instances_*.json`, `train/` and `val/`; each first image has no boxes, each second one a crowd."""
    generator = random.Random(seed)
    (folder / "annotations").mkdir(parents=True)
    for split, count in (("train", train), ("val", val)):
        (folder / split).mkdir()
        images, annotations = [], []
        for i in range(count):
            height, width = size[0] + 8 * (i % 2), size[1]
            photo = Image.open(PHOTOS[i % len(PHOTOS)]).convert("RGB").resize((width, height))
            images.append({"id": 100 + i, "file_name": f"{i}.jpg", "height": height, "width": width})
            for kind in ("disc", "square") if i else ():
                side, left, top = generator.randint(18, 30), generator.randint(0, 5), generator.randint(0, 30)
                left += 36 * (kind == "square")  # beside the disc
                mask = Image.new("L", (width, height))
                for image, fill in ((photo, COLOURS[kind]), (mask, 1)):
                    draw = ImageDraw.Draw(image)
                    shape = draw.ellipse if kind == "disc" else draw.rectangle
                    shape((left, top, left + side, top + side), fill=fill)
                annotations.append(annotation(len(annotations) + 1, 100 + i, kind, np.asarray(mask)))
            if i == 1:
                crowd = np.zeros((height, width), np.uint8)
                crowd[-10:, -10:] = 1
                annotations.append(annotation(len(annotations) + 1, 100 + i, "disc", crowd) | {"iscrowd": 1})
            photo.save(folder / split / f"{i}.jpg", quality=95)
        content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return folder


def annotation(number: int, image_id: int, kind: str, mask: np.ndarray) -> dict:
    """Of a mask, as uncompressed run lengths (down the columns, beginning with zeros)."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
    flat = mask.T.ravel()
    changes = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *changes, flat.size]).tolist()
    return {
        "id": number,
        "image_id": image_id,
        "category_id": 7 if kind == "disc" else 3,
        "bbox": [int(value) for value in box],
        "area": int(mask.sum()),
        "iscrowd": 0,
        "segmentation": {"size": list(mask.shape), "counts": [0, *runs] if flat[0] else runs},
    }


def coco_settings(coco: Path, **changes) -> argparse.Namespace:
    values = dict(train_json="", val_json="", detector="mask_rcnn", bad_boxes="error")
    return data_args(coco, **{**values, **changes})


def spoil(coco: Path, folder: Path, change, split: str = "train") -> Path:
    """The annotations of `split` after `change(content)`."""
    content = json.loads((coco / f"annotations/instances_{split}.json").read_text())
    change(content)
    path = folder / f"instances_{split}.json"
    path.write_text(json.dumps(content))
    return path


def set_first(**values):
    return lambda content: content["annotations"][0].update(values)


def precision_by_hand(annotations: Path, results: list[dict], kind: str) -> list[float]:
    """The six measures of pycocotools; those of masks without boxes, whose area it would take for theirs."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    results = [{k: v for k, v in result.items() if kind == "bbox" or k != "bbox"} for result in results]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        evaluation = COCOeval(truth, truth.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [value if value < 0 else 100 * value for value in evaluation.stats[:6]]
