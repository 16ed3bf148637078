"""Filters a whole table: a Ray Data job that asks the policy about every row (user_id, video_id)."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, cast

import pyarrow as pa

from gubs.errors import ArtifactError, InputError
from gubs.prompts.people import Person
from gubs.records import Task, Video
from gubs.serving.bundle import Bundle
from gubs.serving.filter import Decision, Mode, decide, thoughts_seed
from gubs.serving.pictures import PictureError, fitting
from gubs.ufm.labels import mean_options
from gubs.ufm.prompting import PromptBuilder

if TYPE_CHECKING:
    from gubs.ufm.rollout import Request
    from gubs.video.clips import Clip

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
        shown = config.inputs.vision and pictures
        shape = Shape(str(folder), config.model, config.inputs, rollout, pictures=shown, largest=config.frames)
        self._engine = Engine(shape)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """The batch with the decisions. Ids are texts: a CSV reader makes numbers of `17`."""
        requests: dict[int, list[Request]] = {}
        rows: list[dict[str, object]] = []
        users, videos = (batch[c].cast(pa.string()).to_pylist() for c in ("user_id", "video_id"))
        for i, (user_id, video_id) in enumerate(zip(users, videos, strict=True)):
            person, video = self._bundle.person(user_id, self._task), self._bundle.video(video_id)
            asked = self._asked(i, person, video) if person and video else "unknown"
            rows.append({"decision": str(Decision.KEEP), "error": asked if isinstance(asked, str) else None})
            if not isinstance(asked, str):
                requests[i] = asked
        answers = iter(self._engine.generate([r for group in requests.values() for r in group]))
        for i, group in requests.items():
            rows[i] = self._row([next(answers) for _ in group])
        added = pa.Table.from_pylist(rows, schema=_RESULTS)
        for name in _RESULTS.names:
            batch = batch.append_column(name, added[name])
        return batch

    def _asked(self, number: int, person: Person, video: Video) -> "list[Request] | str":
        """What the engine is asked about a candidate, or the code of the error because of which it is kept."""
        from gubs.ufm.predict import Query, request_of

        score = self._mode is Mode.SCORE
        samples = 1 if score else self._bundle.config.thoughts
        try:
            clip = self._clip(video.video_id)
        except (ArtifactError, PictureError):
            return "pictures"
        prompt = self._prompts.about_user(self._task, person, video, clip)
        seed = thoughts_seed(self._bundle.version, self._task, prompt)
        query = Query(number, prompt, seed, 1.0 if samples > 1 else 0.0, self._labels, score)
        request = request_of(self._inputs, query)
        if request is None:
            return "too_long"
        return [replace(request, seed=seed + k) for k in range(samples)]  # as vLLM does for `n`

    def _clip(self, video_id: str) -> "Clip | None":
        if not self._bundle.config.inputs.vision:
            return None
        pictures = self._bundle.pictures
        return fitting(pictures.cover(video_id) if self._task == Task.CLICK else pictures.clip(video_id))

    def _row(self, responses: Sequence[Any]) -> dict[str, object]:
        from gubs.ufm.predict import read_options

        score = self._mode is Mode.SCORE
        options = mean_options(read_options(self._inputs, self._labels, r, score=score) for r in responses)
        if options is None:
            return {"decision": str(Decision.KEEP), "error": "unreadable"}
        texts = [] if score else [self._inputs.text(r.ids) for r in responses]
        judgement = decide(self._task, self._rule.calibration.options(options), self._threshold, texts)
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
        InputError: the table lacks user_id or video_id, or lies where the decisions go.
    """
    import ray.data
    from ray.data import SaveMode

    from gubs.ray_runtime import quiet_ray_data

    _check_apart(table, out)
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
    return _counts(out)


def _counts(out: str) -> dict[str, int]:
    import ray.data

    counts: Counter[str] = Counter()
    for batch in ray.data.read_parquet(out, columns=["decision", "error"]).iter_batches(batch_format="pyarrow"):
        columns = cast("pa.Table", batch)
        counts.update(v for name in ("decision", "error") for v in columns[name].to_pylist() if v)
    return dict(counts)


def outs(tables: Sequence[str], out: str = "") -> list[str]:
    """Where the decisions about each table go: beside it, or in `out`; with several tables, each in a folder there.

    Raises:
        InputError: two would go to the same folder.
    """
    if not out:
        folders = [f"{_folder(table)}{_stem(table)}.filtered" for table in tables]
    elif len(tables) == 1:
        folders = [out]
    else:
        folders = [f"{out.rstrip('/')}/{_stem(table)}.filtered" for table in tables]
    twice = [folder for folder, count in Counter(folders).items() if count > 1]
    if twice:
        raise InputError(f"the decisions about two tables would both go to {twice[0]}: filter one after the other")
    return folders


def _folder(table: str) -> str:
    """With its last slash; a URI stays one."""
    head, slash, _ = table.rstrip("/").rpartition("/")
    return head + slash


def _stem(table: str) -> str:
    return PurePosixPath(table.rstrip("/").rpartition("/")[2]).stem


def _check_apart(table: str, out: str) -> None:
    """Raises `InputError` if writing would touch what is still being read: the folder is emptied first."""
    import fsspec

    (fs, here), (other, there) = (fsspec.core.url_to_fs(uri) for uri in (table, out))
    read, written = (PurePosixPath(path) for path in (here, there))
    if type(fs) is type(other) and (read.is_relative_to(written) or written.is_relative_to(read)):
        raise InputError(f"{table} would be overwritten while it is read: give another --out than {out}")
