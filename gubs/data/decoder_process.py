"""A decoder in a process of its own, which may hang, crash or run out of memory without harm to anyone else.

The process serves many files, one after the other, over a socket. It is given a limit of address space, and a time for
each file; when it breaks either it is killed, the file gets its verdict, and a new process is started for the next. It
ends when its parent does: the socket closes, the kernel signals it, and an alarm ends it even in the middle of a hang.
"""

import contextlib
import ctypes
import os
import re
import resource
import signal
import socket
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
from gubs.data.decoded import Decoded, DecodeOptions, Verdict
from gubs.errors import PlatformError

START_TIMEOUT_S = 120.0
"""Time a decoder process may take to come up; a loaded machine imports slowly."""

START_ATTEMPTS = 3
"""Times a process is started that something kills before it is ready, as a kernel short of memory does."""

PIPELINE = 2
"""Files a decoder process may hold at once: one in work, one waiting, so that it never idles."""

_STDERR_LIMIT = 1 << 20
_ALARM_SLACK_S = 5
_PR_SET_PDEATHSIG = 1
_KEEP_MEMORY = dict.fromkeys(("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"), str(64 << 20))
"""glibc gives pictures back to the system and faults them in again, some hundred pages a video, unless told not to."""
_OUT_OF_MEMORY = re.compile(rb"bad_alloc|Cannot allocate memory|MemoryError|[Oo]ut of memory")


class DecoderProcess:
    """Decodes files one by one, at most `PIPELINE` handed over at a time; results come in the order of `submit`."""

    def __init__(self, options: DecodeOptions, timeout_s: float = 60.0, memory_mb: int = 2048):
        """Nothing starts before the first file.

        Args:
            options: what to take from each file.
            timeout_s: seconds one file may take.
            memory_mb: address space in MiB that decoding may take beyond what the idle process has.
        """
        self.options, self.timeout_s, self.memory_mb = options, timeout_s, memory_mb
        self.restarts = 0
        """How often a process had to be replaced."""
        self._process: subprocess.Popen[bytes] | None = None
        self._waiting: deque[str] = deque()

    @property
    def pid(self) -> int | None:
        """Process id, while there is a process."""
        return self._process.pid if self._process else None

    @property
    def waiting(self) -> int:
        """Files handed over whose result has not been taken."""
        return len(self._waiting)

    def submit(self, path: str) -> None:
        """Hands over a file.

        Raises:
            PlatformError: no decoder process can be started.
        """
        self._waiting.append(path)
        self.start()
        with contextlib.suppress(OSError):  # it died: `result` finds out and starts the next
            self._connection.send(path)

    def result(self) -> Decoded:
        """Waits for the result of the oldest file handed over, no longer than the time limit.

        Raises:
            PlatformError: no decoder process can be started.
        """
        started = monotonic()
        try:
            if not self._connection.poll(self.timeout_s):
                return self._replace(Verdict.TIMEOUT, f"no result after {self.timeout_s:g} s")
            done: Decoded = self._connection.recv()
        except BlockingIOError:
            return self._replace(Verdict.TIMEOUT, f"stopped in the middle of its result, {monotonic() - started:.0f} s")
        except (EOFError, OSError):
            return self._replace(Verdict.CRASHED, "the decoder process died")
        self._waiting.popleft()
        return done

    def decode(self, path: str) -> Decoded:
        """Decodes one file."""
        self.submit(path)
        return self.result()

    def close(self) -> None:
        """Ends the process; the object may be used again."""
        if self._process is not None:
            self._connection.close()
            self._process.kill()
            self._process.wait()
            self._stderr.close()
            self._process = None

    def _replace(self, verdict: Verdict, detail: str) -> Decoded:
        """Kills the process over its present file and gives the files behind that to a new one."""
        assert self._process is not None
        if verdict is Verdict.CRASHED:
            ended = self._how_it_ended()
            if self._process.returncode == -signal.SIGALRM:
                verdict, detail = Verdict.TIMEOUT, "its alarm went off"
            else:
                detail = f"{detail} ({ended})"
        last_words = self._last_words()
        if verdict is Verdict.CRASHED and _OUT_OF_MEMORY.search(last_words):
            verdict = Verdict.TOO_LARGE
        self.close()
        self.restarts += 1
        self._waiting.popleft()
        for path in [self._waiting.popleft() for _ in range(len(self._waiting))]:
            self.submit(path)
        said = " | ".join(last_words.decode(errors="replace").splitlines()[-3:])
        return Decoded(verdict, f"{detail}: {said}"[:500] if said else detail)

    def start(self) -> None:
        """Starts the process, if there is none, and waits until it is ready.

        Raises:
            PlatformError: it does not come up.
        """
        if self._process is not None:
            return
        for _ in range(START_ATTEMPTS):
            process = self._launch()
            if self._is_ready():
                return
            ended, said = self._how_it_ended(), self._last_words().decode(errors="replace").strip()
            killed = (process.poll() or 0) < 0
            self.close()
            if not killed:  # it would end so again
                break
        raise PlatformError(f"the decoder process does not start ({ended}): {said or 'it says nothing'}")

    def _launch(self) -> subprocess.Popen[bytes]:
        ours, theirs = socket.socketpair()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        with theirs:
            self._process = subprocess.Popen(
                self._command(theirs.fileno()),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._stderr,
                stderr=self._stderr,
                env=_environment(),
                cwd="/",
            )
        patience = _timeval(max(self.timeout_s, 1.0))
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            ours.setsockopt(socket.SOL_SOCKET, option, patience)
        self._connection = Connection(ours.detach())
        return self._process

    def _command(self, fd: int) -> list[str]:
        on_main_thread = threading.current_thread() is threading.main_thread()
        alarm = self.timeout_s + _ALARM_SLACK_S
        return [
            *(sys.executable, "-m", "gubs.data.decoder_process"),
            *(str(fd), str(self.memory_mb), f"{alarm:g}", str(os.getpid() if on_main_thread else 0)),
        ]

    def _is_ready(self) -> bool:
        """Tells the process the options and waits until it has read them."""
        try:
            self._connection.send(self.options)
            return self._connection.poll(START_TIMEOUT_S) and self._connection.recv() == "ready"
        except (EOFError, OSError):
            return False

    def _how_it_ended(self) -> str:
        """In words; a process that is about to end is given two seconds to do so."""
        assert self._process is not None
        try:
            code = self._process.wait(2)
        except subprocess.TimeoutExpired:
            return "it still runs"
        return (signal.strsignal(-code) or f"signal {-code}") if code < 0 else f"exit code {code}"

    def _last_words(self) -> bytes:
        size = os.fstat(self._stderr.fileno()).st_size
        return os.pread(self._stderr.fileno(), 4096, max(0, size - 4096))


def _timeval(seconds: float) -> bytes:
    whole = int(seconds)
    return bytes(_Timeval(whole, int((seconds - whole) * 1e6)))


class _Timeval(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("microseconds", ctypes.c_long))


def _environment() -> dict[str, str]:
    """The parent's, with one thread a library and with this package to be found."""
    package = str(Path(gubs.__file__).parent.parent)
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {**os.environ, **one_thread, **_KEEP_MEMORY, "PYTHONPATH": os.pathsep.join(paths)}


def _serve(connection: Connection, memory_mb: int, alarm_s: float) -> None:
    """The child's loop: a path in, a `Decoded` out."""
    from gubs.data.decode import decode  # decoders are heavy; the parent does without

    options = connection.recv()
    _limit_memory(memory_mb)
    connection.send("ready")
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    while True:
        path = connection.recv()
        if os.fstat(2).st_size > _STDERR_LIMIT // 2:
            os.ftruncate(2, 0)
        signal.setitimer(signal.ITIMER_REAL, alarm_s)
        done = decode(path, options, heard=lambda: os.fstat(2).st_size, loading=_uncapped)
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send(replace(done, detail=done.detail.replace("\n", " ")[:500]))


def _limit_memory(memory_mb: int) -> None:
    """Caps the address space, counted from what the process has now, and the log; a full log swallows writes."""
    _cap(_address_space() + memory_mb * 2**20)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (_STDERR_LIMIT, _STDERR_LIMIT))


@contextlib.contextmanager
def _uncapped() -> Iterator[None]:
    """What is loaded in here does not count: the cap moves by as much."""
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
    if parent != "0":  # only where the thread that started us lives as long as its process
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(parent):
            return  # it is gone already
    with contextlib.suppress(EOFError, ConnectionError):  # the parent is gone or has had enough
        _serve(Connection(int(fd)), int(memory_mb), float(alarm_s))


if __name__ == "__main__":
    _main()
