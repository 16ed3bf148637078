"""What people answered: the artifact `annotations`, and the labels of a run with these answers in their place.

Answers keep who gave them, when, and from which file. Several people may answer one item: most votes decide, a tie
leaves the item open. Imports add up; a person's later answer to an item replaces the earlier one.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from gubs.artifacts import Artifact, Recipe, Run, fingerprint, writing
from gubs.errors import ArtifactError
from gubs.records import Record
from gubs.teachers import reasons
from gubs.teachers.agreement import Votes, agreement, majority
from gubs.teachers.score import score, true_causes

STAGE = "annotations"
HUMAN = "human"

ANSWERS = pa.schema(
    [
        pa.field("interaction_id", pa.string(), nullable=False),
        pa.field("annotator", pa.string(), nullable=False),
        pa.field("option", pa.string(), nullable=False),
        ("comment", pa.string()),
        pa.field("time", pa.string(), nullable=False),
        ("source", pa.string()),
    ]
)
"""Every person's answer. time: UTC, ISO 8601; source: name of the file it was read from."""


@dataclass(frozen=True, slots=True)
class HumanAnswer(Record):
    """One person's answer to one item."""

    interaction_id: str
    annotator: str
    option: str
    time: str
    comment: str | None = None
    source: str | None = None


def add_answers(run: Run, settings: Mapping[str, Any], answers: Iterable[HumanAnswer]) -> Artifact:
    """Adds answers to the artifact `annotations`, which is replaced as a whole; `settings` are for its manifest.

    Raises:
        ArtifactError: there are no labels, or the earlier answers belong to other labels (see `earlier_answers`).
    """
    labels = run.artifact(reasons.STAGE)
    merged = {(a.interaction_id, a.annotator): a for a in earlier_answers(run)}
    for answer in answers:
        known = merged.get((answer.interaction_id, answer.annotator))
        if known is None or answer.time >= known.time:
            merged[answer.interaction_id, answer.annotator] = answer
    rows = [asdict(a) for _, a in sorted(merged.items())]
    recipe = Recipe(inputs={reasons.STAGE: labels.content}, outside={"answers": fingerprint(STAGE, rows)})
    votes = votes_of(merged.values())
    with writing(run, STAGE, recipe=recipe, settings=settings) as out:
        out.write_table("answers", pa.Table.from_pylist(rows, schema=ANSWERS))
        out.info = _report(run, labels, votes)
        out.summary = f"{len(rows):,} answers of people, {out.info['decided']:,} skips decided"
    return run.artifact(STAGE)


def earlier_answers(run: Run) -> list[HumanAnswer]:
    """The answers that the run has already.

    Raises:
        ArtifactError: they are answers to the queue of labels that have been made anew since.
    """
    if not run.has(STAGE):
        return []
    found = run.artifact(STAGE)
    if found.manifest.recipe.inputs.get(reasons.STAGE) != run.artifact(reasons.STAGE).content:
        raise ArtifactError(
            f"{found.uri} answers the queue of other labels than {run.full(reasons.STAGE)} holds now: "
            "move it away, or make the labels with the earlier settings"
        )
    return list(HumanAnswer.from_table(found.table("answers")))


def votes_of(answers: Iterable[HumanAnswer]) -> dict[str, dict[str, str]]:
    """Item -> annotator -> option."""
    votes: dict[str, dict[str, str]] = {}
    for a in answers:
        votes.setdefault(a.interaction_id, {})[a.annotator] = a.option
    return votes


def all_labels(run: Run) -> pa.Table:
    """The labels of a run (schema `reasons.LABELS`): by rule, by teacher, and what people decided.

    Raises:
        ArtifactError: there are no labels.
    """
    labels = run.artifact(reasons.STAGE)
    decided = {item: option for item, v in votes_of(earlier_answers(run)).items() if (option := majority(v))}
    table = labels.table("labels")
    if not decided:
        return table
    rows = [_human_row(r, decided[r["interaction_id"]]) for r in labels.table("queue").to_pylist() if _in(r, decided)]
    return pa.concat_tables([table, pa.Table.from_pylist(rows, schema=reasons.LABELS)])


def open_items(run: Run, annotator: str = "") -> pa.Table:
    """The queue without what is decided, or, for an annotator, without what this person has answered."""
    queue = run.artifact(reasons.STAGE).table("queue")
    votes = votes_of(earlier_answers(run))
    if annotator:
        done = [item for item, v in votes.items() if annotator in v]
    else:
        done = [item for item, v in votes.items() if majority(v)]
    return queue.filter(pc.invert(pc.is_in(queue["interaction_id"], value_set=pa.array(done, pa.string()))))


def _in(row: dict[str, Any], decided: dict[str, str]) -> bool:
    return row["interaction_id"] in decided


def _human_row(row: dict[str, Any], option: str) -> dict[str, Any]:
    ids = {f.name: row[f.name] for f in reasons.IDS}
    rounds = len(row["attempts"] or [])
    return {**ids, "option": option, "rounds": rounds, "label_source": HUMAN, "verdicts": row["attempts"]}


def _report(run: Run, labels: Artifact, votes: Votes) -> dict[str, Any]:
    decided = {item: option for item, v in votes.items() if (option := majority(v))}
    return {
        "agreement": agreement(votes),
        "decided": len(decided),
        "tied": sorted(set(votes) - set(decided)),
        "still_open": labels.manifest.tables["queue"].rows - len(decided),
        "truth": score(decided, true_causes(run)),
    }
