"""FlexAttention, which compiled models use on a GPU, computes what the other kernels compute.

Its unfused form is compared, which refuses gradients of queries, keys and values on a CPU; tests/test_gpu.py compares
those of compiled steps on a GPU.
"""

import pytest
import torch

from util.layers.attention import flexible_attention, segment_attention
from util.layers.tracing import is_compiled_here

B, WINDOWS, TOKENS, HEADS, CHANNELS = 2, 3, 20, 2, 16


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("shared", [True, False], ids=["one bias", "a bias for each window"])
@pytest.mark.parametrize("grouped", [True, False], ids=["groups", "one group"])
def test_values_and_the_gradient_of_the_bias(shared, grouped):
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(B, WINDOWS * TOKENS, 3, HEADS, CHANNELS, generator=generator)
    bias = torch.randn(1 if shared else WINDOWS, HEADS, TOKENS, TOKENS, generator=generator, requires_grad=True)
    group = torch.randint(3, (WINDOWS, TOKENS), generator=generator, dtype=torch.int32) if grouped else None
    weights = torch.randn(B, WINDOWS * TOKENS, HEADS, CHANNELS, generator=generator)

    groups = None if group is None else [group]
    expected = segment_attention(qkv, ((WINDOWS, TOKENS),), [bias], groups)
    found = flexible_attention(qkv.unflatten(1, (WINDOWS, TOKENS)), bias, group).flatten(1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    of_expected, of_found = (torch.autograd.grad((x * weights).sum(), bias) for x in (expected, found))
    torch.testing.assert_close(of_found, of_expected, rtol=1e-4, atol=1e-5)


def probe(x: torch.Tensor) -> torch.Tensor:
    return x + 1 if is_compiled_here() else x - 1


class Probe(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return probe(x)


def test_it_is_for_what_is_compiled_here_alone():
    x = torch.zeros(2)
    assert probe(x)[0] == -1
    assert torch.compile(probe, fullgraph=True, backend="eager")(x)[0] == 1
    for strict in (False, True):
        assert torch.export.export(Probe(), (x,), strict=strict).module()(x)[0] == -1
    assert torch.func.vmap(probe)(x)[0] == -1
    assert torch.jit.trace(probe, (x,))(x)[0] == -1
