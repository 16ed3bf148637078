"""Filters a whole table: a Ray Data job that asks the policy about every row (user_id, video_id)."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pyarrow as pa

from gubs.errors import InputError
from gubs.records import Task
from gubs.serving.bundle import Bundle
from gubs.serving.filter import Decision, Mode, judge, thoughts_seed
from gubs.ufm.labels import mean_options
from gubs.ufm.prompting import PromptBuilder

if TYPE_CHECKING:
    pass

_BATCH = 512
_RESULTS = pa.schema(
    [
        pa.field("decision", pa.string(), nullable=False),
        ("skip_probability", pa.float64()),
        ("option", pa.string()),
        ("reason", pa.string()),
        ("error", pa.string()),
    ]
)
"""Columns that are added to the table's."""


class BatchFilter:
    """One engine; adds the columns of `_RESULTS` to batches of candidates."""

    def __init__(self, uri: str, task: Task, mode: Mode, threshold: float | None):
        """Loads the filter into this process.

        Raises:
            InputError: the filter does not have this mode.
        """
        from gubs.ufm.inputs import Inputs
        from gubs.ufm.labels import Labels
        from gubs.ufm.rollout import Engine, Shape, alone

        self._bundle = Bundle(uri)
        config, folder = self._bundle.config, self._bundle.local_policy()
        if not config.answers(task, mode):
            raise InputError(f"{uri} does not answer the {task} task in mode {mode} {config.refused}".rstrip())
        self._task, self._mode = task, mode
        self._rule = config.rule(task, mode)
        self._threshold = self._rule.threshold.value if threshold is None else threshold
        self._inputs = Inputs(folder, config.inputs)
        self._labels = Labels.of(self._inputs, task)
        self._prompts = PromptBuilder(config.inputs, config.pictures)
        rollout, pictures = alone(config.rollout), config.pictures
        shape = Shape(str(folder), config.model, config.inputs, rollout, pictures=pictures, largest=config.frames)
        self._engine = Engine(shape)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """The batch with the decisions. Ids are texts: a CSV reader makes numbers of `17`."""
        from gubs.ufm.predict import Query, request_of

        score = self._mode is Mode.SCORE
        samples = 1 if score else self._bundle.config.thoughts
        requests: dict[int, list[Any]] = {}
        rows: list[dict[str, object]] = []
        users, videos = (batch[c].cast(pa.string()).to_pylist() for c in ("user_id", "video_id"))
        for i, (user, video) in enumerate(zip(users, videos, strict=True)):
            person, known = self._bundle.person(user, self._task), self._bundle.video(video)
            rows.append({"decision": str(Decision.KEEP), "error": None if person and known else "unknown"})
            if person and known:
                clip = (
                    self._bundle.pictures.cover(video)
                    if self._task == Task.CLICK
                    else self._bundle.pictures.clip(video)
                )
                prompt = self._prompts.about_user(self._task, person, known, clip)
                seed = thoughts_seed(self._bundle.version, self._task, prompt)
                query = Query(i, prompt, seed, 1.0 if samples > 1 else 0.0, self._labels, score)
                request = request_of(self._inputs, query)
                if request is None:
                    rows[i]["error"] = "too_long"
                else:
                    requests[i] = [replace(request, seed=seed + k) for k in range(samples)]  # as vLLM does for `n`
        answers = iter(self._engine.generate([r for group in requests.values() for r in group]))
        for i, group in requests.items():
            rows[i] = self._row([next(answers) for _ in group])
        added = pa.Table.from_pylist(rows, schema=_RESULTS)
        for name in _RESULTS.names:
            batch = batch.append_column(name, added[name])
        return batch

    def _row(self, responses: Sequence[Any]) -> dict[str, object]:
        from gubs.ufm.predict import read_options

        score = self._mode is Mode.SCORE
        options = mean_options(read_options(self._inputs, self._labels, r, score=score) for r in responses)
        if options is None:
            return {"decision": str(Decision.KEEP), "error": "unreadable"}
        texts = [] if score else [self._inputs.text(r.ids) for r in responses]
        judgement = judge(self._task, self._rule.calibration.options(options), self._threshold, texts)
        return {
            "decision": str(judgement.decision),
            "skip_probability": judgement.skip_probability,
            "option": str(judgement.option),
            "reason": judgement.reason or None,
        }


def filter_table(
    uri: str,
    table: str,
    out: str,
    *,
    task: Task,
    mode: Mode,
    threshold: float | None = None,
    engines: int = 1,
    gpus: bool = False,
) -> dict[str, int]:
    """Filters the candidates in a Parquet or CSV file (or a folder of them) and writes Parquet files to `out`.

    Returns:
        Rows by decision and by error.

    Raises:
        InputError: the table lacks user_id or video_id.
    """
    import ray.data
    from ray.data import SaveMode

    from gubs.ray_runtime import quiet_ray_data

    quiet_ray_data()
    reader = ray.data.read_csv if table.endswith(".csv") else ray.data.read_parquet
    dataset: ray.data.Dataset = reader(table)
    missing = {"user_id", "video_id"} - set(dataset.schema().names)
    if missing:
        raise InputError(f"{table} has no column {', '.join(sorted(missing))}")
    decided = dataset.map_batches(
        BatchFilter,
        fn_constructor_args=(uri, task, mode, threshold),
        batch_size=_BATCH,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=engines),
        num_gpus=1 if gpus else 0,
        num_cpus=0 if gpus else 1,
    )
    decided.write_parquet(out, mode=SaveMode.OVERWRITE)
    counts: Counter[str] = Counter()
    for batch in ray.data.read_parquet(out, columns=["decision", "error"]).iter_batches(batch_format="pyarrow"):
        columns = cast("pa.Table", batch)
        counts.update(v for name in ("decision", "error") for v in columns[name].to_pylist() if v)
    return dict(counts)


def default_out(table: str) -> str:
    """Where the decisions about a table go: beside it."""
    path = Path(table)
    return str(path.with_name(f"{path.stem}.filtered"))
