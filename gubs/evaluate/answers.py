"""A policy's answers on disk: a killed evaluation continues, and asks nothing again that was answered."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from gubs.artifacts import write_part
from gubs.records import Option
from gubs.ufm.labels import OptionProbabilities
from gubs.ufm.predict import Prediction, Predictor, Query
from gubs.ufm.questions import Questions
from gubs.ufm.settings import UFMSettings
from gubs.ufm.stage import use_gpu

OnProgress = Callable[[int, int], None]
Question = tuple[str, int]
"""How a target is asked (`greedy`, `sampled`, `held out`), and its number."""
_ROWS, _SECONDS = 512, 2.0
"""Answers are written when there are so many of them, or after so long."""
_REPORT_EVERY = 64
"""Answers between two progress reports."""
_ANSWERS_PER_ENGINE = 512
"""Another engine is started only for this many more answers."""
_SCHEMA = pa.schema(
    [
        ("mode", pa.string()),
        ("number", pa.int64()),
        ("text", pa.string()),
        ("finished", pa.bool_()),
        ("options", pa.list_(pa.string())),
        ("probabilities", pa.list_(pa.float64())),
        ("mass", pa.float64()),
    ]
)


class AnswerLog:
    """Answers by question, in memory (without their tokens) and in files of a folder."""

    def __init__(self, fs: fsspec.AbstractFileSystem, folder: str):
        """Reads what an earlier attempt has left.

        Args:
            fs: file system of the folder.
            folder: of this log alone; made if it is missing.
        """
        self._fs, self._folder = fs, folder
        self._unwritten: list[Prediction] = []
        self._written_at = time.monotonic()
        fs.makedirs(folder, exist_ok=True)
        files = sorted(f for f in fs.ls(folder, detail=False) if f.endswith(".parquet"))
        self._next = len(files)
        self.answers: dict[Question, Prediction] = {p.key: p for f in files for p in self._read(f)}
        self.answered_before = len(self.answers)
        """Answers of earlier attempts."""

    def add(self, prediction: Prediction) -> None:
        """Keeps the answer to the question that is the prediction's key."""
        kept = Prediction(prediction.key, prediction.text, prediction.finished, None, prediction.options)
        self.answers[kept.key] = kept
        self._unwritten.append(kept)
        if len(self._unwritten) >= _ROWS or time.monotonic() - self._written_at > _SECONDS:
            self.write()

    def write(self) -> None:
        """Writes what is not yet written."""
        if self._unwritten:
            rows = pa.Table.from_pylist([_row(p) for p in self._unwritten], schema=_SCHEMA)
            write_part(self._fs, self._folder, f"{self._next:06}.parquet", rows)
            self._next += 1
        self._unwritten, self._written_at = [], time.monotonic()

    def fill(
        self,
        queries: Iterable[Query],
        total: int,
        folder: Path,
        ufm: UFMSettings,
        questions: Questions,
        on_progress: OnProgress | None = None,
    ) -> None:
        """Asks a policy what has no answer yet; answers are kept even if it breaks down.

        Args:
            queries: about the questions without an answer; the key of each is its `Question`.
            total: answers there are in the end.
            folder: the policy's.
            ufm: of the engines.
            questions: of the run.
            on_progress: gets the answers so far, and the total.
        """
        gpu = use_gpu(ufm.workers)
        engines = min(ufm.workers.count, math.ceil((total - self.answered_before) / _ANSWERS_PER_ENGINE)) if gpu else 1
        pictures = ufm.inputs.vision and questions.pictures
        try:
            with Predictor(
                folder, ufm, pictures=pictures, largest=questions.largest, engines=engines, gpu=gpu
            ) as predictor:
                for prediction in predictor.stream(queries):
                    self.add(prediction)
                    if on_progress and (len(self.answers) % _REPORT_EVERY == 0 or len(self.answers) == total):
                        on_progress(len(self.answers), total)
        finally:
            self.write()

    def _read(self, file: str) -> Iterator[Prediction]:
        with self._fs.open(file, "rb") as f:
            rows = pq.read_table(f, pre_buffer=False, use_threads=False).to_pylist()
        for row in rows:
            options = None
            if row["options"]:
                named = dict(zip(map(Option, row["options"]), row["probabilities"], strict=True))
                options = OptionProbabilities(named, row["mass"])
            yield Prediction((row["mode"], row["number"]), row["text"], row["finished"], None, options)


def _row(prediction: Prediction) -> dict[str, object]:
    (mode, number), options = prediction.key, prediction.options
    return {
        "mode": mode,
        "number": number,
        "text": prediction.text,
        "finished": prediction.finished,
        "options": [str(o) for o in options.options] if options else None,
        "probabilities": list(options.options.values()) if options else None,
        "mass": options.mass if options else None,
    }
