"""The configuration: declared once, resolved once, read only; and what belongs to weights, decided in one place."""

import ast
import dataclasses
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from running import QUICK, fails, make_images, run

import main_finetune
import main_pretrain
from main_finetune import FinetuneConfig
from main_pretrain import PretrainConfig
from util import knn, predict, visualize
from util.errors import UserError
from util.explain import ExplainConfig
from util.export import ExportConfig
from util.knn import KnnConfig
from util.predict import PredictConfig
from util.replay import ReplayConfig
from util.run.config import resolve
from util.run.flags import FREE, get_parser, given_flags
from util.run.launch import Launch
from util.submit import SubmitConfig
from util.visualize import VisualizeConfig
from util.weights.file import read_checkpoint, write_checkpoint
from util.weights.settings import IMAGENET_MEAN, IMAGENET_STD, weight_settings

ROOT = Path(__file__).resolve().parent.parent
SMALL = [*QUICK, "--input_size", "16", "--window_size", "4", "4", "4", "2", "--in_chans", "1", "--batch_size", "4"]
PRETRAIN = [*SMALL, "--model", "mixmae_quickstart", "--epochs", "1"]
FINETUNE = [
    "--device",
    "cpu",
    "--num_workers",
    "0",
    "--warmup_epochs",
    "1",
    "--model",
    "swin_quickstart",
    "--epochs",
    "1",
]
CONFIGS = (PretrainConfig, FinetuneConfig, KnnConfig)
COMMANDS = (VisualizeConfig, ExplainConfig, PredictConfig, ExportConfig, ReplayConfig, SubmitConfig)


def launch(world_size: int = 1) -> Launch:
    return Launch(0, world_size, 0, world_size, "none", "127.0.0.1", 29500, torch.device("cpu"))


def resolved(config_class=PretrainConfig, *flags: str, recorded: dict | None = None, world_size: int = 1):
    parsed = get_parser(config_class, "test").parse_args(["--data_path", "somewhere", *map(str, flags)])
    pretraining = config_class is PretrainConfig
    given = given_flags(config_class, parsed)
    chosen = {"model": "mixmae_base" if pretraining else "swin_base_w14", "batch_size": 64, "epochs": 400, "lr": 0.1}
    settings = weight_settings(recorded or {}, "a file", given.as_dict(), pretraining, chosen)
    return resolve(given, launch(world_size), settings, chosen)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for split in ("train", "val"):
        for number, name in enumerate("ab"):
            make_images(folder / split / name, 8, (16, 16), seed=number)
    return folder


@pytest.fixture(scope="module")
def pretrained(images, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("pretrained")
    run(main_pretrain, *PRETRAIN, "--mean", "0.3", "--std", "0.4", "--data_path", images, "--output_dir", out)
    return out


# --- Declared once ---


@pytest.mark.parametrize("config_class", CONFIGS + COMMANDS)
def test_every_flag_is_declared_once_with_its_help_and_its_meaning_on_resuming(config_class):
    declared = []
    for flags in filter(dataclasses.is_dataclass, config_class.__mro__):
        inherited = {field.name for base in flags.__bases__ if base is not object for field in dataclasses.fields(base)}
        declared += [field.name for field in dataclasses.fields(flags) if field.name not in inherited]
    assert sorted(declared) == sorted({field.name for field in dataclasses.fields(config_class)})  # none twice
    known = {
        action.dest for action in get_parser(config_class, "test")._actions if action.help and action.dest != "help"
    }
    assert known == set(declared)


FREE_OF_ALL = """allow_odd_statistics dist_on_itp dist_timeout dist_url keep_checkpoints keep_every local_rank log_dir
    max_bad_images nan_dump num_workers output_dir pin_mem port print_freq resume resume_force save_every save_steps
    start_epoch"""
OTHER_BITS = """accum_iter bad_images batch_size compile data_path deterministic device finetune grad_checkpointing
    max_pixels precision world_size"""


@pytest.mark.parametrize(
    "config_class, free",
    [
        (PretrainConfig, "knn_every probe_every rank_every vis_every"),
        (FinetuneConfig, "dist_eval eval eval_every nb_classes per_class predictions reset_head resplit"),
    ],
)
def test_what_may_change_in_a_run_that_is_resumed(config_class, free):
    """Everything else is the recipe."""
    changes = {field.name: field.metadata["on_resume"] for field in dataclasses.fields(config_class)}
    assert {name for name, change in changes.items() if change == FREE} == {*FREE_OF_ALL.split(), *free.split()}
    assert {name for name, change in changes.items() if change} == set(OTHER_BITS.split())


def test_checks_name_the_flag_the_value_and_the_rule():
    for flags, message in (
        (("--batch_size", 0), "--batch_size must be at least 1, got 0"),
        (("--save_steps", -1), "--save_steps must not be negative, got -1"),
        (("--drop_path", 1), "--drop_path must be at least 0 and below 1, got 1.0"),
        (("--clip_grad", 0), "--clip_grad must be positive, got 0.0"),
        (("--max_bad_images", 2), "--max_bad_images must be between 0 and 1, got 2.0"),
        (("--output_dir", ""), "--output_dir must name a folder"),
        (("--batch_size", 3), "--batch_size must be even, since images are mixed in pairs; got 3"),
        (("--epochs", 3, "--warmup_epochs", 4), "--warmup_epochs 4 is longer than the run: --epochs 3"),
        (("--start_epoch", 9, "--epochs", 9), "--start_epoch 9 leaves nothing to train: --epochs is 9"),
        (("--std", 1, 0, 1), r"--std must be positive, got \(1.0, 0.0, 1.0\)"),
        (("--mean", 1), r"--mean needs one value for each of 3 channels, got \(1.0,\)"),
        (("--model", "vit"), "--model vit is not known: give --model one of mixmae_quickstart"),
    ):
        with pytest.raises(UserError, match=message):
            resolved(PretrainConfig, *flags)
    for flags, message in (
        (("--mixup", 0.8, "--batch_size", 3), "--batch_size must be even, got 3"),
        (("--cutmix_minmax", 0.5, 0.2), "--cutmix_minmax takes MIN and MAX"),
        (("--layer_decay", 0), "--layer_decay must be above 0 and at most 1, got 0.0"),
        (("--smoothing", 1), "--smoothing must be at least 0 and below 1"),
        (("--mixup", -1), "--mixup must not be negative, got -1.0"),
        (("--cutmix", -0.5), "--cutmix must not be negative, got -0.5"),
        (
            ("--lr", 1e-3, "--min_lr", 1),
            "--min_lr 1 is above the learning rate, 0.001: give a --min_lr of at most that",
        ),
        (("--blr", 1e-3, "--min_lr", 1), "--min_lr 1 is above the learning rate, 0.00025"),
        (("--per_class",), "--per_class and --predictions go with --eval"),
        (("--eval",), "--eval needs the weights to evaluate"),
    ):
        with pytest.raises(UserError, match=message):
            resolved(FinetuneConfig, *flags)


@pytest.mark.parametrize(
    "given",
    [
        ["--lr", "inf"],
        ["--mixup=-Infinity"],
        ["--mean", "nan", "nan", "nan"],
        ["--mean", "0.5", "NaN"],
        ["--std=1e999"],
    ],
)
def test_no_flag_takes_a_number_that_is_not_finite(given, capsys):
    with pytest.raises(SystemExit):
        get_parser(FinetuneConfig, "test").parse_args(given)
    assert f"argument {given[0].partition('=')[0]}: must be a finite number, got " in capsys.readouterr().err
    for config_class in (*CONFIGS, *COMMANDS):
        assert not [action.dest for action in get_parser(config_class, "test")._actions if action.type is float]
    with pytest.raises(UserError, match="--mean must be finite numbers, got"):  # recorded with weights
        weight_settings({"model": "mixmae_tiny", "mean": [0.5, math.nan, 0.5]}, "a file")


def test_a_tilde_is_the_home_folder_in_every_flag_and_argument(monkeypatch):
    """There were folders called `~`."""
    monkeypatch.setenv("HOME", "/home/somebody")
    flags = ["--output_dir=~/runs", "--data_path", "~/a", "--finetune=~", "--model=a~b", "--log_dir=./~"]
    parsed = get_parser(FinetuneConfig, "test").parse_args(flags)
    assert (parsed.output_dir, parsed.data_path) == ("/home/somebody/runs", "/home/somebody/a")
    assert (parsed.finetune, parsed.model, parsed.log_dir) == ("/home/somebody", "a~b", "./~")
    parsed = predict.get_args_parser().parse_args(["--checkpoint=~/c.pth", "~/photos", "--mean", "0.1", "~/more"])
    assert parsed.images == ["/home/somebody/photos", "/home/somebody/more"]


def test_a_missing_data_path_is_asked_for_as_the_data_set_needs_it(tmp_path, capfd):
    flags = [*PRETRAIN, "--output_dir", tmp_path]
    fails(main_pretrain, capfd, "--data_path is missing: give a folder with train/ in it", *flags)
    message = "--data_path is missing: give the folder that --dataset torch/cifar10 is in, or is downloaded to"
    fails(main_pretrain, capfd, message, *flags, "--dataset", "torch/cifar10")


@pytest.mark.parametrize(
    "config_class, given, message",
    [
        (VisualizeConfig, ["--images", "a.png", "--out", "b.png"], "--checkpoint is missing: give a file of weights"),
        (VisualizeConfig, ["--checkpoint", "a", "--out", "b.png"], "--images is missing: give image files, a folder"),
        (ExportConfig, ["--checkpoint", "a", "--out", "b"], "--format is missing: give one of safetensors, timm, onnx"),
        (KnnConfig, ["--data_path", "a"], "--checkpoint is missing: give a file of weights, or a published name"),
        (ReplayConfig, [], "--dump is missing: give a nan_dump_rank<n>.pth"),
        (SubmitConfig, ["--data_path", "a"], "--partition is missing: give a Slurm partition"),
    ],
)
def test_flags_that_must_be_given_are_asked_for(config_class, given, message):
    with pytest.raises(UserError, match=message):
        given_flags(config_class, get_parser(config_class, "test").parse_args(given))


def test_wrong_flags_leave_no_folder_behind(images, tmp_path, capfd):
    out = tmp_path / "out"
    fails(main_pretrain, capfd, "--batch_size must be even", *PRETRAIN, "--batch_size", "3", "--data_path", images,
          "--output_dir", out)  # fmt: skip
    fails(main_finetune, capfd, "--data_path is missing", *FINETUNE, "--output_dir", out)
    assert not out.exists()


# --- Resolved once, then read only ---


@pytest.mark.parametrize("config_class", CONFIGS)
def test_nothing_can_be_written_to_a_configuration(config_class):
    flags = ("--checkpoint", "a file") if config_class is KnnConfig else ()
    config = resolved(config_class, *flags, recorded={"model": "mixmae_tiny"})
    for field in dataclasses.fields(config):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field.name, 1)
        with pytest.raises(dataclasses.FrozenInstanceError):
            delattr(config, field.name)
        assert not isinstance(getattr(config, field.name), (list, dict, set))  # nor into one of its values
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.something_new = 1


def written_to(tree: ast.AST) -> list[str]:
    """What assigns to an attribute of something called config, flags or args, in code."""
    found = []
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, (ast.Assign, ast.Delete)) else [getattr(node, "target", None)]
        for target in targets:
            if isinstance(target, ast.Attribute) and re.search(
                r"(^|(?<!_dynamo)(?<!_inductor)\.)(config|flags|args)$", ast.unparse(target.value)
            ):
                found.append(ast.unparse(node))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "object.__setattr__"):
            found.append(ast.unparse(node))
    return found


def test_no_line_of_the_program_writes_to_a_configuration_or_to_the_parsed_flags():
    assert written_to(ast.parse("run.config.epochs = 3\nargs.lr += 1\nsetattr(config, 'a', 1)\nx.other = 2")) == [
        "run.config.epochs = 3",
        "args.lr += 1",
        "setattr(config, 'a', 1)",
    ]
    files = [*ROOT.glob("*.py"), *ROOT.glob("util/**/*.py")]
    assert len(files) > 30
    assert {str(file): found for file in files if (found := written_to(ast.parse(file.read_text())))} == {}


def test_what_follows_from_flags_is_filled_in():
    config = resolved(PretrainConfig, "--batch_size", 8, "--accum_iter", 2, "--blr", 1e-3, world_size=4)
    assert config.eff_batch_size == 64 and config.lr == 1e-3 * 64 / 256 and config.world_size == 4
    assert (config.model, config.input_size, config.precision) == ("mixmae_base", (224, 224), "fp32")
    assert config.epochs == 400  # chosen, since not given
    assert resolved(PretrainConfig, "--batch_size", 8).lr == 0.1  # likewise
    assert config.log_dir == config.output_dir and config.device == "cpu"
    assert resolved(PretrainConfig, "--input_size", 64).input_size == (64, 64)
    assert resolved(PretrainConfig, "--input_size", 64, 96, "--lr", 0.5).lr == 0.5


def test_the_configuration_is_logged_and_stored_with_the_run_and_in_its_checkpoint(pretrained, capfd):
    stored = json.loads((pretrained / "config.json").read_text())
    recorded = read_checkpoint(pretrained / "checkpoint.pth")["args"]
    assert stored["config"] == json.loads(json.dumps(recorded))
    assert recorded["input_size"] == (16, 16) and recorded["mean"] == (0.3,) and recorded["world_size"] == 1
    assert {"versions", "device", "commit", "command"} <= stored["environment"].keys()


# --- What belongs to weights ---


def test_settings_of_weights_have_one_set_of_fallbacks():
    assert weight_settings({"model": "mixmae_tiny"}, "a").mean == IMAGENET_MEAN
    assert weight_settings({"model": "mixmae_tiny"}, "a", pretraining=True).std == IMAGENET_STD
    for pretraining in (True, False):
        settings = weight_settings({"model": "mixmae_tiny", "in_chans": 5}, "a", pretraining=pretraining)
        assert settings.mean == (0.5,) * 5 and settings.std == (0.25,) * 5
    # Statistics of another number of channels do not count, nor sizes of another encoder.
    recorded = {"model": "mixmae_tiny", "in_chans": 1, "mean": [0.1], "std": [0.2], "input_size": 64, "patch_size": 2}
    assert weight_settings(recorded, "a").mean == (0.1,) and weight_settings(recorded, "a").patch_size == 2
    assert weight_settings(recorded, "a", {"in_chans": 3}).mean == IMAGENET_MEAN
    other = weight_settings(recorded, "a", {"model": "swin_base_w16_384"})
    assert (other.input_size, other.patch_size, other.mean) == ((384, 384), None, (0.1,))
    # The authors' names, and either model of an encoder.
    theirs = {"model": "mixmim_large", "input_size": 224}
    assert weight_settings(theirs, "a").model == "swin_large_w14"
    assert weight_settings(theirs, "a", pretraining=True).model == "mixmae_large"
    assert weight_settings(theirs, "a", {"input_size": [192, 224]}).input_size == (192, 224)
    with pytest.raises(UserError, match="a does not record which model it is: give --model"):
        weight_settings({}, "a")
    with pytest.raises(UserError, match="a records mean='x', which is not a value of --mean"):
        weight_settings({"model": "mixmae_tiny", "mean": "x"}, "a")


def picture_of(checkpoint: Path) -> VisualizeConfig:
    return VisualizeConfig(checkpoint=str(checkpoint), images=("images",), out="picture.png")


def test_all_commands_take_them_from_the_checkpoint(pretrained, images, tmp_path, capfd):
    """A model of 16 pixels with small windows, one channel and its own statistics: nothing is given but its file."""
    checkpoint = pretrained / "checkpoint.pth"
    flags = ["--device", "cpu", "--num_workers", "0", "--data_path", images]
    result = tmp_path / "knn.json"
    run(knn, "--checkpoint", checkpoint, *flags, "--k", "1", "--out", result)
    result = json.loads(result.read_text())
    assert (result["model"], result["input_size"], result["mean"]) == ("swin_quickstart", [16, 16], [0.3])
    _, settings, _ = visualize.load_model(picture_of(checkpoint))
    assert (settings.input_size, settings.mean, settings.std) == ((16, 16), (0.3,), (0.4,))

    flags += ["--epochs", "1", "--warmup_epochs", "1", "--batch_size", "4"]
    run(main_finetune, *flags, "--finetune", checkpoint, "--output_dir", tmp_path / "tuned")
    recorded = read_checkpoint(tmp_path / "tuned" / "checkpoint.pth")["args"]
    assert (recorded["model"], recorded["input_size"], recorded["window_size"]) == (
        "swin_quickstart",
        (16, 16),
        (4, 4, 4, 2),
    )
    assert (recorded["in_chans"], recorded["mean"], recorded["std"]) == (1, (0.3,), (0.4,))
    capfd.readouterr()
    run(main_finetune, "--eval", "--finetune", tmp_path / "tuned" / "checkpoint.pth", *flags)
    assert "(swin_quickstart at 16x16) on 16 images" in capfd.readouterr().out


def test_statistics_of_five_channels_are_the_same_for_pictures_and_knn(tmp_path):
    """Weights that record no statistics, of images that are no photographs."""
    make_images(tmp_path / "train" / "a", 4, (16, 16), channels=5)
    out = tmp_path / "out"
    flags = [*PRETRAIN, "--in_chans", "5", "--data_path", tmp_path, "--output_dir", out]
    run(main_pretrain, *flags)
    checkpoint = read_checkpoint(out / "checkpoint.pth")
    for name in ("mean", "std"):
        del checkpoint["args"][name]
    write_checkpoint(out / "bare.pth", checkpoint)
    _, settings, _ = visualize.load_model(picture_of(out / "bare.pth"))
    parsed = knn.get_args_parser().parse_args(["--checkpoint", str(out / "bare.pth"), "--data_path", str(tmp_path)])
    _, config, _ = knn.load_model(given_flags(KnnConfig, parsed), launch())
    assert settings.mean == config.mean == (0.5,) * 5 and settings.std == config.std == (0.25,) * 5


def test_a_resumed_run_needs_nothing_of_the_weights_it_started_from(pretrained, images, tmp_path, capfd):
    start = tmp_path / "start.pth"
    start.write_bytes((pretrained / "checkpoint.pth").read_bytes())
    out = tmp_path / "out"
    flags = [*PRETRAIN[:-2], "--epochs", "3", "--data_path", images, "--output_dir", out, "--finetune", start]
    run(main_pretrain, *flags)
    (out / "checkpoint.pth").unlink()
    for name in out.glob("checkpoint-*12.pth"):
        name.unlink()  # back to the end of the second epoch
    start.unlink()
    capfd.readouterr()
    run(main_pretrain, *flags, "--resume", "auto")
    assert "resumed at epoch 2 step 0" in capfd.readouterr().out
    run(main_pretrain, *flags, "--resume", "auto")
    assert "all 3 epochs are done" in capfd.readouterr().out
    recorded = read_checkpoint(out / "checkpoint.pth")["args"]
    assert recorded["mean"] == (0.3,) and recorded["std"] == (0.4,)


def test_the_device_is_the_only_one_that_is_touched(images, tmp_path, monkeypatch):
    """With --device cpu on a machine that has a GPU."""

    def touched(*_args, **_kwargs):
        raise AssertionError("CUDA was used")

    def is_available() -> bool:  # to this project; torch itself would go on to the driver
        return Path(sys._getframe(1).f_code.co_filename).is_relative_to(ROOT / "util")

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    for name in ("get_device_name", "current_device", "set_device", "Event", "device_count", "init"):
        monkeypatch.setattr(torch.cuda, name, touched)
    monkeypatch.setattr(torch.Tensor, "pin_memory", touched)
    run(main_pretrain, *PRETRAIN, "--data_path", images, "--output_dir", tmp_path, "--num_workers", "1")
    assert read_checkpoint(tmp_path / "checkpoint.pth")["epoch"] == 0


def test_free_flags_are_those_that_change_no_bits():
    """A guard against declaring a new flag free by mistake: what is free is where, how fast and how often."""
    free = {field.name for field in dataclasses.fields(FinetuneConfig) if field.metadata["on_resume"] == FREE}
    assert not free & {"seed", "lr", "model", "input_size", "weight_decay", "mean", "std", "drop_path", "ignore_exif"}


def test_masks_do_not_depend_on_drop_path_nor_drop_path_on_them(images, tmp_path, monkeypatch):
    """The mask and the dropped branches of a step come from different keys: their first draws differ."""
    drawn = {}
    masking, seeding = main_pretrain.MixMAE.random_masking, main_pretrain.train_one_epoch.__globals__["seed_all"]

    def random_masking(self, ratio, generator=None, batch_size=None):
        drawn.setdefault("mask", []).append(generator.initial_seed() if generator else None)
        return masking(self, ratio, generator)

    def seed_all(*keys):
        seeding(*keys)
        drawn.setdefault("drop path", []).append(torch.default_generator.initial_seed())

    monkeypatch.setattr(main_pretrain.MixMAE, "random_masking", random_masking)
    monkeypatch.setitem(main_pretrain.train_one_epoch.__globals__, "seed_all", seed_all)
    run(main_pretrain, *PRETRAIN, "--drop_path", "0.2", "--data_path", images, "--output_dir", tmp_path)
    assert len(drawn["drop path"]) == 4 and not set(drawn["drop path"]) & set(drawn["mask"])
