"""The frame store: the result for each video file that was ever decoded, by the hash of its content.

Its files are `<store>/<key>/part-<id>.parquet`, where the key stands for the settings that decide the pixels. A part is
written under a temporary name and renamed, so it is complete or absent; parts never change. Runs share a store, and a
video whose content is in it is not decoded again, whatever its name.
"""

import hashlib
import io
import json
import socket
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from itertools import chain
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from gubs.artifacts import write_atomically
from gubs.errors import ArtifactError
from gubs.video.decoded import DECODER_VERSION, RETRYABLE, USABLE, Decoded, DecodeOptions, Verdict

SCHEMA = pa.schema(
    [
        pa.field("content_hash", pa.string(), nullable=False),
        pa.field("verdict", pa.string(), nullable=False),
        ("detail", pa.string()),
        ("frames", pa.list_(pa.binary())),
        ("cover", pa.binary()),
        ("times_s", pa.list_(pa.float64())),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("source_width", pa.int32()),
        ("source_height", pa.int32()),
        ("duration_s", pa.float64()),
        ("declared_frames", pa.int64()),
        ("decodable_frames", pa.int64()),
        ("decoder", pa.string()),
    ]
)
"""One row per video: its content hash and the fields of `Decoded`."""

FACTS = [name for name in SCHEMA.names if name not in ("frames", "cover")]
"""The columns without pictures."""

_ROWS_PER_GROUP = 8
"""Rows that are read together if one of them is needed."""

_PICTURES = ("frames.list.element", "cover")
_STALE_AFTER = timedelta(days=1)
_READERS = 8


@dataclass(frozen=True, slots=True)
class Place:
    """The position of a video's row."""

    part: str
    row: int
    verdict: Verdict


def settings_key(options: DecodeOptions) -> str:
    """Identifies the settings that decide the pixels, without the limits, and the decoder's version."""
    recipe = {name: getattr(options, name) for name in ("count", "max_pixels", "min_pixels", "quality")}
    recipe["version"] = DECODER_VERSION
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


class FrameStore:
    """The part of a store for one choice of settings."""

    def __init__(self, uri: str, options: DecodeOptions):
        """Opens the store; reads and creates nothing yet.

        Args:
            uri: folder of the store, a local path or anything fsspec knows.
            options: settings of the frames.
        """
        self.uri, self.key, self.options = uri.rstrip("/"), settings_key(options), options
        self.options = options
        self.fs, root = fsspec.core.url_to_fs(self.uri)
        self.folder = f"{root}/{self.key}"
        self._index: dict[str, Place] | None = None

    def write_part(self, part: str, videos: Sequence[tuple[str, Decoded]]) -> None:
        """Writes a part of (content hash, result) per video. Writes nothing if there are no videos."""
        if not videos:
            return
        rows = [{"content_hash": h, **{k: getattr(d, k) for k in SCHEMA.names[1:]}} for h, d in videos]
        settings = json.dumps({**asdict(self.options), "version": DECODER_VERSION})
        table = pa.Table.from_pylist(rows, SCHEMA.with_metadata({"gubs.frames": settings}))
        out = io.BytesIO()
        leaves = [f"{f.name}.list.element" if pa.types.is_list(f.type) else f.name for f in SCHEMA]
        compression = {name: "NONE" if name in _PICTURES else "ZSTD" for name in leaves}  # JPEG does not shrink
        pq.write_table(table, out, row_group_size=_ROWS_PER_GROUP, compression=compression, use_dictionary=False)
        self.fs.makedirs(self.folder, exist_ok=True)
        write_atomically(self.fs, self._path(part), out.getvalue())

    def index(self, refresh: bool = False) -> dict[str, Place]:
        """Content hash to place, read from two columns of each part; cached until `refresh`.

        If a video was tried several times, the row with frames counts, otherwise the newest.

        Raises:
            ArtifactError: a part cannot be read.
        """
        if self._index is None or refresh:
            index: dict[str, Place] = {}
            names = [entry["name"].rsplit("/", 1)[-1] for entry in self._entries()]
            parts = sorted(n[5:-8] for n in names if n.startswith("part-") and n.endswith(".parquet"))  # oldest first
            with ThreadPoolExecutor(_READERS) as pool:
                for content_hash, place in chain.from_iterable(pool.map(self._places, parts)):
                    old = index.get(content_hash)
                    if old is None or place.verdict in USABLE or old.verdict not in USABLE:
                        index[content_hash] = place
            self._index = index
        return self._index

    def done(self, retry_failed: bool = False) -> set[str]:
        """Hashes that need no decoding; with `retry_failed`, without those that failed perhaps due to the machine."""
        return {h for h, place in self.index().items() if not (retry_failed and place.verdict in RETRYABLE)}

    def lookup(self, hashes: Iterable[str], columns: Sequence[str] | None = None) -> pa.Table:
        """Rows of these videos, in this order; reads only the row groups that have them.

        Args:
            hashes: content hashes, repetitions allowed.
            columns: of `SCHEMA`; None = all. Pictures of many videos are large: select `FACTS`, or read a few videos.

        Raises:
            ArtifactError: the store lacks one of them, or a part cannot be read.
        """
        index, hashes = self.index(), list(hashes)
        if missing := [h for h in hashes if h not in index]:
            raise ArtifactError(
                f"{self.uri}/{self.key} has no frames of {missing[0]} ({len(missing)} missing): run `gubs frames`"
            )
        names = list(SCHEMA.names if columns is None else columns)
        rows_by_part: dict[str, set[int]] = defaultdict(set)
        for h in hashes:
            rows_by_part[index[h].part].add(index[h].row)
        tables = [self._rows(part, sorted(rows), names) for part, rows in rows_by_part.items()]
        if not tables:
            return pa.schema([SCHEMA.field(n) for n in names]).empty_table()
        read = [(part, row) for part, rows in rows_by_part.items() for row in sorted(rows)]
        position = {place: i for i, place in enumerate(read)}
        order = [position[index[h].part, index[h].row] for h in hashes]
        return pa.concat_tables(tables).take(pa.array(order, pa.int64()))

    def verdicts_of_part(self, part: str) -> dict[str, Verdict]:
        """Verdict of each video in a part, by hash; empty if the part does not exist."""
        return {h: place.verdict for h, place in self._places(part)} if self.fs.exists(self._path(part)) else {}

    def clean(self) -> int:
        """Removes half-written files of writers that were killed; returns their number."""
        abandoned = [entry["name"] for entry in self._entries() if _is_abandoned(entry)]
        for name in abandoned:
            self.fs.rm_file(name)
        return len(abandoned)

    def _path(self, part: str) -> str:
        return f"{self.folder}/part-{part}.parquet"

    def _entries(self) -> list[dict[str, Any]]:
        return self.fs.ls(self.folder, detail=True) if self.fs.exists(self.folder) else []

    def _places(self, part: str) -> list[tuple[str, Place]]:
        table = self._read(part, lambda f: f.read(["content_hash", "verdict"], use_threads=False))
        pairs = zip(table["content_hash"].to_pylist(), table["verdict"].to_pylist(), strict=True)
        return [(h, Place(part, row, Verdict(v))) for row, (h, v) in enumerate(pairs)]

    def _rows(self, part: str, rows: Sequence[int], columns: Sequence[str]) -> pa.Table:
        groups = sorted({r // _ROWS_PER_GROUP for r in rows})
        first = {g: i * _ROWS_PER_GROUP for i, g in enumerate(groups)}  # all groups but a part's last are full
        positions = [first[r // _ROWS_PER_GROUP] + r % _ROWS_PER_GROUP for r in rows]
        table = self._read(part, lambda f: f.read_row_groups(groups, list(columns), use_threads=False))
        return table.take(pa.array(positions, pa.int64())).replace_schema_metadata()

    def _read(self, part: str, read: Callable[[pq.ParquetFile], pa.Table]) -> pa.Table:
        path = self._path(part)
        try:
            with self.fs.open(path, "rb") as f, pq.ParquetFile(f) as parquet:  # no threads: see Artifact.table
                return read(parquet)
        except (pa.ArrowInvalid, pa.ArrowKeyError, OSError) as e:
            raise ArtifactError(f"{path} cannot be read ({e}): remove it, and its videos will be decoded again") from e


def _is_abandoned(entry: dict[str, Any]) -> bool:
    """Whether a temporary file's writer is dead: a process of this machine that ended, or one silent for a day."""
    _, mark, owner = entry["name"].rsplit("/", 1)[-1].partition(".parquet.tmp-")
    if not mark:
        return False
    this_host = f"{socket.gethostname()}-"
    pid = owner.removeprefix(this_host).split("-")[0]
    if owner.startswith(this_host) and pid.isdigit():
        return not Path(f"/proc/{pid}").exists()
    changed = next((entry[k] for k in ("mtime", "LastModified", "updated") if entry.get(k) is not None), None)
    if isinstance(changed, (int, float)):
        changed = datetime.fromtimestamp(changed, UTC)
    return isinstance(changed, datetime) and datetime.now(UTC) - changed > _STALE_AFTER
