"""Write the page of the paper's tables; run its experiments in miniature.

    %(prog)s                               docs/paper.md, from docs/paper.json
    %(prog)s --check                       exit with 1 if it is out of date
    %(prog)s --run output/paper            run the miniatures first; the page is there
    %(prog)s --run output/paper --output docs
    %(prog)s --run output/paper --only cardinality --seeds 2

A training is run once: a second call continues where the first was stopped. All of them take about
20 minutes on one core, and as many run at a time as there are cores.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="run the miniatures in it")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="of these miniatures only"
    )
    parser.add_argument(
        "--seeds", type=int, default=0, metavar="N", help="(default: 4 or 6, by experiment)"
    )
    parser.add_argument("--quick", action="store_true", help="3 updates each, to see that it runs")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="of paper.md, paper.json and pictures (default: that of --run, or docs)",
    )
    parser.add_argument("--check", action="store_true", help="write nothing, compare")


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if arguments.run is None and (arguments.only or arguments.seeds or arguments.quick):
        parser.error("--only, --seeds and --quick need --run FOLDER")
    if arguments.run and arguments.check:
        parser.error("--check runs nothing: leave out --run")
    if arguments.seeds < 0:
        parser.error("--seeds must be 1 or more")


def run(arguments: argparse.Namespace) -> int:
    """Run what is to be run, then write or compare the page."""
    from resnext_det.errors import quoted
    from resnext_det.files import write_json, write_text, written_beside
    from resnext_det.paper import miniatures
    from resnext_det.paper.page import page, picture_name
    from resnext_det.paper.pictures import picture

    folder = arguments.output or arguments.run or Path("docs")
    results = miniatures.read_results(folder)
    if arguments.run:
        results |= _run_miniatures(arguments)
        write_json(folder / miniatures.RESULTS, results)
    target, text = folder / "paper.md", page(results)
    if arguments.check:
        if target.is_file() and target.read_text(encoding="utf-8") == text:
            return 0
        print(f"{quoted(target, 4096)} is out of date: run resnext-det paper")
        return 1
    kinds = {each["name"]: each["picture"] for each in miniatures.chosen(())}
    for name, result in results.items():
        with written_beside(folder / picture_name(name)) as beside:
            beside.write_bytes(picture(kinds[name], result))
    write_text(target, text)
    print(f"Wrote {quoted(target, 4096)}")
    return 0


def _run_miniatures(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the trainings that are missing, and return the results of the experiments."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, as_completed

    from resnext_det.console import progress_bar
    from resnext_det.files import check_writable
    from resnext_det.paper import miniatures

    folder = arguments.run.absolute()
    check_writable(folder, "--run")
    experiments = miniatures.chosen(arguments.only)
    needed = {
        each.folder: each
        for experiment in experiments
        for each in miniatures.trainings(experiment, folder, arguments.seeds, arguments.quick)
    }
    missing = [each for each in needed.values() if miniatures.result_of(each) is None]
    for each in missing:
        miniatures.prepare_data(each, folder, arguments.quick)
    if missing:
        workers = min(len(missing), os.cpu_count() or 1)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context, _start_worker) as pool:
            futures = [pool.submit(_train, each) for each in missing]
            try:
                for future in progress_bar(
                    as_completed(futures), total=len(futures), desc="miniatures", unit="training"
                ):
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return miniatures.collect(experiments, folder, arguments.seeds, arguments.quick)


def _start_worker() -> None:
    """Compute on one thread, so that figures do not depend on the number of cores."""
    import torch

    torch.set_num_threads(1)


def _train(training: Any) -> None:
    """Run `pretrain` in a worker process, with its output in output.txt, and summarize it."""
    from resnext_det.engine.setup import close_logs
    from resnext_det.errors import TrainingError, quoted
    from resnext_det.paper.miniatures import summarize
    from resnext_det_cli import run as run_command

    training.folder.mkdir(parents=True, exist_ok=True)
    log = training.folder / "output.txt"
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)
    (training.folder / "metrics.jsonl").unlink(missing_ok=True)
    began = time.process_time()
    try:
        code = run_command("pretrain", "resnext-det pretrain", [*training.words, "--overwrite"])
    except SystemExit as end:
        code = int(end.code or 0)
    sys.stdout.flush()
    if code:
        raise TrainingError(f"a miniature failed with code {code}: read {quoted(log, 4096)}.")
    summarize(training, time.process_time() - began)
    close_logs()
