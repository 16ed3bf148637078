"""A filter with a model that was never trained: `python benchmarks/gpu/filter.py --run RUN --model FOLDER`.

For `benchmarks/serve.py`, which measures the whole service. What the filter decides is drawn at random and means
nothing; how long an answer takes is that of the model: every thought has `--tokens` tokens.
"""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runs import settings


def main() -> None:
    """Makes the artifact `filter` of the run."""
    from gubs.artifacts import Run
    from gubs.serving import stage
    from gubs.serving.bundle import CONFIG, Bundle, write_config
    from gubs.serving.filter import Mode
    from gubs.stages import FILTER, make

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="see runs.py")
    parser.add_argument("--model", type=Path, required=True, help="a released Qwen2.5-VL, or see random_model.py")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of every thought")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("settings", nargs="*", help="key=value")
    args = parser.parse_args()
    module: Any = stage
    module._ask = drawn  # a model without training names no option
    module._refusal = lambda *_: ""
    loaded = settings(
        f"ufm.model.path={args.model}",
        f"ufm.model.dtype={args.dtype}",
        f"ufm.inputs.max_new_tokens={args.tokens}",
        f"ufm.rollout.min_new_tokens={args.tokens}",
        "ufm.distil.enabled=false",
        "serving.policy=base",
        *args.settings,
    )
    run = Run(args.run)
    make([FILTER], run, loaded, force=True)
    bundle = Bundle(run.path(FILTER))  # both modes may be asked, though nothing was distilled
    write_config(run.path(FILTER, CONFIG), bundle.config.model_copy(update={"modes": tuple(Mode)}), run.fs)


def drawn(items: Sequence[Any], *_: Any) -> Any:
    """Probabilities at random in place of the policy's, for both modes."""
    from gubs.records import TASK_OPTIONS
    from gubs.serving.filter import Mode
    from gubs.ufm.labels import OptionProbabilities

    rng = random.Random(0)

    def one(item: Any) -> OptionProbabilities:
        values = {option: rng.random() for option in TASK_OPTIONS[item.task]}
        total = sum(values.values())
        return OptionProbabilities({option: value / total for option, value in values.items()}, 1.0)

    return {mode: [one(item) for item in items] for mode in Mode}


if __name__ == "__main__":
    main()
