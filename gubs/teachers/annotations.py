"""People's answers: the artifact `annotations`, and the labels of a run including them.

Each answer records its author, time and file. Several people may answer one item: most votes decide, and a tie leaves
the item open. Imports accumulate; a person's later answer to an item replaces the earlier one.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import pyarrow as pa
import pyarrow.compute as pc

from gubs.artifacts import Artifact, JsonObject, Recipe, Run, fingerprint, writing
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
"""The answers. time: UTC, ISO 8601; source: name of the file from which the answer was read."""


@dataclass(frozen=True, slots=True)
class HumanAnswer(Record):
    """One person's answer to one item."""

    interaction_id: str
    annotator: str
    option: str
    time: str
    comment: str | None = None
    source: str | None = None


def add_answers(run: Run, settings: JsonObject, answers: Iterable[HumanAnswer]) -> Artifact:
    """Adds answers to the artifact `annotations`, which is replaced as a whole; its manifest records `settings`.

    Raises:
        ArtifactError: there are no labels, or the earlier answers belong to other labels (see `earlier_answers`).
    """
    labels = run.artifact(reasons.STAGE)
    merged = {(a.interaction_id, a.annotator): a for a in earlier_answers(run)}
    for answer in answers:
        earlier = merged.get((answer.interaction_id, answer.annotator))
        if earlier is None or answer.time >= earlier.time:
            merged[answer.interaction_id, answer.annotator] = answer
    rows = [asdict(a) for _, a in sorted(merged.items())]
    recipe = Recipe(inputs={reasons.STAGE: labels.content}, outside={"answers": fingerprint(STAGE, rows)})
    report = _report(run, labels, votes_of(merged.values()))
    with writing(run, STAGE, recipe=recipe, settings=settings) as out:
        out.write_table("answers", pa.Table.from_pylist(rows, schema=ANSWERS))
        out.info = report
        out.summary = f"{len(rows):,} answers from people, {report['decided']:,} skips decided"
    return run.artifact(STAGE)


def earlier_answers(run: Run) -> list[HumanAnswer]:
    """The answers that the run already has.

    Raises:
        ArtifactError: the labels whose queue they answer have been made again since.
    """
    if not run.has(STAGE):
        return []
    annotations = run.artifact(STAGE)
    if annotations.manifest.recipe.inputs.get(reasons.STAGE) != run.artifact(reasons.STAGE).content:
        raise ArtifactError(
            f"{annotations.uri} answers the queue of other labels than those now in {run.full(reasons.STAGE)}: "
            "move it away, or make the labels again with the earlier settings"
        )
    return list(HumanAnswer.from_table(annotations.table("answers")))


def votes_of(answers: Iterable[HumanAnswer]) -> dict[str, dict[str, str]]:
    """Item -> annotator -> option."""
    votes: dict[str, dict[str, str]] = {}
    for a in answers:
        votes.setdefault(a.interaction_id, {})[a.annotator] = a.option
    return votes


def all_labels(run: Run) -> pa.Table:
    """The labels of a run (schema `reasons.LABELS`): by rule, by a teacher, and by people.

    Raises:
        ArtifactError: there are no labels.
    """
    labels = run.artifact(reasons.STAGE)
    decided = _decided(votes_of(earlier_answers(run)))
    table = labels.table("labels")
    if not decided:
        return table
    queue = labels.table("queue").to_pylist()
    rows = [_human_row(row, decided[row["interaction_id"]]) for row in queue if row["interaction_id"] in decided]
    return pa.concat_tables([table, pa.Table.from_pylist(rows, schema=reasons.LABELS)])


def open_items(run: Run, annotator: str = "") -> pa.Table:
    """The items of the queue that are not decided or, for an annotator, that this person has not answered."""
    queue = run.artifact(reasons.STAGE).table("queue")
    votes = votes_of(earlier_answers(run))
    done = [item for item, by in votes.items() if annotator in by] if annotator else list(_decided(votes))
    return queue.filter(pc.invert(pc.is_in(queue["interaction_id"], value_set=pa.array(done, pa.string()))))


def _decided(votes: Votes) -> dict[str, str]:
    return {item: option for item, by in votes.items() if (option := majority(by))}


def _human_row(row: JsonObject, option: str) -> JsonObject:
    ids = {f.name: row[f.name] for f in reasons.IDS}
    rounds = len(row["attempts"] or [])
    return {**ids, "option": option, "rounds": rounds, "label_source": HUMAN, "verdicts": row["attempts"]}


def _report(run: Run, labels: Artifact, votes: Votes) -> JsonObject:
    decided = _decided(votes)
    return {
        "agreement": agreement(votes),
        "decided": len(decided),
        "tied": sorted(set(votes) - set(decided)),
        "still_open": labels.manifest.tables["queue"].rows - len(decided),
        "truth": score(decided, true_causes(run)),
    }
