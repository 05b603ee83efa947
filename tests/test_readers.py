"""Readers and --labels: to the letter, against made-up data sets whose every joint is known."""

import functools
import json
import math
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml

import finetune
from conftest import refused, run_here
from datasets import (META, SERIALS, SUBJECTS, TINY, a_hand, official, parse, split, test_crops,
                      visible, write_assemblyhands, write_dexycb)


@pytest.fixture
def freihand(rendered, tmp_path):
    """A copy of the rendered set, to break."""
    shutil.copytree(rendered / "freihand_eval", tmp_path / "set_eval")
    return Path(shutil.copytree(rendered / "freihand", tmp_path / "set"))


# -------------------------------------------------------------------------------------- FreiHAND

def test_freihand_is_read_to_the_letter(freihand):
    args = parse("--root", freihand, "--out", "x")
    labels = finetune.read_freihand(args)
    train, test, notes = labels.train, labels.test, labels.notes
    xyz, matrix = (json.loads((freihand / f"training_{key}.json").read_text())
                   for key in ("xyz", "K"))
    assert len(train.uv) == 64 and len(test.uv) == 8
    assert "64 training pictures of 16 samples" in notes[0]
    for i in (0, 17, 33, 63):  # picture i shows sample i % 16, in four versions
        x, y, z = np.array(xyz[i % 16]).T
        k = np.array(matrix[i % 16])
        assert np.allclose(train.xyz[i], 1000 * np.array(xyz[i % 16]), atol=1e-9)
        assert np.allclose(train.uv[i], np.stack([k[0, 0] * x / z + k[0, 2],
                                                  k[1, 1] * y / z + k[1, 2]], 1))
        assert (train.group[i] == i % 16
                and train.path[i].decode().endswith(f"training/rgb/{i:08d}.jpg"))
    moved = freihand / "evaluation_xyz.json"  # the evaluation lists may lie in the root as well
    (freihand.with_name("set_eval") / "evaluation_xyz.json").rename(moved)
    assert np.array_equal(finetune.read_freihand(args).test.xyz, test.xyz)


def test_crop_sets_the_side_of_the_test_crops(freihand, tmp_path):
    tight = split(parse("--root", freihand, "--out", "x", "--crop", 1.25))[2]
    assert np.allclose(tight.side, 1.25 * np.ptp(tight.uv, axis=1).max(1))
    usual = split(parse("--root", freihand, "--out", "x"))[2]
    assert np.allclose(usual.side, 2 * np.ptp(usual.uv, axis=1).max(1))
    assert np.array_equal(tight.centre, usual.centre)
    words = refused("finetune.py", "--dataset", "own", "--root", freihand, "--labels", tmp_path,
                    "--out", tmp_path / "run", "--crop", 1.25)
    assert "--crop belongs to" in words


def test_damaged_sets_are_refused_in_one_line(freihand, tmp_path):
    def line(root=freihand):
        return refused("finetune.py", "--dataset", "freihand", "--root", root,
                       "--out", tmp_path / "run", *TINY)

    assert "training_K.json" in line(tmp_path / "nowhere")
    file = freihand / "training_xyz.json"
    text, values = file.read_text(), json.loads(file.read_text())
    for content, words in ((json.dumps(values[:-1]), "has 16 entries, training_xyz.json has 15"),
                           (text[:len(text) // 2], "truncated"),
                           (json.dumps([v[:20] for v in values]), "(16, 20, 3)"),
                           (json.dumps([values[0][:20], *values[1:]]), "expected (N, 21, 3)"),
                           (json.dumps([None, *values[1:]]), "expected (N, 21, 3)"),
                           (json.dumps({"0": values}), "expected (N, 21, 3)"),
                           (json.dumps([values[0], np.zeros((21, 3)).tolist(), *values[2:]]),
                            "entry 1, counted from 0, has joints that are not before the camera"),
                           (json.dumps((np.array(values) * 1000).tolist()), "labels are in metres"),
                           (text.replace("0.", "NaN, 0.", 1), "training_xyz.json")):
        file.write_text(content)
        found = line()
        assert words in found
    file.write_text(text)
    picture = freihand / "training" / "rgb" / "00000005.jpg"
    picture.unlink()
    assert "holds 63 pictures, expected 4 x 16" in line()
    picture.write_text("not a picture")
    assert "00000005.jpg: cut short, or not a picture" in line()
    (freihand.with_name("set_eval") / "evaluation_xyz.json").unlink()
    assert "evaluation_xyz.json" in line()
    assert not (tmp_path / "run" / "pred_xyz.npy").exists()


@pytest.mark.parametrize("flag, value, message", [
    ("--batch-size", 9999, "fewer than --batch-size 9999"),
    ("--batch-size", 1, "BatchNorm needs two pictures"),
    ("--label-fraction", 0, "--label-fraction must lie in 0..1"),
    ("--label-fraction", 0.05, "expected at least 2")])
def test_values_that_do_not_fit_the_set_are_refused(rendered, tmp_path, flag, value, message):
    assert message in refused("finetune.py", "--dataset", "freihand", "--root",
                              rendered / "freihand", "--out", tmp_path / "run", *TINY, flag, value)


def test_label_fractions_are_nested_and_divided_by_sample(rendered):
    used = {}
    for fraction in (0.25, 0.5, 1.0):
        train, validation, test, _ = split(parse("--root", rendered / "freihand", "--out", "x",
                                                          "--label-fraction", fraction))
        groups, held = set(train.group.tolist()), set(validation.group.tolist())
        assert (not groups & held and len(train.uv) == 4 * len(groups)
                and len(validation.uv) == 4 * len(held))
        assert (len(groups | held) == 16 * fraction and len(held) == math.ceil(1.6 * fraction)
                and len(test.uv) == 8)
        used[fraction] = groups | held
    assert used[0.25] < used[0.5] < used[1.0]


# ---------------------------------------------------------------------------------------- DexYCB

def test_the_seed_draws_the_labels_and_the_validation(rendered):
    drawn = [split(parse("--root", rendered / "freihand", "--out", "x", *TINY, "--seed", seed))
             for seed in (0, 1)]
    assert {*drawn[0][1].scene} != {*drawn[1][1].scene}
    halves = [finetune.draw_labels(drawn[0][0], 0.5, seed)[0] for seed in (0, 1)]
    assert not np.array_equal(*halves)


def test_a_bone_without_a_place_is_the_median_of_the_others():
    xyz = np.ones((4, 21, 3))
    xyz[:, 9, 0] += (50, 60, 90, 0)
    xyz[3, 9] = 0  # no place
    samples = finetune.make_samples(path=["a"] * 4, xyz=xyz)
    assert finetune.bone_lengths(samples).tolist() == [50, 60, 90, 60]


@pytest.fixture(scope="module")
def dexycb(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets") / "dexycb"
    return root, write_dexycb(root)


@pytest.mark.parametrize("setup,parts", [
    ("s1", [dict(subjects=(0, 1, 2, 3, 4, 5, 9)), dict(subjects=(6,)), dict(subjects=(7, 8))]),
    ("s2", [dict(cameras=range(6)), dict(cameras=(6,)), dict(cameras=(7,))])])
@pytest.mark.parametrize("paper", [False, True])
def test_dexycb_is_read_to_the_letter(dexycb, tmp_path, setup, parts, paper):
    root, truth = dexycb
    args = parse("--root", root, "--out", tmp_path / "run", "--setup", setup, "--workers", 0,
                 *["--paper-filter"] * paper, dataset="dexycb")
    *sets, notes = split(args)
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
            assert (found.left[k] == (side == "left")
                    and np.abs(found.xyz[k] - xyz * sign).max() < 1e-3)
            mirrored = np.stack([639 - uv[:, 0], uv[:, 1]], 1) if side == "left" else uv
            assert (np.abs(found.uv[k] - mirrored).max() < 1e-3
                    and (found.valid[k] == visible(xyz, uv)).all())
            low, high = mirrored.min(0), mirrored.max(0)
            assert np.allclose(found.centre[k], (low + high) / 2, atol=1e-3)
            assert found.side[k] == pytest.approx(1.75 * (high - low).max(), abs=1e-3)
    text = " ".join(notes)
    assert notes[0] == f"DexYCB {setup}: 160 of 8000 cameras are there"
    unlabelled = sum(truth[path] is None for path in official(truth, **parts[2]))
    assert f"dropped {unlabelled} without a label" in text and ("--paper-filter" in text) == paper


def test_dexycb_setups_against_the_officials_lists():
    """The lists of sequences and cameras of dex-ycb-toolkit, written out."""
    def members(setup):
        found = {"train": [], "val": [], "test": []}
        for s in range(10):
            for q in range(100):
                for c in range(8):
                    found[finetune.dexycb_part(setup, s, q, c)].append((s, q, c))
        return list(found.values())

    every, cameras = range(10), range(8)
    lists = {
        "s0": [[(s, q, c) for s in every for q in range(100) if q % 5 != 4 for c in cameras],
               [(s, q, c) for s in (0, 1) for q in range(4, 100, 5) for c in cameras],
               [(s, q, c) for s in range(2, 10) for q in range(4, 100, 5) for c in cameras]],
        "s1": [[(s, q, c) for s in subjects for q in range(100) for c in cameras]
               for subjects in ((0, 1, 2, 3, 4, 5, 9), (6,), (7, 8))],
        "s2": [[(s, q, c) for s in every for q in range(100) for c in some]
               for some in (range(6), (6,), (7,))],
        "s3": [[(s, q, c) for s in every for q in range(100) if (q // 5 in objects) == inside
                for c in cameras]
               for objects, inside in (((3, 7, 11, 15, 19), False), ((3, 19), True),
                                       ((7, 11, 15), True))]}
    for setup, expected in lists.items():
        assert all(a == b for a, b in zip(members(setup), expected))
    assert [len(part) // 8 for part in members("s0")] == [800, 40, 160]
    assert [len(part) // 8 for part in members("s3")] == [750, 100, 150]


def test_official_indices_of_the_whole_dexycb(tmp_path, monkeypatch):
    """All 1000 sequences and 8 cameras: the positions in dex-ycb-toolkit's lists, frames
    without a label counted."""
    monkeypatch.setattr(finetune, "read_meta", functools.cache(finetune.read_meta))
    monkeypatch.setattr(yaml, "BaseLoader", yaml.CBaseLoader)  # a tenth of the time
    rng, root = np.random.default_rng(0), tmp_path / "set"
    labelled = a_hand(rng) / 1000, rng.uniform(100, 400, (21, 2))
    files = {}  # what the label files hold
    monkeypatch.setattr(finetune, "read_label", files.get)
    serials, every = "\n".join(f"- '{s}'" for s in SERIALS), []
    for s, subject in enumerate(SUBJECTS):
        for q in range(100):
            folder, frames = root / subject / f"20200709_14{q:04d}", 1 + (q % 9 == 4)
            folder.mkdir(parents=True)
            (folder / "meta.yml").write_text(
                META.format(serials=serials, frames=frames, side="right"))
            for c, serial in enumerate(SERIALS):
                for f in range(frames):
                    empty = (s + q + c + f) % 7 == 0
                    files[folder / serial / f"labels_{f:06d}.npz"] = (
                        (np.full((21, 3), -1), np.full((21, 2), -1)) if empty else labelled)
                    path = f"{subject}/{folder.name}/{serial}/color_{f:06d}.jpg"
                    every.append((s, q, c, path, not empty))
    tests = {"s0": lambda s, q, c: s >= 2 and q % 5 == 4, "s1": lambda s, q, c: s in (7, 8),
             "s2": lambda s, q, c: c == 7, "s3": lambda s, q, c: q // 5 in (7, 11, 15)}
    for setup, inside in tests.items():
        mine = [(path, labelled) for s, q, c, path, labelled in every if inside(s, q, c)]
        expected = [(i, path) for i, (path, labelled) in enumerate(mine) if labelled]
        cameras = finetune.find_cameras(root, setup)
        assert len(cameras) == 8000
        part = [camera for camera in cameras if camera.part == "test"]
        test, _ = finetune.keep_labelled(finetune.read_frames(part, root, 0), False)
        assert [(i, path.decode()) for i, path in zip(test.index, test.path)] == expected
    test = split(parse("--root", root, "--out", tmp_path / "run", "--setup", "s3", "--workers", 0,
                       dataset="dexycb"))[2]
    assert [(i, path.decode()) for i, path in zip(test.index, test.path)] == expected


def test_damaged_dexycb_is_refused_in_one_line(tmp_path):
    root = tmp_path / "set"
    write_dexycb(root, sequences=1, frames=1, pictures=False)

    def line(*arguments):
        return refused("finetune.py", "--dataset", "dexycb", "--root", root,
                       "--out", tmp_path / "run", *TINY, *arguments)

    assert ("subject-01: holds 1 sequences" in line("--setup", "s0")
            and "expected 100" in line("--setup", "s3"))
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
    for damage in (text[:60], "[", "", text.replace("num_frames: 1", "num_frames: none")):
        meta.write_text(damage)
        assert f"{meta}: expected DexYCB's serials" in line()
    meta.unlink()
    assert "subject-04: holds 0 sequences" in line()
    shutil.rmtree(root / SUBJECTS[6])
    assert "subject-04" in line()


def test_meta_yml_runs_no_code(dexycb, tmp_path):
    file = tmp_path / "meta.yml"
    text = min(dexycb[0].rglob("meta.yml")).read_text()
    file.write_text(text.replace("!!python/tuple", "!!python/object/apply:os.abort"))
    assert finetune.read_meta(file) == (list(SERIALS), 3, "right")


def equal(one, other):
    """The same samples."""
    return all(a.tobytes() == b.tobytes() for a, b in zip(one[:3], other[:3], strict=True))


@pytest.fixture
def kept(tmp_path):
    """A data set, the folder of labels that a first run filled, what it read, and a function that
    reads again."""
    root = tmp_path / "set"
    write_dexycb(root, sequences=1, frames=1, pictures=False)

    def read(*arguments, root=root, labels=tmp_path / "labels"):
        return split(parse("--root", root, "--out", tmp_path / "run", "--workers", 0,
                           "--labels", labels, *arguments, dataset="dexycb"))

    return root, tmp_path / "labels", read(), read


def test_labels_are_read_once_and_used_afterwards(kept):
    root, labels, first, read = kept
    assert {p.name for p in labels.iterdir()} == {"labels.txt", "train.npy", "val.npy", "test.npy"}
    assert (labels / "labels.txt").read_text() == f"dexycb s1 of {root}\n"
    for file in root.rglob("*.npz"):
        file.unlink()
    again = read()
    assert equal(again, first) and again[3][0] == f"labels: those of {labels}"
    root.with_name("link").symlink_to(root)
    assert equal(read(root=root.with_name("link")), first)  # the same folder by another name


def test_labels_of_another_division_or_root_are_refused(kept):
    root, labels, _, read = kept
    other = shutil.copytree(root, root.with_name("other"))
    for more, of in ((("--setup", "s2"), f"dexycb s2 of {root}"),
                     (("--paper-filter",), f"dexycb s1 --paper-filter of {root}")):
        with pytest.raises(finetune.InputError, match=f"holds dexycb s1 of {root}, not {of}"):
            read(*more)
    with pytest.raises(finetune.InputError, match=f"holds dexycb s1 of {root}, not dexycb s1 of"):
        read(root=other)


def test_labels_that_a_killed_run_left_in_part_are_read_again(kept):
    root, labels, first, read = kept
    (labels / "test.npy").unlink()
    assert equal(read(), first) and (labels / "test.npy").exists()
    (labels / "test.npy").unlink()
    next(root.rglob("*.npz")).unlink()
    with pytest.raises(finetune.InputError, match="labels_000000.npz: missing"):
        read()


def test_damaged_labels_are_refused(kept):
    _, labels, _, read = kept
    for name in ("train.npy", "val.npy", "test.npy"):
        content = (labels / name).read_bytes()
        (labels / name).write_bytes(content[:1000])
        with pytest.raises(finetune.InputError, match=f"{name}: truncated"):
            read()
        (labels / name).write_bytes(content)


def test_labels_of_the_users_own_are_never_overwritten(kept):
    _, labels, _, read = kept
    for damage in ("labels.txt", "test.npy"):
        (labels / damage).unlink()
        before = {p.name: p.read_bytes() for p in labels.iterdir()}
        with pytest.raises(finetune.InputError, match="holds labels of your own"):
            read()
        assert {p.name: p.read_bytes() for p in labels.iterdir()} == before


def keep_as_own(name, root, labels):
    """The labels of a data set as a user would make them: the arrays alone. -> what it is trained,
    validated and tested on."""
    samples = split(parse("--root", root, "--out", "x", "--labels", labels, dataset=name))
    (labels / "labels.txt").unlink()
    return samples


@pytest.mark.parametrize("name", ["freihand", "assemblyhands"])
def test_an_own_data_set_of_the_same_records_is_the_same(name, freihand, assembly, tmp_path):
    root = freihand if name == "freihand" else assembly[0]
    samples = keep_as_own(name, root, tmp_path / "labels")
    assert samples[0].left.any() == (name == "assemblyhands")
    own = split(parse("--root", root, "--out", "x", "--labels", tmp_path / "labels", dataset="own"))
    assert equal(samples, own) and str(tmp_path / "labels") in own[3][0]


def test_an_own_data_set_trains_a_model(freihand, tmp_path):
    """Its crops are as wide as the labels say."""
    keep_as_own("freihand", freihand, tmp_path / "labels")
    run_here("finetune.py", "--dataset", "own", "--root", freihand, "--labels", tmp_path / "labels",
             *TINY, "--epochs", 1, "--out", tmp_path / "run")
    assert torch.load(tmp_path / "run" / "model.pt")["crop"] == pytest.approx(2)


def test_poses_may_be_given_from_the_wrist_on(freihand, tmp_path):
    """All wrists lie at 0 then, and have a place all the same."""
    labels = tmp_path / "labels"
    keep_as_own("freihand", freihand, labels)
    bones = []
    for name in ("train", "test"):
        records = np.load(labels / f"{name}.npy")
        bones.append(finetune.bone_lengths(records.view(np.recarray)))
        records["xyz"] -= records["xyz"][:, :1]
        np.save(labels / f"{name}.npy", records)
        assert np.allclose(finetune.bone_lengths(records.view(np.recarray)), bones[-1], rtol=1e-4)


def test_labels_whose_used_share_has_no_bone_are_refused(freihand, tmp_path):
    """One sample alone has wrist and joint 9, and it is not drawn, or not held out."""
    labels = tmp_path / "labels"
    keep_as_own("freihand", freihand, labels)
    records = np.load(labels / "train.npy")
    alone = finetune.draw_labels(records.view(np.recarray), 0.5, 0)[0].argmin()
    records["valid"][np.arange(len(records)) != alone, 9] = False
    np.save(labels / "train.npy", records)
    for flags, words in ((("--head", "knn"), "no label that is used has wrist and joint 9"),
                         (("--head", "linear"), "no label that is for validation has wrist")):
        assert words in refused("finetune.py", "--dataset", "own", "--root", freihand, *TINY,
                                *flags, "--out", tmp_path / "run", "--labels", labels,
                                "--label-fraction", 0.5)


def test_an_own_data_set_may_have_a_validation_split(freihand, tmp_path):
    labels = tmp_path / "labels"
    keep_as_own("freihand", freihand, labels)
    shutil.copy(labels / "test.npy", labels / "val.npy")
    _, validation, test, notes = split(parse("--root", freihand, "--out", "x", "--labels", labels,
                                             dataset="own"))
    assert validation.tobytes() == test.tobytes() and "for validation" not in notes[-1]


def test_a_wrong_own_data_set_is_refused(freihand, tmp_path):
    labels = tmp_path / "labels"

    def line():
        return refused("finetune.py", "--dataset", "own", "--root", freihand, *TINY,
                       "--out", tmp_path / "run", "--labels", labels)

    assert "train.npy: missing, expected records of path, left" in line()
    keep_as_own("freihand", freihand, labels)
    records = np.load(labels / "test.npy")
    for field, value, words in (("side", 0, "crop's side must be above 0"),
                                ("left", True, "left hand's width"),
                                ("xyz", np.nan, "values must be finite"),
                                ("xyz", 1, "expected hands")):
        wrong = records.copy()
        wrong[field] = value
        np.save(labels / "test.npy", wrong)
        assert words in line()


def dots_found(images, uvs, valid):
    """Are the dots of `dotted` where uv says in crops as the network gets them? -> how many
    were looked for. Each must have its own colour, and on average lie off by no more than a
    fraction of a pixel."""
    offsets = []
    for image, uv, joints in zip(images, uvs, valid):
        for j in np.flatnonzero(joints):
            u, v = np.round(uv[j]).astype(int)
            alone = np.sort(np.linalg.norm(uv - uv[j], axis=1))[1] > 14
            if alone and 6 <= u < len(image) - 6 and 6 <= v < len(image) - 6:
                red, green, blue = image[v, u].astype(int)
                assert (abs(red - (255 - 10 * j)) < 40 and abs(green - 10 * j) < 40
                        and blue > 200), (j, image[v, u])
                weight = image[v - 6:v + 7, u - 6:u + 7, 2].astype(float)
                rows, columns = np.mgrid[v - 6:v + 7, u - 6:u + 7]
                offsets.append([(columns * weight).sum() / weight.sum() - uv[j, 0],
                                (rows * weight).sum() / weight.sum() - uv[j, 1]])
    assert np.abs(np.mean(offsets, axis=0)).max() < 0.25
    return len(offsets)


def test_a_dot_at_a_joint_is_found_there_by_the_network_and_the_known_answer_comes_out(
        dexycb, tmp_path):
    """Mirrored left hands, hands across the border and hands outside: the picture, gt_uv
    and gt_xyz of a real run."""
    root, truth = dexycb
    out = tmp_path / "run"
    run_here("finetune.py", "--dataset", "dexycb", "--root", root, "--out", out, *TINY,
             "--epochs", 1, "--label-fraction", 0.1)
    paths = [path for path in official(truth, subjects=(7, 8)) if truth[path]]
    xyz, uv, valid = (np.load(out / f"{name}.npy") for name in ("gt_xyz", "gt_uv", "valid"))
    lines = [line.split("\t") for line in (out / "names.txt").read_text().splitlines()]
    assert ([Path(path) for _, path, _ in lines] == [root / path for path in paths]
            and len(xyz) == len(paths))
    for k, path in enumerate(paths):
        expected, pixels, side = truth[path]
        sign = np.array([-1 if side == "left" else 1, 1, 1])
        assert np.abs(xyz[k] - expected * sign).max() < 1e-3 and lines[k][2] == side
        assert (valid[k] == visible(expected, pixels)).all()
    args = parse("--root", root, "--out", out, *TINY, "--input-size", 320, dataset="dexycb")
    test = split(args)[2]
    batch = test_crops(test, args)
    images = batch["image"].numpy()
    uv = 10 * uv + 4.5  # the run's network gets pictures of a tenth of the side
    assert np.abs(batch["uv"].numpy() - uv).max() < 1e-2
    left = np.array([side == "left" for *_, side in lines])
    drawn = np.array([((truth[p][1] > 8) & (truth[p][1] < (631, 471))).all(1) for p in paths])
    outside = ~valid.any(1)
    for some in (left, ~left):
        assert dots_found(images[some], uv[some], drawn[some]) > 100
    assert outside.any() and not images[outside].any()  # far outside: black, never another sample
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert (log[1]["notes"][0].startswith("DexYCB s1")
            and any("without a label" in note for note in log[1]["notes"]))
    line = refused("evaluate.py", out, "--submission", "dexycb")
    assert (f"{out / 'names.txt'}: has no official indices but -1" in line
            and not (out / "dexycb.txt").exists())


# --------------------------------------------------------------------------------- AssemblyHands

@pytest.fixture(scope="module")
def assembly(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets") / "assemblyhands"
    return root, write_assemblyhands(root)


def same_hands(found, expected):
    assert len(found) == len(expected)
    for k, (path, side, number, xyz, uv, valid, box) in enumerate(expected):
        assert (found.path[k].decode(), found.left[k], found.index[k]) == (
            f"images/{path}", side == "left", number)
        x0, y0, x1, y1 = box if side == "right" else (635 - box[2], box[1], 635 - box[0], box[3])
        xyz, uv = (xyz, uv) if side == "right" else (
            xyz * (-1, 1, 1), np.stack([635 - uv[:, 0], uv[:, 1]], 1))
        assert np.abs(found.xyz[k] - xyz).max() < 1e-6 and np.abs(found.uv[k] - uv).max() < 1e-6
        assert ((found.valid[k] == valid).all()
                and np.allclose(found.centre[k], ((x0 + x1) / 2, (y0 + y1) / 2)))
        assert found.side[k] == pytest.approx(max(1.75 * max(x1 - x0, y1 - y0), 100))


@pytest.mark.parametrize("suffix,modality", [("_mono10bit", "ego"), ("", "exo")])
def test_assemblyhands_is_read_to_the_letter(tmp_path, suffix, modality):
    root = tmp_path / "set"
    kept = write_assemblyhands(root, modality, suffix)
    args = parse("--root", root, "--out", tmp_path / "run", "--modality", modality,
                 dataset="assemblyhands")
    train, validation, test, notes = split(args)
    same_hands(test, kept["val"])
    both = np.concatenate([train, validation])
    same_hands(both[np.argsort(both["group"])].view(np.recarray), kept["train"])
    assert (not {*train.scene} & {*validation.scene} and len({*validation.scene}) == 1
            and len({*train.scene}) == 2)
    compared, none, *_, notes_of_knn = split(parse(
        "--root", root, "--out", tmp_path / "run", "--modality", modality, "--head", "knn",
        dataset="assemblyhands"))
    posed = [hand for hand in kept["train"] if hand[5][0] and hand[5][9]]
    assert len(compared) == len(posed) < len(kept["train"]) and not len(none)
    assert f"{len(posed)} of {len(kept['train'])} that have wrist and joint 9" in notes_of_knn[-1]
    text = " ".join(notes)
    for count, reason in ((6, "with fewer than 10 valid joints"), (6, "without a box"),
                          (6, "without labels")):
        assert f"{count} {reason}" in notes[1], text
    assert notes[0] == f"AssemblyHands {modality}, tested on val"


def a_hand_of_assemblyhands(box, xyz):
    matrix = [[300, 0, 318], [0, 300, 240], [0, 0, 1]]
    annotation = dict(id=1, bbox=dict(right=box), joint_valid=[1] * 42)
    image = dict(seq_name="s", frame_idx=5, camera="c", file_name="f.jpg", width=636)
    calibration = {"calibration": {"s": dict(
        intrinsics={"c": matrix}, extrinsics={"000005": {"c": np.eye(3, 4).tolist()}})}}
    poses = {"annotations": {"s": {"000005": {"world_coord": xyz.tolist()}}}}
    return finetune.read_assemblyhands_hand(annotation, image, "right", calibration, poses)[0]


def test_a_small_box_is_cropped_wide_and_a_joint_behind_the_camera_is_not_valid():
    xyz = np.random.default_rng(0).normal(0, 40, (42, 3)) + (0, 0, 600)
    xyz[20, 2] = -5  # the right wrist
    found = a_hand_of_assemblyhands([10, 10, 30, 40], xyz)
    assert found["side"] == 100 and found["valid"].sum() == 20 and not found["valid"][0]
    assert a_hand_of_assemblyhands([10, 10, 30, 90], xyz)["side"] == 140


def test_damaged_assemblyhands_is_refused_in_one_line(tmp_path):
    root = tmp_path / "set"
    write_assemblyhands(root)

    def line(*arguments):
        return refused("finetune.py", "--dataset", "assemblyhands", "--root", root,
                       "--out", tmp_path / "run", *TINY, *arguments)

    assert "assemblyhands_train_exo_data_v1-1.json" in line("--modality", "exo")
    for part, name in (("train", "ego_data"), ("val", "ego_calib"), ("train", "joint_3d")):
        file = root / "annotations" / part / f"assemblyhands_{part}_{name}_v1-1.json"
        text = file.read_text()
        for damage in (text[:len(text) // 2], "[]", "{}", "null"):
            file.write_text(damage)
            assert file.name in line()
        file.unlink()
        assert file.name in line()
        file.write_text(text)
    data = root / "annotations" / "train" / "assemblyhands_train_ego_data_v1-1.json"
    whole = json.loads(data.read_text())
    for change in (dict(image_id=-1), dict(joint_valid=[1] * 40), dict(bbox=3), dict(id="x"),
                   dict(bbox=dict(right=[1, 2, 3], left=None))):
        data.write_text(json.dumps(
            {**whole, "annotations": [{**whole["annotations"][0], **change}]}))
        assert f"{data}: not in AssemblyHands' layout" in line()
    data.write_text(json.dumps(
        {**whole, "annotations": [{**a, "joint_valid": None} for a in whole["annotations"]]}))
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
    # Joints without a place are not valid.
    for frame in world["annotations"]["nusar-train_0"].values():
        frame["world_coord"][20] = [math.nan, 0, math.inf]
    poses.write_text(json.dumps(world))
    train, validation, _, _ = split(parse("--root", root, "--out", tmp_path / "run",
                                          dataset="assemblyhands"))
    both = np.concatenate([train, validation]).view(np.recarray)
    right = both[(both.scene == 0) & ~both.left]
    assert (not right.valid[:, 0].any() and np.isfinite(both.xyz).all()
            and np.isfinite(both.uv).all())
    poses.write_text(text)
    picture = next((root / "images").rglob("*/train/**/*.jpg"))
    cv2.imwrite(str(picture), np.zeros((480, 640, 3), np.uint8))
    assert "640 pixels wide, its labels are for 636" in line("--epochs", 1, "--batch-size", 10)
    content = picture.read_bytes()
    picture.write_bytes(content[:len(content) // 2])
    assert f"{picture.name}: cut short, or not a picture" in line("--epochs", 1)


def test_assemblyhands_known_answer_comes_out_of_a_run(assembly, tmp_path):
    root, kept = assembly
    out = tmp_path / "run"
    run_here("finetune.py", "--dataset", "assemblyhands", "--root", root, "--out", out, *TINY,
             "--epochs", 1)
    xyz, uv, valid = (np.load(out / f"{name}.npy") for name in ("gt_xyz", "gt_uv", "valid"))
    for k, (_, side, _, expected, _, seen, _) in enumerate(kept["val"]):
        assert np.abs(xyz[k] - expected * (-1 if side == "left" else 1, 1, 1)).max() < 1e-3
        assert (valid[k] == seen).all()
    args = parse("--root", root, "--out", out, *TINY, "--input-size", 320, "--batch-size", len(xyz),
                 dataset="assemblyhands")
    images = test_crops(split(args)[2], args)["image"].numpy()
    left = np.array([side == "left" for _, side, *_ in kept["val"]])
    drawn = np.array([((pixels > 8) & (pixels < (627, 471))).all(1)
                      for _, _, _, _, pixels, _, _ in kept["val"]])
    for some in (left, ~left):
        assert dots_found(images[some], 10 * uv[some] + 4.5, (valid & drawn)[some]) > 20
    assert np.isfinite(np.load(out / "pred_xyz.npy")).all()


def test_assemblyhands_is_scored_as_by_its_toolkit(assembly, tmp_path):
    """The wrist's place serves where that joint is not valid; without a place, the sample
    is not aligned."""
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
    run_here("finetune.py", "--dataset", "assemblyhands", "--root", root, "--out", out, *TINY,
             "--epochs", 1)
    xyz, predicted, valid, wrist = (np.load(out / f"{name}.npy")
                                    for name in ("gt_xyz", "pred_xyz", "valid", "wrist"))
    lost = np.array(["nusar-val_1" in path and "000005" in path and side == "right"
                     for path, side, *_ in kept])
    assert ((wrist == ~lost).all() and lost.any() and (~valid[~lost, 0]).any()
            and not valid[lost, 0].any())
    no_bone = np.array(["nusar-val_1" in path and "000019" in path and side == "left"
                        for path, side, *_ in kept])
    assert no_bone.any() and not valid[no_bone, 9].any()
    lengths = np.linalg.norm(xyz[:, 9] - xyz[:, 0], axis=1)
    predicted_lengths = np.linalg.norm(predicted[:, 9] - predicted[:, 0], axis=1)
    # 0 stands for no place.
    assert lengths[lost | no_bone].min() > 300 > predicted_lengths[lost | no_bone].max()
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
