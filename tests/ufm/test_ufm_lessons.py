"""The lessons of the tiny model: what they show and say, and that a model learns from them; how its weights begin."""

import json
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from gubs.prompts.answers import read_answer
from gubs.prompts.digest import RATES
from gubs.records import TASK_OPTIONS, Option, Task, User, Video
from gubs.teachers.script import LONG_S
from gubs.ufm import lessons
from gubs.ufm.inputs import Inputs
from gubs.ufm.model import init, load
from gubs.ufm.settings import InputSettings, ModelSettings
from gubs.ufm.vocabulary import Vocabulary

MODEL = ModelSettings(dtype="float32", gradient_checkpointing=False)


@pytest.fixture(scope="module")
def some() -> list[tuple]:
    rng = np.random.default_rng(1)
    pool = lessons.simulated(rng, 60, clips=True)
    return [lessons.lesson(pool, rng) for _ in range(300)]


@pytest.fixture(scope="module")
def words() -> Vocabulary:
    """A log with names that are no words."""
    tags = tuple(f"tag {n}" for n in range(4, 16))  # as many odd lengths as even ones: outcomes lean by them
    videos = [Video(f"v{n}", None, float(5 + 7 * n % 200), tags=[tags[n % 12], "upload: short"]) for n in range(60)]
    users = [User(f"u{n}", other={"fans": "10 to under 100"}) for n in range(100)]
    return Vocabulary(tuple(users), tuple(videos), (*tags, "upload: short"), ((Task.SEQUENTIAL, "skips"),))


@pytest.fixture(scope="module")
def own(words) -> list[tuple]:
    rng = np.random.default_rng(1)
    pool = lessons.own_words(words, rng)
    return [lessons.lesson(pool, rng) for _ in range(300)]


def test_lessons_in_own_words_say_only_what_stands_in_the_prompt(own):
    """Topic, interests, verdict and digest, of users and of groups; every word of a digest comes up."""
    groups = 0
    for prompt, answer in own:
        group = "Group: " in prompt.text
        groups += group
        shown = re.search(r"Likes: (.*)\.$" if group else r"^User: (.*)$", prompt.text, re.MULTILINE)[1]
        listed = shown.split(", ") if group else json.loads(shown)[-1]
        topic = re.search(r'Topic "([^"]+)"', answer)[1]
        assert topic in prompt.text.rsplit("Video:", 1)[1]
        assert (topic in listed) is ("It fits." in answer)
        assert group or re.search(r"^Skips .*$", prompt.text, re.MULTILINE)[0] in answer
        assert read_answer(answer, TASK_OPTIONS[Task.SEQUENTIAL], finished=True).ok
    assert 20 < groups < 60
    assert all(any(f"Skips {rate}," in a for _, a in own) for rate in RATES)


def test_a_checkpoint_in_own_words_keeps_names_in_one_piece(words, own, tmp_path):
    """Another vocabulary is another checkpoint; what has no name of its own falls back on bytes."""
    from gubs.ufm.model import _recipe

    tokenizer = Inputs(init("tiny", tmp_path / "own", words=words), InputSettings()).tokenizer
    prompt, answer = own[0]
    assert tokenizer.decode(tokenizer(prompt.text + answer).input_ids) == prompt.text + answer
    assert tokenizer.tokenize('"tag 7"') == ['"', "tag 7", '"']
    assert len(tokenizer.tokenize(" sometimes")) == 1
    other = replace(words, tags=words.tags[:-1])
    assert len({_recipe("tiny", 0, 1, w) for w in (None, words, other)}) == 3


def task_of(prompt) -> Task:
    return Task.CLICK if prompt.text.startswith("Offered") else Task.SEQUENTIAL


def test_a_lesson_ends_in_the_form_of_an_answer(some):
    for prompt, answer in some:
        assert read_answer(answer, TASK_OPTIONS[task_of(prompt)], finished=True).ok, answer


def test_what_a_lesson_says_stands_in_its_prompt(some):
    """Topic, interests and digest are quoted, the verdict on the interests is right; groups have no digest."""
    groups = 0
    for prompt, answer in some:
        group = "Group: " in prompt.text
        groups += group
        shown = re.search(r"Likes: (.*)\.$" if group else r"^User: (.*)$", prompt.text, re.MULTILINE)[1]
        listed = shown.split(", ") if group else json.loads(shown)[-1]
        topic = re.search(r'Topic "(\w+)"', answer)[1]
        assert (topic in listed) is ("It fits." in answer)
        assert topic in prompt.text.rsplit("Video:", 1)[1]
        digest = re.search(r"^(Skips|Clicks) .*$", prompt.text, re.MULTILINE)
        assert group or digest[0] in answer
        assert group is (digest is None)
    assert 20 < groups < 60


def test_a_title_comes_with_another_length_each_time(some):
    """Otherwise the length's class would be learned by heart with the title."""
    lengths: dict[str, set[str]] = {}
    for prompt, _ in some:
        title, length = json.loads(prompt.text.rsplit("Video:", 1)[1].split("\n")[0]).values()
        lengths.setdefault(title, set()).add(length)
    assert sum(len(lengths_of) > 1 for lengths_of in lengths.values()) > 0.8 * len(lengths)


def test_half_of_the_lengths_are_known_from_the_history(some):
    """Each length's word comes up: with invented lengths alone, most would be unknown."""
    named = Counter(match[1] for p, _ in some if (match := re.search(r" s(?: and more)? (\w+), such tags", p.text)))
    assert 0.1 < named["unknown"] / named.total() < 0.6
    assert set(RATES) <= set(named)


def test_common_sense_names_what_speaks_and_leaves_open_which_of_several_counts(some):
    """What nothing speaks against is watched on; now and then anything is said, so that no option is forgotten."""
    by_facts: dict[tuple[str, ...], Counter[str]] = {}
    for prompt, answer in some:
        if task_of(prompt) == Task.SEQUENTIAL:
            seconds = re.search(r'"(\d+) s"', prompt.text.rsplit("Video:", 1)[1])
            marks = {"B": "But the" in answer, "C": "not fit" in answer, "D": long(prompt.text, int(seconds[1]))}
            speaks = tuple(o for o, holds in marks.items() if holds)
            option = read_answer(answer, tuple(Option), finished=True).option
            by_facts.setdefault(speaks, Counter())[str(option)] += 1
    assert len(by_facts) >= 6
    named = [(sum(answers[o] for o in speaks or "A"), answers.total()) for speaks, answers in by_facts.items()]
    assert 0.85 < sum(n for n, _ in named) / sum(total for _, total in named) < 1.0
    for speaks, answers in by_facts.items():
        likely = set(speaks or "A")
        assert answers.most_common(1)[0][0] in likely, (speaks, answers)
        assert answers.total() < 20 or likely <= set(answers), (speaks, answers)


def long(prompt: str, seconds: int) -> bool:
    """No lesson shows three watched views, which would say what is long for the user; groups have no length."""
    return "Group: " not in prompt and seconds > LONG_S


def test_hidden_pictures_are_not_talked_about(some):
    shown = [(p, a) for p, a in some if "hard to bear" in a]
    assert shown
    assert all(p.clip is not None for p, _ in shown)


def test_lessons_are_learned(tiny):
    """Twenty-five steps lower the loss of lessons that were not among them."""
    inputs = Inputs(tiny, InputSettings())
    model = load(tiny, MODEL, train=True)
    first = lessons.teach(load(tiny, MODEL, train=True), inputs, 1, seed=5)
    last = lessons.teach(model, inputs, 25, seed=5)
    after = lessons.teach(model, inputs, 1, seed=6)
    assert after < last < first


def test_taught_and_untaught_are_different_checkpoints(tmp_path):
    """The number of lessons is part of the recipe: another number, another folder in the cache."""
    from gubs.ufm.model import _recipe

    assert len({_recipe("tiny", 0, n) for n in (0, 1, 2)}) == 3
    taught = init("tiny", tmp_path / "taught", lessons=1)
    assert not torch.equal(weights(taught), weights(init("tiny")))


def weights(folder) -> torch.Tensor:
    return load(folder, MODEL).model.language_model.layers[0].mlp.up_proj.weight


def test_weights_begin_wide_and_keys_like_queries(tiny):
    layer = load(tiny, MODEL).model.language_model.layers[0]
    assert layer.mlp.up_proj.weight.std().item() == pytest.approx(128**-0.5, rel=0.05)
    keys, queries = layer.self_attn.k_proj.weight, layer.self_attn.q_proj.weight
    dim, shared = layer.self_attn.head_dim, len(queries) // len(keys)
    for head in range(len(keys) // dim):
        at = head * shared * dim
        assert torch.equal(keys[head * dim : (head + 1) * dim], queries[at : at + dim])
