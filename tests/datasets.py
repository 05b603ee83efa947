"""Made-up data sets: DexYCB and AssemblyHands in small, pictures with a dot at each joint."""

import json
import sys

import cv2
import numpy as np
import pytest

import finetune

TINY = ("--backbone", "resnet18", "--weights", "none", "--input-size", "32", "--workers", "0",
        "--batch-size", "10")


def parse(*arguments, dataset="freihand"):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["finetune.py", "--dataset", dataset, *map(str, arguments)])
        return finetune.parse_args()


def split(args):
    """-> train, validation, test and notes, as a run with these arguments uses them."""
    data = finetune.load_data(args)
    return data.train, data.validation, data.test, data.notes


def test_crops(samples, args):
    """-> tensors of all samples as the network gets them in a test."""
    pictures = finetune.Pictures(samples, finetune.make_crops(args))
    return finetune.collate([pictures((None, row)) for row in range(len(samples))])


test_crops.__test__ = False  # for pytest


# ---------------------------------------------------------------------------------------- DexYCB

SUBJECTS = [f"{date}-subject-{k + 1:02d}" for k, date in enumerate((
    20200709, 20200813, 20200820, 20200903, 20200908, 20200918, 20200928, 20201002, 20201015,
    20201022))]
SERIALS = ("836212060125", "839512060362", "840412060917", "841412060263", "932122060857",
           "932122060861", "932122061900", "932122062010")
META = """serials:
{serials}
num_frames: {frames}
extrinsics: '20200702_151821'
ycb_ids: !!python/tuple
- 1
- 12
ycb_grasp_ind: 1
mano_sides: !!python/tuple
- {side}
mano_calib:
- 20200709_140042_subject-01_{side}
"""


JPEG = (cv2.IMWRITE_JPEG_QUALITY, 100,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444)


def a_hand(rng, z=600.0):
    """A made-up hand, mm, in the camera's frame."""
    return rng.uniform(-60, 60, (21, 3)) + (*rng.uniform(-80, 80, 2), z)


def dotted(width, height, uv):
    """A picture with a dot at each joint that lies in it: the j-th in its own shade of blue."""
    picture = np.zeros((height, width, 3), np.uint8)
    for j, (u, v) in enumerate(uv):
        if 6 < u < width - 7 and 6 < v < height - 7:
            picture[round(v) - 2:round(v) + 3, round(u) - 2:round(u) + 3] = (
                255, 10 * j, 255 - 10 * j)
    return picture


def write_dexycb(root, sequences=2, frames=3, seed=0, pictures=True):
    """DexYCB in small -> {path of a picture: (xyz mm, uv, side)} as labelled, None without
    a label. Odd sequences show left hands. In each camera frame 1 is without a label; frame
    2 of even cameras lies across the border, of odd ones far outside."""
    rng, truth = np.random.default_rng(seed), {}
    for subject in SUBJECTS:
        for q in range(sequences):
            folder, side = root / subject / f"20200709_14{q:04d}", ("right", "left")[q % 2]
            folder.mkdir(parents=True)
            (folder / "meta.yml").write_text(META.format(
                serials="\n".join(f"- '{s}'" for s in SERIALS), frames=frames, side=side))
            for c, serial in enumerate(SERIALS):
                (folder / serial).mkdir()
                for f in range(frames):
                    xyz = a_hand(rng) + ((0, 350, 2000)[(f == 2) * (1 + c % 2)], 0, 0)
                    uv = np.stack([613.08 * xyz[:, 0] / xyz[:, 2] + 313.03,
                                   612 * xyz[:, 1] / xyz[:, 2] + 245.01], 1)
                    path = f"{subject}/{folder.name}/{serial}/color_{f:06d}.jpg"
                    if pictures:
                        cv2.imwrite(str(root / path), dotted(640, 480, uv), JPEG)
                    truth[path] = (xyz, uv, side) if f != 1 else None
                    shown = (xyz / 1000, uv) if f != 1 else (
                        np.full((21, 3), -1), np.full((21, 2), -1))
                    np.savez_compressed(folder / serial / f"labels_{f:06d}.npz",
                                        seg=np.zeros((480, 640), np.uint8),
                                        joint_3d=shown[0][None].astype(np.float32),
                                        joint_2d=shown[1][None].astype(np.float32))
    (root / SUBJECTS[0] / "notes.txt").write_text("not a sequence")
    return truth


def official(truth, subjects=range(10), cameras=range(8)):
    """Pictures of a part of DexYCB in the official order: subject, sequence, camera, frame."""
    return [path for path in truth if SUBJECTS.index(path.split("/")[0]) in subjects
            and SERIALS.index(path.split("/")[2]) in cameras]


def visible(xyz, uv):
    return np.array([x != -1000 and 0 < u <= 640 and 0 < v <= 480
                     for (x, _, _), (u, v) in zip(xyz, uv)])


# --------------------------------------------------------------------------------- AssemblyHands

def write_assemblyhands(root, modality="ego", suffix="_mono10bit", sequences=(3, 2), frames=4,
                        seed=1):
    """AssemblyHands in small -> for each split a list of (path, hand, id, xyz mm in
    FreiHAND's order, uv, valid, box), what a reader must keep, in order."""
    rng, kept = np.random.default_rng(seed), {}
    fingers = ["thumb", "index", "middle", "ring", "pinky"]
    tips_first = [f"{finger}{k}" for finger in fingers for k in (4, 3, 2, 1)] + ["wrist"]
    wrist_first = ["wrist"] + [f"{finger}{k}" for finger in fingers for k in (1, 2, 3, 4)]
    for part, count in zip(("train", "val"), sequences):
        images, annotations, calibration, poses, kept[part] = [], [], {}, {}, []
        for s in range(count):
            sequence = f"nusar-{part}_{s}"
            poses[sequence], calibration[sequence] = {}, dict(intrinsics={}, extrinsics={})
            for f in range(frames):
                frame = f"{7 * f + 5:06d}"
                named = {side: dict(zip(wrist_first, a_hand(rng) + (x, 0, 0)))
                         for side, x in (("right", 160), ("left", -160))}
                shown = [named[side][joint] for side in ("right", "left") for joint in tips_first]
                turn, _ = cv2.Rodrigues(rng.normal(size=3))
                shift, world = rng.normal(0, 200, 3), None
                world = (np.array(shown) - shift) @ turn  # so that x = R X + t gives them back
                poses[sequence][frame] = dict(world_coord=world.tolist(), joint_valid=[1] * 42)
                calibration[sequence]["extrinsics"][frame] = extrinsics = {}
                for c, camera in enumerate(("HMC_21179183", "HMC_84358933")):
                    # the second camera sees the same from beside, turned
                    more, _ = cv2.Rodrigues(np.array((0.1, 0.3, -0.2)) * c)
                    move = np.array((-150.0, 0, 80)) * c
                    extrinsics[camera + suffix] = np.hstack(
                        [more @ turn, (more @ shift + move)[:, None]]).tolist()
                    k = np.array([[310.5 + c, 0, 317.2], [0, 305.25, 243.9], [0, 0, 1]])
                    calibration[sequence]["intrinsics"][camera + suffix] = k.tolist()
                    name = (f"{modality}_images_rectified/{part}/{sequence}/{camera}_mono10bit/"
                            f"{frame}.jpg")
                    number, picture = 100 + len(images), np.zeros((480, 636, 3), np.uint8)
                    images.append(dict(id=number, file_name=name, width=636, height=480,
                                       seq_name=sequence, camera=camera, frame_idx=7 * f + 5))
                    boxes, visible = {}, np.ones(42, int)
                    for h, side in enumerate(("right", "left")):
                        xyz = (np.array([named[side][joint] for joint in wrist_first]) @ more.T
                               + move)
                        uv = np.stack([(310.5 + c) * xyz[:, 0] / xyz[:, 2] + 317.2,
                                       305.25 * xyz[:, 1] / xyz[:, 2] + 243.9], 1)
                        boxes[side] = [*(uv.min(0) - 3).tolist(), *(uv.max(0) + 4).tolist()]
                        if f == 1 and h == 1:
                            visible[21:33] = 0  # nine joints left
                        if f == 1 and h == 0:
                            visible[[0, 20]] = 0  # thumb tip and wrist
                        if f == 2 and h == c:
                            boxes[side] = None
                        if (boxes[side] is None or visible[21 * h:21 * h + 21].sum() < 10
                                or f == 3 and c == 1):
                            continue
                        seen = dict(zip(tips_first, visible[21 * h:21 * h + 21]))
                        kept[part].append((
                            name, side, 1000 + number, xyz, uv,
                            np.array([seen[joint] > 0 for joint in wrist_first]), boxes[side]))
                        picture = np.maximum(picture, dotted(636, 480, uv))
                    (root / "images" / name).parent.mkdir(parents=True, exist_ok=True)
                    cv2.imwrite(str(root / "images" / name), picture, JPEG)
                    null = f == 3 and c == 1
                    annotations.append(dict(
                        id=1000 + number, image_id=number, bbox=boxes, frame_id=7 * f + 5,
                        joint_valid=None if null else visible.tolist(), keypoints=None))
        folder = root / "annotations" / part
        folder.mkdir(parents=True, exist_ok=True)
        lists = {f"{modality}_data": dict(images=images, annotations=annotations),
                 "joint_3d": dict(annotations=poses),
                 f"{modality}_calib": dict(calibration=calibration)}
        for name, content in lists.items():
            (folder / f"assemblyhands_{part}_{name}_v1-1.json").write_text(json.dumps(content))
    return kept
