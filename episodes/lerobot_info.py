"""meta/info.json of a LeRobot data set, and which columns data.keys and data.camera mean there.

Whatever is not there ends in one line with what there is.
"""
import re

from config import KeysConfig
from episodes.conversion import columns as pose_columns
from files.reading import check_fields, is_inside, read_json, shown


# What the defaults of data.keys, names of RLDS, stand for here
COLUMNS = {"image": "observation.images.{camera}", "pose": "observation.state.cartesian_position",
           "gripper": "observation.state.gripper_position",
           "joint_velocity": "observation.state.joint_velocity", "episode": ""}
COUNTERS = ("timestamp", "frame_index", "episode_index", "index", "task_index")
FORMATS = ("v2.0", "v2.1", "v3.0")
MAX_EPISODES = 10_000_000


def check_installed():
    try:
        import av
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ValueError("reading LeRobot data sets needs pyarrow and PyAV: pip install pyarrow av "
                         f"({error})") from None
    if not hasattr(av, "IndexEntries") and not hasattr(av.stream.Stream, "index_entries"):
        raise ValueError(f"PyAV {av.__version__} is too old: pip install --upgrade av")


def read_info(path):
    where = f"{path}/meta/info.json"
    info = read_json(where)
    check_fields(info, {"codebase_version": str, "fps": float, "features": {str: dict},
                        "data_path": str}, where,
                 {"video_path": (str, None), "chunks_size": int, "total_episodes": int})
    if info["codebase_version"] not in FORMATS:
        raise ValueError(f"{where}: format {shown(info['codebase_version'])}, of which "
                         f"{', '.join(FORMATS)} are read: convert it with LeRobot's own scripts")
    if not 0 < info["fps"] <= 1000:
        raise ValueError(f"{where}: fps is {info['fps']}, expected frames in a second")
    if info.get("chunks_size", 1) < 1 or not 0 <= info.get("total_episodes", 0) <= MAX_EPISODES:
        raise ValueError(f"{where}: chunks_size or total_episodes is out of range; copy it again")
    for name, feature in info["features"].items():
        check_fields(feature, {"dtype": str, "shape": [int]}, f"{where}: {shown(name)}")
    return info


def fill(template, place, camera, path):
    """A path of info.json, such as data/chunk-{chunk_index:03d}/…, for a chunk and file."""
    chunk, file = place
    values = {"chunk_index": chunk, "episode_chunk": chunk, "file_index": file,
              "episode_index": file, "video_key": camera}

    def value(match):
        if match[1] not in values:
            raise ValueError(f"{path}/meta/info.json: {shown(template)} has an unknown field "
                             f"{shown(match[1])}")
        return f"{values[match[1]]:0{match[2]}d}" if match[2] else str(values[match[1]])
    # str.format would also look up attributes and make texts of any length.
    name = re.sub(r"\{(\w+)(?::0?(\d)d)?\}", value, template)
    if not is_inside(name) or "{" in name:
        raise ValueError(f"{path}/meta/info.json: {shown(template)} is no path inside the folder")
    return name


def find_camera(features, data, path):
    """The feature that holds the images of data.camera. Raises ValueError with the cameras."""
    pattern = data.keys.image if data.keys.image != KeysConfig.image else COLUMNS["image"]
    cameras = [name for name, feature in features.items()
               if feature["dtype"] in ("video", "image") and image_shape(feature)]
    short = data.camera.replace("_image", "", 1)        # DROID's names in its port to LeRobot
    for name in (data.camera, short):
        for found in (pattern.replace("{camera}", name), name):
            if found in cameras:
                return found
    prefix, _, suffix = pattern.partition("{camera}")
    names = [name.removeprefix(prefix).removesuffix(suffix) for name in cameras]
    found = pattern.replace("{camera}", data.camera)
    if not names:
        raise ValueError(f"{path}: holds no colour images, neither as video nor as image")
    raise ValueError(f"data.camera: {path} has no images {shown(found)}; --data.camera can be "
                     f"{', '.join(names)}")


def image_shape(feature):
    """(height, width) of a feature with colour images, None for others, such as of depth."""
    shape, names = feature["shape"], feature.get("names")
    info = feature.get("info") or feature.get("video_info") or {}
    if len(shape) != 3 or isinstance(info, dict) and info.get("video.is_depth_map"):
        return None
    if isinstance(names, list) and names[:1] in (["channels"], ["channel"]):
        shape = shape[1:] + shape[:1]
    elif shape[2] != 3 and shape[0] == 3:
        shape = shape[1:] + shape[:1]
    return tuple(shape[:2]) if shape[2] == 3 else None


def find_columns(features, data, path):
    """{"pose", "gripper", "joint_velocity", "episode": name of the column, "" if not read}"""
    columns = {}
    for key, default in COLUMNS.items():
        name = getattr(data.keys, key)
        columns[key] = default if name == getattr(KeysConfig, key) else name
    columns.pop("image")
    if not data.drop_idle:
        columns["joint_velocity"] = ""
    for key, name in columns.items():
        if name and (name not in features or key != "episode" and not _is_numbers(features[name])):
            raise ValueError(_column_fault(features, key, name, path))
    names = _names(features[columns["pose"]])
    chosen = [names[i] for i in pose_columns(data.pose_slice, len(names))] if names else []
    joints = [name for name in chosen[:6] if "joint" in name.lower()]
    if joints and data.check:
        raise ValueError(f"data.keys.pose: {', '.join(joints)} of {columns['pose']} in {path} are "
                         "joints, no pose of the end effector; choose another column or "
                         "--data.pose_slice (--data.check=false takes it)")
    return columns


def _is_numbers(feature):
    return feature["dtype"].startswith(("float", "int", "uint", "bool")) and len(
        feature["shape"]) < 2


def _names(feature):
    """Names of a feature's numbers: a list of them, which may be within another list or object."""
    names = feature.get("names")
    while isinstance(names, (dict, list)) and names and not isinstance(names, str):
        inner = list(names.values()) if isinstance(names, dict) else names
        if all(isinstance(name, str) for name in inner):
            return inner
        names = inner[0]
    return []


def _looks_like_pose(name, feature):
    names = {one.lower() for one in _names(feature)}
    return {"x", "y", "z"} <= names or bool(
        re.search(r"pose|cartesian|eef|tcp|end_?effector|(^|[._])ee([._]|$)", name.lower()))


def _column_fault(features, key, name, path):
    """What is wrong with a column of data.keys, and which there are."""
    numbers = {name: feature for name, feature in features.items()
               if _is_numbers(feature) and name not in COUNTERS and feature["dtype"] != "bool"}
    poses = [name for name in numbers if _looks_like_pose(name, numbers[name])]
    text = f"data.keys.{key}: {path} has no column of numbers {shown(name)}"
    if key == "episode":
        return f"{text.replace(' of numbers', '')}; it has {', '.join(features)}"
    if key == "joint_velocity":
        return (f"{text}, which data.drop_idle needs: set --data.drop_idle=false, or name one of "
                f"{', '.join(numbers)}")
    others = [name for name in numbers if name not in poses]
    held = ", ".join(f"{name} [{sum(numbers[name]['shape'])}"
                     f"{': ' * bool(_names(numbers[name]))}{' '.join(_names(numbers[name])[:10])}]"
                     for name in poses + others)[:800]
    if key == "pose" and not poses:
        joints = "joint positions" if "joint" in held.lower() else "other numbers"
        return (f"{path}: holds {joints} but no end-effector pose ({held}); add a column with x y "
                "z and the rotation of the end effector, by forward kinematics, and name it with "
                "--data.keys.pose")
    cure = {"pose": "--data.keys.pose and --data.pose_slice",
            "gripper": "--data.keys.gripper, or leave it empty if it is the last number of the pose"
            }[key]
    return f"{text}; it has {held}: set {cure}"
