r"""Queue a training on Slurm; timed out or pre-empted, it returns to the queue until it is done.

    %(prog)s --partition gpu --time 12:00:00 --gpus-per-node 8 --cpus-per-node 64 train \
        --config-file faster_rcnn_X_50_32x4d_FPN_paper OUTPUT_DIR /shared/x50
    %(prog)s --time 12:00:00 --nodes 1:4 --gpus-per-node 2 train ...
    %(prog)s --time 12:00:00 --dry-run train ...

The training's command line comes last. Two minutes before its time is up, or when Slurm needs the
machines, the training saves a checkpoint; the job is queued again and continues with --resume. A
training that fails is not queued again. Needs submitit: pip install 'resnext_det[cluster]'.
"""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from resnext_det_cli import parse

_NOTICE = 120  # seconds of a job's time that are left for saving
_STOPPED = 75  # exit code of a training that was stopped and has saved
_RETURNS = 100_000  # after time-outs, which submitit counts
_TIME = re.compile(r"(\d{1,6})|(?:(\d{1,3})-)?(\d{1,4}):([0-5]\d):[0-5]\d", re.ASCII)
_NODES = re.compile(r"([1-9]\d{0,4})(?::([1-9]\d{0,4}))?", re.ASCII)
_OPTION = re.compile(r"([a-z][a-z-]*)=(\S.*)", re.ASCII)
# Options of sbatch that follow from the flags, or that requeuing depends on.
_OWN_OPTIONS = {"time", "partition", "nodes", "gpus-per-node", "cpus-per-task", "ntasks", "array"}
_OWN_OPTIONS |= {"ntasks-per-node", "signal", "requeue", "no-requeue", "output", "error"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--cluster", choices=("slurm", "local"), default="slurm", help="local: on this machine")
    add("--partition", metavar="P", help="default: the cluster's")
    add("--time", type=_minutes, required=True, metavar="T", help="MINUTES or [DAYS-]HH:MM:SS")
    add("--nodes", type=_nodes, default=(1, 1), metavar="N", help="or MIN:MAX (default: 1)")
    add("--gpus-per-node", type=_count, metavar="N", help="each for one process (default: none)")
    add("--cpus-per-node", type=_count, metavar="N", help="default: the cluster's")
    add(
        "--sbatch",
        type=_option,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="another option of sbatch, such as account=vision or mem=200G; may be repeated",
    )
    add(
        "--logs",
        type=Path,
        default=Path("output/submitted"),
        metavar="FOLDER",
        help="on a disk that the machines share (default: %(default)s)",
    )
    add("--dry-run", action="store_true", help="print the script for sbatch, and stop")
    add("words", nargs=argparse.REMAINDER, metavar="train ...", help="as without submit")


def _minutes(text: str) -> int:
    match = _TIME.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r}: use MINUTES or [DAYS-]HH:MM:SS")
    minutes = int(match[1] or int(match[2] or 0) * 1440 + int(match[3]) * 60 + int(match[4]))
    if minutes < 5:
        raise argparse.ArgumentTypeError(f"{text!r}: use 5 minutes or more, 2 of them for saving")
    return minutes


def _nodes(text: str) -> tuple[int, int]:
    match = _NODES.fullmatch(text)
    least, most = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if least > most:
        raise argparse.ArgumentTypeError(f"{text!r}: use a number of machines, or MIN:MAX")
    return least, most


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,3}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r}: use a number from 1 to 9999")
    return int(text)


def _option(text: str) -> tuple[str, str]:
    match = _OPTION.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r}: use KEY=VALUE, such as account=vision")
    if match[1] in _OWN_OPTIONS:
        raise argparse.ArgumentTypeError(f"{match[1]} is set by submit itself or by its flags")
    return match[1], match[2]


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if arguments.words[:1] != ["train"]:
        parser.error("end with the training's command line: train --config-file FILE ...")
    training = parse("train", f"{parser.prog} ... train", arguments.words[1:])
    least, most = arguments.nodes
    own = ["nnodes", "num_machines", "machine_rank", "dist_url", "overwrite", "dry_run"]
    own += ["max_restarts"] if least == most else []
    if given := [f"--{name.replace('_', '-')}" for name in own if getattr(training, name)]:
        parser.error(
            f"{', '.join(given)} cannot be submitted: --nodes says how many machines train "
            "together, and every start continues the training in OUTPUT_DIR"
        )
    if training.num_gpus and arguments.gpus_per_node not in (None, training.num_gpus):
        parser.error(
            f"--gpus-per-node {arguments.gpus_per_node} contradicts --num-gpus "
            f"{training.num_gpus}: omit --num-gpus"
        )
    if arguments.cluster == "local":
        of_slurm = ("partition", "cpus_per_node", "sbatch", "dry_run")
        given = [f"--{name.replace('_', '-')}" for name in of_slurm if getattr(arguments, name)]
        given += ["--nodes"] if most > 1 else []
        if given:
            parser.error(f"{', '.join(given)} is for --cluster slurm")
    arguments.training = training


def run(arguments: argparse.Namespace) -> None:
    """Check the config, and queue the training."""
    from resnext_det.config import load_config, locate_config
    from resnext_det.errors import ConfigError, quoted

    training = arguments.training
    if training.config_file:  # refuses a misspelt key now, not after hours in the queue
        load_config(locate_config(training.config_file), training.opts)
    command = [sys.executable, "-m", "resnext_det_cli", *arguments.words]
    if arguments.gpus_per_node and not training.num_gpus:
        command += ["--num-gpus", str(arguments.gpus_per_node)]
    if not (training.resume or training.eval_only):
        command.append("--resume")
    try:
        executor = _executor(arguments)
        if arguments.dry_run:
            print(executor._make_submission_file_text(executor._submitit_command_str, ""))
            return
        job = executor.submit(Training(command, arguments.nodes[0]))
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"the job was not queued: {quoted(error)}") from error
    print(f"Job {job.job_id}; its log: {quoted(job.paths.stdout)}")


def _executor(arguments: argparse.Namespace) -> Any:
    """Return submitit's executor with the settings of the job."""
    from resnext_det.errors import ConfigError, quoted

    try:
        import submitit
    except ImportError as error:
        raise ConfigError(
            f"submit needs submitit ({quoted(error)}): pip install 'resnext_det[cluster]'"
        ) from error

    least, most = arguments.nodes
    gpus = {"gpus_per_node": arguments.gpus_per_node} if arguments.gpus_per_node else {}
    if arguments.cluster == "local":
        local = submitit.LocalExecutor(arguments.logs, max_num_timeout=_RETURNS)
        local.update_parameters(
            timeout_min=arguments.time, signal_delay_s=_NOTICE, stderr_to_stdout=True, **gpus
        )
        return local
    executor = submitit.SlurmExecutor(arguments.logs, max_num_timeout=_RETURNS)
    # With hyphens, submitit would write job-name twice, and its own last.
    more = {"requeue": True} | {key.replace("-", "_"): each for key, each in arguments.sbatch}
    if least < most:
        more["nodes"] = f"{least}-{most}"
    settings = {"partition": arguments.partition, "cpus_per_task": arguments.cpus_per_node}
    executor.update_parameters(
        job_name="resnext-det",
        time=arguments.time,
        nodes=least,  # each with one task; asking for one per node would get the fewest nodes
        signal_delay_s=_NOTICE,
        stderr_to_stdout=True,
        additional_parameters=more,
        # srun does not inherit sbatch's --cpus-per-task since Slurm 22.05.
        srun_args=[f"--cpus-per-task={arguments.cpus_per_node}"] * bool(arguments.cpus_per_node),
        **gpus,
        **{name: value for name, value in settings.items() if value},
    )
    return executor


class Training:
    """A training on one machine of a job, pickled by submitit and called at every start."""

    def __init__(self, command: list[str], least: int = 1) -> None:
        self._command = command
        self._least = least

    def __call__(self) -> None:
        """Train. If the training is stopped, queue the job again; if it fails, exit as it does."""
        from submitit import JobEnvironment

        here = JobEnvironment()
        number = getattr(signal, f"SIG{here.USR_SIG}")
        requeue = signal.getsignal(number)  # submitit's handler
        # Slurm signals all processes of the job; this signal would kill those of the training.
        signal.signal(number, signal.SIG_IGN)
        process = subprocess.Popen([*self._command, *self._meeting(here)])
        received = []

        def stop(received_number: int, _: object) -> None:
            received.append(received_number)
            for each in (number, signal.SIGTERM):  # a second SIGTERM would kill it while it saves
                signal.signal(each, signal.SIG_IGN)
            process.terminate()

        for each in (number, signal.SIGTERM):
            signal.signal(each, stop)
        try:
            code = process.wait()
        except KeyboardInterrupt:  # how submitit's local executor cancels
            process.terminate()
            raise
        is_cancelled = signal.SIGTERM in received
        if code == _STOPPED and here.cluster == "slurm":  # which pre-empts with SIGTERM as well
            words = ["squeue", "--noheader", "--format=%T", f"--jobs={here.raw_job_id}"]
            state = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False).stdout
            is_cancelled = state.strip() == "COMPLETING"  # scancel must not be undone
        if code == _STOPPED and not is_cancelled:
            requeue(number, None)  # type: ignore[operator,misc]  # exits; on other machines, returns
        elif code:
            sys.exit(code if code > 0 else 128 - code)

    def _meeting(self, here: Any) -> list[str]:
        """Return the flags with which the machines of the job meet."""
        if here.num_nodes == 1:
            return []
        port = 10_000 + int(here.raw_job_id) % 20_000
        url = ["--dist-url", f"tcp://{here.hostnames[0]}:{port}"]
        if self._least < here.num_nodes:
            return [*url, "--nnodes", f"{self._least}:{here.num_nodes}"]
        return [*url, "--num-machines", str(here.num_nodes), "--machine-rank", str(here.node)]

    def checkpoint(self) -> Any:
        """Return what submitit calls at the next start: the same."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)
