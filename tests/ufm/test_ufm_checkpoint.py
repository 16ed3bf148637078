"""Checkpoints: whole or not there, refused where they do not fit, and never at the cost of an earlier one."""

import errno
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from ufm_helpers import disk, text_prompt, tiny_inputs

from gubs.errors import ArtifactError
from gubs.ufm import checkpoint
from gubs.ufm.checkpoint import MARKER, Checkpoints, SharedError, load_policy, save_policy
from gubs.ufm.model import load
from gubs.ufm.monitor import Phases
from gubs.ufm.settings import CheckpointSettings, ModelSettings
from gubs.ufm.train_worker import TrainWorker
from gubs.ufm.trainer import copied_to_host

RECIPE = {"model": "m1", "data": "d1", "settings": "s1"}


def save(text: str = "weights") -> Callable[[Path], None]:
    def put(folder: Path) -> None:
        (folder / "state").mkdir(exist_ok=True)
        (folder / "state" / "optimizer.pt").write_text(text)
        (folder / "rng-0.pt").write_text("rng")

    return put


def opened(folder: Path, keep: int = 2, world_size: int = 1, **recipe: str) -> Checkpoints:
    return Checkpoints(str(folder), {**RECIPE, **recipe}, keep, world_size=world_size)


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_newest_are_kept_and_the_best(tmp_path):
    checkpoints = opened(tmp_path)
    for step, score in ((2, 0.1), (4, 0.9), (6, 0.3), (8, 0.2)):
        checkpoints.write(step, save(str(step)), score=score)
    assert checkpoints.steps() == [4, 6, 8]
    assert checkpoints.best() == 4
    assert checkpoints.latest().step == 8
    assert (checkpoints.place(8) / "state" / "optimizer.pt").read_text() == "8"


def test_a_better_one_replaces_the_best(tmp_path):
    checkpoints = opened(tmp_path, keep=1)
    for step, score in ((1, 0.5), (2, 0.1), (3, 0.8), (4, 0.2)):
        checkpoints.write(step, save(), score=score)
    assert (checkpoints.best(), checkpoints.steps()) == (3, [3, 4])


def test_the_best_is_known_whenever_the_run_was_killed(tmp_path, monkeypatch):
    """A kill right after the marker must neither lose the best one nor leave anything that stops the next attempt."""
    checkpoints = opened(tmp_path, keep=1)
    checkpoints.write(2, save(), score=0.9)
    monkeypatch.setattr(Checkpoints, "_prune", full)
    with pytest.raises(ArtifactError):
        checkpoints.write(4, save(), score=0.95)
    monkeypatch.undo()
    again = opened(tmp_path, keep=1)
    assert again.best() == again.latest().step == 4
    again.write(6, save(), score=0.1)
    assert again.steps() == [4, 6]


def test_killed_while_an_old_one_is_removed(tmp_path, monkeypatch):
    """What is left of it must not count as a checkpoint, the best one least of all."""
    checkpoints = opened(tmp_path, keep=1)
    checkpoints.write(2, save(), score=0.5)
    old, remove = tmp_path / "step-000002", checkpoint.shutil.rmtree
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda p, **how: full() if p == old else remove(p, **how))
    with pytest.raises(ArtifactError):
        checkpoints.write(4, save(), score=0.9)
    monkeypatch.undo()
    assert (tmp_path / "step-000002" / "rng-0.pt").exists()
    assert opened(tmp_path, keep=1).steps() == [4]


def test_no_folder_is_no_checkpoint(tmp_path):
    assert opened(tmp_path / "none").latest() is None


def test_what_a_kill_left_behind_is_no_checkpoint(tmp_path):
    """A kill can come at any moment: while files are written, after the rename, while the marker is written."""
    checkpoints = opened(tmp_path)
    checkpoints.write(2, save())
    shutil.copytree(tmp_path / "step-000002", tmp_path / "step-000004.tmp")
    shutil.copytree(tmp_path / "step-000002", tmp_path / "step-000006", ignore=shutil.ignore_patterns(MARKER))
    (tmp_path / "step-000006" / "checkpoint.tmp").write_text('{"step": 6, "wor')
    assert checkpoints.steps() == [2]
    assert checkpoints.latest().step == 2
    checkpoints.write(4, save("again"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000002", "step-000004"], "its disk space comes back"
    checkpoints.write(6, save("again"))
    assert checkpoints.steps() == [4, 6]
    assert checkpoints.latest().step == 6
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("moment", ["rename", "marker"])
def test_killed_for_real_in_the_middle(tmp_path, moment):
    """The process ends at once, without any clean-up; what was there before stays, and the step can be done again."""
    opened(tmp_path).write(2, save("old"))
    code = f"""
import os, pathlib, sys
from gubs.ufm import checkpoint
die = lambda *a: os._exit(9)
if {moment!r} == "rename": pathlib.Path.rename = die
else: checkpoint._write_through = die
def save(folder): (folder / "a").write_text("new")
checkpoint.Checkpoints({str(tmp_path)!r}, {RECIPE!r}, 2).write(4, save)
"""
    assert subprocess.run(["python", "-c", code], env=_env(), timeout=60).returncode == 9
    checkpoints = opened(tmp_path)
    assert checkpoints.latest().step == 2
    assert (checkpoints.place(2) / "state" / "optimizer.pt").read_text() == "old"
    checkpoints.write(4, save("new"))
    assert checkpoints.latest().step == 4


def _env() -> dict[str, str]:
    import sys

    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


@pytest.mark.parametrize("harm", ["missing", "truncated"])
def test_a_damaged_file_is_named(tmp_path, harm):
    """Half an optimiser state must not be loaded, nor the whole run start over in silence."""
    checkpoints = opened(tmp_path)
    checkpoints.write(2, save())
    path = tmp_path / "step-000002" / "state" / "optimizer.pt"
    path.unlink() if harm == "missing" else path.write_text("we")
    with pytest.raises(ArtifactError, match=r"step-000002 is damaged: state/optimizer.pt .*remove that folder"):
        checkpoints.latest()


@pytest.mark.parametrize("what", ["model", "data", "settings"])
def test_another_recipe_is_refused(tmp_path, what):
    opened(tmp_path).write(2, save())
    before = files(tmp_path)
    with pytest.raises(ArtifactError, match=rf"trained with another {what} .*another --run, or --force"):
        opened(tmp_path, **{what: "other"}).latest()
    assert files(tmp_path) == before


def test_another_number_of_workers_is_refused(tmp_path):
    """ZeRO's optimiser state is dealt to the ranks: with another number it would be read wrongly."""
    opened(tmp_path, world_size=2).write(2, save())
    with pytest.raises(ArtifactError, match=r"written by 2 workers .* set ufm.workers.count=2"):
        opened(tmp_path, world_size=1).latest()


def test_ranks_write_into_one_folder_and_the_marker_comes_after_all_of_them(tmp_path):
    """A marker that comes before the last rank's file would vouch for a checkpoint that is not whole."""
    agree = everywhere(2)
    errors: list[BaseException] = []

    def rank(number: int) -> None:
        def put(folder: Path) -> None:
            (folder / f"rng-{number}.pt").write_text("x" * (number + 1))

        try:
            checkpoints = Checkpoints(str(tmp_path), RECIPE, 2, number, 2)
            checkpoints.write(2, put, agree=agree(number))
        except BaseException as e:  # noqa: BLE001 - shown by the test
            errors.append(e)

    threads = [threading.Thread(target=rank, args=(n,)) for n in range(2)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not errors
    marker = json.loads((tmp_path / "step-000002" / MARKER).read_text())
    assert marker["files"] == {"rng-0.pt": 1, "rng-1.pt": 2}
    assert marker["world"] == 2


def everywhere(world_size: int) -> Callable[[int], Callable[[str], str]]:
    """`Agree` for ranks that are threads."""
    barrier, problems = threading.Barrier(world_size, timeout=30), [""] * world_size

    def of(rank: int) -> Callable[[str], str]:
        def agree(problem: str) -> str:
            problems[rank] = problem
            barrier.wait()
            first = next(filter(None, problems), "")
            barrier.wait()
            return first

        return agree

    return of


@pytest.mark.parametrize("harm", [full, lambda *_: 1 / 0], ids=["disk", "bug"])
def test_when_one_rank_fails_all_do_and_none_waits(tmp_path, harm):
    """Ranks that wait for one whose disk is full would hang until the collective's limit, and then be tried again."""
    agree, errors = everywhere(2), {}

    def rank(number: int) -> None:
        try:
            put = harm if number else (lambda folder: (folder / "a").write_text("a"))
            Checkpoints(str(tmp_path), RECIPE, 2, number, 2).write(2, put, agree=agree(number))
        except Exception as e:  # noqa: BLE001 - looked at below
            errors[number] = e

    threads = [threading.Thread(target=rank, args=(n,)) for n in range(2)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    says = "No space left" if harm is full else "division by zero"
    assert isinstance(errors[0], SharedError)
    assert says in str(errors[0])
    assert isinstance(errors[1], SharedError if harm is full else ZeroDivisionError)
    assert opened(tmp_path).latest() is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["_flush", "_write_through"])
def test_a_full_disk_leaves_the_earlier_ones_whole(tmp_path, monkeypatch, where):
    checkpoints = opened(tmp_path, keep=1)
    checkpoints.write(2, save("old"), score=1.0)
    monkeypatch.setattr(checkpoint, where, full)
    with pytest.raises(
        ArtifactError, match=r"cannot write .*step-000004: .*No space left.*earlier checkpoints are intact"
    ):
        checkpoints.write(4, save("new"), score=2.0)
    monkeypatch.undo()
    assert checkpoints.latest().step == 2
    assert (checkpoints.place(2) / "state" / "optimizer.pt").read_text() == "old"
    assert checkpoints.best() == 2
    assert [p.name for p in tmp_path.iterdir()] == ["step-000002"], "what was written in vain keeps the disk full"
    checkpoints.write(4, save("new"))
    assert checkpoints.steps() == [2, 4]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 3 MiB."""
    with disk(tmp_path / "disk", "3m") as folder:
        yield folder


@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_a_disk_that_is_really_full(small_disk, kind):
    """torch and safetensors have errors of their own for a full disk: they must not pass for a bug in training."""
    checkpoints = opened(small_disk)
    checkpoints.write(2, save("old"))

    def put(folder: Path) -> None:
        big = {"w": torch.zeros(4 << 20)}
        if kind == "torch":
            torch.save(big, folder / "state.pt")
        else:
            import safetensors.torch

            safetensors.torch.save_file(big, folder / "model.safetensors")

    with pytest.raises(ArtifactError, match=r"cannot write .*step-000004.*earlier checkpoints are intact"):
        checkpoints.write(4, put)
    assert checkpoints.latest().step == 2
    assert not list(small_disk.glob("*.tmp")), "what was written in vain keeps the disk full"
    checkpoints.write(4, save("fits"))
    assert checkpoints.latest().step == 4


def test_a_bug_while_saving_is_not_called_a_full_disk(tmp_path):
    def put(folder: Path) -> None:
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        opened(tmp_path).write(2, put)
    assert opened(tmp_path).latest() is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_policy_comes_back_bit_for_bit_and_into_the_same_memory(tmp_path, tiny, dtype):
    """ZeRO-2's weights are views of its flat buffer: replaced, they would no longer be what the optimiser updates."""
    model, inputs = load(tiny, ModelSettings(dtype=dtype)), tiny_inputs(tiny)
    before = {n: w.clone() for n, w in model.state_dict().items()}
    copy = copied_to_host(model.state_dict())
    places = {n: w.data_ptr() for n, w in model.state_dict().items()}
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1.0)
    save_policy(model, inputs, tmp_path / "policy", copy)  # what was copied, not what it has become
    load_policy(model, tmp_path / "policy")
    assert all(torch.equal(w, before[n]) for n, w in model.state_dict().items())
    assert {n: w.data_ptr() for n, w in model.state_dict().items()} == places
    assert {w.dtype for w in model.parameters()} == {getattr(torch, dtype)}


def test_a_saved_policy_loads_in_plain_transformers(tmp_path, tiny):
    """What we hand over must need none of our code: same weights, same processor, same logits."""
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

    model = load(tiny, ModelSettings(dtype="float32"))
    with torch.no_grad():
        model.model.language_model.embed_tokens.weight.mul_(1.01)
    inputs = tiny_inputs(tiny)
    save_policy(model, inputs, tmp_path / "policy")
    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "policy")
    assert plain.dtype == torch.float32
    for name, weight in model.state_dict().items():
        assert torch.equal(plain.state_dict()[name], weight), name
    assert plain.lm_head.weight.data_ptr() == plain.get_input_embeddings().weight.data_ptr()
    processor = AutoProcessor.from_pretrained(tmp_path / "policy")
    ids = torch.tensor([inputs.encode(text_prompt()).ids])
    chat = [{"role": "user", "content": [{"type": "text", "text": text_prompt().text}]}]
    theirs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_tensors="pt")
    assert torch.equal(getattr(theirs, "input_ids", theirs), ids)
    with torch.no_grad():
        assert torch.equal(plain.eval()(ids).logits, model.eval()(ids).logits)


def gated(gate: threading.Event, text: str = "slow") -> Callable[[Path], Callable[[], None]]:
    """Saves what is small at once, and the rest when the gate opens."""

    def put(folder: Path) -> Callable[[], None]:
        (folder / "rng-0.pt").write_text("rng")

        def rest() -> None:
            assert gate.wait(20)
            (folder / "optimizer.pt").write_text(text)

        return rest

    return put


def test_what_is_written_in_the_background_counts_when_it_is_whole(tmp_path):
    """A 7B's checkpoint takes minutes; the steps go on meanwhile, and a kill leaves the earlier one in force."""
    checkpoints, gate = opened(tmp_path), threading.Event()
    checkpoints.write(2, save("old"))
    checkpoints.begin(4, gated(gate), score=0.5)
    assert (checkpoints.writing, checkpoints.written) == (True, False)
    assert checkpoints.latest().step == opened(tmp_path).latest().step == 2
    gate.set()
    checkpoints.finish()
    assert not checkpoints.writing
    marker = opened(tmp_path).latest()
    assert (marker.step, marker.score) == (4, 0.5)
    assert marker.files == {"rng-0.pt": 3, "optimizer.pt": 4}
    checkpoints.finish()  # nothing to do


def test_the_next_one_waits_for_the_one_before(tmp_path):
    checkpoints, gate = opened(tmp_path), threading.Event()
    checkpoints.begin(2, gated(gate, "first"))
    threading.Timer(0.1, gate.set).start()
    checkpoints.begin(4, gated(gate, "second"))
    checkpoints.finish()
    assert checkpoints.steps() == [2, 4]
    assert (checkpoints.place(2) / "optimizer.pt").read_text() == "first"


def test_a_disk_that_fills_up_in_the_background_is_told_at_the_end(tmp_path):
    checkpoints = opened(tmp_path)
    checkpoints.write(2, save("old"))
    checkpoints.begin(4, lambda folder: full)
    with pytest.raises(
        SharedError, match=r"cannot write .*step-000004: .*No space left.*earlier checkpoints are intact"
    ):
        checkpoints.finish()
    assert not checkpoints.writing
    assert [p.name for p in tmp_path.iterdir()] == ["step-000002"]


def test_a_worker_goes_on_while_its_checkpoint_is_written_and_waits_at_the_end(tmp_path):
    """Due after steps 2 and 4; the first one is slow, and is published as soon as it is written."""
    gate, order = threading.Event(), []
    worker = object.__new__(TrainWorker)
    worker.steps, worker._checkpoint = 5, CheckpointSettings(every=2, background=True)
    worker.phases, worker.rank, worker._scores, worker.folder = Phases(), 0, [], tmp_path
    worker.device = torch.device("cpu")
    worker.checkpoints = opened(tmp_path / "checkpoints", keep=9)
    worker._save = lambda folder: order.append(folder.name) or gated(gate)(folder)
    for step in range(3):
        worker._maybe_checkpoint(step, {})
    assert order == ["step-000002.tmp"]
    assert worker.checkpoints.steps() == []
    gate.set()
    until = time.monotonic() + 10
    while not worker.checkpoints.written and time.monotonic() < until:
        time.sleep(0.01)
    worker._maybe_checkpoint(3, {})
    assert worker.checkpoints.steps() == [2]
    worker._maybe_checkpoint(4, {})
    assert worker.checkpoints.steps() == [2, 4]
    worker.rank = 1  # no policy to save
    worker._save_final()
    assert worker.checkpoints.steps() == [2, 4, 5]
