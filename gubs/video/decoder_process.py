"""A decoder in its own process, which may hang, crash or run out of memory without harm to anything else.

The process serves many files, one after the other, over a socket. Its address space and its time per file are limited;
if it exceeds either, it is killed, the file gets its verdict, and a new process serves the next file. It ends when its
parent does: the socket closes, the kernel signals it, and an alarm ends it even if it hangs.
"""

import contextlib
import ctypes
import os
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from time import monotonic

import gubs
from gubs.errors import PlatformError
from gubs.video.decoded import Decoded, DecodeOptions, Verdict

START_TIMEOUT_S = 120.0
"""Time limit for a decoder process to start; a loaded machine imports slowly."""

START_ATTEMPTS = 3
"""Attempts to start a process that is killed before it is ready, for example by a kernel short of memory."""

PIPELINE = 2
"""Files that a decoder process has at once: one in work and one waiting, so that it never idles."""

_STDERR_LIMIT = 1 << 20
_ALARM_SLACK_S = 5
_PR_SET_PDEATHSIG = 1
_KEEP_MEMORY = dict.fromkeys(("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"), str(64 << 20))
"""Without these, glibc returns the pictures' memory to the system and gets it back, some hundred page faults per
video."""
_OUT_OF_MEMORY = re.compile(rb"bad_alloc|Cannot allocate memory|MemoryError|[Oo]ut of memory")


class DecoderProcess:
    """Decodes files one by one, with at most `PIPELINE` submitted at a time; results come in the order of `submit`."""

    def __init__(self, options: DecodeOptions, timeout_s: float = 60.0, memory_mb: int = 2048):
        """Starts nothing before the first file.

        Args:
            options: what to take from each file.
            timeout_s: time limit per file, in seconds.
            memory_mb: address space in MiB that decoding may use beyond that of the idle process.
        """
        self.options, self.timeout_s, self.memory_mb = options, timeout_s, memory_mb
        self.restarts = 0
        """Number of processes that had to be replaced."""
        self._process: subprocess.Popen[bytes] | None = None
        self._waiting: deque[str] = deque()

    @property
    def pid(self) -> int | None:
        """Process id; None if no process runs."""
        return self._process.pid if self._process else None

    def submit(self, path: str) -> None:
        """Sends a file to the process.

        Raises:
            PlatformError: no decoder process can be started.
        """
        self._waiting.append(path)
        self.start()
        with contextlib.suppress(OSError):  # it died: `result` notices and starts another
            self._connection.send(path)

    def result(self) -> Decoded:
        """Waits for the result of the oldest submitted file, up to the time limit.

        Raises:
            PlatformError: no decoder process can be started.
        """
        started = monotonic()
        try:
            if not self._connection.poll(self.timeout_s):
                return self._replace(Verdict.TIMEOUT, f"no result after {self.timeout_s:g} s")
            decoded: Decoded = self._connection.recv()
        except BlockingIOError:
            return self._replace(Verdict.TIMEOUT, f"stopped in the middle of its result, {monotonic() - started:.0f} s")
        except (EOFError, OSError):
            return self._replace(Verdict.CRASHED, "the decoder process died")
        self._waiting.popleft()
        return decoded

    def decode(self, path: str) -> Decoded:
        """Decodes one file."""
        self.submit(path)
        return self.result()

    def close(self) -> None:
        """Ends the process; a later `submit` starts another."""
        if self._process is not None:
            self._connection.close()
            self._process.kill()
            self._process.wait()
            self._stderr.close()
            self._process = None

    def _replace(self, verdict: Verdict, detail: str) -> Decoded:
        """Kills the process because of its current file and submits the files behind it to a new one."""
        assert self._process is not None
        if verdict is Verdict.CRASHED:
            exit_reason = self._exit_reason()
            if self._process.returncode == -signal.SIGALRM:
                verdict, detail = Verdict.TIMEOUT, "its alarm went off"
            else:
                detail = f"{detail} ({exit_reason})"
        stderr = self._stderr_tail()
        if verdict is Verdict.CRASHED and _OUT_OF_MEMORY.search(stderr):
            verdict = Verdict.TOO_LARGE
        self.close()
        self.restarts += 1
        _, *paths = self._waiting
        self._waiting.clear()
        for path in paths:
            self.submit(path)
        last_lines = " | ".join(stderr.decode(errors="replace").splitlines()[-3:])
        return Decoded(verdict, f"{detail}: {last_lines}"[:500] if last_lines else detail)

    def start(self) -> None:
        """Starts the process, if none runs, and waits until it is ready.

        Raises:
            PlatformError: it does not start.
        """
        if self._process is not None:
            return
        for _ in range(START_ATTEMPTS):
            process = self._launch()
            if self._is_ready():
                return
            exit_reason, stderr = self._exit_reason(), self._stderr_tail().decode(errors="replace").strip()
            killed = (process.poll() or 0) < 0
            self.close()
            if not killed:  # another attempt would end the same way
                break
        message = stderr or "it printed nothing; check the machine with `gubs doctor`"
        raise PlatformError(f"the decoder process does not start ({exit_reason}): {message}")

    def _launch(self) -> subprocess.Popen[bytes]:
        parent, child = socket.socketpair()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        with child:
            self._process = subprocess.Popen(
                self._command(child.fileno()),
                pass_fds=[child.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._stderr,
                stderr=self._stderr,
                env=_environment(),
                cwd="/",
            )
        seconds = max(self.timeout_s, 1.0)
        timeval = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            parent.setsockopt(socket.SOL_SOCKET, option, timeval)
        self._connection = Connection(parent.detach())
        return self._process

    def _command(self, fd: int) -> list[str]:
        parent = os.getpid() if threading.current_thread() is threading.main_thread() else 0
        arguments = (fd, self.memory_mb, self.timeout_s + _ALARM_SLACK_S, parent)
        return [sys.executable, "-m", "gubs.video.decoder_process", *map(str, arguments)]

    def _is_ready(self) -> bool:
        """Sends the options to the process and waits until it has read them."""
        try:
            self._connection.send(self.options)
            return self._connection.poll(START_TIMEOUT_S) and self._connection.recv() == "ready"
        except (EOFError, OSError):
            return False

    def _exit_reason(self) -> str:
        """How the process ended; one that is about to end gets two seconds for it."""
        assert self._process is not None
        try:
            code = self._process.wait(2)
        except subprocess.TimeoutExpired:
            return "it is still running"
        return (signal.strsignal(-code) or f"signal {-code}") if code < 0 else f"exit code {code}"

    def _stderr_tail(self) -> bytes:
        size = os.fstat(self._stderr.fileno()).st_size
        return os.pread(self._stderr.fileno(), 4096, max(0, size - 4096))


def _environment() -> dict[str, str]:
    """The parent's, with one thread per library and with this package on the path."""
    package = str(Path(gubs.__file__).parent.parent)
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {**os.environ, **one_thread, **_KEEP_MEMORY, "PYTHONPATH": os.pathsep.join(paths)}


def _serve(connection: Connection, memory_mb: int, alarm_s: float) -> None:
    """The child's loop: a path in, a `Decoded` out."""
    from gubs.video.decode import decode  # decoders are heavy, and the parent needs none

    options = connection.recv()
    _limit_memory(memory_mb)
    connection.send("ready")
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    while True:
        path = connection.recv()
        if os.fstat(2).st_size > _STDERR_LIMIT // 2:
            os.ftruncate(2, 0)
        signal.setitimer(signal.ITIMER_REAL, alarm_s)
        decoded = decode(path, options, stderr_size=lambda: os.fstat(2).st_size, loading=_uncapped)
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send(replace(decoded, detail=decoded.detail.replace("\n", " ")[:500]))


def _limit_memory(memory_mb: int) -> None:
    """Caps the address space, counted from its present size, and the log; writes to a full log are dropped."""
    _cap(_address_space() + memory_mb * 2**20)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (_STDERR_LIMIT, _STDERR_LIMIT))


@contextlib.contextmanager
def _uncapped() -> Iterator[None]:
    """Raises the cap by the memory that is allocated inside."""
    cap, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = _address_space()
    _cap(hard)
    try:
        yield
    finally:
        _cap(cap + max(0, _address_space() - before))


def _cap(limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _main() -> None:
    fd, memory_mb, alarm_s, parent = sys.argv[1:]
    if parent != "0":  # only if the thread that started this process lives as long as its own process
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(parent):
            return  # the parent has ended already
    with contextlib.suppress(EOFError, ConnectionError):  # the parent has ended or closed the connection
        _serve(Connection(int(fd)), int(memory_mb), float(alarm_s))


if __name__ == "__main__":
    _main()
