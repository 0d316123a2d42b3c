"""Pictures of reconstructions show exactly what the model saw and predicted; wrong inputs are explained."""

import argparse
import logging
import os

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageColor

import models_mixmae
from util import visualize
from util.data.display import COLOURS, HAIRLINE, Display, shown_channels
from util.run.flags import given_flags
from util.visualize import headings, introduction, outline, reconstruct, reconstruction_figure
from util.weights.file import write_checkpoint

MASK = torch.tensor([0, 1, 0, 1, 1, 0, 1, 0, 0, 0, 1, 1, 1, 1, 0, 0.0])


def small_model(in_chans: int = 1, norm_pix_loss: bool = False, **kwargs) -> models_mixmae.MixMAE:
    torch.manual_seed(0)
    return timm.create_model("mixmae_quickstart", in_chans=in_chans, norm_pix_loss=norm_pix_loss, **kwargs)


def random_images(number: int, in_chans: int = 1, size: tuple[int, int] = (32, 32)) -> torch.Tensor:
    return torch.rand(number, in_chans, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def set_prediction(model: models_mixmae.MixMAE, monkeypatch, pred: torch.Tensor) -> None:
    monkeypatch.setattr(model, "forward_decoder", lambda latent, mask: pred)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_a_perfect_prediction_gives_back_the_originals(monkeypatch, norm_pix_loss):
    model, imgs = small_model(3, norm_pix_loss), random_images(4, 3)
    target = model.patchify(imgs)
    if norm_pix_loss:
        mean, std = model.cell_statistics(target)
        target = (target - mean) / std
    set_prediction(model, monkeypatch, target)
    assert model.forward_loss(imgs, target) < 1e-12
    _, filled, predicted = reconstruct(model, imgs, MASK)
    torch.testing.assert_close(predicted, imgs, rtol=0, atol=1e-6)
    torch.testing.assert_close(filled, imgs, rtol=0, atol=1e-6)
    half = (0.5,) * 3
    originals = Display(imgs, half, half, (0, 1, 2))(imgs)
    for shown, original in zip(Display(imgs, half, half, (0, 1, 2))(predicted), originals):
        assert np.abs(np.asarray(shown, int) - np.asarray(original, int)).max() <= 1  # rounding


def test_cells_come_from_where_the_mask_says():
    model, imgs = small_model(), random_images(4)
    pred = model(imgs, mask=MASK)[1]
    mixed, filled, predicted = reconstruct(model, imgs, MASK)
    for i in range(4):
        for cell in range(16):
            rows, cols = slice(cell // 4 * 8, cell // 4 * 8 + 8), slice(cell % 4 * 8, cell % 4 * 8 + 8)
            hidden = MASK[cell] == 1
            torch.testing.assert_close(predicted[i, 0, rows, cols], pred[i, cell].view(8, 8))
            assert torch.equal(mixed[i, :, rows, cols], imgs[3 - i if hidden else i, :, rows, cols])
            assert torch.equal(filled[i, :, rows, cols], (predicted if hidden else imgs)[i, :, rows, cols])


@pytest.mark.parametrize("in_chans, size", [(1, (32, 32)), (3, (32, 32)), (16, (32, 64))])
def test_figure_for_any_number_of_channels(in_chans, size):
    model, statistics = small_model(in_chans, img_size=size), (0.5,) * in_chans
    mask = model.random_masking(0.5, torch.Generator().manual_seed(0))
    model.train()
    figure = reconstruction_figure(model, random_images(6, in_chans, size), mask, statistics, statistics)
    assert model.training
    assert figure.mode == "RGB" and figure.width == 1416
    assert figure.getpixel((0, 0)) == (255, 255, 255)


def test_pixels_of_the_originals_reach_the_picture(monkeypatch):
    model = small_model()
    imgs = torch.full((2, 1, 32, 32), 0.2)
    imgs[1] = -0.2
    set_prediction(model, monkeypatch, torch.full((2, 16, 64), 0.6))
    figure = np.asarray(reconstruction_figure(model, imgs, MASK, (0.5,), (0.5,)))
    for value in (0.2, -0.2, 0.6):
        grey = round((value * 0.5 + 0.5) * 255)
        assert (figure == grey).all(axis=-1).sum() > 100 * 288  # at least half an enlarged image


@pytest.mark.parametrize("size, factor", [((32, 32), 9), ((32, 64), 4)])
def test_pixels_of_small_images_are_exact_blocks(size, factor):
    model, imgs = small_model(img_size=size), random_images(4, size=size)
    mask = model.random_masking(0.5, torch.Generator().manual_seed(0))
    figure = np.asarray(reconstruction_figure(model, imgs, mask, (0.5,), (0.5,)))
    predicted = Display(imgs, (0.5,), (0.5,), (0,))(reconstruct(model, imgs, mask)[2])  # shown without outlines
    blocks = predicted.repeat(factor, axis=1).repeat(factor, axis=2)
    column = figure[:, visualize.LEFT + 3 * 320 :][:, : blocks.shape[2]]
    for row, image in enumerate((0, 3, 1, 2)):
        top = visualize.HEAD + row * (blocks.shape[1] + 16) + row // 2 * 32
        assert np.array_equal(column[top : top + blocks.shape[1]], blocks[image])


# --- Variants of the method ---

FILLED = [dict(fill=fill, masked_attn=False) for fill in ("mask_token", "zero", "noise")]


def count(figure: np.ndarray, colour: str) -> int:
    return int((figure == ImageColor.getrgb(colour)).all(axis=-1).sum())


def column(figure: np.ndarray, number: int) -> np.ndarray:
    """The images of a column, from 0, with the space around them."""
    left = visualize.LEFT + number * 320
    return figure[visualize.HEAD : visualize.HEAD + 600, left : left + 288]


@pytest.mark.parametrize("fill", ["zero", "noise"])
def test_a_filling_is_drawn_as_the_encoder_gets_it(fill):
    model, imgs, taken = small_model(fill=fill, masked_attn=False), random_images(4), []
    hook = model.layers[0].register_forward_hook(lambda module, inputs, output: taken.append(inputs[0]))
    mixed, _, _ = reconstruct(model, imgs, MASK)
    hook.remove()
    with torch.no_grad():
        torch.testing.assert_close(model.embed(mixed), taken[0])
        assert not torch.allclose(model.embed(imgs), taken[0])


def test_noise_is_the_same_in_every_picture_and_leaves_random_numbers_alone():
    model, imgs = small_model(**FILLED[2]), random_images(4)
    state = torch.get_rng_state()
    first = reconstruct(model, imgs, MASK)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    assert all(map(torch.equal, first, reconstruct(model, imgs, MASK)))


@pytest.mark.parametrize(
    "arguments", [{}, dict(reconstruct="single"), dict(masked_attn=False, reconstruct="single"), *FILLED]
)
def test_a_picture_has_the_columns_and_marks_that_are_true_of_its_model(arguments):
    model, mixed = small_model(**arguments), "fill" not in arguments
    figure = np.asarray(reconstruction_figure(model, random_images(4), MASK, (0.5,), (0.5,)))
    both = model.num_branches == 2
    assert len(headings(model)) == 3 + both
    assert (figure[: visualize.HEAD, -16:] == 255).all()  # no line runs over the edge
    assert (column(figure, 2) < 255).any() and (column(figure, 3) < 255).any() == both
    assert (count(figure, COLOURS["B"]) > 1000) == mixed and count(figure, COLOURS["A"]) > 1000
    assert ("Mixed input" in dict(headings(model))) == ("mixed" in introduction(model)) == mixed
    line = figure[visualize.HEAD + 288 : visualize.HEAD + 304, 74]  # from image A to B
    assert (count(line[None], HAIRLINE) > 0) == mixed
    # Mask tokens are no pixels of the image, of any value.
    grey = count(column(figure, 1)[:288], HAIRLINE)
    assert (grey > 9 * 32 * 32) if arguments.get("fill") == "mask_token" else (grey < 2000)


def test_outlines_follow_the_contour_just_inside():
    region = torch.tensor([[True, True], [True, False]])
    line = outline(region, (40, 40))
    expected = np.zeros((40, 40), bool)
    expected[:3], expected[:, :3] = True, True  # the image's edge
    expected[17:20, 17:], expected[17:, 17:20] = True, True  # along the cell that is left out, around its corner
    expected[:20, 37:], expected[37:, :20] = True, True
    expected[20:, 20:] = False
    assert np.array_equal(line, expected)
    assert not outline(torch.tensor([[True, False]]), (50, 101))[:, 51:].any()


def test_values_without_a_known_range_are_stretched_alike():
    imgs = random_images(2, 4) * 1000
    display = Display(imgs, (5000,) * 4, (2,) * 4, (3,))
    assert display.stretched
    shown, half = np.asarray(display(imgs)[0]), np.asarray(display(imgs / 2)[0])
    assert shown.min() == 0 and shown.max() == 255
    assert half.min() > 50 and half.max() < 205
    assert display.caption(4) == [
        "Of the 4 channels (numbered from 0), 3 shown as grey.",
        "Brightness runs from the 1st to the 99th percentile of the originals, per channel.",
    ]


def test_channels_that_cannot_be_shown():
    assert shown_channels(1) == shown_channels(2) == (0,)
    assert shown_channels(16) == (0, 1, 2)
    assert shown_channels(16, [3, 2, 1]) == (3, 2, 1)
    for channels in ([0, 1], [0, 1, 4], [-1], []):
        with pytest.raises(ValueError, match="numbered from 0 to 3"):
            shown_channels(4, channels)


def test_odd_batch_is_refused():
    with pytest.raises(ValueError, match="must be even, got B=3"):
        reconstruction_figure(small_model(), random_images(3), MASK, (0.5,), (0.5,))


# --- The command --------------------------------------------------------------------------------------------


def save_model(path, network: torch.nn.Module, **recorded) -> str:
    args = {"model": "mixmae_quickstart", "input_size": (32, 32), "in_chans": 1, "mean": (0.2,), "std": (0.3,)}
    checkpoint = {"model": network.state_dict(), "epoch": 3, "args": args | {"norm_pix_loss": True} | recorded}
    write_checkpoint(path, checkpoint)
    return str(path)


@pytest.fixture
def checkpoint(tmp_path) -> str:
    return save_model(tmp_path / "checkpoint.pth", small_model())


@pytest.fixture
def images(tmp_path) -> list[str]:
    folder = tmp_path / "images" / "nested"
    folder.mkdir(parents=True)
    paths = [folder / f"{number}.png" for number in range(5)]
    for path in paths:
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50), dtype=np.uint8)).save(path)
    return [str(path) for path in paths]


def run(checkpoint: str, images: list[str], out, *flags: str) -> None:
    command = ["--checkpoint", checkpoint, "--images", *images, "--out", str(out), *flags]
    visualize.visualize(given_flags(visualize.VisualizeConfig, visualize.get_args_parser().parse_args(command)))


def test_folder_list_and_files(tmp_path, checkpoint, images, caplog):
    run(checkpoint, [str(tmp_path / "images")], tmp_path / "new" / "folder.png", "--num_images", "4")
    listing = tmp_path / "list.txt"
    listing.write_text("images/nested/0.png\nimages/nested/3.png\n")
    run(checkpoint, [str(listing)], tmp_path / "list.png")
    with caplog.at_level(logging.WARNING):
        run(checkpoint, images, tmp_path / "files.jpg")
    assert "the last of the 5" in caplog.text and "4.png, is left out" in caplog.text
    heights = [Image.open(tmp_path / name).height for name in ("new/folder.png", "list.png", "files.jpg")]
    assert heights[0] == heights[2] > heights[1]


def test_all_that_are_left_out_are_named_in_one_line(tmp_path, images, caplog):
    path = save_model(tmp_path / "three.pth", small_model(mix_images=3), mix_images=3, mask_ratio=0.67)
    with caplog.at_level(logging.WARNING):
        run(path, images, tmp_path / "files.png")
    [said] = [record.getMessage() for record in caplog.records]
    assert said == f"images are taken 3 at a time: the last 2 of the 5, {images[3]} and {images[4]}, are left out"
    with pytest.raises(ValueError, match="this model mixes 3 images: give at least as many"):
        run(path, images[:2], tmp_path / "two.png")


def mask_ratio_of(path: str, *flags: str) -> float:
    command = ["--checkpoint", path, "--images", "unused", "--out", "unused.png", *flags]
    _, config, _ = visualize.load_model(
        given_flags(visualize.VisualizeConfig, visualize.get_args_parser().parse_args(command))
    )
    return config.mask_ratio


def test_as_much_is_hidden_as_in_training_unless_a_flag_says_more(tmp_path, checkpoint, images, caplog):
    path = save_model(tmp_path / "most.pth", small_model(), mask_ratio=0.75, range_mask_ratio=0.1)
    with caplog.at_level(logging.INFO):
        assert mask_ratio_of(path) == 0.75
        assert mask_ratio_of(path, "--mask_ratio", "0.25") == 0.25
        assert mask_ratio_of(checkpoint) == 0.5
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("mask ratio")]
    assert said == [
        "mask ratio 0.75, not given: the weights were trained with 0.75 or up to 0.1 more",
        "mask ratio 0.25, as given: the weights were trained with 0.75 or up to 0.1 more",
        "mask ratio 0.5, not given: the weights record no mask ratio",
    ]
    for name, flags in (("own.png", []), ("same.png", ["--mask_ratio", "0.75"]), ("less.png", ["--mask_ratio", "0.5"])):
        run(path, images[:2], tmp_path / name, *flags)
    own, same, less = ((tmp_path / name).read_bytes() for name in ("own.png", "same.png", "less.png"))
    assert own == same != less
    for value in ("much", 1.5, True):
        with pytest.raises(ValueError, match=f"records mask_ratio={value!r}, which is not a value of --mask_ratio"):
            mask_ratio_of(save_model(tmp_path / "odd.pth", small_model(), mask_ratio=value))


def test_same_seed_same_picture(tmp_path, checkpoint, images):
    for name, seed in (("a.png", "1"), ("b.png", "1"), ("c.png", "2")):
        run(checkpoint, [str(tmp_path / "images")], tmp_path / name, "--seed", seed)
    a, b, c = ((tmp_path / name).read_bytes() for name in ("a.png", "b.png", "c.png"))
    assert a == b != c


def test_weights_that_record_nothing_are_told_what_they_are(tmp_path, images):
    """And images are read as flags say: these are turned by EXIF, or too large."""
    torch.save({"model": small_model().state_dict()}, tmp_path / "bare.pth")
    flags = ["--model", "mixmae_quickstart", "--in_chans", "1"]
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter turn
    for path in images[:2]:
        Image.open(path).save(path, exif=turned)
    for name, more in (("upright.png", []), ("stored.png", ["--ignore_exif"])):
        run(str(tmp_path / "bare.pth"), images[:2], tmp_path / name, *flags, *more)
    assert (tmp_path / "upright.png").read_bytes() != (tmp_path / "stored.png").read_bytes()
    with pytest.raises(ValueError, match=r"0\.png'.*2000 pixels.*"):
        run(str(tmp_path / "bare.pth"), images, tmp_path / "large.png", *flags, "--max_pixels", "1999")


def test_authors_checkpoint(tmp_path):
    """Their args are a Namespace with their model names and without channels and statistics; decoder included."""
    model = small_model(3)
    args = argparse.Namespace(model="mixmim_quickstart", input_size=32, norm_pix_loss=True, mask_ratio=0.5)
    torch.save({"model": model.state_dict(), "epoch": 599, "args": args}, tmp_path / "authors.pth")
    colours = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    paths = [str(tmp_path / f"{number}.png") for number in range(2)]
    for path, image in zip(paths, colours):
        Image.fromarray(image).save(path)
    run(str(tmp_path / "authors.pth"), paths, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").exists()


def test_fine_tuned_checkpoint_is_refused(tmp_path, images):
    classifier = timm.create_model("swin_quickstart", in_chans=1, num_classes=10)
    path = save_model(tmp_path / "finetuned.pth", classifier, model="swin_quickstart")
    with pytest.raises(ValueError, match=r"has no decoder.*give a checkpoint of main_pretrain.py"):
        run(path, images, tmp_path / "picture.png")


def test_wrong_inputs_are_explained(tmp_path, checkpoint, images):
    out = tmp_path / "picture.png"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no images found under .*empty"):
        run(checkpoint, [str(tmp_path / "empty")], out)
    with pytest.raises(ValueError, match="at least 2 are needed, --images gives 1"):
        run(checkpoint, images[:1], out)
    with pytest.raises(ValueError, match="--num_images must be at least 2"):
        run(checkpoint, images, out, "--num_images", "1")
    with pytest.raises(ValueError, match=r"must end in one of \.png"):
        run(checkpoint, images, tmp_path / "picture.gif")
    with pytest.raises(ValueError, match="is one of --images, which it would replace"):
        run(checkpoint, images, images[0])
    with pytest.raises(ValueError, match="is one of --images, which it would replace"):
        run(checkpoint, [os.path.dirname(images[0])], images[0])
    with pytest.raises(ValueError, match=r"absent does not exist; give images, folders"):
        run(checkpoint, [str(tmp_path / "absent")], out)
    with pytest.raises(ValueError, match=r"missing\.pth is neither a file nor"):
        run(str(tmp_path / "missing.pth"), images, out)
    with pytest.raises(
        ValueError, match=r"--mask_ratio 0\.01 hides 0 of the 16 cells .*give --mask_ratio 0\.063 or more"
    ):
        run(checkpoint, images, out, "--mask_ratio", "0.01")
    for ratio in ("0", "1", "-1"):
        with pytest.raises(ValueError, match=f"--mask_ratio must be above 0 and below 1, got {ratio}"):
            run(checkpoint, images, out, "--mask_ratio", ratio)
    with pytest.raises(ValueError, match="does not record which model"):
        torch.save({"model": small_model().state_dict()}, tmp_path / "bare.pth")
        run(str(tmp_path / "bare.pth"), images, out)
    np.save(tmp_path / "array.npy", np.zeros((32, 32, 4), np.float32))
    with pytest.raises(ValueError, match=r"array\.npy': the array has shape \(32, 32, 4\), \(H, W, 1\) is needed"):
        run(checkpoint, [str(tmp_path / "array.npy"), images[0]], out)
    (tmp_path / "file").write_text("")
    unread = [str(tmp_path / "absent")]  # the rest is looked at first
    with pytest.raises(ValueError, match=r"--out .*file.*picture\.png cannot be written"):
        run(checkpoint, unread, tmp_path / "file" / "picture.png")
    with pytest.raises(ValueError, match="numbered from 0 to 0; got 1"):
        run(checkpoint, unread, out, "--channels", "1")
    assert not out.exists()
