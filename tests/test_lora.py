"""Adapters: start as the identity, train alone, travel in PEFT's form, merge exactly."""
import json

import pytest
import torch
from torch import nn

import lora
import model
from parity import inputs, tiny


TARGETS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


@pytest.fixture
def predictor():
    torch.manual_seed(0)
    return tiny()[1]


def give_B_values(module, seed=0):
    """Adapters as after some training."""
    random = torch.Generator().manual_seed(seed)
    for layer in lora.adapted_layers(module).values():
        layer.lora_B.data.normal_(std=0.05, generator=random)


@torch.no_grad()
def run(predictor):
    _, states, actions = inputs()
    z = torch.randn(2, 7 * 16, 52, generator=torch.Generator().manual_seed(1))
    return predictor(z, actions, states[:, :7])


def test_full_size_adapts_96_layers_with_6_291_456_parameters():
    with torch.device("meta"):
        predictor = model.empty_networks("vitg")[1]
        names = lora.inject(predictor, rank=16, alpha=32, targets=TARGETS)
    assert len(names) == 96 and "predictor_proj" not in names
    assert sum(p.numel() for p in predictor.parameters() if p.requires_grad) == 6_291_456
    with torch.device("meta"):
        without_proj = model.empty_networks("vitg")[1]
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
    assert {layer.scale for layer in lora.adapted_layers(predictor).values()} == {scale}
    layer = predictor.predictor_blocks[0].mlp.fc1
    nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 60)
    expected = x @ (layer.weight + scale * layer.lora_B @ layer.lora_A).T + layer.bias
    assert torch.allclose(layer(x), expected, atol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_step_changes_every_B_and_no_base_bit(predictor, dtype, checkpointing):
    encoder = tiny()[0].to(dtype)
    predictor.to(dtype)
    if checkpointing:
        model.checkpoint_activations(predictor)
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
    for layer in lora.adapted_layers(predictor).values():
        assert layer.lora_B.abs().sum() > 0
    assert all(torch.equal(predictor.state_dict()[name], tensor) for name, tensor in base.items())


def test_dropout_in_training_mode_alone_and_drawn_for_each_token(predictor):
    """No call has to come first: the layer is right by itself."""
    lora.inject(predictor, rank=4, dropout=0.5)
    give_B_values(predictor)
    whole = run(predictor)
    assert torch.equal(run(predictor), whole)
    predictor.train()
    once = run(predictor)
    assert not torch.equal(once, whole) and not torch.equal(run(predictor), once)
    layer = lora.adapted_layers(predictor)["predictor_blocks.0.mlp.fc2"]
    x = torch.randn(3, layer.in_features)
    torch.manual_seed(0)
    y = layer(x)
    torch.manual_seed(0)
    dropped = nn.functional.dropout(x, 0.5)                 # the only draw
    assert len({tuple(row.tolist()) for row in dropped != 0}) == 3
    update = layer.scale * dropped @ layer.lora_A.T @ layer.lora_B.T
    expected = x @ layer.weight.T + layer.bias + update
    assert torch.allclose(y, expected, atol=1e-4)
    # 1 / (1 - p): on average nothing changes
    mean = layer(x.expand(4000, -1, -1)).mean(0)
    predictor.eval()
    assert (mean - layer(x)).norm() < 0.1 * (layer(x) - x @ layer.weight.T - layer.bias).norm()


def test_an_update_of_the_adapter_counts_at_once(predictor):
    """Nothing is cached in training mode, in any order of calls."""
    lora.inject(predictor, rank=4)
    predictor.train()
    before = run(predictor)
    give_B_values(predictor)
    after = run(predictor)
    assert not torch.equal(before, after)
    predictor.eval()
    assert torch.equal(run(predictor), after)


def test_equal_adapters_have_equal_bytes(predictor):
    lora.inject(predictor, rank=4)
    give_B_values(predictor)
    files = [lora.adapter_files(predictor, "base.pt") for _ in range(8)]
    assert all(one == files[0] for one in files)
    metadata = b'{"__metadata__": {"format": "pt", "base_fingerprint": "by formula"}'
    assert files[0]["adapter_model.safetensors"][8:].startswith(metadata)


def test_a_target_that_matches_nothing_raises(predictor):
    with pytest.raises(ValueError, match="'attn.kqv' matches no linear layer; .*attn.qkv"):
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
    theirs = peft.get_peft_model(tiny()[1], peft.LoraConfig(
        r=4, lora_alpha=8, use_rslora=rslora, target_modules=list(TARGETS)))
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
    states = lora.adapter_state(fresh), lora.adapter_state(predictor)
    assert all(torch.equal(a, b) for a, b in zip(*(state.values() for state in states)))


def test_merged_equals_unmerged_and_unmerge_is_exact(predictor):
    lora.inject(predictor, rank=4)
    give_B_values(predictor)
    adapted = run(predictor)
    layers = lora.merge(predictor)
    assert not lora.adapted_layers(predictor)
    assert all(type(m) is not lora.LoRALinear for m in predictor.modules())
    assert set(predictor.state_dict()) == set(tiny()[1].state_dict())
    assert (run(predictor) - adapted).abs().max() < 1e-5
    lora.unmerge(predictor, layers)
    assert torch.equal(run(predictor), adapted)


def test_merging_into_half_precision_is_refused(predictor):
    lora.inject(predictor.to(torch.bfloat16), rank=4)
    with pytest.raises(ValueError, match="dtype=torch.float32"):
        lora.merge(predictor)
    assert len(lora.adapted_layers(predictor)) == 12


def edit_config(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("spoil, says", [
    (lambda folder: edit_config(folder, use_dora=True), "only plain LoRA"),
    (lambda folder: edit_config(folder, peft_type="IA3"), "only plain LoRA"),
    (lambda folder: edit_config(folder, r=8), "does not fit"),
    (lambda folder: (folder / "adapter_config.json").write_text("{"), "cut short or damaged"),
    (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"12345"), "cut short"),
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
    message = str(error.value)
    assert str(tmp_path) in message and says in message and "\n" not in message
    assert torch.equal(run(fresh), run(tiny()[1]))


def test_adapters_refuse_another_base_rank_scale_or_layers(predictor, tmp_path):
    lora.inject(predictor, rank=4, alpha=8)
    lora.save(tmp_path, predictor)
    other_base = model.build("tiny")[1]
    with pytest.raises(ValueError, match="trained on another base model"):
        lora.load(other_base, tmp_path)
    for settings, says in ((dict(rank=8), "--lora.rank=4"),
                           (dict(rank=4, alpha=16), "--lora.alpha=8"),
                           (dict(rank=4, alpha=8, rslora=False), "--lora.rslora=true"),
                           (dict(rank=4, alpha=8, targets=("attn.qkv",)), "does not fit")):
        other = tiny()[1]
        lora.inject(other, **settings)
        with pytest.raises(ValueError, match=says):
            lora.load(other, tmp_path)


def test_adapting_twice_and_saving_nothing_are_refused(predictor, tmp_path):
    with pytest.raises(ValueError, match="no adapters to save"):
        predictor.lora_config = None
        lora.save(tmp_path, predictor)
    lora.inject(predictor, rank=4, targets=("attn.qkv",))
    with pytest.raises(ValueError, match="already adapted; call lora.remove"):
        lora.inject(predictor, rank=4, targets=("mlp.fc1",))
    assert len(lora.adapted_layers(predictor)) == 3
