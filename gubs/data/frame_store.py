"""The frame store: what became of each video file ever decoded, by the hash of its content.

`<store>/<key>/part-<id>.parquet`, where the key stands for the settings that decide the pixels. A part is written under
a temporary name and renamed, so it is there whole or not at all; parts are never changed. Runs share a store, and a
video whose content is in it is not decoded again, whatever its name.
"""

import hashlib
import io
import json
import socket
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from gubs.artifacts import write_atomically
from gubs.data.decoded import DECODER_VERSION, RETRYABLE, USABLE, Decoded, DecodeOptions, Verdict
from gubs.errors import ArtifactError

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
"""One row a video; the columns of `Decoded`, and its content hash."""

FACTS = [name for name in SCHEMA.names if name not in ("frames", "cover")]
"""The columns without pictures."""

_ROWS_PER_GROUP = 8
"""Rows that are read together when one of them is wanted."""

_PICTURES = ("frames.list.element", "cover")
_STALE_AFTER = timedelta(days=1)
_READERS = 8


@dataclass(frozen=True, slots=True)
class Place:
    """Where a video's row is."""

    part: str
    row: int
    verdict: Verdict


def settings_key(options: DecodeOptions) -> str:
    """Stands for the settings (and the decoder's version) that decide the pixels; limits do not count."""
    recipe = {
        **{k: v for k, v in asdict(options).items() if k in ("count", "max_pixels", "min_pixels", "quality")},
        "version": DECODER_VERSION,
    }
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


class FrameStore:
    """The part of a store that belongs to one choice of settings."""

    def __init__(self, uri: str, options: DecodeOptions):
        """Opens the store; nothing is read or made yet.

        Args:
            uri: folder of the store, a local path or anything fsspec knows.
            options: settings of the frames.
        """
        self.uri, self.key = uri.rstrip("/"), settings_key(options)
        self.options = options
        self.fs, root = fsspec.core.url_to_fs(self.uri)
        self.folder = f"{root}/{self.key}"
        self._index: dict[str, Place] | None = None

    def parts(self) -> list[str]:
        """Ids of the finished parts, oldest first."""
        if not self.fs.exists(self.folder):
            return []
        names = [str(path).rsplit("/", 1)[-1] for path in self.fs.ls(self.folder, detail=False)]
        return sorted(n[5:-8] for n in names if n.startswith("part-") and n.endswith(".parquet"))

    def has_part(self, part: str) -> bool:
        """True if that part is finished."""
        return bool(self.fs.exists(self._path(part)))

    def write_part(self, part: str, videos: Sequence[tuple[str, Decoded]]) -> None:
        """Writes a part: (content hash, what became of it) a video. Nothing is written for no videos."""
        if not videos:
            return
        rows = [{"content_hash": h, **{k: getattr(d, k) for k in SCHEMA.names[1:]}} for h, d in videos]
        settings = json.dumps({**asdict(self.options), "version": DECODER_VERSION})
        table = pa.Table.from_pylist(rows, SCHEMA.with_metadata({"gubs.frames": settings}))
        out = io.BytesIO()
        plain = {name: "NONE" if name in _PICTURES else "ZSTD" for name in _leaves(SCHEMA)}  # JPEG does not shrink
        pq.write_table(table, out, row_group_size=_ROWS_PER_GROUP, compression=plain, use_dictionary=False)
        self.fs.makedirs(self.folder, exist_ok=True)
        write_atomically(self.fs, self._path(part), out.getvalue())

    def index(self, refresh: bool = False) -> dict[str, Place]:
        """Content hash to place, read from two columns of each part; kept until `refresh`.

        Where a video was tried again, the row with frames counts, else the newest.

        Raises:
            ArtifactError: a part cannot be read.
        """
        if self._index is None or refresh:
            found: dict[str, Place] = {}
            parts = self.parts()
            with ThreadPoolExecutor(_READERS) as pool:
                for places in pool.map(self._places, parts):
                    for content_hash, place in places:
                        old = found.get(content_hash)
                        if old is None or place.verdict in USABLE or old.verdict not in USABLE:
                            found[content_hash] = place
            self._index = found
        return self._index

    def done(self, retry_failed: bool = False) -> set[str]:
        """Hashes that need no decoding; with `retry_failed`, verdicts that may be the machine's fault do."""
        return {h for h, place in self.index().items() if not (retry_failed and place.verdict in RETRYABLE)}

    def lookup(self, hashes: Iterable[str], columns: Sequence[str] | None = None) -> pa.Table:
        """Rows of these videos, in this order; reads only the row groups they are in.

        Args:
            hashes: content hashes, repetitions allowed.
            columns: of `SCHEMA`; all if not given. Pictures of many videos are large: ask for `FACTS`, or for few.

        Raises:
            ArtifactError: the store lacks one of them, or a part cannot be read.
        """
        wanted = list(hashes)
        index = self.index()
        if missing := [h for h in wanted if h not in index]:
            raise ArtifactError(
                f"{self.uri}/{self.key} has no frames of {missing[0]} ({len(missing)} such): extract them"
            )
        names = list(columns) if columns is not None else list(SCHEMA.names)
        by_part: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        for i, h in enumerate(wanted):
            by_part[index[h].part][index[h].row].append(i)
        tables, order = [], []
        for part, rows in by_part.items():
            tables.append(self._rows(part, sorted(rows), names))
            order += [rows[row] for row in sorted(rows)]
        if not tables:
            return pa.schema([SCHEMA.field(n) for n in names]).empty_table()
        place = {i: at for at, positions in enumerate(order) for i in positions}
        return pa.concat_tables(tables).take(pa.array([place[i] for i in range(len(wanted))], pa.int64()))

    def facts_of_part(self, part: str) -> dict[str, Verdict]:
        """Hash and verdict of each video in a part."""
        return {h: place.verdict for h, place in self._places(part)}

    def clean(self) -> int:
        """Removes what writers that were killed left half-written; returns how many files."""
        if not self.fs.exists(self.folder):
            return 0
        removed = 0
        for entry in self.fs.ls(self.folder, detail=True):
            if _abandoned(entry):
                self.fs.rm_file(entry["name"])
                removed += 1
        return removed

    def _path(self, part: str) -> str:
        return f"{self.folder}/part-{part}.parquet"

    def _places(self, part: str) -> list[tuple[str, Place]]:
        table = self._read(part, lambda f: f.read(["content_hash", "verdict"]))
        pairs = zip(table["content_hash"].to_pylist(), table["verdict"].to_pylist(), strict=True)
        return [(h, Place(part, row, Verdict(v))) for row, (h, v) in enumerate(pairs)]

    def _rows(self, part: str, rows: Sequence[int], columns: Sequence[str]) -> pa.Table:
        groups = sorted({r // _ROWS_PER_GROUP for r in rows})
        first = {g: i * _ROWS_PER_GROUP for i, g in enumerate(groups)}  # all groups but a part's last are full
        at = [first[r // _ROWS_PER_GROUP] + r % _ROWS_PER_GROUP for r in rows]
        table = self._read(part, lambda f: f.read_row_groups(groups, list(columns)))
        return table.take(pa.array(at, pa.int64())).replace_schema_metadata()

    def _read(self, part: str, read: Any) -> pa.Table:
        try:
            with self.fs.open(self._path(part), "rb") as f, pq.ParquetFile(f) as parquet:
                return read(parquet)
        except (pa.ArrowInvalid, pa.ArrowKeyError, OSError) as e:
            path = self._path(part)
            raise ArtifactError(f"{path} cannot be read ({e}): remove it, and its videos will be decoded again") from e


def _leaves(schema: pa.Schema) -> list[str]:
    return [f"{f.name}.list.element" if pa.types.is_list(f.type) else f.name for f in schema]


def _abandoned(entry: dict[str, Any]) -> bool:
    """True for a temporary file whose writer is dead: a process of this machine that is gone, or a day of silence."""
    _, mark, owner = entry["name"].rsplit("/", 1)[-1].partition(".parquet.tmp-")
    if not mark:
        return False
    here = f"{socket.gethostname()}-"
    pid = owner.removeprefix(here).split("-")[0]
    if owner.startswith(here) and pid.isdigit():
        return not Path(f"/proc/{pid}").exists()
    changed = next((entry[k] for k in ("mtime", "LastModified", "updated") if entry.get(k) is not None), None)
    if isinstance(changed, (int, float)):
        changed = datetime.fromtimestamp(changed, UTC)
    return isinstance(changed, datetime) and datetime.now(UTC) - changed > _STALE_AFTER
