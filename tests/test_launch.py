"""Who we are under each launcher: rank, processes, meeting point and device, or what contradicts itself."""

import shutil
import subprocess

import pytest
import torch

from util.errors import UserError
from util.run.launch import choose_device, detect_launch, device_index, first_host, job_port

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "10.0.0.7",
    "MASTER_PORT": "4321",
    "TORCHELASTIC_RUN_ID": "none",
}
# What Slurm 22.05 sets for task 2 of `srun -n 3 -N 2`, and in the batch script of `sbatch -n 3`.
SRUN = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "3",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_JOB_NODELIST": "node[1-2]",
}
BATCH_SCRIPT = {
    "SLURM_JOB_ID": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "3",
    "SLURM_TASKS_PER_NODE": "3",
    "SLURM_JOB_NODELIST": "node1",
}
MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "MASTER_ADDR": "head",
    "MASTER_PORT": "5000",
}


def facts(launch):
    return launch.rank, launch.world_size, launch.local_rank, launch.local_world_size, launch.launcher


def test_no_launcher_is_a_single_process():
    assert facts(detect_launch({})) == (0, 1, 0, 1, "none")


def test_torchrun():
    launch = detect_launch(TORCHRUN)
    assert facts(launch) == (5, 8, 1, 4, "torchrun")
    assert (launch.master_addr, launch.master_port) == ("10.0.0.7", 4321)


def test_bare_srun_takes_address_and_port_from_slurm():
    launch = detect_launch(SRUN)
    assert facts(launch) == (2, 3, 0, 1, "srun")
    assert (launch.master_addr, launch.master_port) == ("node1", job_port(SRUN))
    on_first_node = SRUN | {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0"}
    assert facts(detect_launch(on_first_node)) == (1, 3, 1, 2, "srun")


def test_srun_on_one_node_needs_no_name_to_resolve():
    step = SRUN | {"SLURM_NODEID": "0", "SLURM_LOCALID": "2", "SLURM_STEP_TASKS_PER_NODE": "3"}
    assert detect_launch(step).master_addr == "127.0.0.1"


def test_mpi_only_when_asked_for():
    assert facts(detect_launch(MPI, dist_on_itp=True)) == (3, 4, 1, 2, "mpi")
    with pytest.raises(UserError, match=r"4 processes \(OMPI_COMM_WORLD_SIZE\): give --dist_on_itp"):
        detect_launch(MPI)
    with pytest.raises(UserError, match=r"OMPI_COMM_WORLD_RANK.* missing"):
        detect_launch({}, dist_on_itp=True)
    with pytest.raises(UserError, match="MASTER_ADDR is not set"):
        detect_launch({k: v for k, v in MPI.items() if k != "MASTER_ADDR"}, dist_on_itp=True)


def test_shells_inside_an_allocation_are_single_processes():
    salloc = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "node1"}
    assert detect_launch(salloc).world_size == 1
    pty = SRUN | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"}
    assert detect_launch(pty).world_size == 1


def test_batch_script_without_srun_is_an_error_unless_one_process_is_wanted():
    with pytest.raises(UserError, match=r"SLURM_NTASKS=3 .*srun python"):
        detect_launch(BATCH_SCRIPT)
    assert detect_launch(BATCH_SCRIPT, world_size=1).world_size == 1
    assert detect_launch(BATCH_SCRIPT | {"SLURM_NTASKS": "1"}).world_size == 1
    assert detect_launch(BATCH_SCRIPT | TORCHRUN).launcher == "torchrun"


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "0"}, r"WORLD_SIZE, LOCAL_RANK is missing \(found: RANK=0\)"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4 is set but RANK is not"),
        (TORCHRUN | {"RANK": "8"}, "RANK must be below WORLD_SIZE.* RANK=8, WORLD_SIZE=8"),
        (TORCHRUN | {"RANK": "-1"}, "RANK must be below WORLD_SIZE.* RANK=-1, WORLD_SIZE=8"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, r"LOCAL_RANK below .*\(4\): .*LOCAL_RANK=4, LOCAL_WORLD_SIZE=4"),
        (TORCHRUN | {"WORLD_SIZE": "eight"}, "WORLD_SIZE='eight' is not a whole number"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "9"}, "WORLD_SIZE=8, .*LOCAL_WORLD_SIZE=9"),
        (TORCHRUN | {"MASTER_PORT": "70000"}, "MASTER_PORT 70000 is not a TCP port"),
        (SRUN | {"SLURM_NODEID": "2"}, "layout .* contradicts .*SLURM_STEP_TASKS_PER_NODE=2,1, SLURM_NODEID=2"),
        ({k: v for k, v in SRUN.items() if k != "SLURM_STEP_NODELIST"}, r"MASTER_ADDR is not set \(nor SLURM_STEP"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "MASTER_ADDR is not set"),
        (
            SRUN | {"SLURM_PROCID": "3"},
            "must be below .* SLURM_PROCID=3, SLURM_STEP_NUM_TASKS=3",
        ),
        (
            SRUN | {"SLURM_LOCALID": "1"},
            r"share of it \(1\): .* SLURM_LOCALID=1, .*TASKS_PER_NODE=2,1, .*NODEID=1",
        ),
        (
            SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2,2"},
            "contradicts .*TASKS=3, .*SLURM_STEP_TASKS_PER_NODE=2,2",
        ),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "two"}, "layout .* contradicts .*SLURM_STEP_TASKS_PER_NODE=two"),
        (SRUN | {"WORLD_SIZE": "8"}, "WORLD_SIZE=8 .* contradicts the 3 process"),
        ({k: v for k, v in SRUN.items() if k != "SLURM_LOCALID"}, "SLURM_LOCALID is missing"),
        # torchrun in every task of a step, each believing to be alone, or with a world of another size
        (SRUN | TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, "contradict"),
        (SRUN | {"RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "0"}, r"RANK=1, WORLD_SIZE=3\) contradict"),
    ],
)
def test_contradictions_name_the_variables_and_values(environ, message):
    with pytest.raises(UserError, match=message):
        detect_launch(environ)


def test_torchrun_per_node_and_hand_made_variables_agree_with_srun():
    one_agent_per_task = SRUN | TORCHRUN | {"WORLD_SIZE": "12"}
    assert facts(detect_launch(one_agent_per_task)) == (5, 12, 1, 4, "torchrun")
    by_hand = SRUN | {"RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "0"}
    assert detect_launch(by_hand).rank == 2


def test_flags_override_or_contradict():
    assert detect_launch(SRUN, port=4000).master_port == 4000
    assert detect_launch(SRUN, dist_url="tcp://head:77").master_addr == "head"
    with pytest.raises(UserError, match="--world_size 4 contradicts the 3 process"):
        detect_launch(SRUN, world_size=4)
    with pytest.raises(UserError, match="--port 4000 contradicts torchrun's MASTER_PORT=4321"):
        detect_launch(TORCHRUN, port=4000)
    with pytest.raises(UserError, match="--port 4000 contradicts --dist_url tcp://head:77"):
        detect_launch(SRUN, dist_url="tcp://head:77", port=4000)
    with pytest.raises(UserError, match="is not a TCP port"):
        detect_launch(SRUN, port=70000)
    for url in ("tcp://head", "tcp://head:port", "tcp://head:70000", "nccl://x"):
        with pytest.raises(UserError, match=url):
            detect_launch(SRUN, dist_url=url)


def test_ports_of_neighbouring_jobs_steps_and_restarts_differ():
    ports = {
        job_port({"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step), "SLURM_RESTART_COUNT": str(restart)})
        for job in range(1000, 1020)
        for step in range(5)
        for restart in range(3)
    }
    assert len(ports) == 20 * 5 * 3
    assert all(1024 < port < 32768 for port in ports)


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("node[1-2]", "node1"),
        ("gpu[03-05,9],login1", "gpu03"),
        ("alone", "alone"),
        ("rack2-node7,rack1-node[1-3]", "rack2-node7"),
        ("r[1-2]n[3-4]", "r1n3"),
    ],
)
def test_first_host(nodelist, first):
    assert first_host(nodelist) == first
    if shutil.which("scontrol"):
        listing = subprocess.run(["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True)
        assert not listing.stdout or listing.stdout.split()[0] == first


def test_unreadable_nodelist():
    with pytest.raises(UserError, match="cannot be read: set MASTER_ADDR"):
        first_host("node[1-2")


def test_device_is_the_local_rank():
    launch = detect_launch(TORCHRUN)
    assert device_index(launch, 4, {}) == 1
    with pytest.raises(UserError, match=r"the 4 processes on this node .* need a GPU each, but it shows them 1 "):
        device_index(launch, 1, {})
    task = detect_launch(SRUN | {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0"})
    assert device_index(task, 1, {"SLURM_GPUS_PER_TASK": "1"}) == 0  # Slurm shows each task its own GPU only
    with pytest.raises(UserError, match=r"the 2 processes on this node .* shows them 1 "):
        device_index(task, 1, {})
    by_hand = detect_launch({"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "MASTER_ADDR": "head"})
    assert device_index(by_hand, 8, {}) == 1  # how many share this node is not known
    with pytest.raises(UserError, match="shows them 1 "):
        device_index(by_hand, 1, {})


def test_too_few_gpus_are_an_error_of_every_rank_of_the_node(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    messages = set()
    for local_rank in "0123":
        with pytest.raises(UserError, match=r"the 4 processes .* shows them 2 ") as error:
            choose_device("auto", detect_launch(TORCHRUN | {"LOCAL_RANK": local_rank}))
        messages.add(str(error.value))
    assert len(messages) == 1  # so that the node says it once
    assert choose_device("cpu", detect_launch(TORCHRUN)) == torch.device("cpu")
    with pytest.raises(UserError, match="--device cuda:2, but only 2 GPU"):
        choose_device("cuda:2", detect_launch({}))


def test_one_process_needs_no_meeting_point():
    launch = detect_launch({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})
    assert (launch.rank, launch.world_size, launch.master_addr) == (0, 1, "127.0.0.1")
