"""How close the LLM client comes to an infinitely fast one: the calls of a UGM run, against a stand-in endpoint.

1,000 users in 20 groups make 1 summary, 20 initial profiles, 1,200 matches and 20 final profiles, one phase after
the other. The endpoint (a process of its own) answers after log-normal latencies, as real models do; the ideal is the
sum over the phases of what a client would need that itself takes no time. A second run meets 5 % 429s, 2 % 500s, 1 %
hung connections and 1 % cut-off answers. `python benchmarks/ugm_calls.py [--json FILE]`; times exclude the start of Ray
and of the client actors, which is printed beside them.
"""

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import standin_llm
from standin_llm import StandinConfig

from gubs.llm.calls import LLMRequest, question
from gubs.llm.client import LLMClient
from gubs.llm.settings import EndpointSettings, LLMSettings

FAULTS = {"429": 0.05, "500": 0.02, "hang": 0.01, "cut": 0.01}
MAX_RATIO, MAX_RATIO_FAULTS, MAX_CPU_MS = 1.15, 1.5, 3.0
_LOREM = "watched 83 % of a video about slow cooking, skipped one about cars after two seconds, liked a clip; "


def phases(users: int, groups: int, matches: int) -> list[list[LLMRequest]]:
    """The requests of a UGM run, phase by phase, with prompts of about the true lengths."""

    def one(role: str, label: str, characters: int) -> LLMRequest:
        return question(role, label, f"{label}\n{_LOREM * (characters // len(_LOREM) + 1)}", system="You judge users.")

    return [
        [one("summarizer", "summary", users * 60)],
        [one("profiler", f"initial/{g}", 6000) for g in range(groups)],
        [one("matcher", f"match/{m}", 2000) for m in range(matches)],
        [one("profiler", f"final/{g}", 12000) for g in range(groups)],
    ]


def run(config: StandinConfig, batches: Sequence[Sequence[LLMRequest]], args: argparse.Namespace) -> dict[str, Any]:
    """One run; wall and CPU times in seconds, and what the endpoint counted."""
    with standin_llm.running(config) as url, tempfile.TemporaryDirectory() as folder:
        endpoint = EndpointSettings(base_url=f"{url}/v1", model="stand-in", max_concurrency=args.concurrency)
        settings = LLMSettings(endpoints={"default": endpoint}, actors=args.actors)
        began = time.perf_counter()
        with LLMClient(settings, folder) as client:
            client.start()
            start_s, start_cpu_s = time.perf_counter() - began, client.counts.cpu_s
            wall, cpu, walls, lost = time.perf_counter(), time.process_time(), [], 0
            for batch in batches:
                phase = time.perf_counter()
                lost += sum(not a.ok for a in client.ask(batch))
                walls.append(round(time.perf_counter() - phase, 2))
            return {
                "wall_s": time.perf_counter() - wall,
                "phases_s": walls,
                "lost": lost,
                "driver_cpu_s": time.process_time() - cpu,
                "actors_cpu_s": client.counts.cpu_s - start_cpu_s,
                "start_s": start_s,
                "start_cpu_s": start_cpu_s,
                "retried": client.counts.retried,
                "second_copies": client.counts.copies,
            }


def bare_cpu_ms(config: StandinConfig, batch: Sequence[LLMRequest]) -> float:
    """CPU of a call made with nothing but the OpenAI client: no actors, no journal, no retries. In milliseconds.

    The same work takes up to twice the CPU time on a machine that others use too: this is the machine's part.
    """
    import httpx2
    import openai

    async def main(url: str) -> float:
        connections = httpx2.Limits(max_connections=len(batch), max_keepalive_connections=len(batch))
        http = openai.DefaultAioHttpClient(limits=connections, timeout=httpx2.Timeout(120))
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=http) as client:
            create: Any = client.chat.completions.create
            await create(model="stand-in", messages=[{"role": "user", "content": "imports"}])
            began = time.process_time()
            await asyncio.gather(*(create(model="stand-in", messages=list(r.messages)) for r in batch))
            return time.process_time() - began

    with standin_llm.running(config) as url:
        return round(1000 * asyncio.run(main(url)) / len(batch), 3)


def measure(args: argparse.Namespace, faults: dict[str, float]) -> dict[str, Any]:
    """A run and its relation to the ideal."""
    config = StandinConfig(median_s=args.median, sigma=args.sigma, seed=args.seed, faults=faults)
    batches = phases(args.users, args.groups, args.matches)
    texts = [[r.messages[-1]["content"] for r in batch] for batch in batches]
    result = run(config, batches, args)
    calls = sum(map(len, batches))
    result["calls"] = calls
    result["ideal_s"] = standin_llm.ideal_s(config, texts, args.concurrency)
    result["ideal_phases_s"] = [round(standin_llm.ideal_s(config, [t], args.concurrency), 2) for t in texts]
    result["ratio"] = result["wall_s"] / result["ideal_s"]
    result["cpu_ms_per_call"] = 1000 * (result["driver_cpu_s"] + result["actors_cpu_s"]) / calls
    return {k: round(v, 3) if isinstance(v, float) else v for k, v in result.items()}


def report(name: str, result: dict[str, Any], max_ratio: float, max_cpu_ms: float | None) -> None:
    """Prints a run."""
    cpu = f"{result['cpu_ms_per_call']:.2f} ms" + (f" (target {max_cpu_ms})" if max_cpu_ms else "")
    print(
        f"{name}: {result['calls']} calls in {result['wall_s']:.1f} s; ideal {result['ideal_s']:.1f} s; "
        f"ratio {result['ratio']:.3f} (target {max_ratio}); lost {result['lost']}; client CPU per call {cpu}\n"
        f"  phases {result['phases_s']} s, ideal {result['ideal_phases_s']} s; "
        f"retried {result['retried']}, second copies {result['second_copies']}; "
        f"start {result['start_s']:.1f} s and {result['start_cpu_s']:.1f} s CPU, not counted above"
    )


def main() -> None:
    """Runs without and with faults."""
    import ray

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {
        "users": 1000,
        "groups": 20,
        "matches": 1200,
        "concurrency": 1000,
        "actors": 1,
        "seed": 0,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--median", type=float, default=4.0, help="median latency, seconds")
    parser.add_argument("--sigma", type=float, default=0.5)
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=200 << 20, log_to_driver=False)
    config = StandinConfig(median_s=args.median, sigma=args.sigma, seed=args.seed)
    bare = bare_cpu_ms(config, phases(args.users, args.groups, args.matches)[2])
    healthy = measure(args, {})
    report("healthy endpoint", healthy, MAX_RATIO, MAX_CPU_MS)
    faulty = measure(args, FAULTS)
    report("with faults", faulty, MAX_RATIO_FAULTS, None)
    print(f"the OpenAI client alone, here and now: {bare:.2f} ms CPU per call")
    if args.json:
        args.json.write_text(
            json.dumps(
                {"healthy": healthy, "faults": faulty, "bare_cpu_ms": bare, "settings": vars(args)},
                default=str,
                indent=1,
            )
        )


if __name__ == "__main__":
    main()
