"""A model on a device computes there: no operation meets a tensor of the host, and a device step reads nothing back.

An emulation without a GPU. Torch's FakeTensorMode gives tensors a device and no values: an operation on two devices
raises, and so does whatever needs a value on the host. The device is torch's ``lazy``, which stands for any that is not
the host. Launches are skipped where kernels are interpreted; what they compute is tested elsewhere. Compiled, a launch
would hand the addresses of tensors without memory to the GPU, so a step is not tried there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from engine_runs import in_mxfp4, slice_model
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from dsv4ref.formats import mxfp4
from dsv4ref.ref.attention import keys_ref, output_ref, queries_ref, update_rows_ref
from dsv4ref.ref.experts import shared_expert_ref
from dsv4ref.ref.hyper_connections import hc_post_ref, hc_pre_ref
from dsv4ref.ref.indexer import index_queries_ref
from dsv4ref.ref.model import Model, head_ref
from dsv4ref.ref.numerics import DEFAULT
from dsv4ref.ref.rope import layer_frequencies
from dsv4ref.serving.blocks import CacheSizes, PagedCaches
from dsv4ref.serving.device_decoder import DeviceDecoder
from dsv4ref.serving.device_step import Rows
from dsv4ref.serving.features import available
from dsv4ref.serving.operations import Operations, compose
from dsv4ref.serving.resident import resident_model

ELSEWHERE = "lazy"
# Torch's words for it; the second are 2.11's, where fake tensors do not know this device's rules.
TWO_DEVICES = r"Expected all tensors to be on the same device|found two different devices"


@dataclass(frozen=True)
class Valueless(Model):
    """A model whose tensors have no values, so that nothing can be checked about them."""

    def __post_init__(self) -> None:
        pass


def elsewhere(model: Model) -> Valueless:
    """The same model on the other device; only within a FakeTensorMode."""
    tensors = {name: torch.empty(t.shape, dtype=t.dtype, device=ELSEWHERE) for name, t in model.tensors.items()}
    return Valueless(model.config, tensors, model.numerics)


@pytest.fixture(scope="module")
def real() -> Model:
    return in_mxfp4(slice_model((0, 4, 128)))


@pytest.fixture(scope="module")
def resident(real: Model) -> Model:
    return resident_model(real, "cpu")


@pytest.fixture
def valueless() -> Iterator[None]:
    with FakeTensorMode(allow_non_fake_inputs=False):
        yield


def test_the_mode_sees_two_devices_and_a_value_that_is_read(valueless: None) -> None:
    there, here = torch.empty(4, device=ELSEWHERE), torch.ones(4)
    with pytest.raises(RuntimeError, match=TWO_DEVICES):
        there + here
    with pytest.raises(DataDependentOutputException):
        bool(there.any())


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_reference_computes_where_the_weights_are(layer: int, real: Model, valueless: None) -> None:
    # The checks of MXFP4 read values: the indexer's other format does not.
    model = replace(elsewhere(real), numerics=replace(DEFAULT, quantise_index="fp8"))
    config, numerics, weights = model.config, model.numerics, model.weights.at(f"layers.{layer}")
    attention, ratio = weights.at("attn"), config.ratio(layer)
    freqs = layer_frequencies(config, layer, numerics)
    x = torch.empty(130, config.hidden_size, device=ELSEWHERE)
    positions = torch.arange(130, device=model.device)
    q, qr = queries_ref(x, attention, positions, freqs, config, numerics)
    kv = keys_ref(x, attention, positions, freqs, config, numerics)
    state = model.new_sequence().layers[layer]
    state = update_rows_ref(x, kv, attention, ratio, freqs, state, config, numerics)
    made: list[Tensor] = [q, kv]
    if state.compressor is not None:
        made += [state.compressor.kv, state.compressor.score]
    if state.index_keys is not None:
        made.append(index_queries_ref(qr, attention.at("indexer"), positions, freqs, config, numerics))
    y = output_ref(q, attention, positions, freqs, config, numerics)
    streams = y[:, None].repeat(1, config.hc_mult, 1)
    u, post, mix = hc_pre_ref(streams, weights, "attn", config, numerics)
    streams = hc_post_ref(u, streams, post, mix, numerics)
    made += [shared_expert_ref(u, weights.at("ffn").at("shared_experts"), config.swiglu_limit, numerics)]
    made += [head_ref(streams, model.weights, model)]
    assert {tensor.device.type for tensor in made} == {ELSEWHERE}


@pytest.fixture
def interpreted(device: str) -> None:
    """Only the interpreter's launches can be skipped."""
    if device != "cpu":
        pytest.skip("kernels are compiled here; they would be launched on tensors without memory")


@pytest.fixture
def launches(interpreted: None, valueless: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that were launched. Nothing runs; who asks for an address or an architecture gets one."""
    from triton.runtime import interpreter

    names: list[str] = []
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda self, *_, **__: names.append(self.fn.__name__))
    told = {"architecture": lambda _: "gfx942", "check_no_overlap": lambda *_: None}
    for name, module in list(sys.modules.items()):
        if name.startswith(("dsv4ref.kernels", "dsv4ref.serving")):
            for function, answer in told.items():
                if hasattr(module, function):
                    monkeypatch.setattr(module, function, answer)
    monkeypatch.setattr(mxfp4, "decode", lambda codes: torch.empty(codes.shape))
    return names


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("skip_full", [False, True])
def test_a_device_step_stays_on_its_device_and_reads_nothing_back(
    grouped: bool, skip_full: bool, real: Model, resident: Model, launches: list[str]
) -> None:
    model, features = elsewhere(resident), available(real)
    operations: Operations = compose(model, features if grouped else features.without("grouped_experts"), ELSEWHERE)
    sizes = CacheSizes(slots=3, max_length=300, cache_tokens=768, chunk=20)
    caches = PagedCaches(model.config, sizes, model.numerics, ELSEWHERE)
    step = DeviceDecoder(model, caches, (2,), skip_full=skip_full).steps[2]
    step.load(Rows([0], [5], [3]))
    launches.clear()
    logits = step.run(operations)
    assert (logits.device.type, tuple(logits.shape)) == (ELSEWHERE, (2, model.config.vocab_size))
    assert sum("_sparse_mla_decode" in name for name in launches) == 3
    assert sum("_route_" in name for name in launches) == 3
    assert sum("_recent_lists" in name for name in launches) == 2
    assert sum("_pack_listed" in name for name in launches) == 1
    assert sum("_sum_slots" in name for name in launches) == (3 if grouped else 0)
