"""Have all hosts come? Asked before jax's own start-up, which ends the process without saying who is missing.

Process 0 listens on the coordinator's port, which has to be open anyway, until all others have sent their number or the
time is up, then tells each of them and frees the port for jax.
"""

from __future__ import annotations

import contextlib
import socket
import time

_HELLO, _GO = b"tpu_tune here ", b"go"


class MissingProcesses(Exception):
    """Not all processes have come. `processes` are the numbers of the missing ones."""

    def __init__(self, processes: list[int], reason: str = ""):
        super().__init__(reason or f"missing: {processes}")
        self.processes, self.reason = processes, reason


def roll_call(coordinator: str, num_processes: int, process_id: int, seconds: float) -> None:
    """Return once every process has called this.

    Args:
      coordinator: host:port of process 0.
      num_processes: number of processes of the run.
      process_id: number of this process.
      seconds: how long to wait for all of them.

    Raises:
      MissingProcesses: some have not come; for process 0 and those that reached it, all of them are named, and for one
        that did not, process 0.
      OSError: the port is not free on process 0.
    """
    host, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + seconds
    if process_id == 0:
        _listen(int(port), num_processes, deadline)
    else:
        _report(host.strip("[]"), int(port), process_id, deadline)


def _listen(port: int, num_processes: int, deadline: float) -> None:
    both = socket.has_dualstack_ipv6()
    server = socket.create_server(
        ("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both, backlog=num_processes
    )
    connections: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(server)
        while len(connections) < num_processes - 1:
            missing = [number for number in range(1, num_processes) if number not in connections]
            try:
                server.settimeout(max(deadline - time.monotonic(), 0.01))
                connection, _ = server.accept()
            except TimeoutError:
                for other in connections.values():
                    _tell(other, ",".join(map(str, missing)).encode())
                raise MissingProcesses(missing) from None
            stack.enter_context(connection)
            number = _number(connection)
            if number is not None and 0 < number < num_processes:
                connections[number] = connection  # the later one, where a process was started again
        for other in connections.values():
            _tell(other, _GO)


def _number(connection: socket.socket) -> int | None:
    """Return the number that a caller sends; None for one that is no process of ours (a port scanner)."""
    try:
        connection.settimeout(2)
        line = connection.makefile("rb").readline(64)
        return int(line.removeprefix(_HELLO)) if line.startswith(_HELLO) else None
    except (OSError, ValueError):
        return None


def _tell(connection: socket.socket, text: bytes) -> None:
    with contextlib.suppress(OSError):  # one that has gone will be missed by jax
        connection.sendall(text + b"\n")


def _report(host: str, port: int, process_id: int, deadline: float) -> None:
    reason = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=min(left, 5)) as connection:
                connection.sendall(_HELLO + b"%d\n" % process_id)
                connection.settimeout(max(deadline - time.monotonic(), 0.01) + 5)  # process 0's clock began later
                answer = connection.makefile("rb").readline(1000).strip()
            if answer == _GO:
                return
            missing = [int(number) for number in answer.split(b",")] if answer else []
            if missing:
                raise MissingProcesses(missing)
        except (OSError, ValueError) as error:  # not started yet, or jax of an earlier start is still on the port
            reason = str(error)
        time.sleep(min(0.2, max(deadline - time.monotonic(), 0)))
    raise MissingProcesses([0], reason)
