"""A stage is stale as soon as a text of its prompts changes: every part of a prompt is in its hash."""

from importlib import resources
from pathlib import Path

import jinja2
import pytest
from jinja2 import meta

from gubs import prompts
from gubs.records import Option, Task

FOLDER = Path(str(resources.files("gubs.prompts")))
TEMPLATES = sorted(str(p.relative_to(FOLDER).with_suffix("")) for p in FOLDER.rglob("*.j2"))


def included(name: str) -> set[str]:
    """A template and all that it includes, as Jinja sees them."""
    others = meta.find_referenced_templates(jinja2.Environment().parse((FOLDER / f"{name}.j2").read_text()))
    return {name}.union(*(included(other.removesuffix(".j2")) for other in others))


@pytest.mark.parametrize("changed", TEMPLATES)
def test_a_changed_template_changes_its_hash_and_those_of_templates_that_include_it(changed, monkeypatch):
    before, source = prompts.hashes(TEMPLATES), prompts._source
    monkeypatch.setattr(prompts, "_source", lambda name: source(name) + ("\nOne line more." if name == changed else ""))
    after = prompts.hashes(TEMPLATES)
    differing = {name for name in TEMPLATES if before[name] != after[name]}
    assert differing == {name for name in TEMPLATES if changed in included(name)}


def test_there_are_templates_that_include_others():
    """Otherwise the test above would prove nothing."""
    assert "teachers/who" in included("teachers/label")
    assert {"ufm/who", "ufm/form"} < included("ufm/sequential_user")


def test_a_changed_option_changes_the_hash_of_the_options_alone(monkeypatch):
    names = [*TEMPLATES, prompts.OPTIONS]
    before = prompts.hashes(names)
    texts = {task: dict(options) for task, options in prompts.OPTION_TEXTS.items()}
    texts[Task.SEQUENTIAL][Option.C] += " Or so."
    monkeypatch.setattr(prompts, "OPTION_TEXTS", texts)
    after = prompts.hashes(names)
    assert [name for name in names if before[name] != after[name]] == [prompts.OPTIONS]


def test_hashes_are_those_of_the_given_names():
    assert list(prompts.hashes(["ugm/match", prompts.OPTIONS])) == ["ugm/match", prompts.OPTIONS]
    assert prompts.hashes(["ugm/match"]) == prompts.hashes(["ugm/match"])
    with pytest.raises(FileNotFoundError):
        prompts.hashes(["ugm/mtach"])
