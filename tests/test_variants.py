"""The variants of the method, each by the property that defines it; and that the default is none of them."""

import itertools

import pytest
import timm
import torch
from textbook import Config, TextbookMixMAE

from models_mixmae import MixMAE
from models_swin import SwinTransformer
from util.errors import UserError
from util.layers import mixing
from util.layers.mixing import PARTNERS, images_of_tuples
from util.run.optim import autocast
from util.run.reconstruction import reconstruct
from util.seeding import keyed_generator
from util.visualize import reconstruction_figure
from util.weights.layouts import load_encoder, load_pretraining

ENCODER = dict(
    img_size=32, patch_size=1, embed_dim=8, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4), window_size=(8, 4, 8, 4)
)  # 4x4 cells; windows of stage 1 and 2 hold whole cells and parts of them
SMALL = dict(ENCODER, decoder_dim=16, decoder_depth=2, decoder_num_heads=2, norm_pix_loss=True)


def build(**arguments) -> MixMAE:
    torch.manual_seed(0)
    model = MixMAE(**{**SMALL, **arguments})
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.ndim == 1:  # biases and norms too, so that nothing hides behind zeros
            torch.nn.init.normal_(parameter, float(name.endswith("weight")), 0.1)
    return model


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=keyed_generator("images"))


def loss_and_gradients(model: MixMAE, imgs: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    loss, pred, _ = model(imgs, mask=mask)
    loss.backward()
    return [loss.detach(), pred.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


def pixels_of_cell(imgs: torch.Tensor, image: int, cell: int) -> torch.Tensor:
    row, column = cell // 4 * 8, cell % 4 * 8
    return imgs[image, :, row : row + 8, column : column + 8]


# --- Mix embeddings ---


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("masked_attn", [True, False])
def test_mix_embeddings_of_zero_change_nothing_to_the_bit(masked_attn, precision):
    plain, embedded = build(masked_attn=masked_attn), build(masked_attn=masked_attn, mix_embed=True)
    embedded.load_state_dict(plain.state_dict(), strict=False)
    imgs, mask = images(4), plain.random_masking(0.5, keyed_generator(1))
    assert all(not stage.mix_embed.any() for stage in embedded.layers)
    with autocast(precision, torch.device("cpu")):
        expected, found = loss_and_gradients(plain, imgs, mask), loss_and_gradients(embedded, imgs, mask)
    own = {id(stage.mix_embed.grad) for stage in embedded.layers}
    assert equal(expected, [tensor for tensor in found if id(tensor) not in own])
    for stage in embedded.layers:
        assert (stage.mix_embed.grad.abs().amax(dim=1) > 0).all()  # both images' vectors learn


def test_mix_embeddings_are_added_to_each_images_tokens_at_the_start_of_each_stage():
    plain, embedded = build(), build(mix_embed=True)
    embedded.load_state_dict(plain.state_dict(), strict=False)
    mask = plain.random_masking(0.5, keyed_generator(1))
    for i, (stage, other) in enumerate(zip(plain.layers, embedded.layers)):
        torch.nn.init.normal_(other.mix_embed)
        x = torch.randn(2, *stage.grid, plain.feature_info[i]["num_chs"])
        tokens = mask.view(4, 4).repeat_interleave(stage.grid[0] // 4, 0).repeat_interleave(stage.grid[1] // 4, 1)
        vectors = torch.where(tokens[..., None] == 0, other.mix_embed[0], other.mix_embed[1])
        layouts = plain.layouts(plain.layers[0].grid, mask)[i], embedded.layouts(plain.layers[0].grid, mask)[i]
        torch.testing.assert_close(other(x, layouts[1]), stage(x + vectors, layouts[0]), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(other(x), stage(x + other.mix_embed[0]))  # an image alone is the first of a mixture


def with_random_embeddings(**arguments) -> MixMAE:
    model = build(mix_embed=True, **arguments)
    for stage in model.layers:
        torch.nn.init.normal_(stage.mix_embed, std=0.5)
    return model


@pytest.mark.parametrize("size", [32, (19, 37)])
def test_an_encoder_without_mix_embeddings_has_the_features_of_the_one_with_them(size):
    model = with_random_embeddings()
    encoder = SwinTransformer(**ENCODER, num_classes=0)
    report = str(load_encoder(encoder, model.state_dict(), "the run"))
    assert "mix embeddings left out: an image's own are added to biases" in report
    assert not any("mix_embed" in name for name in encoder.state_dict())
    for each in (model, encoder):
        each.patch_embed.strict_img_size = False
        each.eval()
    imgs = torch.randn(2, 3, *((size, size) if isinstance(size, int) else size))
    for ours, theirs in zip(encoder.forward_intermediates(imgs)[1], model.forward_intermediates(imgs)[1]):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    dropped = SwinTransformer(**ENCODER, num_classes=0, strict_img_size=False)
    load_encoder(dropped, {k: v for k, v in model.state_dict().items() if "mix_embed" not in k}, "without them")
    assert (dropped.forward_features(imgs) - model.forward_features(imgs)).abs().max() > 0.1


def test_timm_loads_weights_with_mix_embeddings(tmp_path):
    model = with_random_embeddings()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    encoder = timm.create_model("swin_quickstart", num_classes=0, **ENCODER, checkpoint_path=tmp_path / "weights.pth")
    imgs = images(2)
    torch.testing.assert_close(encoder.forward_features(imgs), model.forward_features(imgs), rtol=1e-4, atol=1e-4)


def test_pretraining_goes_on_with_and_without_mix_embeddings():
    embedded, plain = with_random_embeddings(), build()
    imgs, mask = images(4), plain.random_masking(0.5, keyed_generator(1))
    report = load_pretraining(plain, embedded.state_dict(), "with them")
    assert "mix embeddings left out" in str(report)
    latent = plain.forward_features(imgs, group=mask)
    for stage in embedded.layers:
        stage.mix_embed.data[1] = stage.mix_embed.data[0]  # all tokens as the first image's
    torch.testing.assert_close(embedded.forward_features(imgs, group=mask), latent, rtol=1e-4, atol=1e-4)

    three = with_random_embeddings(mix_images=3)
    fresh = build(mix_embed=True)
    load_pretraining(fresh, three.state_dict(), "with three")
    torch.testing.assert_close(fresh.forward_features(imgs), three.forward_features(imgs), rtol=1e-4, atol=1e-4)

    fresh = build(mix_embed=True)
    report = load_pretraining(fresh, plain.state_dict(), "without them")
    assert "at their initial values: layers.0.mix_embed" in str(report)
    assert torch.equal(fresh.forward_features(imgs, group=mask), latent)  # they start at zero


# --- Attention that is not masked ---


def textbook_without_masks(model: MixMAE) -> TextbookMixMAE:
    names = ("img_size", "patch_size", "embed_dim", "depths", "num_heads", "window_size", "norm_pix_loss")
    names = (*names, "decoder_dim", "decoder_depth", "decoder_num_heads")
    textbook = TextbookMixMAE(Config(**{name: SMALL[name] for name in names}))
    textbook.load_state_dict(model.state_dict())
    encode = textbook.encode
    textbook.encode = lambda x, masks: encode(x)
    return textbook


def test_without_masked_attention_the_model_is_the_textbooks_dense_one():
    model = build(masked_attn=False)
    textbook = textbook_without_masks(model)
    imgs, mask = images(4), model.random_masking(0.5, keyed_generator(1))
    loss, pred, _ = model(imgs, mask=mask)
    expected, expected_pred, _ = textbook(imgs, mask)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(pred, expected_pred, rtol=1e-4, atol=1e-5)
    loss.backward()
    expected.backward()
    theirs = dict(textbook.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-5)
    assert build()(imgs, mask=mask)[0] != loss


# --- More than two images ---


@pytest.mark.parametrize("K", [2, 3, 4])
@pytest.mark.parametrize("partners", PARTNERS)
def test_a_mixture_has_K_different_images_and_minus_k_undoes_k(K, partners):
    batch = torch.arange(4 * K)
    partner = PARTNERS[partners]
    mixtures = torch.stack([partner(batch, k, K) for k in range(K)])
    assert torch.equal(mixtures[0], batch)
    assert all(len(set(mixture)) == K for mixture in mixtures.T.tolist())
    for k in range(K):
        assert torch.equal(partner(partner(batch, k, K), -k, K), batch)
    tuples = {frozenset(mixture) for mixture in mixtures.T.tolist()}
    if partners == "pairs":
        assert tuples == set(map(frozenset, images_of_tuples(4 * K, K))) and len(tuples) == 4
    else:
        assert len(tuples) == 4 * K or K == 2


@pytest.mark.parametrize("mask_ratio", [0.5, 0.75])
def test_two_images_by_the_general_way_are_the_plain_formulas_to_the_bit(mask_ratio, monkeypatch):
    """Loss, predictions and gradients, against the method as it is written down for two images."""
    model, plain = build(), build()
    imgs, mask = images(6), model.random_masking(mask_ratio, keyed_generator(1))

    def embed_mixture(imgs, mask):
        x = plain.embed(imgs)
        return torch.where(mask.bool(), x.flip(0), x)

    def unmix(x, mask):
        return torch.cat([torch.where(mask.bool(), plain.mask_token, x), torch.where(mask.bool(), x, plain.mask_token)])

    def keep_hidden(x, mask):
        first, second = x.chunk(2)
        return torch.where(mask.bool(), first, second.flip(0))

    monkeypatch.setattr(MixMAE, "run_part", lambda self, part, *args: getattr(self, part.__name__)(*args))
    for function in (embed_mixture, unmix, keep_hidden):
        monkeypatch.setattr(plain, function.__name__, function)
    assert equal(loss_and_gradients(model, imgs, mask), loss_and_gradients(plain, imgs, mask))


def by_blocks(x: torch.Tensor, k: int) -> torch.Tensor:
    """`partner_in_tuple` for two images, without the shorter way that it has for them."""
    blocks = mixing._every_second_reversed(x, 2).roll(-k, 0).flatten(0, 1)
    return mixing._every_second_reversed(blocks, 2).flatten(0, 1)


def test_the_general_rule_of_partners_gives_the_pairs_of_two_images():
    batch = torch.arange(10)
    for k in (-1, 0, 1):
        assert torch.equal(by_blocks(batch, k), PARTNERS["pairs"](batch, k, 2))


@pytest.mark.parametrize("partners", PARTNERS)
@pytest.mark.parametrize("K", [3, 4])
def test_every_cell_of_every_image_is_predicted_where_it_is_hidden(K, partners):
    """Changing a cell changes no prediction of it, in any of its K-1 branches, but predictions of other cells."""
    model = build(mix_images=K, partners=partners, masked_attn=False).eval()
    model.masked_attn = True  # which nobody needs in a cycle, but what is predicted from what then shows exactly
    imgs, mask = images(2 * K), model.random_masking(0.7, keyed_generator(1))
    assert sorted(mask.unique().tolist()) == list(range(K))
    pred = model(imgs, mask=mask)[1].unflatten(0, (K - 1, 2 * K))
    for image, cell in itertools.product((0, 2 * K - 1), range(0, 16, 5)):
        changed = imgs.clone()
        pixels_of_cell(changed, image, cell).add_(1)
        difference = (model(changed, mask=mask)[1].unflatten(0, (K - 1, 2 * K)) - pred).abs().amax(-1)  # (K-1, B, L)
        assert difference[:, image, cell].max() == 0
        # The cell is visible in one branch, which predicts the cells of the image that are hidden there.
        assert (difference[:, image] > 0).any(dim=0).sum() == (mask != mask[cell]).sum()
        assert not difference[:, [other for other in range(2 * K) if other != image]].any()  # no other image


def test_the_loss_of_K_images_is_the_mean_over_all_predictions():
    model = build(mix_images=3)
    imgs, mask = images(6), model.random_masking(0.7, keyed_generator(1))
    loss, pred, _ = model(imgs, mask=mask)
    target = model.patchify(imgs)
    mean, std = model.cell_statistics(target)
    errors = [(rows - (target - mean) / std).square().mean() for rows in pred.chunk(2)]
    assert loss.item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-6)


def test_masks_of_K_images_give_partners_equal_shares():
    model = build(mix_images=4)
    mask = model.random_masking(0.75, keyed_generator(1))
    assert [int((mask == k).sum()) for k in range(4)] == [4, 4, 4, 4]
    assert torch.equal(mask != 0, build().random_masking(0.75, keyed_generator(1)) != 0)
    with pytest.raises(UserError, match=r"unless at least one is visible of each of 4 images; use .*between 0.188 and"):
        model.random_masking(0.1)
    with pytest.raises(UserError, match="batch size must be a multiple, got B=6"):
        model(images(6))


# --- One mask for each pair ---


@pytest.mark.parametrize("K, embedded", [(2, False), (2, True), (3, False)])
def test_masks_of_pairs_are_as_if_each_pair_were_a_batch(K, embedded):
    model = build(mix_images=K, mix_embed=embedded)
    for stage in model.layers if embedded else ():
        torch.nn.init.normal_(stage.mix_embed)
    imgs = images(3 * K)
    mask = model.random_masking(0.7, keyed_generator(1), len(imgs))
    tuples = images_of_tuples(len(imgs), K)
    assert len(mask.unique(dim=0)) == 3 and all((mask[rows] == mask[rows[0]]).all() for rows in tuples)
    loss, pred, _ = model(imgs, mask=mask)
    pred = pred.unflatten(0, (K - 1, 3 * K))
    losses = []
    for rows in tuples:
        own_loss, own_pred, _ = model(imgs[rows], mask=mask[rows[0]])
        losses.append(own_loss)
        torch.testing.assert_close(pred[:, rows].flatten(0, 1), own_pred, rtol=1e-4, atol=1e-5)
    assert loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    bad = mask.clone()
    bad[0] = mask[1]
    with pytest.raises(ValueError, match="images that are mixed must have one mask"):
        model(imgs, mask=bad)
    with pytest.raises(ValueError, match=f"masks of {2 * K} images, but there are {3 * K}"):
        model(imgs, mask=mask[: 2 * K] * 0 + mask[0])
    with pytest.raises(ValueError, match="tuples of"):
        build(mix_images=K, partners="cycle", masked_attn=False)(imgs, mask=mask)
    with pytest.raises(ValueError, match="tuples of"):
        model(imgs[:-1], mask=mask[:-1])


# --- One image reconstructed ---


def test_a_single_reconstruction_is_the_first_branch_and_counts_hidden_cells_alone():
    dual, single = build(), build(reconstruct="single")
    imgs, mask = images(4), dual.random_masking(0.5, keyed_generator(1))
    pred, both = single(imgs, mask=mask)[1], dual(imgs, mask=mask)[1]
    hidden = mask == 1
    torch.testing.assert_close(pred[:, hidden], both[:, hidden])
    target = single.patchify(imgs)
    mean, std = single.cell_statistics(target)
    error = (pred - (target - mean) / std).square()[:, hidden].mean()
    assert single(imgs, mask=mask)[0].item() == pytest.approx(error.item(), rel=1e-5)


# --- What fills hidden cells ---


@pytest.mark.parametrize("fill", ["mask_token", "zero", "noise"])
def test_nothing_of_a_hidden_cell_is_seen_where_no_partner_fills_it(fill):
    model = build(fill=fill, masked_attn=False)
    imgs, mask = images(2), model.random_masking(0.5, keyed_generator(1))

    def predict(imgs: torch.Tensor) -> list[torch.Tensor]:
        torch.manual_seed(5)  # of the noise
        loss, pred, _ = model(imgs, mask=mask)
        return loss, pred

    pred = predict(imgs)[1]
    for cell in range(16):
        changed = imgs.clone()
        pixels_of_cell(changed, 0, cell).add_(1)
        difference = (predict(changed)[1] - pred).abs().amax(-1)
        assert (difference[0].max() > 0) == (mask[cell] == 0)
        assert difference[1:].max() == 0
    loss, _ = predict(imgs)
    loss.backward()
    assert model.mask_token.grad is None and not model.mask_token.requires_grad
    unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused  # which DistributedDataParallel would complain about


def test_fillings_are_what_their_names_say():
    imgs, mask = images(2), torch.tensor([1.0, 0] * 8)
    hidden = mask.view(4, 4).repeat_interleave(8, 0).repeat_interleave(8, 1)
    for fill in ("mask_token", "zero", "noise"):
        model = build(fill=fill, masked_attn=False)
        tokens = model.embed_mixture(imgs, hidden[..., None])
        assert torch.equal(tokens[:, hidden == 0], model.embed(imgs)[:, hidden == 0])
        found = (tokens - model.absolute_pos_embed.unflatten(1, (32, 32)))[:, hidden == 1]
        if fill == "noise":
            assert (found[0] - found[1]).abs().amax(-1).min() > 0  # another in every image
        else:
            empty = model.patch_embed(torch.zeros(1, 3, 32, 32))[0, 0, 0]
            expected = model.fill_token if fill == "mask_token" else empty
            torch.testing.assert_close(found, expected.expand_as(found), rtol=1e-5, atol=1e-5)


# --- Everything else ---


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(fill="zero"), "fill=zero .* add --no_masked_attn"),
        (dict(fill="zero", mix_embed=True), "add --no_masked_attn.*, and leave out --mix_embed"),
        (dict(partners="cycle"), "partners=cycle changes nothing .* add --no_masked_attn"),
        (dict(fill="zero", masked_attn=False, mix_embed=True), "leave out --mix_embed"),
        (dict(fill="noise", masked_attn=False, mix_images=3), "leave out --mix_embed, --mix_images"),
        (dict(fill="noise", masked_attn=False, reconstruct="single"), "leave out .* --reconstruct"),
        (dict(mix_images=1), "at least 2 images, got mix_images=1"),
        (dict(reconstruct="both"), "reconstruct must be one of dual, single, got 'both'"),
        (dict(fill="black"), "fill must be one of partner, mask_token, zero, noise, got 'black'"),
        (dict(partners="all"), "partners must be one of pairs, cycle"),
        (dict(decoder_dim=30), "multiple of 4 .* decoder_dim=30"),
        (dict(decoder_num_heads=3), "of decoder_num_heads, got decoder_dim=16, decoder_num_heads=3"),
    ],
)
def test_settings_that_exclude_each_other_are_errors(arguments, message):
    with pytest.raises(UserError, match=message):
        build(**arguments)


def test_authors_weights_load_under_every_variant():
    authors = build().state_dict()
    for arguments in (
        dict(mix_embed=True), dict(masked_attn=False), dict(mix_images=3), dict(partners="cycle", masked_attn=False),
        dict(reconstruct="single"), dict(fill="mask_token", masked_attn=False), dict(fill="zero", masked_attn=False),
    ):  # fmt: skip
        model = build(**arguments)
        load_pretraining(model, authors, "the authors' file")
        own = model.state_dict()
        assert all(torch.equal(own[name], authors[name]) for name in authors)
        load_pretraining(build(), own, "the variant's file")
        load_encoder(SwinTransformer(**ENCODER, num_classes=0), own, "the variant's file")


@pytest.mark.parametrize("K, partners", [(2, "cycle"), (3, "pairs"), (3, "cycle")])
def test_pictures_show_each_image_of_a_mixture_with_what_hides_it(K, partners):
    model = build(mix_images=K, partners=partners, masked_attn=False)
    imgs, mask = images(2 * K), model.random_masking(0.67, keyed_generator(1))
    mixed, filled, predicted = reconstruct(model, imgs, mask)
    for rows in images_of_tuples(2 * K, K):
        for place, image in enumerate(rows):
            for cell, k in enumerate(mask.int().tolist()):
                shown = imgs[rows[(place + k) % K]][None]
                assert torch.equal(pixels_of_cell(mixed, image, cell), pixels_of_cell(shown, 0, cell))
                kept = pixels_of_cell(filled, image, cell)
                assert torch.equal(kept, pixels_of_cell(imgs if k == 0 else predicted, image, cell))
    assert model.training
    picture = reconstruction_figure(model, imgs, mask, (0.5,) * 3, (0.25,) * 3)
    assert picture.height > picture.width / 2


def test_pictures_without_partners_hide_cells_and_predict_them_alone():
    for arguments in (dict(fill="zero", masked_attn=False), dict(reconstruct="single")):
        model = build(**arguments)
        imgs, mask = images(2), model.random_masking(0.5, keyed_generator(1))
        mixed, filled, predicted = reconstruct(model, imgs, mask)
        assert torch.equal(filled, predicted)
        for cell, k in enumerate(mask.int().tolist()):
            assert torch.equal(pixels_of_cell(predicted, 0, cell), pixels_of_cell(imgs, 0, cell)) == (k == 0)
            if "fill" in arguments:
                assert pixels_of_cell(mixed, 0, cell).any() == (k == 0)
        reconstruction_figure(model, imgs, mask, (0.5,) * 3, (0.25,) * 3)
