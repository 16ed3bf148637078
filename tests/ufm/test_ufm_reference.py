"""The reference's weights in one buffer on the host: the same model wherever it is, and one allocation."""

import itertools

import pytest
import torch
from ufm_helpers import image_prompt, text_prompt, tiny_inputs

from gubs.ufm import reference
from gubs.ufm.model import load
from gubs.ufm.reference import Offload, Reference
from gubs.ufm.settings import ModelSettings
from gubs.ufm.trainer import logprobs

CPU = torch.device("cpu")
MODEL = ModelSettings(dtype="bfloat16", gradient_checkpointing=False)


@pytest.fixture
def model(tiny):
    return load(tiny, MODEL)


def tensors(model):
    return list(itertools.chain(model.parameters(), model.buffers()))


def test_the_weights_wait_in_one_buffer_and_go_as_a_whole(model):
    """Pinned memory is rounded up to powers of two at each allocation: one per weight takes nearly twice the model."""
    before = {n: t.clone() for n, t in model.state_dict().items()}
    asked = []

    def allocate(size):
        asked.append(size)
        return torch.empty(size, dtype=torch.uint8)

    offload = Offload(tensors(model), CPU, allocate)
    size = sum(t.nbytes for t in tensors(model))
    assert len(asked) == 1
    assert size <= asked[0] <= size + 256 * len(tensors(model))
    home = {t.untyped_storage().data_ptr() for t in tensors(model)}
    assert len(home) == 1
    offload.fetch()
    away = {t.untyped_storage().data_ptr() for t in tensors(model)}
    assert len(away) == 1
    assert away != home
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    offload.leave()
    assert {t.untyped_storage().data_ptr() for t in tensors(model)} == home
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert model.lm_head.weight is model.get_input_embeddings().weight, "a tied head stays tied"
    assert all(t.data_ptr() % 16 == 0 for t in tensors(model)), "as kernels want them"


def test_a_reference_on_a_gpu_computes_what_it_does_on_a_cpu(tiny, monkeypatch):
    """With a stand-in for the GPU: what is compared is the way of the weights."""
    inputs = tiny_inputs(tiny)
    batch = inputs.collate([(inputs.encode(p), [300, 301, 302]) for p in (text_prompt(), image_prompt())])
    monkeypatch.setattr(reference, "_pinned", lambda size: torch.empty(size, dtype=torch.uint8))
    released = []
    monkeypatch.setattr(reference, "release_cache", released.append)
    plain, moved = Reference(load(tiny, MODEL), CPU), Reference(load(tiny, MODEL), torch.device("cuda"))
    assert plain._offload is None
    moved._offload._device = CPU
    outputs = []
    for frozen in (plain, moved, moved):
        with frozen as policy, torch.no_grad():
            outputs.append(logprobs(policy, batch, vision=True))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[1], outputs[2]), "the second time too"
    assert len(released) == 2
