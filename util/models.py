"""The registered models, with their sizes and published weights.

python -m util.models
python -m util.models --json > models.json
"""

import util.run.startup  # noqa: F401 - before PyTorch

# isort: split
import argparse
import json
import logging
from dataclasses import dataclass
from typing import ClassVar

import timm
import torch

from util.run.failures import user_errors
from util.run.flags import Config, flag, get_parser, given_flags
from util.run.metrics import count_work
from util.weights.settings import CLASSIFIER_MODELS, PRETRAINING_MODELS
from util.weights.source import PUBLISHED

HEADINGS = ("model", "parameters", "multiply-adds", "input", "windows", "strides", "published weights")


def describe_model(name: str) -> dict:
    """The facts of a registered model, with 1000 classes where it is a classifier. No weights are made for it."""
    with torch.device("meta"):
        model = timm.create_model(name)
        # Both branches of a pretraining model's decoder are part of one image's work.
        parameters, multiply_adds = count_work(model)
    return {
        "model": name,
        "pretraining": name in PRETRAINING_MODELS,
        "parameters": parameters,
        "multiply_adds": round(multiply_adds),
        "input_size": list(model.img_size),
        "windows": [stage.window for stage in model.layers],
        "strides": [stage["reduction"] for stage in model.feature_info],
        "channels": [stage["num_chs"] for stage in model.feature_info],
        "published": [weights for weights, published in PUBLISHED.items() if published.model == name],
    }


def table(models: list[dict]) -> str:
    """The facts as lines with aligned columns."""
    rows = [HEADINGS] + [
        (
            facts["model"],
            f"{facts['parameters'] / 1e6:.1f} M",
            f"{facts['multiply_adds'] / 1e9:.2f} G",
            "x".join(map(str, facts["input_size"])),
            " ".join(map(str, facts["windows"])),
            " ".join(map(str, facts["strides"])),
            ", ".join(facts["published"]) or "-",
        )
        for facts in models
    ]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ([f"{cell:{side}{width}}" for cell, side, width in zip(row, "<>>><<<", widths)] for row in rows)
    return "\n".join("  ".join(cells).rstrip() for cells in lines)


@dataclass(frozen=True)
class ModelsConfig(Config):
    TITLE: ClassVar[str] = "output"

    json: bool = flag(False, "print a JSON list with all facts")


def get_args_parser() -> argparse.ArgumentParser:
    description = "List the registered models. Multiply-adds are those of one image's forward pass."
    return get_parser(ModelsConfig, description, "python -m util.models")


def main(flags: argparse.Namespace) -> None:
    given = given_flags(ModelsConfig, flags)
    models = [describe_model(name) for name in (*PRETRAINING_MODELS, *CLASSIFIER_MODELS)]
    print(json.dumps(models, indent=2) if given.json else table(models))


if __name__ == "__main__":
    with user_errors():
        logging.disable()
        main(get_args_parser().parse_args())
