"""Exported models in the runtimes that they were exported for: normalised images in, outputs of a part out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from util.errors import UserError
from util.weights.file import RECORD, CheckpointError
from util.weights.parts import as_list, parse_record
from util.weights.source import WeightsInfo

Runner = Callable[[Tensor], list[Tensor]]  # (B, C, H, W) -> the outputs of a part


def open_onnx(path: Path) -> tuple[Runner, dict[str, Any], WeightsInfo]:
    """An exported ONNX file in onnxruntime, on a GPU where that package has one; its record; where it came from.

    Raises:
        UserError: onnxruntime is not installed.
        CheckpointError: the file is damaged, foreign or of a newer version.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"{path} is an ONNX file: `pip install onnxruntime` (or onnxruntime-gpu) to run it") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
    providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers)
    except Exception as error:  # onnxruntime's exceptions have no common class of their own
        raise CheckpointError(f"{path} is damaged or not an ONNX file: {str(error).splitlines()[0]}") from error
    record, info = parse_record(session.get_modelmeta().custom_metadata_map.get(RECORD, ""), path)
    name = session.get_inputs()[0].name

    def run(imgs: Tensor) -> list[Tensor]:
        return [torch.from_numpy(output) for output in session.run(None, {name: imgs.cpu().numpy()})]

    return run, record, info


def open_torch_export(path: Path) -> tuple[Runner, dict[str, Any], WeightsInfo]:
    """An exported `.pt2` file, run by PyTorch; its record; where it came from.

    Raises:
        CheckpointError: the file is damaged, foreign or of a newer version.
    """
    extra = {RECORD: ""}
    try:
        with open(path, "rb") as file:  # whatever it is called
            program = torch.export.load(file, extra_files=extra)
    except Exception as error:  # whatever a damaged archive makes the reader raise
        raise CheckpointError(f"{path} is damaged or not a program of torch.export: {error}") from error
    record, info = parse_record(extra[RECORD], path)
    module = program.module()

    def run(imgs: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return as_list(module(imgs))

    return run, record, info
