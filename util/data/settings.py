"""What the data layer reads of a configuration: any object with these attributes will do. It is never written to."""

from typing import Literal, Protocol


class DataSettings(Protocol):
    """Of data sets and their loaders."""

    @property
    def data_path(self) -> str: ...  # a folder, list or tar, see util.data.sources
    @property
    def dataset(self) -> str: ...  # a name that timm knows; empty for files
    @property
    def val_share(self) -> float: ...  # of each class, set aside for validation; 0: `data_path` has validation images
    @property
    def in_chans(self) -> int: ...
    @property
    def ignore_exif(self) -> bool: ...  # leave pixels as they are stored, whatever the EXIF orientation says
    @property
    def max_pixels(self) -> int: ...  # larger images are not decoded
    @property
    def seed(self) -> int: ...
    @property
    def bad_images(self) -> Literal["error", "skip"]: ...  # skip: replace an unreadable training image by another one
    @property
    def max_bad_images(self) -> float: ...  # with skip: the largest share of unreadable images
    @property
    def num_workers(self) -> int: ...  # 0: images are read in this process
    @property
    def pin_mem(self) -> bool: ...  # page-locked batches, for copies to a GPU


class SizeSettings(Protocol):
    """Of the transforms of pretraining and evaluation."""

    @property
    def input_size(self) -> tuple[int, int]: ...  # height, width


class TransformSettings(SizeSettings, Protocol):
    """Of fine-tuning's transform of single images."""

    @property
    def in_chans(self) -> int: ...
    @property
    def mean(self) -> tuple[float, ...]: ...  # per channel, as for Normalize
    @property
    def std(self) -> tuple[float, ...]: ...
    @property
    def aa(self) -> str: ...  # timm's name of an auto-augmentation; empty for none
    @property
    def color_jitter(self) -> float | None: ...  # its strength, where aa is empty


class BatchAugmentationSettings(Protocol):
    """Of fine-tuning's augmentation of whole batches."""

    @property
    def reprob(self) -> float: ...  # probability that an image has areas erased
    @property
    def remode(self) -> Literal["const", "rand", "pixel"]: ...  # what erased areas become
    @property
    def recount(self) -> int: ...  # most areas erased per image
    @property
    def mixup(self) -> float: ...  # alpha of the beta distribution; 0: no mixup
    @property
    def cutmix(self) -> float: ...  # likewise
    @property
    def cutmix_minmax(self) -> tuple[float, float] | None: ...  # range of the box's side; switches cutmix on
    @property
    def mixup_prob(self) -> float: ...  # probability that a batch is mixed at all
    @property
    def mixup_switch_prob(self) -> float: ...  # of cutmix instead of mixup, where both are on
    @property
    def mixup_mode(self) -> Literal["batch", "pair", "elem"]: ...  # what shares one draw
    @property
    def smoothing(self) -> float: ...  # label smoothing
