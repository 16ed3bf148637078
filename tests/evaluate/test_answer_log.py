"""A killed evaluation continues: no answer is asked for twice, and the result is that of one attempt."""

from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import fsspec
import pytest

from gubs.evaluate import answers, judge
from gubs.evaluate.answers import AnswerLog
from gubs.records import Option, Task
from gubs.ufm.labels import OptionProbabilities
from gubs.ufm.predict import Prediction
from gubs.ufm.questions import Item
from gubs.ufm.rollout import Response
from gubs.ufm.settings import UFMSettings

LOCAL = fsspec.filesystem("file")


def prediction(number: int, mode: str = "greedy") -> Prediction:
    """Every kind: with options, without any, never asked."""
    options = OptionProbabilities({Option.A: number / 100, Option.B: 1 - number / 100}, 0.5) if number % 3 else None
    text = None if number % 7 == 6 else f"answer {number}"
    return Prediction((mode, number), text, text is not None, Response((1, 2), (), 0.0) if text else None, options)


def without_tokens(prediction: Prediction) -> Prediction:
    return Prediction(prediction.key, prediction.text, prediction.finished, None, prediction.options)


def test_answers_come_back_as_they_were(tmp_path):
    log = AnswerLog(LOCAL, str(tmp_path / "answers"))
    for n in range(20):
        log.add(prediction(n))
        if n == 11:
            log.write()
    log.write()
    again = AnswerLog(LOCAL, str(tmp_path / "answers"))
    assert again.answered_before == 20
    assert again.answers == log.answers == {("greedy", n): without_tokens(prediction(n)) for n in range(20)}


def test_answers_are_written_in_time_not_only_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "_ROWS", 8)
    log = AnswerLog(LOCAL, str(tmp_path / "answers"))
    for n in range(20):
        log.add(prediction(n))
    assert AnswerLog(LOCAL, str(tmp_path / "answers")).answered_before == 16, "killed now, only the last few are lost"
    monkeypatch.setattr(answers, "_SECONDS", 0.0)
    log.add(prediction(20))
    assert AnswerLog(LOCAL, str(tmp_path / "answers")).answered_before == 21


class Dying:
    """A policy that dies after some answers."""

    left = 0
    asked: ClassVar[list[tuple[str, int]]] = []

    def __init__(self, *_: object, **__: object):
        pass

    def __enter__(self) -> "Dying":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def stream(self, queries):
        for query in queries:
            if not Dying.left:
                raise KeyboardInterrupt
            Dying.left -= 1
            Dying.asked.append(query.key)
            yield prediction(query.key[1], query.key[0])


def test_a_killed_evaluation_asks_nothing_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "Predictor", Dying)
    monkeypatch.setattr(judge, "Inputs", lambda *_: None)
    monkeypatch.setattr(answers, "use_gpu", lambda _: False)
    monkeypatch.setattr(judge.Labels, "of", lambda *_: None)
    Dying.asked.clear()
    questions = SimpleNamespace(pictures=False, largest=None, about_user=lambda *_: None)
    items = [(Item(f"i{n}", "u", "v", Task.SEQUENTIAL, Option.A, "rule"), {}) for n in range(30)]
    held_out = [item for item, _ in items[:10]]
    for attempt in range(4):
        Dying.left, log = 25, AnswerLog(LOCAL, str(tmp_path / "answers"))
        assert log.answered_before == 25 * attempt if attempt < 3 else log.answered_before == 70
        if attempt < 2:
            with pytest.raises(KeyboardInterrupt):
                judge.ask(items, held_out, questions, Path(), UFMSettings(), 1, 0, log)
        else:
            judge.ask(items, held_out, questions, Path(), UFMSettings(), 1, 0, log)
    assert len(Dying.asked) == len(set(Dying.asked)) == 70, "the fourth attempt asks nothing"
    assert set(log.answers) == {(m, n) for m in ("greedy", "sampled") for n in range(30)} | {
        ("held out", n) for n in range(10)
    }
