import pyarrow as pa
import pytest
from artifact_helpers import put

from gubs.artifacts import Run
from gubs.errors import ArtifactError
from gubs.records import SCHEMAS
from gubs.report.groups import diff, purity, render, view_groups, write_page
from gubs.ugm.stage import MEMBERSHIPS

EVIL = "<script>alert(1)</script>"


def finding(section, item, value, overall):
    return {"section": section, "item": item, "value": value, "overall": overall, "low": 0.4, "high": 0.9, "n": 12}


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "r")
    members = [
        {"user_id": f"u{i}", "similarity": 1 - i / 10, "matched": i != 1, "reason": EVIL if i == 1 else "fits"}
        for i in range(3)
    ]
    base = {"features": "f", "typical_user": "u0", "threshold": 0.8, "version": "v"}
    rows = [
        {
            **base,
            "group_id": "g00",
            "name": "Lost",
            "members": members,
            "initial_profile": "a",
            "dropped": "few_matched",
        },
        {
            **base,
            "group_id": "g01",
            "name": EVIL,
            "members": members,
            "initial_profile": "keep\nold",
            "final_profile": "keep\nnew",
            "name_author": "evidence",
            "profile_author": "llm",
            "unsupported": [f"They like {EVIL}: the members skip it"],
            "evidence": [finding("skipped", "news", 0.8, 0.2), finding("interest", "pets", 0.5, 0.5)],
        },
    ]
    places = [{"user_id": "x", "group_id": "g01", "similarity": 0.9, "how": "assigned"}]
    groups = SCHEMAS["groups"].append(pa.field("dropped", pa.string()))
    tables = {
        "groups": pa.Table.from_pylist(rows, schema=groups),
        "memberships": pa.Table.from_pylist(places, schema=MEMBERSHIPS),
    }
    info = {
        "users": 3,
        "kept": 1,
        "groups": 2,
        "grouped_users": 2,
        "ungrouped_users": 1,
        "users_by_number_of_groups": {"1": 2},
        "until": "",
    }
    put(run, "ugm", tables, info=info)
    return run


def test_diff_of_initial_against_final():
    assert [(line.kind, line.text) for line in diff("keep\nold", "keep\nnew")] == [
        ("same", "keep"),
        ("old", "old"),
        ("new", "new"),
    ]
    assert [line.kind for line in diff("only\nthis", None)] == ["same", "same"]
    assert diff(None, None) == []


def test_groups_with_a_profile_come_first_and_are_counted(run):
    kept, dropped = view_groups(run.artifact("ugm"))
    assert (kept.row["group_id"], kept.matched, kept.assigned) == ("g01", 2, 1)
    assert kept.shown[0].matched is False, "refused members first"
    assert dropped.row["dropped"] == "few_matched"


def test_page_shows_the_change_and_escapes_what_models_and_users_wrote(run):
    page = render(run)
    assert '<p class="old">old</p>' in page
    assert '<p class="new">new</p>' in page
    assert "too few members matched" in page
    assert EVIL not in page
    assert "&lt;script&gt;" in page
    assert run.fs.cat_file(write_page(run)).decode() == page


def test_page_says_up_to_when_records_were_used(run):
    ugm = run.artifact("ugm")
    assert "up to the end of their histories" in " ".join(render(run).split())
    tables = {name: ugm.table(name) for name in ("groups", "memberships")}
    put(run, "ugm", tables, info={**ugm.manifest.info, "until": "2025-05-22T00:00"})
    assert "before 2025-05-22T00:00." in " ".join(render(run).split())


def test_the_page_shows_evidence_authors_and_what_does_not_hold(run):
    page = render(run)
    assert "named by the evidence" in page
    assert "profile by the evidence" not in page
    assert "1 claim of the language model that the evidence does not support" in page
    assert page.index("members who list the tag") < page.index("views of the topic that are fast skips")
    row = page[page.index('<th scope="row">news') :][:300]
    assert '<td class="more">80%</td><td>40% to 90%</td><td>20%</td><td>4.00</td><td>12</td>' in row


def test_the_page_shows_how_good_the_groups_are(run):
    assert "Purity" not in render(run), "no truth is known"
    truth = pa.table({"user_id": ["u0", "u1", "u2", "x"], "archetype": [1, 1, 2, 1]})
    put(run, "truth", {"users": truth})
    ugm = run.artifact("ugm")
    quality = {"in_some_group": 0.75, "silhouette": 0.4, "stability": None, "stability_seeds": 5}
    skips = {"users": 9, "views": 90, "group": 0.71, "everybody": 0.63}
    info = {**ugm.manifest.info, "quality": quality | {"skips": skips}}
    info["summarize"] = {"repairs": [{"group": EVIL, "merged_into": "Cooks"}]}
    put(run, "ugm", {name: ugm.table(name) for name in ("groups", "memberships")}, info=info)
    page = " ".join(render(run).split())
    for text in ("75.0 %", "0.40", "0.71", "what everybody skips: 0.63", "1 repair of", "merged into: Cooks"):
        assert text in page
    assert EVIL not in page


def test_the_page_says_which_answers_are_missing(run):
    assert "did not answer everything" not in render(run)
    ugm = run.artifact("ugm")
    missing = {"author": "llm", "asked": {"matcher": 150}, "missing": {"matcher": {"no_verdict": 2, "truncated": 1}}}
    tables = {name: ugm.table(name) for name in ("groups", "memberships")}
    put(run, "ugm", tables, info={**ugm.manifest.info, **missing})
    page = " ".join(render(run).split())
    assert "3 of 150 answers of the matcher are missing (no_verdict 2, truncated 1)" in page
    assert "A member without a verdict does not count for that group" in page
    assert "judged by their records" not in page


def test_purity_is_the_share_of_each_groups_commonest_archetype():
    rows = [
        {"user_id": u, "group_id": g, "how": how}
        for u, g, how in [
            *(("a", "g0", "matched"), ("b", "g0", "matched"), ("c", "g0", "matched"), ("d", "g1", "matched")),
            *(("e", "g1", "assigned"), ("f", "g1", "assigned"), ("unknown", "g1", "matched")),
        ]
    ]
    shares = purity(rows, {"a": 1, "b": 1, "c": 2, "d": 3, "e": 4, "f": 4})
    assert (shares.members, shares.everybody) == (3 / 4, 4 / 6)
    assert purity([], {}).members is None


def test_a_run_without_groups_is_a_clear_error(tmp_path):
    with pytest.raises(ArtifactError, match="ugm"):
        render(Run(tmp_path / "none"))
