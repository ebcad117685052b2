"""energy.py plan: from images and a pose to an action, the closed loop on a recorded episode, and
what is refused."""
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import droid
import energy
import lora
import model
import train
from analysis import planners
from episodes.poses import apply_action, pose_deltas
from evaluation import plan, replay
from small import recipe


POSE = [0.4, 0.1, 0.3, 3.1, 0.02, -1.2, 0.5]
FEW = ["--energy.cem_samples=24", "--energy.cem_iterations=3", "--energy.cem_elites=4"]


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """A run folder with an adapter that matters."""
    out = tmp_path_factory.mktemp("run") / "run"
    train.train(recipe(base, out, "--max_steps=2", "--warmup_steps=1", "--lr=0.05"))
    return out


@pytest.fixture(scope="module")
def images(base, tmp_path_factory):
    """The first and the third frame of a recorded episode as PNG, and the episode."""
    folder = tmp_path_factory.mktemp("images")
    source = droid.open_source(recipe(base, folder))
    episode = next(source.episodes(source.files[0]))
    frames = source.every_frame(episode.images)
    for name, i in (("now", 0), ("goal", 2)):
        Image.fromarray(frames[i].numpy()).save(folder / f"{name}.png")
    return folder, frames, episode


def command(base, *args):
    cfg = recipe(base, base / "nothing")
    keys = [f"--model.checkpoint={base}/base.pt", "--model.size=tiny", "--device=cpu",
            f"--data.path={base}/data", "--data.crop=none", "--data.frame_step=1",
            "--precision=fp32", *FEW]
    assert cfg.model.size == "tiny"
    energy.main(["plan", "config.yaml", *keys, *args])


def test_a_plan_is_what_the_planner_finds_for_the_energies_of_the_model(base, run, images):
    folder, frames, episode = images
    cfg = recipe(base, run, *FEW, "--energy.horizon=2")
    planner = plan.Planner(cfg, str(run / "step_2"))
    now, goal = (planner.encode(plan.read_image(folder / f"{name}.png"))
                 for name in ("now", "goal"))

    encoder, predictor = model.load(base / "base.pt", "tiny")
    lora.load(predictor, run / "step_2")
    world = model.WorldModel(encoder, predictor).eval()
    h = world.encode(frames[[0, 2]].permute(3, 0, 1, 2)[None])[0]
    assert torch.equal(now, h[0]) and torch.equal(goal, h[1])

    def energy_of(actions):
        return energy.sequence_energy(world, h[:1], episode.poses[:1], h[1], actions)

    expected = planners.cem(energy_of, horizon=2, samples=24, iterations=3, elites=4,
                            box=cfg.energy.radius, seed=cfg.seed)
    found = planner.plan(now, episode.poses[0], goal)
    assert np.array_equal(found.actions, expected.actions) and found.energy == expected.energy
    planner.choose("baseline")
    assert not np.array_equal(planner.plan(now, episode.poses[0], goal).actions, found.actions)
    energies = planner.landscape(now, episode.poses[0], goal)
    still = planner.energies(now, episode.poses[0], goal, np.zeros((1, 1, 7)))
    assert len(energies) == 125 and energies[62] == pytest.approx(still.item(), abs=1e-6)


@pytest.mark.parametrize("column, objective", enumerate(("l1", "l2")))
def test_it_plans_by_the_objective(base, images, column, objective):
    folder, frames, episode = images
    planner = plan.Planner(recipe(base, folder, *FEW, f"--energy.objective={objective}"))
    h, goal = (planner.encode(frames[i].numpy()) for i in (0, 2))
    found = planner.plan(h, episode.poses[0], goal)
    actions = torch.from_numpy(found.actions)[None]
    both = energy.sequence_energies(planner.world, h[None], episode.poses[:1], goal, actions)
    assert found.energy == both[0, column].item() != both[0, 1 - column].item()


def test_the_command_line(base, run, images, capsys):
    folder = images[0]
    at = [f"--image={folder}/now.png", f"--goal={folder}/goal.png", f"--pose={POSE}"]
    command(base, *at)
    said = capsys.readouterr().out
    assert "cem under baseline" in said and "step 1: x " in said and "no move" in said
    energy.main(["plan", str(run), *at, *FEW])          # of a run, its newest step
    assert f"cem under {run}/step_2" in capsys.readouterr().out
    command(base, *at, f"--adapter={run}/step_2", "--energy.horizon=2", "--energy.planners=[mppi]")
    said = capsys.readouterr().out
    assert f"mppi under {run}/step_2" in said and "step 2: x " in said


def words_of(base, actions, energies, found=1.0, still=1.3):
    planner = SimpleNamespace(cfg=recipe(base, base), adapter="baseline",
                              data=recipe(base, base).data)
    made = planners.Plan(np.array(actions, np.float32), found, 0.1)
    return "\n".join(plan._words(planner, np.array(POSE), made, still, np.array(energies)))


def test_the_words_are_the_numbers(base):
    energies = np.linspace(1.1, 1.5, 125)
    text = words_of(base, [[0.03, -0.01, 0.002, 0, 0, 0, 0.25], [0, 0, 0, 0, 0, np.pi / 18, 0]],
                    energies)
    assert "step 1: x +3.0 y -1.0 z +0.2 cm  gripper +0.25" in text
    assert "turn +0.0 +0.0 +10.0°" in text and "[0.43, 0.09, 0.302, 3.1, 0.02, -1.2, 0.75]" in text
    assert "energy 1.0000; no move 1.3000" in text and "a range of 30.8% of their mean" in text
    assert "WARNING" not in text
    assert "no better than not to move" in words_of(base, [[0] * 7], energies, 1.3)
    assert "the landscape is flat" in words_of(base, [[0] * 7], 1 + energies / 1e3)


@pytest.mark.parametrize("args, says", [
    (["--pose=[0.4,0,0.3,178,2,-60,0.5]"],
     "-60 to 178, and radians are expected: degrees? then --data.rotation=degrees"),
    (["--pose=[400,0,300,3,0,0,0.5]"],
     "0 to 400, and metres are expected: millimetres? then --data.position_scale=0.001"),
    (["--pose=[40,0,30,3,0,0,0.5]"],
     "0 to 40, and metres are expected: centimetres (inches: 0.0254)? then --data.position_sc"),
    (["--pose=[0.4,0,0.3,3,2.5,0,0.5]"], "number 5 beyond ±π/2, where no second Euler angle is"),
    (["--pose=[0.4,0,0.3,3,0,0,85]"],
     "85 to 85, and 0 (open) to 1 (closed) is expected: a width in millimetres? then --data.gri"),
    (["--pose=[0.4,0,0.3,3,0,0,-1]"], "-1 to -1, and 0 (open) to 1 (closed) is expected: -1 to 1?"),
    (["--pose=[0.4,0,0.3,3,0,0]"], "6 numbers in a pose, expected 7"),
    (["--pose=[0.4,0,0.3,0,0,0,1,0.5]"], "a quaternion? --data.rotation=quat_xyzw"),
    (["--pose=[0.4,0,0.3,3,0,nan,0]"], "a number is not finite"),
    (["--pose=here"], "--pose=here: expected numbers with commas"),
    (["--pose=[]"], "expected numbers with commas"),
    (["--pose="], "--pose needs one value"),
    (["--goal=absent.png"], "absent.png: no such image"),
    (["--goal=README.md"], "README.md: cannot be read as an image"),
    (["--image={wide}"], "48 × 96 pixels and"),
    (["--image={dot}"], "dot.png has 1 × 1 pixels, too few to plan from; give it as the camera"),
    (["--image={dot}", "--goal={dot}"], "dot.png has 1 × 1 pixels"),
    (["--goal={low}"], "low.png has 31 × 200 pixels, too few"),
    (["--image={deep}"], "of mode I;16; store it with 8 bits"),
    (["--image={cut}"], "cut.png: cannot be read as an image"),
    (["--image={large}"], "large.png: cannot be read as an image (3000 × 3000 pixels are more"),
    (["--image={huge}"], "huge.png: cannot be read as an image (its pixels are more than 8,388,6"),
    (["--image={strip}", "--goal={strip}", "--data.crop=center"],
     "strip.png: images of 32 × 99999 pixels"),
    (["--data.pose_slice=[0,7]"], "'[0,7]' of 7 numbers; they are counted from 0"),
    (["--replay=episode"], "--image: a replay takes its images and poses from the episode"),
    (["--energy.planners=[]"], "plan needs one, --energy.planners=[cem]"),
    (["--energy.context=2"], "plan knows one frame: --energy.context=1"),
    (["--all"], "--all does not apply to plan"),
    (["--adapter=a", "--adapters=b"], "--adapter and --adapters: give one of them"),
    (["--adapter=absent"], "absent"),
    (["--data.path=[{{path: a, crop: center}}, {{path: b, crop: none}}]"], "with different crop"),
    (["--data.step_seconds=0.5"], "set --data.fps"),
])
def test_what_cannot_be_planned_from_is_one_line(base, images, tmp_path, args, says):
    folder = images[0]
    Image.new("RGB", (96, 48)).save(tmp_path / "wide.png")
    Image.fromarray(np.zeros((24, 24), np.uint16)).save(tmp_path / "deep.png")
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    Image.new("RGB", (200, 31)).save(tmp_path / "low.png")
    Image.new("1", (3000, 3000)).save(tmp_path / "large.png")
    Image.new("1", (99999, 32)).save(tmp_path / "strip.png")
    # Its header alone is that of 16 billion pixels, at which Pillow stops.
    header = struct.pack(">4sIIBBBBB", b"IHDR", 1 << 17, 1 << 17, 8, 2, 0, 0, 0)
    (tmp_path / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header
                                        + struct.pack(">II4s", zlib.crc32(header), 0, b"IDAT"))
    (tmp_path / "cut.png").write_bytes((folder / "now.png").read_bytes()[:120])
    names = {path.stem: path for path in tmp_path.glob("*.png")}
    args = [arg.format(**names) for arg in args]
    given = {arg.partition("=")[0] for arg in args}
    usual = [f"--image={folder}/now.png", f"--goal={folder}/goal.png", f"--pose={POSE}"]
    with pytest.raises(SystemExit) as end:
        command(base, *(arg for arg in usual if arg.partition("=")[0] not in given), *args)
    assert says in str(end.value) and "\n" not in str(end.value)


def test_one_adapter_plans(base, run, images):
    at = [f"--image={images[0]}/now.png", f"--goal={images[0]}/goal.png", f"--pose={POSE}"]
    with pytest.raises(SystemExit, match="plan takes one adapter, not 2"):
        command(base, *at, f"--adapters={run}/step_2,{run}/step_best")


def test_a_step_is_as_long_as_that_of_the_data(base):
    data = plan.data_of(recipe(base, base, "--data.step_seconds=0.5", "--data.fps=10"))
    assert data.frame_step == 5


def test_it_says_what_is_missing(base, images):
    with pytest.raises(SystemExit, match="plan needs --goal: python energy.py plan RUN --image="):
        command(base, f"--image={images[0]}/now.png", f"--pose={POSE}")


@pytest.mark.parametrize("keys, numbers", [
    (["--data.rotation=degrees"], [0.4, 0.1, 0.3, *np.rad2deg(POSE[3:6]), 0.5]),
    (["--data.position_scale=0.001"], [400, 100, 300, *POSE[3:]]),
    (["--data.gripper.invert=true"], POSE),
])
def test_a_pose_is_read_as_the_data_are(base, keys, numbers):
    found = plan.read_pose(numbers, recipe(base, base, *keys).data)
    assert np.allclose(found, POSE, atol=1e-9)          # half closed is half open


@pytest.mark.parametrize("keys, pose", [
    (["--data.check=false"], [400, 0, 300, 178, 2, -60, 85]),
    (["--data.rotation=degrees"], [0.4, 0, 0.3, 2, 0.5, 0, 0.5]),       # nearly upright
    (["--data.gripper.scale=0.00392"], [0.4, 0, 0.3, 3, 0, 0, 1]),      # nearly open
])
def test_a_pose_that_can_be_right_is_taken(base, keys, pose):
    assert np.isfinite(plan.read_pose(pose, recipe(base, base, *keys).data)).all()


def test_what_pillow_warns_of_is_not_shown(tmp_path, recwarn):
    image = Image.new("RGB", (40, 40)).quantize(8)
    image.save(tmp_path / "x.png", transparency=bytes([0, 255] * 4))
    assert plan.read_image(tmp_path / "x.png").shape == (40, 40, 3) and not recwarn.list


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "CMYK"])
def test_images_of_any_kind_and_size_become_rgb(base, mode, tmp_path):
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    Image.new("RGB", (57, 32), (255, 255, 255)).convert(mode).save(path)
    image = plan.read_image(path)
    assert image.shape == (32, 57, 3) and image.dtype == np.uint8 and image.min() > 250
    for crop in ("center", "droid", "none"):
        h = plan.Planner(recipe(base, base, f"--data.crop={crop}")).encode(image)
        assert h.ndim == 2 and h.isfinite().all()


def test_an_image_that_was_held_sideways_is_turned(tmp_path):
    picture = np.zeros((4, 8, 3), np.uint8)
    picture[:, :4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6                                    # turn by 90° to the right
    Image.fromarray(picture).save(tmp_path / "x.png", exif=exif)
    found = plan.read_image(tmp_path / "x.png")
    assert found.shape == (8, 4, 3) and found[:4].min() == 255 and found[4:].max() == 0


# The closed loop

class Guide:
    """A planner that takes the moves of a list, whatever it sees."""

    def __init__(self, moves):
        self.moves, self.device, self.asked = list(moves), "cpu", []
        self.world = SimpleNamespace(encode=lambda frame: frame.float().mean((1, 3, 4))[:, :, None])

    def plan(self, h, pose, goal):
        self.asked.append(round(h.item()))
        return SimpleNamespace(actions=np.array([[*self.moves.pop(0), 0, 0, 0, 0, 0, 0]]))


def line(n):
    """n frames that show their number, with poses a centimetre apart."""
    frames = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 2, 2, 3)
    poses = np.zeros((n, 7))
    poses[:, 0] = 0.02 * np.arange(n)
    return frames, poses


@pytest.mark.parametrize("moves, visited, end", [
    ([0.02] * 9, list(range(10)), "reaches the goal in 9 steps"),
    ([0.045, 0.062, 0.5], [0, 2, 5, 9], "reaches the goal in 3 steps"),
    ([0.04, 0.009], [0, 2, 2], "stays where it is, 14.0 cm from the goal"),
    ([0.04, 0.02, -0.02], [0, 2, 3, 2], "comes back to where it was, 14.0 cm from the goal"),
])
def test_a_replay_takes_the_frame_nearest_to_the_plan(moves, visited, end):
    frames, poses = line(10)
    guide = Guide([[move] for move in moves])
    found = replay.replay(guide, frames, poses)
    assert found == visited and replay._end(poses, found) == end
    assert guide.asked == visited[:-1]                  # from what is seen there


def test_a_replay_ends():
    frames, poses = line(100)
    found = replay.replay(Guide([[0.02]] * 99), frames, poses)
    assert found == list(range(replay.MOST_STEPS + 1))
    assert replay._end(poses, found) == "is 158.0 cm from the goal after 20 steps"


def test_an_episode_is_found_by_a_part_of_its_name(base, tmp_path):
    cfg = recipe(base, tmp_path)
    source = droid.open_source(cfg)
    names = [one.name for file in source.files for one in source.episodes(file)]
    for name in (names[0], names[-1], names[1][-6:]):
        episode, frames, poses = replay.find_episode(cfg, name)
        assert name in episode.name and len(frames) == len(poses) == len(episode.poses)
    episode, frames, poses = replay.find_episode(recipe(base, tmp_path, "--data.frame_step=3"),
                                                 names[0])
    assert len(frames) == len(poses) == -(-len(episode.poses) // 3)
    deltas = pose_deltas(poses)
    assert np.allclose(apply_action(poses[0], deltas[0])[:3], episode.poses[3, :3])
    for name, says in (("nobody", "is in no name of"), ("ep", "is in several names of")):
        with pytest.raises(ValueError, match=says):
            replay.find_episode(cfg, name)


def test_what_cannot_be_replayed_is_one_line(base, tmp_path):
    poses, images = np.zeros((6, 7)), np.zeros((6, 24, 24, 3), np.uint8)
    poses[:, 0] = np.linspace(0, 0.3, 6)
    for name, change in (("still", {5: 0.0}), ("nan", {3: np.nan}), ("short", {})):
        there = poses.copy()
        for i, x in change.items():
            there[i, 0] = x
        n = 1 if name == "short" else 6
        np.savez(tmp_path / f"{name}.npz", observations=images[:n], states=there[:n])
    np.savez(tmp_path / "good.npz", observations=images, states=poses)
    cfg = recipe(base, base, f"--data.path={tmp_path}", "--data.check=false")
    for name, says in (("still", "0.0 cm from where it begins"), ("nan", "a pose is not finite"),
                       ("short", "1 frames, a replay needs two")):
        with pytest.raises(ValueError, match=says):
            replay.find_episode(cfg, name)
    both = recipe(base, base, f"--data.path=[{tmp_path}, {base}/data]")
    with pytest.raises(ValueError, match="a replay reads one data set"):
        replay.find_episode(both, "good")


def test_cameras_and_damaged_episodes_are_found_by_their_files(base, tmp_path, capsys):
    poses, images = np.zeros((6, 7)), np.zeros((6, 32, 32, 3), np.uint8)
    poses[:, 0] = np.linspace(0, 0.3, 6)
    for i, name in enumerate(("pick_front", "pick_side", "place_front")):
        np.savez(tmp_path / f"{name}.npz", observations=images + i, states=poses,
                 episode=name.partition("_")[0])
    (tmp_path / "torn.npz").write_bytes(b"PK")
    cfg = recipe(base, base, f"--data.path={tmp_path}", "--data.check=false")
    for name, level in (("pick", 0), ("pick_side", 1), ("side", 1), ("place", 2)):
        assert (replay.find_episode(cfg, name)[1] == level).all()
    for name, says in (("torn", "torn.npz: "), ("front", "in several files of 3 episodes: pick_f"),
                       ("nobody", "in no name of 3 episodes: pick, place, torn.npz")):
        with pytest.raises(ValueError, match=says):
            replay.find_episode(cfg, name)
    episode, _, found = replay.find_episode(cfg, "side")
    assert next(replay._words(episode, found, {})).startswith("pick (pick_side.npz): 6 frames")


def test_a_replay_from_the_command_line(base, run, capsys):
    names = sorted(path.stem for path in (base / "data").glob("*.npz"))
    energy.main(["plan", str(run), f"--replay={names[0]}", *FEW])
    said = capsys.readouterr().out
    assert "from the first to the last one" in said and "  baseline " in said
    assert "  step_2 " in said and "  as recorded " in said and "step_2: " in said
