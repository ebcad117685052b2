"""Adapters: start as the identity, train alone, travel in PEFT's form, merge exactly."""
import json

import pytest
import torch
from parity import inputs, tiny
from torch import nn

import folded
import lora
import model

TARGETS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


@pytest.fixture
def predictor():
    torch.manual_seed(0)
    return tiny()[1]


def give_B_values(module, seed=0):
    """Adapters as after some training."""
    random = torch.Generator().manual_seed(seed)
    for layer in lora._adapted(module).values():
        layer.lora_B.data.normal_(std=0.05, generator=random)


@torch.no_grad()
def run(predictor):
    _, states, actions = inputs()
    z = torch.randn(2, 7 * 16, 52, generator=torch.Generator().manual_seed(1))
    return predictor(z, actions, states[:, :7])


def test_full_size_adapts_96_layers_with_6_291_456_parameters():
    with torch.device("meta"):
        predictor = model._empty("vitg")[1]
        names = lora.inject(predictor, rank=16, alpha=32, targets=TARGETS)
    assert len(names) == 96 and "predictor_proj" not in names
    assert sum(p.numel() for p in predictor.parameters() if p.requires_grad) == 6_291_456
    with torch.device("meta"):
        without_proj = model._empty("vitg")[1]
        lora.inject(without_proj, rank=16, targets=("attn.qkv", "mlp.fc1", "mlp.fc2"))
    assert sum(p.numel() for p in without_proj.parameters() if p.requires_grad) == 5_505_024


def test_identity_at_the_start_and_unchanged_base_names(predictor):
    before, names = run(predictor), set(predictor.state_dict())
    lora.inject(predictor, rank=4)
    assert torch.equal(run(predictor), before)
    added = set(predictor.state_dict()) - names
    assert names < set(predictor.state_dict()) and all(".lora_" in name for name in added)


@pytest.mark.parametrize("rslora, scale", [(True, 8.0), (False, 2.0)])
def test_scale(predictor, rslora, scale):
    lora.inject(predictor, rank=16, alpha=32, rslora=rslora)
    assert {layer.scale for layer in lora._adapted(predictor).values()} == {scale}
    layer = predictor.predictor_blocks[0].mlp.fc1
    nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 60)
    expected = x @ (layer.weight + scale * layer.lora_B @ layer.lora_A).T + layer.bias
    assert torch.allclose(layer(x), expected, atol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_step_changes_every_B_and_no_base_bit(predictor, dtype, checkpointing):
    encoder = tiny()[0].to(dtype)
    predictor.to(dtype).activation_checkpointing = checkpointing
    base = {name: tensor.clone() for name, tensor in predictor.state_dict().items()}
    lora.inject(predictor, rank=4, dropout=0.1)
    predictor.train()
    trainable = [p for p in predictor.parameters() if p.requires_grad]
    assert {p.dtype for p in trainable} == {torch.float32} and len(trainable) == 2 * 12
    _, states, actions = inputs()
    h = torch.randn(2, 7, 16, 52, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        losses = model.WorldModel(encoder, predictor).losses(h, actions, states[:, :7])
    sum(losses.values()).backward()
    torch.optim.SGD(trainable, lr=1.0).step()
    for layer in lora._adapted(predictor).values():
        assert layer.lora_B.abs().sum() > 0
    assert all(torch.equal(predictor.state_dict()[name], tensor) for name, tensor in base.items())


def test_dropout_only_in_training_and_drawn_once_for_a_micro_batch(predictor):
    lora.inject(predictor, rank=4, dropout=0.5)
    give_B_values(predictor)
    whole = run(predictor)
    lora.fold(predictor)
    assert torch.equal(run(predictor), whole)               # what is measured is never folded
    predictor.train()
    lora.fold(predictor)
    once = run(predictor)
    assert not torch.equal(once, whole) and torch.equal(run(predictor), once)
    lora.fold(predictor)
    assert not torch.equal(run(predictor), once)
    layer = lora._adapted(predictor)["predictor_blocks.0.mlp.fc2"]
    assert set(layer.keep.tolist()) == {0, 2}
    x = torch.randn(3, layer.in_features)
    expected = x @ layer.weight.T + layer.bias + layer.scale * (x * layer.keep) @ layer.lora_A.T @ layer.lora_B.T
    assert torch.allclose(layer(x), expected, atol=1e-4)


@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_folded_layers_give_the_output_and_the_gradients_of_the_formula(predictor, dtype, close, dropout):
    lora.inject(predictor, rank=4, dropout=dropout)
    give_B_values(predictor)
    layer = lora._adapted(predictor)["predictor_blocks.0.mlp.fc2"].to(dtype).train()
    layer.lora_A.data, layer.lora_B.data = layer.lora_A.float(), layer.lora_B.float()
    lora.fold(layer)
    random = torch.Generator().manual_seed(0)
    x, d_y = (torch.randn(3, 5, n, generator=random) for n in (layer.in_features, layer.out_features))
    found = []
    for weight in (layer.folded, None):
        layer.folded = weight
        leaf = x.to(dtype).requires_grad_()
        y = layer(leaf)
        found.append([y, *torch.autograd.grad(y, (leaf, layer.lora_A, layer.lora_B), d_y.to(y.dtype))])
    for one, other in zip(*found):
        assert one.dtype == other.dtype and (one - other).norm() < close * other.norm()


def test_folding_into_bfloat16_keeps_updates_smaller_than_its_steps():
    """Rounded to the nearest, a small update would be lost; what is kept is measured along what it does to inputs."""
    random = torch.Generator().manual_seed(0)
    W, A, x = 0.03 * torch.randn(256, 512, generator=random), 0.02 * torch.randn(8, 512, generator=random), torch.randn(256, 512, generator=random)
    W = W.to(torch.bfloat16)
    out = torch.empty_like(W)
    for size in (0, 1e-5, 1e-3):
        B = size * torch.randn(256, 8, generator=random)
        folded.write_folded(out, W, A, B, 8.0)
        if size == 0:
            assert torch.equal(out, W)
            continue
        wanted = x @ (8 * B @ A).T
        kept, nearest = (((x @ (w.float() - W.float()).T) * wanted).sum() / wanted.square().sum()
                         for w in (out, (W.float() + 8 * B @ A).to(torch.bfloat16)))
        assert abs(kept - 1) < 0.05 and (nearest < 0.3 or size > 1e-5)


def test_a_target_that_matches_nothing_raises(predictor):
    with pytest.raises(ValueError, match="'attn.kqv' matches no linear layer; there are .*attn.qkv"):
        lora.inject(predictor, targets=("attn.kqv", "attn.proj"))
    lora.inject(predictor)
    with pytest.raises(ValueError, match="already adapted"):
        lora.inject(predictor)


def test_our_folder_loads_in_peft_with_the_same_output(predictor, tmp_path):
    peft = pytest.importorskip("peft")
    lora.inject(predictor, rank=4, alpha=8)
    give_B_values(predictor)
    lora.save(tmp_path, predictor, base="vjepa2-ac-vitg.pt")
    theirs = peft.PeftModel.from_pretrained(tiny()[1], tmp_path).eval()
    assert (run(theirs) - run(predictor)).abs().max() < 1e-5
    assert (run(theirs) - run(tiny()[1])).abs().max() > 1e-2


@pytest.mark.parametrize("rslora", [True, False])
def test_peft_folder_loads_here_with_the_same_output(predictor, tmp_path, rslora):
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(tiny()[1], peft.LoraConfig(r=4, lora_alpha=8, use_rslora=rslora, target_modules=list(TARGETS)))
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    theirs.eval().save_pretrained(tmp_path)
    lora.load(predictor, tmp_path)
    assert (run(predictor) - run(theirs)).abs().max() < 1e-5


def test_round_trip_is_bit_exact(predictor, tmp_path):
    lora.inject(predictor, rank=4, alpha=8, dropout=0.1)
    give_B_values(predictor)
    lora.save(tmp_path, predictor)
    fresh = tiny()[1]
    lora.load(fresh, tmp_path)
    assert fresh.lora_config.alpha == 8 and fresh.lora_config.dropout == 0.1
    assert torch.equal(run(fresh), run(predictor))
    assert all(torch.equal(a, b) for a, b in zip(lora.adapter_state(fresh).values(), lora.adapter_state(predictor).values()))


def test_merged_equals_unmerged_and_unmerge_is_exact(predictor):
    lora.inject(predictor, rank=4)
    give_B_values(predictor)
    adapted = run(predictor)
    layers = lora.merge(predictor)
    assert not lora._adapted(predictor) and all(type(m) is not lora.LoRALinear for m in predictor.modules())
    assert set(predictor.state_dict()) == set(tiny()[1].state_dict())
    assert (run(predictor) - adapted).abs().max() < 1e-5
    lora.unmerge(predictor, layers)
    assert torch.equal(run(predictor), adapted)


def test_merging_into_half_precision_is_refused(predictor):
    lora.inject(predictor.to(torch.bfloat16), rank=4)
    with pytest.raises(ValueError, match="dtype=torch.float32"):
        lora.merge(predictor)
    assert len(lora._adapted(predictor)) == 12


def edit_config(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("spoil, says", [
    (lambda folder: edit_config(folder, use_dora=True), "only plain LoRA"),
    (lambda folder: edit_config(folder, peft_type="IA3"), "only plain LoRA"),
    (lambda folder: edit_config(folder, r=8), "does not fit"),
    (lambda folder: (folder / "adapter_config.json").write_text("{"), "cut short or damaged"),
    (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"12345"), "cut short or damaged"),
    (lambda folder: (folder / "adapter_model.safetensors").unlink(), "must be in it"),
])
def test_a_bad_folder_is_named_and_changes_nothing(predictor, tmp_path, spoil, says):
    lora.inject(predictor, rank=4)
    give_B_values(predictor)
    lora.save(tmp_path, predictor)
    spoil(tmp_path)
    fresh = tiny()[1]
    with pytest.raises(ValueError) as error:
        lora.load(fresh, tmp_path)
    assert str(tmp_path) in str(error.value) and says in str(error.value) and "\n" not in str(error.value)
    assert torch.equal(run(fresh), run(tiny()[1]))


def test_adapters_refuse_another_base_rank_scale_or_layers(predictor, tmp_path):
    lora.inject(predictor, rank=4, alpha=8)
    lora.save(tmp_path, predictor)
    other_base = model.build("tiny")[1]
    with pytest.raises(ValueError, match="trained on another base model"):
        lora.load(other_base, tmp_path)
    for settings, says in ((dict(rank=8), "--lora.rank=4"), (dict(rank=4, alpha=16), "--lora.alpha=8"),
                           (dict(rank=4, alpha=8, rslora=False), "--lora.rslora=true"),
                           (dict(rank=4, alpha=8, targets=("attn.qkv",)), "does not fit")):
        other = tiny()[1]
        lora.inject(other, **settings)
        with pytest.raises(ValueError, match=says):
            lora.load(other, tmp_path)
