import collections
import json
import subprocess
import sys

import numpy as np
import pyarrow.compute as pc
import pytest

from gubs import stages
from gubs.artifacts import Run
from gubs.config import load_settings
from gubs.records import FAST_SKIP_BELOW
from gubs.simulator.behaviour import P_FLAW_TOLERANT, simulate


def simulated(preset, overrides):
    settings = load_settings(preset, overrides)
    world = simulate(settings.synthetic, settings.seed)
    world.check()
    return world


@pytest.fixture(scope="module")
def world():
    return simulated("paper", ["users=3000", "videos=3000"])


def sequential(world):
    return world.interactions.filter(pc.equal(world.interactions["task"], "sequential"))


def joined(world):
    """Sequential views with all hidden facts, as a data frame."""
    frame = sequential(world).to_pandas()
    frame = frame.merge(world.truth["skips"].to_pandas(), on="interaction_id", how="left")
    frame = frame.merge(world.truth["videos"].to_pandas(), on="video_id").merge(
        world.truth["users"].to_pandas(), on="user_id"
    )
    return frame.merge(world.videos.select(["video_id", "duration_s", "title"]).to_pandas(), on="video_id")


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path):
    def made(name, seed):
        settings = load_settings("tiny", ["users=50", "videos=40", f"seed={seed}"])
        stages.make(["raw", "truth"], Run(tmp_path / name), settings)
        return {str(p.relative_to(tmp_path / name)): p.read_bytes() for p in (tmp_path / name).glob("*/*.parquet")}

    first, again, other = made("a", 1), made("b", 1), made("c", 2)
    assert len(first) == 7, (
        "raw: users, videos, interactions, rejects; truth: skips, and what is hidden of users and videos"
    )
    assert first == again
    assert first["raw/interactions.parquet"] != other["raw/interactions.parquet"]


def test_rates_are_near_the_papers(world):
    seq = sequential(world)
    rate = seq["play_rate"].to_numpy()
    click = world.interactions.filter(pc.equal(world.interactions["task"], "click"))
    assert (rate < 0.3).mean() == pytest.approx(0.237, abs=0.06)
    assert rate.mean() == pytest.approx(0.483, abs=0.06)
    assert (rate > 0.9).mean() == pytest.approx(0.171, abs=0.05)
    assert pc.mean(click["clicked"]).as_py() == pytest.approx(0.214, abs=0.05)
    assert pc.mean(seq["disliked"]).as_py() == pytest.approx(50 / 320, abs=0.04)


def test_every_skip_and_no_other_view_has_a_true_cause(world):
    seq = sequential(world)
    skipped = set(seq.filter(pc.less(seq["play_rate"], FAST_SKIP_BELOW))["interaction_id"].to_pylist())
    truth = world.truth["skips"]
    assert set(truth["interaction_id"].to_pylist()) == skipped
    assert set(truth["cause"].to_pylist()) == {"B", "C", "D"}
    assert "cause" not in world.interactions.column_names


def test_causes_agree_with_what_happened(world):
    frame = joined(world)
    flaw = frame[frame.mechanism == "flaw"]
    assert (flaw.flaw != "none").all()
    intolerant = np.array([f in row for f, row in zip(flaw.flaw, flaw.intolerance, strict=True)])
    assert intolerant.mean() > 0.8, "most flaw skips come from users who cannot stand that flaw"
    mismatch = frame[frame.mechanism == "mismatch"]
    assert not any(t in row for t, row in zip(mismatch.topic, mismatch.interests, strict=True))
    too_long = frame[frame.mechanism == "too_long"]
    assert (too_long.duration_s > too_long.patience_s).all()
    tolerated = frame[[f != "none" and f not in row for f, row in zip(frame.flaw, frame.intolerance, strict=True)]]
    assert (tolerated.mechanism == "flaw").mean() < 2 * P_FLAW_TOLERANT


def test_groups_can_be_found(world):
    users = world.truth["users"].to_pandas()
    shares = [
        np.mean(
            [
                len(set(i) & set(core)) / len(core)
                for i, core in zip(users.interests, users.archetype_interests, strict=True)
            ]
        ),
        np.mean(
            [
                len(set(i) & set(core)) / len(core)
                for i, core in zip(
                    users.interests, users.archetype_interests.sample(frac=1, random_state=0), strict=True
                )
            ]
        ),
    ]
    assert shares[0] > shares[1] + 0.2, "members share interests with their archetype more than with a random one"


def test_clickbait_titles_name_another_topic(world):
    videos = world.truth["videos"].to_pandas().merge(world.videos.to_pandas(), on="video_id")
    bait = videos[videos.flaw == "clickbait"]
    assert len(bait)
    assert (bait.topic != bait.title_topic).all()
    assert all(topic in title for topic, title in zip(bait.title_topic, bait.title, strict=True))
    honest = videos[videos.flaw == "unpleasant"]
    assert (honest.topic == honest.title_topic).all()


def test_dislikes_come_with_reasons_and_only_after_skips(world):
    seq = sequential(world)
    disliked = seq.filter(seq["disliked"])
    assert pc.max(disliked["play_rate"]).as_py() < FAST_SKIP_BELOW
    assert disliked["dislike_reason"].null_count == 0
    assert seq.filter(pc.invert(seq["disliked"]))["dislike_reason"].null_count == seq.num_rows - disliked.num_rows


def test_repeated_views_are_capped(world):
    seq = (
        sequential(world).to_pandas().merge(world.videos.select(["video_id", "duration_s"]).to_pandas(), on="video_id")
    )
    again = seq[seq.watch_s > seq.duration_s * 1.1]
    assert len(again) > 10
    assert (again.play_rate == 1.0).all()


def test_pages_hold_distinct_positions_and_times_run_forward(world):
    click = world.interactions.filter(pc.equal(world.interactions["task"], "click")).to_pandas()
    assert not click.duplicated(["page_id", "position"]).any()
    assert click.groupby("page_id").user_id.nunique().max() == 1
    for task in ("sequential", "click"):
        frame = world.interactions.filter(pc.equal(world.interactions["task"], task)).to_pandas()
        assert frame.groupby("user_id").timestamp.is_monotonic_increasing.all()


@pytest.mark.parametrize(
    ("noise", "mechanism"), [("accidental_skip", "accident"), ("app_exit", "exit"), ("interruption", "interruption")]
)
def test_noise_rates_are_settings(noise, mechanism):
    def share(rate):
        world = simulated("tiny", ["users=400", "videos=200", f"{noise}={rate}"])
        return collections.Counter(world.truth["skips"]["mechanism"].to_pylist())[mechanism] / len(sequential(world))

    assert share(0.0) == 0.0
    assert share(0.3) > 0.05


def test_noise_leaves_the_marks_that_filters_look_for():
    world = simulated("tiny", ["users=400", "videos=200", "interruption=0.2", "app_exit=0.2", "autoplay=0.2"])
    seq = sequential(world)
    assert pc.mean(seq["exited_app"]).as_py() == pytest.approx(0.2, abs=0.03)
    assert 0.1 < seq["prev_op_gap_s"].null_count / len(seq) < 0.2, "autoplay: no operation before"
    assert pc.sum(pc.greater(seq["next_op_gap_s"], 120)).as_py() / len(seq) > 0.1, "interruption: a long gap after"


@pytest.mark.parametrize(("share", "task"), [(0, "click"), (1, "sequential")])
def test_an_app_may_have_one_task_only(share, task):
    world = simulated("tiny", ["users=20", "videos=20", f"synthetic.sequential_share={share}"])
    assert set(world.interactions["task"].to_pylist()) == {task}


PAPER_SCALE = """
import json, resource, time
begun = time.time()
import numpy as np
from gubs.config import load_settings
from gubs.data.filters import apply_filters
from gubs.data.splits import split
from gubs.simulator.behaviour import simulate
settings = load_settings("paper")
world = simulate(settings.synthetic, settings.seed)
world.check()
passed, _ = apply_filters(world.interactions, settings.filters)
log = split(passed, settings.splits, settings.seed).interactions.to_pandas()
log["clicked"] = log.clicked.fillna(False).astype(bool)
seq, click = log[log.task == "sequential"], log[log.task == "click"]
commonest = lambda values: int(np.bincount(np.asarray(values, int) // 10).argmax()) * 10
length = dict(zip(world.videos["video_id"].to_pylist(), world.videos["duration_s"].to_pylist()))
print(json.dumps({
    "seconds": time.time() - begun,
    "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    "size": [log.user_id.nunique(), seq.user_id.nunique(), log.video_id.nunique(), len(seq), len(click)],
    "rates": [100 * float(r) for r in (
        seq.groupby("user_id").play_rate.mean().mean(), seq.play_rate.mean(), (seq.play_rate > 0.9).mean(),
        (seq.play_rate > 0.3).mean(), click.clicked.mean())],
    "records per user": commonest(log.groupby("user_id").size()),
    "views per video": commonest(log[log.clicked | (log.task == "sequential")].groupby("video_id").size()),
    "length": [commonest(log.video_id.map(length)), float(log.video_id.map(length).between(10, 30).mean())],
}))
"""


def test_preset_paper_leaves_the_papers_data_set():
    """Sizes (A.4), and the first row of Table 2: person and total play rate, finish rate, rate above 30 %, clicks."""
    done = subprocess.run([sys.executable, "-c", PAPER_SCALE], capture_output=True, text=True, check=True, timeout=180)
    figures = json.loads(done.stdout)
    assert figures["size"] == [pytest.approx(n, rel=0.02) for n in (15_000, 8_000, 25_000, 320_000, 613_000)]
    assert figures["rates"] == [pytest.approx(rate, abs=1.0) for rate in (46.5, 48.3, 17.1, 76.3, 21.4)]
    assert figures["rates"][1] - figures["rates"][0] > 1.0, "who has more views watches more"
    assert (figures["records per user"], figures["views per video"]) == (10, 10), "commonest: 10 to 20"
    assert figures["length"][0] in (10, 20)
    assert figures["length"][1] > 0.4
    assert figures["seconds"] < 180
    assert figures["gib"] < 6


def test_accidents_and_exits_change_only_the_views_that_they_hit():
    """With one seed. So a laboratory of noise compares the same views at every rate of it."""
    quiet, noisy = (
        simulate(load_settings("tiny", [*small, f"accidental_skip={a}", f"app_exit={e}"]).synthetic, 3)
        for small in [["users=200", "videos=60"]]
        for a, e in ((0.0, 0.0), (0.2, 0.15))
    )
    assert quiet.users.equals(noisy.users)
    assert quiet.videos.equals(noisy.videos)
    shown = ["interaction_id", "user_id", "video_id", "task", "clicked"]
    assert quiet.interactions.select(shown).equals(noisy.interactions.select(shown))
    before, after = (
        dict(
            zip(t.truth["skips"]["interaction_id"].to_pylist(), t.truth["skips"]["mechanism"].to_pylist(), strict=True)
        )
        for t in (quiet, noisy)
    )
    hit = {i for i, mechanism in after.items() if mechanism in ("accident", "exit")}
    assert hit
    assert {i: m for i, m in after.items() if i not in hit}.items() <= before.items()
    ended = {
        i
        for i, left in zip(
            *noisy.interactions.select(["interaction_id", "exited_app"]).to_pydict().values(), strict=True
        )
        if left
    }
    assert before.keys() - after.keys() <= ended, "an exit may come before what would have been a skip"
