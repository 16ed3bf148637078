"""Runs a command and ends it, with all it started, as soon as its parent is gone, however the parent ended.

`python -m gubs.llm.parent_watch COMMAND...`: standard input is a pipe that only the parent holds open. A process killed
with SIGKILL cannot clean up after itself, but its end of the pipe closes all the same.
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
_ENDING = (signal.SIGTERM, signal.SIGINT)
"""Signals that end the command. They are blocked until their handlers are in place, so that none is lost before."""


def main(command: list[str]) -> int:
    """Runs the command in its own session until it or standard input ends; returns its exit code.

    A forked process does the work: Ray kills (SIGKILL) the direct children of a worker that exits, and the process that
    has to end the command must survive that.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    keeper = os.fork()
    if not keeper:
        os._exit(_keep(command))
    for name in _ENDING:
        signal.signal(name, lambda number, _: os.kill(keeper, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
    return os.waitstatus_to_exitcode(os.waitpid(keeper, 0)[1])


def _keep(command: list[str]) -> int:
    os.setsid()  # signals to the parent's process group must not end the keeper
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_before_command)
    for name in _ENDING:
        signal.signal(name, lambda *_: threading.Thread(target=_end, args=(process,), daemon=True).start())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
    threading.Thread(target=_end_with_parent, args=(process,), daemon=True).start()
    code = process.wait()
    _kill(process.pid, signal.SIGKILL)  # any processes the command left behind
    return code if code >= 0 else 128 - code


def _before_command() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a keeper killed with SIGKILL cannot end anything


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
