"""Who is mixed with whom, and what else may take the place of hidden tokens: options that `MixMAE` takes by name.

Every partner function takes rows of a batch x (B, ...), a number k and the number K of images in a mixture, and returns
(B, ...), in row i that of image i's k-th partner. With -k it undoes that.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def partner_in_tuple(x: Tensor, k: int, K: int) -> Tensor:
    """Tuples of K images. With K = 2, image i and image B-1-i, as in the authors' code; in general the batch is K
    blocks, every second one reversed, and a tuple has the images at one place of all blocks."""
    if k % K == 0:
        return x
    if K == 2:
        return x.flip(0)
    return _every_second_reversed(_every_second_reversed(x, K).roll(-k, 0).flatten(0, 1), K).flatten(0, 1)


def _every_second_reversed(x: Tensor, K: int) -> Tensor:
    """(B, ...) -> (K, B / K, ...)"""
    return torch.stack([block.flip(0) if number % 2 else block for number, block in enumerate(x.chunk(K))])


def partner_in_cycle(x: Tensor, k: int, K: int) -> Tensor:
    """The k-th image after image i, the first after the last. Since batches are shuffled, these are random images."""
    return x.roll(-k, 0)


def images_of_tuples(batch_size: int, K: int) -> list[list[int]]:
    """The images of each tuple of `partner_in_tuple`."""
    return _every_second_reversed(torch.arange(batch_size, device="cpu"), K).T.tolist()


def mask_tokens(model: torch.nn.Module, imgs: Tensor) -> Tensor:
    """A learned token, at all positions."""
    return model.fill_token + model.absolute_pos_embed.unflatten(1, model.layers[0].grid)


def tokens_of_zeros(model: torch.nn.Module, imgs: Tensor) -> Tensor:
    """Those of an image without content: every pixel has the mean value."""
    return model.embed(torch.zeros_like(imgs[:1]))


def tokens_of_noise(model: torch.nn.Module, imgs: Tensor) -> Tensor:
    """Those of Gaussian noise, drawn for every image and step, with the mean and deviation of normalised pixels."""
    return model.embed(torch.randn_like(imgs))


PARTNERS: dict[str, Callable[[Tensor, int, int], Tensor]] = {"pairs": partner_in_tuple, "cycle": partner_in_cycle}
# Tokens (1 or B, rows, columns, C) of the first stage, with their positions, in place of those that are hidden.
FILLINGS: dict[str, Callable[[torch.nn.Module, Tensor], Tensor]] = {
    "mask_token": mask_tokens,
    "zero": tokens_of_zeros,
    "noise": tokens_of_noise,
}
