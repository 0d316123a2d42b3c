"""What the data layer reads of a configuration: any object with these attributes will do. It is never written to."""

from typing import Literal, Protocol


class DataSettings(Protocol):
    """Of data sets and their loaders."""

    data_path: str  # a folder, list or tar, see util.data.sources
    dataset: str  # a name that timm knows; empty for files
    val_share: float  # of each class, set aside for validation; 0: `data_path` has validation images
    in_chans: int
    ignore_exif: bool  # leave pixels as they are stored, whatever the EXIF orientation says
    max_pixels: int  # larger images are not decoded
    reader: str  # see util.data.reader; empty for our own decoders
    seed: int
    bad_images: Literal["error", "skip"]  # skip: replace an unreadable training image by another one
    max_bad_images: float  # with skip: the largest share of unreadable images
    num_workers: int  # 0: images are read in this process
    pin_mem: bool  # page-locked batches, for copies to a GPU


class CocoSettings(DataSettings, Protocol):
    """Of images with boxes and masks."""

    train_json: str  # annotations; empty: found in data_path
    val_json: str
    detector: Literal["mask_rcnn", "faster_rcnn"]  # the first needs masks
    bad_boxes: Literal["error", "clip"]  # what becomes of boxes outside their images or of almost no area


class SegmentationSettings(DataSettings, Protocol):
    """Of data sets with label maps."""

    nb_classes: int
    ignore_label: int  # value of pixels that are ignored
    reduce_zero_label: bool  # 0 is ignored too, and 1 is the first class


class SizeSettings(Protocol):
    """Of the transforms of pretraining and evaluation."""

    input_size: tuple[int, int]  # height, width


class TransformSettings(SizeSettings, Protocol):
    """Of fine-tuning's transform of single images."""

    in_chans: int
    mean: tuple[float, ...]  # per channel, as for Normalize
    std: tuple[float, ...]
    aa: str  # timm's name of an auto-augmentation; empty for none
    color_jitter: float | None  # its strength, where aa is empty


class BatchAugmentationSettings(Protocol):
    """Of fine-tuning's augmentation of whole batches."""

    reprob: float  # probability that an image has areas erased
    remode: Literal["const", "rand", "pixel"]  # what erased areas become
    recount: int  # most areas erased per image
    mixup: float  # alpha of the beta distribution; 0: no mixup
    cutmix: float  # likewise
    cutmix_minmax: tuple[float, float] | None  # range of the box's side; switches cutmix on
    mixup_prob: float  # probability that a batch is mixed at all
    mixup_switch_prob: float  # of cutmix instead of mixup, where both are on
    mixup_mode: Literal["batch", "pair", "elem"]  # what shares one draw
    smoothing: float  # label smoothing
