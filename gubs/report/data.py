"""`gubs show`: the data of a run, as plain JSON and as an HTML page.

`describe` reads the run's tables and counts; `render_page` draws the counts and sample pictures; `write_page` puts the
page into the run's folder. The numbers describe the stage `ifvr`, or `raw` if the filters have not run.
"""

import itertools
import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from fsspec.implementations.local import LocalFileSystem
from markupsafe import Markup

from gubs.artifacts import Artifact, JsonObject, Run
from gubs.artifacts import Part as ArtifactPart
from gubs.data.filters import is_view
from gubs.errors import ArtifactError
from gubs.records import FAST_SKIP_BELOW, FINISH_ABOVE, Task
from gubs.report import pages
from gubs.report.charts import ACCENT, INK, drawing, whole_ticks
from gubs.video.clips import StoredFrames
from gubs.video.decoded import DecodeOptions
from gubs.video.decoder_process import DecoderProcess

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAGE = "show.html"
"""Name of the page in the run's folder."""

SAMPLES = 12
"""Videos shown with pictures."""

TOP = 12
"""Length of a list of tags or occupations."""

MAX_BINS = 14
"""Bars of a histogram; the last one holds everything above."""

_SAMPLE_MIN_VIEWS = 10
_MAX_FILE_BYTES = 256 * 2**20
_DECODE_TIMEOUT_S = 10.0
_SAMPLE_FRAMES = 4
_NO_RATE = float("nan")

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Part:
    """Size of one part of the data: a task, or a split and role of it."""

    task: str
    split: str | None
    """train, test or held out; null before the split."""
    role: str | None
    users: int
    videos: int
    interactions: int


@dataclass(frozen=True)
class Rate:
    """A mean over the rows whose value is known."""

    name: str
    value: float | None
    """Null if no value is known."""
    n: int
    """Rows with a value."""
    unknown: int
    """Rows of the base without a value."""
    base: str
    """What a row is."""


@dataclass(frozen=True)
class Histogram:
    """Counts in bins of equal width; a bin includes its lower end but not its upper."""

    lower: list[float]
    """Lower end of each bin."""
    step: float
    counts: list[int]
    open_end: bool
    """The last bin also holds everything above it."""
    n: int
    unknown: int
    median: float

    def label(self, i: int) -> str:
        """Bin i in words: `10–20`, or `140 or more`."""
        low = self.lower[i]
        if self.open_end and i == len(self.lower) - 1:
            return f"{low:,.0f} or more"
        return f"{low:,.0f}" if self.step == 1 else f"{low:,.0f}–{low + self.step:,.0f}"

    @property
    def peak(self) -> int:
        """The fullest bin."""
        return int(np.argmax(self.counts))


@dataclass(frozen=True)
class Share:
    """A label and how often it occurs."""

    label: str
    count: int


@dataclass(frozen=True)
class Shares:
    """The most frequent labels of a column."""

    top: list[Share]
    distinct: int
    others: int
    """Mentions of labels that are not in `top`."""
    n: int
    """Users (or videos) with at least one label."""
    unknown: int
    """Users (or videos) without any."""


@dataclass(frozen=True)
class Source:
    """The kind of source, and what it lacks."""

    kind: str
    notes: list[str]
    null_columns: dict[str, list[str]]
    """Columns without a single value, by table."""
    files: list[dict[str, Any]]
    """Each input file: file, rows_in, rows_out, rejected (cause to rows)."""


@dataclass(frozen=True)
class SimulationOnly:
    """True causes of the fast skips: for people, never for models."""

    skips: int
    """Fast skips in the described data whose cause is known."""
    causes: list[Share]
    """By option B, C, D."""
    mechanisms: list[Share]


@dataclass(frozen=True)
class SampleVideo:
    """One video of the samples."""

    video_id: str
    title: str | None
    duration_s: float | None
    tags: list[str]
    views: int
    skip: Rate
    click: Rate


@dataclass(frozen=True)
class DataSummary:
    """The content of the page, without the pictures."""

    run: str
    stage: str
    """The stage the numbers describe: ifvr or raw."""
    created: str
    code_version: str
    users: int
    videos: int
    interactions: int
    tasks: list[Part]
    parts: list[Part]
    """By task, split and role; empty before the split."""
    filter_steps: list[dict[str, Any]]
    splits: dict[str, Any]
    rates: list[Rate]
    views_per_video: Histogram | None
    records_per_user: Histogram | None
    video_length_s: Histogram | None
    age: Histogram | None
    gender: Shares
    occupation: Shares
    other_facts: Shares
    user_tags: Shares
    video_tags: Shares
    untitled_videos: int
    source: Source
    frames: list[Share] | None
    """Videos by the decoder's verdict; null if the stage `frames` has not run."""
    simulation_only: SimulationOnly | None
    samples: list[SampleVideo]
    samples_by: str
    """What the samples are ordered by, from least to most: skipped, clicked or viewed."""

    def to_json(self) -> JsonObject:
        """Plain JSON: numbers, texts, lists and nulls only."""
        return asdict(self)


def describe(run: Run) -> DataSummary:
    """Describes the run's data in numbers.

    Raises:
        ArtifactError: the run has neither `ifvr` nor `raw`.
    """
    stages = run.stages()
    data = run.artifact("ifvr" if "ifvr" in stages else "raw")
    users, videos = data.table("users"), data.table("videos")
    log = _Log.of(data)
    info = data.manifest.info
    samples, samples_by = _samples(videos, log, _pictured(run, videos))
    return DataSummary(
        run=run.name,
        stage=data.stage,
        created=data.manifest.created,
        code_version=data.manifest.code_version,
        users=users.num_rows,
        videos=videos.num_rows,
        interactions=sum(p.interactions for p in log.parts("task")),
        tasks=log.parts("task"),
        parts=log.parts("task", "split", "role") if data.stage == "ifvr" else [],
        filter_steps=info.get("filter_steps", []),
        splits=info.get("splits", {}),
        rates=log.rates(),
        views_per_video=_histogram(log.views[log.views > 0]),
        records_per_user=_histogram(log.records),
        video_length_s=_histogram(_floats(_watched(videos, log)["duration_s"])),
        age=_histogram(_floats(users["age"])),
        gender=_shares(users["gender"]),
        occupation=_shares(users["occupation"]),
        other_facts=_fact_names(users["other"]),
        user_tags=_tag_shares(users["tags"]),
        video_tags=_tag_shares(videos["tags"]),
        untitled_videos=videos["title"].null_count,
        source=_source(run, stages),
        frames=_verdicts(run) if "frames" in stages else None,
        simulation_only=_simulation_only(run, data) if "truth" in stages else None,
        samples=samples,
        samples_by=samples_by,
    )


def write_page(run: Run) -> str:
    """Writes the page `show.html` into the run's folder.

    Returns:
        The full path of the page, with the scheme.

    Raises:
        ArtifactError: the run has neither `ifvr` nor `raw`.
    """
    return pages.write(run, PAGE, render_page(run, describe(run)))


_KEYS = ("task", "split", "role")
_RATES = {
    "Fast skips": "sequential views",
    "Finished": "sequential views",
    "Person play rate": "users of the sequential task",
    "Total play rate": "sequential views",
    "Clicks": "records of the click task",
    "Dislikes": "interactions",
}
"""Each rate, and what it is about."""


@dataclass
class _Mean:
    """A mean of known values that grows value by value."""

    total: float = 0.0
    n: int = 0
    unknown: int = 0

    def add(self, values: Floats) -> None:
        has_value = ~np.isnan(values)
        self.total += float(values[has_value].sum())
        self.n += int(has_value.sum())
        self.unknown += int((~has_value).sum())


@dataclass
class _ByVideo:
    """Sums of a value over each video's rows."""

    total: Floats
    n: Ints
    rows: Ints

    @classmethod
    def zero(cls, videos: int) -> "_ByVideo":
        return cls(np.zeros(videos), np.zeros(videos, np.int64), np.zeros(videos, np.int64))

    def add(self, codes: Ints, values: Floats) -> None:
        has_value, n = ~np.isnan(values), len(self.n)
        self.rows += np.bincount(codes, minlength=n)
        self.n += np.bincount(codes[has_value], minlength=n)
        self.total += np.bincount(codes[has_value], weights=values[has_value], minlength=n)

    @property
    def means(self) -> Floats:
        """NaN where no value is known."""
        return np.divide(self.total, self.n, out=np.full(len(self.n), np.nan), where=self.n > 0)

    def rate(self, name: str, base: str, code: int) -> Rate:
        n = int(self.n[code])
        return Rate(name, float(self.total[code] / n) if n else None, n, int(self.rows[code]) - n, base)


@dataclass
class _Count:
    """Interactions, users and videos of one part of the data."""

    seen: Mask
    users: int = 0
    interactions: int = 0


@dataclass
class _Log:
    """What the page says of the interactions: sums over blocks, so that the log is never in memory as a whole."""

    video_ids: list[str]
    views: Ints
    skips: _ByVideo
    clicks: _ByVideo
    means: dict[str, _Mean]
    counts: dict[tuple[str | None, ...], _Count]
    """By task, split and role, and by task alone."""
    records: Ints
    """Records of each user."""

    @classmethod
    def of(cls, artifact: Artifact) -> "_Log":
        columns = ["user_id", "video_id", "task", "play_rate", "clicked", "disliked"]
        columns += ["split", "role"] if artifact.stage == "ifvr" else []
        ids = pa.array([], pa.string())
        for piece in artifact.batches("interactions", ["video_id"]):
            ids = pa.concat_arrays([ids, piece["video_id"].combine_chunks().unique()]).unique()
        n = len(ids)
        means = {name: _Mean() for name in _RATES}
        log = cls(
            ids.to_pylist(), np.zeros(n, np.int64), _ByVideo.zero(n), _ByVideo.zero(n), means, {}, np.zeros(0, int)
        )
        for block in _user_blocks(artifact, columns):
            log.add(block, ids)
        return log

    def add(self, block: pa.Table, ids: pa.Array) -> None:
        """Adds all rows of some users."""
        user = block["user_id"].combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False)
        video = pc.index_in(block["video_id"], value_set=ids).to_numpy().astype(np.int64)
        sequential = pc.equal(block["task"], str(Task.SEQUENTIAL)).to_numpy()
        play, clicked, disliked = (_floats(block[c]) for c in ("play_rate", "clicked", "disliked"))
        self.views += np.bincount(video[is_view(block)], minlength=len(ids))
        self.skips.add(video[sequential], _is_skip(play[sequential]))
        self.clicks.add(video[~sequential], clicked[~sequential])
        self.records = np.concatenate([self.records, np.bincount(user)]).astype(np.int64)
        self._add_rates(user, sequential, play, clicked, disliked)
        for keys in {tuple(k for k in _KEYS if k in block.column_names), ("task",)}:
            self._add_counts(block.select(list(keys)), user, video)

    def _add_rates(self, user: Ints, sequential: Mask, play: Floats, clicked: Floats, disliked: Floats) -> None:
        views = play[sequential]
        self.means["Fast skips"].add(_is_skip(views))
        self.means["Finished"].add(np.where(np.isnan(views), _NO_RATE, views > FINISH_ABOVE))
        self.means["Person play rate"].add(_person_play_rates(user[sequential], views))
        self.means["Total play rate"].add(views)
        self.means["Clicks"].add(clicked[~sequential])
        self.means["Dislikes"].add(disliked)

    def _add_counts(self, keys: pa.Table, user: Ints, video: Ints) -> None:
        numbered = keys.append_column("row", pa.array(np.arange(keys.num_rows)))
        for group in numbered.group_by(keys.column_names).aggregate([("row", "list")]).to_pylist():
            rows = np.array(group.pop("row_list"))
            count = self.counts.setdefault(tuple(group.values()), _Count(np.zeros(len(self.video_ids), bool)))
            count.interactions += len(rows)
            count.users += len(np.unique(user[rows]))
            count.seen[video[rows]] = True

    def parts(self, *keys: str) -> list[Part]:
        """Sizes of the parts with these keys, in the order of a person."""
        parts = [
            Part(
                task=str(key[0]),
                split=(key[1] or "held out") if len(key) > 1 else None,
                role=key[2] if len(key) > 1 else None,
                users=count.users,
                videos=int(count.seen.sum()),
                interactions=count.interactions,
            )
            for key, count in self.counts.items()
            if len(key) == len(keys)
        ]
        order = {"sequential": 0, "train": 0, "test": 1, "history": 0}
        return sorted(parts, key=lambda p: tuple((order.get(k or "", 2), k or "") for k in (p.task, p.split, p.role)))

    def rates(self) -> list[Rate]:
        """The rates of the whole log."""
        return [
            Rate(name, m.total / m.n if m.n else None, m.n, m.unknown, _RATES[name]) for name, m in self.means.items()
        ]


def _user_blocks(artifact: Artifact, columns: list[str]) -> Iterator[pa.Table]:
    """The interactions in blocks that have all rows of their users: the files of the same users."""
    files: dict[str, list[ArtifactPart]] = {}
    for part in artifact.parts("interactions"):
        files.setdefault(part.keys.get("users", ""), []).append(part)
    for own in files.values():
        yield pa.concat_tables([artifact.part(part, columns) for part in own])


def _floats(column: pa.ChunkedArray) -> Floats:
    """Numbers or truth values, NaN for null."""
    return np.asarray(column.cast(pa.float64()).to_numpy(), np.float64)


def _is_skip(play: Floats) -> Floats:
    return np.where(np.isnan(play), _NO_RATE, play < FAST_SKIP_BELOW)


def _person_play_rates(user: Ints, play: Floats) -> Floats:
    """Each user's mean play rate (paper: the average Play Rate per user); NaN if none is known."""
    people, codes = np.unique(user, return_inverse=True)
    has_value = ~np.isnan(play)
    views = np.bincount(codes[has_value], minlength=len(people))
    sums = np.bincount(codes[has_value], weights=play[has_value], minlength=len(people))
    return np.divide(sums, views, out=np.full(len(people), np.nan), where=views > 0)


def _bin_widths() -> Iterator[int]:
    """1, 2, 10, 20, 50, 100, 200, 500 ... (no 5: the paper's panels have bins of ten)."""
    yield from (1, 2)
    for power in itertools.count(1):
        yield from (m * 10**power for m in (1, 2, 5))


def _histogram(values: Floats | Ints) -> Histogram | None:
    """Uses the smallest round width with which 95 % of the values fit into `MAX_BINS`; None without values."""
    measured = values[np.isfinite(values) & (values >= 0)]
    if not measured.size:
        return None
    top = float(np.quantile(measured, 0.95))
    step = next(s for s in _bin_widths() if top < s * MAX_BINS)
    bins = np.minimum(measured // step, MAX_BINS - 1).astype(np.int64)
    first = int(bins.min())
    counts = np.bincount(bins - first)
    return Histogram(
        lower=[float((first + i) * step) for i in range(len(counts))],
        step=float(step),
        counts=counts.tolist(),
        open_end=bool((measured >= MAX_BINS * step).any()),
        n=int(measured.size),
        unknown=int(values.size - measured.size),
        median=float(np.median(measured)),
    )


def _watched(videos: pa.Table, log: _Log) -> pa.Table:
    """The videos with at least one view."""
    viewed = [log.video_ids[i] for i in np.flatnonzero(log.views)]
    return videos.filter(pc.is_in(videos["video_id"], value_set=pa.array(viewed, pa.string())))


def _shares(labels: pa.ChunkedArray, n: int | None = None, unknown: int | None = None) -> Shares:
    """The most frequent labels; ties are sorted by label, so the page does not depend on the order of rows."""
    counts = {v["values"]: v["counts"] for v in pc.value_counts(labels.drop_null()).to_pylist()}
    ranked = sorted(counts.items(), key=lambda kv: (-kv[1], kv[0]))
    return Shares(
        top=[Share(label, count) for label, count in ranked[:TOP]],
        distinct=len(ranked),
        others=sum(count for _, count in ranked[TOP:]),
        n=len(labels) - labels.null_count if n is None else n,
        unknown=labels.null_count if unknown is None else unknown,
    )


def _tag_shares(tags: pa.ChunkedArray) -> Shares:
    empty = _empty(tags)
    return _shares(pc.list_flatten(tags), len(tags) - empty, empty)


def _fact_names(other: pa.ChunkedArray) -> Shares:
    """Names of the other facts, and how many users have each."""
    pairs = other.cast(pa.list_(pa.struct([("key", pa.string()), ("value", pa.string())])))
    empty = _empty(pairs)
    return _shares(pc.struct_field(pc.list_flatten(pairs), "key"), len(other) - empty, empty)


def _empty(lists: pa.ChunkedArray) -> int:
    """Number of null or empty lists."""
    return pc.sum(pc.equal(pc.fill_null(pc.list_value_length(lists), 0), 0)).as_py() or 0


def _source(run: Run, stages: list[str]) -> Source:
    if "raw" not in stages:
        return Source(kind="unknown", notes=["The stage `raw` is not in this run."], null_columns={}, files=[])
    manifest = run.artifact("raw").manifest
    info = manifest.info
    return Source(
        kind=manifest.settings.get("source", {}).get("kind", "unknown"),
        notes=list(info.get("notes", [])),
        null_columns={table: columns for table, columns in info.get("nulls", {}).items() if columns},
        files=[{"file": name, **account} for name, account in info.get("files", {}).items()],
    )


def _simulation_only(run: Run, data: Artifact) -> SimulationOnly:
    """True causes of the fast skips in `data`; the filters removed the others."""
    skips = run.artifact("truth").table("skips")
    there = np.zeros(skips.num_rows, bool)
    for piece in data.batches("interactions", ["interaction_id"]):
        there |= pc.is_in(skips["interaction_id"], value_set=piece["interaction_id"].combine_chunks()).to_numpy()
    skips = skips.filter(pa.array(there))
    return SimulationOnly(skips.num_rows, _shares(skips["cause"]).top, _shares(skips["mechanism"]).top)


def _samples(videos: pa.Table, log: _Log, pictured: set[str]) -> tuple[list[SampleVideo], str]:
    """Up to `SAMPLES` videos, evenly spaced from the least to the most skipped, and the name of that order.

    If skip rates are unknown or all equal, the order is by click rate, else by views.
    """
    orders = {"skipped": log.skips.means, "clicked": log.clicks.means}
    by = next((name for name, rates in orders.items() if _varies(rates)), "viewed")
    order = orders.get(by, log.views.astype(np.float64))
    pool = sorted(_pool(log, order, pictured).tolist(), key=lambda i: (order[i], log.video_ids[i]))
    return _describe(videos, log, [pool[p] for p in _spread(len(pool), SAMPLES)]), by


def _spread(n: int, most: int) -> list[int]:
    """Up to `most` of the numbers 0 ... n - 1, evenly spaced, first and last included."""
    numbers: list[int] = np.linspace(0, n - 1, min(most, n)).round().astype(int).tolist()
    return numbers


def _pool(log: _Log, order: Floats, pictured: set[str]) -> Ints:
    """Codes of the videos to choose from: if possible with pictures, and with enough views for a rate to mean much."""
    has_rate = ~np.isnan(order)
    frequent = has_rate & (log.views >= _SAMPLE_MIN_VIEWS)
    visible = np.array([v in pictured for v in log.video_ids], bool)
    choices = (visible & frequent, visible & has_rate, frequent, has_rate)
    return np.flatnonzero(next((c for c in choices if c.any()), has_rate))


def _varies(rates: Floats) -> bool:
    measured = rates[~np.isnan(rates)]
    return bool(measured.size) and bool(measured.min() < measured.max())


def _describe(videos: pa.Table, log: _Log, chosen: list[int]) -> list[SampleVideo]:
    ids = [log.video_ids[i] for i in chosen]
    selected = videos.filter(pc.is_in(videos["video_id"], value_set=pa.array(ids, pa.string())))
    rows = {row["video_id"]: row for row in selected.to_pylist()}
    samples = []
    for code, video_id in zip(chosen, ids, strict=True):
        row = rows.get(video_id, {})
        duration = row.get("duration_s")
        samples.append(
            SampleVideo(
                video_id=video_id,
                title=row.get("title"),
                duration_s=duration if duration is not None and math.isfinite(duration) else None,
                tags=list(row.get("tags") or []),
                views=int(log.views[code]),
                skip=log.skips.rate("Fast skips", "sequential views", code),
                click=log.clicks.rate("Clicks", "records of the click task", code),
            )
        )
    return samples


def _verdicts(run: Run) -> list[Share]:
    return _shares(run.artifact("frames").table("frames", ["verdict"])["verdict"]).top


def _pictured(run: Run, videos: pa.Table) -> set[str]:
    """Ids of the videos that may have pictures."""
    return set(StoredFrames.of(run).hashes or _video_files(run, videos))


@dataclass
class _Gallery:
    """Pictures of the samples as data URIs, and a note on where they come from."""

    note: str
    covers: dict[str, str] = field(default_factory=dict)
    frames: dict[str, list[str]] = field(default_factory=dict)

    def add(self, video_id: str, cover: bytes | None, frames: list[bytes]) -> None:
        """Adds a video's cover and a few of its frames, evenly spaced."""
        if cover:
            self.covers[video_id] = pages.picture(cover)
        self.frames[video_id] = [pages.picture(frames[p]) for p in _spread(len(frames), _SAMPLE_FRAMES)]


def _gallery(run: Run, stage: str, samples: list[SampleVideo]) -> _Gallery:
    """Pictures from the frame store, else decoded now, else only a note."""
    ids = [s.video_id for s in samples]
    stored = StoredFrames.of(run)
    if stored.hashes:
        return _stored_gallery(stored, {v: stored.hashes[v] for v in ids if v in stored.hashes})
    files = _video_files(run, run.artifact(stage).table("videos", ["video_id", "uri"]))
    if sample_files := {v: files[v] for v in ids if v in files}:
        return _decoded_gallery(sample_files)
    return _Gallery("This run has no frames and no video files that can be read here: only titles and tags are shown.")


def _stored_gallery(stored: StoredFrames, hashes: dict[str, str]) -> _Gallery:
    try:
        rows = stored.store.lookup(hashes.values(), ["cover", "frames"]).to_pylist()
    except ArtifactError as e:  # a run copied without its store still has numbers to show
        return _Gallery(f"There are no pictures: {e}")
    gallery = _Gallery("Cover and frames are what a model sees of a video; they come from the frame store.")
    for video_id, row in zip(hashes, rows, strict=True):
        gallery.add(video_id, row["cover"], row["frames"])
    return gallery


_Place = tuple[fsspec.AbstractFileSystem, str]
"""A file: its file system and its path in it."""


def _video_files(run: Run, videos: pa.Table) -> dict[str, _Place]:
    """Each video's file: in the artifact `videos`, or a local path of the source."""
    if "videos" in run.stages():
        files = run.artifact("videos").table("files", ["video_id", "file"]).to_pydict()
        places = zip(files["video_id"], files["file"], strict=True)
        return {video_id: (run.fs, run.path("videos", file)) for video_id, file in places}
    with_uri = videos.filter(videos["uri"].is_valid())
    local = LocalFileSystem()
    return {
        video_id: (local, local._strip_protocol(uri))
        for video_id, uri in zip(with_uri["video_id"].to_pylist(), with_uri["uri"].to_pylist(), strict=True)
        if uri.startswith(("/", "file://"))
    }


def _decoded_gallery(files: dict[str, _Place]) -> _Gallery:
    """Decodes the samples now, in a separate process, since a broken file may crash the decoder."""
    gallery = _Gallery("")
    options = DecodeOptions(count=_SAMPLE_FRAMES, max_file_mb=_MAX_FILE_BYTES / 2**20)
    decoder = DecoderProcess(options, timeout_s=_DECODE_TIMEOUT_S)
    try:
        for video_id, place in files.items():
            with _local(*place) as local:
                decoded = decoder.decode(local)
            gallery.add(video_id, decoded.cover, decoded.frames)
    finally:
        decoder.close()
    count = f"{len(gallery.covers)} of these {len(files)} videos"
    gallery.note = f"The stage that extracts frames has not run; for this page {count} were decoded."
    return gallery


@contextmanager
def _local(fs: fsspec.AbstractFileSystem, path: str) -> Iterator[str]:
    """A local path of the file; a remote file is copied."""
    if isinstance(fs, LocalFileSystem):
        yield path
        return
    with tempfile.NamedTemporaryFile(suffix=Path(path).suffix) as copy:
        if fs.size(path) <= _MAX_FILE_BYTES:  # else the copy stays empty, which the decoder reports
            with fs.open(path, "rb") as f:
                shutil.copyfileobj(f, copy)
            copy.flush()
        yield copy.name


def render_page(run: Run, summary: DataSummary) -> str:
    """The page as self-contained HTML."""
    return pages.render(
        "data",
        s=summary,
        figures={name: _figure(h, x, y) for name, (h, x, y) in _panels(summary).items() if h},
        gallery=_gallery(run, summary.stage, summary.samples),
        options=_OPTIONS,
    )


_OPTIONS = {
    "B": "content-driven: the video is flawed",
    "C": "algorithm-driven: the recommendation missed",
    "D": "user-driven: a slip, no time, no mood",
}


def _panels(s: DataSummary) -> dict[str, tuple[Histogram | None, str, str]]:
    return {
        "views": (s.views_per_video, "views of a video", "videos"),
        "records": (s.records_per_user, "records of a user", "users"),
        "length": (s.video_length_s, "length in seconds", "videos"),
        "age": (s.age, "age in years", "users"),
    }


def _figure(h: Histogram, x: str, y: str) -> Markup:
    with drawing(f"{x} {y}", (4.4, 2.7)) as chart:
        _draw_bars(chart.axes, h)
        chart.axes.set_xlabel(x)
        chart.axes.set_ylabel(y)
    return chart.svg


def _draw_bars(axes: "Axes", h: Histogram) -> None:
    positions = np.arange(len(h.counts))
    bars = axes.bar(positions, h.counts, width=0.86, color=ACCENT)
    if h.open_end:
        bars[-1].set_alpha(0.45)
    highest = h.counts[h.peak]
    axes.annotate(f"{highest:,}", (h.peak, highest), (0, 2), textcoords="offset points", ha="center", color=INK)
    ends = [*h.lower, *([] if h.open_end else [h.lower[-1] + h.step])]
    every = 1 if len(ends) <= 8 else 2
    ticks = positions[: len(ends)] if h.step == 1 else np.arange(len(ends)) - 0.5
    axes.set_xticks(ticks[::every], [f"{e:,.0f}" for e in ends[: len(ticks)]][::every])
    axes.yaxis.set_major_formatter(lambda v, _: f"{v:,.0f}")
    whole_ticks(axes.yaxis, 5)
    axes.margins(y=0.14)
