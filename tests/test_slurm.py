"""The experiments' scripts, preemption, failing ranks and submitit, on a real two-node Slurm."""

import json
import os
import random
import re
import signal
import sys
import time

import numpy as np
import pytest
from coco_folder import make_coco
from PIL import Image
from slurm_cluster import cluster, lines_of, wait_until

__all__ = ["cluster"]  # the fixture

PRETRAIN = "exp/base_600ep/pretrain.sh"
SHAPE = "--input_size 32 --accum_iter 1 --num_workers 0 --device cpu".split()
SMALL = ["--model", "mixmae_quickstart", "--vis_every", "0", *SHAPE]
SMALL_CLASSIFIER = ["--model", "swin_quickstart", "--nb_classes", "2", *SHAPE]
SCHEDULE = "--print_freq 1 --warmup_epochs 1".split()


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """96 images for training and 23 for validation, two classes, 40 x 40 pixels of noise."""
    folder = tmp_path_factory.mktemp("images")
    random_pixels = np.random.default_rng(0)
    for split, counts in (("train", (48, 48)), ("val", (11, 12))):
        for label, count in enumerate(counts):
            (folder / split / f"class{label}").mkdir(parents=True)
            for index in range(count):
                pixels = random_pixels.integers(0, 255, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / f"class{label}" / f"{index:02d}.png")
    return str(folder)


def into(folder):
    return ["--output_dir", str(folder), "--log_dir", str(folder)]


def losses(folder):
    """Step -> loss; every step must be there once."""
    records = [json.loads(line) for line in lines_of(folder / "steps.jsonl")]
    by_step = {record["step"]: record["loss"] for record in records}
    assert len(by_step) == len(records)
    assert sorted(by_step) == list(range(1, len(records) + 1))
    return by_step


def epochs(folder):
    return [json.loads(line)["epoch"] for line in lines_of(folder / "log.txt")]


@pytest.mark.slow
def test_four_tasks_on_two_nodes_train_as_torchrun_does(cluster, images, tmp_path):
    flags = [*SMALL, *SCHEDULE, "--batch_size", "4", "--epochs", "2"]
    by_torchrun = cluster.start(
        "sh", PRETRAIN, "local", "4", images, *flags, *into(tmp_path / "torchrun"), output=tmp_path / "torchrun.txt"
    )
    result = cluster.run("sh", PRETRAIN, "partition", "4", images, *flags, *into(tmp_path / "srun"), GPUS_PER_NODE="2")
    assert result.returncode == 0, result.stdout
    assert "started by srun: 4 processes (2 on node1, 2 on node2), meeting at tcp://node1:" in result.stdout
    assert by_torchrun.wait(120) == 0, (tmp_path / "torchrun.txt").read_text()
    assert len(losses(tmp_path / "srun")) == 12
    assert losses(tmp_path / "srun") == losses(tmp_path / "torchrun")
    assert epochs(tmp_path / "srun") == [0, 1]
    assert (tmp_path / "srun/checkpoint.pth").exists()


@pytest.mark.slow
def test_sixteen_tasks_take_a_step(cluster, images, tmp_path):
    flags = [*SMALL, *SCHEDULE, "--batch_size", "6", "--epochs", "1"]  # 96 images, one step
    result = cluster.run("sh", PRETRAIN, "partition", "16", images, *flags, *into(tmp_path), timeout=300)
    assert result.returncode == 0, result.stdout
    assert "16 processes (8 on node1, 8 on node2)" in result.stdout
    assert len(losses(tmp_path)) == 1


@pytest.mark.slow
def test_fine_tuning_inside_an_allocation_then_evaluation(cluster, images, tmp_path):
    result = cluster.run(
        "salloc", "--ntasks=2", "--nodes=2", "--gres=gpu:1",
        "sh", "exp/base_600ep/finetune.sh", "partition", "2", images, *SMALL_CLASSIFIER, *SCHEDULE,
        "--batch_size", "8", "--epochs", "2", "--finetune", "", *into(tmp_path), GPUS_PER_NODE="1",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    assert "started by srun: 2 processes (1 on node1, 1 on node2)" in result.stdout
    assert len(losses(tmp_path)) == 12 and epochs(tmp_path) == [0, 1]
    trained = re.search(r"result: top-1 (\S+)%, top-5 (\S+)%, loss (\S+) of", result.stdout)
    result = cluster.run(
        "sh", "exp/base_600ep/eval.sh", "partition", "2", images, *SMALL_CLASSIFIER, "--batch_size", "5",
        "--finetune", str(tmp_path / "checkpoint.pth"),
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    assert "on 23 images of" in result.stdout
    evaluated = re.search(r"result: top-1 (\S+)%, top-5 (\S+)%, loss (\S+) of", result.stdout)
    assert evaluated.groups() == trained.groups()


def redone_steps(output):
    """How many lines of the log name a step that an earlier line has named."""
    steps = re.findall(r"epoch (\d+)  step (\d+)/", output)
    return len(steps) - len(set(steps))


@pytest.mark.slow
def test_ten_preemptions_cost_nothing(cluster, images, tmp_path):
    flags = [
        *SMALL,
        *SCHEDULE,
        "--batch_size",
        "4",
        "--num_workers",
        "1",
        "--epochs",
        "25",
    ]  # 300 steps: enough left for the tenth, on a busy machine too
    whole = cluster.start(
        "sh", PRETRAIN, "local", "2", images, *flags, *into(tmp_path / "whole"), output=tmp_path / "whole.txt"
    )
    log = tmp_path / "job.txt"
    job = cluster.submit(
        "--partition=partition", "--ntasks=2", "--nodes=2", "--gres=gpu:1", "--requeue", "--open-mode=append",
        "--signal=USR2@120", f"--output={log}", "--export=ALL,GPUS_PER_NODE=1",
        PRETRAIN, "partition", "2", images, *flags, *into(tmp_path / "job"),
    )  # fmt: skip
    steps_file = tmp_path / "job/steps.jsonl"
    moments = random.Random(0)
    for restart in range(1, 11):
        wait_until(lambda: cluster.job(job)["JobState"] == "RUNNING")
        by_signal = restart % 2 == 1
        if restart % 5:
            wanted = len(lines_of(steps_file)) + moments.randint(1, 15)
            wait_until(lambda wanted=wanted: len(lines_of(steps_file)) >= wanted)
        elif by_signal:  # while starting, as early as there is somebody to signal
            wait_until(lambda: len(cluster.tasks(job)) == 2)
        time.sleep(moments.uniform(0, 0.1))
        if by_signal:
            cluster.run("scancel", f"--signal={moments.choice(['USR1', 'USR2'])}", job)
        else:
            cluster.run("scontrol", "requeue", job)
        cluster.wait_for_requeue(job, restart)
    wait_until(lambda: cluster.job(job)["JobState"] not in ("RUNNING", "PENDING", "COMPLETING"))
    output = log.read_text()
    assert cluster.job(job)["JobState"] == "COMPLETED", output
    assert cluster.job(job)["Restarts"] == "10"
    assert whole.wait(120) == 0, (tmp_path / "whole.txt").read_text()
    assert len(losses(tmp_path / "job")) == 300
    assert losses(tmp_path / "job") == losses(tmp_path / "whole")
    assert epochs(tmp_path / "job") == list(range(25))
    assert redone_steps(output) <= 10


@pytest.mark.slow
def test_a_dead_or_hung_rank_ends_its_job(cluster, images, tmp_path):
    """Three jobs at once, on the same nodes: they must not meet on each other's ports either."""
    flags = [*SMALL, *SCHEDULE, "--batch_size", "4", "--epochs", "1000", "--dist_timeout", "10"]
    cases = {"killed1": (signal.SIGKILL, 1), "stopped1": (signal.SIGSTOP, 1), "stopped0": (signal.SIGSTOP, 0)}
    steps = {
        name: cluster.start(
            "sh", PRETRAIN, "partition", "2", images, *flags, *into(tmp_path / name),
            output=tmp_path / f"{name}.txt", GPUS_PER_NODE="1", SRUN_ARGS=f"--job-name={name}",
        )
        for name in cases
    }  # fmt: skip
    jobs, hit = {}, {}
    for name, (signum, rank) in cases.items():
        wait_until(lambda name=name: len(lines_of(tmp_path / name / "steps.jsonl")) > 3)
        jobs[name] = cluster.run("squeue", "--noheader", f"--name={name}", "--format=%i").stdout.strip()
        tasks = cluster.tasks(jobs[name])
        assert sorted(tasks) == [0, 1]
        os.kill(tasks[rank], signum)
        hit[name] = time.monotonic()
    for name, (signum, rank) in cases.items():
        assert steps[name].wait(60) != 0
        wait_until(lambda name=name: cluster.job(jobs[name])["JobState"] == "FAILED")
        assert not cluster.tasks(jobs[name])
        assert time.monotonic() - hit[name] < 60
        output = (tmp_path / f"{name}.txt").read_text()
        if signum == signal.SIGKILL:
            assert f"task {rank}: Killed" in output
        else:
            assert re.search(rf"rank {1 - rank} of 2 could not complete a collective: rank(\(s\))? {rank} ", output)
            assert "frame #" not in output
            assert "--dist_timeout 10 s" in output


@pytest.mark.slow
def test_submitit_job_survives_a_preemption(cluster, images, tmp_path):
    flags = [*SMALL, *SCHEDULE, "--batch_size", "4", "--epochs", "10", *into(tmp_path / "out")]
    result = cluster.run(
        sys.executable, "-m", "util.submit", "pretrain", "--exp", "base_600ep", "--partition", "partition",
        "--nodes", "2", "--ngpus", "1", "--cpus_per_task", "1", "--timeout", "60", "--data_path", images,
        "--job_dir", str(tmp_path / "%j"), "--", *flags,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    job = re.search(r"submitted job (\d+); its log is", result.stdout)[1]
    wait_until(lambda: len(lines_of(tmp_path / "out/steps.jsonl")) > 5)
    cluster.run("scancel", "--signal=USR2", job)  # what Slurm sends ahead of a preemption or the time limit
    cluster.wait_for_requeue(job, 1)
    wait_until(lambda: cluster.job(job)["JobState"] == "COMPLETED", timeout=120)
    log = (tmp_path / job / f"{job}_0_log.out").read_text()
    assert "resumed at epoch 0 step" in log
    assert redone_steps(log) == 0
    assert len(losses(tmp_path / "out")) == 120
    assert epochs(tmp_path / "out") == list(range(10))


@pytest.mark.slow
def test_a_detector_is_preempted_and_goes_on(cluster, tmp_path):
    pytest.importorskip("pycocotools")
    coco = make_coco(tmp_path / "coco")
    model = "--model swin_quickstart --input_size 64 --patch_size 4 --head_channels 8 --sampled_boxes 16".split()
    flags = [*model, *SCHEDULE, *"--min_size 64 --device cpu --num_workers 0 --accum_iter 1 --batch_size 1".split()]
    flags += ["--finetune", "", *"--epochs 10 --lr_steps 5 8 --eval_every 10".split(), *into(tmp_path / "out")]
    log = tmp_path / "job.txt"
    job = cluster.submit(
        "--partition=partition", "--ntasks=2", "--nodes=2", "--gres=gpu:1", "--requeue", "--open-mode=append",
        "--signal=USR2@120", f"--output={log}", "--export=ALL,GPUS_PER_NODE=1",
        "exp/coco/finetune.sh", "partition", "2", str(coco), *flags,
    )  # fmt: skip
    wait_until(lambda: len(lines_of(tmp_path / "out/steps.jsonl")) > 5)
    cluster.run("scancel", "--signal=USR2", job)
    cluster.wait_for_requeue(job, 1)
    wait_until(lambda: cluster.job(job)["JobState"] not in ("RUNNING", "PENDING", "COMPLETING"))
    output = log.read_text()
    assert cluster.job(job)["JobState"] == "COMPLETED", output
    assert "resumed at epoch" in output and redone_steps(output) == 0
    assert len(losses(tmp_path / "out")) == 40 and epochs(tmp_path / "out") == list(range(10))
    assert re.search(r"result: box AP \S+, box AP50 \S+, .* on 5 images of", output)
