"""Pre-training: exact large batches, ranks, resuming, hand-over."""

import argparse
import copy
import json
import os
import re
import shlex
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
import torchvision
from torch._subclasses.fake_tensor import FakeTensorMode

import pretrain
from common import (BACKBONES, COLOURS, InputError, apply_view, best_turns, load_checkpoint,
                    load_hands, normalise, nt_xent, pair_weights, read_crop, sample_view, spread,
                    undo_view)
from mine_pairs import as_poses
from conftest import ENVIRONMENT, ROOT, TINY, fork, refused, run, run_here, torchrun


MEASURED = ("--weighting", "linear", "--weight-pca")
# The run that `straight` is.
RUN = ("--batch-size", 40, "--micro-batch", 20, "--epochs", 2, "--weighting", "linear")


def parse(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pretrain.py", *map(str, arguments)])
        return pretrain.parse_args()


def same(a, b):
    """Two checkpoints' contents, bit by bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return (all(same(x, y) for x, y in zip(a, b, strict=True)) if isinstance(a, (list, tuple))
            else a == b)


def vary(args, **changes):
    """The arguments with some of them changed."""
    return argparse.Namespace(**vars(args) | changes)


def make_plan(args, data, rank=0, ranks=1):
    return pretrain.make_plan(args, len(data.pool), rank, ranks, torch.device("cpu"))


def make_model(args):
    return pretrain.make_model("none", torch.device("cpu"), args)


def first_step(args, data, rank=0, ranks=1):
    """-> the plan, and this rank's pieces of the first step."""
    plan = make_plan(args, data, rank, ranks)
    pieces = []
    for items in pretrain.items_of_steps(0, 1, len(data.pool), plan, args.seed):
        pairs = [pretrain.make_pair(data, hand, epoch, args) for epoch, hand in items]
        pieces.append(pretrain.collate(pairs))
    return plan, pieces


def standing_still(net):
    """An optimiser that leaves the network as it is: what a step computed shows in the
    gradients."""
    return torch.optim.SGD([dict(params=list(net.parameters()), adapt=False)], lr=0.0)


# ----------------------------------------------------------------------------------------- the step

@pytest.fixture
def setting(mined):
    args = parse(mined, "--out", "unused", *TINY, "--batch-size", 12, "--epochs", 1,
                 "--weighting", "linear", "--keypoint-loss", 0)
    torch.manual_seed(0)
    return args, pretrain.load_data(args), make_model(args)


def smooth(net):
    """The same network without corners. Where the input of a ReLU lies within rounding of
    0, or two of a max-pooling's are that close to each other, two ways to compute a
    gradient may both be right and differ."""
    for module in net.modules():
        for name, child in module.named_children():
            if isinstance(child, torch.nn.ReLU):
                setattr(module, name, torch.nn.SiLU())
            if isinstance(child, torch.nn.MaxPool2d):
                setattr(module, name,
                        torch.nn.AvgPool2d(child.kernel_size, child.stride, child.padding))
    return net.eval()


def test_views_hardly_show_the_border_of_their_crop(mined):
    """A view is centred on the mean of the keypoints, a crop on their box: what lies
    between depends on the pose, and a border that is seen gives it away. Crops of the
    paper's size, half as wide as ours, show it in nearly all views."""
    hands, rng = load_hands(mined), np.random.default_rng(0)
    seen = {1: [], 2: []}
    for points in np.concatenate([hands.keypoints] * 5):
        for smaller, shares in seen.items():
            side, move = hands.side / smaller, 15 / 448 * smaller
            view = sample_view(rng, points - (hands.side - side) / 2, side, 64, move=move,
                               colour=False)
            white = np.full((round(side),) * 2, 255, np.uint8)
            shares.append((apply_view(view, white, points, 64, "black")[0] < 128).mean())
    shares = {smaller: np.array(values) for smaller, values in seen.items()}
    assert shares[1].mean() < 0.02 and (shares[1] > 0).mean() < 0.3
    assert shares[2].mean() > 0.25 and (shares[2] > 0).mean() > 0.9


@pytest.mark.parametrize("flags", [
    (), ("--method", "peclr"), ("--method", "simclr"), ("--weighting", "nonlinear"),
    ("--keypoint-loss", 0), ("--method", "keypoints")])
def test_micro_batches_give_the_gradient_of_the_whole_batch(mined, flags):
    """With BatchNorm in eval mode nothing but rounding tells 12 pairs from 3 x 4."""
    found = []
    for micro in (12, 4):
        args = parse(mined, "--out", "unused", *TINY, "--batch-size", 12, "--micro-batch", micro,
                     *flags)
        data = pretrain.load_data(args)
        torch.manual_seed(0)
        net = make_model(args).eval()
        plan, pieces = first_step(args, data)
        assert len(pieces) == 12 // micro
        values = pretrain.train_step(net, standing_still(net), pieces, None, plan, args)
        found.append((values, [p.grad.clone() for p in net.parameters()]))
    (values1, whole), (values3, parts) = found
    assert values1.keys() == values3.keys()
    assert all(torch.allclose(values1[key], values3[key], rtol=1e-5) for key in values1)
    assert any(g.abs().max() > 1e-4 for g in whole)
    for a, b in zip(whole, parts):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5 * max(a.abs().max().item(), 1e-3))


@pytest.mark.parametrize("method, equivariance", [
    ("simhand", None), ("simhand", "rotation"), ("peclr", "shift"), ("peclr", "none"),
    ("simclr", None)])
def test_the_whole_step_equals_autograd_through_everything(setting, mined, method, equivariance):
    """One piece: the gradient must be that of the loss written straight on the network's
    output, from the pictures on: torchvision's normalisation, the view undone except by
    simclr, the temperature asked for."""
    _, _, net = setting
    flags = ("--equivariance", equivariance) if equivariance else ()
    args = parse(mined, "--out", "unused", *TINY, "--batch-size", 12, "--method", method,
                 "--weighting", "linear", "--keypoint-loss", 0, "--temperature", 0.2, *flags)
    plan, (batch,) = first_step(args, pretrain.load_data(args))
    smooth(net)
    values = pretrain.train_step(net, standing_still(net), [batch], None, plan, args)
    ours = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    images = batch["image"].permute(0, 3, 1, 2) / 255
    images = torchvision.transforms.functional.normalize(
        images, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    z = torch.nn.functional.normalize(net(images)[0], dim=1)
    if method != "simclr" and equivariance != "none":
        angle, shift = batch["angle"], batch["shift"]
        assert angle.abs().min() > 0 and shift.abs().min() > 0
        if equivariance == "shift":
            angle = torch.zeros_like(angle)
        if equivariance == "rotation":
            shift = torch.zeros_like(shift)
        z = undo_view(z.reshape(-1, 64, 2), angle, shift).reshape(-1, 128)
        z = z / z.norm(dim=1, keepdim=True)
    loss = nt_xent(*z.chunk(2), *pair_weights(*batch["weight_keypoints"].chunk(2)), temperature=0.2)
    loss.backward()
    assert values["loss"].item() == pytest.approx(loss.item(), rel=1e-6)
    assert all(torch.allclose(a, p.grad, rtol=1e-3, atol=1e-6)
               for a, p in zip(ours, net.parameters()))


@pytest.mark.parametrize("flags", [
    (), ("--weight-on", "pos"), ("--weight-on", "neg"),
    ("--weighting", "nonlinear", "--slope-pos", 0.3, "--slope-neg", 0.01), ("--weight-pca",)])
def test_weights_are_those_that_the_flags_ask_for(mined, flags):
    args = parse(mined, "--out", "unused", *TINY, "--weighting", "linear", *flags)
    pca, (k1, k2) = (pretrain.load_data(args).pca,
                     torch.rand(2, 9, 21, 2, generator=torch.manual_seed(0)) * 32)
    found = pretrain.weigh(k1, k2, args.weighting, args.weight_on,
                           (args.slope_pos, args.slope_neg), pca)
    every = np.concatenate([k1, k2]).astype(float)
    if "--weight-pca" in flags:
        every = (every.reshape(18, 42) @ np.load(mined / "pca.npy")[1:].T.astype(float))[:, None]
    d = np.linalg.norm(every[:, None] - every[None], axis=3).mean(2)
    for name, other, w, distance, slope in (
            ("pos", "neg", found.get("pos_weight"), d[np.arange(9), np.arange(9) + 9], 0.3),
            ("neg", "pos", found.get("neg_weight"), d, 0.01)):
        if other in flags:
            assert w is None
        elif "nonlinear" in flags:
            assert np.allclose(w, 1 / (1 + np.exp(slope * (distance - distance.mean()))), atol=1e-5)
        else:
            assert np.allclose(w, (distance.max() - distance) / np.ptp(distance), atol=1e-5)


def test_the_values_of_a_step_against_loops(setting):
    args, data, net = setting
    plan, (batch,) = first_step(args, data)
    values = pretrain.train_step(net, standing_still(net), [batch], None, plan, args)
    values = {key: value.item() for key, value in values.items()}
    with torch.no_grad():
        z = pretrain.embed(net, batch, args.equivariance, "fp32")
    similarity = z @ z.T
    positive = [similarity[i, (i + 12) % 24].item() for i in range(24)]
    negative = [similarity[i, k].item() for i in range(24) for k in range(24)
                if k not in (i, (i + 12) % 24)]
    distance = np.linalg.norm(batch["weight_keypoints"][:12] - batch["weight_keypoints"][12:],
                              axis=2).mean(1)
    assert values["positive_similarity"] == pytest.approx(np.mean(positive), rel=1e-4)
    assert values["negative_similarity"] == pytest.approx(np.mean(negative), rel=1e-4)
    weights = (distance.max() - distance) / np.ptp(distance)
    assert values["mean_pos_weight"] == pytest.approx(np.mean(weights), rel=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_on_the_gpu_never_waits_for_it(setting, compiled):
    args, data, net = setting
    args = vary(args, precision="bf16", micro_batch=6)
    net = net.to("cuda", memory_format=torch.channels_last)
    if compiled:
        net.compile()
    optimizer = pretrain.make_optimizer(net, args.optimizer, args.lr)
    plan, pieces = first_step(args, data)
    pinned = [{key: value.pin_memory() for key, value in piece.items()} for piece in pieces]
    for mode in ("default", "error"):  # the first step may wait: it chooses its kernels
        torch.cuda.set_sync_debug_mode(mode)
        try:
            moved = [pretrain.to_device(piece, torch.device("cuda")) for piece in pinned]
            values = pretrain.train_step(net, optimizer, moved, None, plan, args)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert values["loss"].isfinite()


def test_the_keypoints_are_regressed_in_halves_of_the_views_side(mined):
    """Loss and gradient against autograd on the layer's own output; and beside a contrast the two
    losses add up."""
    flags = (mined, "--out", "unused", *TINY, "--batch-size", 12)
    args = parse(*flags, "--method", "keypoints")
    plan, (batch,) = first_step(args, pretrain.load_data(args))
    torch.manual_seed(0)
    net = make_model(args)
    assert net.projection is None
    values = pretrain.train_step(net, standing_still(net), [batch], None, plan, args)
    ours = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    error = 0
    found = net(normalise(batch["image"]))[1].reshape(24, 21, 2)
    for k in range(24):  # left border -1, right border 1; pixel centres at whole numbers
        for joint in range(21):
            for axis in (0, 1):
                wanted = (batch["keypoints"][k, joint, axis].item() + 0.5) / 16 - 1
                error = error + (found[k, joint, axis] - wanted).abs() / (24 * 42)
    error.backward()
    assert values["loss"].item() == pytest.approx(error.item(), rel=1e-5)
    assert all(torch.allclose(a, p.grad, rtol=1e-3, atol=1e-6)
               for a, p in zip(ours, net.parameters()))

    both = parse(*flags, "--keypoint-loss", 3)
    plan, pieces = first_step(both, pretrain.load_data(both))
    net = make_model(both)
    together = pretrain.train_step(net, standing_still(net), pieces, None, plan, both)
    contrast = pretrain.train_step(net, standing_still(net), pieces, None, plan,
                                   vary(both, keypoint_loss=0))
    assert together["loss"].item() == pytest.approx(
        contrast["loss"].item() + 3 * together["keypoint_error"].item(), rel=1e-5)


def test_soft_targets_compare_the_hands_as_their_pair_turns_them(twins):
    folder, _ = twins
    args = parse(folder, "--out", "unused", *TINY, "--batch-size", 12, "--weighting", "soft",
                 "--target-temperature", 0.2, "--temperature", 0.3, "--keypoint-loss", 0)
    data = pretrain.load_data(args)
    plan, (batch,) = first_step(args, data)
    net = make_model(args)
    values = pretrain.train_step(net, standing_still(net), [batch], None, plan, args)
    with torch.no_grad():
        z = pretrain.embed(net, batch, "both", "fp32").double().numpy()
    (items,) = pretrain.items_of_steps(0, 1, len(data.pool), plan, args.seed)
    keypoints = np.load(folder / "keypoints.npy").astype(float)
    neighbours, turns = (np.load(folder / f"{name}.npy")[:, 0] for name in ("neighbours", "turns"))
    rows = [data.pool[hand, 1] for _, hand in items]
    hands = [keypoints[row] for row in rows]
    for row in rows:
        back = cv2.getRotationMatrix2D((0, 0), float(turns[row]), 1)[:, :2]
        hands.append(keypoints[neighbours[row]] @ back.T)
    hands = [hand - hand.mean(0) for hand in hands]
    hands = np.array([hand / np.sqrt((hand ** 2).sum(1).mean()) for hand in hands])
    distance = np.linalg.norm(hands[:, None] - hands[None], axis=3).mean(2)
    np.fill_diagonal(distance, np.inf)
    target = np.exp(-distance / 0.2)
    target /= target.sum(1, keepdims=True)
    similarity = np.exp(z @ z.T / 0.3)
    np.fill_diagonal(similarity, 0)
    found = similarity / similarity.sum(1, keepdims=True)
    np.fill_diagonal(found, 1)
    assert values["loss"].item() == pytest.approx(-(target * np.log(found)).sum() / 24, rel=1e-4)


def test_embedding_without_gradient_leaves_the_running_statistics_alone(setting):
    args, data, net = setting
    _, (batch,) = first_step(args, data)
    net.train()
    before = copy.deepcopy(net.state_dict())
    with pretrain.no_gradient(net):
        z = pretrain.embed(net, batch, args.equivariance, "fp32")
    assert not z.requires_grad and same(before, net.state_dict())
    in_training_mode = pretrain.embed(net, batch, args.equivariance, "fp32")
    assert torch.allclose(z, in_training_mode, atol=1e-6)


def test_running_statistics_are_those_of_one_pass_over_the_pieces(setting):
    args, data, net = setting
    args = vary(args, micro_batch=4)
    plan, pieces = first_step(args, data)
    twin = copy.deepcopy(net).train()
    before = copy.deepcopy(net.state_dict())
    with torch.no_grad():
        for piece in pieces:
            twin(normalise(piece["image"]))
    pretrain.train_step(net.train(), standing_still(net), pieces, None, plan, args)
    buffers = dict(net.named_buffers())
    for name, expected in twin.named_buffers():
        assert torch.allclose(buffers[name], expected, rtol=1e-5, atol=1e-6), name
        assert not torch.equal(buffers[name], before[name]), name


RANKS = '''
import sys
import torch
from common import end_ranks, start_ranks
rank, ranks, _ = start_ranks("cpu")
sys.path.append(".")
import test_pretrain  # after the start: conftest.py forgets that there are ranks
out, *words = sys.argv[1:]
found = [test_pretrain.step_of_ranks(flags.split(), rank, ranks) for flags in words]
torch.save(found, f"{out}.{rank}")
end_ranks()
'''


def step_of_ranks(flags, rank=0, ranks=1):
    """-> loss, gradients and state of a new network after one step of this rank's pieces."""
    args = parse(*flags)
    data = pretrain.load_data(args)
    torch.manual_seed(0)
    model = make_model(args).train()
    net = spread(model, torch.device("cpu"))
    plan, pieces = first_step(args, data, rank, ranks)
    values = pretrain.train_step(net, standing_still(net), pieces, None, plan, args)
    return values["loss"], [p.grad for p in model.parameters()], model.state_dict()


def test_two_ranks_equal_one_process_with_the_same_batchnorm_groups(mined, tmp_path):
    """In loss and gradient; and both ranks have the same running statistics after the step."""
    (tmp_path / "ranks.py").write_text(RANKS)
    shared = f"{mined} --out unused {' '.join(TINY)} --batch-size 8 --micro-batch"
    words = [f"{shared} 4 --weighting none", f"{shared} 4 --weighting linear",
             f"{shared} 2 --weighting soft --keypoint-loss 3"]
    torchrun(tmp_path / "ranks.py", tmp_path / "found", *words, cwd=ROOT / "tests")
    ranks = [load_checkpoint(tmp_path / f"found.{rank}") for rank in (0, 1)]
    for flags, (loss, two, state), (_, _, other) in zip(words, *ranks):
        assert same(state, other)
        expected, one, _ = step_of_ranks(flags.split())
        assert torch.allclose(expected, loss, rtol=1e-5)
        for a, b in zip(one, two):
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-5 * max(a.abs().max().item(), 1e-3))


def test_lars_factor_against_its_formula():
    torch.manual_seed(0)
    layer, norm = torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)
    model = torch.nn.Sequential(layer, norm)
    optimizer = pretrain.make_optimizer(model, "lars-adam", 0.1)
    # The weight; three that do not adapt.
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 3]
    for scale in (1.0, 1e-4, 0.0):
        for p in model.parameters():
            p.grad = torch.randn_like(p) * scale
        before = [p.grad.clone() for p in model.parameters()]
        pretrain.adapt_gradients(optimizer, 0.01, True)
        p, g = layer.weight.detach(), before[0]
        p_norm, g_norm = p.norm().item(), g.norm().item()
        factor = min(0.02 * p_norm / (g_norm + 0.01 * p_norm + 1e-8) / 0.1, 1) if g_norm else 1
        assert torch.allclose(layer.weight.grad, (g + 0.01 * p) * factor, rtol=1e-5)
        assert all(torch.equal(q.grad, b) for q, b in zip(list(model.parameters())[1:], before[1:]))


@pytest.mark.parametrize("kind", ["lars-adam", "adam"])
def test_a_step_decays_and_adapts(setting, kind):
    args, data, net = setting
    args = vary(args, optimizer=kind, weight_decay=0.5)
    plan, pieces = first_step(args, data)
    twin = copy.deepcopy(net)
    pretrain.train_step(twin, standing_still(twin), pieces, None, plan, args)
    pretrain.adapt_gradients(pretrain.make_optimizer(twin, kind, 0.1), 0.5, kind != "adam")
    pretrain.train_step(net, pretrain.make_optimizer(net, kind, 0.1), pieces, None, plan, args)
    for a, b in zip(net.parameters(), twin.parameters()):
        assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone_fits_the_projection(backbone):
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):  # sizes alone
        model = pretrain.SimHandModel(backbone, "none", regress=True)
        projection, keypoints = model(torch.zeros(2, 3, 32, 32))
    assert (projection.shape, projection.dtype) == ((2, 128), torch.bfloat16)
    # In bf16 a place near the border would be off by a quarter of a pixel.
    assert (keypoints.shape, keypoints.dtype) == ((2, 42), torch.float32)


def test_learning_rate_warms_up_and_ends_near_zero():
    rates = [pretrain.learning_rate(step, 100, 10, 2.0) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == pytest.approx(2.0) == max(rates)
    assert (rates[55] == pytest.approx(1.0) and rates[99] < 0.002
            and rates[10:] == sorted(rates[10:], reverse=True))
    assert pretrain.learning_rate(0, 5, 0, 2.0) == 2.0


# ----------------------------------------------------------------------------------------- the data

def test_every_hand_comes_at_most_once_an_epoch_in_a_new_order(setting):
    args, data, _ = setting
    plan = make_plan(vary(args, micro_batch=4), data)
    orders = []
    for epoch in (0, 1):
        first = epoch * plan.steps_per_epoch
        pieces = list(pretrain.items_of_steps(first, first + plan.steps_per_epoch, len(data.pool),
                                              plan, args.seed))
        assert [len(items) for items in pieces] == [4] * 3 * plan.steps_per_epoch
        hands = [hand for items in pieces for _, hand in items]
        assert {number for items in pieces for number, _ in items} == {epoch}
        assert len(set(hands)) == len(hands) == plan.steps_per_epoch * args.batch_size
        assert min(hands) >= 0 and max(hands) < len(data.pool)
        orders.append(hands)
    assert orders[0] != orders[1]


def test_a_run_that_goes_on_sees_the_hands_of_one_without_a_stop(setting):
    args, data, _ = setting
    plan = make_plan(args, data)
    end = 2 * plan.steps_per_epoch
    straight = list(pretrain.items_of_steps(0, end, len(data.pool), plan, args.seed))
    for step in (3, plan.steps_per_epoch, end - 1):
        again = list(pretrain.items_of_steps(step, end, len(data.pool), plan, args.seed))
        assert again == straight[step:]


def test_ranks_part_the_hands_of_a_step(setting):
    args, data, _ = setting
    args = vary(args, micro_batch=3)
    steps = {}
    for ranks in (1, 2):
        plans = [make_plan(args, data, rank, ranks) for rank in range(ranks)]
        steps[ranks] = [list(pretrain.items_of_steps(1, 2, len(data.pool), plan, args.seed))
                        for plan in plans]
    assert steps[1][0] == steps[2][0] + steps[2][1]


def test_positives_are_the_mined_neighbours(setting, mined):
    args, data, _ = setting
    args = vary(args, weight_keypoints="original", micro_batch=4)
    neighbours, keypoints = np.load(mined / "neighbours.npy"), np.load(mined / "keypoints.npy")
    _, pieces = first_step(args, data)
    assert len(pieces) == 3
    for batch in pieces:  # the hands are known by their keypoints
        shown = batch["weight_keypoints"].numpy() * 224 / 32
        rows = np.abs(shown[:, None] - keypoints).sum((2, 3)).argmin(1)
        assert (rows[4:] == neighbours[rows[:4], 0]).all()


def test_without_chance_both_views_show_the_hands_centred_and_of_one_size(setting, mined):
    args, data, _ = setting
    args = vary(args, crop_margin=(1.25, 1.25), rotation=0.0, crop_move=0.0)
    neighbours, keypoints = np.load(mined / "neighbours.npy"), np.load(mined / "keypoints.npy")
    for i in (0, 5, len(keypoints) - 1):
        pair = pretrain.make_pair(data, i, 0, args)
        for row, view in zip((i, neighbours[i, 0]), pair):
            centred = keypoints[row] - keypoints[row].mean(0)
            expected = centred / np.linalg.norm(centred, axis=1).max() / 2.5 * 32 + 15.5
            assert np.allclose(view.keypoints, expected, atol=1e-3)


def test_a_batch_holds_all_first_views_before_all_second_ones(setting):
    args, data, _ = setting
    pairs = [pretrain.make_pair(data, hand, 0, args) for hand in (3, 1, 7)]
    batch = pretrain.collate(pairs)
    assert {key: (value.dtype, tuple(value.shape)) for key, value in batch.items()} == {
        "image": (torch.uint8, (6, 32, 32, 3)), "angle": (torch.float32, (6,)),
        "shift": (torch.float32, (6, 2)), "keypoints": (torch.float32, (6, 21, 2)),
        "weight_keypoints": (torch.float32, (6, 21, 2))}
    for view in (0, 1):
        for k, pair in enumerate(pairs):
            for key, value in batch.items():
                wanted = np.asarray(getattr(pair[view], key), value.numpy().dtype)
                assert np.array_equal(value[3 * view + k], wanted)


@pytest.fixture(scope="module")
def twins(extracted, tmp_path_factory):
    """A hands folder of two videos: the hands of one, and the same turned and resized,
    pictures too. -> folder, the angles by which they were turned (N,), as in
    cv2.getRotationMatrix2D."""
    one = load_hands(extracted)
    rng = np.random.default_rng(0)
    count = 40
    angles = rng.uniform(-180, 180, count)
    crops, keypoints = [], []
    for twin in (False, True):
        for i in range(count):
            image, points = read_crop(one, i), one.keypoints[i]
            if twin:
                middle = points.mean(0, dtype=np.float64)
                matrix = cv2.getRotationMatrix2D(middle.tolist(), angles[i], rng.uniform(0.6, 0.9))
                image = cv2.warpAffine(image, matrix, (one.side, one.side),
                                       borderMode=cv2.BORDER_REFLECT_101)
                points = points @ matrix[:, :2].T + matrix[:, 2]
            crops.append(cv2.imencode(".jpg", image[:, :, ::-1])[1])
            keypoints.append(points)
    rows = np.concatenate([one.rows[:count]] * 2)
    rows["video"] = np.repeat([0, 1], count)
    folder = tmp_path_factory.mktemp("twins")
    np.save(folder / "crops.npy", np.concatenate(crops))
    np.save(folder / "offsets.npy", np.cumsum([0, *map(len, crops)]))
    np.save(folder / "keypoints.npy", np.float32(keypoints))
    np.save(folder / "hands.npy", rows)
    (folder / "videos.txt").write_text("a\nb\n")
    run_here("mine_pairs.py", folder, "--top-k", 2)
    return folder, angles


def test_a_turned_and_resized_twin_is_found_and_the_pair_lies_alike(twins):
    folder, angles = twins
    neighbours, turns = np.load(folder / "neighbours.npy"), np.load(folder / "turns.npy")
    assert np.array_equal(neighbours[:, 0], np.roll(np.arange(80), 40))
    for found, expected in ((turns[:40, 0], -angles), (turns[40:, 0], angles)):
        assert np.abs((found - expected + 180) % 360 - 180).max() < 1
    args = parse(folder, "--out", "unused", *TINY, "--batch-size", 12)
    data = pretrain.load_data(args)
    for i in range(80):
        undone = []
        for view in pretrain.make_pair(data, i, 0, args):
            moved = view.keypoints - 15.5 - view.shift * 32
            back = cv2.getRotationMatrix2D((0, 0), -view.angle, 1)[:, :2]
            moved = (moved - moved.mean(0)) @ back.T
            undone.append(moved / np.linalg.norm(moved))
        assert np.abs(undone[0] - undone[1]).max() < 1e-3
    args = vary(args, weight_keypoints="original")
    for i in range(80):
        first, second = (view.weight_keypoints for view in pretrain.make_pair(data, i, 0, args))
        first, second = (points - points.mean(0) for points in (first, second))
        cosine = (first * second).sum() / np.linalg.norm(first) / np.linalg.norm(second)
        assert cosine > 1 - 1e-4  # the same way up; the sizes differ


def test_turns_of_another_mining_are_refused(twins, tmp_path):
    folder = Path(shutil.copytree(twins[0], tmp_path / "twins"))
    flags = (folder, "--out", tmp_path / "run", *TINY, "--batch-size", 12)
    turns, neighbours = np.load(folder / "turns.npy"), np.load(folder / "neighbours.npy")
    assert "--weight-pca" in refused("pretrain.py", *flags, *MEASURED)
    np.save(folder / "neighbours.npy", neighbours[:, ::-1].copy())
    assert "two minings" in refused("pretrain.py", *flags)
    np.save(folder / "neighbours.npy", neighbours)
    for change in (lambda t: t[:, :1], lambda t: t.astype(float),
                   lambda t: np.where(t == t[3, 0], np.nan, t),
                   lambda t: np.where(t == t[3, 0], t + 5, t)):
        np.save(folder / "turns.npy", change(turns))
        assert "turns.npy" in refused("pretrain.py", *flags)
    run_here("mine_pairs.py", folder, "--no-rotation-free")  # no turns any more
    assert not (folder / "turns.npy").exists()


def test_the_unit_of_the_shift_is_the_side_or_the_hand(setting):
    args, data, _ = setting
    side = pretrain.make_pair(data, 7, 0, args)
    for a, b in zip(side, pretrain.make_pair(data, 7, 0, vary(args, shift_unit="hand"))):
        assert np.array_equal(a.keypoints, b.keypoints) and np.abs(a.shift).max() > 1e-3
        assert np.allclose(b.shift, a.shift * 32 / np.ptp(a.keypoints, axis=0), rtol=1e-4)


def test_top_k_draws_among_the_first_k_and_peclr_takes_the_same_hand_again(setting, mined):
    args, data, _ = setting
    neighbours, keypoints = np.load(mined / "neighbours.npy"), np.load(mined / "keypoints.npy")
    scaled = keypoints * 32 / 224
    args = vary(args, weight_keypoints="original", top_k=3)
    for i in (3, 40):
        found = set()
        for epoch in range(40):
            first, second = pretrain.make_pair(data, i, epoch, args)
            assert np.allclose(first.weight_keypoints, scaled[i])
            found.add(int(np.abs(scaled - second.weight_keypoints).sum((1, 2)).argmin()))
        assert found == set(neighbours[i].tolist())
    first, second = pretrain.make_pair(data, 3, 0, vary(args, method="peclr"))
    assert np.array_equal(first.weight_keypoints, second.weight_keypoints)
    assert not np.array_equal(first.image, second.image)


def test_whichever_neighbour_is_drawn_lies_as_the_hand_does(twins):
    args = parse(twins[0], "--out", "unused", *TINY, "--batch-size", 12, "--top-k", 2)
    data = pretrain.load_data(args)
    for epoch in range(8):
        first, second = (v.weight_keypoints for v in pretrain.make_pair(data, 3, epoch, args))
        assert abs(best_turns(first, second)) < 0.1


def test_a_neighbour_that_is_missing_is_not_drawn(pairs):
    neighbours = np.load(pairs / "neighbours.npy")
    neighbours[3, 1:] = -1
    np.save(pairs / "neighbours.npy", neighbours)
    args = parse(pairs, "--out", "unused", *TINY, "--top-k", 3)
    data = pretrain.load_data(args)
    drawn = {pretrain.make_pair(data, 3, epoch, args)[1].weight_keypoints.tobytes()
             for epoch in range(20)}
    assert len(drawn) == 1


def test_border_and_colour_reach_the_views(setting):
    args, data, _ = setting
    points = data.folders[0].keypoints[3]
    image = read_crop(data.folders[0], 3)
    for border, colour in (("black", True), ("mirror", False)):
        asked = vary(args, border=border, no_colour=not colour, crop_margin=(4.0, 4.0))
        view = sample_view(np.random.default_rng((0, 0, 3, 0)), points, 224, 32,
                           half_side=(4.0, 4.0), colour=colour)
        expected = apply_view(view, image, points, 32, border)[0]
        assert np.array_equal(pretrain.make_pair(data, 3, 0, asked)[0].image, expected)


def test_the_seed_decides_the_order_and_the_views(setting):
    args, data, _ = setting
    plan = make_plan(args, data)
    orders = [list(pretrain.items_of_steps(0, 1, len(data.pool), plan, seed)) for seed in (0, 1)]
    assert orders[0] != orders[1]
    angles = [pretrain.make_pair(data, 3, 0, vary(args, seed=seed))[0].angle for seed in (0, 1)]
    assert angles[0] != angles[1]


def test_optional_augmentations_do_what_they_say_and_leave_the_geometry_alone(setting):
    args, data, _ = setting
    args = vary(args, input_size=64)
    plain = pretrain.make_pair(data, 3, 0, args)[0]
    shown = {}
    for name in pretrain.EXTRA_AUGMENTATIONS:
        changed = vary(args, **{name: 1.0})
        view, again = (pretrain.make_pair(data, 3, 0, changed)[0] for _ in range(2))
        shown[name] = view.image.astype(int)
        assert view.image.dtype == np.uint8 and np.array_equal(view.image, again.image)
        for key in ("keypoints", "angle", "shift", "weight_keypoints"):
            assert np.array_equal(getattr(view, key), getattr(plain, key))
    image = plain.image.astype(int)
    grey = image @ (0.299, 0.587, 0.114)
    assert np.abs(shown["colour_drop"] - grey[..., None]).max() <= 1
    rough = np.abs(np.diff(image, axis=1)).mean()
    assert 0 < np.abs(np.diff(shown["blur"], axis=1)).mean() < 0.99 * rough
    assert np.abs(np.diff(shown["noise"], axis=1)).mean() > 1.05 * rough
    inner = image[1:-1, 1:-1]
    across, along = np.zeros_like(inner), np.zeros_like(inner)
    for k, factor in ((-1, 1), (0, 2), (1, 1)):  # the definition of Sobel's filter
        across += factor * (image[1 + k:63 + k, 2:] - image[1 + k:63 + k, :-2])
        along += factor * (image[2:, 1 + k:63 + k] - image[:-2, 1 + k:63 + k])
    assert np.abs(shown["sobel"][1:-1, 1:-1] - np.hypot(across, along).clip(0, 255)).max() <= 1
    lost = (shown["cut_out"] != image).any(2)
    y, x = np.nonzero(lost)
    assert ((shown["cut_out"][lost] == 0).all() and max(np.ptp(y), np.ptp(x)) < 0.4 * 64
            and lost.any())
    rare = vary(args, colour_drop=0.3)
    views = [view.image for i in range(100) for view in pretrain.make_pair(data, i % 60, i, rare)]
    grey = sum((view[..., :1] == view).all() for view in views)
    assert 35 <= grey <= 85  # 60 expected, 4 deviations


@pytest.fixture
def many_videos(mined, tmp_path):
    """The mined folder as if its hands came from 60 videos."""
    folder = Path(shutil.copytree(mined, tmp_path / "many"))
    rows = np.load(folder / "hands.npy")
    rows["video"] = np.arange(len(rows)) * 60 // len(rows)
    np.save(folder / "hands.npy", rows)
    (folder / "videos.txt").write_text("".join(f"{k}\n" for k in range(60)))
    return folder


def test_what_the_probe_keeps_is_seen_by_no_step(many_videos):
    args = parse(many_videos, "--out", "unused", *TINY, "--batch-size", 12, "--top-k", 3)
    data = pretrain.load_data(args)
    video = np.load(many_videos / "hands.npy")["video"]
    held = set(video[data.probe[:, 1]])
    assert len(held) == 3 and not held & set(video[data.pool[:, 1]])
    assert set(data.probe[:, 1]) == set(np.flatnonzero(np.isin(video, [*held])))
    shown = data.neighbours[0][data.pool[:, 1]]
    assert not held & set(video[shown[shown >= 0]]) and (shown[:, 0] >= 0).all()
    found = np.load(many_videos / "neighbours.npy")
    lost = np.isin(video, [*held]) | np.isin(video[found[:, 0]], [*held])
    assert len(data.pool) == (~lost).sum()  # nobody else is left out
    few = pretrain.load_data(vary(args, probe=4))
    assert len(few.probe) == 4 and len(set(video[few.probe[:, 1]])) == 2
    hours = np.repeat(np.arange(60), 3600)  # videos of an hour: two of them hold more than enough
    kept, shown = pretrain.choose_probe(hours, 2000, 0)
    assert kept.sum() == 7200 and kept[shown].all() and (np.diff(shown) > 0).all()
    assert 1600 < len(shown) <= 2000 and np.ptp(np.unique(hours[shown], return_counts=True)[1]) == 0
    rare = np.arange(40)  # videos of one hand: of two hands neither has a choice
    assert not pretrain.choose_probe(rare, 2000, 0)[0].any()
    off = pretrain.load_data(vary(args, probe=0))
    assert len(off.pool) == len(video) and not len(off.probe)
    rows = np.load(many_videos / "hands.npy")
    rows["video"] = (np.arange(len(rows)) + 1) * 60 // (len(rows) + 1)
    np.save(many_videos / "hands.npy", rows)
    assert pretrain.load_data(args).digest != data.digest  # others are kept out
    assert pretrain.load_data(vary(args, probe=0)).digest == off.digest


def test_the_probe_is_one_for_the_nearest_pose_and_zero_for_chance(many_videos):
    args = parse(many_videos, "--out", "unused", *TINY)
    data = pretrain.load_data(args)
    probe = pretrain.load_probe(data, args)
    count = len(data.probe)
    hands = load_hands(many_videos)
    poses = as_poses(hands.keypoints[data.probe[:, 1]], hands.side, True)
    video = hands.rows["video"][data.probe[:, 1]]

    class Shown(torch.nn.Module):  # features of a hand, whose number is in its first pixel
        def forward(self, images):
            number = images.permute(0, 2, 3, 1)[:, 0, 0] * deviation + mean
            return self.features[number[:, 0].round().long()]

    mean, deviation = COLOURS
    probe.images[:, 0, 0, 0] = torch.arange(count).byte()
    shown = Shown()
    shown.features = torch.randn(count, 8, generator=torch.manual_seed(0))
    found, nearest, others = [], [], []
    for i in range(count):
        candidates = np.flatnonzero(video != video[i])
        apart = [np.linalg.norm(poses[i] - poses[k]) for k in candidates]
        alike = torch.cosine_similarity(shown.features[i], shown.features[candidates])
        found.append(apart[alike.argmax()])
        nearest.append(min(apart))
        others += apart
    expected = (np.mean(others) - np.mean(found)) / (np.mean(others) - np.mean(nearest))
    score = pretrain.probe_score(shown, probe, torch.device("cpu"))
    assert score == pytest.approx(expected, abs=1e-6) and shown.training


def test_the_probe_looks_at_each_hand_as_it_lies(many_videos):
    args = parse(many_videos, "--out", "unused", *TINY)
    data = pretrain.load_data(args)
    hands = data.folders[0]
    for image, (_, row) in zip(pretrain.load_probe(data, args).images, data.probe):
        view = sample_view(np.random.default_rng(0), hands.keypoints[row], hands.side, 32,
                           rotation=0, half_side=(1.2, 1.2), move=0, colour=False)
        seen = apply_view(view, read_crop(hands, row), hands.keypoints[row], 32)[0]
        assert np.array_equal(image, seen)


def test_videos_of_two_folders_are_different_ones(many_videos):
    args = parse(many_videos, many_videos, "--out", "unused", *TINY)
    data = pretrain.load_data(args)
    others = pretrain.load_probe(data, args).others.numpy()
    assert others[data.probe[:, None, 0] != data.probe[:, 0]].all() and not others.diagonal().any()


def test_the_probe_leaves_the_running_statistics_alone(many_videos):
    args = parse(many_videos, "--out", "unused", *TINY)
    backbone = make_model(args).backbone.train()
    before = copy.deepcopy(backbone.state_dict())
    probe = pretrain.load_probe(pretrain.load_data(args), args)
    pretrain.probe_score(backbone, probe, torch.device("cpu"))
    assert same(before, backbone.state_dict()) and backbone.training


def test_the_seed_chooses_the_probes_videos():
    video = np.repeat(np.arange(100), 9)
    assert not np.array_equal(*(pretrain.choose_probe(video, 100, seed)[0] for seed in (0, 1)))


def test_the_probe_is_logged_after_each_epoch_and_closes_the_run(many_videos, tmp_path):
    out = tmp_path / "run"
    printed = run_here("pretrain.py", many_videos, "--out", out, *TINY, "--batch-size", 20,
                       "--epochs", 2, "--weighting", "soft")
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    logged = [(row["epoch"], row["probe"]) for row in rows if "probe" in row]
    assert [epoch for epoch, _ in logged] == [1, 2] and all(-1 < score <= 1 for _, score in logged)
    closing = dict(re.findall(r"^(\w+): (-?[\d.]+)$", printed, re.M))
    assert float(closing["probe"]) == pytest.approx(logged[-1][1], rel=1e-3)
    assert {"loss", "positive_similarity", "negative_similarity", "views_per_s",
            "memory_gb"} <= closing.keys()


def test_paper_sets_the_papers_values_and_other_flags_still_count(mined):
    ours = parse(mined, "--out", "unused")
    paper = parse(mined, "--out", "unused", "--paper")
    differ = {name for name in vars(ours) if getattr(ours, name) != getattr(paper, name)}
    assert differ == {"paper", "weighting", "border", "crop_move", "temperature",
                      "weight_keypoints", "keypoint_loss"}
    assert (paper.weighting, paper.border, paper.crop_move) == ("linear", "black", 15 / 224)
    assert (ours.keypoint_loss, paper.keypoint_loss) == (3, 0)
    mixed = parse(mined, "--out", "unused", "--paper", "--border", "mirror")
    assert (mixed.weighting, mixed.border) == ("linear", "mirror")
    peclr = parse(mined, "--out", "unused", "--paper", "--method", "peclr")
    assert (peclr.weighting, peclr.border) == ("none", "black")


def test_the_defaults_are_those_of_the_readme(mined):
    args = parse(mined, "--out", "x")
    assert (args.temperature, args.target_temperature, args.warmup_epochs) == (0.2, 0.06, 10)


def test_the_micro_batch_is_the_largest_divisor_of_the_share_up_to_512(mined):
    for batch, ranks, expected in ((8192, 1, 512), (1000, 1, 500), (1536, 2, 384), (60, 1, 60),
                                   (1022, 2, 511)):
        args = parse(mined, "--out", "unused", "--batch-size", batch)
        plan = pretrain.make_plan(args, 10 ** 6, 0, ranks, torch.device("cpu"))
        assert (plan.micro_batch, plan.pieces) == (expected, batch // ranks // expected)


# --------------------------------------------------------------------------------------------- runs

@pytest.fixture(scope="module")
def straight(mined, tmp_path_factory):
    """A run of two epochs without a stop."""
    out = tmp_path_factory.mktemp("straight") / "run"
    run("pretrain.py", mined, "--out", out, *TINY, *RUN)
    return out


def test_a_run_writes_what_it_should(straight, mined):
    log = [json.loads(line) for line in (straight / "log.jsonl").read_text().splitlines()]
    steps = 2 * (len(np.load(mined / "keypoints.npy")) // 40)
    assert log[0]["args"]["batch_size"] == 40 and log[-1]["step"] == steps and log[-1]["epoch"] == 2
    assert log[1] == {"hands": (np.load(mined / "neighbours.npy")[:, 0] >= 0).sum()}
    assert all(np.isfinite(row["loss"]) and 0 < row["mean_neg_weight"] < 1 for row in log[2:])
    assert all(cv2.imread(str(straight / name)) is not None for name in ("curves.png", "views.jpg"))
    assert {path.name for path in straight.iterdir()} == {
        "backbone.pt", "checkpoint.pt", "log.jsonl", "curves.png", "views.jpg", ".lock"}


def test_each_step_is_taken_at_its_learning_rate(straight):
    rows = [json.loads(line) for line in (straight / "log.jsonl").read_text().splitlines()][2:]
    steps = rows[-1]["step"]
    assert [row["lr"] for row in rows] == pytest.approx(
        [pretrain.learning_rate(row["step"] - 1, steps, 0, 3.2e-3) for row in rows])


def test_the_backbone_is_torchvisions_without_its_head(straight):
    network = torchvision.models.resnet18()
    torch.manual_seed(0)
    before = pretrain.SimHandModel("resnet18", "none", regress=False).backbone.conv1.weight
    state = torch.load(straight / "backbone.pt", weights_only=True)
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert sorted(missing) == ["fc.bias", "fc.weight"] and not unexpected
    assert not torch.equal(network.conv1.weight, before)
    assert torch.isfinite(network.eval()(torch.rand(1, 3, 64, 64))).all()


def wait_for(path, process):
    """Until a running process has written a file."""
    while not path.exists():
        assert process.is_alive(), f"ended before it wrote {path}"
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_run_ends_bit_for_bit_like_a_straight_one(straight, mined, tmp_path, number):
    out = tmp_path / "run"
    arguments = (mined, "--out", out, *TINY[:-1], 1, *RUN, "--save-minutes", 0)
    log = tmp_path / "log"
    process = fork(["pretrain.py", *arguments], log, os.devnull)
    wait_for(out / "checkpoint.pt", process)
    os.killpg(process.pid, number)
    process.join()
    if number == signal.SIGTERM:
        assert process.exitcode == 0 and "stopped by SIGTERM" in log.read_text()
    else:
        assert process.exitcode == -number
    assert (not (out / "backbone.pt").exists()
            and load_checkpoint(out / "checkpoint.pt")["step"] < 8)
    run("pretrain.py", *arguments)
    assert same(load_checkpoint(out / "backbone.pt"), load_checkpoint(straight / "backbone.pt"))
    a, b = (load_checkpoint(folder / "checkpoint.pt") for folder in (out, straight))
    assert same({k: v for k, v in a.items() if k != "args"},
                {k: v for k, v in b.items() if k != "args"})


def test_a_full_disk_ends_in_one_line_and_the_run_goes_on_when_there_is_space(
        straight, mined, tmp_path):
    """A limit on the size of files stands for the full disk; loader processes must not keep
    the run alive."""
    arguments = (mined, "--out", tmp_path / "run", *TINY[:-1], 1, *RUN)
    command = shlex.join(map(str, [sys.executable, ROOT / "pretrain.py", *arguments]))
    result = subprocess.run(["bash", "-c", f"ulimit -f 20000; {command}"], capture_output=True,
                            text=True, timeout=100, env=ENVIRONMENT)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].endswith("could not be written: File too large")
    assert (tmp_path / "run" / "log.jsonl").exists()
    assert not list((tmp_path / "run").glob("*.pt")) and not list((tmp_path / "run").glob(".*.tmp"))
    run_here("pretrain.py", *arguments)
    assert same(load_checkpoint(tmp_path / "run" / "backbone.pt"),
                load_checkpoint(straight / "backbone.pt"))


def test_a_finished_run_given_again_changes_nothing(straight, mined, tmp_path):
    out = Path(shutil.copytree(straight, tmp_path / "run"))
    assert "positive_similarity: " in run_here("pretrain.py", mined, "--out", out, *TINY, *RUN)
    assert same(load_checkpoint(out / "backbone.pt"), load_checkpoint(straight / "backbone.pt"))
    line = refused("pretrain.py", mined, "--out", out, *TINY, "--batch-size", 40, "--epochs", 3,
                   "--lr", 1)
    for words in ("--epochs was 2, is 3", "--lr was 0.0032, is 1.0", "--micro-batch was 20, is 40"):
        assert words in line


def test_a_run_goes_on_without_the_weights_that_it_started_from(straight, mined, tmp_path):
    out = Path(shutil.copytree(straight, tmp_path / "run"))
    content = load_checkpoint(out / "checkpoint.pt")
    content["args"]["weights"] = str(tmp_path / "gone.pt")
    torch.save(content, out / "checkpoint.pt")
    arguments = [tmp_path / "gone.pt" if a == "none" else a for a in TINY]
    run_here("pretrain.py", mined, "--out", out, *arguments, *RUN)
    assert same(load_checkpoint(out / "backbone.pt"), load_checkpoint(straight / "backbone.pt"))


def test_other_pairs_are_another_run(straight, pairs, mined, tmp_path):
    out = Path(shutil.copytree(straight, tmp_path / "run"))
    neighbours = np.load(pairs / "neighbours.npy")
    np.save(pairs / "neighbours.npy", neighbours[:, ::-1].copy())
    log = load_checkpoint(out / "checkpoint.pt")
    log["args"]["hands"] = [str(pairs)]
    torch.save(log, out / "checkpoint.pt")
    line = refused("pretrain.py", pairs, "--out", out, *TINY, *RUN)
    assert "was trained on other hands, pairs or labels" in line
    np.save(pairs / "neighbours.npy", neighbours)
    plain = parse(pairs, "--out", "x", *TINY)
    measured = parse(pairs, "--out", "x", *TINY, *MEASURED)
    digests = {pretrain.load_data(args).digest for args in (plain, measured)}
    np.save(pairs / "pca.npy", np.load(pairs / "pca.npy")[::-1].copy())
    digests.add(pretrain.load_data(measured).digest)
    offsets = np.load(pairs / "offsets.npy")
    offsets[1] += 1
    np.save(pairs / "offsets.npy", offsets)
    digests.add(pretrain.load_data(plain).digest)
    np.save(pairs / "keypoints.npy", np.load(pairs / "keypoints.npy") + 1)
    digests.add(pretrain.load_data(plain).digest)
    assert len(digests) == 5
    np.save(pairs / "neighbours.npy", np.arange(len(neighbours))[:, None])
    assert "a hand is its own neighbour" in refused(
        "pretrain.py", pairs, "--out", tmp_path / "new", *TINY)


def test_a_loss_that_is_not_finite_stops_the_run(mined, tmp_path):
    line = refused("pretrain.py", mined, "--out", tmp_path / "run", *TINY, "--batch-size", 20,
                   "--epochs", 2, "--lr", 1e30, "--optimizer", "adam", "--weighting", "linear")
    assert "loss is not finite by step 2;" in line
    out = tmp_path / "kept"  # one step an epoch: the state after the first is finite, and stays
    line = refused("pretrain.py", mined, "--out", out, *TINY, "--batch-size", 100, "--epochs", 9,
                   "--warmup-epochs", 0, "--lr", 1e30, "--optimizer", "adam", "--save-minutes", 0)
    assert "loss is not finite by step" in line
    state = load_checkpoint(out / "checkpoint.pt")
    assert (state["step"] == 1 and "step 2;" in line
            and all(v.isfinite().all() for v in state["model"].values()))


def test_a_weighted_variant_runs(mined, tmp_path):
    run_here("pretrain.py", mined, "--out", tmp_path / "run", *TINY, "--batch-size", 60,
             "--epochs", 1, "--weight-on", "neg", *MEASURED)
    assert (tmp_path / "run" / "backbone.pt").exists()


def test_flags_without_effect_are_refused(mined):
    for flags, words in ((("--weight-on", "pos"), "with --weighting soft"),
                         (("--weight-pca", "--weighting", "none"), "without --weighting"),
                         (("--weight-keypoints", "original", "--weighting", "none"),
                          "without --weighting"),
                         (("--weight-pca", "--weighting", "soft"), "with --weighting soft"),
                         (("--slope-pos", 2, "--weighting", "linear"), "--weighting nonlinear"),
                         (("--slope-neg", 2), "without --weighting nonlinear"),
                         (("--slope-neg", 2, "--weighting", "nonlinear", "--weight-on", "pos"),
                          "with --weight-on pos"),
                         (("--shift-unit", "hand", "--method", "simclr"), "no shift is undone"),
                         (("--shift-unit", "hand", "--equivariance", "rotation"),
                          "no shift is undone"),
                         (("--temperature", 2, "--method", "keypoints"), "--method keypoints"),
                         (("--top-k", 2, "--method", "peclr"), "without --method simhand")):
        line = refused("pretrain.py", mined, "--out", "unused", *flags)
        assert f"{flags[0]} has no effect" in line and words in line


def test_numbers_that_cannot_be_are_refused(mined):
    for flags, words in ((("--steps", 0), "--steps must be above 0"),
                         (("--probe", 3), "expected 0, or 4 hands of each folder or more"),
                         (("--batch-size", 521), "only 1 pairs would pass the network together")):
        assert words in refused("pretrain.py", mined, "--out", "unused", *TINY, *flags)


def test_a_dry_run_tells_the_time_and_writes_nothing(mined, straight, tmp_path):
    arguments = (*TINY, *RUN, "--steps", 4)
    result = run("pretrain.py", mined, "--out", tmp_path / "run", *arguments)
    rate, seconds, memory, steps, hours = map(float, re.search(
        r"dry run: (\d+) views/s, ([\d.]+) s a step, ([\d.]+) GB of cpu memory .*; all (\d+) "
        r"steps would take ([\d.]+) hours", result.stdout).groups())
    assert rate == pytest.approx(80 / seconds, rel=0.01, abs=0.6)  # it is printed without decimals
    assert hours == pytest.approx(steps * seconds / 3600, abs=0.006)
    assert 0.2 < memory < 8 and steps == 2 * (len(np.load(mined / "keypoints.npy")) // 40)
    assert not (tmp_path / "run").exists()
    before = {path.name: path.stat().st_mtime_ns for path in straight.iterdir()}
    # Beside a run of other ones.
    command = ("pretrain.py", mined, "--out", straight, *arguments[:-1], 2, "--lr", 1)
    run_here(*command)
    assert before == {path.name: path.stat().st_mtime_ns for path in straight.iterdir()}


def test_a_loader_process_that_dies_ends_in_one_line(mined, tmp_path):
    """As where the memory or /dev/shm is full."""
    log = tmp_path / "log"
    process = fork(["pretrain.py", mined, "--out", tmp_path / "run", *TINY[:-1], 1, "--batch-size",
                    20, "--epochs", 500, "--save-minutes", 0], os.devnull, log)
    wait_for(tmp_path / "run" / "checkpoint.pt", process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    process.join(60)
    errors = log.read_text()
    assert process.exitcode == 2 and "Traceback" not in errors
    last = errors.splitlines()[-1]  # what failed first depends on when the process died
    assert last.startswith("pretrain.py: a loader process failed (")
    assert last.endswith("where memory or /dev/shm is full, lower --workers")


def test_sigterm_at_one_rank_stops_all_and_the_same_command_goes_on(mined, tmp_path):
    """As in preemption: status 0."""
    out = tmp_path / "run"
    arguments = (mined, "--out", out, *TINY, "--batch-size", 40, "--epochs", 1, "--save-minutes", 0)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               ROOT / "pretrain.py", *arguments]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    while not (out / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(ranks[-1]), signal.SIGTERM)
    printed, errors = process.communicate(timeout=100)
    assert process.returncode == 0 and "stopped by SIGTERM after step" in printed, errors
    assert not (out / "backbone.pt").exists()
    torchrun("pretrain.py", *arguments)
    steps = len(np.load(mined / "keypoints.npy")) // 40
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()[2:]]
    assert [row["step"] for row in rows][-1] == load_checkpoint(out / "checkpoint.pt")["step"]
    assert rows[-1]["step"] == steps and (out / "backbone.pt").exists()


def test_unmined_folders_are_used_whole_by_peclr_only(extracted, tmp_path):
    assert "neighbours.npy: missing" in refused(
        "pretrain.py", extracted, "--out", tmp_path / "run", *TINY)
    args = parse(extracted, "--out", "unused", *TINY, "--method", "simclr")
    assert args.rotation == 0 and args.crop_margin == [1.25, 1.25]
    data = pretrain.load_data(args)
    assert len(data.pool) == len(np.load(extracted / "keypoints.npy"))


def test_several_folders_and_pairs_elsewhere(mined, extracted, tmp_path):
    args = parse(mined, extracted, "--pairs", mined, mined, "--out", "unused", *TINY)
    data, n = pretrain.load_data(args), len(np.load(mined / "keypoints.npy"))
    assert data.pool.tolist() == [[k, i] for k in (0, 1) for i in range(n)]
    line = refused("pretrain.py", mined, extracted, "--pairs", mined, "--out", tmp_path / "run")
    assert "expected one for each" in line
    for method in ("simhand", "peclr"):  # pairs that were asked for are never done without
        assert "neighbours.npy: missing" in refused(
            "pretrain.py", mined, "--pairs", tmp_path / "typo", "--out", tmp_path / "run", *TINY,
            "--method", method)


def test_a_hand_and_its_positive_are_shown_out_of_their_own_folder(mined, pairs):
    np.save(pairs / "keypoints.npy", np.load(pairs / "keypoints.npy") + 1)
    args = parse(mined, pairs, "--out", "unused", *TINY)
    data = pretrain.load_data(args)
    for hand, folder in ((5, mined), (len(data.pool) // 2 + 5, pairs)):
        keypoints = np.load(folder / "keypoints.npy") / 7  # 224 -> 32 pixels
        rows = 5, np.load(folder / "neighbours.npy")[5, 0]
        for row, view in zip(rows, pretrain.make_pair(data, hand, 0, args)):
            assert np.allclose(view.weight_keypoints, keypoints[row], atol=1e-4)


def test_one_pca_measures_all_folders(mined, pairs):
    np.save(pairs / "pca.npy", np.load(pairs / "pca.npy")[::-1].copy())
    data = pretrain.load_data(parse(mined, pairs, "--out", "unused", *TINY, *MEASURED))
    assert np.array_equal(data.pca, np.load(mined / "pca.npy")[1:])


def test_rows_without_a_neighbour_are_not_used(pairs):
    neighbours = np.load(pairs / "neighbours.npy")
    neighbours[::2] = -1
    np.save(pairs / "neighbours.npy", neighbours)
    for method in ("simhand", "peclr"):
        data = pretrain.load_data(parse(pairs, "--out", "unused", *TINY, "--method", method))
        assert data.pool[:, 1].tolist() == list(range(1, len(neighbours), 2))


def test_bad_input_is_refused_in_one_line(pairs, tmp_path):
    def line(*arguments):
        return refused("pretrain.py", pairs, "--out", tmp_path / "run", *TINY, *arguments)

    run("pretrain.py", tmp_path / "nowhere", "--out", tmp_path / "run", status=2)
    assert "fewer than --batch-size 8192" in line()
    assert "3 neighbours a hand were mined, --top-k is 4" in line("--batch-size", 8, "--top-k", 4)
    assert "must be below --epochs" in line("--epochs", 5, "--warmup-epochs", 5)
    for flag, value in (("--lr", "nan"), ("--lr", "inf"), ("--seed", -1), ("--workers", -1),
                        ("--rotation", "nan")):
        assert f"{flag} is" in line(flag, value)
    for device in ("cuda:99", "foo"):  # wrong with and without a GPU
        assert f"--device {device}" in line("--device", device)
    assert "must be a multiple of" in line("--batch-size", 9, "--micro-batch", 2)
    assert "one has no negatives" in line("--batch-size", 1)
    assert "is a hands folder, choose another --out" in refused(
        "pretrain.py", pairs, "--out", pairs, *TINY, "--batch-size", 8)
    assert "--seed is" in line("--batch-size", 8, "--seed", 2 ** 64)
    assert "must lie in 0..1" in line("--batch-size", 8, "--blur", 1.5)
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "other.pt")
    assert "other.pt: not the weights of a resnet18" in line(
        "--batch-size", 8, "--weights", tmp_path / "other.pt")
    assert "nowhere.pt: missing" in line("--batch-size", 8, "--weights", tmp_path / "nowhere.pt")
    for content, word in ((np.zeros((5, 1), np.int64), "expected int64"),
                          (np.load(pairs / "neighbours.npy") + 10 ** 6, "values in -1")):
        np.save(pairs / "neighbours.npy", content)
        assert "neighbours.npy" in (found := line("--batch-size", 8)) and word in found
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_a_damaged_crop_is_named(pairs, tmp_path):
    crops, offsets = np.load(pairs / "crops.npy"), np.load(pairs / "offsets.npy")
    crops[offsets[4]:offsets[5]] = 0
    np.save(pairs / "crops.npy", crops)
    arguments = (pairs, "--out", tmp_path / "run", "--batch-size", 60, "--method", "peclr",
                 "--epochs", 1)
    for workers in (0, 1):  # an error in a loader's process arrives as one line too
        line = refused("pretrain.py", *arguments, *TINY[:-1], workers)
        assert "crops.npy: crop 4, at" in line
    jpegs = [crops[start:end] for start, end in zip(offsets, offsets[1:])]
    jpegs[4] = cv2.imencode(".jpg", np.zeros((100, 100, 3), np.uint8))[1]  # of another side
    np.save(pairs / "crops.npy", np.concatenate(jpegs))
    np.save(pairs / "offsets.npy", np.cumsum([0, *map(len, jpegs)]))
    assert "crops.npy: crop 4, at" in refused("pretrain.py", *arguments, *TINY)
