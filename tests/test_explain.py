"""The picture of the method shows what the model does with the pair, at any size; wrong inputs are explained."""

import logging

import numpy as np
import pytest
import timm
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image, ImageColor

from models_mixmae import MixMAE
from util import explain
from util.data.display import COLOURS, Display
from util.errors import UserError
from util.explain import explanation_figure, find_window, run_steps
from util.layers.windows import upsample
from util.run.flags import given_flags
from util.weights.file import write_checkpoint

MASK = torch.tensor([0, 1, 0, 1, 1, 0, 1, 0, 0, 0, 1, 1, 1, 1, 0, 0.0])


def small_model(in_chans: int = 3, **kwargs) -> MixMAE:
    torch.manual_seed(0)
    return timm.create_model("mixmae_quickstart", in_chans=in_chans, **kwargs).eval()


def random_images(in_chans: int = 3, size: tuple[int, int] = (32, 32)) -> torch.Tensor:
    return torch.rand(2, in_chans, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def input_of(module: torch.nn.Module, run) -> torch.Tensor:
    """What `module` is given while `run` runs."""
    taken = []
    hook = module.register_forward_hook(lambda module, inputs, output: taken.append(inputs[0]))
    run()
    hook.remove()
    return taken[0]


@torch.no_grad()
def test_the_mixtures_are_what_the_encoder_gets():
    model, imgs = small_model(), random_images()
    steps = run_steps(model, imgs, MASK)
    tokens = input_of(model.layers[0], lambda: model(imgs, mask=MASK))
    torch.testing.assert_close(model.embed(steps.mixed), tokens)
    assert not torch.equal(model.embed(imgs), tokens)


@torch.no_grad()
def test_branches_see_the_cells_of_the_mask():
    """Row 0 of the decoder's input is mixture 1 for A, row 2 for B; the rest of a row is the same mask token."""
    model, imgs = small_model(), random_images()
    steps = run_steps(model, imgs, MASK)
    rows = input_of(model.decoder_blocks[0], lambda: model(imgs, mask=MASK)) - model.decoder_pos_embed
    for row, seen in ((0, ~steps.hidden), (2, steps.hidden)):
        masked = torch.isclose(rows[row], model.mask_token[0], atol=1e-6).all(dim=-1)
        assert torch.equal(masked, ~seen.flatten())


def test_predictions_and_loss_are_the_models():
    model, imgs = small_model(), random_images()
    steps = run_steps(model, imgs, MASK)
    loss, pred, _ = model(imgs, mask=MASK)
    torch.testing.assert_close(model.patchify(steps.predicted), pred)
    assert steps.loss == pytest.approx(loss.item())
    assert steps.shapes == {
        "tokens": (2, 32, 32, 16),
        "stages.0": (2, 32, 32, 16),
        "stages.1": (2, 16, 16, 32),
        "stages.2": (2, 8, 8, 64),
        "stages.3": (2, 4, 4, 128),
        "latent": (2, 16, 128),
        "branches": (4, 16, 64),
        "pred": (2, 16, 192),
    }


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("size, window_size", [((32, 32), None), ((48, 80), (12, 12, 7, 7))])
def test_the_window_is_as_the_layout_has_it(stage, size, window_size):
    model = small_model(img_size=size, **({"window_size": window_size} if window_size else {}))
    hidden = model.random_masking(0.5, torch.Generator().manual_seed(1)).bool().view(model.grid_size)
    window = find_window(model, hidden, stage)
    (rows, columns), side = model.layers[stage].grid, model.layers[stage].window
    assert window.rows.start % side == window.columns.start % side == 0
    assert torch.equal(window.group, upsample(hidden, 2 ** (3 - stage))[window.rows, window.columns])
    group = window.group.flatten()
    assert torch.equal(window.pairs, group[:, None] == group)
    # The places of its tokens in the layout follow each other, in the order that is drawn.
    numbers = torch.arange(rows * columns).view(rows, columns)[window.rows, window.columns].flatten()
    layout = model.layouts(model.layers[0].grid, hidden)[stage]
    order = numbers if layout.order is None else layout.order
    start = int((order == numbers[window.order[0]]).nonzero())
    assert torch.equal(order[start : start + len(numbers)], numbers[window.order])
    # Sorted, the pairs are dense blocks.
    blocks = torch.block_diag(*(torch.ones(length, length) for length in window.segments)).bool()
    assert torch.equal(window.pairs[window.order][:, window.order], blocks)


def test_the_first_stage_with_both_images_is_shown():
    """The quickstart's windows of stage 1 are one cell each."""
    assert run_steps(small_model(), random_images(), MASK).window.stage == 1
    assert run_steps(small_model(), random_images(), MASK, stage=0).window.segments == (64,)


def test_what_attends_to_what_is_checked_by_changing_a_token():
    """The pairs drawn are those of the model: a token's change reaches those that attend to it, and no others."""
    model, imgs = small_model(), random_images()
    window = run_steps(model, imgs, MASK).window
    stage = model.layers[window.stage]
    layout = model.layouts(model.layers[0].grid, MASK)[window.stage]
    x = torch.randn(1, *stage.grid, 32)
    changed = x.clone()
    changed[0, window.rows.start, window.columns.start] = torch.randn(32)
    with torch.no_grad():
        reached = (stage(x, layout) != stage(changed, layout)).any(dim=-1)[0]
    inside = reached[window.rows, window.columns].flatten()
    assert torch.equal(inside, window.pairs[:, 0]) and reached.sum() == inside.sum()


@pytest.mark.parametrize("in_chans, size", [(1, (32, 32)), (3, (64, 32)), (13, (40, 64))])
def test_any_size_and_number_of_channels(in_chans, size):
    model, imgs = small_model(in_chans, img_size=size), random_images(in_chans, size)
    mask = model.random_masking(0.5, torch.Generator().manual_seed(0))
    channels = (0,) if in_chans == 1 else (0, 1, 2)
    display = Display(imgs, (0.5,) * in_chans, (0.5,) * in_chans, channels)
    picture = np.asarray(explanation_figure(run_steps(model, imgs, mask), display, ["caption"]))
    assert picture.shape[1] == 2000
    for colour in (COLOURS["A"], COLOURS["B"]):
        assert (picture == ImageColor.getrgb(colour)).all(axis=-1).sum() > 10_000


def drawn_texts(monkeypatch, model: MixMAE, imgs: torch.Tensor) -> dict[str, float]:
    """What a picture says, with the right edge of each in pixels, were it all of monospace."""
    said, write = {}, explain.Page.write
    monkeypatch.setattr(
        explain.Page, "write", lambda page, x, y, text, size=11, **style: (
            said.update({text: x + 0.602 * size * len(text)}), write(page, x, y, text, size, **style)
        ),
    )  # fmt: skip
    mask = model.random_masking(0.5, torch.Generator().manual_seed(0))
    channels = imgs.shape[1]
    explanation_figure(run_steps(model, imgs, mask), Display(imgs, (0.5,) * channels, (0.5,) * channels, (0,)), [])
    return said


def test_mix_embeddings_are_spoken_of_where_there_are_some(monkeypatch):
    for mix_embed in (False, True):
        said = drawn_texts(monkeypatch, small_model(mix_embed=mix_embed), random_images())
        assert any("adds a learned vector" in text for text in said) == mix_embed


def test_shapes_of_large_images_end_at_the_edge(monkeypatch):
    said = drawn_texts(monkeypatch, small_model(img_size=96), random_images(size=(96, 96)))
    assert said["(2, 12, 12, 128)"] <= explain.WIDTH - explain.MARGIN


def test_captions_fit_the_page(monkeypatch):
    figures, display = [], Display(random_images(13), (0.5,) * 13, (0.5,) * 13, (10, 11, 12))
    monkeypatch.setattr(explain, "render", figures.append)
    captions = [" ".join([explain.PREDICTED_UP_TO] * 3), " ".join(display.caption(13))]  # full lines
    model, imgs = small_model(13), random_images(13)
    explanation_figure(run_steps(model, imgs, MASK), display, captions)
    [figure] = figures
    renderer = FigureCanvasAgg(figure).get_renderer()
    edges = {text.get_text(): text.get_window_extent(renderer).x1 for text in figure.axes[0].texts}
    assert any(text.startswith(explain.PREDICTED_UP_TO[:80]) for text in edges)
    margin = figure.bbox.width * explain.MARGIN / explain.WIDTH
    assert max(edges.values()) <= figure.bbox.width - margin, max(edges, key=edges.get)


@pytest.mark.parametrize(
    "variant, trained_with",
    [
        (dict(mix_images=3), "mixtures of 3 images, 3 reconstructed"),
        (dict(reconstruct="single"), "mixtures of 2 images, 1 reconstructed"),
        (dict(masked_attn=False), "mixtures of 2 images, 2 reconstructed, without masked attention"),
        (dict(masked_attn=False, fill="zero"), "--fill zero, without masked attention"),
    ],
)
def test_of_another_variant_it_is_said_what_it_is(variant, trained_with):
    with pytest.raises(UserError, match=f"this checkpoint was trained with {trained_with}: util.visualize"):
        run_steps(small_model(**variant), random_images(), MASK)


# --- The command --------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path) -> str:
    args = {"model": "mixmae_quickstart", "input_size": (32, 32), "in_chans": 1, "mean": (0.2,), "std": (0.3,)}
    state = {"model": small_model(1).state_dict(), "epoch": 3, "args": args | {"norm_pix_loss": True}}
    write_checkpoint(tmp_path / "checkpoint.pth", state)
    return str(tmp_path / "checkpoint.pth")


@pytest.fixture
def images(tmp_path) -> list[str]:
    (tmp_path / "images").mkdir()
    paths = [tmp_path / "images" / f"{number}.png" for number in range(3)]
    for number, path in enumerate(paths):
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (40, 50), dtype=np.uint8)).save(path)
    return [str(path) for path in paths]


def run(checkpoint: str, images: list[str], out, *flags: str) -> None:
    command = ["--checkpoint", checkpoint, "--images", *images, "--out", str(out), *flags]
    explain.explain(given_flags(explain.ExplainConfig, explain.get_args_parser().parse_args(command)))


def test_two_images_or_a_pair_of_a_folder(tmp_path, checkpoint, images):
    run(checkpoint, images[:2], tmp_path / "new" / "two.png", "--stage", "3")
    for name, seed in (("a.png", "1"), ("b.png", "1"), ("c.png", "2")):
        run(checkpoint, [str(tmp_path / "images")], tmp_path / name, "--seed", seed)
    two, a, b, c = ((tmp_path / name).read_bytes() for name in ("new/two.png", "a.png", "b.png", "c.png"))
    assert a == b != c and two != a


def test_the_same_image_twice_is_worth_a_warning(tmp_path, checkpoint, images, caplog):
    with caplog.at_level(logging.WARNING):
        run(checkpoint, images[:2], tmp_path / "two.png")
        assert not caplog.records
        run(checkpoint, [images[0], images[0]], tmp_path / "same.png")
    assert f"both images are the same ({images[0]}, {images[0]})" in caplog.text


def test_wrong_inputs_are_explained(tmp_path, checkpoint, images):
    out = tmp_path / "picture.png"
    with pytest.raises(ValueError, match="at least 2 are needed, --images gives 1"):
        run(checkpoint, images[:1], out)
    with pytest.raises(ValueError, match="one pair: name two images or a folder to draw from, --images gives 3"):
        run(checkpoint, images, out)
    with pytest.raises(ValueError, match=r"must end in one of \.png"):
        run(checkpoint, images[:2], tmp_path / "picture.gif")
    for stage in ("0", "5"):
        with pytest.raises(ValueError, match="--stage must be between 1 and 4"):
            run(checkpoint, images[:2], out, "--stage", stage)
    with pytest.raises(ValueError, match=r"--mask_ratio 0\.01 hides 0 of the 16 cells of an image"):
        run(checkpoint, images[:2], out, "--mask_ratio", "0.01")
    encoder = timm.create_model("swin_quickstart", in_chans=1, num_classes=0)
    torch.save({"model": encoder.state_dict(), "args": {"model": "swin_quickstart"}}, tmp_path / "encoder.pth")
    with pytest.raises(ValueError, match="has no decoder"):
        run(str(tmp_path / "encoder.pth"), images[:2], out)
    assert not out.exists()
