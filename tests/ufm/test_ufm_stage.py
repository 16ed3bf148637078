"""What a training says and decides before it starts."""

from types import SimpleNamespace

import pyarrow as pa
import pytest

from gubs.errors import ArtifactError, PlatformError
from gubs.records import Task
from gubs.ufm.monitor import check_trackers
from gubs.ufm.settings import SFTSettings
from gubs.ufm.sft import order_of, steps_of
from gubs.ufm.stage import _options, _tasks


class Log:
    """Questions about a data set with these golds of training records by task."""

    def __init__(self, **golds):
        self.golds = golds
        self.run = SimpleNamespace(uri="r")
        rows = [{"task": t, "split": "train", "role": "target"} for t in golds]
        schema = pa.schema([(c, pa.string()) for c in ("task", "split", "role")])
        self.ifvr = SimpleNamespace(uri="r/ifvr", table=lambda *_: pa.Table.from_pylist(rows, schema=schema))

    def items(self, task, _):
        return [SimpleNamespace(task=task, gold=g) for g in self.golds[str(task)]]


@pytest.mark.parametrize(
    ("examples", "epochs", "min_steps", "steps"),
    [(906, 1, 0, 57), (83, 1, 0, 6), (83, 1, 200, 203), (83, 1, 209, 213), (906, 4, 200, 227), (3, 2, 0, 1)],
)
def test_few_examples_are_repeated_until_there_are_enough_steps(examples, epochs, min_steps, steps):
    sft = SFTSettings(epochs=epochs, min_steps=min_steps, batch=16)
    assert steps_of(examples, sft) == steps
    order = order_of(examples, sft, 3)
    assert len(order) == 16 * steps
    assert set(order) == set(range(examples)), "no example is left out"
    assert order == order_of(examples, sft, 3) != order_of(examples, sft, 4)


def test_every_epoch_has_an_order_of_its_own_and_leaves_none_out():
    order = order_of(83, SFTSettings(epochs=4, batch=16), 0)
    first, second = order[:83], order[83:166]
    assert sorted(first) == sorted(second) == list(range(83))
    assert first != second


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_spent():
    check_trackers(["tensorboard"])
    with pytest.raises(PlatformError, match="pip install wandb"):
        check_trackers(["tensorboard", "wandb"])


def test_what_is_missing_is_named():
    counts = {("sequential", "A"): 1200, ("sequential", "C"): 3}
    assert _options("records", counts) == "records: sequential task: 1,200 A, 3 C (none of B, D); click task: none"


def test_a_task_with_one_option_only_is_left_out_and_said():
    said = []
    assert _tasks(Log(sequential="ABBA", click="BBB"), tuple(Task), said.append) == (Task.SEQUENTIAL,)
    assert "the click task is left out: its records have one option only" in said


def test_turns_are_kept_as_they_are_named():
    wanted = (Task.CLICK, Task.SEQUENTIAL, Task.SEQUENTIAL)
    assert _tasks(Log(sequential="AB", click="AB"), wanted, lambda _: None) == wanted


def test_without_any_choice_to_learn_nothing_is_trained():
    with pytest.raises(ArtifactError, match="two options"):
        _tasks(Log(click="BBB"), tuple(Task), lambda _: None)
