"""Talking across ranks, and ending a run whose ranks fail or are asked to stop."""

import argparse
import contextlib
import copy
import hashlib
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from test_launch import TORCHRUN
from trials import Trial

from models_mixmae import MixMAE
from util.errors import RunError, UserError
from util.run import distributed, failures
from util.run.config import DeviceFlags, ProcessFlags
from util.run.flags import get_parser
from util.run.launch import detect_launch
from util.run.preemption import EXIT_REQUEUE, Preemption

ROOT = Path(__file__).resolve().parent.parent
slow = partial(pytest.param, marks=pytest.mark.slow)


@dataclass(frozen=True)
class Flags(ProcessFlags, DeviceFlags):
    pass


def parse(*flags):
    return get_parser(Flags, "a process").parse_args(flags)


def test_single_process_start_and_its_errors(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "RANK", "WORLD_SIZE"))]:
        monkeypatch.delenv(name)
    args = parse("--device", "cpu")
    given = dict(vars(args))
    launch = distributed.init_distributed(args)
    assert (launch.rank, launch.world_size, launch.device) == (0, 1, torch.device("cpu"))
    assert vars(args) == given
    assert distributed.is_main_process() and distributed.get_world_size() == 1
    assert distributed.all_reduce_mean(torch.tensor(3.5)) == 3.5 and distributed.gather_objects("a") == ["a"]
    value = torch.ones(2)
    total = distributed.all_reduce_sum(value)
    total += 1
    assert value.tolist() == [1, 1]
    distributed.barrier()
    distributed.shutdown()
    for flags, message in (
        (["--dist_timeout", "0"], "--dist_timeout 0 must be a positive number of seconds"),
        (["--dist_timeout", "1e9"], "--dist_timeout 1e\\+09 must be a positive number of seconds"),
        (["--local_rank", "2"], "--local_rank 2 contradicts the launcher's local rank 0"),
        (["--device", "abacus"], "--device abacus is not a device"),
    ):
        with pytest.raises(UserError, match=message):
            distributed.init_distributed(parse(*flags))
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="sees no GPU: use --device cpu"):
            distributed.init_distributed(parse("--device", "cuda"))


# ---------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------


def test_only_errors_for_users_lose_their_traceback(capfd):
    with pytest.raises(SystemExit) as ended, failures.user_errors():
        raise UserError("--batch_size 0")
    assert ended.value.code == 2
    assert capfd.readouterr().err.endswith(": error: --batch_size 0\n")
    for fault in (ValueError("shapes differ"), OSError(5, "unexpected")):
        with pytest.raises(type(fault)) as ended, failures.user_errors():
            raise fault
        assert ended.value is fault
    assert capfd.readouterr().err == ""


def fail_with(rank, world_size, errors, all_started):
    """As rank `rank` under torchrun: fail with one after the other of `errors` (error, its ranks)."""
    all_started.wait()  # torchrun takes milliseconds to start its processes, which take seconds to import torch
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    for error, of_ranks in errors:
        if rank in of_ranks:
            with pytest.raises(SystemExit), failures.user_errors():
                raise error


def test_each_error_is_said_by_rank_0_or_once_by_whichever_rank_of_a_node_has_it(capfd, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    errors = [
        (UserError("every rank's"), range(4)),
        (UserError("local rank 1's"), [1]),
        (UserError("of two"), [2, 3]),
        (RunError("a collective"), [2, 3]),
    ]
    for start in (1, 2):  # the same mistake once more, by the same launcher: said again
        context = multiprocessing.get_context("fork")
        all_started = context.Barrier(4)
        ranks = [context.Process(target=fail_with, args=(rank, 4, errors, all_started)) for rank in range(4)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        time.sleep(0.05)  # the system knows when a process was started to 0.01 s only
        said = capfd.readouterr().err
        assert re.findall(r"(\[rank \d\] )?.*error: every rank's", said) == [""], start  # rank 0's
        assert said.count("error: of two") == 1
        assert re.findall(r"(\[rank \d\]).*error: local rank 1's", said) == ["[rank 1]"]
        assert sorted(re.findall(r"(\[rank \d\]).*error: a collective", said)) == ["[rank 2]", "[rank 3]"]
    assert len(list(tmp_path.iterdir())) == 1  # the next run's ranks use the same file


def test_an_unusable_temporary_folder_silences_nobody(capfd, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit), failures.user_errors():
        raise UserError("the data is missing")
    assert capfd.readouterr().err.count("error: the data is missing") == 1
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / f"mixmae-errors-{os.getuid()}.json").write_text('{"cut off')
    for _ in range(2):  # the first puts the file right
        with pytest.raises(SystemExit), failures.user_errors():
            raise UserError("the data is missing")
    assert 1 <= capfd.readouterr().err.count("error: the data is missing") <= 2


def test_the_normal_end_does_not_fail_when_a_rank_is_gone(monkeypatch):
    def gone():
        raise RuntimeError("Connection closed by peer")

    ended = []
    monkeypatch.setattr(distributed, "world", object())
    monkeypatch.setattr(distributed, "barrier", gone)
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: ended.append(distributed.world))
    distributed.shutdown()
    assert ended == [None]


# ---------------------------------------------------------------------------------------------------
# Several processes
# ---------------------------------------------------------------------------------------------------

PROLOGUE = """
import argparse, logging, os, re, signal, sys, time
import torch
from util.errors import UserError
from util.run import distributed, failures
from util.run.preemption import Preemption
logging.basicConfig(level=logging.INFO)
torch.set_num_threads(1)
from dataclasses import dataclass
from util.run.config import DeviceFlags, ProcessFlags
from util.run.flags import get_parser

@dataclass(frozen=True)
class Flags(ProcessFlags, DeviceFlags):
    pass

args = get_parser(Flags, "a rank").parse_args()
args.device = "cpu"
"""


def start_ranks(tmp_path, body, world_size, *flags, ranks=None, before=None):
    """Start `body` in `world_size` processes (or only its `ranks`) that meet through a file; their output is piped.
    Each calls `before` first of all."""
    program = PROLOGUE + textwrap.dedent(body)
    meeting = ["--dist_url", f"file://{tmp_path}/meeting"]
    processes = []
    for rank in range(world_size) if ranks is None else ranks:
        environ = os.environ | {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
        environ["PYTHONPATH"] = str(ROOT)
        for name in [name for name in environ if name.startswith("SLURM_")]:
            del environ[name]
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", program, *meeting, *flags],
                env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                preexec_fn=before,
            )
        )  # fmt: skip
    return processes


def wait_until_ready(processes):
    for process in processes:
        while "ready" not in process.stdout.readline():
            assert process.poll() is None


def finish(processes, timeout=60):
    """Exit codes and outputs, in the order of ranks."""
    outputs = []
    for process in processes:
        try:
            outputs.append(process.communicate(timeout=timeout)[0])
        except subprocess.TimeoutExpired:
            for other in processes:
                other.kill()
            raise
    return [process.returncode for process in processes], outputs


def test_reductions_and_gathering_across_ranks(tmp_path):
    body = """
    os.environ["SLURMD_NODENAME"] = "b" if os.environ["RANK"] == "2" else "a"
    launch = distributed.init_distributed(args)
    rank = distributed.get_rank()
    assert (launch.rank, launch.world_size, launch.device) == (rank, 3, torch.device("cpu"))
    assert "TORCH_NCCL_ASYNC_ERROR_HANDLING" not in os.environ  # torch's own default
    assert distributed.all_reduce_mean(torch.tensor(float(rank))) == 1.0
    own = torch.full((2,), float(rank))
    assert distributed.all_reduce_sum(own).tolist() == [3.0, 3.0] and own[0] == rank
    assert distributed.gather_objects({"rank": rank}) == [{"rank": i} for i in range(3)]
    assert distributed.on_main_process(lambda: f"of rank {rank}") == "of rank 0"

    def refuse():
        raise UserError(f"refused by rank {rank}")

    try:
        distributed.on_main_process(refuse)
    except UserError as error:
        assert str(error) == "refused by rank 0"
    else:
        raise AssertionError("rank 0 alone has raised")
    distributed.barrier()
    if rank == 0:
        time.sleep(1)  # its last write
        print("entered at", time.time())
    distributed.shutdown()
    assert distributed.get_world_size() == 1
    print("left at", time.time())
    """
    codes, outputs = finish(start_ranks(tmp_path, body, 3))
    assert codes == [0, 0, 0], outputs
    entered = float(re.search(r"entered at (.*)", outputs[0])[1])
    for output in outputs:  # srun may kill those that are left when the first leaves
        assert float(re.search(r"left at (.*)", output)[1]) >= entered
    assert re.search(r"started by torchrun: 3 processes \(2 on a, 1 on b\), meeting at file:", outputs[0])


def test_errors_of_one_rank_are_those_of_all_and_name_the_node_unless_they_are_everywhere(tmp_path):
    body = r"""
    from functools import partial
    from util.weights.file import CheckpointError

    launch = distributed.init_distributed(args)
    rank = distributed.get_rank()

    def outcome(act):
        try:
            return distributed.together(act)
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    def fail(ranks, error):
        if rank in ranks:
            raise error
        return "fine"

    assert outcome(partial(fail, (), None)) == "fine"
    assert outcome(partial(fail, (), None) if rank else None) == ("fine" if rank else None)
    for ranks, acting, where in (
        ((0, 1, 2), (0, 1, 2), ""),
        ((0,), (0,), ""),
        ((1, 2), (1, 2), ""),
        ((0,), (0, 1, 2), r"on \S+ \(rank 0\): "),
        ((1, 2), (0, 1, 2), r"on \S+ \(rank 1\): "),
        ((1,), (1, 2), r"on \S+ \(rank 1\): "),
    ):
        for error, expected in (
            (CheckpointError("a"), f"CheckpointError: {where}a"),
            (failures.RunError("b"), f"RunError: {where}b"),
            (KeyError("c"), f"RuntimeError: {where}KeyError: 'c'"),
        ):
            found = outcome(partial(fail, ranks, error) if rank in acting else None)
            assert re.fullmatch(expected, found), (ranks, acting, expected, found)
    try:
        distributed.once_per_node(lambda verify: fail((1, 2), CheckpointError("of the others")))
    except CheckpointError as error:
        assert str(error) == "of the others"
    else:
        raise AssertionError("all but the first of the node have failed")
    """
    codes, outputs = finish(start_ranks(tmp_path, body, 3))
    assert codes == [0, 0, 0], outputs


def start_as_ranks(args: argparse.Namespace) -> None:
    with failures.user_errors():
        distributed.init_distributed(args)


def compare_gradients(args: argparse.Namespace) -> None:
    """As one of two ranks: both get the gradients that one process gets of all their micro-batches."""
    distributed.init_distributed(args)
    torch.manual_seed(0)
    sizes = dict(img_size=32, patch_size=1, in_chans=1, embed_dim=8, depths=(1,) * 4, num_heads=(1, 1, 2, 2))
    model = MixMAE(**sizes, window_size=(4, 4, 2, 1), decoder_dim=16, decoder_depth=1, decoder_num_heads=2)
    alone = copy.deepcopy(model)
    imgs = torch.randn(3, 2, 2, 4, 1, 32, 32)  # steps, micro-batches, ranks
    masks = (torch.rand(3, 2, 2, 16) < 0.5).float()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # every rank would print it
        wrapped = distributed.wrap_model(model, torch.device("cpu"))
    for step in range(3):  # DistributedDataParallel makes its buckets anew after the first
        model.zero_grad()
        alone.zero_grad()
        for micro in range(2):
            for rank in range(2):
                (alone(imgs[step, micro, rank], mask=masks[step, micro, rank])[0] / 2).backward()
            own = imgs[step, micro, distributed.get_rank()], masks[step, micro, distributed.get_rank()]
            with wrapped.no_sync() if micro == 0 else contextlib.nullcontext():
                wrapped(own[0], mask=own[1])[0].backward()
        for (name, ours), theirs in zip(model.named_parameters(), alone.parameters(), strict=True):
            if ours.requires_grad:
                torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)
        gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
        buckets = {gradient.untyped_storage().data_ptr() for gradient in gradients}
        assert len(buckets) < len(gradients) / 4  # no gradient has memory of its own
        digest = hashlib.sha256(b"".join(gradient.numpy().tobytes() for gradient in gradients)).hexdigest()
        print("gradients", step, digest, flush=True)
    distributed.shutdown()


def program(main: Callable[[argparse.Namespace], None]) -> ModuleType:
    """As `Trial` takes it."""
    module = ModuleType("a_rank")
    module.main, module.get_args_parser = main, lambda: get_parser(Flags, "a rank")
    return module


def test_gradients_are_those_of_one_process_and_equal_on_both_ranks(tmp_path):
    said = Trial(tmp_path, "--device", "cpu", ranks=2, main=program(compare_gradients)).finish()
    digests = re.findall(r"gradients (\d \w{64})", said)
    assert len(digests) == 6 and len(set(digests)) == 3


def test_a_network_that_cannot_be_used_is_named(tmp_path, monkeypatch):
    """With the variables that choose another, and what they are now."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch")
    said = Trial(tmp_path, "--device", "cpu", "--dist_timeout", 10, ranks=2, main=program(start_as_ranks)).finish(2, 2)
    assert said.count("Unable to find address for: nosuch") == 2
    assert said.count("interface that joins the nodes, as `ip addr` shows it (now GLOO_SOCKET_IFNAME=nosuch, NCCL") == 2


@pytest.mark.parametrize("error, hint", [("connect [10.0.0.2]:7: Connection refused", True), ("timed out", False)])
def test_ranks_that_do_not_reach_each_other_are_told_how_to_choose_a_network(monkeypatch, error, hint):
    monkeypatch.setattr(failures, "_find_suspect", lambda world, findings: None)
    monkeypatch.setattr(distributed, "world", distributed.World(detect_launch(TORCHRUN), 5.0, None, None))
    with pytest.raises(RunError) as caught, failures.explained():
        raise RuntimeError(f"[gloo] {error}")
    assert ("GLOO_SOCKET_IFNAME" in str(caught.value) and "NCCL_SOCKET_IFNAME" in str(caught.value)) == hint


FAILURE = """
distributed.init_distributed(args)
print("ready", flush=True)
with failures.explained():
    for step in range(1000):
        if step == 3 and distributed.get_rank() == VICTIM:
            os.kill(os.getpid(), signal.SIGNAL)
        distributed.all_reduce_mean(torch.tensor(1.0))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("signal_name", "victim"), [slow("SIGKILL", 1), slow("SIGSTOP", 1), ("SIGSTOP", 0)])
def test_survivors_say_which_rank_is_gone(tmp_path, signal_name, victim):
    body = FAILURE.replace("SIGNAL", signal_name).replace("VICTIM", str(victim))
    processes = start_ranks(tmp_path, body, 3, "--dist_timeout", "4")
    wait_until_ready(processes)
    began = time.monotonic()
    survivors = [process for rank, process in enumerate(processes) if rank != victim]
    try:
        codes, outputs = finish(survivors)
    finally:
        processes[victim].kill()
        processes[victim].communicate()
    assert codes == [1, 1]
    assert time.monotonic() - began < 30
    for output in outputs:
        assert f"RunError: rank {processes.index(survivors[outputs.index(output)])} of 3" in output
        assert f"rank(s) {victim} no longer answer" in output
        assert "--dist_timeout 4 s" in output


@pytest.mark.parametrize(
    "rank_1_gave_up, said",
    [
        (60.0, "rank 1 gave up 60 s ago, so it is this rank that was stopped or too slow"),  # woken from SIGSTOP
        (0.5, "all ranks still answer, so one of them was too slow"),
        (None, "rank(s) 1 no longer answer"),
    ],
)
def test_who_was_too_slow_is_told_by_when_the_others_gave_up(monkeypatch, rank_1_gave_up, said):
    monkeypatch.setattr(failures, "SURVIVOR_WAIT", 1.0)
    store = distributed.dist.HashStore()
    if rank_1_gave_up is not None:
        store.set("failed/1", str(time.time() - rank_1_gave_up))
    launch = replace(detect_launch(TORCHRUN), rank=0, world_size=2, master_addr="")
    findings = []
    failures._find_suspect(distributed.World(launch, 5.0, store, None), findings)
    assert findings[-1] == said


@pytest.mark.slow
def test_a_rank_that_never_comes_is_reported(tmp_path):
    alone = start_ranks(tmp_path, "distributed.init_distributed(args)", 2, "--dist_timeout", "3", ranks=[0])
    codes, [output] = finish(alone)
    assert codes == [1]
    assert "RunError: rank 0 of 2 did not meet the others" in output
    assert "within --dist_timeout 3 s" in output


STEPS = """
distributed.init_distributed(args)
preemption = Preemption()
preemption.install()
print("ready", flush=True)
for step in range(100000):
    time.sleep(0.01)
    if preemption.requested_on_any_rank():
        print("saved at", step, flush=True)
        preemption.exit_for_requeue()
"""


@pytest.mark.slow
@pytest.mark.parametrize("signum", [slow(signal.SIGUSR1), slow(signal.SIGUSR2), signal.SIGTERM])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(tmp_path, signum):
    processes = start_ranks(tmp_path, STEPS, 3)
    wait_until_ready(processes)
    processes[2].send_signal(signum)
    codes, outputs = finish(processes)
    assert codes == [EXIT_REQUEUE] * 3
    saved = {line for output in outputs for line in output.splitlines() if line.startswith("saved at")}
    assert len(saved) == 1


def test_a_signal_held_back_while_starting_is_not_lost(tmp_path):
    body = """
    os.kill(os.getpid(), signal.SIGUSR2)
    preemption = Preemption()
    preemption.install()
    assert preemption.requested_on_any_rank()
    """
    block = partial(signal.pthread_sigmask, signal.SIG_BLOCK, [signal.SIGUSR2])  # as exp/launch.sh does
    codes, outputs = finish(start_ranks(tmp_path, body, 1, before=block))
    assert codes == [0], outputs


@pytest.mark.slow
@pytest.mark.parametrize("signum, pause", [(signal.SIGTERM, 0.5), (signal.SIGINT, 2.5)], ids=["TERM", "Ctrl-C"])
def test_the_second_signal_ends_at_once(tmp_path, signum, pause):
    body = """
    preemption = Preemption()
    preemption.install()
    print("ready", flush=True)
    time.sleep(100)
    time.sleep(100)
    """
    [process] = start_ranks(tmp_path, body, 1)
    assert "ready" in process.stdout.readline()
    process.send_signal(signum)
    time.sleep(pause)
    assert process.poll() is None
    process.send_signal(signum)
    assert finish([process], timeout=10)[0] == [128 + signum]


def test_earlier_handler_takes_over_after_saving_and_is_given_back():
    calls = []
    before = signal.signal(signal.SIGUSR2, lambda signum, frame: calls.append(signum))
    other = signal.signal(signal.SIGUSR1, signal.SIG_DFL)  # mains that earlier tests ran here may have left theirs
    try:
        preemption = Preemption()
        preemption.install()
        assert not preemption.requested_on_any_rank()
        os.kill(os.getpid(), signal.SIGUSR2)
        assert preemption.requested_on_any_rank() and calls == []
        with pytest.raises(SystemExit) as ended:
            preemption.exit_for_requeue()
        assert ended.value.code == EXIT_REQUEUE and calls == [signal.SIGUSR2]
        preemption.close()
        os.kill(os.getpid(), signal.SIGUSR2)
        assert calls == [signal.SIGUSR2] * 2
    finally:
        signal.signal(signal.SIGUSR2, before)
        signal.signal(signal.SIGUSR1, other)


@pytest.mark.parametrize("while_saving", [False, True])
def test_a_cancelled_job_is_not_brought_back(monkeypatch, while_saving):
    preemption = Preemption()
    preemption.install()
    try:
        monkeypatch.setattr(preemption, "_requeue", lambda: pytest.fail("asked for a requeue"))
        os.kill(os.getpid(), signal.SIGUSR2)
        if not while_saving:
            os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.requested_on_any_rank()
        if while_saving:
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(SystemExit):
            preemption.exit_for_requeue()
    finally:
        preemption.close()


@pytest.mark.parametrize("state", ["RUNNING", "COMPLETING", "CANCELLED"])
def test_only_a_job_that_still_runs_is_queued_again(tmp_path, monkeypatch, caplog, state):
    """`scontrol requeue` takes others, too, and would bring a cancelled job back."""
    script = f"""#!/bin/sh
        echo "$@" >> {tmp_path}/calls
        if [ "$1" = show ]; then
            echo "JobId=17 ArrayJobId=17 JobName=a UserId=b JobState={state} Reason=None"
            echo "JobId=16 ArrayJobId=17 JobName=a UserId=b JobState={"CANCELLED" if state == "RUNNING" else "RUNNING"}"
        fi"""
    (tmp_path / "scontrol").write_text(script)
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    preemption = Preemption()
    preemption.install()
    preemption._previous[signal.SIGUSR1] = preemption._previous[signal.SIGUSR2] = signal.SIG_DFL  # not submitit's
    try:
        os.kill(os.getpid(), signal.SIGUSR2)
        assert preemption.requested_on_any_rank()
        with caplog.at_level("WARNING"), pytest.raises(SystemExit):
            preemption.exit_for_requeue()
    finally:
        preemption.close()
    asked = (tmp_path / "calls").read_text().splitlines()
    assert ("requeue 17" in asked) == (state == "RUNNING")
    assert ("job 17 is queued again" in caplog.text) == (state == "RUNNING")
