"""The machines of a job answer one another before any of them starts its processes.

Detectron2's launch has one timeout for the start and for every later wait, and says no more than
that it passed. Here the start has a patience of its own, and what is missing has a name.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import time
from dataclasses import dataclass
from typing import Any

from resnext_det.errors import TrainingError
from resnext_det.launching.processes import Where

# Bytes of a line that are read, seconds it may take, and seconds between two tries to connect.
_LINE_LIMIT = 4096
_LINE_TIME = 5.0
_RETRY = 0.5


@dataclass(frozen=True)
class _Answer:
    """What a machine says of itself."""

    machine_rank: int
    machines: int
    processes: int


def roll_call(where: Where) -> None:
    """Wait until every machine of the job is there; the port is free again on return.

    Args:
        where: with a tcp:// dist_url.

    Raises:
        TrainingError: a machine did not answer within `where.patience`, two have the same rank,
            or they do not agree on the number of machines or processes. Each machine raises it.
    """
    verdict = _call(where) if where.machine_rank == 0 else _answer(where)
    if verdict:
        raise TrainingError(verdict)


def _call(where: Where) -> str:
    """On machine 0: wait for the others, and return what is wrong."""
    deadline = time.monotonic() + where.patience
    with contextlib.ExitStack() as lines:
        answered: list[socket.socket] = []
        with _listen(where) as server:
            verdict = _wait_for_all(where, server, deadline, answered, lines)
        # The server is closed before anyone is told to go on: the processes meet on its port.
        for line in answered:
            with contextlib.suppress(OSError):
                line.sendall(json.dumps({"verdict": verdict}).encode() + b"\n")
    return verdict


def _wait_for_all(
    where: Where,
    server: socket.socket,
    deadline: float,
    answered: list[socket.socket],
    lines: contextlib.ExitStack,
) -> str:
    present: dict[int, socket.socket] = {}
    while True:
        # A machine that has been stopped since may come again.
        present = {rank: line for rank, line in present.items() if not _hung_up(line)}
        if len(present) == where.machines - 1:
            return ""
        server.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            line = lines.enter_context(server.accept()[0])
        except TimeoutError:
            return _missing(where, present)
        answer = _read_answer(line)
        if answer is None:
            line.close()  # not one of ours
            continue
        answered.append(line)
        if verdict := _refusal(where, answer, present):
            return verdict
        present[answer.machine_rank] = line


def _listen(where: Where) -> socket.socket:
    host, port = where.meeting_point
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        families = {family for family, *_ in found}
        family = socket.AF_INET if socket.AF_INET in families else socket.AF_INET6
        return socket.create_server(("", port), family=family)
    except OSError as error:
        raise TrainingError(
            f"machine 0 cannot be reached at {where.dist_url} ({error}): give --dist-url its name "
            "and a free port."
        ) from error


def _missing(where: Where, present: dict[int, socket.socket]) -> str:
    missing = [str(rank) for rank in range(1, where.machines) if rank not in present]
    return (
        f"{'machine' if len(missing) == 1 else 'machines'} {', '.join(missing)} did not answer at "
        f"{where.dist_url} within {where.patience:g} s (--dist-timeout). {_expected(where)} Start "
        "the same command there with its --machine-rank, and see that a firewall lets it through."
    )


def _expected(where: Where) -> str:
    return (
        f"Expected were {where.machines} machines with {where.processes} processes each, "
        f"{where.world_size} in all."
    )


def _refusal(where: Where, answer: _Answer, present: dict[int, socket.socket]) -> str:
    if (answer.machines, answer.processes) != (where.machines, where.processes):
        return (
            f"the machines do not agree: machine {answer.machine_rank} was started with "
            f"--num-machines {answer.machines} --num-gpus {answer.processes}, machine 0 with "
            f"--num-machines {where.machines} --num-gpus {where.processes}. Give every machine the "
            "same."
        )
    if answer.machine_rank in (0, *present):
        return (
            f"two machines were started with --machine-rank {answer.machine_rank}: number them "
            f"from 0 to {where.machines - 1}."
        )
    return ""


def _answer(where: Where) -> str:
    """On any other machine: tell machine 0, and return what it finds wrong."""
    deadline = time.monotonic() + where.patience
    own = _Answer(where.machine_rank, where.machines, where.processes)
    reason: object = "it hung up"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection(where.meeting_point, timeout=left) as line:
                line.sendall(json.dumps(vars(own)).encode() + b"\n")
                reply = _read_line(line, deadline - time.monotonic())
            if reply is not None and isinstance(reply.get("verdict"), str):
                return str(reply["verdict"])
        except OSError as error:
            reason = error
        time.sleep(min(_RETRY, max(0.0, deadline - time.monotonic())))
    return (
        f"machine 0 gave no answer at {where.dist_url} within {where.patience:g} s "
        f"(--dist-timeout): {reason}. {_expected(where)} Start the same command on machine 0 with "
        "--machine-rank 0, and check its name, the port and the firewall."
    )


def _read_answer(line: socket.socket) -> _Answer | None:
    said = _read_line(line, _LINE_TIME)
    if said is None or said.keys() != _Answer.__annotations__.keys():
        return None
    if not all(type(number) is int and 0 <= number < 2**31 for number in said.values()):
        return None
    return _Answer(**said)


def _read_line(line: socket.socket, seconds: float) -> dict[str, Any] | None:
    """Return the JSON object on a line; None for anything else."""
    deadline, read = time.monotonic() + seconds, b""
    while b"\n" not in read:
        line.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            more = line.recv(_LINE_LIMIT)
        except OSError:
            return None
        read += more
        if not more or len(read) > _LINE_LIMIT:
            return None
    try:
        said = json.loads(read)
    except (ValueError, RecursionError):
        return None
    return said if isinstance(said, dict) else None


def _hung_up(line: socket.socket) -> bool:
    # After its one line a machine only listens: what can be read now is the end.
    return bool(select.select([line], [], [], 0)[0])
