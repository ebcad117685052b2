"""Runs on several data sets: resumed as runs on one are."""
import shutil

import pytest

import config
import latents
import train
from running import command_line, settings
from small import recipe, write, write_episodes


@pytest.mark.parametrize("weights", [[], ["--data.weights=[1, 2]"]])
def test_they_resume_with_the_bytes_of_an_undisturbed_run(tmp_path, weights):
    base = write(tmp_path)
    (tmp_path / "other").mkdir()
    write_episodes(tmp_path / "other", n=5, length=12, patches=4, move=0.06)
    paths = f"--data.path=[{base}/data, {{path: {tmp_path}/other, only_success: false}}]"
    args = [paths, *weights, "--save_every=2", "--val_every=0"]
    train.train(recipe(base, tmp_path / "run", *args))
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    for step in (4, 6):
        shutil.rmtree(tmp_path / f"again/step_{step}")
    # With its own settings, the data sets among them.
    train.train(config.load([f"{tmp_path}/run/config.yaml", f"--out_dir={tmp_path}/again",
                             "--resume"]))
    for name in ("state.pt", "trained_on.json", "adapter_model.safetensors"):
        contents = [(tmp_path / run / "step_6" / name).read_bytes() for run in ("run", "again")]
        assert contents[0] == contents[1], name
    for changed in (f"{base}/data", [f"{base}/data", f"{tmp_path}/other"]):
        path = str(changed).replace("'", "")
        with pytest.raises(ValueError, match="was trained with another data.path"):
            train.train(recipe(base, tmp_path / "again", *weights[:isinstance(changed, list)],
                               "--save_every=2", f"--data.path={path}", "--max_steps=8",
                               "--resume"))


def test_the_command_line_takes_a_folder_of_latents_for_each(tmp_path):
    base = write(tmp_path)
    (tmp_path / "other").mkdir()
    write_episodes(tmp_path / "other", n=3, length=12, patches=4, move=0.06)
    args = ["config.yaml", f"--data.path=[{base}/data, {tmp_path}/other]",
            f"--data.latents=[{tmp_path}/a, {tmp_path}/b]", f"--model.checkpoint={base}/base.pt",
            "--model.size=tiny", "--device=cpu", "--precision=fp32", "--data.crop=none"]
    assert latents.encode(command_line.parse("latents.py", "", args)) == [
        tmp_path / "a", tmp_path / "b"]
    more = ["--optimizer=adamw", f"--out_dir={tmp_path}/run"]
    assert command_line.parse("train.py", "", args + more).data.latents == (
        f"{tmp_path}/a", f"{tmp_path}/b")
    (tmp_path / "a/store.json").unlink()
    with pytest.raises(ValueError, match=f"{tmp_path}/a: no stored latents"):
        command_line.parse("train.py", "", args + more)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file: is a file"):
        folders = f"--data.latents=[{tmp_path}/file, {tmp_path}/b]"
        command_line.parse("latents.py", "", [*args, folders])


@pytest.mark.parametrize("path", [(), (1,), ({"val_fraction": 1},), ["a", "b"], {"path": "a"}])
def test_data_sets_in_a_state_that_no_recipe_has_are_damage(path):
    kept = settings.kept(config.Config())
    assert not settings.fault_of(kept)
    assert not settings.fault_of(kept | {"data.path": ("a", {"path": "b", "camera": "c"})})
    assert "data.path is" in settings.fault_of(kept | {"data.path": path})
