"""Measure speed and memory, side by side with what a user would run instead.

    python tests/benchmark.py step        a pretraining step, against the textbook MixMAE (tests/textbook.py)
    python tests/benchmark.py finetune    a fine-tuning step, against the textbook
    python tests/benchmark.py gpu         a pretraining step in bfloat16 on a GPU, against the textbook, compiled too
    python tests/benchmark.py memory      activations stored for the backward pass, and peak resident memory
    python tests/benchmark.py data        images per second on one core, against the usual Pillow pipelines
    python tests/benchmark.py index       time to find 300,000 files, and memory that data-loader workers add (Linux)
    python tests/benchmark.py scaling     two processes against one

The textbook computes every pair of tokens in a window and masks afterwards, partitions and reverses windows in every
block, predicts all cells in both branches, and trains with PyTorch's default AdamW. Both versions take turns in one
process, so that other load on the machine affects both alike; the ratio is the median over the turns. On a busy
machine, `--threads 1 --cpu_time` counts the time that the process itself used. All but `gpu` runs in float32 on a CPU.
"""

import argparse
import gc
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported; spinning slows busy machines

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from photos import PHOTOS, data_args, encode_jpeg, large_photo
from textbook import Config, TextbookEncoder, TextbookMixMAE

from models_mixmae import MixMAE
from util.data import jpeg
from util.data.datasets import build_dataset, collate
from util.data.image_index import ImageIndex, StringTable, load_index
from util.data.transforms import Normalize, finetune_transform, pretrain_transform
from util.run.allocator import keep_freed_memory
from util.run.metrics import count_work, peak_operations, training_operations
from util.run.optim import autocast, set_up_arithmetic
from util.seeding import seed_all

MASK_RATIO = 0.5
DROP_PATH_RATE = 0.1  # while fine-tuning
MATRIX_SIDE = 2048  # of the matrix product that measures the machine's peak


# ---------------------------------------------------------------------------------------------------------------
# Measuring


def alternate(turns: Sequence[Callable[[], object]], repeats: int, clock: Callable[[], float]) -> list[list[float]]:
    """Seconds that each of `turns` takes, called in turn `repeats` times; a first round is not counted."""
    times = [[] for _ in turns]
    for repeat in range(repeats + 1):
        for seconds, turn in zip(times, turns):
            start = clock()
            turn()
            if repeat > 0:
                seconds.append(clock() - start)
    return times


def ratio_of(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Median and range of the turns' ratios."""
    ratios = [mine / other for mine, other in zip(ours, theirs)]
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


def seconds_of(times: Sequence[float]) -> str:
    return f"{statistics.median(times):.3f} s ({min(times):.3f} to {max(times):.3f})"


def print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def matrix_product() -> Callable[[], Tensor]:
    a, b = torch.randn(2, MATRIX_SIDE, MATRIX_SIDE)
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def model_flops(step: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products of one step, forward and backward."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def results_of(start_method: str, work: Callable, *calls: tuple) -> list:
    """What `work(sender, *arguments)` sends, in a process of its own for each of `calls`, all at the same time."""
    context = multiprocessing.get_context(start_method)
    receivers, processes = [], []
    for arguments in calls:
        receiver, sender = context.Pipe(duplex=False)
        processes.append(context.Process(target=work, args=(sender, *arguments)))
        processes[-1].start()
        sender.close()  # so that recv fails, and does not wait, if the child fails
        receivers.append(receiver)
    results = [receiver.recv() for receiver in receivers]
    for process in processes:
        process.join()
    return results


# ---------------------------------------------------------------------------------------------------------------
# Models and their steps


def build_pair(args: argparse.Namespace, finetune: bool) -> tuple[nn.Module, nn.Module]:
    """Our model and the textbook's, with the same weights."""
    torch.manual_seed(0)
    if finetune:
        ours = timm.create_model(args.model, drop_path_rate=DROP_PATH_RATE)
    else:
        ours = timm.create_model(args.model, norm_pix_loss=True)
    blocks = [stage.blocks for stage in ours.layers]
    config = Config(
        img_size=ours.img_size,
        patch_size=ours.patch_size,
        in_chans=ours.in_chans,
        embed_dim=ours.patch_embed.proj.out_channels,
        depths=tuple(len(stage) for stage in blocks),
        num_heads=tuple(stage[0].attn.num_heads for stage in blocks),
        window_size=tuple(stage.window for stage in ours.layers),
        num_classes=ours.num_classes,
        drop_path_rate=DROP_PATH_RATE if finetune else 0.0,
    )
    if not finetune:
        config.norm_pix_loss = True
        config.decoder_dim = ours.decoder_embed.out_features
        config.decoder_depth = len(ours.decoder_blocks)
        config.decoder_num_heads = ours.decoder_blocks[0].attn.num_heads
    theirs = (TextbookEncoder if finetune else TextbookMixMAE)(config)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def make_step(model: nn.Module, loss: Callable[[], Tensor], fused: bool | None) -> Callable[[], None]:
    """Forward, backward and update; a GPU is not waited for."""
    optimizer = torch.optim.AdamW(trained(model), lr=1e-6, weight_decay=0.05, fused=fused)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def make_losses(
    args: argparse.Namespace, ours: nn.Module, theirs: nn.Module, finetune: bool
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Both versions' losses on the same images; each call of a pair has the same mask or the same drop path."""
    imgs = torch.randn(args.batch_size, ours.in_chans, *ours.img_size)
    if finetune:
        targets = torch.randint(ours.num_classes, (args.batch_size,))
        draws = [torch.Generator(), torch.Generator()]

        def loss_of(model: nn.Module, draw: torch.Generator) -> Callable[[], Tensor]:
            def loss() -> Tensor:
                torch.manual_seed(int(torch.randint(2**31, (), generator=draw)))
                return F.cross_entropy(model(imgs), targets)

            return loss

        return tuple(loss_of(model, draw.manual_seed(1)) for model, draw in zip((ours, theirs), draws))
    our_masks, their_masks = (torch.Generator().manual_seed(1) for _ in range(2))
    return (
        lambda: ours(imgs, mask=ours.random_masking(MASK_RATIO, our_masks))[0],
        lambda: theirs(imgs, ours.random_masking(MASK_RATIO, their_masks))[0],
    )


def benchmark_step(args: argparse.Namespace, finetune: bool = False) -> None:
    """A training step with glibc's default allocation, and then keeping freed memory as the mains do."""
    ours, theirs = build_pair(args, finetune)
    our_loss, their_loss = make_losses(args, ours, theirs, finetune)
    difference, gradient_difference = compare(ours, theirs, our_loss(), their_loss())
    print(f"relative difference of the losses {difference:.1e}, of the gradients at most {gradient_difference:.1e}")
    steps = make_step(ours, our_loss, fused=True), make_step(theirs, their_loss, fused=None)
    flops = model_flops(lambda: our_loss().backward())
    ours.zero_grad()

    clock = time.process_time if args.cpu_time else time.perf_counter
    product_seconds, rows, medians = [], [["freed memory", "ours", "textbook", "ratio", "share of sgemm peak"]], {}
    for memory in ("returned", "kept"):
        if memory == "kept" and not keep_freed_memory():
            print("freed memory cannot be kept: the C library is not glibc")
            break
        mine, other, products = alternate((*steps, matrix_product()), args.repeats, clock)
        product_seconds += products
        peak = 2 * MATRIX_SIDE**3 / min(product_seconds)
        share = flops / statistics.median(mine) / peak
        rows.append([memory, seconds_of(mine), seconds_of(other), ratio_of(mine, other), f"{share:.0%}"])
        medians[memory] = statistics.median(mine), statistics.median(other)
    print_table(rows)
    if "kept" in medians:
        print(f"ours with freed memory kept / textbook without: {medians['kept'][0] / medians['returned'][1]:.3f}")
    print(f"{flops / 1e9:.0f} GFLOP of matrix products; sgemm peak {peak / 1e9:.0f} GFLOP/s")


def benchmark_gpu(args: argparse.Namespace) -> None:
    """Images/s, share of the GPU's peak and peak memory of a step in bfloat16; the four versions take turns."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # a CPU shows that it runs
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    set_up_arithmetic("bf16")
    versions, constant, rows = {}, {}, [["version", "step", "against the textbook's", "images/s", "MFU", "peak memory"]]
    for compiled in (False, True):
        ours, theirs = (model.to(device) for model in build_pair(args, finetune=False))
        if compiled:
            ours.compile_parts()
            theirs = torch.compile(theirs)
        imgs = torch.randn(args.batch_size, ours.in_chans, *ours.img_size, device=device)
        for name, model, fused in (("textbook", theirs, None), ("ours", ours, True)):
            masks = torch.Generator().manual_seed(1)

            def loss(model: nn.Module = model, ours: MixMAE = ours, name: str = name, masks=masks, imgs=imgs) -> Tensor:
                mask = ours.random_masking(MASK_RATIO, masks)
                with autocast("bf16", device):
                    return model(imgs, mask=mask.to(device) if name == "textbook" else mask)[0]

            name = f"{name}, compiled" if compiled else name
            versions[name] = make_step(model, loss, fused)
            constant[name] = sum(p.nbytes for p in model.parameters()) + 2 * sum(p.nbytes for p in trained(model))
    peaks = {}

    def turn(name: str) -> None:
        """Some steps; and the version's own peak memory, for the others' weights and moments are there, too."""
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        for _ in range(args.steps):
            versions[name]()
        synchronize()
        if device.type == "cuda":
            peaks[name] = torch.cuda.max_memory_allocated() - before + constant[name]

    times = alternate([partial(turn, name) for name in versions], args.repeats, time.perf_counter)
    times = dict(zip(versions, ([seconds / args.steps for seconds in turns] for turns in times)))
    with torch.device("meta"):
        operations = training_operations(count_work(timm.create_model(args.model))[1])
    peak = peak_operations(device)
    for name, seconds in times.items():
        speed = args.batch_size / statistics.median(seconds)
        rows.append(
            [
                name,
                seconds_of(seconds),
                ratio_of(seconds, times[name.replace("ours", "textbook")]),
                f"{speed:.0f}",
                f"{speed * operations / peak:.1%}" if peak else "",
                f"{peaks[name] / 2**30:.1f} GiB" if peaks else "",
            ]
        )
    card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{args.model}, {args.batch_size} images, {card}, PyTorch {torch.__version__}")
    print_table(rows)


def compare(ours: nn.Module, theirs: nn.Module, our_loss: Tensor, their_loss: Tensor) -> tuple[float, float]:
    """Relative difference of the losses, and the largest of the gradients as norm over norm."""
    our_loss.backward()
    their_loss.backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    differences = [
        ((parameter.grad - expected[name]).norm() / expected[name].norm()).item()
        for name, parameter in ours.named_parameters()
        if parameter.grad is not None
    ]
    ours.zero_grad()
    theirs.zero_grad()
    return abs(our_loss.item() - their_loss.item()) / their_loss.item(), max(differences)


# ---------------------------------------------------------------------------------------------------------------
# Memory


def stored_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that a forward pass stores for the backward pass, parameters excluded; each storage counts once."""
    parameters = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    stored = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            stored[storage.data_ptr()] = storage  # held, so that no other storage gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in stored.values())


def measure_memory(sender, args: argparse.Namespace, version: str) -> None:
    """In a process of its own: sends the bytes that `version` stores for a batch, and its peak resident memory."""
    torch.set_num_threads(args.threads)
    ours, theirs = build_pair(args, finetune=False)
    imgs = torch.randn(args.batch_size, ours.in_chans, *ours.img_size)
    mask = ours.random_masking(MASK_RATIO)
    model = theirs if version == "textbook" else ours
    del theirs, ours
    if version != "textbook":
        keep_freed_memory()
        model.set_grad_checkpointing(version == "checkpointing")

    def loss() -> Tensor:
        return model(imgs, mask=mask)[0]

    stored = stored_bytes(model, loss)
    step = make_step(model, loss, fused=None if version == "textbook" else True)
    for _ in range(2):
        step()
    sender.send((stored, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def benchmark_memory(args: argparse.Namespace) -> None:
    rows, per_image = [["version", "stored per image", "ratio", f"peak resident, batch {args.batch_size}"]], {}
    for version in ("textbook", "ours", "checkpointing"):
        [(stored, peak)] = results_of("spawn", measure_memory, (args, version))
        per_image[version] = stored / args.batch_size
        ratio = per_image[version] / per_image["textbook"]
        rows.append([version, f"{per_image[version] / 2**20:.1f} MiB", f"{ratio:.3f}", f"{peak / 2**30:.2f} GiB"])
    print_table(rows)


# ---------------------------------------------------------------------------------------------------------------
# Data


LARGE_PHOTOS = ((1600, 1200), (4000, 3000))


def write_photos(folder: Path, number: int) -> None:
    """Copies of the tests' photographs at 500x375 and about 110 KB, which is typical of ImageNet."""
    for i in range(number):
        with Image.open(PHOTOS[i % len(PHOTOS)]) as source:
            photo = source.convert("RGB").resize((500, 375), Image.Resampling.BICUBIC)
        encoded = min(
            (encode_jpeg(photo, quality) for quality in range(60, 100, 3)), key=lambda data: abs(len(data) - 110e3)
        )
        (folder / f"{i}.jpg").write_bytes(encoded)


def benchmark_data(args: argparse.Namespace) -> None:
    """Images per second from file to normalised float batch, in this process alone.

    With glibc's default allocation, and then keeping freed memory as runs on a CPU do. Large photographs also without
    reduced decoding ("whole").
    """
    torch.set_num_threads(1)
    pillow_pretrain = torchvision.transforms.Compose(
        [
            torchvision.transforms.RandomResizedCrop(224, scale=(0.2, 1.0), interpolation=InterpolationMode.BICUBIC),
            torchvision.transforms.RandomHorizontalFlip(),
            torchvision.transforms.ToTensor(),
            torchvision.transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
        ]
    )
    pillow_finetune = timm.data.create_transform(
        224,
        is_training=True,
        auto_augment="rand-m9-mstd0.5-inc1",
        color_jitter=None,
        interpolation="bicubic",
        use_prefetcher=False,
        re_prob=0.0,
    )
    normalize = Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    rows, pairs, medians = [["freed memory", "pipeline", "ours", "Pillow", "speed-up"]], {}, {}
    reductions = dict(jpeg.REDUCTIONS)
    with tempfile.TemporaryDirectory() as folder:
        kinds = {"500x375": args.batch_size} | {f"{width}x{height}": 2 for width, height in LARGE_PHOTOS}
        for kind in kinds:
            (Path(folder) / kind).mkdir()
        write_photos(Path(folder) / "500x375", args.batch_size)
        for width, height in LARGE_PHOTOS:
            for i in range(2):
                photo = encode_jpeg(large_photo(width, height, enlarged=2 + i), quality=85)
                (Path(folder) / f"{width}x{height}" / f"{i}.jpg").write_bytes(photo)
        recipe = data_args(folder, input_size=(224, 224))
        pretrain, finetune = pretrain_transform(recipe), finetune_transform(recipe)
        pipelines = [("500x375 pretraining", pretrain, pillow_pretrain, True)]
        pipelines += [("500x375 fine-tuning", finetune, pillow_finetune, True)]
        for width, height in LARGE_PHOTOS:
            pipelines += [(f"{width}x{height} pretraining", pretrain, pillow_pretrain, True)]
            pipelines += [(f"{width}x{height} whole", pretrain, pillow_pretrain, False)]
        for name, ours, theirs, reduced in pipelines:
            kind = name.split()[0]
            dataset = build_dataset(data_args(Path(folder) / kind), "train", ours)
            # As many crops of each size, though of fewer files.
            keys = [(epoch, i) for epoch in range(args.batch_size // kinds[kind] or 1) for i in range(len(dataset))]

            def our_batch(dataset=dataset, keys=keys, reduced=reduced) -> Tensor:
                jpeg.REDUCTIONS = reductions if reduced else {}
                return normalize(collate([dataset[key] for key in keys])[0])

            def their_batch(dataset=dataset, keys=keys, transform=theirs) -> Tensor:
                images = []
                for epoch, i in keys:
                    seed_all(0, epoch, i)
                    with Image.open(dataset.path_of(i)) as image:
                        images.append(transform(image.convert("RGB")))
                return torch.stack(images)

            pairs[name] = our_batch, their_batch, len(keys)
        for memory in ("returned", "kept"):
            if memory == "kept" and not keep_freed_memory():
                break
            for name, (*pair, count) in pairs.items():
                mine, other = alternate(pair, args.repeats, time.process_time)
                medians[memory, name] = [count / statistics.median(times) for times in (mine, other)]
                speeds = [f"{speed:.0f} images/s" for speed in medians[memory, name]]
                rows.append([memory, name, *speeds, ratio_of(other, mine)])
    print_table(rows)
    for name in pairs:
        if ("kept", name) in medians:
            speed_up = medians["kept", name][0] / medians["returned", name][1]
            print(f"{name}: ours with freed memory kept / Pillow without: {speed_up:.2f}")
            if (whole := name.replace("pretraining", "whole")) != name and ("returned", whole) in medians:
                for memory in ("returned", "kept"):
                    speed_up = medians[memory, name][0] / medians[memory, whole][0]
                    print(f"{name}: ours / decoded as a whole, freed memory {memory}: {speed_up:.2f}")


# ---------------------------------------------------------------------------------------------------------------
# Index


def write_tree(root: Path, files: int, classes: int = 1000) -> None:
    """`files` empty files named as ImageNet's in `classes` folders, last changed long enough ago to be cached."""
    for c in range(classes):
        folder = root / f"n{c:08d}"
        folder.mkdir()
        for i in range(files // classes):
            os.close(os.open(folder / f"n{c:08d}_{i}.JPEG", os.O_CREAT | os.O_WRONLY))
    for folder in (*root.iterdir(), root):
        os.utime(folder, ns=(0, 0))


def benchmark_index(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "images"
        root.mkdir()
        os.environ["MIXMAE_CACHE"] = str(Path(folder) / "cache")
        write_tree(root, args.files)
        time.sleep(3)  # a folder that has only just changed is not cached
        seconds = []
        for find in (lambda: load_index(root), lambda: load_index(root), lambda: ImageFolder(root)):
            start = time.perf_counter()
            find()
            seconds.append(time.perf_counter() - start)
    print_table(
        [
            [f"finding {args.files} files", "seconds", "first start / this"],
            ["first start: scan", f"{seconds[0]:.3f}", "1.0"],
            ["second start: cache", f"{seconds[1]:.3f}", f"{seconds[0] / seconds[1]:.1f}"],
            ["torchvision's ImageFolder", f"{seconds[2]:.3f}", f"{seconds[0] / seconds[2]:.1f}"],
        ]
    )
    names = StringTable.of([b"n%08d/n%08d_%d.JPEG" % (i // 1281, i // 1281, i % 1281) for i in range(1_281_000)])
    index = ImageIndex("/images", names, np.arange(len(names), dtype=np.int32) // 1281, None)
    nbytes = names.blob.nbytes + names.ends.nbytes + index.targets.nbytes
    tuples = [(index.path(i), int(index.targets[i])) for i in range(len(index))]
    rows = [["1,281,000 images, 8 workers", "size", "added by each worker", "share"]]
    for name, size, read in (
        ("ours", nbytes, lambda i: (index.path(i), int(index.targets[i]))),
        ("a list of tuples", sum(sys.getsizeof(pair) + sys.getsizeof(pair[0]) for pair in tuples), tuples.__getitem__),
    ):
        added = statistics.mean(results_of("fork", added_memory, *[(read, len(index))] * 8))
        rows.append([name, f"{size / 2**20:.1f} MiB", f"{added / 2**20:.1f} MiB", f"{added / size:.1%}"])
    print_table(rows)


def added_memory(sender, read: Callable[[int], tuple[str, int]], length: int) -> None:
    """In a forked worker: sends the bytes by which its private memory grows while it reads every entry."""
    gc.freeze()
    before = private_bytes()
    for i in range(length):
        read(i)
    sender.send(private_bytes() - before)


def private_bytes() -> int:
    """Memory that this process shares with no other."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) * 1024


# ---------------------------------------------------------------------------------------------------------------
# Scaling


def scaling_worker(sender, rank: int, world_size: int, store: str, args: argparse.Namespace) -> None:
    """One of `world_size` processes with one thread each; sends the seconds of its steps."""
    torch.set_num_threads(1)
    keep_freed_memory()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    torch.manual_seed(0)
    model = timm.create_model(args.model, norm_pix_loss=True)
    imgs = torch.randn(args.batch_size, model.in_chans, *model.img_size)
    mask = model.random_masking(MASK_RATIO)
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
    step = make_step(model, lambda: parallel(imgs, mask=mask)[0], fused=True)
    [seconds] = alternate((step,), args.repeats, time.perf_counter)
    sender.send(seconds)
    dist.destroy_process_group()


def benchmark_scaling(args: argparse.Namespace) -> None:
    medians, rows = [], [["processes", "step", "images/s"]]
    for world_size in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            ranks = [(rank, world_size, os.path.join(folder, "store"), args) for rank in range(world_size)]
            seconds = results_of("spawn", scaling_worker, *ranks)[0]
        medians.append(statistics.median(seconds))
        rows.append([str(world_size), seconds_of(seconds), f"{world_size * args.batch_size / medians[-1]:.2f}"])
    print_table(rows)
    print(f"two processes / twice one: {medians[0] / medians[1]:.3f}")


# ---------------------------------------------------------------------------------------------------------------

COMMANDS = {
    "step": benchmark_step,
    "finetune": partial(benchmark_step, finetune=True),
    "gpu": benchmark_gpu,
    "memory": benchmark_memory,
    "data": benchmark_data,
    "index": benchmark_index,
    "scaling": benchmark_scaling,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python tests/benchmark.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--model", help="default: swin_base_w14 for finetune, else mixmae_base")
    parser.add_argument("--batch_size", type=int, default=8, help="images per step; of data: photographs (default 8)")
    parser.add_argument("--repeats", type=int, default=10, help="measured turns (default 10)")
    parser.add_argument("--steps", type=int, default=10, help="of gpu: steps of a turn (default 10)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of PyTorch (default: all cores)")
    parser.add_argument("--cpu_time", action="store_true", help="count processor time instead of wall time")
    parser.add_argument("--files", type=int, default=300_000, help="files that index finds (default 300000)")
    args = parser.parse_args()
    if args.cpu_time and args.threads != 1:
        parser.error(f"--cpu_time adds up the time of all threads: use --threads 1 with it, not {args.threads}")
    args.model = args.model or ("swin_base_w14" if args.command == "finetune" else "mixmae_base")
    torch.set_num_threads(args.threads)
    COMMANDS[args.command](args)


if __name__ == "__main__":
    main()
