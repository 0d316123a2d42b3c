"""Run by torchrun on two ranks: sharded models train as whole ones do on both halves of a batch."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from models_mixmae import MixMAE
from models_swin import Block, SwinTransformer

SHAPE = dict(img_size=32, embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), window_size=(4, 4, 2, 1))
SHAPE |= dict(patch_size=1, in_chans=1)
DECODER = dict(decoder_dim=16, decoder_depth=2, decoder_num_heads=2)


def shard(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in model.modules():
        if isinstance(module, Block):  # of the decoder too
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def loss_of(model: nn.Module, imgs: torch.Tensor) -> torch.Tensor:
    if isinstance(model, MixMAE):
        return model(imgs, mask=(torch.arange(16) % 2).float())[0]
    return model(imgs).square().mean()


def main() -> None:
    dist.init_process_group("gloo")
    for make in (lambda: SwinTransformer(num_classes=5, **SHAPE), lambda: MixMAE(**SHAPE, **DECODER)):
        torch.manual_seed(0)
        whole = make()
        sharded = make()
        sharded.load_state_dict(whole.state_dict())
        sharded = shard(sharded)
        halves = torch.randn(2, 4, 1, 32, 32)
        optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (whole, sharded)]
        for _ in range(3):
            losses = [loss_of(whole, half) for half in halves]
            (sum(losses) / 2).backward()
            loss = loss_of(sharded, halves[dist.get_rank()])
            loss.backward()
            torch.testing.assert_close(loss, losses[dist.get_rank()], rtol=1e-4, atol=1e-6)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        for (name, ours), theirs in zip(whole.named_parameters(), sharded.parameters(), strict=True):
            torch.testing.assert_close(theirs.full_tensor(), ours, rtol=1e-4, atol=1e-5, msg=name)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
