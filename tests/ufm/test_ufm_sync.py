"""Weights on their way to the engine: nothing missing, nothing else, no bit changed."""

import inspect
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from gubs.ufm import sync
from gubs.ufm.model import load
from gubs.ufm.settings import ModelSettings
from gubs.ufm.sync import (
    EMBEDDING,
    HEAD,
    Entry,
    HandlePack,
    Place,
    SyncError,
    _handles,
    _shared,
    check,
    manifest_of,
    weights_of,
)

EXPECTED = {"a": Entry((2, 3), "torch.float32"), "b": Entry((4,), "torch.float32")}


@pytest.fixture(scope="module")
def model(tiny):
    return load(tiny, ModelSettings(dtype="float32"))


def test_what_is_expected_passes():
    check(EXPECTED, ["b", "a"], {"b": EXPECTED["b"], "a": EXPECTED["a"]})


@pytest.mark.parametrize(
    ("names", "sent", "says"),
    [
        (["a"], {"a": EXPECTED["a"]}, "b is missing"),
        (["a", "b", "a"], EXPECTED, "a is sent twice"),
        (["a", "b", "c"], {**EXPECTED, "c": EXPECTED["b"]}, "c is unexpected"),
        (["a", "b"], {**EXPECTED, "b": Entry((5,), "torch.float32")}, r"b is Entry\(shape=\(5,\).*not .*\(4,\)"),
        (["a", "b"], {**EXPECTED, "b": Entry((4,), "torch.bfloat16")}, r"b is .*bfloat16.*not .*float32"),
        ([], {}, r"a is missing \(and 1 more\)"),
    ],
    ids=["missing", "twice", "unexpected", "shape", "dtype", "several"],
)
def test_other_weights_are_refused_by_name(names, sent, says):
    """An engine that took them would sample from a model that nobody trains, without an error."""
    with pytest.raises(SyncError, match=says):
        check(EXPECTED, names, sent)


def test_a_push_of_other_weights_leaves_the_engine_alone(model):
    """The check comes first: a half-loaded engine would be worse than none."""

    class NoEngine:
        def __getattr__(self, name):
            raise AssertionError("the engine was asked")

    pushing = sync.WeightSync(model, NoEngine(), 1.0, version=3)
    lost = torch.nn.Module()
    lost.register_buffer(EMBEDDING.replace(".", "_"), torch.zeros(1))

    class Fewer:
        def state_dict(self):
            return {EMBEDDING: model.state_dict()[EMBEDDING]}

    with pytest.raises(SyncError, match="is missing"):
        pushing.push(Fewer())
    assert pushing.version == 3


def test_the_tied_head_is_sent(model, tiny):
    """The checkpoint has no head of its own; vLLM keeps a stale one, without an error, unless it gets it."""
    import safetensors

    with safetensors.safe_open(tiny / "model.safetensors", "pt") as f:
        assert HEAD not in f.keys()  # noqa: SIM118
    weights = weights_of(model)
    assert weights[HEAD].data_ptr() == weights[EMBEDDING].data_ptr()
    assert set(weights) == {*model.state_dict(), HEAD}
    assert {n.split(".")[1] for n in weights if n != HEAD} == {"language_model", "visual"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_travel_bit_for_bit(dtype):
    """numpy has no bfloat16: a conversion on the way would round, or lose NaN payloads, zeros' signs and denormals."""
    bits = torch.from_numpy(np.random.default_rng(0).integers(-(2**15), 2**15, 4096, np.int16))
    sent = {"w": bits.view(dtype).reshape(2, -1), "scalar": torch.tensor(1.5, dtype=dtype)}
    pack = pickle.loads(pickle.dumps(_shared(sent)))
    got = dict(pack.tensors())
    assert list(got) == ["w", "scalar"]
    for name, weight in sent.items():
        assert got[name].dtype == dtype
        assert got[name].shape == weight.shape
        raw = torch.int16 if dtype != torch.float32 else torch.int32
        assert torch.equal(got[name].view(raw), weight.view(raw))


def test_a_view_that_is_not_contiguous_travels_whole():
    weight = torch.arange(12, dtype=torch.bfloat16).reshape(3, 4).T
    ((_, got),) = _shared({"w": weight}).tensors()
    assert torch.equal(got, weight)


def test_the_manifest_of_a_model_names_every_weight(model):
    manifest = manifest_of(weights_of(model))
    assert manifest[EMBEDDING] == manifest[HEAD] == Entry((len(model.lm_head.weight), 128), "torch.float32")


def zero_like(model: Any) -> dict[str, torch.Tensor]:
    """A model's weights as ZeRO-2 keeps them: views of one flat tensor, the frozen tower's apart from it."""
    weights = weights_of(model)
    trained = {n: w for n, w in weights.items() if "visual" not in n and n != HEAD}
    flat, at = torch.empty(sum(w.numel() for w in trained.values()) + 7, dtype=torch.float32), 7
    for name, weight in trained.items():
        view = flat[at : at + weight.numel()].view(weight.shape)
        trained[name], at = view.copy_(weight), at + weight.numel()
    return {**weights, **trained, HEAD: trained[EMBEDDING]}


def test_weights_of_one_storage_travel_by_one_handle(model, monkeypatch):
    """One handle per weight is 729 of them for a 7B, each with a reference count of its own. (On a CPU torch wraps
    storages the same way, only without IPC.)"""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(sync, "_on", lambda device, arguments: arguments)
    sent = zero_like(model)
    pack = _handles(sent)
    towers = sum("visual" in n for n in sent)
    assert len(pack.storages) == 1 + towers
    got = dict(pack.tensors())
    assert list(got) == list(sent)
    for name, weight in sent.items():
        assert torch.equal(got[name], weight), name
        assert got[name].data_ptr() == weight.data_ptr(), "not copied on the way"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_weight_is_found_in_its_storage_whatever_its_form(dtype):
    """Offsets count elements, not bytes; a transposed weight keeps its strides."""
    flat = torch.arange(64, dtype=torch.float32).to(dtype)
    weights = {"plain": flat[4:16].view(3, 4), "turned": flat[20:40].view(4, 5).T, "scalar": flat[63].view(())}
    pack = _handles(weights)
    ((rebuild, arguments),) = pack.storages
    whole = rebuild(*arguments)
    assert whole.nbytes == flat.nbytes
    for place in pack.places:
        weight = place.within(whole)
        assert torch.equal(weight, weights[place.name])
        assert (weight.dtype, weight.stride()) == (dtype, weights[place.name].stride())


def test_a_handle_is_opened_on_the_receivers_own_device(monkeypatch):
    """A trainer on its machine's third GPU says cuda:2; its engine sees that GPU alone, as cuda:0."""
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    names = list(inspect.signature(rebuild_cuda_tensor).parameters)
    sent = tuple(2 if name == "storage_device" else name for name in names)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    opened: dict[str, Any] = {}

    def rebuild(*given: Any) -> torch.Tensor:
        opened.update(zip(names, given, strict=True))
        return torch.zeros(8, dtype=torch.uint8)

    pack = HandlePack(((rebuild, sent),), (Place("w", 0, "float32", 1, (1,), (1,)),))
    ((name, weight),) = pack.tensors()
    assert (name, weight.tolist()) == ("w", [0.0])
    assert opened == {n: 0 if n == "storage_device" else n for n in names}
