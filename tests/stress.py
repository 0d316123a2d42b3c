"""Prove the promises of reliability at scale: see tests/stress.sh.

Every trial is a real run of main_pretrain.py on a tiny model, in a process of its own that is forked from this one so
that nothing has to be imported again. "Identical" means: weights, optimizer and position to the bit, and every line of
steps.jsonl, log.txt and TensorBoard (but for the clock), as the run that nobody disturbed has them.
"""

import argparse
import logging
import math
import os
import random
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from running import make_images
from trials import (
    TINY,
    Trial,
    differences,
    flip_byte,
    full_disk,
    mounted,
    nan_gradient,
    nan_loss,
    same,
    state_of,
    steps_of,
    stop_signal,
    unfinished_files,
    waiting_for,
)

import main_finetune
from util.data.datasets import SAMPLE
from util.run.checkpoint_folder import CheckpointFolder
from util.weights.file import CheckpointError, read_checkpoint

EPOCHS, STEPS_PER_EPOCH, MICRO_BATCHES = 3, 8, 2
STEPS = EPOCHS * STEPS_PER_EPOCH
RECIPE = (*TINY, "--epochs", EPOCHS, "--batch_size", 2, "--accum_iter", MICRO_BATCHES)
RECIPE = (*RECIPE, "--drop_path", 0.3, "--range_mask_ratio", 0.2, "--clip_grad", 1)
CLASSIFIER = ("--device", "cpu", "--num_workers", 0, "--model", "swin_quickstart", "--in_chans", 1, "--batch_size", 8)
CLASSIFIER = (*CLASSIFIER, "--epochs", 2, "--warmup_epochs", 0)
MOST_SECONDS = 10  # from a value that is not finite until all ranks have left


class Skipped(Exception):
    """A promise that cannot be tried on this machine."""


@dataclass
class Bench:
    """Where trials happen: `images` to train on, and `reference`, the output of the run that nobody disturbs."""

    place: Path
    args: argparse.Namespace
    rng: random.Random

    def __post_init__(self) -> None:
        make_images(self.place / "images", STEPS_PER_EPOCH * MICRO_BATCHES * 2 + 1)
        self.reference = self.place / "reference"
        self.seconds = time.monotonic()
        self.start(self.reference, "--save_steps", 2).finish()
        self.seconds = time.monotonic() - self.seconds

    def start(self, out: Path, *flags: object, **options) -> Trial:
        flags = (*RECIPE, "--data_path", self.place / "images", "--output_dir", out, *flags)
        return Trial(self.place / "logs", *flags, **options)

    def fresh(self, name: str = "out") -> Path:
        """An output folder that is not there yet."""
        shutil.rmtree(self.place / name, ignore_errors=True)
        return self.place / name

    def finish_and_compare(self, out: Path, *flags: object) -> str:
        """Resume the run in `out` to its end, where it must be identical; returns what it said."""
        said = self.start(out, "--resume", "auto", *flags).finish()
        found = differences(out, self.reference)
        assert not found, f"not identical: {', '.join(found)}\n{said}"
        return said

    def report(self, done: int, of: int, what: str) -> None:
        if done % max(1, of // 5) == 0 or done == of:
            print(f"  {done} of {of} {what}", file=sys.stderr)


def kills(bench: Bench) -> tuple[str, str]:
    """kill -9 at random moments, a part of them while a checkpoint is being written."""
    total, wanted = bench.args.kills, bench.args.kills_while_saving
    killed = while_saving = before_any = 0
    while killed < total or while_saving < wanted:
        assert killed < 3 * total, f"only {while_saving} of {killed} kills hit a checkpoint being written"
        out = bench.fresh()
        trial = bench.start(out, "--save_steps", 2, "--resume", "auto")
        if while_saving < wanted:
            wait_for_a_write(trial, out, bench.rng.randrange(1, STEPS // 2))
        else:
            time.sleep(bench.rng.uniform(0, bench.seconds))
        trial.kill()
        if trial.wait() == [0]:  # finished before
            continue
        killed += 1
        unfinished = [name for name in unfinished_files(out) if name.startswith(".checkpoint-")]
        while_saving += bool(unfinished)
        said = bench.finish_and_compare(out, "--save_steps", 2)
        before_any += "starting from scratch" in said
        assert not unfinished_files(out)
        bench.report(killed, total, "killed and resumed")
    trials = f"{killed} `kill -9`, {while_saving} of them while a checkpoint was being written"
    return trials, f"{killed} resumed, {killed} identical ({before_any} began anew: nothing was saved yet)"


def wait_for_a_write(trial: Trial, out: Path, number: int) -> None:
    """Until the run writes its checkpoint number `number`, or has ended."""
    seen: set[str] = set()
    while len(seen) < number and not trial.poll():
        seen.update(name for name in unfinished_files(out) if name.startswith(".checkpoint-"))


def damage(bench: Bench) -> tuple[str, str]:
    """One flipped byte, or the end cut off, of the newest checkpoint."""
    out = bench.fresh()
    shutil.copytree(bench.reference, out)
    os.remove(out / "checkpoint.pth")
    newest, previous = sorted(out.glob("checkpoint-*.pth"))[:-3:-1]
    os.link(newest, out / "checkpoint.pth")  # as the run had it
    whole, expected = newest.read_bytes(), read_checkpoint(previous)
    flips, cuts = bench.args.flips, bench.args.truncations
    for trial in range(flips + cuts):
        if trial < flips:
            flip_byte(newest, bench.rng.randrange(len(whole)), bench.rng.randrange(1, 256))
        else:
            os.truncate(newest, bench.rng.randrange(len(whole)))
        try:
            read_checkpoint(newest)
        except CheckpointError:
            pass
        else:
            raise AssertionError("damage was not detected")
        found = CheckpointFolder(out).newest_valid()
        assert found is not None
        path, checkpoint = found
        assert path == previous and same(checkpoint, expected)
        if trial in (0, flips):  # one of each kind, to the end of the run
            copy = bench.fresh("copy")
            shutil.copytree(out, copy)
            assert "not resuming from checkpoint" in bench.finish_and_compare(copy)
        with open(newest, "r+b") as file:
            file.write(whole)
        bench.report(trial + 1, flips + cuts, "damaged")
    total = flips + cuts
    return f"{flips} flipped bytes, {cuts} truncations", f"{total} detected, {total} recovered from the previous one"


def stops(bench: Bench) -> tuple[str, str]:
    """SIGTERM within a step, and going on with other numbers of data-loading processes."""
    points = sorted(bench.rng.sample(range(1, STEPS), bench.args.stops))
    workers, compared = bench.args.workers, 0
    for number, point in enumerate(points):
        out = bench.fresh()
        flags = ("--num_workers", workers[number % len(workers)])
        bench.start(out, *flags, sabotage=stop_signal(MICRO_BATCHES * point)).finish(75)
        assert state_of(out)["step"] == point
        for count in workers:
            copy = bench.fresh("copy")
            shutil.copytree(out, copy)
            bench.finish_and_compare(copy, "--num_workers", count)
            compared += STEPS - point
        bench.report(number + 1, len(points), "stopped and resumed")
    trials = f"{len(points)} stop points x workers {{{', '.join(map(str, workers))}}}, saved on SIGTERM, exit code 75"
    return trials, f"{len(points) * len(workers)} identical; all {compared} later losses equal"


def pairs(bench: Bench) -> tuple[str, str]:
    """Two starts at once in one folder, every second pair in the folder of a run that was killed."""
    restarted = 0
    for number in range(bench.args.pairs):
        out, go = bench.fresh() if number % 2 == 0 else bench.place / "out", bench.place / "go"
        go.unlink(missing_ok=True)
        pair = [bench.start(out, "--resume", "auto", sabotage=waiting_for(go)) for _ in range(2)]
        while not any([trial.poll() for trial in pair]):
            time.sleep(0.005)
        refused, running = sorted(pair, key=Trial.poll, reverse=True)
        said = refused.finish(2)
        assert f"in use by another run: process {running.processes[0]} on " in said and "Traceback" not in said
        assert not running.poll()
        if number % 2 == 0:
            running.kill()
            running.wait()
        else:
            go.touch()
            assert "waiting" not in running.finish()
            assert not differences(out, bench.reference)
            restarted += 1
        bench.report(number + 1, bench.args.pairs, "pairs started")
    result = f"exactly one ran in each; {restarted} began at once in the folder of a killed one, {restarted} identical"
    return f"{bench.args.pairs} pairs of starts, half of them after a `kill -9`", result


def renamings(bench: Bench) -> tuple[str, str]:
    """Some class folders get other names: for an evaluation, where val/ is alone, and for a run that is resumed."""
    data, renamed, out = bench.place / "classes", bench.place / "renamed", bench.fresh("classifier")
    folders = [Path(split) / f"class{i}" for split in ("train", "val") for i in range(6)]
    for number, folder in enumerate(folders):
        make_images(data / folder, 4, seed=number)
    resume = (*CLASSIFIER, "--output_dir", out, "--resume", "auto", "--data_path")
    evaluate = ("--eval", "--finetune", out / "checkpoint.pth", *CLASSIFIER[:4], "--data_path")
    Trial(bench.place / "logs", *resume, data, main=main_finetune).finish()
    Trial(bench.place / "logs", *evaluate, data, main=main_finetune).finish()
    saved = state_of(out)
    for number in range(bench.args.renamings):
        chosen = {f"class{i}" for i in bench.rng.sample(range(6), bench.rng.randrange(1, 7))}
        prefix = bench.rng.choice(["a", "z", "class0 ", "Class", "\u00e9"])
        for splits, flags in ((["val"], evaluate), (["train", "val"], (*resume[:-1], "--epochs", 3, "--data_path"))):
            shutil.rmtree(renamed, ignore_errors=True)
            for folder in folders:
                if folder.parts[0] in splits:
                    new = prefix + folder.name if folder.name in chosen else folder.name
                    shutil.copytree(data / folder, renamed / folder.parent / new)
            said = Trial(bench.place / "logs", *flags, renamed, main=main_finetune).finish(2)
            assert "only in the data: " in said and "result:" not in said and "Traceback" not in said, said
            assert sum(name in said for name in chosen) >= min(5, len(chosen)), said  # as many as a message names
        assert same(state_of(out), saved)
        bench.report(number + 1, bench.args.renamings, "renamed")
    total = bench.args.renamings
    return f"{total} renamings of 1 to 6 of 6 classes", f"{total} evaluations and {total} resumed runs stopped"


def units(bench: Bench) -> tuple[str, str]:
    """Arrays in random units that --mean and --std do not fit, then with the flags that the message gives; at last with
    a few images in units of their own, which are not among those that are looked at before training.
    """
    folder, total = bench.place / "arrays", bench.args.units
    for number in range(total):
        shutil.rmtree(folder, ignore_errors=True)
        make_images(folder, 2 * SAMPLE, channels=2, seed=number)
        dtype = bench.rng.choice(["uint16", "int16", "float32", "float64"])
        scale = 10 ** bench.rng.uniform(0, math.log10(127)) if "int" in dtype else 10 ** bench.rng.uniform(0, 6)
        for path in folder.iterdir():
            np.save(path, (np.load(path) * scale + 30).astype(dtype))
        flags = ("--data_path", folder, "--in_chans", 2, "--epochs", 1)
        said = bench.start(bench.fresh(), *flags).finish(2)
        assert "epoch 0" not in said and "Traceback" not in said, said
        pasted = re.search(r"Measured on .*?(--mean [-\d.e+ ]+ --std [-\d.e+ ]+\d)", said)[1].split()
        bench.start(bench.fresh(), *flags, *pasted).finish()
        assert all(line["loss"] < 10 for line in steps_of(bench.place / "out"))
        unseen, factor = sorted(folder.iterdir())[1::2], 10 ** bench.rng.uniform(2, 5)
        for path in bench.rng.sample(unseen, bench.rng.randrange(2, 7)):
            np.save(path, np.load(path).astype("float32") * factor)
        said = bench.start(bench.fresh(), *flags, *pasted).finish(1)
        stopped = re.search(r"[2-6] of \d+ images read so far are far from --mean and --std", said)
        assert stopped and "Traceback" not in said, said
        bench.report(number + 1, total, "units")
    return (
        f"{total} sets of arrays in random units; as many with 2 to 6 of {2 * SAMPLE} in units of their own",
        f"{total} stopped before training, {total} ran with the flags printed; {total} stopped in the first epoch",
    )


def changed_data(bench: Bench) -> tuple[str, str]:
    """Images are added, removed or renamed while a run stands still."""
    total, out, copy = bench.args.changes, bench.fresh(), bench.place / "changed"
    bench.start(out, sabotage=stop_signal(MICRO_BATCHES * STEPS_PER_EPOCH // 2)).finish(75)
    for number in range(total):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(bench.place / "images", copy)
        names, count = sorted(path.name for path in copy.iterdir()), bench.rng.randrange(1, 9)
        for name in bench.rng.sample(names, count):
            if number % 3 == 0:
                shutil.copy(copy / name, copy / f"more-{name}")
            elif number % 3 == 1:
                (copy / name).unlink()
            else:
                (copy / name).rename(copy / f"new-{name}")
        now = len(names) + (count, -count, 0)[number % 3]
        shutil.copytree(out, bench.fresh("copy"))
        flags = ("--resume", "auto", "--data_path", copy)
        said = bench.start(bench.place / "copy", *flags).finish()
        change = f"{len(names)} -> {now} images" if now != len(names) else "under other names"
        assert f"the train images are not those of the checkpoint: {len(names)}" in said and change in said, said
        bench.report(number + 1, total, "changed")
    result = f"{total} resumed with a warning that names the change"
    return f"{total} times 1 to 8 images added, removed or renamed", result


def disk(bench: Bench) -> tuple[str, str]:
    """A tmpfs that becomes full; one that has room again later, one that stays full."""
    (bench.place / "disk").mkdir(exist_ok=True)
    with mounted(bench.place / "disk", "-t", "tmpfs", "-o", "size=40m", "tmpfs") as allowed:
        if not allowed:
            raise Skipped("mounting needs root")
        folder, out = bench.place / "disk", bench.place / "disk" / "out"
        every = ("--save_steps", 1)
        for_a_while = range(5 * MICRO_BATCHES, 7 * MICRO_BATCHES)
        said = bench.start(out, *every, sabotage=full_disk(folder, for_a_while)).finish()
        tolerated = said.count("a checkpoint could not be saved")
        assert tolerated and "No space left" in said
        assert same(state_of(out), state_of(bench.reference)) and steps_of(out) == steps_of(bench.reference)
        shutil.rmtree(out)
        for_ever = range(5 * MICRO_BATCHES, 99 * MICRO_BATCHES)
        said = bench.start(out, *every, sabotage=full_disk(folder, for_ever)).finish(1)
        assert "the checkpoint could not be saved" in said and "Traceback" not in said
        (folder / "ballast").unlink()
        saved = state_of(out)["step"]
        bench.start(out, *every, "--resume", "auto").finish()
        assert same(state_of(out), state_of(bench.reference)) and steps_of(out) == steps_of(bench.reference)
    result = f"{tolerated} failed saves reported, the run went on, identical; resumed from step {saved}, identical"
    return "tmpfs full for 2 steps; full for good", result


def read_only(bench: Bench) -> tuple[str, str]:
    """An output folder on a read-only file system."""
    out = bench.fresh()
    out.mkdir()
    with mounted(out, "--bind", str(out)) as allowed:
        if not allowed or os.system(f"mount -o remount,ro,bind {out}"):
            raise Skipped("mounting needs root")
        trial = bench.start(out)
        said = trial.finish(2)
        seconds = trial.exits[0][1] - trial.started
    assert "cannot be written to: Read-only file system" in said and "--output_dir" in said
    assert "Traceback" not in said and "epoch 0" not in said
    return "1 read-only mount", f"one line of error after {seconds:.1f} s, before training, exit code 2"


def nan(bench: Bench) -> tuple[str, str]:
    """A loss, and a gradient, that is not finite on one rank of four."""
    slowest, number = 0.0, 0
    reference = bench.fresh("four")
    flags = ("--batch_size", 2, "--accum_iter", 1, "--save_steps", 1, "--epochs", 4, "--nan_dump")
    make_images(bench.place / "more", 25)
    flags = (*flags, "--data_path", bench.place / "more")
    bench.start(reference, *flags, "--keep_checkpoints", 99, ranks=4).finish()
    for spoil, what in ((nan_loss, "the loss of rank 1"), (nan_gradient, "the gradient")):
        for step in bench.rng.sample(range(2, 12), bench.args.nans):
            out = bench.fresh()
            trial = bench.start(out, *flags, ranks=4, sabotage=spoil(step, rank=1))
            said = trial.finish(1, 1, 1, 1)
            epoch, step_in_epoch = divmod(step - 1, 3)
            assert f"{what} is not finite at epoch {epoch} step {step_in_epoch + 1} (optimizer step {step})" in said
            assert same(state_of(out), state_of(reference, f"checkpoint-{step - 1:08d}.pth"))
            assert (out / "nan_dump_rank1.pth").exists()
            slowest, number = max(slowest, trial.seconds_after_sabotage()), number + 1
            assert slowest < MOST_SECONDS, f"the last rank left after {slowest:.1f} s"
            bench.start(out, *flags, "--resume", "auto", ranks=4).finish()
            assert not differences(out, reference)
        bench.report(number, 2 * bench.args.nans, "spoiled")
    trials = f"{number} trials: loss or gradient not finite on rank 1 of 4"
    return trials, f"4 of 4 ranks left with an error within {slowest:.1f} s; checkpoint intact, batch dumped, identical"


def bad_images(bench: Bench) -> tuple[str, str]:
    """Images of which 1 % cannot be read, and a share above what is allowed."""
    total = bench.args.images
    for count, bad, code in ((total, total // 100, 0), (500, 6, 1)):
        folder = bench.place / f"{count} images"
        names = make_many(folder, count, bench.rng.sample(range(count), bad))
        out, start = bench.fresh(), time.monotonic()
        flags = ("--data_path", folder, "--epochs", 1, "--batch_size", 100, "--accum_iter", 1, "--print_freq", 10)
        trial = bench.start(out, *flags, "--bad_images", "skip", "--num_workers", 2)
        said = trial.finish(code, seconds=1800)
        seconds = time.monotonic() - start
        named = re.findall(r"skipping a bad image \((\d+) so far\): cannot use image '([^']+)'", said)
        if code == 0:
            assert sorted(int(number) for number, _ in named) == list(range(1, bad + 1))
            assert {Path(name).name for _, name in named} == names
            assert len(steps_of(out)) == count // 100
            result = f"{len(named)} named once each and counted; one epoch in {seconds:.0f} s"
        else:
            assert f"{bad} of {count} images cannot be used" in said and "--max_bad_images" in said
            assert "Traceback" not in said
            result += f"; {bad} of {count}: an error that says so"
    return f"{total:,} images, {total // 100} bad", result


def make_many(folder: Path, count: int, bad: list[int]) -> set[str]:
    """Small PNGs; those of `bad` are empty, cut off, no image or damaged, and their names are returned."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8), dtype=np.uint8)
    for i in range(count):
        Image.fromarray(pixels[i]).save(folder / f"{i:06d}.png")
    for number, i in enumerate(bad):
        path = folder / f"{i:06d}.png"
        content = path.read_bytes()
        path.write_bytes((b"", content[:60], b"no image\n", content[:45] + bytes(30) + content[75:])[number % 4])
    return {f"{i:06d}.png" for i in bad}


PROMISES: dict[str, tuple[str, Callable[[Bench], tuple[str, str]]]] = {
    "kills": ("Killed at any moment, a run continues as if it had not been", kills),
    "damage": ("A damaged checkpoint is never used; the previous one is", damage),
    "stops": ("Resuming is exact at any step, with any number of workers", stops),
    "pairs": ("Of two runs in one folder the second is an error before it writes", pairs),
    "renamings": ("Renamed classes are never taken for those of the weights", renamings),
    "units": ("Values in other units than --mean and --std are never trained on", units),
    "changed_data": ("A run that goes on with other images says so", changed_data),
    "disk": ("A full disk harms no checkpoint and ends no run at once", disk),
    "read_only": ("A read-only output folder is an error before training", read_only),
    "nan": ("A value that is not finite on one rank stops all within 10 s", nan),
    "bad_images": ("Unreadable images are replaced, named, counted exactly", bad_images),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, metavar="N", help="kill -9")
    parser.add_argument("--kills_while_saving", type=int, default=20, metavar="N", help="at least so many of them")
    parser.add_argument("--flips", type=int, default=200, metavar="N", help="checkpoints with one flipped byte")
    parser.add_argument("--truncations", type=int, default=50, metavar="N", help="checkpoints that are cut off")
    parser.add_argument("--stops", type=int, default=15, metavar="N", help="steps at which runs are stopped")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2, 3], metavar="N", help="to go on with")
    parser.add_argument("--pairs", type=int, default=100, metavar="N", help="pairs of starts in one folder")
    parser.add_argument("--renamings", type=int, default=20, metavar="N", help="times that classes get other names")
    parser.add_argument("--units", type=int, default=20, metavar="N", help="sets of arrays in random units")
    parser.add_argument("--changes", type=int, default=21, metavar="N", help="times that the images of a run change")
    parser.add_argument("--nans", type=int, default=3, metavar="N", help="spoiled losses, and as many gradients")
    parser.add_argument("--images", type=int, default=10_000, metavar="N", help="of which 1 %% are bad")
    parser.add_argument("--only", nargs="+", default=list(PROMISES), choices=PROMISES, metavar="NAME", help="which")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random moments and places")
    args = parser.parse_args()
    logging.getLogger().addHandler(logging.NullHandler())  # of this process; trials set up their own
    failed, rows = 0, []
    with tempfile.TemporaryDirectory(prefix="mixmae-stress-") as place:
        os.environ["MIXMAE_CACHE"] = f"{place}/cache"
        bench = Bench(Path(place), args, random.Random(args.seed))
        for name in args.only:
            promise, prove = PROMISES[name]
            print(f"{name}: {promise}", file=sys.stderr)
            start = time.monotonic()
            try:
                trials, result = prove(bench)
            except Skipped as reason:
                trials, result = "none", f"not tried: {reason}"
            except Exception:
                traceback.print_exc()
                trials, result, failed = "", "**FAILED**", failed + 1
            rows.append((promise, trials, result))
            print(f"  {time.monotonic() - start:.0f} s", file=sys.stderr)
    print("| promise | trials | result |\n|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
