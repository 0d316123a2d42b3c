"""Reference values of the original method: small models' weights, inputs and outputs (see tests/golden/README.md)."""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import safe_open

GOLDEN = Path(__file__).parent / "golden"


def load_golden(name: str) -> SimpleNamespace:
    """`weights` (state dict), `tensors` (the others), `facts` (decoded metadata), `imgs` (normalised images)."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        metadata = file.metadata()
    facts = {key: json.loads(value) for key, value in metadata.items()}
    weights = {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}
    imgs = (tensors["input.images_u8"] / 255 - 0.5) / 0.25
    return SimpleNamespace(weights=weights, tensors=tensors, facts=facts, imgs=imgs)


def without_derived(state_dict: dict) -> dict:
    """Ours keeps the index buffers, which follow from the window size, out of the state dict."""
    return {name: value for name, value in state_dict.items() if not name.endswith("relative_position_index")}


def official_models() -> dict:
    return json.loads((GOLDEN / "official_models.json").read_text())


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return ((ours - reference).abs().max() / reference.abs().max()).item()
