"""Where a user belongs: the encoder and the groups' centres as the UGM left them, as two tables of its artifact.

The same object places everybody who was not clustered: the stage's own users, a table of new users
(`gubs groups assign`), and unknown users of a filter.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from scipy import sparse

from gubs.artifacts import Artifact
from gubs.errors import ArtifactError
from gubs.records import User
from gubs.ugm.cluster import BertEncoder, Encoder, TfidfEncoder, Vectors, dense, place
from gubs.ugm.settings import Mode

ENCODER, CENTRES = "encoder", "centres"
"""Names of the tables."""
_ABOUT = b"gubs.encoder"

WORDS = pa.schema([pa.field("word", pa.string(), nullable=False), pa.field("idf", pa.float64(), nullable=False)])
"""Table `encoder`: the words of the profiles; its metadata say which encoder it is. Empty for a sentence encoder."""
CENTRE = pa.schema(
    [
        pa.field("group_id", pa.string(), nullable=False),
        ("threshold", pa.float64()),
        ("position", pa.list_(pa.int32())),
        ("weight", pa.list_(pa.float32())),
    ]
)
"""Table `centres`: the vector of each group, without its zeros; positions are rows of `encoder`, or dimensions."""


@dataclass(frozen=True)
class Placement:
    """Places users in groups."""

    encoder: Encoder
    group_ids: Sequence[str]
    centres: Vectors
    """(groups, d)"""
    thresholds: Sequence[float]

    def place(self, users: Iterable[User]) -> Iterator[tuple[str, float] | None]:
        """Group and similarity of each user, or None; reads any number of users in blocks."""
        for placed in place(users, self.encoder, self.centres, self.thresholds):
            yield (self.group_ids[placed[0]], placed[1]) if placed else None

    def tables(self) -> dict[str, pa.Table]:
        """As the tables of an artifact."""
        about: dict[str, object] = {"mode": self.encoder.mode, "size": self.centres.shape[1]}
        idf: dict[str, float] = {}
        if isinstance(self.encoder, TfidfEncoder):
            idf = self.encoder.idf
            about |= {"method": "tfidf", "users": self.encoder.users}
        else:
            about |= {"method": "bert", "model": self.encoder.name}
        words = pa.table({"word": list(idf), "idf": list(idf.values())}, schema=WORDS)
        rows = []
        for group_id, threshold, centre in zip(self.group_ids, self.thresholds, dense(self.centres), strict=True):
            position = np.flatnonzero(centre)
            row = {"group_id": group_id, "threshold": threshold, "position": position, "weight": centre[position]}
            rows.append(row)
        return {
            ENCODER: words.replace_schema_metadata({_ABOUT: json.dumps(about).encode()}),
            CENTRES: pa.Table.from_pylist(rows, schema=CENTRE),
        }

    @classmethod
    def read(cls, artifact: Artifact) -> "Placement":
        """From an artifact that holds the tables.

        Raises:
            ArtifactError: it has none, or an earlier version wrote it.
        """
        words, centres = artifact.table(ENCODER), artifact.table(CENTRES)
        text = (words.schema.metadata or {}).get(_ABOUT)
        if text is None:
            raise ArtifactError(f"{artifact.uri}/{ENCODER}.parquet does not say which encoder it is: make it again")
        about = json.loads(text)
        mode: Mode = about["mode"]
        encoder: Encoder
        if about["method"] == "bert":
            encoder = BertEncoder(about["model"], mode)
        else:
            idf = dict(zip(words["word"].to_pylist(), words["idf"].to_pylist(), strict=True))
            encoder = TfidfEncoder(mode, idf, about["users"])
        rows = centres.to_pylist()
        matrix = sparse.lil_matrix((len(rows), about["size"]), dtype=np.float32)
        for i, row in enumerate(rows):
            matrix[i, row["position"]] = row["weight"]
        vectors = matrix.tocsr() if about["method"] == "tfidf" else matrix.toarray()
        return cls(encoder, centres["group_id"].to_pylist(), vectors, centres["threshold"].to_pylist())
