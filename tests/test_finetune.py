"""Fine-tuning: targets and loss against loops, resuming, the files that come out."""

import json
import math
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import evaluate
import finetune
from common import load_checkpoint, normalise
from conftest import fork, refused, run, run_here, torchrun
from datasets import TINY, parse, split, test_crops
from test_pretrain import same


PLAN = finetune.Plan(rank=0, ranks=1, device=torch.device("cpu"), precision="fp32", workers=0,
                     batch_size=10)


def predict(net, samples, args):
    """-> uv and pose of the test crops of some samples."""
    return finetune.predict(net, finetune.Pictures(samples, finetune.make_crops(args)), PLAN)


def first_batch(train, args):
    """The first batch of a training -> its (epoch, row) and its tensors."""
    plan = finetune.make_plan(args, len(train))
    rows = next(finetune.items_of_steps(0, 1, len(train), plan, args.seed))
    pictures = finetune.Pictures(train, finetune.make_crops(args))
    return rows, finetune.collate([pictures(row) for row in rows])


# ---------------------------------------------------------------------------- pictures and targets

def test_picture_and_pose_turn_together(rendered):
    """The pose of an augmented sample is turned about the camera's axis as OpenCV turns its
    picture and 2D joints."""
    args = parse("--root", rendered / "freihand", "--out", "x", *TINY, "--no-colour")
    train, _, _, _ = split(args)
    crops = finetune.make_crops(args)
    for i in range(20):
        view = finetune.sample_crop(train[i], crops, np.random.default_rng(i))
        turn = view.matrix[:, :2] / np.linalg.norm(view.matrix[0, :2])
        assert np.allclose(turn, cv2.getRotationMatrix2D((0, 0), view.angle, 1)[:, :2])
    rows, made = first_batch(train, args)
    for row, (_, i) in enumerate(rows):
        pose = (train.xyz[i] - train.xyz[i, 0]) / np.linalg.norm(train.xyz[i, 9] - train.xyz[i, 0])
        view = finetune.sample_crop(train[i], crops, np.random.default_rng((args.seed, 0, i)))
        turn = cv2.getRotationMatrix2D((0, 0), view.angle, 1)[:, :2]
        expected = np.concatenate([pose[:, :2] @ turn.T, pose[:, 2:]], 1)
        assert np.allclose(made["pose"][row], expected, atol=1e-5)
        assert np.allclose(made["uv"][row],
                           train.uv[i] @ view.matrix[:, :2].T + view.matrix[:, 2], atol=1e-3)


def test_training_crops_are_jittered_and_colours_stay_near(rendered):
    """Centre by a tenth of the side, side by a tenth, angle by --rotation; a grey picture
    stays grey."""
    args = parse("--root", rendered / "freihand", "--out", "x", *TINY, "--rotation", 30)
    train, _, _, _ = split(args)
    crops = finetune.make_crops(args)
    views = [finetune.sample_crop(train[0], crops, np.random.default_rng(i)) for i in range(400)]
    angles = np.array([view.angle for view in views])
    sides = np.array([32 / np.linalg.norm(view.matrix[0, :2]) for view in views]) / train.side[0]
    centres = np.array([np.linalg.solve(view.matrix[:, :2], 15.5 - view.matrix[:, 2])
                        for view in views])
    moves = (centres - train.centre[0]) / train.side[0]
    for values, limit in ((angles, 30), (sides - 1, 0.1), (moves[:, 0], 0.1), (moves[:, 1], 0.1)):
        assert (0.9 * limit < values.max() <= limit * 1.0001
                and -limit * 1.0001 <= values.min() < -0.9 * limit)
    grey = np.full((16, 16, 3), 100, np.uint8)
    pictures = np.array([finetune.jitter(grey, np.random.default_rng(i)) for i in range(200)], int)
    assert ((np.ptp(pictures, axis=3) == 0).all() and pictures.min() >= 48
            and 140 < pictures.max() <= 151)


def test_colours_are_jittered_within_their_limits():
    """Hue by up to 27 degrees (13 of OpenCV's 180), saturation, contrast and brightness by a half,
    a blur of half a pixel."""
    hsv = np.empty((16, 16, 3), np.uint8)
    hsv[:] = 60, 120, 100
    hsv[:, 8:, 2] = 140
    image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    seen = []
    for seed in range(300):
        made = cv2.cvtColor(finetune.jitter(image, np.random.default_rng(seed)), cv2.COLOR_RGB2HSV)
        made = made.astype(float)
        left, right = made[:, 2], made[:, -3]
        assert np.abs(left - left[0]).max() == 0
        seen.append([*left[0, :2], (left[0, 2] + right[0, 2]) / 240,
                     (right[0, 2] - left[0, 2]) / (left[0, 2] + right[0, 2]) * 6])
    low, high = np.min(seen, 0), np.max(seen, 0)
    assert np.allclose(low, (47, 60, 0.5, 0.5), rtol=0.1)
    assert np.allclose(high, (73, 180, 1.5, 1.5), rtol=0.1)
    edge = np.full((16, 16, 3), 80, np.uint8)
    edge[:, 8:] = 120
    shares = []
    for seed in range(100):
        row = finetune.jitter(edge, np.random.default_rng(seed))[0, :, 0].astype(float)
        shares.append((row[7] - row[6]) / (row[9] - row[6]))
    assert 0.05 < max(shares) < 0.15  # 0.107 at half a pixel, and rounding


def test_without_colour_a_picture_is_its_crop_of_that_seed_and_epoch(rendered):
    for seed, epoch in ((0, 0), (1, 0), (0, 1)):
        args = parse("--root", rendered / "freihand", "--out", "x", *TINY, "--no-colour", "--seed",
                     seed)
        train, _, _, _ = split(args)
        crops = finetune.make_crops(args)
        view = finetune.sample_crop(train[3], crops, np.random.default_rng((seed, epoch, 3)))
        expected = finetune.view_sample(train[3], 3, view, crops)[0]
        assert np.array_equal(finetune.Pictures(train, crops)((epoch, 3))["image"], expected)


def test_test_crops_hold_the_hand_in_their_middle(rendered):
    args = parse("--root", rendered / "freihand", "--out", "x", *TINY)
    _, _, test, _ = split(args)
    uv = test_crops(test, args)["uv"].numpy()
    low, high = uv.min(1), uv.max(1)
    assert (np.allclose((low + high) / 2, 15.5, atol=1e-3)
            and np.allclose((high - low).max(1), 16, atol=1e-3))


def test_heat_targets_against_a_loop():
    uv = torch.tensor([[[20.0, 33.0], [0.0, 0.0], [127.4, 127.4], [-9.0, 50.0], [-15.0, 50.0],
                        [60.0, 60.0]]])
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
    batch = dict(uv=torch.rand(3, 21, 2) * 32, pose=torch.randn(3, 21, 3),
                 valid=torch.rand(3, 21) > 0.3)
    batch["valid"][:, 0] = True
    # The second has no bone 0-9 to be scaled by.
    batch["valid"][:, 9] = torch.tensor([True, False, True])
    outputs = torch.rand(3, 21, 8, 8), torch.randn(3, 21, 3, 8, 8), torch.randn(3, 21, 3, 8, 8)
    target = finetune.heat_targets(batch["uv"], batch["valid"], 8)
    heat = sum(((outputs[0][:, j] - target[:, j]) ** 2
                * (target[:, j].amax((1, 2)) > 0)[:, None, None]).mean()
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
            l += (((outputs[2][i, j] - batch["pose"][i, j][:, None, None])
                   * target[i, j]) ** 2).sum()
        delta, location = delta + d.sqrt() / 2, location + l.sqrt() / 2
    expected = 100 * heat + (delta + 10 * location) / math.sqrt(128)
    assert finetune.detnet_loss(outputs, batch).item() == pytest.approx(expected.item(), rel=1e-5)
    spoilt = torch.where(batch["valid"][..., None], batch["pose"], torch.tensor(1e4))
    assert finetune.detnet_loss(outputs, {**batch, "pose": spoilt}).item() == pytest.approx(
        expected.item(), rel=1e-4)


def test_linear_loss_against_a_loop_and_invalid_joints_carry_none():
    torch.manual_seed(0)
    batch = dict(uv=torch.rand(3, 21, 2) * 32, pose=torch.randn(3, 21, 3),
                 valid=torch.rand(3, 21) > 0.3, image=torch.zeros(3, 32, 32, 3))
    batch["valid"][:, 0] = True
    # The second has no bone 0-9 to be scaled by.
    batch["valid"][:, 9] = torch.tensor([True, False, True])
    outputs = torch.rand(3, 21, 2) * 32, torch.randn(3, 21, 3)
    expected = 0.0
    for i in range(3):
        for j in range(21):
            if batch["valid"][i, j]:
                for axis in range(2):
                    difference = abs(outputs[0][i, j, axis] - batch["uv"][i, j, axis])
                    expected += difference / 16 / (3 * 21 * 2)
                for axis in range(3) if i != 1 else ():
                    difference = abs(outputs[1][i, j, axis] - batch["pose"][i, j, axis])
                    expected += difference / (2 * 21 * 3)
    assert finetune.linear_loss(outputs, batch).item() == pytest.approx(expected.item(), rel=1e-5)
    spoilt = torch.where(batch["valid"][..., None], batch["pose"], torch.tensor(1e4))
    assert finetune.linear_loss(outputs, {**batch, "pose": spoilt}).item() == pytest.approx(
        expected.item(), rel=1e-4)


def test_linear_net_is_one_layer_on_the_averaged_features():
    """Where the layer's weights are zero, its bias tells the joints: -1, 0 and 1 are the input's
    left edge, middle and right edge, whatever its size."""
    net = finetune.LinearNet("resnet18", "none").eval()
    images = torch.rand(2, 3, 64, 64)
    uv, pose = net(images)
    joints = net.linear(net.backbone(images)).reshape(2, 21, 5)
    assert torch.allclose(pose, joints[..., 2:]) and uv.shape == (2, 21, 2)
    with torch.no_grad():
        net.linear.weight.zero_()
        net.linear.bias.zero_()
        net.linear.bias[5 * 4] = 1  # x of joint 4
        net.linear.bias[5 * 8 + 1] = -1  # y of joint 8
    for side in (32, 64):
        uv, pose = net(torch.rand(1, 3, side, side))
        assert uv[0, 4].tolist() == [side - 0.5, (side - 1) / 2]
        assert uv[0, 8].tolist() == [(side - 1) / 2, -0.5]
        assert not pose.any()


def test_detnet_shapes_and_prediction_is_read_at_the_hottest_cell(rendered):
    args = parse("--root", rendered / "freihand", "--out", "x", *TINY)
    torch.manual_seed(0)
    net = finetune.DetNet("resnet18", "none").eval()
    outputs = net(torch.rand(2, 3, 64, 64))
    assert [tuple(o.shape) for o in outputs] == [
        (2, 21, 16, 16), (2, 21, 3, 16, 16), (2, 21, 3, 16, 16)]
    _, _, test, _ = split(args)
    uv, pose = predict(net, test, args)
    batch = test_crops(test, args)
    heat, _, location = finetune.forward(net, batch["image"], "fp32")
    for i, j in ((0, 0), (3, 8), (7, 20)):
        row, column = np.unravel_index(heat[i, j].detach().numpy().argmax(), (8, 8))
        wrist = np.unravel_index(heat[i, 0].detach().numpy().argmax(), (8, 8))
        expected = location[i, j, :, row, column] - location[i, 0, :, wrist[0], wrist[1]]
        assert (np.allclose(uv[i, j], (column * 4 + 1.5, row * 4 + 1.5))
                and np.allclose(pose[i, j], expected.detach()))


def test_the_network_knows_both_coordinates():
    """What the heads get beside the features is x, then y."""
    net = finetune.DetNet("resnet18", "none").eval()
    got = []
    net.heat[0].register_forward_pre_hook(lambda layer, inputs: got.append(inputs[0]))
    net(torch.zeros(1, 3, 64, 64))
    x, y = got[0][0, 256:258]
    assert torch.equal(x[0], torch.linspace(-1, 1, 16)) and torch.equal(y, x.T)


def test_the_hottest_cell_is_one_cell_in_bf16():
    """The sigmoid of bf16 has so few values that two cells or more of most heat-maps of a new
    network shared the largest."""
    torch.manual_seed(0)
    net = finetune.DetNet("resnet18", "none").eval()
    images = torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8)
    with torch.no_grad():
        heat = finetune.forward(net, images, "bf16")[0].flatten(2)
    hottest = (heat == heat.amax(2, keepdim=True)).sum(2)
    assert (hottest == 1).all()


# --------------------------------------------------------------------------------------------- runs

@pytest.fixture(scope="module")
def straight(rendered, tmp_path_factory):
    out = tmp_path_factory.mktemp("straight") / "run"
    run("finetune.py", "--dataset", "freihand", "--root", rendered / "freihand", "--out", out,
        *TINY, "--epochs", 2)
    return out


def test_the_files_of_a_run(straight, rendered):
    truth = json.loads((rendered / "freihand_eval" / "evaluation_xyz.json").read_text())
    arrays = {name: np.load(straight / f"{name}.npy")
              for name in ("pred_xyz", "gt_xyz", "valid", "pred_uv", "gt_uv")}
    shapes = dict(pred_xyz=(8, 21, 3), gt_xyz=(8, 21, 3), valid=(8, 21), pred_uv=(8, 21, 2),
                  gt_uv=(8, 21, 2))
    for name, array in arrays.items():
        assert (array.dtype == (bool if name == "valid" else np.float32)
                and array.shape == shapes[name])
    assert np.abs(arrays["gt_xyz"] - 1000 * np.array(truth)).max() < 1e-3 and arrays["valid"].all()
    # The wrist's place is the true one.
    assert np.allclose(arrays["pred_xyz"][:, 0], arrays["gt_xyz"][:, 0], atol=1e-3)
    assert ((arrays["pred_uv"] >= 0) & (arrays["pred_uv"] < 32)).all()
    lines = [line.split("\t") for line in (straight / "names.txt").read_text().splitlines()]
    assert [line[0] for line in lines] == [str(i) for i in range(8)]
    assert all(Path(path).is_file() and side == "right" for _, path, side in lines)
    assert all(cv2.imread(str(straight / name)) is not None
               for name in ("overlay.jpg", "curves.png"))
    log = [json.loads(line) for line in (straight / "log.jsonl").read_text().splitlines()]
    errors = [row["validation_error"] for row in log if "validation_error" in row]
    assert log[0]["args"]["epochs"] == len(errors) == 2
    assert [row["lr"] for row in log if row.get("epoch") in (1, 2)] == pytest.approx([1e-3, 1e-4])
    args = parse("--root", rendered / "freihand", "--out", "x", *TINY)
    net = finetune.DetNet("resnet18", "none")
    net.load_state_dict(load_checkpoint(straight / "model.pt")["model"])
    _, validation, _, _ = split(args)  # the model that was kept is the best of both epochs
    pose = predict(net, validation, args)[1]
    assert np.nanmean(finetune.sample_errors(pose, validation)) == pytest.approx(
        min(errors), rel=1e-5)


def interrupt(arguments, until, number):
    """Start a run, and send the signal to all its processes once `until` is in its log. -> exit
    status."""
    process = fork(["finetune.py", *arguments], os.devnull, os.devnull)
    log = arguments[arguments.index("--out") + 1] / "log.jsonl"
    while not (log.exists() and until in log.read_text()) and process.is_alive():
        time.sleep(0.01)
    os.killpg(process.pid, number)
    process.join()
    return process.exitcode


def test_a_run_that_is_stopped_and_then_killed_ends_like_a_straight_run(straight, rendered,
                                                                        tmp_path):
    """SIGTERM saves; SIGKILL after an epoch leaves the best model in the checkpoint; the same
    command goes on, to the last bit."""
    out = tmp_path / "run"
    arguments = ("--dataset", "freihand", "--root", rendered / "freihand", "--out", out, *TINY,
                 "--epochs", 2)
    assert interrupt(arguments, "loss", signal.SIGTERM) == 0
    assert 0 < load_checkpoint(out / "checkpoint.pt")["step"] < 10
    arguments += ("--save-minutes", 0)
    assert interrupt(arguments, '"step": 6', signal.SIGKILL) == -signal.SIGKILL
    kept = load_checkpoint(out / "checkpoint.pt")
    log = [json.loads(line) for line in (straight / "log.jsonl").read_text().splitlines()]
    first, _ = [row["validation_error"] for row in log if "validation_error" in row]
    assert 5 <= kept["step"] < 10 and kept["best"]["error"] == first
    assert kept["best"]["weights"].keys() == kept["model"].keys()
    assert not (out / "pred_xyz.npy").exists()
    run("finetune.py", *arguments)
    assert same(load_checkpoint(out / "model.pt"), load_checkpoint(straight / "model.pt"))
    assert (out / "pred_xyz.npy").read_bytes() == (straight / "pred_xyz.npy").read_bytes()


def test_the_error_of_a_sample_is_that_of_its_valid_joints():
    xyz = np.random.default_rng(0).normal(0, 40, (2, 21, 3))
    valid = np.ones((2, 21), bool)
    valid[0, 5] = valid[1, 9] = False
    pose = finetune.scaled_pose(xyz)
    pose[0, 5] += 9
    samples = finetune.make_samples(path=["a", "b"], xyz=xyz, valid=valid)
    errors = finetune.sample_errors(pose, samples)
    assert errors[0] == pytest.approx(0, abs=1e-9) and np.isnan(errors[1])


def test_other_labels_are_another_run(straight, rendered, tmp_path):
    out = Path(shutil.copytree(straight, tmp_path / "run"))
    root = Path(shutil.copytree(rendered / "freihand", tmp_path / "freihand"))
    shutil.copytree(rendered / "freihand_eval", tmp_path / "freihand_eval")
    xyz = np.array(json.loads((root / "training_xyz.json").read_text()))
    (root / "training_xyz.json").write_text(json.dumps((1.01 * xyz).tolist()))
    content = load_checkpoint(out / "checkpoint.pt")
    content["args"]["root"] = str(root)
    torch.save(content, out / "checkpoint.pt")
    line = refused("finetune.py", "--dataset", "freihand", "--root", root, "--out", out, *TINY,
                   "--epochs", 2)
    assert "was trained on other hands, pairs or labels" in line


def test_a_loss_that_is_not_finite_ends_the_run_before_the_epochs_end(rendered, tmp_path):
    line = refused("finetune.py", "--dataset", "freihand", "--root", rendered / "freihand", "--out",
                   tmp_path / "run", *TINY, "--epochs", 1, "--lr", 1e30)
    step = int(re.search(r"the loss is not finite by step (\d+);", line)[1])
    assert 1 < step < 5
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_a_validation_that_is_never_finite_ends_in_one_line(straight, rendered, tmp_path):
    """Its weights are finite, and so is the loss: training does not look at running statistics."""
    state = load_checkpoint(straight / "model.pt")["model"]
    backbone = {k[9:]: v for k, v in state.items() if k.startswith("backbone.")}
    backbone["bn1.running_var"] = torch.full((64,), -1e9)
    torch.save(backbone, tmp_path / "backbone.pt")
    arguments = [a if a != "none" else tmp_path / "backbone.pt" for a in TINY]
    line = refused("finetune.py", "--dataset", "freihand", "--root", rendered / "freihand", "--out",
                   tmp_path / "run", *arguments, "--epochs", 2)
    assert "no epoch had a finite validation error" in line
    assert not (tmp_path / "run" / "model.pt").exists()


@pytest.mark.parametrize("size, angle", [((1501, 2003), 30), ((1501, 2003), 0), ((150, 200), 30)])
def test_large_pictures_are_averaged_not_sampled(size, angle):
    """A checkerboard of single pixels becomes grey, dots stay where the joints are; a small
    picture is untouched."""
    rng, (height, width) = np.random.default_rng(0), size
    uv = rng.uniform(0.35, 0.65, (21, 2)) * (width, height)
    y, x = np.mgrid[:height, :width]
    board = (255 * ((x + y) % 2)).astype(np.uint8)
    centre, scale = (width / 2, height / 2), 64 / (0.6 * height)
    turn = cv2.getRotationMatrix2D(centre, angle, scale)
    turn[:, 2] += 31.5 - np.array(centre)
    view = finetune.View(turn, angle)
    image, found, _ = finetune.shrink(np.repeat(board[..., None], 3, 2), view, uv, "black")
    large = scale < 0.5
    assert large == (image.shape[0] < height)
    # Black is added beyond the border.
    assert not large or np.abs(image[:-1, :-1].astype(int) - 127).max() <= 2
    for joint in uv[::5]:
        spot = np.exp(-((x - joint[0]) ** 2 + (y - joint[1]) ** 2) * (scale / 1.5) ** 2 / 2)
        dot = np.repeat((250 * spot).astype(np.uint8)[..., None], 3, 2)
        picture, inner, moved = finetune.shrink(dot, view, uv, "black")
        shown, seen = finetune.apply_view(inner, picture, moved, 64, "black")
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
    samples = finetune.make_samples(4, path=names, uv=uv)
    error = np.random.default_rng(0).permutation(30).astype(float)
    error[4] = np.nan  # cannot be scored: not shown
    crops = finetune.Crops(str(tmp_path), 32, "black")
    finetune.draw_overlay(tmp_path / "overlay.png", samples, uv / 2, error, crops, columns=4)
    sheet = cv2.imread(str(tmp_path / "overlay.png"))
    corners = sheet[250::256, 250::256, 0][:3, :4].ravel() / 8
    order = np.argsort(error)[:29]
    assert corners.tolist() == [*order[:4], *order[12:16], *order[-4:]]


def test_the_backbone_has_a_learning_rate_of_its_own(straight, rendered, tmp_path):
    """At 0 the backbone's weights stay, unlike with --freeze BatchNorm's statistics move,
    and the heads learn."""
    state = load_checkpoint(straight / "model.pt")["model"]
    torch.save({k[9:]: v for k, v in state.items() if k.startswith("backbone.")},
               tmp_path / "backbone.pt")
    arguments = [a if a != "none" else tmp_path / "backbone.pt" for a in TINY]
    run_here("finetune.py", "--dataset", "freihand", "--root", rendered / "freihand",
             "--out", tmp_path / "run", *arguments, "--epochs", 1, "--backbone-lr", 0)
    end = load_checkpoint(tmp_path / "run" / "model.pt")["model"]
    for k in (k for k in state if not k.endswith("num_batches_tracked")):
        assert torch.equal(end[k], state[k]) == (
            k.startswith("backbone.") and "running" not in k), k


def test_knn_is_brute_force_on_the_backbones_features(rendered, straight, tmp_path):
    state = load_checkpoint(straight / "model.pt")["model"]
    torch.save({k[9:]: v for k, v in state.items() if k.startswith("backbone.")},
               tmp_path / "backbone.pt")
    arguments = ["--root", rendered / "freihand", "--out", tmp_path / "run",
                 *(a if a != "none" else tmp_path / "backbone.pt" for a in TINY), "--head", "knn",
                 "--label-fraction", 0.5]
    before = [{"command": "",
               "args": {"method": "peclr", "hands": ["a", "b"], "weighting": "none"}},
              {"hands": 60}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in before))
    printed = run_here("finetune.py", "--dataset", "freihand", *arguments)
    assert "holds the true wrist and the true length of the bone 0-9" in printed
    settings = evaluate.read_settings(tmp_path / "run")  # what its plots go by
    assert settings["data"] == "FreiHAND" and settings["label_fraction"] == 0.5
    assert settings["method"] == "peclr" and settings["pool"] == 60
    (tmp_path / "log.jsonl").write_text("another program's\n")
    (tmp_path / "run" / "checkpoint.pt").unlink()
    run_here("finetune.py", "--dataset", "freihand", *arguments)
    assert evaluate.read_settings(tmp_path / "run")["pool"] is None
    args = parse(*arguments)
    train, validation, test, _ = split(args)
    assert len(train) == 4 * 8 and not len(validation)  # all chosen labels
    net = finetune.load_backbone("resnet18", tmp_path / "backbone.pt").eval()
    labelled, asked = test_crops(train, args), test_crops(test, args)
    with torch.no_grad():
        keys, queries = (net(normalise(part["image"])).double()
                         for part in (labelled, asked))
    predicted, truth, uv = (np.load(tmp_path / "run" / f"{name}.npy")
                            for name in ("pred_xyz", "gt_xyz", "pred_uv"))
    neighbours = set()
    for k, q in enumerate(queries):
        n = max(range(len(keys)), key=lambda i: (q @ keys[i] / q.norm() / keys[i].norm()).item())
        length = np.linalg.norm(truth[k, 9] - truth[k, 0])
        pose = train.xyz[n] - train.xyz[n, 0]
        expected = truth[k, 0] + pose * length / np.linalg.norm(pose[9])
        assert (np.abs(predicted[k] - expected).max() < 1e-2
                and np.allclose(uv[k], labelled["uv"][n], atol=1e-3))
        neighbours.add(n)
    assert len(neighbours) > 2
    assert cv2.imread(str(tmp_path / "run" / "overlay.jpg")) is not None
    assert "--label-fraction was 0.5, is 1.0" in refused(
        "finetune.py", "--dataset", "freihand", *arguments[:-2])


RANKS = """
import json, sys, torch, finetune
from common import end_ranks, spread
sys.argv = json.loads(sys.argv[1])
args = finetune.parse_args()
train = finetune.load_data(args).train
train.valid[::3, 0] = False  # no pose, so that shares differ in how many have one
plan = finetune.make_plan(args, len(train))
torch.manual_seed(0)
pictures = finetune.Pictures(train, finetune.make_crops(args))
rows = next(finetune.items_of_steps(0, 1, len(train), plan, args.seed))
batch = finetune.collate([pictures(row) for row in rows])
with_bone = finetune.has_wrist_and_bone(batch["valid"]).sum()
found = []
for head in ("detnet", "linear"):
    model = finetune.NETWORKS[head]("resnet18", "none").eval()
    net = spread(model, plan.device)
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    loss = finetune.train_step(net, still, batch, finetune.LOSSES[head], plan)
    total = finetune.over_ranks(loss.clone()) / plan.ranks
    found.append([total, [p.grad for p in model.parameters()]])
if plan.rank == 0:
    torch.save([found, with_bone], args.out)
"""
STATISTICS = """
from torch import nn
from common import average_statistics, report
model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
net = spread(model, plan.device)
net.train()
model[1].eval()
batches = torch.randn(4, 2, 8, 3, generator=torch.Generator().manual_seed(0))
expected = torch.zeros(3)
for batch in batches:
    net(batch[plan.rank])
    average_statistics(net)
    expected = 0.9 * expected + 0.1 * batch.mean((0, 1))
assert torch.allclose(model[0].running_mean, expected, atol=1e-6)
assert not model[1].running_mean.any()
logged = report("out", 5, [{"loss": torch.tensor(plan.rank + 1.0)}], still, plan)
assert logged["loss"] == 1.5  # the mean over the ranks
del net, loss  # as where a main function returns: what is left at the exit may end it by an abort
end_ranks()
"""


def test_two_ranks_have_the_gradient_of_one_process(rendered, tmp_path, monkeypatch):
    """With BatchNorm in eval mode nothing but rounding tells a batch of 10 from two shares of 5. In
    training its running statistics are those of all ranks."""
    (tmp_path / "ranks.py").write_text(RANKS + STATISTICS)
    found = []
    for world in (1, 2):
        argv = ["finetune.py", "--dataset", "freihand", "--root", rendered / "freihand", *TINY,
                "--out", tmp_path / f"{world}.pt"]
        text = json.dumps([str(a) for a in argv])
        if world == 1:
            monkeypatch.setattr(sys, "argv", ["ranks.py", text])
            exec(RANKS, {})
        else:
            torchrun(tmp_path / "ranks.py", text)
        found.append(load_checkpoint(tmp_path / f"{world}.pt"))
    (heads1, posed1), (heads2, posed2) = found
    assert 2 * posed2 != posed1
    for (loss1, one), (loss2, two) in zip(heads1, heads2, strict=True):
        assert loss1.item() == pytest.approx(loss2.item(), rel=1e-5)
        for a, b in zip(one, two, strict=True):
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-5 * max(a.abs().max().item(), 1e-3))


def test_two_ranks_train_and_share_the_test_pictures(rendered, straight, tmp_path):
    out = tmp_path / "run"
    # Two batches of test pictures: one for each rank.
    arguments = ["--dataset", "freihand", "--root", rendered / "freihand", "--out", out, *TINY,
                 "--batch-size", 4, "--epochs", 1]
    torchrun("finetune.py", *arguments)
    assert {p.name for p in straight.iterdir()} == {p.name for p in out.iterdir()}
    args = parse(*arguments[2:])
    net = finetune.DetNet("resnet18", "none")
    net.load_state_dict(load_checkpoint(out / "model.pt")["model"])
    _, validation, test, _ = split(args)
    uv, pose = predict(net, test, args)
    assert np.array_equal(uv.astype(np.float32), np.load(out / "pred_uv.npy"))
    xyz = pose * finetune.bone_length(test.xyz)[:, None, None] + test.xyz[:, :1]
    assert np.abs(np.load(out / "pred_xyz.npy") - xyz).max() < 1e-3
    row = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    assert row["validation_error"] == pytest.approx(
        np.nanmean(finetune.sample_errors(predict(net, validation, args)[1], validation)))
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
        cv2.imwrite(str(folder / f"händ {k}.PNG"),
                    image[:200 if k == 1 else 224, :150 if k == 2 else 224])
    run_here("finetune.py", "--predict", folder, "--weights", straight / "model.pt", "--out", out,
             "--workers", 0)
    assert {p.name for p in out.iterdir()} == {
        ".lock", "log.jsonl", "names.txt", "overlay.jpg", "pred_uv.npy", "pred_xyz.npy"}
    lines = (out / "names.txt").read_text().splitlines()
    assert lines == [f"{k}\t{folder / f'händ {k}.PNG'}\tright" for k in range(3)]
    xyz, uv = np.load(out / "pred_xyz.npy"), np.load(out / "pred_uv.npy")
    kept = load_checkpoint(straight / "model.pt")
    net = finetune.DetNet("resnet18", "none").eval()
    net.load_state_dict(kept["model"])
    train = split(parse("--root", rendered / "freihand", "--out", "x", *TINY))[0]
    assert kept["bone"] == pytest.approx(
        np.median([np.linalg.norm(hand[9] - hand[0]) for hand in train.xyz]))
    for k in range(3):
        image = cv2.cvtColor(cv2.imread(str(folder / f"händ {k}.PNG")), cv2.COLOR_BGR2RGB)
        # Black to both sides, up to a square.
        rows, columns = 224 - image.shape[0], 224 - image.shape[1]
        matrix = np.array([[1, 0, columns / 2 / 7], [0, 1, rows / 2 / 7]])  # 224 -> 32 pixels
        made = torch.from_numpy(cv2.warpAffine(block_means(image, 7), matrix, (32, 32)))[None]
        with torch.no_grad():
            heat, _, location = net(normalise(made))
        for j in range(21):
            row, column = np.unravel_index(heat[0, j].numpy().argmax(), (8, 8))
            assert np.allclose(uv[k, j], (column * 4 + 1.5, row * 4 + 1.5))
            wrist = np.unravel_index(heat[0, 0].numpy().argmax(), (8, 8))
            pose = location[0, j, :, row, column] - location[0, 0, :, wrist[0], wrist[1]]
            assert np.allclose(xyz[k, j], kept["bone"] * pose.numpy(), atol=0.05)
    sheet = cv2.imread(str(out / "overlay.jpg"))
    assert sheet.shape == (3 * 256, 256, 3)


def test_predict_leaves_out_hidden_files_and_other_files(rendered, straight, tmp_path):
    """A Mac leaves ._a.jpg beside a.jpg."""
    folder = tmp_path / "mine"
    folder.mkdir()
    picture = next((rendered / "freihand" / "evaluation" / "rgb").glob("*.jpg"))
    shutil.copy(picture, folder / "a.jpg")
    (folder / "._a.jpg").write_bytes(b"\0\5\26\7\0\2\0\0Mac OS X        ")
    (folder / "notes.txt").write_text("no picture")
    run_here("finetune.py", "--predict", folder, "--weights", straight / "model.pt",
             "--out", tmp_path / "out", "--workers", 0)
    assert (tmp_path / "out" / "names.txt").read_text() == f"0\t{folder}/a.jpg\tright\n"


def test_what_cannot_be_predicted_is_refused(rendered, straight, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    out = tmp_path / "out"

    def line(folder=folder, out=out, weights=straight / "model.pt"):
        return refused("finetune.py", "--predict", folder, "--weights", weights, "--out", out,
                       "--workers", 0)

    assert "holds neither keypoints.npy nor a picture" in line()
    pictures = rendered / "freihand" / "evaluation" / "rgb"
    content = next(pictures.glob("*.jpg")).read_bytes()
    (folder / "cut.jpg").write_bytes(content[:len(content) // 2])
    assert "cut.jpg: cut short, or not a picture" in line()
    assert str(tmp_path / "none") in line(tmp_path / "none")
    assert "choose another --out" in line(pictures, straight)
    for content in ({"conv1.weight": torch.zeros(3)}, {"bone": 1.0}, torch.zeros(3), 5):
        torch.save(content, tmp_path / "other.pt")
        assert "other.pt: not the model.pt" in line(pictures, weights=tmp_path / "other.pt")


@pytest.mark.parametrize("arguments, message", [
    ("--root x", "expected --dataset and --root, or --predict"),
    ("--predict x", "--predict and --weights RUN/model.pt"),
    ("--predict x --weights m.pt --dataset freihand --root x", "expected --dataset and --root, or"),
    ("--dataset freihand --root x --setup s1", "--setup and --paper-filter belong to"),
    ("--dataset dexycb --root x --modality exo", "--modality belongs to"),
    ("--dataset freihand --root x --input-size 48", "multiple of 32, not 48, with --head detnet"),
    ("--dataset own --root x", "--dataset own: expected --labels FOLDER")])
def test_flags_that_do_not_go_together_are_refused(arguments, message, tmp_path):
    assert message in refused("finetune.py", *arguments.split(), "--out", tmp_path / "out")


def test_a_linear_probe_leaves_the_backbone_and_predicts_what_it_says(rendered, tmp_path,
                                                                      monkeypatch):
    """BatchNorm's statistics stay too. An epoch's end writes no checkpoint: it would take a third
    of the time where epochs are short, and --save-minutes tells when."""
    saved = []
    monkeypatch.setattr(finetune, "save_checkpoint",
                        lambda out, settings, data, step, *more, **best: saved.append(step))
    torch.manual_seed(1)
    start = finetune.LinearNet("resnet18", "none")
    torch.save(start.backbone.state_dict(), tmp_path / "backbone.pt")
    arguments = [a if a != "none" else tmp_path / "backbone.pt" for a in TINY]
    run_here("finetune.py", "--dataset", "freihand", "--root", rendered / "freihand", "--out",
             tmp_path / "run", *arguments, "--epochs", 2, "--head", "linear", "--freeze",
             "--input-size", 56)  # DetNet alone wants multiples of 32
    assert saved == [10]
    kept = load_checkpoint(tmp_path / "run" / "model.pt")
    net = finetune.LinearNet("resnet18", "none").eval()
    net.load_state_dict(kept["model"])
    for (name, before), after in zip(start.state_dict().items(), net.state_dict().values()):
        assert torch.equal(before, after) == name.startswith("backbone."), name
    folder = rendered / "freihand" / "evaluation" / "rgb"
    run_here("finetune.py", "--predict", folder, "--weights", tmp_path / "run" / "model.pt",
             "--out", tmp_path / "mine", "--workers", 0)
    xyz = np.load(tmp_path / "mine" / "pred_xyz.npy")
    picture = cv2.imread(str(sorted(folder.iterdir())[3]))
    small = block_means(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB), 4)[None]
    with torch.no_grad():
        uv, pose = net(normalise(torch.from_numpy(small.astype(np.uint8))))
    assert np.allclose(np.load(tmp_path / "mine" / "pred_uv.npy")[3], uv[0], atol=1e-3)
    assert np.allclose(xyz[3], kept["bone"] * (pose[0] - pose[0, :1]), atol=0.05)


def test_the_border_of_training_is_that_of_prediction(rendered, straight, tmp_path):
    """Mirrored or black beyond the picture."""
    folder = tmp_path / "mine"
    folder.mkdir()
    picture = sorted((rendered / "freihand" / "evaluation" / "rgb").glob("*.jpg"))[0]
    cv2.imwrite(str(folder / "wide.png"), cv2.imread(str(picture))[60:160])
    kept = load_checkpoint(straight / "model.pt")
    assert kept["border"] == "black"
    found = {}
    for border in ("mirror", "black"):
        torch.save({**kept, "border": border}, tmp_path / f"{border}.pt")
        run_here("finetune.py", "--predict", folder, "--weights", tmp_path / f"{border}.pt",
                 "--out", tmp_path / f"{border}", "--workers", 0)
        found[border] = np.load(tmp_path / f"{border}" / "pred_xyz.npy")
    assert not np.array_equal(found["mirror"], found["black"])
    samples = finetune.make_samples(1, path=["wide.png"])
    samples.centre, samples.side = (111.5, 49.5), 224
    args = parse("--root", folder, "--out", "x", *TINY, "--input-size", 224)
    black = test_crops(samples, args)["image"][0].numpy()
    mirrored = test_crops(samples, parse(
        "--root", folder, "--out", "x", *TINY, "--input-size", 224, "--border",
        "mirror"))["image"][0].numpy()
    inside = cv2.cvtColor(cv2.imread(str(folder / "wide.png")), cv2.COLOR_BGR2RGB)
    assert np.array_equal(black[62:162], inside) and not black[:62].any() and not black[162:].any()
    assert np.array_equal(mirrored[62:162], inside)
    assert (np.array_equal(mirrored[:62], inside[62:0:-1])
            and np.array_equal(mirrored[162:], inside[-2:-64:-1]))
    # Squares at the edge are cut.
    large = cv2.resize(inside, None, fx=8, fy=8, interpolation=cv2.INTER_NEAREST)[:797]
    view = finetune.View(finetune.crop_matrix((895.5, 398), 1792, 224))
    for border, shown in (("black", False), ("mirror", True)):
        small, inner, _ = finetune.shrink(large, view, np.zeros((21, 2)), border)
        last = finetune.apply_view(inner, small, np.zeros((21, 2)), 224, border)[0][175:]
        assert last.any() == shown


def test_the_model_keeps_the_border_and_the_crop_of_its_training(rendered, tmp_path):
    args = parse("--root", rendered / "freihand", "--out", tmp_path, *TINY, "--border",
                 "mirror", "--crop", 1.25)
    finetune.save_model(torch.nn.Linear(1, 1), split(args)[0], args)
    kept = load_checkpoint(tmp_path / "model.pt")
    assert (kept["border"], kept["crop"]) == ("mirror", 1.25)


def test_a_hands_folder_is_predicted_crop_by_crop(hands, straight, tmp_path):
    rows, out = np.load(hands / "hands.npy"), tmp_path / "predicted"
    weights = tmp_path / "model.pt"
    torch.save({**load_checkpoint(straight / "model.pt"), "crop": 1.5}, weights)
    printed = run("finetune.py", "--predict", hands, "--weights", weights, "--out", out,
                  "--workers", 2)
    assert len(printed.stdout) < 2000
    lines = [line.split("\t") for line in (out / "names.txt").read_text().splitlines()]
    assert [line[2] == "left" for line in lines] == rows["left"].tolist() and rows["left"].any()
    assert ([line[0] for line in lines] == [str(i) for i in range(len(rows))]
            and not (out / "gt_xyz.npy").exists())
    uv, xyz = np.load(out / "pred_uv.npy"), np.load(out / "pred_xyz.npy")
    assert uv.shape == (len(rows), 21, 2) and np.isfinite(xyz).all() and not xyz[:, 0].any()
    opened, net = finetune.load_hands(hands), finetune.DetNet("resnet18", "none").eval()
    net.load_state_dict(load_checkpoint(straight / "model.pt")["model"])
    for i in (0, int(np.flatnonzero(rows["left"])[0])):  # a crop shows a right hand already
        low, high = opened.keypoints[i].min(0), opened.keypoints[i].max(0)
        scale = 32 / (1.5 * (high - low).max())
        times = int(1 / scale)
        assert times > 1
        move = 15.5 - scale * (low + high) / 2 + scale * (times - 1) / 2
        matrix = np.concatenate([np.eye(2) * scale * times, move[:, None]], 1)
        made = cv2.warpAffine(block_means(finetune.read_crop(opened, i), times), matrix, (32, 32))
        with torch.no_grad():
            heat = net(normalise(torch.from_numpy(made)[None]))[0][0]
        found = [np.unravel_index(heat[j].numpy().argmax(), (8, 8)) for j in range(21)]
        assert np.allclose(uv[i], [(column * 4 + 1.5, row * 4 + 1.5) for row, column in found])
    (hands / "keypoints.npy").write_bytes(b"")
    assert "keypoints.npy: truncated" in refused(
        "finetune.py", "--predict", hands, "--weights", weights, "--out", out)


def test_it_learns_what_it_is_shown(rendered):
    """A few steps on one batch must bring the loss down by far: targets, loss and network
    fit together."""
    args = parse("--root", rendered / "freihand", "--out", "x", *TINY, "--rotation", 0,
                 "--no-colour", "--batch-size", 4)
    train, _, _, _ = split(args)
    torch.manual_seed(0)
    net = finetune.DetNet("resnet18", "none").train()
    _, batch = first_batch(train, args)
    optimizer, losses = torch.optim.Adam(net.parameters(), 1e-3), []
    for _ in range(40):
        loss = finetune.detnet_loss(finetune.forward(net, batch["image"], "fp32"), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
