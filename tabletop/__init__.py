"""The toy's world: a rendered tabletop arm, its episodes as DROID's records, a small base model.

    episodes = tabletop.make_episodes(np.random.default_rng(0), n_episodes=120, length=27)
    tabletop.write_rlds("runs/toy/data", episodes, n_shards=4)
    tabletop.pretrain("runs/toy/base.pt")       # learns from camera A; the released file's layout

toy.yaml is the recipe for fine-tuning that base model on camera B.
"""
from tabletop.base_model import SIZE, pretrain
from tabletop.records import write_rlds
from tabletop.world import (
    CAMERA_A,
    CAMERA_B,
    CAMERAS,
    make_episodes,
    random_scenes,
    render,
    simulate,
)


__all__ = ["CAMERAS", "CAMERA_A", "CAMERA_B", "SIZE", "make_episodes", "pretrain", "random_scenes",
           "render", "simulate", "write_rlds"]
