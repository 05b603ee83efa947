"""Fine-tuning: the reader to the letter, targets and loss against loops, resuming, the files that come out."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import evaluate
import finetune
from common import load_checkpoint
from conftest import ENVIRONMENT, ROOT, refused, run, run_here, torchrun
from test_pretrain import same

TINY = ("--backbone", "resnet18", "--weights", "none", "--input-size", "32", "--workers", "0", "--batch-size", "10")


def parse(*arguments, dataset="freihand"):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["finetune.py", "--dataset", dataset, *map(str, arguments)])
        return finetune.parse_args()


@pytest.fixture
def freihand(rendered, tmp_path):
    """A copy of the rendered set, to break."""
    shutil.copytree(rendered / "freihand_eval", tmp_path / "set_eval")
    return Path(shutil.copytree(rendered / "freihand", tmp_path / "set"))


# ------------------------------------------------------------------------------------------------ reader

def test_freihand_is_read_to_the_letter(freihand):
    train, _, test, notes = finetune.read_freihand(parse("--root", freihand, "--out", "x"))
    xyz, matrix = (json.loads((freihand / f"training_{key}.json").read_text()) for key in ("xyz", "K"))
    assert len(train.uv) == 64 and len(test.uv) == 8 and "64 training pictures of 16 samples" in notes[1]
    for i in (0, 17, 33, 63):  # picture i shows sample i % 16, in four versions
        x, y, z = np.array(xyz[i % 16]).T
        k = np.array(matrix[i % 16])
        assert np.allclose(train.xyz[i], 1000 * np.array(xyz[i % 16]), atol=1e-9)
        assert np.allclose(train.uv[i], np.stack([k[0, 0] * x / z + k[0, 2], k[1, 1] * y / z + k[1, 2]], 1))
        assert train.group[i] == i % 16 and train.path[i].decode().endswith(f"training/rgb/{i:08d}.jpg")
    moved = freihand / "evaluation_xyz.json"  # the evaluation lists may lie in the root as well
    (freihand.with_name("set_eval") / "evaluation_xyz.json").rename(moved)
    assert np.array_equal(finetune.read_freihand(parse("--root", freihand, "--out", "x"))[2].xyz, test.xyz)


def test_damaged_sets_are_refused_in_one_line(freihand, tmp_path):
    def line(root=freihand, *arguments):
        return refused("finetune.py", "--dataset", "freihand", "--root", root, "--out", tmp_path / "run", *TINY,
                       *arguments)

    run("finetune.py", "--dataset", "freihand", "--root", tmp_path / "no", "--out", tmp_path / "run", status=2)
    assert "training_K.json: missing" in line(tmp_path / "nowhere")
    assert "fewer than --batch-size 9999" in line(freihand, "--batch-size", 9999)
    assert "--label-fraction" in line(freihand, "--label-fraction", 0)
    assert "expected at least 2" in line(freihand, "--label-fraction", 0.05)
    assert "multiple of 32" in line(freihand, "--input-size", 100)
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "other.pt")
    assert "other.pt: not the weights of a resnet18" in line(freihand, "--weights", tmp_path / "other.pt")
    file = freihand / "training_xyz.json"
    text, values = file.read_text(), json.loads(file.read_text())
    for content, words in ((json.dumps(values[:-1]), "has 16 entries, training_xyz.json has 15"),
                           (text[:len(text) // 2], "truncated"), (json.dumps([v[:20] for v in values]), "(16, 20, 3)"),
                           (json.dumps((np.array(values) * 1000).tolist()), "expected metres"),
                           (text.replace("0.", "NaN, 0.", 1), "training_xyz.json")):
        file.write_text(content)
        found = line()
        assert words in found and "training_" in found
    file.write_text(text)
    picture = freihand / "training" / "rgb" / "00000005.jpg"
    picture.rename(tmp_path / "kept.jpg")
    assert "1 pictures are missing, the first ['00000005.jpg']; expected 4 x 16" in line()
    (tmp_path / "kept.jpg").rename(picture.with_name("00000064.jpg"))  # as many as before, but not the same ones
    assert "1 pictures are missing, the first ['00000005.jpg']" in line()
    picture.write_text("not a picture")
    assert "00000005.jpg: truncated, or not a picture" in line()
    picture.unlink()
    picture.symlink_to("/proc/self/mem")
    assert "00000005.jpg: could not be read: Input/output error" in line()
    picture.unlink()
    picture.write_text("not a picture")
    (freihand.with_name("set_eval") / "evaluation_xyz.json").unlink()
    assert "evaluation_xyz.json: missing" in line()
    assert not (tmp_path / "run" / "pred_xyz.npy").exists()


def test_label_fractions_are_nested_and_divided_by_sample(rendered):
    used = {}
    for fraction in (0.25, 0.5, 1.0):
        train, validation, test, _ = finetune.split(parse("--root", rendered / "freihand", "--out", "x",
                                                          "--label-fraction", fraction))
        groups, held = set(train.group.tolist()), set(validation.group.tolist())
        assert not groups & held and len(train.uv) == 4 * len(groups) and len(validation.uv) == 4 * len(held)
        assert len(groups | held) == 16 * fraction and len(held) == math.ceil(1.6 * fraction) and len(test.uv) == 8
        used[fraction] = groups | held
    assert used[0.25] < used[0.5] < used[1.0]


# ------------------------------------------------------------------------------------------------ DexYCB

SUBJECTS = [f"{date}-subject-{k + 1:02d}" for k, date in enumerate((
    20200709, 20200813, 20200820, 20200903, 20200908, 20200918, 20200928, 20201002, 20201015, 20201022))]
SERIALS = ("836212060125", "839512060362", "840412060917", "841412060263", "932122060857", "932122060861",
           "932122061900", "932122062010")
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


JPEG = (cv2.IMWRITE_JPEG_QUALITY, 100, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444)


def a_hand(rng, z=600.0):
    """A made-up hand, mm, in the camera's frame."""
    return rng.uniform(-60, 60, (21, 3)) + (*rng.uniform(-80, 80, 2), z)


def dotted(width, height, uv):
    """A picture with a dot at each joint that lies in it: the j-th in its own shade of blue."""
    picture = np.zeros((height, width, 3), np.uint8)
    for j, (u, v) in enumerate(uv):
        if 6 < u < width - 7 and 6 < v < height - 7:
            picture[round(v) - 2:round(v) + 3, round(u) - 2:round(u) + 3] = (255, 10 * j, 255 - 10 * j)
    return picture


def write_dexycb(root, sequences=2, frames=3, seed=0):
    """DexYCB in small -> {path of a picture: (xyz mm, uv, side)} as labelled, None without a label. Odd sequences show
    left hands. In each camera frame 1 is without a label; frame 2 of even cameras lies across the border, of odd ones
    far outside."""
    rng, truth = np.random.default_rng(seed), {}
    for subject in SUBJECTS:
        for q in range(sequences):
            folder, side = root / subject / f"20200709_14{q:04d}", ("right", "left")[q % 2]
            folder.mkdir(parents=True)
            (folder / "meta.yml").write_text(META.format(serials="\n".join(f"- '{s}'" for s in SERIALS), frames=frames,
                                                         side=side))
            for c, serial in enumerate(SERIALS):
                (folder / serial).mkdir()
                for f in range(frames):
                    xyz = a_hand(rng) + ((0, 350, 2000)[(f == 2) * (1 + c % 2)], 0, 0)
                    uv = np.stack([613.08 * xyz[:, 0] / xyz[:, 2] + 313.03, 612 * xyz[:, 1] / xyz[:, 2] + 245.01], 1)
                    path = f"{subject}/{folder.name}/{serial}/color_{f:06d}.jpg"
                    cv2.imwrite(str(root / path), dotted(640, 480, uv), JPEG)
                    truth[path] = (xyz, uv, side) if f != 1 else None
                    shown = (xyz / 1000, uv) if f != 1 else (np.full((21, 3), -1), np.full((21, 2), -1))
                    np.savez_compressed(folder / serial / f"labels_{f:06d}.npz", seg=np.zeros((480, 640), np.uint8),
                                        joint_3d=shown[0][None].astype(np.float32),
                                        joint_2d=shown[1][None].astype(np.float32))
    (root / SUBJECTS[0] / "notes.txt").write_text("not a sequence")
    return truth


@pytest.fixture(scope="module")
def dexycb(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets") / "dexycb"
    return root, write_dexycb(root)


def official(truth, subjects=range(10), cameras=range(8)):
    """Pictures of a part of DexYCB in the official order: subject, sequence, camera, frame."""
    return [path for path in truth if SUBJECTS.index(path.split("/")[0]) in subjects
            and SERIALS.index(path.split("/")[2]) in cameras]


def visible(xyz, uv):
    return np.array([x != -1000 and 0 < u <= 640 and 0 < v <= 480 for (x, _, _), (u, v) in zip(xyz, uv)])


@pytest.mark.parametrize("setup,parts", [
    ("s1", [dict(subjects=(0, 1, 2, 3, 4, 5, 9)), dict(subjects=(6,)), dict(subjects=(7, 8))]),
    ("s2", [dict(cameras=range(6)), dict(cameras=(6,)), dict(cameras=(7,))])])
@pytest.mark.parametrize("paper", [False, True])
def test_dexycb_is_read_to_the_letter(dexycb, tmp_path, setup, parts, paper):
    root, truth = dexycb
    args = parse("--root", root, "--out", tmp_path / "run", "--setup", setup, "--workers", 0,
                 *["--paper-filter"] * paper, dataset="dexycb")
    *sets, notes = finetune.split(args)
    for found, part in zip(sets, parts):
        paths = official(truth, **part)
        kept = [(i, path) for i, path in enumerate(paths) if truth[path]]
        if paper:
            kept = [(i, path) for i, path in kept if visible(*truth[path][:2]).sum() >= 10
                    and visible(*truth[path][:2])[[0, 9]].all()]
        assert [p.decode() for p in found.path] == [path for _, path in kept]
        assert (found.index == -1).all()  # a part of the data set cannot tell them
        for k, (_, path) in enumerate(kept):
            xyz, uv, side = truth[path]
            sign = np.array([-1 if side == "left" else 1, 1, 1])
            assert found.left[k] == (side == "left") and np.abs(found.xyz[k] - xyz * sign).max() < 1e-3
            mirrored = np.stack([639 - uv[:, 0], uv[:, 1]], 1) if side == "left" else uv
            assert np.abs(found.uv[k] - mirrored).max() < 1e-3 and (found.valid[k] == visible(xyz, uv)).all()
            low, high = mirrored.min(0), mirrored.max(0)
            assert np.allclose(found.centre[k], (low + high) / 2, atol=1e-3)
            assert found.side[k] == pytest.approx(1.75 * (high - low).max(), abs=1e-3)
    text = " ".join(notes)
    assert f"DexYCB {setup}" in notes[0] and "20 of 1000 sequences" in text
    unlabelled = sum(truth[path] is None for path in official(truth, **parts[2]))
    assert f"dropped {unlabelled} without a label" in text and ("--paper-filter" in text) == paper


def test_dexycb_setups_against_the_officials_lists():
    """The lists of sequences and cameras of dex-ycb-toolkit, written out."""
    def members(setup):
        found = ([], [], [])
        for s in range(10):
            for q in range(100):
                for c in range(8):
                    found[finetune.SETUPS[setup](s, q, c)].append((s, q, c))
        return found

    every, cameras = range(10), range(8)
    lists = {
        "s0": [[(s, q, c) for s in every for q in range(100) if q % 5 != 4 for c in cameras],
               [(s, q, c) for s in (0, 1) for q in range(4, 100, 5) for c in cameras],
               [(s, q, c) for s in range(2, 10) for q in range(4, 100, 5) for c in cameras]],
        "s1": [[(s, q, c) for s in subjects for q in range(100) for c in cameras]
               for subjects in ((0, 1, 2, 3, 4, 5, 9), (6,), (7, 8))],
        "s2": [[(s, q, c) for s in every for q in range(100) for c in some] for some in (range(6), (6,), (7,))],
        "s3": [[(s, q, c) for s in every for q in range(100) if (q // 5 in objects) == inside for c in cameras]
               for objects, inside in (((3, 7, 11, 15, 19), False), ((3, 19), True), ((7, 11, 15), True))]}
    for setup, expected in lists.items():
        assert all(a == b for a, b in zip(members(setup), expected))
    assert [len(part) // 8 for part in members("s0")] == [800, 40, 160]
    assert [len(part) // 8 for part in members("s3")] == [750, 100, 150]


def test_official_indices_of_the_whole_dexycb(tmp_path):
    """All 1000 sequences and 8 cameras: the positions in dex-ycb-toolkit's lists, frames without a label counted."""
    rng, root = np.random.default_rng(0), tmp_path / "set"
    root.mkdir()
    for name in ("labelled", "empty"):
        xyz, uv = a_hand(rng) / 1000, rng.uniform(100, 400, (21, 2))
        shown = (xyz, uv) if name == "labelled" else (np.full((21, 3), -1), np.full((21, 2), -1))
        np.savez(root / f"{name}.npz", joint_3d=shown[0][None].astype(np.float32),
                 joint_2d=shown[1][None].astype(np.float32))
    serials, every = "\n".join(f"- '{s}'" for s in SERIALS), []
    for s, subject in enumerate(SUBJECTS):
        for q in range(100):
            folder, frames = root / subject / f"20200709_14{q:04d}", 1 + (q % 9 == 4)
            folder.mkdir(parents=True)
            (folder / "meta.yml").write_text(META.format(serials=serials, frames=frames, side="right"))
            for c, serial in enumerate(SERIALS):
                (folder / serial).mkdir()
                for f in range(frames):
                    name = "empty" if (s + q + c + f) % 7 == 0 else "labelled"
                    os.link(root / f"{name}.npz", folder / serial / f"labels_{f:06d}.npz")
                    path = f"{subject}/{folder.name}/{serial}/color_{f:06d}.jpg"
                    every.append((s, q, c, path, name == "labelled"))
    tests = {"s0": lambda s, q, c: s >= 2 and q % 5 == 4, "s1": lambda s, q, c: s in (7, 8),
             "s2": lambda s, q, c: c == 7, "s3": lambda s, q, c: q // 5 in (7, 11, 15)}
    for setup, inside in tests.items():
        mine = [(path, labelled) for s, q, c, path, labelled in every if inside(s, q, c)]
        expected = [(i, path) for i, (path, labelled) in enumerate(mine) if labelled]
        test = finetune.split(parse("--root", root, "--out", tmp_path / "run", "--setup", setup, "--workers", 2,
                                    dataset="dexycb"))[2]
        assert [(i, path.decode()) for i, path in zip(test.index, test.path)] == expected


def test_damaged_dexycb_is_refused_in_one_line(tmp_path):
    root = tmp_path / "set"
    write_dexycb(root, sequences=1, frames=1)

    def line(*arguments):
        return refused("finetune.py", "--dataset", "dexycb", "--root", root, "--out", tmp_path / "run", *TINY,
                       *arguments)

    assert "subject-01: holds 1 sequences" in line("--setup", "s0") and "expected 100" in line("--setup", "s3")
    found = refused("finetune.py", "--dataset", "freihand", "--root", root, "--out", tmp_path / "run", "--setup", "s1")
    assert "--setup, --paper-filter: DexYCB only" in found
    folder = root / SUBJECTS[3] / "20200709_140000"
    labels, meta = folder / SERIALS[2] / "labels_000000.npz", folder / "meta.yml"
    content, text = labels.read_bytes(), meta.read_text()
    for damage in (content[:len(content) // 2], b"", b"PK"):
        labels.write_bytes(damage)
        assert "labels_000000.npz: missing, truncated" in line()
    np.savez(labels, joint_3d=np.full((1, 21, 3), np.nan), joint_2d=np.zeros((1, 21, 2)))
    assert "not finite" in line()
    np.savez(labels, joint_3d=np.array([{}], object), joint_2d=np.zeros((1, 21, 2)))
    assert "labels_000000.npz" in line()  # nothing pickled is ever loaded
    labels.unlink()
    assert "labels_000000.npz: missing" in line()
    labels.write_bytes(content)
    for damage in (text[:60], text.replace("- left", "- both").replace("- right", "- both"), "[", "",
                   text.replace("!!python/tuple", "!!python/object/apply:os.getcwd", 1),
                   text.replace("num_frames: 1", "num_frames: none"), text.replace("836212060125", "836212060126")):
        meta.write_text(damage)
        assert f"{meta}: expected DexYCB's serials" in line()
    meta.unlink()
    assert "subject-04: holds 0 sequences" in line()
    shutil.rmtree(root / SUBJECTS[6])
    assert "subject-04" in line()
    assert not list((tmp_path / ".simhand-cache").glob("*/notes.json"))


def test_what_was_read_is_kept_beside_the_run_and_belongs_to_root_and_setup(tmp_path, capsys):
    root = tmp_path / "set"
    truth = write_dexycb(root, sequences=1, frames=1)

    def read(*arguments, root=root):
        return finetune.split(parse("--root", root, "--out", tmp_path / "runs" / "one", "--workers", 0, *arguments,
                                    dataset="dexycb"))

    first = read()
    for path in truth:
        (root / path).with_name("labels_000000.npz").unlink()
    again = read()  # from the cache: there is no label left
    assert all(a.tobytes() == b.tobytes() for a, b in zip(first[:3], again[:3])) and first[3] == again[3]
    (tmp_path / "link").symlink_to(root)
    assert read(root=tmp_path / "link")[0].tobytes() == first[0].tobytes()  # the same folder by another name
    shutil.copytree(root, tmp_path / "other")
    changed = root / SUBJECTS[0] / "20200709_140000" / "meta.yml"
    with pytest.raises(finetune.InputError, match="labels_000000.npz: missing"):
        read(root=tmp_path / "other")
    for setup, part in (("s2", lambda path: int(finetune.SERIALS.index(path.split("/")[2]) == 7)),
                        ("s1", lambda path: int(path.split("/")[0] in SUBJECTS[7:9]))):  # one reading serves all
        _, _, test, _ = read("--setup", setup)
        assert len(test) and all(part(path.decode()) for path in test.path)
    file = next((tmp_path / "runs" / ".simhand-cache").glob("*/0.npy"))
    content = file.read_bytes()
    file.write_bytes(content[:1000])
    with pytest.raises(finetune.InputError, match="delete this folder.*0.npy: truncated"):
        read()
    file.write_bytes(content)
    for damage in ("", "{", "{}", "3"):
        (file.parent / "notes.json").write_text(damage)
        with pytest.raises(finetune.InputError):
            read()
    changed.write_text(changed.read_text() + "\n")
    with pytest.raises(finetune.InputError, match="labels_000000.npz: missing"):
        read()


def dots_found(images, uvs, valid):
    """Are the dots of `dotted` where uv says in crops as the network gets them? -> how many were looked for. Each must
    have its own colour, and on average lie off by no more than a fraction of a pixel."""
    offsets = []
    for image, uv, joints in zip(images, uvs, valid):
        for j in np.flatnonzero(joints):
            u, v = np.round(uv[j]).astype(int)
            alone = np.sort(np.linalg.norm(uv - uv[j], axis=1))[1] > 14
            if alone and 6 <= u < len(image) - 6 and 6 <= v < len(image) - 6:
                red, green, blue = image[v, u].astype(int)
                assert abs(red - (255 - 10 * j)) < 40 and abs(green - 10 * j) < 40 and blue > 200, (j, image[v, u])
                weight = image[v - 6:v + 7, u - 6:u + 7, 2].astype(float)
                rows, columns = np.mgrid[v - 6:v + 7, u - 6:u + 7]
                offsets.append([(columns * weight).sum() / weight.sum() - uv[j, 0],
                                (rows * weight).sum() / weight.sum() - uv[j, 1]])
    assert np.abs(np.mean(offsets, axis=0)).max() < 0.25
    return len(offsets)


def test_a_dot_at_a_joint_is_found_there_by_the_network_and_the_known_answer_comes_out(dexycb, tmp_path):
    """Mirrored left hands, hands across the border and hands outside: the picture, gt_uv and gt_xyz of a real run."""
    root, truth = dexycb
    out = tmp_path / "run"
    run_here("finetune.py", "--dataset", "dexycb", "--root", root, "--out", out, *TINY, "--epochs", 1,
             "--label-fraction", 0.1)
    paths = [path for path in official(truth, subjects=(7, 8)) if truth[path]]
    xyz, uv, valid = (np.load(out / f"{name}.npy") for name in ("gt_xyz", "gt_uv", "valid"))
    lines = [line.split("\t") for line in (out / "names.txt").read_text().splitlines()]
    assert [Path(path) for _, path, _ in lines] == [root / path for path in paths] and len(xyz) == len(paths)
    for k, path in enumerate(paths):
        expected, pixels, side = truth[path]
        sign = np.array([-1 if side == "left" else 1, 1, 1])
        assert np.abs(xyz[k] - expected * sign).max() < 1e-3 and lines[k][2] == side
        assert (valid[k] == visible(expected, pixels)).all()
    args = parse("--root", root, "--out", out, *TINY, "--input-size", 320, dataset="dexycb")
    test = finetune.split(args)[2]
    batches = [finetune.Pictures(test, args, augment=False)[k] for k in range(len(test) // 10)]
    images = torch.cat([batch["image"] for batch in batches]).numpy()
    uv = 10 * uv[:len(images)] + 4.5  # the run's network gets pictures of a tenth of the side
    assert np.abs(torch.cat([batch["uv"] for batch in batches]).numpy() - uv).max() < 1e-2
    left = np.array([side == "left" for *_, side in lines])[:len(images)]
    drawn = np.array([((truth[p][1] > 8) & (truth[p][1] < (631, 471))).all(1) for p in paths[:len(images)]])
    outside = ~valid[:len(images)].any(1)
    for some in (left, ~left):
        assert dots_found(images[some], uv[some], drawn[some]) > 100
    assert outside.any() and not images[outside].any()  # far outside: black, never another sample
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert log[1]["split"].startswith("DexYCB s1") and any("without a label" in note for note in log[1]["notes"])
    line = refused("evaluate.py", out, "--submission", "dexycb")
    assert f"{out / 'names.txt'}: has no official indices but -1" in line and not (out / "dexycb.txt").exists()


# ------------------------------------------------------------------------------------------------ AssemblyHands

def write_assemblyhands(root, modality="ego", suffix="_mono10bit", sequences=(3, 2), frames=4, seed=1):
    """AssemblyHands in small -> for each split a list of (path, hand, id, xyz mm in FreiHAND's order, uv, valid, box),
    what a reader must keep, in order."""
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
                named = {side: dict(zip(wrist_first, a_hand(rng) + (x, 0, 0))) for side, x in (("right", 160),
                                                                                               ("left", -160))}
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
                    extrinsics[camera + suffix] = np.hstack([more @ turn, (more @ shift + move)[:, None]]).tolist()
                    k = np.array([[310.5 + c, 0, 317.2], [0, 305.25, 243.9], [0, 0, 1]])
                    calibration[sequence]["intrinsics"][camera + suffix] = k.tolist()
                    name = f"{modality}_images_rectified/{part}/{sequence}/{camera}_mono10bit/{frame}.jpg"
                    number, picture = 100 + len(images), np.zeros((480, 636, 3), np.uint8)
                    images.append(dict(id=number, file_name=name, width=636, height=480, seq_name=sequence,
                                       camera=camera, frame_idx=7 * f + 5))
                    boxes, visible = {}, np.ones(42, int)
                    for h, side in enumerate(("right", "left")):
                        xyz = np.array([named[side][joint] for joint in wrist_first]) @ more.T + move
                        uv = np.stack([(310.5 + c) * xyz[:, 0] / xyz[:, 2] + 317.2,
                                       305.25 * xyz[:, 1] / xyz[:, 2] + 243.9], 1)
                        boxes[side] = [*(uv.min(0) - 3).tolist(), *(uv.max(0) + 4).tolist()]
                        if f == 1 and h == 1:
                            visible[21:33] = 0  # nine joints left
                        if f == 1 and h == 0:
                            visible[[0, 20]] = 0  # thumb tip and wrist
                        if f == 2 and h == c:
                            boxes[side] = None
                        if boxes[side] is None or visible[21 * h:21 * h + 21].sum() < 10 or f == 3 and c == 1:
                            continue
                        seen = dict(zip(tips_first, visible[21 * h:21 * h + 21]))
                        kept[part].append((name, side, 1000 + number, xyz, uv,
                                           np.array([seen[joint] > 0 for joint in wrist_first]), boxes[side]))
                        picture = np.maximum(picture, dotted(636, 480, uv))
                    (root / "images" / name).parent.mkdir(parents=True, exist_ok=True)
                    cv2.imwrite(str(root / "images" / name), picture, JPEG)
                    null = f == 3 and c == 1
                    annotations.append(dict(id=1000 + number, image_id=number, bbox=boxes, frame_id=7 * f + 5,
                                            joint_valid=None if null else visible.tolist(), keypoints=None))
        folder = root / "annotations" / part
        folder.mkdir(parents=True, exist_ok=True)
        lists = {f"{modality}_data": dict(images=images, annotations=annotations), "joint_3d": dict(annotations=poses),
                 f"{modality}_calib": dict(calibration=calibration)}
        for name, content in lists.items():
            (folder / f"assemblyhands_{part}_{name}_v1-1.json").write_text(json.dumps(content))
    return kept


@pytest.fixture(scope="module")
def assembly(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets") / "assemblyhands"
    return root, write_assemblyhands(root)


def same_hands(found, expected):
    assert len(found) == len(expected)
    for k, (path, side, number, xyz, uv, valid, box) in enumerate(expected):
        assert (found.path[k].decode(), found.left[k], found.index[k]) == (f"images/{path}", side == "left", number)
        x0, y0, x1, y1 = box if side == "right" else (635 - box[2], box[1], 635 - box[0], box[3])
        xyz, uv = (xyz, uv) if side == "right" else (xyz * (-1, 1, 1), np.stack([635 - uv[:, 0], uv[:, 1]], 1))
        assert np.abs(found.xyz[k] - xyz).max() < 1e-6 and np.abs(found.uv[k] - uv).max() < 1e-6
        assert (found.valid[k] == valid).all() and np.allclose(found.centre[k], ((x0 + x1) / 2, (y0 + y1) / 2))
        assert found.side[k] == pytest.approx(max(1.75 * max(x1 - x0, y1 - y0), 100))


@pytest.mark.parametrize("suffix,modality", [("_mono10bit", "ego"), ("", "exo")])
def test_assemblyhands_is_read_to_the_letter(tmp_path, suffix, modality):
    root = tmp_path / "set"
    kept = write_assemblyhands(root, modality, suffix)
    args = parse("--root", root, "--out", tmp_path / "run", "--modality", modality, dataset="assemblyhands")
    train, validation, test, notes = finetune.split(args)
    same_hands(test, kept["val"])
    both = np.concatenate([train, validation])
    same_hands(both[np.argsort(both["group"])].view(np.recarray), kept["train"])
    assert not {*train.scene} & {*validation.scene} and len({*validation.scene}) == 1 and len({*train.scene}) == 2
    compared, none, *_, notes_of_knn = finetune.split(parse("--root", root, "--out", tmp_path / "run", "--modality",
                                                            modality, "--head", "knn", dataset="assemblyhands"))
    posed = [hand for hand in kept["train"] if hand[5][0] and hand[5][9]]
    assert len(compared) == len(posed) < len(kept["train"]) and not len(none)
    assert f"{len(posed)} of {len(kept['train'])} that have wrist and joint 9" in notes_of_knn[-1]
    text = " ".join(notes)
    for count, reason in ((6, "with fewer than 10 valid joints"), (6, "without a box"), (6, "without labels")):
        assert f"{count} {reason}" in notes[1], text
    assert "tested on val" in notes[0] and "no labels" in notes[0] and f"AssemblyHands {modality}" in notes[0]


def test_damaged_assemblyhands_is_refused_in_one_line(tmp_path):
    root = tmp_path / "set"
    write_assemblyhands(root)

    def line(*arguments):
        return refused("finetune.py", "--dataset", "assemblyhands", "--root", root, "--out", tmp_path / "run", *TINY,
                       *arguments)

    assert "assemblyhands_train_exo_data_v1-1.json: No such file" in line("--modality", "exo")
    for part, name in (("train", "ego_data"), ("val", "ego_calib"), ("train", "joint_3d")):
        file = root / "annotations" / part / f"assemblyhands_{part}_{name}_v1-1.json"
        text = file.read_text()
        for damage in (text[:len(text) // 2], "[]", "{}", "null"):
            file.write_text(damage)
            assert file.name in line()
        file.unlink()
        assert f"{file.name}: No such file" in line()
        file.write_text(text)
    data = root / "annotations" / "train" / "assemblyhands_train_ego_data_v1-1.json"
    whole = json.loads(data.read_text())
    for change in (dict(image_id=-1), dict(joint_valid=[1] * 40), dict(bbox=3), dict(id="x"),
                   dict(bbox=dict(right=[1, 2, 3], left=None))):
        data.write_text(json.dumps({**whole, "annotations": [{**whole["annotations"][0], **change}]}))
        assert f"{data}: annotation" in line()
    data.write_text(json.dumps({**whole, "annotations": [{**a, "joint_valid": None} for a in whole["annotations"]]}))
    assert "without a labelled wrist" in line() and "without labels" in line()
    data.write_text(json.dumps(whole))
    calib = root / "annotations" / "train" / "assemblyhands_train_ego_calib_v1-1.json"
    text = calib.read_text()
    calib.write_text(text.replace("310.5", "NaN"))
    assert "not finite" in line()
    calib.write_text(text.replace("000005", "000006"))
    assert "missing in assemblyhands_train_ego_calib" in line()
    calib.write_text(text)
    poses = root / "annotations" / "train" / "assemblyhands_train_joint_3d_v1-1.json"
    text, world = poses.read_text(), json.loads(poses.read_text())
    for frame in world["annotations"]["nusar-train_0"].values():  # joints without a place are not valid
        frame["world_coord"][20] = [math.nan, 0, math.inf]
    poses.write_text(json.dumps(world))
    train, validation, _, _ = finetune.split(parse("--root", root, "--out", tmp_path / "run", dataset="assemblyhands"))
    both = np.concatenate([train, validation]).view(np.recarray)
    right = both[(both.scene == 0) & ~both.left]
    assert not right.valid[:, 0].any() and np.isfinite(both.xyz).all() and np.isfinite(both.uv).all()
    poses.write_text(text)
    picture = next((root / "images").rglob("*/train/**/*.jpg"))
    cv2.imwrite(str(picture), np.zeros((480, 640, 3), np.uint8))
    assert "640 pixels wide, its labels are for 636" in line("--epochs", 1, "--batch-size", 10)
    content = picture.read_bytes()
    picture.write_bytes(content[:len(content) // 2])
    assert f"{picture.name}: truncated, or not a picture" in line("--epochs", 1)


def test_assemblyhands_known_answer_comes_out_of_a_run(assembly, tmp_path):
    root, kept = assembly
    out = tmp_path / "run"
    run_here("finetune.py", "--dataset", "assemblyhands", "--root", root, "--out", out, *TINY, "--epochs", 1)
    xyz, uv, valid = (np.load(out / f"{name}.npy") for name in ("gt_xyz", "gt_uv", "valid"))
    for k, (_, side, _, expected, _, seen, _) in enumerate(kept["val"]):
        assert np.abs(xyz[k] - expected * (-1 if side == "left" else 1, 1, 1)).max() < 1e-3
        assert (valid[k] == seen).all()
    args = parse("--root", root, "--out", out, *TINY, "--input-size", 320, "--batch-size", len(xyz),
                 dataset="assemblyhands")
    images = finetune.Pictures(finetune.split(args)[2], args, augment=False)[0]["image"].numpy()
    left = np.array([side == "left" for _, side, *_ in kept["val"]])
    drawn = np.array([((pixels > 8) & (pixels < (627, 471))).all(1) for _, _, _, _, pixels, _, _ in kept["val"]])
    for some in (left, ~left):
        assert dots_found(images[some], 10 * uv[some] + 4.5, (valid & drawn)[some]) > 20
    assert np.isfinite(np.load(out / "pred_xyz.npy")).all()


def test_assemblyhands_is_scored_as_by_its_toolkit(assembly, tmp_path):
    """The wrist's place serves where that joint is not valid; without a place, the sample is not aligned."""
    root, out = tmp_path / "set", tmp_path / "run"
    shutil.copytree(assembly[0] / "annotations", root / "annotations")
    (root / "images").symlink_to(assembly[0] / "images")
    kept = assembly[1]["val"]
    poses = root / "annotations" / "val" / "assemblyhands_val_joint_3d_v1-1.json"
    world = json.loads(poses.read_text())
    frames = world["annotations"]["nusar-val_1"]
    frames["000005"]["world_coord"][20] = [math.nan] * 3  # the right wrist
    frames["000019"]["world_coord"][21 + 11] = [math.nan] * 3  # the left hand's joint 9
    poses.write_text(json.dumps(world))
    run_here("finetune.py", "--dataset", "assemblyhands", "--root", root, "--out", out, *TINY, "--epochs", 1)
    xyz, predicted, valid, wrist = (np.load(out / f"{name}.npy") for name in ("gt_xyz", "pred_xyz", "valid", "wrist"))
    lost = np.array(["nusar-val_1" in path and "000005" in path and side == "right" for path, side, *_ in kept])
    assert (wrist == ~lost).all() and lost.any() and (~valid[~lost, 0]).any() and not valid[lost, 0].any()
    no_bone = np.array(["nusar-val_1" in path and "000019" in path and side == "left" for path, side, *_ in kept])
    assert no_bone.any() and not valid[no_bone, 9].any()
    lengths = np.linalg.norm(xyz[:, 9] - xyz[:, 0], axis=1)
    predicted_lengths = np.linalg.norm(predicted[:, 9] - predicted[:, 0], axis=1)
    assert lengths[lost | no_bone].min() > 300 > predicted_lengths[lost | no_bone].max()  # 0 stands for no place
    assert np.allclose(predicted[:, 0], xyz[:, 0], atol=1e-3)
    run_here("evaluate.py", out)
    metrics = json.loads((out / "metrics.json").read_text())
    errors = [[] for _ in range(21)]
    for k, (_, side, _, truth, _, seen, _) in enumerate(kept):
        truth = truth * (-1 if side == "left" else 1, 1, 1)
        for j in range(21):
            if seen[j] and not lost[k] and not (no_bone[k] and j == 9):
                errors[j].append(math.dist(predicted[k, j] - predicted[k, 0], truth[j] - truth[0]))
    assert metrics["mpjpe"] == pytest.approx(np.mean([np.mean(each) for each in errors]), rel=1e-5)
    assert metrics["samples_without_wrist"] == lost.sum()


# ------------------------------------------------------------------------------------------------ pictures and targets

def test_picture_and_pose_turn_together(rendered):
    """The pose of an augmented sample is turned about the camera's axis as OpenCV turns its picture and 2D joints."""
    args = parse("--root", rendered / "freihand", "--out", "x", *TINY, "--no-colour")
    train, _, _, _ = finetune.split(args)
    for i in range(20):
        view = finetune.crop_view(train, i, args, 64, np.random.default_rng(i))
        turn = view["matrix"][:, :2] / np.linalg.norm(view["matrix"][0, :2])
        assert np.allclose(turn, cv2.getRotationMatrix2D((0, 0), view["angle"], 1)[:, :2])
    batch = finetune.Pictures(train, args, augment=True)
    made, order = batch[0], batch.order
    for row, i in enumerate(order[:10]):
        pose = (train.xyz[i] - train.xyz[i, 0]) / np.linalg.norm(train.xyz[i, 9] - train.xyz[i, 0])
        view = finetune.crop_view(train, i, args, 32, np.random.default_rng((args.seed, 0, i)))
        turn = cv2.getRotationMatrix2D((0, 0), view["angle"], 1)[:, :2]
        expected = np.concatenate([pose[:, :2] @ turn.T, pose[:, 2:]], 1)
        assert np.allclose(made["pose"][row], expected, atol=1e-5)
        assert np.allclose(made["uv"][row], train.uv[i] @ view["matrix"][:, :2].T + view["matrix"][:, 2], atol=1e-3)


def test_training_crops_are_jittered_and_colours_stay_near(rendered):
    """Centre by a tenth of the side, side by a tenth, angle by --rotation; a grey picture stays grey."""
    args = parse("--root", rendered / "freihand", "--out", "x", *TINY, "--rotation", 30)
    train, _, _, _ = finetune.split(args)
    views = [finetune.crop_view(train, 0, args, 64, np.random.default_rng(i)) for i in range(400)]
    angles = np.array([view["angle"] for view in views])
    sides = np.array([64 / np.linalg.norm(view["matrix"][0, :2]) for view in views]) / train.side[0]
    centres = np.array([np.linalg.solve(view["matrix"][:, :2], 31.5 - view["matrix"][:, 2]) for view in views])
    moves = (centres - train.centre[0]) / train.side[0]
    for values, limit in ((angles, 30), (sides - 1, 0.1), (moves[:, 0], 0.1), (moves[:, 1], 0.1)):
        assert 0.9 * limit < values.max() <= limit * 1.0001 and -limit * 1.0001 <= values.min() < -0.9 * limit
    grey = np.full((16, 16, 3), 100, np.uint8)
    pictures = np.array([finetune.jitter(grey, np.random.default_rng(i)) for i in range(200)], int)
    assert (np.ptp(pictures, axis=3) == 0).all() and pictures.min() >= 48 and 140 < pictures.max() <= 151


def test_test_crops_hold_the_hand_in_their_middle(rendered):
    args = parse("--root", rendered / "freihand", "--out", "x", *TINY)
    _, _, test, _ = finetune.split(args)
    uv = finetune.Pictures(test, args, augment=False)[0]["uv"].numpy()
    low, high = uv.min(1), uv.max(1)
    assert np.allclose((low + high) / 2, 15.5, atol=1e-3) and np.allclose((high - low).max(1), 16, atol=1e-3)


def test_heat_targets_against_a_loop():
    uv = torch.tensor([[[20.0, 33.0], [0.0, 0.0], [127.4, 127.4], [-9.0, 50.0], [-15.0, 50.0], [60.0, 60.0]]])
    valid = torch.tensor([[True, True, True, True, True, False]])
    found = finetune.heat_targets(uv, valid, 32)[0]
    for j, (u, v) in enumerate(uv[0].tolist()):
        column, row = math.floor((u + 0.5) / 4), math.floor((v + 0.5) / 4)
        for y in range(32):
            for x in range(32):
                inside = abs(x - column) <= 3 and abs(y - row) <= 3 and valid[0, j]
                expected = math.exp(-((x - column) ** 2 + (y - row) ** 2) / 2) if inside else 0
                assert found[j, y, x].item() == pytest.approx(expected, abs=1e-6)
    assert found[0].max() == 1 and found[3].max() > 0 and found[4].max() == 0


def test_loss_against_a_loop_and_invalid_joints_carry_none():
    torch.manual_seed(0)
    batch = dict(uv=torch.rand(3, 21, 2) * 32, pose=torch.randn(3, 21, 3), valid=torch.rand(3, 21) > 0.3,
                 has_pose=torch.tensor([True, False, True]))
    outputs = torch.rand(3, 21, 8, 8), torch.randn(3, 21, 3, 8, 8), torch.randn(3, 21, 3, 8, 8)
    target = finetune.heat_targets(batch["uv"], batch["valid"], 8)
    heat = sum(((outputs[0][:, j] - target[:, j]) ** 2 * (target[:, j].amax((1, 2)) > 0)[:, None, None]).mean()
               for j in range(21)) / 2
    delta = location = 0.0
    for i in (0, 2):
        d = l = 0.0
        for j in range(21):
            parent = finetune.PARENTS[j]
            bone = batch["pose"][i, j] - batch["pose"][i, parent]
            goal = bone / bone.norm() if j else bone
            both = batch["valid"][i, j] and batch["valid"][i, parent]
            d += (((outputs[1][i, j] - goal[:, None, None]) * target[i, j] * both) ** 2).sum()
            l += (((outputs[2][i, j] - batch["pose"][i, j][:, None, None]) * target[i, j]) ** 2).sum()
        delta, location = delta + d.sqrt() / 2, location + l.sqrt() / 2
    expected = 100 * heat + (delta + 10 * location) / math.sqrt(128)
    assert finetune.detnet_loss(outputs, batch).item() == pytest.approx(expected.item(), rel=1e-5)
    spoilt = torch.where(batch["valid"][..., None], batch["pose"], torch.tensor(1e4))
    assert finetune.detnet_loss(outputs, {**batch, "pose": spoilt}).item() == pytest.approx(expected.item(), rel=1e-4)


def test_detnet_shapes_and_prediction_is_read_at_the_hottest_cell(rendered):
    args = parse("--root", rendered / "freihand", "--out", "x", *TINY)
    args.precision = "fp32"
    torch.manual_seed(0)
    net = finetune.DetNet("resnet18", "none").eval()
    outputs = net(torch.rand(2, 3, 64, 64))
    assert [tuple(o.shape) for o in outputs] == [(2, 21, 16, 16), (2, 21, 3, 16, 16), (2, 21, 3, 16, 16)]
    _, _, test, _ = finetune.split(args)
    uv, pose = finetune.predict(net, test, args, torch.device("cpu"))
    batch = finetune.Pictures(test, args, augment=False)[0]
    heat, _, location = finetune.forward(net, batch["image"], args)
    for i, j in ((0, 0), (3, 8), (7, 20)):
        row, column = np.unravel_index(heat[i, j].detach().numpy().argmax(), (8, 8))
        wrist = np.unravel_index(heat[i, 0].detach().numpy().argmax(), (8, 8))
        expected = location[i, j, :, row, column] - location[i, 0, :, wrist[0], wrist[1]]
        assert np.allclose(uv[i, j], (column * 4 + 1.5, row * 4 + 1.5)) and np.allclose(pose[i, j], expected.detach())


# ------------------------------------------------------------------------------------------------ runs

@pytest.fixture(scope="module")
def straight(rendered, tmp_path_factory):
    out = tmp_path_factory.mktemp("straight") / "run"
    run("finetune.py", "--dataset", "freihand", "--root", rendered / "freihand", "--out", out, *TINY, "--epochs", 2)
    return out


def test_the_files_of_a_run(straight, rendered):
    truth = json.loads((rendered / "freihand_eval" / "evaluation_xyz.json").read_text())
    arrays = {name: np.load(straight / f"{name}.npy") for name in ("pred_xyz", "gt_xyz", "valid", "pred_uv", "gt_uv")}
    shapes = dict(pred_xyz=(8, 21, 3), gt_xyz=(8, 21, 3), valid=(8, 21), pred_uv=(8, 21, 2), gt_uv=(8, 21, 2))
    for name, array in arrays.items():
        assert array.dtype == (bool if name == "valid" else np.float32) and array.shape == shapes[name]
    assert np.abs(arrays["gt_xyz"] - 1000 * np.array(truth)).max() < 1e-3 and arrays["valid"].all()
    assert np.allclose(arrays["pred_xyz"][:, 0], arrays["gt_xyz"][:, 0], atol=1e-3)  # the wrist's place is the true one
    assert ((arrays["pred_uv"] >= 0) & (arrays["pred_uv"] < 32)).all()
    lines = [line.split("\t") for line in (straight / "names.txt").read_text().splitlines()]
    assert [line[0] for line in lines] == [str(i) for i in range(8)]
    assert all(Path(path).is_file() and side == "right" for _, path, side in lines)
    assert all(cv2.imread(str(straight / name)) is not None for name in ("overlay.jpg", "curves.png"))
    log = [json.loads(line) for line in (straight / "log.jsonl").read_text().splitlines()]
    errors = [row["validation_mpjpe"] for row in log if "validation_mpjpe" in row]
    assert log[0]["args"]["epochs"] == len(errors) == 2
    assert [row["lr"] for row in log if row.get("epoch") in (1, 2)] == pytest.approx([1e-3, 1e-4])
    args = parse("--root", rendered / "freihand", "--out", "x", *TINY)
    args.precision, net = "fp32", finetune.DetNet("resnet18", "none")
    net.load_state_dict(load_checkpoint(straight / "model.pt")["model"])
    _, validation, _, _ = finetune.split(args)  # the model that was kept is the best of both epochs
    pose = finetune.predict(net, validation, args, torch.device("cpu"))[1]
    assert np.nanmean(finetune.pose_error(pose, validation)) == pytest.approx(min(errors), rel=1e-5)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_ends_bit_for_bit_like_a_straight_one(straight, rendered, tmp_path, number):
    out = tmp_path / "run"
    arguments = ("--dataset", "freihand", "--root", rendered / "freihand", "--out", out, *TINY, "--epochs", 2,
                 "--save-minutes", 0)
    process = subprocess.Popen([sys.executable, ROOT / "finetune.py", *map(str, arguments)], start_new_session=True,
                               env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / "checkpoint-previous.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, number)
    assert process.wait() == (0 if number == signal.SIGTERM else -number)
    assert not (out / "pred_xyz.npy").exists()
    run("finetune.py", *arguments)
    assert same(load_checkpoint(out / "model.pt"), load_checkpoint(straight / "model.pt"))
    assert (out / "pred_xyz.npy").read_bytes() == (straight / "pred_xyz.npy").read_bytes()


@pytest.mark.parametrize("size, angle", [((1501, 2003), 30), ((1501, 2003), 0), ((150, 200), 30)])
def test_large_pictures_are_averaged_not_sampled(size, angle):
    """A checkerboard of single pixels becomes grey, dots stay where the joints are; a small picture is untouched."""
    rng, (height, width) = np.random.default_rng(0), size
    uv = rng.uniform(0.35, 0.65, (21, 2)) * (width, height)
    y, x = np.mgrid[:height, :width]
    board = (255 * ((x + y) % 2)).astype(np.uint8)
    centre, scale = (width / 2, height / 2), 64 / (0.6 * height)
    turn = cv2.getRotationMatrix2D(centre, angle, scale)
    turn[:, 2] += 31.5 - np.array(centre)
    view = dict(matrix=turn, angle=angle, colour=None)
    image, found, _ = finetune.shrink(np.repeat(board[..., None], 3, 2), view, uv)
    large = scale < 0.5
    assert large == (image.shape[0] < height)
    assert not large or np.abs(image[:-1, :-1].astype(int) - 127).max() <= 2  # black is added beyond the border
    for joint in uv[::5]:
        spot = np.exp(-((x - joint[0]) ** 2 + (y - joint[1]) ** 2) * (scale / 1.5) ** 2 / 2)
        dot = np.repeat((250 * spot).astype(np.uint8)[..., None], 3, 2)
        picture, inner, moved = finetune.shrink(dot, view, uv)
        shown, seen = finetune.apply_view(inner, picture, moved, 64)
        rows, columns = np.mgrid[:64, :64]
        weight = shown[..., 0] / shown[..., 0].sum()
        place = (columns * weight).sum(), (rows * weight).sum()
        assert np.allclose(seen, uv @ turn[:, :2].T + turn[:, 2], atol=1e-3)
        assert np.allclose(place, turn[:, :2] @ joint + turn[:, 2], atol=0.15)


def test_the_overlay_shows_the_best_the_median_and_the_worst(tmp_path):
    """Pictures whose grey is their number: the sheet's rows are those of the errors' order."""
    names = [f"{k}.png" for k in range(30)]
    for k, name in enumerate(names):
        cv2.imwrite(str(tmp_path / name), np.full((64, 64, 3), 8 * k, np.uint8))
    uv = np.full((30, 21, 2), 30.0) + np.linspace(0, 4, 21)[:, None]
    samples = finetune.make_set(4, path=names, uv=uv)
    error = np.random.default_rng(0).permutation(30).astype(float)
    error[4] = np.nan  # cannot be scored: not shown
    args = parse("--root", tmp_path, "--out", "x", *TINY)
    finetune.draw_overlay(tmp_path / "overlay.png", samples, uv / 2, uv / 2, error, args, columns=4)
    sheet = cv2.imread(str(tmp_path / "overlay.png"))
    corners = sheet[250::256, 250::256, 0][:3, :4].ravel() / 8
    order = np.argsort(error)[:29]
    assert corners.tolist() == [*order[:4], *order[12:16], *order[-4:]]


def test_frozen_weights_do_not_move(straight, rendered, tmp_path):
    start = {k[9:]: v for k, v in load_checkpoint(straight / "model.pt")["model"].items() if k.startswith("backbone.")}
    torch.save(start, tmp_path / "backbone.pt")
    arguments = [a if a != "none" else tmp_path / "backbone.pt" for a in TINY]
    run_here("finetune.py", "--dataset", "freihand", "--root", rendered / "freihand", "--out", tmp_path / "run",
             *arguments, "--epochs", 1, "--freeze")
    end = load_checkpoint(tmp_path / "run" / "model.pt")["model"]
    assert all(torch.equal(end["backbone." + k], v) for k, v in start.items())  # BatchNorm's statistics too


def test_the_backbone_has_a_learning_rate_of_its_own(straight, rendered, tmp_path):
    """At 0 the backbone's weights stay, unlike with --freeze BatchNorm's statistics move, and the heads learn."""
    state = load_checkpoint(straight / "model.pt")["model"]
    torch.save({k[9:]: v for k, v in state.items() if k.startswith("backbone.")}, tmp_path / "backbone.pt")
    arguments = [a if a != "none" else tmp_path / "backbone.pt" for a in TINY]
    run_here("finetune.py", "--dataset", "freihand", "--root", rendered / "freihand", "--out", tmp_path / "run",
             *arguments, "--epochs", 1, "--backbone-lr", 0)
    end = load_checkpoint(tmp_path / "run" / "model.pt")["model"]
    for k in (k for k in state if not k.endswith("num_batches_tracked")):
        assert torch.equal(end[k], state[k]) == (k.startswith("backbone.") and "running" not in k), k


def test_knn_is_brute_force_on_the_backbones_features(rendered, straight, tmp_path):
    state = load_checkpoint(straight / "model.pt")["model"]
    torch.save({k[9:]: v for k, v in state.items() if k.startswith("backbone.")}, tmp_path / "backbone.pt")
    arguments = ["--root", rendered / "freihand", "--out", tmp_path / "run",
                 *(a if a != "none" else tmp_path / "backbone.pt" for a in TINY), "--head", "knn",
                 "--label-fraction", 0.5]
    before = [{"command": "", "args": {"method": "peclr", "hands": ["a", "b"], "weighting": "none"}}, {"hands": 60}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in before))
    run_here("finetune.py", "--dataset", "freihand", *arguments)
    settings = evaluate.read_settings(tmp_path / "run")  # what its plots go by
    assert settings["data"] == "FreiHAND" and settings["label_fraction"] == 0.5 and settings["head"] == "knn"
    assert settings["method"] == "peclr" and settings["hands"] == "a+b" and settings["pool"] == 60
    (tmp_path / "log.jsonl").write_text("another program's\n")
    (tmp_path / "run" / "checkpoint.pt").unlink()
    printed = run_here("finetune.py", "--dataset", "freihand", *arguments)
    assert "not of pretrain.py" in printed and evaluate.read_settings(tmp_path / "run")["pool"] is None
    args = parse(*arguments)
    train, validation, test, _ = finetune.split(args)
    assert len(train) == 4 * 8 and not len(validation)  # all chosen labels
    net = finetune.load_backbone("resnet18", tmp_path / "backbone.pt").eval()

    def crops(samples):
        every = parse(*arguments, "--batch-size", len(samples))
        return finetune.Pictures(samples, every, augment=False)[0]

    labelled, asked = crops(train), crops(test)
    with torch.no_grad():
        keys, queries = (net(finetune.normalise(part["image"])).double() for part in (labelled, asked))
    predicted, truth, uv = (np.load(tmp_path / "run" / f"{name}.npy") for name in ("pred_xyz", "gt_xyz", "pred_uv"))
    neighbours = set()
    for k, q in enumerate(queries):
        n = max(range(len(keys)), key=lambda i: (q @ keys[i] / q.norm() / keys[i].norm()).item())
        length = np.linalg.norm(truth[k, 9] - truth[k, 0])
        pose = train.xyz[n] - train.xyz[n, 0]
        expected = truth[k, 0] + pose * length / np.linalg.norm(pose[9])
        assert np.abs(predicted[k] - expected).max() < 1e-2 and np.allclose(uv[k], labelled["uv"][n], atol=1e-3)
        neighbours.add(n)
    assert len(neighbours) > 2
    assert cv2.imread(str(tmp_path / "run" / "overlay.jpg")) is not None
    run_here("evaluate.py", tmp_path / "run")
    before = (tmp_path / "run" / "pred_xyz.npy").read_bytes()
    run_here("finetune.py", "--dataset", "freihand", *arguments, "--batch-size", 10)
    assert (tmp_path / "run" / "pred_xyz.npy").read_bytes() == before
    assert "--label-fraction was 0.5, is 1.0" in refused("finetune.py", "--dataset", "freihand", *arguments[:-2])


RANKS = """
import json, sys, torch, finetune
from common import start_ranks
sys.argv = json.loads(sys.argv[1])
args = finetune.parse_args(); args.precision = "fp32"
train = finetune.split(args)[0]
train.valid[::3, 0] = False  # no pose, so that shares differ in how many have one
rank, world, device = start_ranks("cpu")
torch.manual_seed(0)
model = finetune.DetNet("resnet18", "none").eval()
net = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
batch = finetune.Pictures(train, args, True, rank, world)[0]
loss = finetune.detnet_loss(finetune.forward(net, batch["image"], args), batch)
loss.backward()
total = finetune.over_ranks(loss.detach().clone()) / world
if rank == 0:
    torch.save([total, [p.grad for p in model.parameters()], batch["has_pose"].sum()], args.out)
if world > 1:  # leave together: one that lost its peer while it ends may abort
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
"""


def test_two_ranks_have_the_gradient_of_one_process(rendered, tmp_path):
    """With BatchNorm in eval mode nothing but rounding tells a batch of 10 from two shares of 5."""
    (tmp_path / "ranks.py").write_text(RANKS)
    found = []
    for world in (1, 2):
        argv = ["finetune.py", "--dataset", "freihand", "--root", rendered / "freihand", *TINY, "--out",
                tmp_path / f"{world}.pt"]
        torchrun(tmp_path / "ranks.py", json.dumps([str(a) for a in argv]), ranks=world)
        found.append(load_checkpoint(tmp_path / f"{world}.pt"))
    (loss1, one, posed1), (loss2, two, posed2) = found
    assert loss1.item() == pytest.approx(loss2.item(), rel=1e-5) and 2 * posed2 != posed1
    for a, b in zip(one, two, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5 * max(a.abs().max().item(), 1e-3))


def test_two_ranks_train_and_share_the_test_pictures(rendered, straight, tmp_path):
    out = tmp_path / "run"
    arguments = ["--dataset", "freihand", "--root", rendered / "freihand", "--out", out, *TINY, "--batch-size", 4,
                 "--epochs", 1]  # two batches of test pictures: one for each rank
    torchrun("finetune.py", *arguments)
    assert {p.name for p in straight.iterdir()} - {p.name for p in out.iterdir()} == {"checkpoint-previous.pt"}
    args = parse(*arguments[2:])
    args.precision, net = "fp32", finetune.DetNet("resnet18", "none")
    net.load_state_dict(load_checkpoint(out / "model.pt")["model"])
    _, validation, test, _ = finetune.split(args)
    uv, pose = finetune.predict(net, test, args, torch.device("cpu"))
    assert np.array_equal(uv.astype(np.float32), np.load(out / "pred_uv.npy"))
    xyz = pose * finetune.bone(test.xyz)[:, None, None] + test.xyz[:, :1]
    assert np.abs(np.load(out / "pred_xyz.npy") - xyz).max() < 1e-3
    row = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    assert row["validation_mpjpe"] == pytest.approx(np.nanmean(
        finetune.pose_error(finetune.predict(net, validation, args, torch.device("cpu"))[1], validation)))
    assert "--ranks was 2, is 1" in refused("finetune.py", *arguments)


def block_means(image, times):
    """The means of squares of times x times pixels, black beyond the border."""
    rows, columns = (-(-n // times) for n in image.shape[:2])
    whole = np.zeros((rows * times, columns * times, 3))
    whole[:image.shape[0], :image.shape[1]] = image
    return np.rint(whole.reshape(rows, times, columns, times, 3).mean((1, 3))).astype(np.uint8)


def test_a_users_own_pictures(rendered, straight, tmp_path):
    folder, out = tmp_path / "mine", tmp_path / "predicted"
    folder.mkdir()
    pictures = sorted((rendered / "freihand" / "evaluation" / "rgb").glob("*.jpg"))[:3]
    for k, picture in enumerate(pictures):
        image = cv2.imread(str(picture))
        cv2.imwrite(str(folder / f"händ {k}.PNG"), image[:200 if k == 1 else 224, :150 if k == 2 else 224])
    (folder / "notes.txt").write_text("no picture")
    command = ("finetune.py", "--predict", folder, "--weights", straight / "model.pt", "--out", out, "--workers", 0)
    run(*command)
    assert {p.name for p in out.iterdir()} == {".lock", "log.jsonl", "names.txt", "overlay.jpg", "pred_uv.npy",
                                               "pred_xyz.npy"}
    lines = (out / "names.txt").read_text().splitlines()
    assert lines == [f"{k}\t{folder / f'händ {k}.PNG'}\tright" for k in range(3)]
    xyz, uv = np.load(out / "pred_xyz.npy"), np.load(out / "pred_uv.npy")
    kept = load_checkpoint(straight / "model.pt")
    net = finetune.DetNet("resnet18", "none").eval()
    net.load_state_dict(kept["model"])
    train = finetune.split(parse("--root", rendered / "freihand", "--out", "x", *TINY))[0]
    assert kept["bone"] == pytest.approx(np.median([np.linalg.norm(hand[9] - hand[0]) for hand in train.xyz]))
    for k in range(3):
        image = cv2.cvtColor(cv2.imread(str(folder / f"händ {k}.PNG")), cv2.COLOR_BGR2RGB)
        rows, columns = 224 - image.shape[0], 224 - image.shape[1]  # black to both sides, up to a square
        matrix = np.array([[1, 0, columns / 2 / 7], [0, 1, rows / 2 / 7]])  # 224 -> 32 pixels
        made = torch.from_numpy(cv2.warpAffine(block_means(image, 7), matrix, (32, 32)))[None]
        with torch.no_grad():
            heat, _, location = net(finetune.normalise(made))
        for j in range(21):
            row, column = np.unravel_index(heat[0, j].numpy().argmax(), (8, 8))
            assert np.allclose(uv[k, j], (column * 4 + 1.5, row * 4 + 1.5))
            wrist = np.unravel_index(heat[0, 0].numpy().argmax(), (8, 8))
            pose = location[0, j, :, row, column] - location[0, 0, :, wrist[0], wrist[1]]
            assert np.allclose(xyz[k, j], kept["bone"] * pose.numpy(), atol=0.05)
    sheet = cv2.imread(str(out / "overlay.jpg"))
    assert sheet.shape == (3 * 256, 256, 3)
    (folder / "cut.jpg").write_bytes(pictures[0].read_bytes()[:3000])
    assert "cut.jpg: truncated, or not a picture" in refused(*command)
    for file in folder.iterdir():
        file.unlink()
    assert "holds neither keypoints.npy nor a picture" in refused(*command)
    assert "no such folder" in refused(*command[:2], tmp_path / "none", *command[3:])
    assert "choose another --out" in refused("finetune.py", "--predict", rendered / "freihand" / "evaluation" / "rgb",
                                             "--weights", straight / "model.pt", "--out", straight)
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "other.pt")
    assert "other.pt: not the model.pt" in refused(*command[:3], "--weights", tmp_path / "other.pt", "--out", out)
    for arguments in ((*command, "--dataset", "freihand", "--root", "x"), ("finetune.py", "--root", "x", "--out", out)):
        assert "expected --dataset and --root, or --predict" in refused(*arguments)


def test_a_hands_folder_is_predicted_crop_by_crop(hands, straight, tmp_path):
    rows, out = np.load(hands / "hands.npy"), tmp_path / "predicted"
    printed = run("finetune.py", "--predict", hands, "--weights", straight / "model.pt", "--out", out, "--workers", 2)
    assert len(printed.stdout) < 2000
    lines = [line.split("\t") for line in (out / "names.txt").read_text().splitlines()]
    assert [line[2] == "left" for line in lines] == rows["left"].tolist() and rows["left"].any()
    assert [line[0] for line in lines] == [str(i) for i in range(len(rows))] and not (out / "gt_xyz.npy").exists()
    uv, xyz = np.load(out / "pred_uv.npy"), np.load(out / "pred_xyz.npy")
    assert uv.shape == (len(rows), 21, 2) and np.isfinite(xyz).all() and not xyz[:, 0].any()
    opened, net = finetune.load_hands(hands), finetune.DetNet("resnet18", "none").eval()
    net.load_state_dict(load_checkpoint(straight / "model.pt")["model"])
    for i in (0, int(np.flatnonzero(rows["left"])[0])):  # a crop shows a right hand already
        low, high = opened.keypoints[i].min(0), opened.keypoints[i].max(0)
        scale = 32 / (2.0 * (high - low).max())
        times = int(1 / scale)
        assert times > 1
        move = 15.5 - scale * (low + high) / 2 + scale * (times - 1) / 2
        matrix = np.concatenate([np.eye(2) * scale * times, move[:, None]], 1)
        made = cv2.warpAffine(block_means(finetune.read_crop(opened, i), times), matrix, (32, 32))
        with torch.no_grad():
            heat = net(finetune.normalise(torch.from_numpy(made)[None]))[0][0]
        found = [np.unravel_index(heat[j].numpy().argmax(), (8, 8)) for j in range(21)]
        assert np.allclose(uv[i], [(column * 4 + 1.5, row * 4 + 1.5) for row, column in found])
    (hands / "keypoints.npy").write_bytes(b"")
    assert "keypoints.npy: truncated" in refused("finetune.py", "--predict", hands, "--weights", straight / "model.pt",
                                                 "--out", out)


def test_it_learns_what_it_is_shown(rendered):
    """A few steps on one batch must bring the loss down by far: targets, loss and network fit together."""
    args = parse("--root", rendered / "freihand", "--out", "x", *TINY, "--rotation", 0, "--no-colour")
    args.precision = "fp32"
    train, _, _, _ = finetune.split(args)
    torch.manual_seed(0)
    net, batch = finetune.DetNet("resnet18", "none").train(), finetune.Pictures(train, args, augment=True)[0]
    optimizer, losses = torch.optim.Adam(net.parameters(), 1e-3), []
    for _ in range(40):
        loss = finetune.detnet_loss(finetune.forward(net, batch["image"], args), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
