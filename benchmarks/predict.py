"""Is the Predictor's memory flat, and is it as fast as vLLM's own offline API on the same requests?

Questions about a simulated app's test users, with frames, greedy. Memory: peak RSS of all processes (shared pages are
counted once per process) for a small and a large number of questions. Speed: answers per second of the Predictor and
of one `LLM.generate` call with the same encoded requests, each in a process of its own, in turns; the engines are
loaded and warm, and the prompts are drawn (text and uint8 frames), before the clock starts. The Predictor still encodes
them while its engine answers; vLLM gets encoded requests. A third figure has no counterpart in vLLM: the Predictor when
it also draws the prompts meanwhile, from the data set's tables and the frame store.

    python benchmarks/predict.py --work /tmp/predict --json out.json
"""

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil

from gubs.artifacts import Run
from gubs.config import Settings, load_settings
from gubs.ray_runtime import ray_session
from gubs.records import Split, Task
from gubs.stages import make

SETTINGS = ["ufm.model.lessons=0", "ufm.grpo.groups=false", "ufm.rollout.min_new_tokens=40"]
WARM_UP = 64


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of the run")
    parser.add_argument("--counts", type=int, nargs=2, default=[500, 5000], help="questions, few and many")
    parser.add_argument("--asked", type=int, default=1500, help="questions when speed is measured")
    parser.add_argument("--rounds", type=int, default=3, help="times that both are measured in turns")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", nargs=2, metavar=("KIND", "COUNT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    run, settings = Run(args.work / "run"), load_settings("tiny", SETTINGS)
    if args.worker:
        kind, count = args.worker
        print(json.dumps(_WORKERS[kind](run, settings, int(count))))
        return
    make(["frames", "labels"], run, settings)
    few, many = args.counts
    peaks = {n: _measure(args.work, "memory", n) for n in (few, many)}
    for n, result in peaks.items():
        print(f"{n:>6,} questions: peak {result['peak_mib']:.0f} MiB, {result['per_second']:.1f} answers/s", flush=True)
    growth = peaks[many]["peak_mib"] - peaks[few]["peak_mib"]
    print(f"memory grows by {growth:.0f} MiB for {many - few:,} more questions")
    per_second = [_measure(args.work, "offline", args.asked)["per_second"]]
    rounds: list[dict[str, float]] = []
    for _ in range(args.rounds):
        ours, drawing = (_measure(args.work, kind, args.asked)["per_second"] for kind in ("predictor", "drawing"))
        per_second.append(_measure(args.work, "offline", args.asked)["per_second"])
        before, after = per_second[-2:]
        rounds.append({"predictor": ours, "drawing": drawing, "offline": statistics.fmean((before, after))})
        print(
            f"vLLM offline {before:.1f} and {after:.1f} answers/s, Predictor {ours:.1f} ({_ratio(rounds[-1]):.2f}), "
            f"drawing the prompts too {drawing:.1f} ({_ratio(rounds[-1], 'drawing'):.2f})",
            flush=True,
        )
    medians = {kind: statistics.median(_ratio(r, kind) for r in rounds) for kind in ("predictor", "drawing")}
    print(f"median ratio {medians['predictor']:.2f}, drawing too {medians['drawing']:.2f}")
    if args.json:
        results = {"memory": peaks, "growth_mib": growth, "rounds": rounds, "median_ratios": medians}
        args.json.write_text(json.dumps(results, indent=1))


def _ratio(figures: dict[str, float], kind: str = "predictor") -> float:
    return figures[kind] / figures["offline"]


def _measure(work: Path, kind: str, count: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--work", str(work), "--worker", kind, str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{kind} failed:\n{done.stderr[-3000:]}")
    measured: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return measured


class _Asked:
    """Asks about the same targets over and over."""

    def __init__(self, run: Run, settings: Settings):
        from gubs.ufm.questions import Questions

        self._questions = Questions(run, settings.ufm.inputs)
        self._items = self._questions.items(Task.SEQUENTIAL, Split.TEST)
        next(self.prompts(1))  # reads the tables

    def prompts(self, count: int) -> Iterator[Any]:
        """So many prompts."""
        for item in itertools.islice(itertools.cycle(self._items), count):
            yield self._questions.about_user(item.task, item.user_id, item.video_id)


@contextlib.contextmanager
def _warm_predictor(settings: Settings) -> Iterator[Callable[[Iterable[Any]], float]]:
    """A Predictor that has answered a little; gives a function from prompts to answers per second."""
    from gubs.ufm.model import checkpoint
    from gubs.ufm.predict import Predictor, Query

    with ray_session(settings.ray), Predictor(checkpoint(settings.ufm.model), settings.ufm) as predictor:

        def answer(prompts: Iterable[Any]) -> float:
            began = time.perf_counter()
            answers = sum(1 for _ in predictor.stream(Query(i, p) for i, p in enumerate(prompts)))
            return answers / (time.perf_counter() - began)

        yield answer


def predictor(run: Run, settings: Settings, count: int) -> dict[str, float]:
    """Answers by the Predictor to prompts that were drawn beforehand."""
    prompts = list(_Asked(run, settings).prompts(count))
    with _warm_predictor(settings) as answer:
        answer(prompts[:WARM_UP])
        return {"per_second": answer(prompts)}


def drawing(run: Run, settings: Settings, count: int) -> dict[str, float]:
    """The same, and the prompts are drawn while the engine answers."""
    asked = _Asked(run, settings)
    with _warm_predictor(settings) as answer:
        answer(asked.prompts(WARM_UP))
        return {"per_second": answer(asked.prompts(count))}


def memory(run: Run, settings: Settings, count: int) -> dict[str, float]:
    """The same as `drawing`, with the peak of this process and all that it started; looking at it takes time."""
    asked = _Asked(run, settings)
    with _warm_predictor(settings) as answer:
        answer(asked.prompts(WARM_UP))
        with _PeakMemory() as peak:
            per_second = answer(asked.prompts(count))
    return {"per_second": per_second, "peak_mib": peak.peak / 2**20}


def offline(run: Run, settings: Settings, count: int) -> dict[str, float]:
    """The same requests in one call of vLLM's offline API, encoded beforehand."""
    from gubs.ufm.inputs import Inputs
    from gubs.ufm.model import checkpoint
    from gubs.ufm.rollout import Engine, Request, Shape

    ufm = settings.ufm
    folder = str(checkpoint(ufm.model))
    inputs, engine = Inputs(folder, ufm.inputs), Engine(Shape(folder, ufm.model, ufm.inputs, ufm.rollout))
    prompts = _Asked(run, settings).prompts(count)
    requests = [Request(inputs.for_engine(inputs.encode(p)), 0, 0.0) for p in prompts]
    engine.generate(requests[:WARM_UP])
    engine_prompts, parameters = engine._prepared(requests, None)
    began = time.perf_counter()
    engine._llm.generate(engine_prompts, parameters, use_tqdm=False)
    return {"per_second": count / (time.perf_counter() - began)}


class _PeakMemory:
    """Samples the RSS of this process and its children."""

    def __init__(self) -> None:
        self.peak = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "_PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(0.25):
            total = 0
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    total += process.memory_info().rss
            self.peak = max(self.peak, total)


_WORKERS = {"predictor": predictor, "drawing": drawing, "memory": memory, "offline": offline}

if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
