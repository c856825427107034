"""Packed weights give the products of the weights they were packed from, and leave nothing behind."""

import pytest
import torch
from torch import nn

from rto.rollout.samplers import packed as packing
from rto.rollout.samplers.base import SamplingConfig
from rto.rollout.samplers.packed import packed
from rto.rollout.samplers.transformers import TransformersSampler

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


class Own(nn.Linear):
    """Whoever writes a layer of one's own may compute something else in it."""

    def forward(self, x):
        return super().forward(x) + 1


def layers(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.ModuleDict(
        {"plain": nn.Linear(200, 300), "bare": nn.Linear(200, 300, bias=False), "own": Own(200, 300)}
    ).to(dtype)


@torch.no_grad()
@pytest.mark.parametrize(
    ("dtype", "autocast", "within"),
    [(torch.float32, False, 1e-5), (torch.bfloat16, False, 2e-2), (torch.float32, True, 2e-2)],
    ids=["fp32", "bf16", "autocast"],
)
@pytest.mark.parametrize("shape", [(1, 200), (37, 200), (3, 5, 200)], ids=str)
def test_products_are_those_of_the_weights(dtype, autocast, within, shape):
    """Against float64; the precision of the result is the unpacked layer's."""
    model, x = layers(dtype), torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        unpacked = {name: layer(x) for name, layer in model.items()}
        with packed(model):
            for name, layer in model.items():
                found, weight = layer(x), layer.weight.double()
                exact = x.double() @ weight.T + (0 if layer.bias is None else layer.bias.double()) + (name == "own")
                assert found.dtype == unpacked[name].dtype
                assert found.shape == unpacked[name].shape
                torch.testing.assert_close(found.double(), exact, rtol=within, atol=within)
            assert [("forward" in vars(layer)) for layer in model.values()] == [True, True, False]


class Block(nn.Module):
    """Three layers of one input, and two that cannot have one."""

    def __init__(self, bias):
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(200, n, bias=bias) for n in (300, 170, 190))
        self.gate_proj, self.up_proj = nn.Linear(200, 300), nn.Linear(210, 300)

    def forward(self, x):
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


@torch.no_grad()
@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no bf16 on this processor")
@pytest.mark.parametrize("bias", [True, False])
def test_layers_of_one_input_are_one_product(bias, monkeypatch):
    """And again layers of their own, once another input, or the same one changed in place, comes between."""
    model, x, y = Block(bias).bfloat16(), torch.randn(3, 200).bfloat16(), torch.randn(5, 200).bfloat16()
    whole = Block(bias)
    whole.load_state_dict(model.state_dict())
    shapes = []
    reorder = torch.ops.mkldnn._reorder_linear_weight
    monkeypatch.setattr(
        torch.ops.mkldnn, "_reorder_linear_weight", lambda w, n: shapes.append(w.shape) or reorder(w, n)
    )

    def right(found, *inputs):
        for layer, given, out in zip((whole.q_proj, whole.k_proj, whole.v_proj), inputs, found):
            torch.testing.assert_close(out.float(), layer(given.float()), rtol=2e-2, atol=2e-2)

    with packed(model):
        assert sorted(shapes) == [(300, 200), (300, 210), (660, 200)]
        right(model(x), x, x, x)
        right(model(y), y, y, y)
        assert len(shapes) == 3
        right((model.q_proj(x), model.k_proj(y), model.v_proj(x)), x, y, x)
        right(model(x), x, x, x)
        assert len(shapes) == 6
    assert not any("forward" in vars(m) for m in model.modules())
    with packed(model):
        first = model.q_proj(x)
        before = x.clone()
        x.mul_(2)
        right((first, model.k_proj(x), model.v_proj(x)), before, x, x)
    with packed(model), torch.inference_mode():
        z = torch.ones(2, 200, dtype=torch.bfloat16)
        right(model(z), z, z, z)


@torch.no_grad()
def test_copies_are_of_the_present_weights_and_end_with_the_context(monkeypatch):
    model, x = layers(), torch.ones(2, 200)
    with packed(model):
        before = model["plain"](x)
    model["plain"].weight.mul_(2)
    with packed(model):
        after = model["plain"](x)
    torch.testing.assert_close(after, 2 * before - model["plain"].bias, rtol=1e-4, atol=1e-5)
    with pytest.raises(KeyError), packed(model):
        raise KeyError
    assert not any("forward" in vars(layer) for layer in model.values())
    monkeypatch.setattr(packing, "SMALL", 200 * 300)
    with packed(model):
        assert not any("forward" in vars(layer) for layer in model.values())


@torch.no_grad()
def test_tied_weights_are_packed_once_and_replaced_forwards_stay(monkeypatch):
    model = layers()
    model["bare"].weight = model["plain"].weight
    model["own"] = nn.Linear(200, 300)
    replaced = model["own"].forward = lambda x: x  # as hooks of other libraries do
    calls = []
    reorder = torch.ops.mkldnn._reorder_linear_weight
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", lambda *a: calls.append(a) or reorder(*a))
    with packed(model):
        assert len(calls) == 1
        assert model["own"].forward is replaced
    assert model["own"].forward is replaced


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_draw_with_packed_weights_takes_the_likeliest_tokens_of_a_whole_pass(tiny_model, monkeypatch, dtype):
    """Every matrix of the model packed, rows that leave among them."""
    monkeypatch.setattr(packing, "SMALL", 0)
    calls = []
    multiply = packing._multiply
    monkeypatch.setattr(packing, "_multiply", lambda *a: calls.append(a) or multiply(*a))
    model = tiny_model().to(dtype)
    config = SamplingConfig(max_completion_length=10, temperature=0.0)
    samples = TransformersSampler(config=config, eos_ids=tuple(range(0, 90, 9)), pad_id=0)(
        model, [[5, 6, 7], [8], [9, 10, 11, 12, 13]], 0
    )
    assert len(calls) >= sum(type(m) is nn.Linear for m in model.modules())
    width = samples.prompt_mask.shape[1]
    for row, keep, mask in zip(samples.tokens, samples.prompt_mask, samples.mask):
        prompt, response = row[:width][keep], row[width:][mask]
        with torch.no_grad():
            logits = model(input_ids=torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1].float()
        taken = logits.gather(1, response[:, None]).squeeze(1)
        # in bf16 two logits may lie nearer to each other than rounding takes them apart
        assert (logits.amax(1) - taken).max() <= (0 if dtype == torch.float32 else 0.05)
