"""The page and the summary of a run: right counts, honest gaps, nothing that escapes into the page."""

import io
import json
import re

import numpy as np
import pyarrow as pa
import pytest
from artifact_helpers import put
from PIL import Image

from gubs.artifacts import Recipe, Run, writing
from gubs.config import Settings
from gubs.errors import ArtifactError
from gubs.records import conform, empty
from gubs.report.data import MAX_BINS, _histogram, describe, render_page, write_page
from gubs.simulator.render import Scene, render
from gubs.simulator.settings import RenderSettings
from gubs.video.decoded import Decoded, DecodeOptions, Verdict
from gubs.video.frame_store import FrameStore
from gubs.video.frames import SCHEMA as FRAMES
from gubs.video.settings import FrameSettings

EVIL = '<script>alert("x")</script>'

USERS = [
    {"user_id": "u1", "age": 25, "gender": "f", "occupation": "nurse", "other": [("city", "big")], "tags": ["pets"]},
    {"user_id": "u2", "age": 31, "gender": "f", "occupation": None, "other": [], "tags": ["pets", EVIL]},
    {"user_id": "u3", "age": None, "gender": None, "occupation": None, "other": None, "tags": None},
]
VIDEOS = [
    {"video_id": "v1", "title": EVIL, "duration_s": 15.0, "tags": [EVIL, "pets"]},
    {"video_id": "v2", "title": None, "duration_s": 25.0, "tags": None},
    {"video_id": "v3", "title": "never seen", "duration_s": None, "tags": []},
]


def view(i, user, video, rate, disliked=None, **more):
    row = {"interaction_id": i, "user_id": user, "video_id": video, "task": "sequential", "play_rate": rate}
    return {**row, "disliked": disliked, **more}


def exposure(i, user, video, clicked):
    return {"interaction_id": i, "user_id": user, "video_id": video, "task": "click", "clicked": clicked}


INTERACTIONS = [
    view("i1", "u1", "v1", 0.1, disliked=True),
    view("i2", "u1", "v1", 0.3, disliked=False),
    view("i3", "u1", "v2", 0.95),
    view("i4", "u2", "v1", 0.25),
    view("i5", "u2", "v2", None),
    exposure("i6", "u3", "v1", True),
    exposure("i7", "u3", "v2", False),
    exposure("i8", "u3", "v2", None),
]
RAW_INFO = {
    "files": {"log.csv": {"rows_in": 11, "rows_out": 8, "rejected": {"no such user": 2, "negative time": 1}}},
    "notes": ["There are no app exits."],
    "nulls": {"users": [], "interactions": ["exited_app"]},
}


def rows(name, records, schema=None):
    table = pa.Table.from_pylist(records, empty(schema or name).schema) if records else empty(schema or name)
    return conform(table, schema or name)


def add_raw(run, users=USERS, videos=VIDEOS, interactions=INTERACTIONS, info=RAW_INFO):
    tables = {"users": users, "videos": videos, "interactions": interactions, "rejects": []}
    put(run, "raw", {name: rows(name, records) for name, records in tables.items()}, info=info)


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "run")
    add_raw(run)
    return run


def add_ifvr(run):
    """Filtered: i5 is gone; u1 trains, u2 is tested, u3 is held out."""
    side = {"u1": "train", "u2": "test", "u3": None}
    kept = [
        {**r, "split": side[r["user_id"]], "role": "target" if r["interaction_id"] == "i3" else "history"}
        for r in INTERACTIONS
        if r["interaction_id"] != "i5"
    ]
    steps = [
        {"name": "read", "applied": True, "removed": 0, "interactions": 8, "users": 3, "videos": 2, "note": ""},
        {
            "name": "no app exit",
            "applied": False,
            "removed": 0,
            "interactions": 8,
            "users": 3,
            "videos": 2,
            "note": "not applicable: the source has no exited_app",
        },
        {"name": "the last", "applied": True, "removed": 1, "interactions": 7, "users": 3, "videos": 2, "note": ""},
    ]
    splits = {
        "users": {"sequential/train": 1, "sequential/test": 1},
        "ugm_users": 1,
        "test_users_wanted": 40,
        "too_short": {"click": {"users": 2, "interactions": 5}},
        "targets_of_videos_in_own_history": 0,
    }
    tables = {"users": rows("users", USERS), "videos": rows("videos", VIDEOS)}
    tables["interactions"] = rows("interactions", kept, "ifvr")
    put(run, "ifvr", tables, info={"filter_steps": steps, "splits": splits})


def rate_of(summary, name):
    return next(r for r in summary.rates if r.name == name)


def page_of(run):
    return render_page(run, describe(run))


def test_rates_are_over_known_rows_and_count_the_others(run):
    s = describe(run)
    skips, finished, dislikes = (rate_of(s, n) for n in ("Fast skips", "Finished", "Dislikes"))
    assert (skips.value, skips.n, skips.unknown) == (0.5, 4, 1)  # 0.1 and 0.25; a play rate of exactly 0.3 is no skip
    assert (finished.value, finished.n, finished.unknown) == (0.25, 4, 1)
    assert (dislikes.value, dislikes.n, dislikes.unknown) == (0.5, 2, 6)
    clicks = rate_of(s, "Clicks")
    assert (clicks.value, clicks.n, clicks.unknown) == (0.5, 2, 1)


def test_person_play_rate_weighs_users_and_total_play_rate_weighs_views(run):
    s = describe(run)
    assert rate_of(s, "Total play rate").value == pytest.approx((0.1 + 0.3 + 0.95 + 0.25) / 4)
    assert rate_of(s, "Person play rate").value == pytest.approx(((0.1 + 0.3 + 0.95) / 3 + 0.25) / 2)
    assert rate_of(s, "Person play rate").n == 2


def test_counts_by_task(run):
    s = describe(run)
    assert (s.users, s.videos, s.interactions) == (3, 3, 8)
    assert [(t.task, t.users, t.videos, t.interactions) for t in s.tasks] == [
        ("sequential", 2, 2, 5),
        ("click", 1, 2, 3),
    ]
    assert (s.parts, s.filter_steps, s.stage) == ([], [], "raw")


def test_counts_by_side_and_role_after_the_split(run):
    add_ifvr(run)
    s = describe(run)
    assert (s.stage, s.interactions) == ("ifvr", 7)
    assert [(p.task, p.split, p.role, p.interactions) for p in s.parts] == [
        ("sequential", "train", "history", 2),
        ("sequential", "train", "target", 1),
        ("sequential", "test", "history", 1),
        ("click", "held out", "history", 3),
    ]


def test_filters_that_do_not_apply_say_so_on_the_page(run):
    add_ifvr(run)
    page = page_of(run)
    assert "not applicable: the source has no exited_app" in page
    assert "87.5 % of the interactions passed" in page
    assert "2 users (5 interactions) are left out" in page


def test_distributions_count_views_records_and_viewed_videos(run):
    s = describe(run)
    assert s.views_per_video.n == 2  # v1: 3 views and a click; v2: 2 views, its exposures were not clicked; v3: none
    assert s.views_per_video.median == 3.0
    assert s.records_per_user.median == 3.0
    assert s.video_length_s.lower[0] <= 15 < s.video_length_s.lower[-1] + s.video_length_s.step
    assert s.video_length_s.n == 2


def test_demographics_count_what_is_missing(run):
    s = describe(run)
    assert (s.age.n, s.age.unknown) == (2, 1)
    assert (s.gender.top[0].label, s.gender.top[0].count, s.gender.unknown) == ("f", 2, 1)
    assert (s.occupation.n, s.occupation.unknown) == (1, 2)
    assert (s.user_tags.n, s.user_tags.unknown) == (2, 1)
    assert [(t.label, t.count) for t in s.user_tags.top] == [("pets", 2), (EVIL, 1)]
    assert (s.video_tags.n, s.video_tags.unknown) == (1, 2)
    assert [(f.label, f.count) for f in s.other_facts.top] == [("city", 1)]
    assert s.other_facts.unknown == 2


def test_what_the_source_lacks_is_on_the_page(run):
    s = describe(run)
    assert s.source.null_columns == {"interactions": ["exited_app"]}
    page = render_page(run, s)
    for text in ("There are no app exits.", "log.csv", "no such user 2, negative time 1", "<code>exited_app</code>"):
        assert text in page


def test_titles_and_tags_are_escaped_and_no_script_runs(run):
    page = page_of(run)
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt;") >= 3  # title, interest tag, topic tag
    assert "default-src 'none'" in page


def test_page_needs_nothing_from_outside(run):
    add_ifvr(run)
    page = page_of(run)
    links = re.findall(r"""(?:src|href)\s*=\s*["']([^"']+)""", page)
    assert all(link.startswith(("data:", "#")) for link in links)
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)


def test_summary_is_plain_json(run):
    add_ifvr(run)
    plain = describe(run).to_json()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain


def test_same_run_gives_the_same_page(run):
    assert page_of(run) == page_of(run)


def test_columns_without_values_and_no_interactions_give_a_page(tmp_path):
    bare = Run(tmp_path / "bare")
    add_raw(bare, [{"user_id": "u1"}], [{"video_id": "v1"}], [exposure("i1", "u1", "v1", True)], {})
    s = describe(bare)
    assert (s.age, s.video_length_s, rate_of(s, "Fast skips").value) == (None, None, None)
    page = render_page(bare, s)
    assert "Not known for any of the 1 users" in page
    assert "clicks: what was shown and not clicked is not in the data" in page
    assert "no frames and no video files" in page
    nothing = Run(tmp_path / "nothing")
    add_raw(nothing, [], [], [], {})
    assert "There is no video in the data" in page_of(nothing)


def test_not_a_number_and_infinite_durations_are_unknown(tmp_path):
    run = Run(tmp_path / "odd")
    odd = [{"video_id": f"v{i}", "duration_s": d} for i, d in enumerate((float("nan"), float("inf"), 12.0))]
    add_raw(run, USERS, odd, [view(f"i{i}", "u1", f"v{i}", 0.5) for i in range(3)])
    s = describe(run)
    assert (s.video_length_s.n, s.video_length_s.unknown) == (1, 2)
    json.dumps(s.to_json(), allow_nan=False)
    render_page(run, s)


def test_a_run_without_data_says_which_stage_to_run(tmp_path):
    with pytest.raises(ArtifactError, match="raw"):
        describe(Run(tmp_path / "empty"))


def test_truth_is_only_of_the_skips_shown_and_in_its_box(run):
    add_ifvr(run)
    truth = [("i1", "C", "mismatch"), ("i4", "D", "accident"), ("i5", "D", "exit")]
    skips = [{"interaction_id": i, "cause": c, "mechanism": m} for i, c, m in truth]
    put(run, "truth", {"skips": rows("truth", skips)})
    s = describe(run)
    assert s.simulation_only.skips == 2  # i5 was filtered out
    page = render_page(run, s)
    before, box = page.split('<aside class="truth">')
    assert "What only the simulation knows" in box
    assert "mismatch" not in before


def test_without_truth_there_is_no_box(run):
    assert "What only the simulation knows" not in page_of(run)


@pytest.mark.parametrize("edge", [9, 10, 139, 140, 5000])
def test_histogram_keeps_every_value(edge):
    values = np.array([0, 3, 7, 10, 10, 19, 20, edge], float)
    h = _histogram(values)
    assert sum(h.counts) == h.n == len(values)
    assert len(h.counts) <= MAX_BINS
    assert h.open_end == (edge >= h.lower[0] + h.step * MAX_BINS)


def test_histogram_bins_hold_their_lower_end():
    h = _histogram(np.repeat([10.0, 19.9, 20.0, 130.0], [1, 1, 3, 20]))
    assert (h.step, h.label(0), h.counts[:2]) == (10, "10–20", [2, 3])


def jpeg(color):
    out = io.BytesIO()
    Image.new("RGB", (56, 56), color).save(out, "JPEG")
    return out.getvalue()


def add_frames(run, store_uri, write=True):
    settings = Settings(frames=FrameSettings(count=2))
    if write:
        decoded = Decoded(Verdict.OK, frames=[jpeg("red"), jpeg("blue")], cover=jpeg("red"), times_s=[0.0, 1.0])
        FrameStore(store_uri, DecodeOptions.of(settings.frames)).write_part("one", [("h1", decoded)])
    table = pa.Table.from_pylist(
        [
            {"video_id": "v1", "content_hash": "h1", "verdict": "ok", "frames": 2},
            {"video_id": "v2", "verdict": "missing", "frames": 0},
            {"video_id": "v3", "verdict": "missing", "frames": 0},
        ],
        FRAMES,
    )
    put(run, "frames", {"frames": table}, info={"store_uri": store_uri}, settings=settings)


def test_frames_come_from_the_store_and_verdicts_are_counted(run, tmp_path):
    add_frames(run, str(tmp_path / "store"))
    s = describe(run)
    assert [(v.label, v.count) for v in s.frames] == [("missing", 2), ("ok", 1)]
    assert [v.video_id for v in s.samples] == ["v1"]  # the one with pictures
    page = render_page(run, s)
    assert page.count("data:image/jpeg;base64,") == 3  # cover and two frames
    assert "from the frame store" in page


def test_a_lost_frame_store_is_a_sentence_not_a_failure(run, tmp_path):
    add_frames(run, str(tmp_path / "gone"), write=False)
    page = page_of(run)
    assert "There are no pictures" in page
    assert "data:image/jpeg" not in page


def film():
    return render(Scene("v1", 0, "none", 1.0, 0), RenderSettings())


@pytest.mark.parametrize("place", ["local", "memory://show/run"])
def test_without_frames_the_samples_are_decoded_and_broken_ones_are_left_out(tmp_path, place):
    run = Run(tmp_path / "run" if place == "local" else place)
    add_raw(run)
    files = {"v1.mp4": film(), "v2.mp4": b"not a film"}
    with writing(run, "videos", recipe=Recipe(), settings={}) as out:
        for name, data in files.items():
            run.fs.pipe_file(out.path(name), data)
        out.write_table("files", pa.table({"video_id": ["v1", "v2"], "file": list(files)}))
    page = page_of(run)
    assert "for this page 1 of these 2 videos were decoded" in page
    assert "data:image/jpeg;base64," in page


def test_local_files_of_the_source_are_decoded(tmp_path):
    path = tmp_path / "a film.mp4"
    path.write_bytes(film())
    run = Run(tmp_path / "run")
    remote = {"video_id": "v2", "uri": "s3://bucket/v2.mp4"}
    add_raw(run, USERS, [{"video_id": "v1", "uri": str(path)}, remote], INTERACTIONS)
    assert "for this page 1 of these 1 videos were decoded" in page_of(run)


@pytest.mark.parametrize("place", ["local", "memory://show/written"])
def test_write_page_writes_beside_the_artifacts_and_may_be_repeated(tmp_path, place):
    run = Run(tmp_path / "run" if place == "local" else place)
    add_raw(run)
    for _ in range(2):
        where = write_page(run)
        assert where == f"{run.uri}/show.html"
        assert run.fs.cat_file(run.path("show.html")).decode().startswith("<!doctype html>")
    assert run.stages() == ["raw"]
