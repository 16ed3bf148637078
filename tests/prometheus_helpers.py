"""Prometheus beside a Ray cluster of the tests: which expressions of the dashboard find data."""

import json
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import yaml

from gubs.ray_runtime import free_port

FAST = {"RAY_metrics_report_interval_ms": "2000", "REPORTER_UPDATE_INTERVAL_MS": "10000"}
"""For the cluster: short jobs end before the ten seconds that Ray waits otherwise."""


class Prometheus:
    """A running server."""

    def __init__(self, url: str):
        self.url, self._began = url, time.time()

    def curves(self, expression: str) -> int:
        """Curves that a panel with this expression draws for the time since the start."""
        query = expression.replace("$__rate_interval", "1m").replace("$run", ".*")
        asked = {"query": query, "start": self._began, "end": time.time(), "step": 2}
        answer = httpx.get(f"{self.url}/api/v1/query_range", params=asked, timeout=20).json()
        assert answer["status"] == "success", (query, answer)
        return sum(any(float(v) == float(v) for _, v in curve["values"]) for curve in answer["data"]["result"])

    def without_data(self, expressions: Sequence[str], within_s: float = 20.0) -> list[str]:
        """The expressions that draw nothing; waits for the latest figures to arrive."""
        until = time.monotonic() + within_s
        while (left := [e for e in expressions if not self.curves(e)]) and time.monotonic() < until:
            time.sleep(1)
        return left


@contextmanager
def scraping(dashboard: str, folder: Path) -> Iterator[Prometheus | None]:
    """Prometheus reads a cluster, which it finds through the dashboard, until the context ends; None if the program
    is not installed.
    """
    program = shutil.which("prometheus")
    if program is None:
        yield None
        return
    url, config = f"http://127.0.0.1:{free_port()}", folder / "prometheus.yml"
    found_by = [{"url": f"{dashboard}/api/prometheus/sd", "refresh_interval": "1s"}]
    jobs = [{"job_name": "ray", "http_sd_configs": found_by}]
    config.write_text(yaml.safe_dump({"global": {"scrape_interval": "2s"}, "scrape_configs": jobs}))
    command = [program, f"--config.file={config}", f"--storage.tsdb.path={folder / 'tsdb'}"]
    command += [f"--web.listen-address={url.removeprefix('http://')}"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        _wait_until_ready(url, process, folder / "prometheus.log")
        yield Prometheus(url)
    finally:
        process.terminate()
        process.wait(20)


def _wait_until_ready(url: str, process: subprocess.Popen, log: Path) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        try:
            if httpx.get(f"{url}/-/ready", timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    raise AssertionError(log.read_text()[-2000:])


def panels(dashboard: str | Path, *rows: str) -> dict[str, list[str]]:
    """Title of each panel in these rows of a dashboard -> its expressions."""
    found: dict[str, list[str]] = {}
    row = ""
    for panel in json.loads(Path(dashboard).read_text())["panels"]:
        if panel["type"] == "row":
            row = panel["title"]
        elif row in rows:
            found[panel["title"]] = [t["expr"] for t in panel["targets"]]
    return found


needs_prometheus = pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed")
