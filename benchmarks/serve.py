"""How many candidates per second the service decides, against vLLM's offline API, and how long requests take.

A run with a filter (`gubs filter --run R`) is served on a head node of its own. Offline: one call of `LLM.generate`
with the same prompts, in a process of its own. Saturation: as many requests at once as the service takes. Both are
measured in turns, so that a machine that slows down does so for both: a round is the service and then the offline
engine, each started anew, since only one of them fits on a GPU. After the last round's saturation comes an open-loop
client: Poisson arrivals computed before, at shares of the saturated rate, latency counted from the scheduled time, so
that waiting clients cannot hide a queue.

    python benchmarks/serve.py --run runs/demo-synthetic --json out.json
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from gubs.artifacts import Run
from gubs.config import Settings, load_settings
from gubs.data.ifvr import IFVR
from gubs.ray_runtime import free_port
from gubs.records import Task
from gubs.serving.control import Control
from gubs.serving.filter import Mode, thoughts_seed
from gubs.stages import FILTER

_IDLE_S = 10.0
PAPER_QPS = 5.3
"""Questions per second on four A100s (paper)."""


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="settings, as for gubs")
    parser.add_argument("--modes", nargs="*", default=["reason", "score"])
    parser.add_argument("--candidates", type=int, default=20, help="per request")
    parser.add_argument("--requests", type=int, default=100, help="when saturated")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each open-loop measurement")
    parser.add_argument("--rounds", type=int, default=3, help="of the service and the offline engine, in turns")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--gpus", action="store_true", help="give each replica a GPU, and the offline engine too")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--skip", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker: Any = _WORKERS[args.worker[0]]
        print(json.dumps(worker(args, *args.worker[1:])))
        return
    results = _measured(args, load_settings(args.preset, args.set))
    _print(results, args)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


def _measured(args: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    """The figures of all rounds; each mode has pairs of user and video of its own, the same in each round."""
    results: dict[str, Any] = {mode: {"offline": [], "saturated": []} for mode in args.modes}
    first = {mode: 2 * args.requests * place for place, mode in enumerate(args.modes)}
    for number in range(args.rounds):
        with _service(args, settings) as url:
            for mode in args.modes:
                args.skip = first[mode]
                _load(args, url, mode, "0")  # compiles, and reads users and videos for the first time
                args.skip += args.requests  # other pairs than before
                results[mode]["saturated"].append(_load(args, url, mode, "0"))
            if number == args.rounds - 1:
                args.skip = 2 * args.requests * len(args.modes)
                _open_loop(args, url, results)
                results["overhead"] = _overhead(args, url)
        for mode in args.modes:
            args.skip = first[mode]
            results[mode]["offline"].append(_worker(args, "offline", mode))
    return results


def _open_loop(args: argparse.Namespace, url: str, results: dict[str, Any]) -> None:
    """Adds how long requests take at shares of the saturated rate."""
    for mode in args.modes:
        rate = statistics.median(r["requests_per_second"] for r in results[mode]["saturated"])
        results[mode]["open"] = {}
        for share in (0.5, 0.8, 1.2):
            results[mode]["open"][share] = _load(args, url, mode, str(rate * share))
            args.skip += args.requests


def _print(results: dict[str, Any], args: argparse.Namespace) -> None:
    for mode in args.modes:
        r = results[mode]
        offline = statistics.median(o["per_second"] for o in r["offline"])
        served = statistics.median(s["candidates_per_second"] for s in r["saturated"])
        hits = statistics.median(s["prefix_hits"] for s in r["saturated"])
        print(
            f"{mode}: {served:.1f} candidates/s served, {offline:.1f} offline: {served / offline:.2f}; prefix hits "
            f"{100 * hits:.0f} %; {served / PAPER_QPS:.1f} x the paper's {PAPER_QPS} QPS on four A100s"
        )
        for share, o in r["open"].items():
            latency = ", ".join(f"{name} {o[f'{name}_ms']:.0f}" for name in ("p50", "p95", "p99"))
            refused = f"{o['refused']} refused (median {o['refused_ms']:.0f} ms)"
            counts = f"{o['answered']} answered, {refused}, {o['failed']} failed"
            print(f"  at {float(share):.0%} of capacity: {latency} ms; {counts}")
    overhead = results["overhead"]
    print(
        f"CPU of proxy and ingress per request: {overhead['cpu_ms']:.1f} ms, and {overhead['idle_ms_per_s']:.0f} ms "
        "per second when idle"
    )


class _service:  # noqa: N801 - used as a context manager
    """The service on a head node; ends both."""

    def __init__(self, args: argparse.Namespace, settings: Settings):
        self._args, self._settings = args, settings

    def __enter__(self) -> str:
        from gubs.jobs import _serving_head

        self._head = _serving_head(self._settings.serving)
        address = self._head.__enter__()
        port = free_port()
        changes = {
            "insecure": True,
            "port": port,
            "min_replicas": self._args.replicas,
            "max_replicas": self._args.replicas,
        }
        serving = self._settings.serving.model_copy(update=changes)
        artifact = Run(self._args.run.resolve()).artifact(FILTER)
        Control(address).deploy(artifact.uri, artifact.content, serving, gpus=self._args.gpus)
        return f"http://127.0.0.1:{port}"

    def __exit__(self, *error: Any) -> None:
        self._head.__exit__(*error)


def _worker(args: argparse.Namespace, *words: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--run", str(args.run), "--preset", args.preset, "--set", *args.set]
    command += ["--candidates", str(args.candidates), "--requests", str(args.requests)]
    command += ["--seconds", str(args.seconds), "--skip", str(args.skip), "--worker", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{words} failed:\n{done.stderr[-3000:]}")
    measured: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return measured


def _load(args: argparse.Namespace, url: str, mode: str, rate: str) -> dict[str, Any]:
    return _worker(args, "load", url, mode, rate)


def _bodies(args: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    """Users in turn, each with other videos than the time before, until all are through; the first ones are left out.
    The part of a prompt about the user is then in the engine's cache, as in a service, and the video is not.
    """
    ifvr = IFVR(Run(args.run.resolve()))
    users, videos, rng = list(ifvr.users), list(ifvr.videos), random.Random(1)
    rng.shuffle(users)
    order = {user: rng.sample(videos, len(videos)) for user in users}
    for number in itertools.count(args.skip):
        turn, place = divmod(number, len(users))
        own_videos = order[users[place]]
        yield users[place], [own_videos[(turn * args.candidates + k) % len(own_videos)] for k in range(args.candidates)]


def offline(args: argparse.Namespace, mode: str) -> dict[str, Any]:
    """The same prompts in one call of vLLM's offline API, encoded beforehand, after those that the service had read."""
    from gubs.serving.bundle import Bundle
    from gubs.serving.engine import engine_shape
    from gubs.ufm.inputs import Inputs
    from gubs.ufm.labels import Labels
    from gubs.ufm.predict import Query, request_of
    from gubs.ufm.prompting import PromptBuilder
    from gubs.ufm.rollout import Engine

    bundle = Bundle(str(args.run.resolve() / FILTER))
    config = bundle.config
    inputs, builder = Inputs(bundle.local_policy(), config.inputs), PromptBuilder(config.inputs, config.pictures)
    labels = Labels.of(inputs, Task.SEQUENTIAL)
    thoughts = config.thoughts if mode == Mode.REASON else 1
    heat = 1.0 if thoughts > 1 else 0.0

    def encoded(bodies: Iterator[tuple[str, list[str]]]) -> Iterator[Any]:
        for user, videos in itertools.islice(bodies, args.requests):
            person = bundle.person(user, Task.SEQUENTIAL)
            assert person
            for video in videos:
                record = bundle.video(video)
                assert record
                prompt = builder.about_user(Task.SEQUENTIAL, person, record, bundle.pictures.clip(video))
                seed = thoughts_seed(bundle.version, Task.SEQUENTIAL, prompt)
                request = request_of(inputs, Query(None, prompt, seed, heat, labels, score=mode == Mode.SCORE))
                assert request
                yield from (replace(request, seed=seed + k) for k in range(thoughts))

    bodies = _bodies(args)
    before, requests = list(encoded(bodies)), list(encoded(bodies))
    engine = Engine(engine_shape(bundle, load_settings(args.preset, args.set).serving))
    engine.generate(before)
    prompts, parameters = engine._prepared(requests, None)
    began = time.perf_counter()
    engine._llm.generate(prompts, parameters, use_tqdm=False)
    return {"per_second": len(requests) / thoughts / (time.perf_counter() - began)}


def load(args: argparse.Namespace, url: str, mode: str, rate: str) -> dict[str, Any]:
    """Requests at a rate (0: as many at once as the service takes)."""
    return asyncio.run(_saturate(args, url, mode) if float(rate) == 0 else _arrive(args, url, mode, float(rate)))


async def _saturate(args: argparse.Namespace, url: str, mode: str) -> dict[str, Any]:
    bodies, left, usage = _bodies(args), args.requests, [0, 0]

    async def line(session: aiohttp.ClientSession) -> None:
        nonlocal left
        while left > 0:
            left -= 1
            body = _request(*next(bodies), mode)
            while True:
                status, answer = await _post(session, url, body)
                if status == 200:
                    usage[0] += answer["usage"]["cached_tokens"]
                    usage[1] += answer["usage"]["prompt_tokens"]
                    break
                if status not in (429, 503):
                    raise SystemExit(f"status {status}: {answer}")
                await asyncio.sleep(0.05)

    async with aiohttp.ClientSession() as session:
        began = time.perf_counter()
        await asyncio.gather(*(line(session) for _ in range(16)))
        seconds = time.perf_counter() - began
    return {
        "requests_per_second": args.requests / seconds,
        "candidates_per_second": args.requests * args.candidates / seconds,
        "prefix_hits": usage[0] / max(1, usage[1]),
    }


async def _arrive(args: argparse.Namespace, url: str, mode: str, rate: float) -> dict[str, Any]:
    rng, bodies = random.Random(2), _bodies(args)
    times, at = [], 0.0
    while at < args.seconds:
        at += rng.expovariate(rate)
        times.append(at)
    outcomes: list[tuple[int, float]] = []

    async def one(session: aiohttp.ClientSession, scheduled: float, body: dict[str, Any]) -> None:
        await asyncio.sleep(max(0.0, began + scheduled - time.perf_counter()))
        status, _ = await _post(session, url, body)
        outcomes.append((status, time.perf_counter() - began - scheduled))

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        began = time.perf_counter()
        await asyncio.gather(*(one(session, t, _request(*next(bodies), mode)) for t in times))
    answered = sorted(s for status, s in outcomes if status == 200) or [float("nan")]
    refused = [s for status, s in outcomes if status in (429, 503)]
    return {
        "rate": rate,
        "answered": len([s for s in answered if s == s]),
        "refused": len(refused),
        "failed": len(outcomes) - len(refused) - len([s for s in answered if s == s]),
        **{f"p{p}_ms": 1e3 * answered[min(len(answered) - 1, int(p / 100 * len(answered)))] for p in (50, 95, 99)},
        "refused_ms": 1e3 * statistics.median(refused) if refused else 0.0,
    }


def _request(user: str, videos: list[str], mode: str) -> dict[str, Any]:
    return {"user": {"id": user}, "mode": mode, "candidates": [{"id": v} for v in videos], "explain": False}


async def _post(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    try:
        async with session.post(f"{url}/v1/filter", json=body, timeout=aiohttp.ClientTimeout(120)) as response:
            return response.status, await response.json()
    except (aiohttp.ClientError, TimeoutError):
        return 0, {}


def _overhead(args: argparse.Namespace, url: str) -> dict[str, Any]:
    """CPU time of Serve's proxy and the ingress per request, less what they take when idle."""
    names = ("ProxyActor", "ServeReplica:ingress")
    processes = [
        p for p in psutil.process_iter(["cmdline"]) if any(n in " ".join(p.info["cmdline"] or []) for n in names)
    ]

    def spent() -> float:
        return sum(sum(p.cpu_times()[:2]) for p in processes)

    before = spent()
    time.sleep(_IDLE_S)
    idle = (spent() - before) / _IDLE_S
    before, began = spent(), time.perf_counter()
    measured = _load(args, url, args.modes[-1], "0")
    seconds = time.perf_counter() - began
    busy = spent() - before - idle * seconds
    return {"cpu_ms": 1e3 * busy / args.requests, "idle_ms_per_s": 1e3 * idle, "processes": len(processes), **measured}


_WORKERS = {"offline": offline, "load": load}

if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
