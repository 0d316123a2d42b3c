"""From files to batches. Knows neither runs nor models."""

from typing import Any

Config = Any  # the flags of `util.run.config`, of which attributes are read and none is written
