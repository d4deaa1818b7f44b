"""Options that say how a model is loaded: what torch would refuse late, or misread, is refused first."""

from types import SimpleNamespace

import pytest
import torch

from dynadepth.errors import ConfigError
from dynadepth.models import loading
from dynadepth.models.loading import _computes_fast, load_model


@pytest.fixture
def unloaded(monkeypatch):
    """No model is read in these tests."""

    def refuse(*_args, **_kwargs):
        raise AssertionError("the model was loaded before its options were checked")

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", refuse)


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("device", ["nonsense", "", "cuda:", "cpu:x", "cuda:-1", "gpu", None, 3.5])
def test_a_device_that_torch_does_not_know(tiny_base, device):
    with pytest.raises(ConfigError, match=r"^device .* (is unknown to torch|cannot be used)"):
        load_model(tiny_base, device=device)


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("device", ["meta", "cuda:99", "xpu", "mps:7"])
def test_a_device_that_is_not_there(tiny_base, device):
    with pytest.raises(ConfigError, match=f"device '{device}' cannot be used here"):
        load_model(tiny_base, device=device)


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    ("dtype", "hint"),
    [
        ("float", "did you mean"),
        ("float31", "did you mean 'float32'"),
        ("bf16", "expected one of auto, fast, float32"),
        ("int8", "expected one of auto"),
        ("complex64", "expected one of auto"),
        ("nn", "expected one of auto"),
        ("", "expected one of auto"),
        (torch.float32, "expected one of auto"),
    ],
)
def test_a_dtype_that_is_none(tiny_base, dtype, hint):
    with pytest.raises(ConfigError, match=r"^dtype .* is unknown") as caught:
        load_model(tiny_base, dtype=dtype)
    assert hint in str(caught.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_every_dtype_that_is_offered_loads(tiny_base, dtype):
    assert load_model(tiny_base, dtype=dtype).dtype == getattr(torch, dtype)
    assert load_model(tiny_base, device="cpu", dtype="auto").dtype == torch.float32


@pytest.mark.parametrize(
    ("own", "supported", "expected"),
    [
        (torch.bfloat16, True, torch.bfloat16),
        (torch.bfloat16, False, torch.float32),
        (torch.bfloat16, None, torch.float32),
        (torch.float16, True, torch.float16),
        (torch.float16, False, torch.float32),
        (torch.float32, False, torch.float32),
        (torch.float64, False, torch.float64),
    ],
)
def test_fast_leaves_half_precision_only_where_it_is_slow(
    tiny_base, tmp_path, monkeypatch, own, supported, expected
):
    """`supported` is what torch says of this CPU; None: it is a build that cannot say."""
    load_model(tiny_base).to(own).save_pretrained(tmp_path)
    names = ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported")
    asked = {} if supported is None else dict.fromkeys(names, lambda: supported)
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(**asked))
    loaded = load_model(tmp_path, dtype="fast")
    assert {each.dtype for each in loaded.parameters()} == {expected}
    assert loaded.dtype == expected
    monkeypatch.undo()
    assert load_model(tmp_path, dtype="auto").dtype == own


def test_fast_keeps_half_precision_on_an_accelerator():
    assert _computes_fast(torch.device("cuda"), torch.bfloat16)
    assert _computes_fast(torch.device("mps"), torch.float16)
