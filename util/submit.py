"""Submit a run to Slurm from Python, to be queued again after preemption and at its time limit.

    python -m util.submit pretrain --exp base_600ep --partition P --nodes 2 --ngpus 8 --timeout 4320 --data_path DIR
    python -m util.submit finetune --partition P --data_path DIR -- --model swin_base_w14 --finetune base_600ep

With `--exp` the recipe is what `sh exp/<exp>/<task>.sh print ...` prints, so it is defined in one place; flags after
`--` are passed to the script and override the recipe. Logs and the pickled job are in the job folder; so is the output,
unless a flag or the recipe says otherwise.
"""

import argparse
import os
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import submitit
from submitit.helpers import DelayedSubmission

from util.errors import UserError
from util.run.flags import AT_LEAST_1, NOT_NEGATIVE, Config, flag, get_parser, given_flags
from util.run.startup import ROOT

TASKS = ("pretrain", "finetune", "finetune_384", "linear", "eval")


class Training:
    """What every task of the job runs: the script of a main, with its flags.

    `folder` is the job folder, with submitit's `%j` for the job id. It is pickled, started once per GPU by submitit,
    and started again as it is after a requeue: `--resume auto` finds the checkpoint.
    """

    def __init__(self, script: str, flags: list[str], folder: str):
        self.script, self.flags, self.folder = script, flags, folder

    def __call__(self) -> None:
        folder = Path(self.folder.replace("%j", os.environ["SLURM_JOB_ID"]))
        # One file per job and attempt: the file of an earlier one would list ranks that are gone.
        meeting = folder / f"meeting-{os.environ['SLURM_JOB_ID']}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
        defaults = ["--output_dir", str(folder), "--resume", "auto", "--dist_url", f"file://{meeting}"]
        script = str(ROOT / self.script)
        sys.argv = [script, *defaults, *self.flags]
        runpy.run_path(script, run_name="__main__")

    def checkpoint(self) -> DelayedSubmission:
        """What submitit queues after a preemption; called when the run has saved and stopped."""
        return DelayedSubmission(self)


def recipe(exp: str, task: str, gpus: int, data_path: str, flags: list[str]) -> tuple[str, list[str]]:
    """The main (a script) and all its flags for an experiment, from the experiment's own script.

    Raises:
        UserError: there is no such experiment, or its script rejects the arguments; carries the script's message.
    """
    script = ROOT / "exp" / exp / f"{task}.sh"
    if not script.is_file():
        known = sorted(str(path.relative_to(ROOT / "exp").with_suffix("")) for path in ROOT.glob(f"exp/*/{task}.sh"))
        raise UserError(f"--exp {exp} has no {task}.sh; these experiments have: {', '.join(known)}")
    result = subprocess.run(["sh", str(script), "print", str(gpus), data_path, *flags], capture_output=True, text=True)
    if result.returncode:
        raise UserError(result.stderr.strip())
    main, *lines = result.stdout.removesuffix("\n").split("\n")
    return main, lines


@dataclass(frozen=True)
class SubmitConfig(Config):
    TITLE: ClassVar[str] = "job"

    exp: str = flag("", "experiment whose recipe to take, such as base_600ep (default: none)", "NAME")
    data_path: str = flag("", "the data, as for the main", "PATH", required="the data, as for the main")
    partition: str = flag("", "Slurm partition", "NAME", required="a Slurm partition")
    nodes: int = flag(1, "number of nodes", "N", AT_LEAST_1)
    ngpus: int = flag(8, "GPUs, and processes, per node", "N", AT_LEAST_1)
    cpus_per_task: int = flag(12, "CPUs per process, of which all but one load its images", "N", AT_LEAST_1)
    timeout: int = flag(4320, "time limit of one attempt in minutes (default: 3 days)", "MINUTES", AT_LEAST_1)
    signal_delay: int = flag(120, "how long before the time limit to save and stop", "SECONDS", NOT_NEGATIVE)
    requeue_limit: int = flag(
        10, "how often the job may run into its time limit and be queued again", "N", NOT_NEGATIVE
    )
    job_dir: str = flag("runs/%j", "job folder, %%j is the job id (default: runs/%%j)", "DIR")


def get_args_parser() -> argparse.ArgumentParser:
    description = "Submit a run to Slurm; it is queued again after preemption and at its time limit."
    parser = get_parser(SubmitConfig, description, "python -m util.submit")
    parser.epilog = "Flags after -- are passed to the script and override the recipe."
    parser.add_argument("task", choices=TASKS, help="script of the experiment, or (without --exp) pretrain or finetune")
    parser.add_argument(
        "--slurm", action="append", default=[], metavar="KEY=VALUE",
        help="further options of sbatch, such as account=lab or qos=long; may be repeated",
    )  # fmt: skip
    return parser


def submit(given: SubmitConfig, task: str, options: list[str], flags: list[str]) -> submitit.Job:
    """Submit the job.

    Args:
        task: one of `TASKS`.
        options: KEY=VALUE of sbatch.
        flags: of the script.

    Raises:
        UserError: contradictory arguments, or no Slurm here.
    """
    if given.exp:
        main, flags = recipe(given.exp, task, given.nodes * given.ngpus, given.data_path, flags)
    elif task in ("pretrain", "finetune"):
        main, flags = f"main_{task}.py", ["--data_path", given.data_path, *flags]
    else:
        raise UserError(f"{task} is a script of an experiment: add --exp, such as --exp base_600ep")
    # Parse the flags here, where the user sees what is wrong with them.
    parsed = runpy.run_path(str(ROOT / main))["get_args_parser"]().parse_args(flags)
    if not getattr(parsed, "dataset", "") and not Path(parsed.data_path).exists():
        raise UserError(f"the data folder (or list of images) '{parsed.data_path}' does not exist")
    parts = (option.partition("=") for option in options)
    further = {key: value if separator else True for key, separator, value in parts}

    folder = str(Path(given.job_dir).absolute())
    try:
        executor = submitit.AutoExecutor(folder, cluster="slurm", slurm_max_num_timeout=given.requeue_limit)
    except RuntimeError as error:
        raise UserError(f"Slurm's srun is not installed here ({error}): submit from a login node") from error
    executor.update_parameters(
        name=f"{given.exp or 'mixmae'}-{task}",
        nodes=given.nodes,
        tasks_per_node=given.ngpus,
        gpus_per_node=given.ngpus,
        cpus_per_task=given.cpus_per_task,
        timeout_min=given.timeout,
        slurm_partition=given.partition,
        slurm_signal_delay_s=given.signal_delay,
        slurm_srun_args=["--kill-on-bad-exit=1"],
        slurm_setup=[f"export PYTHONPATH={ROOT}:$PYTHONPATH OMP_NUM_THREADS=${{OMP_NUM_THREADS:-1}}"],
        slurm_additional_parameters={"requeue": True, **further},
    )
    try:
        return executor.submit(Training(main, flags, folder))
    except submitit.core.utils.FailedJobError as error:
        raise UserError(f"Slurm did not take the job: {error}") from error


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    own, flags = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = get_args_parser()
    args = parser.parse_args(own)
    try:
        job = submit(given_flags(SubmitConfig, args), args.task, args.slurm, flags)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    print(f"submitted job {job.job_id}; its log is {job.paths.stdout}")


if __name__ == "__main__":
    from util.submit import main as importable_main  # so that the job is pickled by name, not by value

    importable_main()
