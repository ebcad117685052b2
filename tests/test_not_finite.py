"""Weights beyond the range of a dtype, in energy.py: one line, and neither NaN in a figure nor a
trace. running/numbers.py, in test_numbers.py, watches a training run."""
import pytest
import torch

import energy
from small import recipe


@pytest.mark.parametrize("part, what", [("encoder", "the latents of episode_4.npz are"),
                                        ("predictor", "the energies of .* under baseline are")])
@pytest.mark.parametrize("precision, cure", [("fp16", "use --precision=bf16 or fp32"),
                                             ("fp32", "the weights have grown too large")])
def test_a_base_that_overflows_ends_in_one_line(base, tmp_path, part, what, precision, cure):
    """Its weights are finite, and what they compute is not."""
    file = torch.load(base / "base.pt", weights_only=True)
    for name, weight in file[part].items():
        if name.endswith(("mlp.fc1.weight", "mlp.fc2.weight")):
            weight.mul_(1e30 if precision == "fp32" else 1e4)
    torch.save(file, tmp_path / "base.pt")
    cfg = recipe(base, tmp_path, f"--model.checkpoint={tmp_path}/base.pt", "--energy.pairs=1",
                 f"--precision={precision}", "--energy.grid=5", "--energy.planes=[xy]",
                 "--energy.planners=[cem]", "--energy.cem_samples=4", "--energy.cem_iterations=1",
                 "--energy.cem_elites=2")
    with pytest.raises(ValueError, match=f"^{what} not finite in {precision}.*; {cure}") as error:
        energy.analyse(cfg, [], tmp_path / "landscapes.npz")
    assert "\n" not in str(error.value) and not (tmp_path / "landscapes.npz").exists()
