"""What one engine answers per second in modes `reason` and `score`: the service's engine without HTTP around it.

    python benchmarks/gpu/serving.py --run RUN --model FOLDER --json out.jsonl

Users and videos of a run, each pair a request; `reason` writes a fixed number of tokens, `score` reads the options'
probabilities at the first. The second round of `score` finds everything in the caches. `benchmarks/serve.py` measures
the whole service, with a trained filter.
"""

import argparse
import itertools
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from results import GpuMemory, Results
from runs import settings


def main() -> None:
    """Starts the engine and measures."""
    import torch

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="see runs.py")
    parser.add_argument("--model", type=Path, required=True, help="a released Qwen2.5-VL, or see random_model.py")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of every reason")
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("settings", nargs="*", help="key=value")
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    results, memory = Results(args.json), GpuMemory()
    dtype = "bfloat16" if gpu else "float32"
    loaded = settings(f"ufm.model.path={args.model}", f"ufm.model.dtype={dtype}", *args.settings)
    with results.measure("engine starts") as figures:
        engine, reasons, scores, tokens = prepare(args, loaded)
        figures |= {"prompt_tokens": tokens, "peak_gib": memory.peak()}
    engine.generate(reasons[:8])
    for name, requests, cached in (
        ("reason", reasons, False),
        ("score", scores, False),
        ("score, cached", scores, True),
    ):
        with results.measure(name) as figures:
            figures |= measure(engine, requests, cached)
            figures["peak_gib"] = memory.peak()


def prepare(args: argparse.Namespace, loaded: Any) -> tuple[Any, list[Any], list[Any], float]:
    """An engine; the requests of both modes; mean tokens of a prompt."""
    from gubs.artifacts import Run
    from gubs.records import Split, Task
    from gubs.ufm.inputs import Inputs
    from gubs.ufm.labels import Labels
    from gubs.ufm.predict import Query, request_of
    from gubs.ufm.questions import Questions
    from gubs.ufm.rollout import Engine, Shape, alone

    ufm = loaded.ufm
    questions, inputs = Questions(Run(args.run), ufm.inputs), Inputs(args.model, ufm.inputs)
    items = questions.items(Task.SEQUENTIAL, Split.TRAIN)
    users, videos = sorted({i.user_id for i in items}), sorted({i.video_id for i in items})
    pairs = list(itertools.islice(itertools.product(users, videos), args.requests))
    prompts = [questions.about_user(Task.SEQUENTIAL, user, video) for user, video in pairs]
    labels = Labels.of(inputs, Task.SEQUENTIAL)
    reasons = [replace(_asked(request_of(inputs, Query(n, p))), max_tokens=args.tokens) for n, p in enumerate(prompts)]
    scores = [_asked(request_of(inputs, Query(n, p, labels=labels, score=True))) for n, p in enumerate(prompts)]
    rollout = alone(ufm.rollout.model_copy(update={"min_new_tokens": args.tokens}))
    engine = Engine(Shape(str(args.model), ufm.model, ufm.inputs, rollout, largest=questions.largest))
    engine.ready()
    return engine, reasons, scores, sum(len(inputs.encode(p).ids) for p in prompts) / len(prompts)


def measure(engine: Any, requests: list[Any], cached: bool) -> dict[str, float]:
    """All requests in one call."""
    if not cached:
        engine.forget()
    before, began = engine.figures(), time.perf_counter()
    answers = engine.generate(requests)
    seconds = time.perf_counter() - began
    after = engine.figures()
    asked = after["prefix_queries"] - before["prefix_queries"]
    return {
        "requests": len(requests),
        "requests_per_second": len(requests) / seconds,
        "answer_tokens_per_second": sum(len(a.ids) for a in answers) / seconds,
        "prefix_reuse": (after["prefix_hits"] - before["prefix_hits"]) / max(1.0, asked),
    }


def _asked(request: Any) -> Any:
    assert request, "a prompt is longer than ufm.inputs.max_prompt_tokens"
    return request


if __name__ == "__main__":
    main()
