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

import finetune
from common import load_checkpoint
from conftest import ENVIRONMENT, ROOT, refused, run
from test_pretrain import same

TINY = ("--backbone", "resnet18", "--weights", "none", "--input-size", "32", "--workers", "0", "--batch-size", "10")


def parse(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["finetune.py", "--dataset", "freihand", *map(str, arguments)])
        return finetune.parse_args()


@pytest.fixture
def freihand(rendered, tmp_path):
    """A copy of the rendered set, to break."""
    shutil.copytree(rendered / "freihand_eval", tmp_path / "set_eval")
    return Path(shutil.copytree(rendered / "freihand", tmp_path / "set"))


# ------------------------------------------------------------------------------------------------ reader

def test_freihand_is_read_to_the_letter(freihand):
    train, test, notes = finetune.read_freihand(freihand)
    xyz, matrix = (json.loads((freihand / f"training_{key}.json").read_text()) for key in ("xyz", "K"))
    assert len(train.uv) == 64 and len(test.uv) == 8 and "64 training pictures of 16 samples" in notes[0]
    for i in (0, 17, 33, 63):  # picture i shows sample i % 16, in four versions
        x, y, z = np.array(xyz[i % 16]).T
        k = np.array(matrix[i % 16])
        assert np.allclose(train.xyz[i], 1000 * np.array(xyz[i % 16]), atol=1e-9)
        assert np.allclose(train.uv[i], np.stack([k[0, 0] * x / z + k[0, 2], k[1, 1] * y / z + k[1, 2]], 1))
        assert train.group[i] == i % 16 and train.paths[i].endswith(f"training/rgb/{i:08d}.jpg")
    moved = freihand / "evaluation_xyz.json"  # the evaluation lists may lie in the root as well
    (freihand.with_name("set_eval") / "evaluation_xyz.json").rename(moved)
    assert np.array_equal(finetune.read_freihand(freihand)[1].xyz, test.xyz)


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
    assert "holds 63 pictures, expected 4 x 16" in line()
    picture.write_text("not a picture")
    assert "00000005.jpg: missing or not a picture" in line()
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
    assert log[0]["args"]["epochs"] == 2 and sum("validation_mpjpe" in row for row in log) == 2


def test_a_killed_run_ends_bit_for_bit_like_a_straight_one(straight, rendered, tmp_path):
    out = tmp_path / "run"
    arguments = ("--dataset", "freihand", "--root", rendered / "freihand", "--out", out, *TINY, "--epochs", 2,
                 "--save-minutes", 0)
    process = subprocess.Popen([sys.executable, ROOT / "finetune.py", *map(str, arguments)], start_new_session=True,
                               env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / "checkpoint-previous.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "pred_xyz.npy").exists()
    run("finetune.py", *arguments)
    assert same(load_checkpoint(out / "model.pt"), load_checkpoint(straight / "model.pt"))
    assert (out / "pred_xyz.npy").read_bytes() == (straight / "pred_xyz.npy").read_bytes()


def test_frozen_weights_do_not_move(straight, rendered, tmp_path):
    start = {k[9:]: v for k, v in load_checkpoint(straight / "model.pt")["model"].items() if k.startswith("backbone.")}
    torch.save(start, tmp_path / "backbone.pt")
    arguments = [a if a != "none" else tmp_path / "backbone.pt" for a in TINY]
    run("finetune.py", "--dataset", "freihand", "--root", rendered / "freihand", "--out", tmp_path / "run", *arguments,
        "--epochs", 1, "--freeze")
    end = load_checkpoint(tmp_path / "run" / "model.pt")["model"]
    assert all(torch.equal(end["backbone." + k], v) for k, v in start.items())  # BatchNorm's statistics too


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
