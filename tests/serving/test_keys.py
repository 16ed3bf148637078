"""API keys: found by their hash only, each within its rate."""

import json
import os
import stat

import pytest

from gubs.errors import SettingsError
from gubs.serving.keys import KeyFile, KeyRing, add_key, read_keys


def test_a_key_is_stored_as_a_hash_only(tmp_path):
    file = tmp_path / "keys.json"
    key = add_key(file, "shop", 600)
    assert key not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    other = add_key(file, "app", 60)
    ring = KeyRing(read_keys(file))
    assert ring.find(f"Bearer {key}").name == "shop"
    assert ring.find(f"bearer {other}").name == "app"


@pytest.mark.parametrize(
    "header", [None, "", "Bearer ", "Bearer wrong", "Basic {key}", "{key}", "Bearer {key}x", "Bearer \udcff"]
)
def test_anything_else_is_refused(tmp_path, header):
    key = add_key(tmp_path / "keys.json", "shop", 600)
    ring = KeyRing(read_keys(tmp_path / "keys.json"))
    assert ring.find(header and header.format(key=key)) is None


def test_a_name_is_given_once(tmp_path):
    add_key(tmp_path / "keys.json", "shop", 600)
    with pytest.raises(SettingsError, match="already"):
        add_key(tmp_path / "keys.json", "shop", 600)


def test_each_key_has_a_salt_of_its_own_that_tells_nothing_of_it(tmp_path):
    for name in ("shop", "app"):
        add_key(tmp_path / "keys.json", name, 600)
    shop, app = read_keys(tmp_path / "keys.json")
    assert shop.salt == read_keys(tmp_path / "keys.json")[0].salt, "the same at every ingress"
    assert shop.salt != app.salt
    assert not any(shop.salt in text for text in (shop.name, shop.sha256))


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '[{"name": "x", "sha256": "short"}]'])
def test_a_bad_file_is_refused(tmp_path, content):
    file = tmp_path / "keys.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SettingsError, match="gubs serve key"):
        read_keys(file)


def test_each_key_has_its_own_rate(tmp_path):
    file, now = tmp_path / "keys.json", [0.0]
    first, second = add_key(file, "a", 60), add_key(file, "b", 60)
    ring = KeyRing(read_keys(file), clock=lambda: now[0])
    a, b = ring.find(f"Bearer {first}"), ring.find(f"Bearer {second}")
    assert ring.wait(a, 50) == 0
    assert ring.wait(a, 20) == pytest.approx(10), "10 are left, 10 more come in 10 s"
    assert ring.wait(b, 50) == 0
    now[0] = 10.0
    assert ring.wait(a, 20) == 0
    assert ring.wait(a, 1) > 0
    assert json.loads(file.read_text())[0]["candidates_per_minute"] == 60


def test_ingress_replicas_share_a_keys_rate(tmp_path):
    """With the whole rate at each, a key would get several times what it was given."""
    key, now = add_key(tmp_path / "keys.json", "shop", 60), [0.0]
    rings = [KeyRing(read_keys(tmp_path / "keys.json"), lambda: now[0], replicas=3) for _ in range(3)]
    shop = rings[0].find(f"Bearer {key}")
    assert [r.wait(shop, 20) for r in rings] == [0, 0, 0]
    assert [r.wait(shop, 1) for r in rings] == [pytest.approx(3)] * 3
    now[0] = 60.0
    assert [r.wait(shop, 20) for r in rings] == [0, 0, 0]


@pytest.mark.parametrize("size", [1, 7, 20, 100])
def test_over_the_minutes_a_key_gets_its_rate_and_no_more(tmp_path, size):
    """Also with requests above a whole minute's rate: they are not refused for ever, and paid for afterwards."""
    key, now, minutes = add_key(tmp_path / "keys.json", "shop", 60), [0.0], 30
    rings = [KeyRing(read_keys(tmp_path / "keys.json"), lambda: now[0], replicas=3) for _ in range(3)]
    shop, admitted = rings[0].find(f"Bearer {key}"), 0
    while now[0] < 60 * minutes:
        admitted += size * sum(r.wait(shop, size) == 0 for r in rings)
        now[0] += 1.0
    most = 60 * minutes + 60 + 3 * size
    """The rate, full buckets at the start, and the last request of each."""
    assert 0.9 * 60 * minutes <= admitted <= most
    assert all(r.wait(shop, size) <= 60 * size / 20 for r in rings), "as told, it may ask again"


def test_the_file_of_the_keys_may_change(tmp_path):
    """A key that was lost has to stop working while the service goes on."""
    file, now = tmp_path / "keys.json", [0.0]
    lost = add_key(file, "lost", 60)
    ring = KeyFile(file, lambda: now[0])
    assert ring.wait(ring.find(f"Bearer {lost}"), 60) == 0
    new = add_key(file, "new", 60)
    assert ring.find(f"Bearer {new}") is None, "it is looked at once a second"
    now[0] += 1.0
    assert ring.find(f"Bearer {new}").name == "new"
    assert ring.wait(ring.find(f"Bearer {lost}"), 60) > 0, "its bucket is as empty as it was"
    rows = [row for row in json.loads(file.read_text()) if row["name"] != "lost"]
    file.write_text(json.dumps(rows))
    now[0] += 1.0
    assert ring.find(f"Bearer {lost}") is None
    for broken in ("", "[]", None):
        file.unlink() if broken is None else file.write_text(broken)
        now[0] += 1.0
        assert ring.find(f"Bearer {new}"), "an unreadable file locks nobody out"
    file.write_text(json.dumps(rows))
    os.utime(file, (1, 1))
    now[0] += 1.0
    assert ring.find(f"Bearer {new}")


def test_a_file_of_an_earlier_version_is_read(tmp_path):
    file = tmp_path / "keys.json"
    key = add_key(file, "shop", 60)
    file.write_text(json.dumps([{**row, "admin": False} for row in json.loads(file.read_text())]))
    assert KeyRing(read_keys(file)).find(f"Bearer {key}")
