"""From files to batches. Knows neither runs nor models."""

from typing import Any

# What this package sees of the flags: an object with the attributes of `DataFlags` and `WeightFlags` in
# `util.run.config`, and for augmentation those of `AugmentationFlags` in main_finetune.py. They are only read.
Config = Any
