"""`gubs serve` on this machine as a user starts it, but for the engine, and a person who gives commands to it."""

import contextlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import psutil
from node_helpers import wait_for

REPO = Path(__file__).resolve().parent.parent.parent
START_S = 180
"""Seconds for what takes a tenth of them on a quiet machine."""
AUTH = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
RULE = '''

from serving_helpers import RuleEngine  # noqa: E402


class FilterEngine(RuleEngine):
    """Stands in for vLLM's."""

    def __init__(self, bundle, settings):
        super().__init__(word=bundle.config.name.removeprefix("run-"))
'''
JOB = '''"""The job on a filter that is there without what it was made from."""

from gubs import stages
from gubs.jobs import job_main, serve_job

stages.make = lambda *_, **__: None
job_main(serve_job)
'''


class Laptop:
    """The command while it runs."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path, environment: Mapping[str, str]):
        """`environment` has the checkout whose engine answers by a rule."""
        self.process, self.environment, self._folder = process, environment, folder

    @property
    def messages(self) -> str:
        """What it told so far."""
        return (self._folder / "said").read_text()

    @property
    def curl(self) -> str:
        """The command that it printed to try."""
        return (self._folder / "printed").read_text().strip()

    @property
    def dashboard(self) -> str:
        """Address of the head's dashboard."""
        return re.search(r"(http://\S+) the dashboard", self.messages)[1]

    @property
    def token(self) -> str:
        """The cluster's token, which the head node has in its environment."""
        (head,) = self._heads()
        return head.environ()["RAY_AUTH_TOKEN"]

    def interrupt(self) -> int:
        """Ctrl-C; returns the exit code once it has ended."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(timeout=START_S)

    def _heads(self) -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children()
        return [p for p in children if {"start", "--head"} <= set(p.cmdline())]


def with_rule_engine(folder: Path) -> Path:
    """A checkout whose engine answers by a rule, and whose job takes the filter as it is."""
    shutil.copytree(REPO / "gubs", folder / "gubs")
    shutil.copytree(REPO / "ray_jobs", folder / "ray_jobs")
    shutil.copy(Path(__file__).parent / "serving_helpers.py", folder)
    with (folder / "gubs" / "serving" / "engine.py").open("a") as f:
        f.write(RULE)
    (folder / "ray_jobs" / "serve_ufm.py").write_text(JOB)
    return folder


@contextmanager
def serving(folder: Path, *arguments: str) -> Iterator[Laptop]:
    """Runs `gubs serve` with these arguments until the context ends; it is up when the context begins."""
    checkout = with_rule_engine(folder / "checkout")
    env = {n: v for n, v in os.environ.items() if n not in (*AUTH, "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH")}
    env |= {"PYTHONPATH": str(checkout), "HOME": str(folder)}
    command = [sys.executable, "-m", "gubs.cli", "serve", *arguments]
    with (folder / "printed").open("wb") as out, (folder / "said").open("wb") as err:
        process = subprocess.Popen(command, cwd=checkout, env=env, stdout=out, stderr=err)
    laptop = Laptop(process, folder, env)
    try:
        wait_for(lambda: "Ctrl-C" in laptop.messages or process.poll() is not None, START_S, "the service", every_s=0.2)
        assert process.poll() is None, laptop.messages[-4000:]
        yield laptop
    finally:
        if process.poll() is None:
            laptop.interrupt()


def _environment(environment: Mapping[str, str]) -> None:
    os.environ.update(environment)


def _command(words: list[str]) -> tuple[int, str]:
    from gubs.cli import app
    from gubs.jobs import run_app

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            run_app(app, words)
        except SystemExit as e:
            return int(e.code or 0), printed.getvalue()
    raise AssertionError("a command ends with an exit code")


class Person:
    """Gives commands to a cluster with its token, all in one process: most of a command's time is its imports."""

    def __init__(self, address: str, token: str):
        self.environment = {"RAY_API_SERVER_ADDRESS": address, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
        self._pool = ProcessPoolExecutor(1, get_context("spawn"), _environment, (self.environment,))

    def types(self, *words: str, code: int = 0) -> str:
        """What `gubs WORDS` says; it has to end with this exit code."""
        ended, printed = self._pool.submit(_command, list(words)).result(timeout=START_S)
        assert ended == code, printed[-4000:]
        return " ".join(printed.split())

    def leaves(self) -> None:
        """Ends the process."""
        self._pool.shutdown()
