"""Runs a command and ends it, with all it started, as soon as whoever asked for it is gone - however that ended.

`python -m gubs.llm.guard COMMAND...`: standard input is a pipe that only the parent holds open; its end is the signal.
A process killed with SIGKILL cannot clean up after itself, but its end of the pipe closes all the same.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time

_GRACE_S = 10.0


def main(command: list[str]) -> int:
    """Runs the command in a session of its own until it ends or standard input does; returns its exit code.

    The work is done by a process of its own: Ray kills the direct children of a worker that exits (SIGKILL), and
    whoever is to end the command must outlive that.
    """
    keeper = os.fork()
    if not keeper:
        os._exit(_keep(command))
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda number, _: os.kill(keeper, number))
    return os.waitstatus_to_exitcode(os.waitpid(keeper, 0)[1])


def _keep(command: list[str]) -> int:
    os.setsid()  # what is meant for the group of the parent's process must not end the keeper
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_die_with_guard)
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: threading.Thread(target=_end, args=(process,), daemon=True).start())
    threading.Thread(target=_end_with_parent, args=(process,), daemon=True).start()
    code = process.wait()
    _kill(process.pid, signal.SIGKILL)  # whatever the command left behind
    return code if code >= 0 else 128 - code


def _die_with_guard() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a guard killed with SIGKILL cannot end anything


def _end_with_parent(process: "subprocess.Popen[bytes]") -> None:
    while os.read(0, 1):
        pass
    _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    _kill(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + _GRACE_S
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    _kill(process.pid, signal.SIGKILL)


def _kill(group: int, sign: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # already gone
        os.killpg(group, sign)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
