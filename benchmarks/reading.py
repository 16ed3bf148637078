"""How well the tiny model reads after its lessons: held-out lessons, greedy answers, share of facts that are right.

What GA-GRPO can find stands on this: a model that cannot copy a topic or a length cannot tell fitting from long. Facts
are compared as the answers say them: of lessons, and of questions about another app, without pictures, whose topics
have names that no lesson had. Whoever changes prompts, tokenizer or lessons looks here first. With `--run`, the model
is taught that run's own words, and asked about them.

    python benchmarks/reading.py [--model FOLDER | --run RUN] [--lessons 1800] [--json out.json]
"""

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np

from gubs.artifacts import Run
from gubs.prompts.answers import as_answer
from gubs.prompts.people import Person
from gubs.prompts.question import user_prompt
from gubs.records import Option, Task, User, Video
from gubs.teachers import script
from gubs.ufm import lessons
from gubs.ufm import model as models
from gubs.ufm.inputs import Inputs, Prompt
from gubs.ufm.rollout import Engine, Request, Shape
from gubs.ufm.settings import InputSettings, ModelSettings, RolloutSettings
from gubs.ufm.vocabulary import Vocabulary

FACTS = {
    "topic": r'Topic "([^"]*)"',
    "interests": r"Likes ([^.]*)\.",
    "fits": r"It (fits|does not fit)\.",
    "length": r"Length (\d+) s",
    "long": r"(long|short)\.",
    "remark": r"But ([^.]*)\.",
    "digest": r"((?:Skips|Clicks|Likes) \w+, .*)\.",
}
_SEED = 99


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model", type=Path, help="a checkpoint; none = the tiny model, made first where it is not there"
    )
    parser.add_argument("--run", help="a run whose own words are taught and asked about")
    parser.add_argument("--lessons", type=int, default=1800, help="steps of lessons of the tiny model")
    parser.add_argument("--count", type=int, default=400, help="lessons held out")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    began = time.perf_counter()
    words = Vocabulary.of(Run(args.run)) if args.run else None
    folder = args.model or models.checkpoint(ModelSettings(size="tiny", lessons=args.lessons), words=words)
    print(f"{folder}: there after {time.perf_counter() - began:.0f} s", flush=True)
    inputs = Inputs(folder, InputSettings(max_prompt_tokens=1024, max_new_tokens=128))
    model = ModelSettings(dtype="float32", gradient_checkpointing=False)
    engine = Engine(Shape(str(folder), model, inputs.settings, RolloutSettings(kv_cache_gb=0.5, max_num_seqs=96)))
    asked = questions(words, args.count)
    results = {kind: read(engine, inputs, lessons) for kind, lessons in asked.items()}
    names = [*FACTS, "all facts", "form"]
    print(f"{'':10}" + "".join(f"{n:>11}" for n in names))
    for kind, shares in results.items():
        print(f"{kind:10}" + "".join(f"{shares[n]:11.3f}" for n in names))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


def questions(words: Vocabulary | None, count: int) -> dict[str, list[tuple[Prompt, str]]]:
    """Questions with what is to be read in them, by kind."""
    rng = np.random.default_rng([_SEED, 1])
    if words is not None:
        pool = lessons.own_words(words, rng)
        return {"own words": [lessons.lesson(pool, rng) for _ in range(count)]}
    pool = lessons.simulated(rng, count, clips=True)
    held_out = [lessons.lesson(pool, rng) for _ in range(count)]
    return {"lessons": held_out, "new names": [new_names(rng) for _ in range(count)]}


def new_names(rng: np.random.Generator) -> tuple[Prompt, str]:
    """A question with topics that are a word and a number, as some logs have them, and what is to be read in it."""
    names = [f"tag {n}" for n in rng.permutation(100)[:5]]
    listed = names[: int(rng.integers(1, 5))]
    tags = [listed[-1] if rng.random() < 1 / 2 else names[-1]]
    person = Person(User("u", tags=listed), ())
    video = Video("v", None, float(rng.integers(3, 150)), tags=tags)
    answer = as_answer(script.facts(person, video, digest=True).sentences(), Option.A)
    digest = person.tally.digest(video)
    return Prompt(user_prompt(Task.SEQUENTIAL, person, video, tags=True, style="brief", digest=digest), None), answer


def read(engine: Engine, inputs: Inputs, asked: list[tuple[Prompt, str]]) -> dict[str, float]:
    """Share of lessons in which a fact is as it should be; absent facts have to be absent."""
    encoded = [inputs.encode(prompt) for prompt, _ in asked]
    responses = engine.generate([Request(inputs.for_engine(e), seed=0, temperature=0.0) for e in encoded])
    right: dict[str, list[bool]] = {}
    for (_, wanted), response in zip(asked, responses, strict=True):
        answer, _ = inputs.text(response.ids)
        same = {name: _fact(pattern, answer) == _fact(pattern, wanted) for name, pattern in FACTS.items()}
        for name, ok in {**same, "all facts": all(same.values()), "form": "</answer>" in answer}.items():
            right.setdefault(name, []).append(ok)
    return {name: float(np.mean(oks)) for name, oks in right.items()}


def _fact(pattern: str, answer: str) -> Any:
    match = re.search(pattern, answer)
    return match[1] if match else None


if __name__ == "__main__":
    main()
