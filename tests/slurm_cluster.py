"""A running two-node Slurm for the tests, and what they ask of it."""

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


class Cluster:
    """Slurm's commands against the test cluster, in an environment without any launcher's variables."""

    def __init__(self, configuration: str):
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SUBMITIT_"))}
        # One thread, for results that do not depend on how many CPUs a process got.
        self.environ = kept | {"SLURM_CONF": configuration, "OMP_NUM_THREADS": "1", "CPUS_PER_TASK": "1"}

    def run(self, *command: str, timeout: float = 120, **environ: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            command, cwd=ROOT, env=self.environ | environ, timeout=timeout, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def start(self, *command: str, output: Path, **environ: str) -> subprocess.Popen:
        with output.open("w") as file:
            return subprocess.Popen(
                command, cwd=ROOT, env=self.environ | environ, stdout=file, stderr=subprocess.STDOUT
            )

    def submit(self, *command: str) -> str:
        """Submit by sbatch; returns the job id."""
        result = self.run("sbatch", "--parsable", *command)
        assert result.returncode == 0, result.stdout
        return result.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", "-o", job).stdout))

    def start_now(self, job: str) -> None:
        """Spare a requeued job most of the two minutes that Slurm lets it wait; none at all would start it in the
        second in which its old credential is revoked."""
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now+2")

    def wait_for_requeue(self, job: str, restarts: int) -> None:
        """Until the job waits in the queue for its restart number `restarts`; starts it."""
        wait_until(lambda: self.job(job)["JobState"] == "PENDING" and self.job(job)["Restarts"] == str(restarts))
        self.start_now(job)

    def tasks(self, job: str) -> dict[int, int]:
        """Rank -> process id of a job's running mains."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environ = dict(
                    entry.split("=", 1) for entry in (folder / "environ").read_text().split("\0") if "=" in entry
                )
                program = (folder / "cmdline").read_text().split("\0")
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                started_by = Path(f"/proc/{parent}/comm").read_text().strip()
            except (OSError, UnicodeDecodeError):
                continue
            started = any(argument.endswith(".py") for argument in program) and "-c" not in program  # not exp/launch.sh
            here = environ.get("SLURM_CONF") == self.environ["SLURM_CONF"] and environ.get("SLURM_JOB_ID") == job
            # slurmstepd's children are the tasks (and the batch script); theirs are data-loading workers
            is_task = started_by == "slurmstepd" and "SLURM_STEP_ID" in environ
            if started and here and is_task:
                found[int(environ["SLURM_PROCID"])] = int(folder.name)
        return found


def wait_until(condition: Callable[[], object], timeout: float = 300) -> None:
    # Slurm holds a requeued job back for two minutes when `start_now` came before it had settled.
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"still waiting after {timeout} s")
        time.sleep(0.05)


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def why_no_cluster() -> str:
    """What is missing for a cluster on this machine; '' if nothing is."""
    missing = [command for command in ("slurmctld", "slurmd", "munged", "sbatch") if shutil.which(command) is None]
    if missing:
        return f"{', '.join(missing)} not installed (Debian's slurm-wlm and munge)"
    return "" if os.geteuid() == 0 else "starting Slurm's daemons needs root"


def free_ports(count: int) -> int:
    """The first of `count` neighbouring TCP ports that nobody listens on."""
    for port in range(16817, 20000, count):
        try:
            for offset in range(count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port + offset))
        except OSError:
            continue
        return port
    raise RuntimeError("no free ports for a test cluster")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """The test cluster, started once; skips (or fails, with MIXMAE_REQUIRE_SLURM=1) where there can be none."""
    if reason := why_no_cluster():
        if os.environ.get("MIXMAE_REQUIRE_SLURM") == "1":
            pytest.fail(f"no Slurm: {reason}")
        pytest.skip(f"no Slurm: {reason}")
    folder = tmp_path_factory.mktemp("slurm")
    script = str(ROOT / "tests/slurm/cluster.sh")
    # Daemons keep inherited pipes open, so the output goes to a file.
    with (folder / "start.txt").open("w") as log:
        subprocess.run(
            ["sh", script, "start", str(folder), str(free_ports(3))],
            check=True, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
    running = Cluster(f"{folder}/slurm.conf")
    yield running
    subprocess.run(["sh", script, "stop", str(folder)], env=running.environ, check=True)
