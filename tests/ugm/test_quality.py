"""On a simulated app, whose true groups are known: what the evidence finds is theirs, and the figures say so."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from gubs.llm.settings import LLMSettings
from gubs.prompts.people import Person
from gubs.records import User, Video
from gubs.simulator.behaviour import simulate
from gubs.simulator.settings import NoiseSettings, SyntheticSettings
from gubs.ugm.author import write_profile
from gubs.ugm.checks import Evidence, fault_of, unsupported
from gubs.ugm.evidence import RECORD_COLUMNS, read_records
from gubs.ugm.manager import manage
from gubs.ugm.placement import Placement
from gubs.ugm.quality import geometry, skips
from gubs.ugm.settings import UGMSettings

NOISE = NoiseSettings(accidental_skip=0.005, wrong_tags=0.03, missing_tags=0.05, deviation=0.08)
WORLD = SyntheticSettings(users=400, videos=300, topics=12, archetypes=5, matched=0.75, flaw_rate=0.25, noise=NOISE)


class World:
    """A simulated app: the first half of its users makes groups, the rest is held out."""

    def __init__(self):
        tables = simulate(WORLD, seed=1)
        users = list(User.from_table(tables.users))
        self.videos = {v.video_id: v for v in Video.from_table(tables.videos)}
        truth = tables.truth["users"]
        self.archetype = dict(zip(truth["user_id"].to_pylist(), truth["archetype"].to_pylist(), strict=True))
        self.log = tables.interactions.select(RECORD_COLUMNS)
        self.people = [Person(u) for u in users[::2]]
        self.others = users[1::2]
        self.records = read_records(self.people, self.of([p.user.user_id for p in self.people]), self.videos)

    def of(self, user_ids):
        wanted = set(user_ids)
        return self.log.filter(pa.array([u in wanted for u in self.log["user_id"].to_pylist()]))


@pytest.fixture(scope="module")
def world():
    return World()


class NoModel:
    settings = LLMSettings()

    def ask(self, requests):
        raise AssertionError("no model is asked")


@pytest.fixture(scope="module")
def result(world):
    settings = UGMSettings(groups=5, top=60, overlap=False, author="evidence", min_matched=3)
    return manage(NoModel(), world.people, settings, records=world.records, seed=0)


def members_of(result):
    return {f"g{i:02d}": [m.user_id for m in g.matched] for i, g in enumerate(result.groups) if not g.dropped}


def test_the_groups_are_the_true_ones(result, world):
    groups = members_of(result)
    truth = [[world.archetype[u] for u in members] for members in groups.values()]
    purity = sum(max(Counter(t).values()) for t in truth) / sum(map(len, truth))
    assert purity > 0.8
    assert sum(map(len, truth)) > 0.7 * len(world.people)


def test_figures_tell_good_groups_from_bad_ones(result, world):
    users = [p.with_tags for p in world.people]
    good = geometry(users, result.encoder, result.centres, seed=0)
    same = [i for i, p in enumerate(world.people) if world.archetype[p.user.user_id] == 0][:5]
    bad = geometry(users, result.encoder, result.encoder.encode([users[i] for i in same]), seed=0)
    assert good["silhouette"] > 0.4 > bad["silhouette"]
    assert good["stability"] > 0.8 > bad["stability"]
    one = geometry(users, result.encoder, result.centres[:1], seed=0)
    assert one == {"silhouette": None, "stability": None}


def test_what_a_group_skips_says_more_than_what_everybody_skips(result, world):
    place = Placement(result.encoder, list(members_of(result)), result.centres, [0.3] * 5)
    held_out = {u.user_id: f[0] for u, f in zip(world.others, place.place(world.others), strict=True) if f}
    log = world.of(held_out)
    scores = skips(world.records, members_of(result), held_out, log, world.videos)
    assert scores["users"] > 50
    assert scores["group"] > scores["everybody"] + 0.05
    shuffled = dict(zip(held_out, np.random.default_rng(0).permutation(list(held_out.values())), strict=True))
    wrong = skips(world.records, members_of(result), shuffled, log, world.videos)
    assert wrong["group"] < scores["group"] - 0.05, "the right group's skips, not any group's"


def test_sources_without_play_rates_have_no_such_figure(result, world):
    bare = read_records(world.people, world.log.slice(0, 0), world.videos)
    assert skips(bare, {}, {}, world.log.slice(0, 0), world.videos)["group"] is None


def test_whatever_the_group_its_profile_holds(world):
    rng = np.random.default_rng(0)
    topics = world.records.items("interest", "skipped", "clicked")
    for size in rng.integers(2, 40, 60):
        members = [world.people[i].user.user_id for i in rng.permutation(len(world.people))[:size]]
        findings = world.records.findings(members)
        profile = write_profile(findings)
        assert unsupported(profile, Evidence(findings, topics)) == {}, profile
        assert fault_of(profile) == ""
