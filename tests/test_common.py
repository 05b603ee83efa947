"""The method against slow references, and the files against damage."""

import argparse
import json
import math
import multiprocessing
import os
import pickle
import re
import resource
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

import common
from common import (InputError, apply_view, crop_matrix, load_backbone, move_points, nt_xent,
                    pair_weights, rescale_points, sample_view, soft_targets, undo_view)
from conftest import ENVIRONMENT, ROOT


def random_hand(rng, side=224):
    return (rng.uniform(0.2, 0.8, (21, 2)) * side).astype(np.float32)


def random_unit(n, dims, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.functional.normalize(
        torch.randn(n, dims, generator=generator, dtype=dtype), dim=1) for _ in "12"]


# ----------------------------------------------------------------------------------------- geometry

def dot(side, x, y):
    """A picture of one soft dot, 0 to 1."""
    row, column = np.indices((side, side))
    return np.exp(-((column - x) ** 2 + (row - y) ** 2) / 8).astype(np.float32)


def centre_of_mass(image):
    row, column = np.indices(image.shape)
    return np.array([(image * column).sum(), (image * row).sum()]) / image.sum()


@pytest.mark.parametrize("output", [120, 60, 30, 20])
def test_rescaled_points_lie_where_cv2_resize_puts_a_dot(output):
    for x, y in ((20, 33), (41.5, 18.25)):
        shown = cv2.resize(dot(60, x, y), (output, output), interpolation=cv2.INTER_AREA)
        expected = rescale_points(np.array([x, y]), output / 60)
        assert np.abs(centre_of_mass(shown) - expected).max() < 0.01


def test_a_straight_crop_shows_what_cv2_resize_makes_of_the_cut_out_square():
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    image = cv2.GaussianBlur(noise, (0, 0), 2)
    expected = cv2.resize(image[10:42, 20:52], (128, 128), interpolation=cv2.INTER_LINEAR)
    matrix = crop_matrix((19.5 + 16, 9.5 + 16), 32, 128)
    shown = cv2.warpAffine(image, matrix, (128, 128))
    inner = slice(2, -2)  # at its edge resize repeats pixels, where the crop shows what lies beyond
    apart = np.abs(shown.astype(int) - expected)[inner, inner]
    assert apart.max() <= 1 and np.ptp(expected) > 50


@pytest.mark.parametrize("angle", [0, 30, -110])
def test_a_turned_crop_is_opencvs_rotation_about_its_centre(angle):
    centre = (71.0, 93.5)
    expected = cv2.getRotationMatrix2D(centre, angle, 128 / 50)
    expected[:, 2] += 63.5 - np.array(centre)  # and then the centre is moved to the crop's
    assert np.allclose(crop_matrix(centre, 50, 128, angle), expected)


def test_a_shift_moves_the_content_by_a_share_of_the_output():
    still = crop_matrix((71, 93.5), 50, 128, 30)
    moved = crop_matrix((71, 93.5), 50, 128, 30, (0.25, -0.125))
    assert np.allclose(moved - still, [[0, 0, 32], [0, 0, -16]])


def test_points_of_any_shape_are_moved_as_opencv_moves_them():
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(2, 3))
    points = rng.normal(size=(5, 21, 2))
    expected = cv2.transform(points, matrix)
    assert np.allclose(move_points(matrix, points), expected)
    assert np.allclose(move_points(matrix, points[3]), expected[3])
    assert np.allclose(move_points(matrix, points[3, 7]), expected[3, 7])


# -------------------------------------------------------------------------------------------- views

def test_a_dot_at_a_keypoint_is_found_at_the_transformed_keypoint():
    rng = np.random.default_rng(0)
    tested = 0
    for _ in range(30):
        keypoints = random_hand(rng)
        view = sample_view(rng, keypoints, 224, 128, colour=False)
        image = np.zeros((224, 224, 3), np.float32)
        where = np.round(keypoints[rng.integers(21)])
        cv2.circle(image, where.astype(int).tolist(), 4, (1, 1, 1), -1)
        # One dot, not its mirror too.
        seen, (there,) = apply_view(view, image, where[None], 128, "black")
        mass = seen[..., 0]
        if 12 < there.min() and there.max() < 115:
            found = np.array([(mass.sum(k) * np.arange(128)).sum() / mass.sum() for k in (0, 1)])
            assert np.abs(found - there).max() < 0.15
            tested += 1
    assert tested > 10


def test_a_view_is_turned_as_opencv_turns_and_shows_black_outside():
    rng = np.random.default_rng(1)
    keypoints = random_hand(rng)
    view = sample_view(rng, keypoints, 224, 128, half_side=(6, 6), colour=False)
    turn = view.matrix[:, :2]
    expected = cv2.getRotationMatrix2D((0, 0), view.angle, 1)[:, :2]
    assert np.allclose(turn / np.linalg.norm(turn[0]), expected, atol=1e-6)
    image, _ = apply_view(view, np.full((224, 224, 3), 200, np.uint8), keypoints, 128, "black")
    assert not image[0].any() and image.max() == 200  # a half side of 6 sees far beyond the crop


def test_beyond_a_crop_a_view_shows_the_mirrored_crop():
    keypoints = random_hand(np.random.default_rng(1), side=20)
    image = np.random.default_rng(2).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    view = common.View(np.float64([[1, 0, 14], [0, 1, 14]]))  # moved by 14 pixels, 48 wide
    seen, _ = apply_view(view, image, keypoints, 48)
    place = np.abs((np.arange(48) - 14 + 19) % 38 - 19)  # 14 13 .. 1 0 1 .. 19 18 ..
    assert np.array_equal(seen, image[place][:, place])


def test_the_best_turn_against_a_search_over_all_turns():
    rng = np.random.default_rng(3)
    keypoints, others = rng.normal(size=(2, 40, 21, 2)) * (30, 50)
    angles = np.radians(np.arange(0, 360, 0.25))
    for mine, other, found in zip(keypoints, others, common.best_turns(keypoints, others)):
        x, y = (other - other.mean(0)).T
        # Counter-clockwise, y down.
        turned = np.stack([np.outer(np.cos(angles), x) + np.outer(np.sin(angles), y),
                           np.outer(np.cos(angles), y) - np.outer(np.sin(angles), x)], 2)
        gaps = np.square(turned - (mine - mine.mean(0))).sum((1, 2))
        best = np.degrees(angles[gaps.argmin()])
        assert abs((best - found + 180) % 360 - 180) < 0.2


def test_a_turned_view_shows_the_hand_as_its_partner_lies():
    """A hand and its picture turned by 70 degrees: with a turn of -70 both views of one
    generator are the same."""
    rng = np.random.default_rng(4)
    keypoints = random_hand(rng)
    matrix = cv2.getRotationMatrix2D((111.5, 111.5), 70, 1)
    turned = (keypoints @ matrix[:, :2].T + matrix[:, 2]).astype(np.float32)
    straight = sample_view(np.random.default_rng(5), keypoints, 224, 128)
    back = sample_view(np.random.default_rng(5), turned, 224, 128, turn=-70.0)
    assert back.angle == straight.angle and np.allclose(back.shift, straight.shift)
    empty = np.zeros((224, 224, 3), np.uint8)
    seen, also = (apply_view(view, empty, points, 128)[1]
                  for view, points in ((straight, keypoints), (back, turned)))
    assert np.abs(seen - also).max() < 1e-3


def test_keypoints_follow_from_the_reported_shift_and_angle():
    """DESIGN's test of the geometry: the views' keypoints, moved and turned back, agree to
    0.1 %."""
    rng = np.random.default_rng(2)
    for _ in range(200):
        keypoints, undone = random_hand(rng), []
        for _ in range(2):
            view = sample_view(rng, keypoints, 224, 128)
            _, seen = apply_view(view, np.zeros((224, 224, 3), np.uint8), keypoints, 128)
            moved = seen - 63.5 - view.shift * 128
            assert np.abs(moved.mean(0)).max() < 1e-3  # the shift is where the hand's centre lies
            back = cv2.getRotationMatrix2D((0, 0), -view.angle, 1)[:, :2]
            undone.append(((moved - moved.mean(0)) @ back.T + moved.mean(0)).ravel())
        a, b = (u / np.linalg.norm(u) for u in undone)
        assert np.abs(a - b).max() < 1e-3


def test_undo_view_undoes_views_of_keypoints_in_the_unit_of_the_hand():
    """With the shift in units of the hand's own extent, undo_view undoes the view of a
    projection that is the hand."""
    rng = np.random.default_rng(3)
    for _ in range(100):
        keypoints, undone = random_hand(rng), []
        for _ in range(2):
            view = sample_view(rng, keypoints, 224, 128)
            _, seen = apply_view(view, np.zeros((224, 224, 3), np.uint8), keypoints, 128)
            shift = view.shift * 128 / np.ptp(seen, axis=0)
            projection = torch.nn.functional.normalize(
                torch.from_numpy(seen - 63.5)[None].flatten(1), dim=1)
            back = undo_view(projection.view(1, 21, 2), torch.tensor([view.angle]),
                             torch.from_numpy(shift)[None])
            undone.append(torch.nn.functional.normalize(back.flatten(1), dim=1))
        assert (undone[0] - undone[1]).abs().max() < 1e-3


def test_undo_view_against_a_loop_and_without_gradient_through_range_and_mean():
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(5, 64, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    angle = torch.rand(5, dtype=torch.float64) * 90 - 45
    shift = torch.rand(5, 2, dtype=torch.float64) - 0.5
    before = p.detach().clone()
    out = undo_view(p, angle, shift)
    assert out is not p and torch.equal(p, before)
    for n in range(5):
        points = p.detach()[n].numpy()
        moved = points - shift[n].numpy() * (points.max(0) - points.min(0))
        turned = np.empty_like(moved)
        for m, (x, y) in enumerate(moved - moved.mean(0)):
            a = math.radians(angle[n])
            turned[m] = x * math.cos(a) - y * math.sin(a), x * math.sin(a) + y * math.cos(a)
        assert np.allclose(out[n].detach().numpy(), turned + moved.mean(0), atol=1e-12)
    weight = torch.randn(5, 64, 2, generator=generator, dtype=torch.float64)
    (out * weight).sum().backward()
    # Range and mean constant: the gradient is the weight turned forward, point by point.
    for n in range(5):
        turn = torch.from_numpy(cv2.getRotationMatrix2D((0, 0), angle[n].item(), 1)[:, :2])
        assert torch.allclose(p.grad[n], weight[n] @ turn.T, atol=1e-12)


def test_a_view_is_drawn_in_this_order():
    """As it always was: runs of earlier versions see the same views."""
    keypoints = random_hand(np.random.default_rng(6))
    u = np.random.default_rng(7).random(8)
    view = sample_view(np.random.default_rng(7), keypoints, 224, 128)
    low = np.array([-45, 0.9, -15 / 448, -15 / 448, 0.01, 0.01, 0.5, 5])
    high = np.array([45, 1.5, 15 / 448, 15 / 448, 1, 1, 1, 20])
    angle, half, x, y, *colour = (low + (high - low) * u).tolist()
    assert view.angle == angle and list(view.colour) == colour
    side = 2 * half * np.linalg.norm(keypoints - keypoints.mean(0), axis=1).max()
    assert np.allclose(view.shift, [-x * 224 / side, -y * 224 / side])
    assert np.linalg.norm(view.matrix[0, :2]) == pytest.approx(128 / side)


def test_colour_factors_act_in_hsv_with_red_and_blue_exchanged():
    image = np.random.default_rng(7).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    same = common.View(np.eye(2, 3), colour=(1.0, 1.0, 1.0, 0.0))
    unchanged = apply_view(same, image, np.zeros((21, 2)), 16)[0]
    assert np.abs(unchanged.astype(int) - image).max() <= 6  # HSV is 8 bit
    skin = np.full((4, 4, 3), (210, 160, 130), np.uint8)
    exchanged = skin[..., ::-1].astype(np.float32) / 255
    hue, saturation, value = cv2.cvtColor(exchanged, cv2.COLOR_RGB2HSV)[0, 0]
    changed = np.float32([[[hue * 0.5, saturation * 0.7, value * 0.8 + 10 / 255]]])
    expected = cv2.cvtColor(changed, cv2.COLOR_HSV2RGB)[0, 0, ::-1] * 255
    view = common.View(np.eye(2, 3), colour=(0.5, 0.7, 0.8, 10.0))
    assert np.abs(apply_view(view, skin, np.zeros((21, 2)), 4)[0][0, 0] - expected).max() < 5


# --------------------------------------------------------------------------------------------- loss

@pytest.mark.parametrize("kind", ["linear", "nonlinear"])
def test_weights_against_a_slow_loop(kind):
    rng = np.random.default_rng(0)
    k1, k2 = rng.uniform(0, 128, (2, 6, 21, 2))
    every = np.concatenate([k1, k2])
    d = np.array([[np.mean([math.dist(a, b) for a, b in zip(x, y)]) for y in every] for x in every])
    positive = np.array([d[i, i + 6] for i in range(6)])
    expected = []
    for values, slope in ((positive, 0.3), (d, 0.02)):
        if kind == "linear":
            expected.append((values.max() - values) / (values.max() - values.min()))
        else:
            expected.append(1 / (1 + np.exp(slope * (values - values.mean()))))
    for found, wanted in zip(
            pair_weights(torch.from_numpy(k1), torch.from_numpy(k2), kind, 0.3, 0.02), expected):
        assert np.allclose(found, wanted, atol=1e-12)
    single = pair_weights(torch.from_numpy(k1).float(), torch.from_numpy(k2).float(), kind, 0.3,
                          0.02)
    assert all(np.allclose(a, b, atol=1e-5) for a, b in zip(single, expected))


@pytest.mark.parametrize("kind", ["linear", "nonlinear", "balanced"])
def test_equal_distances_weigh_one(kind):
    keypoints = torch.rand(1, 21, 2).expand(4, -1, -1) * 100
    pos, neg = pair_weights(keypoints, keypoints.clone(), kind)
    assert torch.equal(pos, torch.ones(4)) and torch.equal(neg, torch.ones(8, 8))
    shifted = pair_weights(torch.rand(4, 21, 2) * 100, torch.rand(4, 21, 2) * 100, kind)
    assert all(torch.isfinite(w).all() and 0 <= w.min() for w in shifted)
    assert kind == "balanced" or all(w.max() <= 1 for w in shifted)


def test_balanced_weights_are_linear_ones_over_their_mean():
    rng = np.random.default_rng(0)
    keypoints1, keypoints2 = torch.from_numpy(rng.normal(size=(2, 9, 21, 2)) * 20)
    linear = pair_weights(keypoints1, keypoints2, "linear")
    for found, plain in zip(pair_weights(keypoints1, keypoints2, "balanced"), linear):
        assert torch.allclose(found.mean(), torch.ones((), dtype=found.dtype))
        assert torch.allclose(found * plain.mean(), plain)


def test_with_balanced_weights_drawing_everything_together_does_not_pay():
    """Near pairs, far others: the linear loss is lower where all embeddings are one point
    than where none are alike."""
    rng = np.random.default_rng(1)
    keypoints1 = torch.from_numpy(rng.normal(size=(64, 21, 2)) * 20)
    keypoints2 = keypoints1 + torch.from_numpy(rng.normal(size=(64, 21, 2)))
    apart = torch.eye(128, dtype=torch.float64)
    together = torch.ones_like(apart) / 128 ** 0.5
    gain = {}
    for kind in ("linear", "balanced"):
        weights = pair_weights(keypoints1, keypoints2, kind)
        gain[kind] = nt_xent(apart[:64], apart[64:], *weights) - nt_xent(
            together[:64], together[64:], *weights)
    assert gain["linear"] > 0.1 and gain["balanced"] < 0.01


def slow_nt_xent(z1, z2, pos_weight, neg_weight, temperature):
    z, n, total = np.concatenate([z1, z2]), len(z1), 0.0
    for i in range(2 * n):
        j = (i + n) % (2 * n)
        denominator = 0.0
        for k in range(2 * n):
            if k != i:
                s = sum(z[i][c] * z[k][c] for c in range(z.shape[1]))
                denominator += math.exp(neg_weight[i][k] * s / temperature)
        numerator = math.exp(pos_weight[i % n] * float(z[i] @ z[j]) / temperature)
        total -= math.log(numerator / denominator)
    return total / (2 * n)


@pytest.mark.parametrize("temperature", [0.5, 0.1])
def test_loss_against_a_triple_loop(temperature):
    z1, z2 = random_unit(5, 8)
    rng = np.random.default_rng(0)
    pos, neg = rng.uniform(0, 1, 5), rng.uniform(0, 1, (10, 10))
    expected = slow_nt_xent(z1.numpy(), z2.numpy(), pos, neg, temperature)
    loss = nt_xent(z1, z2, torch.from_numpy(pos), torch.from_numpy(neg), temperature)
    assert loss.item() == pytest.approx(expected)
    plain = slow_nt_xent(z1.numpy(), z2.numpy(), np.ones(5), np.ones((10, 10)), temperature)
    assert nt_xent(z1, z2, temperature=temperature).item() == pytest.approx(plain)
    loss = nt_xent(z1, z2, torch.ones(5), torch.ones(10, 10), temperature)
    assert loss.item() == pytest.approx(plain)
    for one in ((torch.from_numpy(pos), None), (None, torch.from_numpy(neg))):
        wanted = slow_nt_xent(z1.numpy(), z2.numpy(), pos if one[0] is not None else np.ones(5),
                              neg if one[1] is not None else np.ones((10, 10)), temperature)
        assert nt_xent(z1, z2, *one, temperature).item() == pytest.approx(wanted)


def test_identical_embeddings_and_exchanged_views():
    same = torch.nn.functional.normalize(torch.ones(6, 4), dim=1)
    assert nt_xent(same, same).item() == pytest.approx(math.log(11), abs=1e-6)
    z1, z2 = random_unit(5, 8)
    pos, neg = torch.rand(5, dtype=torch.float64), torch.rand(10, 10, dtype=torch.float64)
    turned = neg.roll((5, 5), (0, 1))
    exchanged = nt_xent(z2, z1, pos, turned).item()
    assert nt_xent(z1, z2, pos, neg).item() == pytest.approx(exchanged, abs=1e-12)


def test_gradient_of_the_weighted_loss():
    z1, z2 = (z.requires_grad_() for z in random_unit(4, 6))
    pos, neg = torch.rand(4, dtype=torch.float64), torch.rand(8, 8, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: nt_xent(a, b, pos, neg), (z1, z2))


@pytest.mark.parametrize("kind", ["linear", "nonlinear"])
def test_weights_of_many_pairs_made_some_rows_at_a_time(kind):
    k1, k2 = torch.rand(2, 300, 21, 2, generator=torch.Generator().manual_seed(0)) * 128
    every = torch.cat([k1, k2]).double()
    d = (every[:, None] - every[None]).norm(dim=3).mean(2)
    wanted = (d.max() - d) / (d.max() - d.min()) if kind == "linear" else torch.sigmoid(
        -0.05 * (d - d.mean()))
    assert torch.allclose(pair_weights(k1, k2, kind)[1].double(), wanted, atol=1e-5)


def test_loss_of_many_pairs_made_some_rows_at_a_time():
    z = torch.nn.functional.normalize(torch.randn(4200, 8, dtype=torch.float64), dim=1)
    z1, z2 = (half.clone().requires_grad_() for half in z.chunk(2))
    pos, neg = torch.rand(2100, dtype=torch.float64), torch.rand(4200, 4200, dtype=torch.float64)
    nt_xent(z1, z2, pos, neg).backward()
    w1, w2 = (half.clone().requires_grad_() for half in z.chunk(2))
    both = torch.cat([w1, w2])
    logits = (both @ both.T * neg / 0.5).masked_fill(torch.eye(4200, dtype=torch.bool), -math.inf)
    positive = (w1 * w2).sum(1) * pos / 0.5
    loss = (logits.logsumexp(1) - positive.repeat(2)).mean()
    loss.backward()
    assert nt_xent(z1, z2, pos, neg).item() == pytest.approx(loss.item(), abs=1e-12)
    assert torch.allclose(z1.grad, w1.grad, atol=1e-12)
    assert torch.allclose(z2.grad, w2.grad, atol=1e-12)


def test_loss_is_float32_under_autocast():
    z1, z2 = random_unit(8, 16, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = nt_xent(z1, z2)
    assert inside.dtype == torch.float32 and torch.equal(inside, nt_xent(z1, z2))


def test_soft_targets_and_their_loss_against_a_triple_loop():
    random = torch.Generator().manual_seed(0)
    n = 4
    first, second = torch.randn(2, n, 21, 2, dtype=torch.float64, generator=random)
    z1, z2 = torch.nn.functional.normalize(
        torch.randn(2, n, 6, dtype=torch.float64, generator=random), dim=2)
    target = soft_targets(first * 40 + 60, second * 3, 0.3)  # place and size do not count
    hands = [hand - hand.mean(0) for hand in torch.cat([first, second]).numpy()]
    hands = [hand / np.sqrt((hand ** 2).sum() / 21) for hand in hands]
    z = torch.cat([z1, z2]).numpy()
    loss = 0
    for i in range(2 * n):
        wanted, found = {}, {}
        for k in range(2 * n):
            if k != i:
                apart = sum(math.dist(hands[i][j], hands[k][j]) for j in range(21)) / 21
                wanted[k] = math.exp(-apart / 0.3)
                found[k] = math.exp(z[i] @ z[k] / 0.4)
        for k in wanted:
            share = wanted[k] / sum(wanted.values())
            assert target[i, k].item() == pytest.approx(share, rel=1e-9)
            loss -= share * math.log(found[k] / sum(found.values())) / (2 * n)
    assert not target.diagonal().any()
    assert nt_xent(z1, z2, temperature=0.4, target=target).item() == pytest.approx(loss, rel=1e-9)


def test_soft_targets_become_plain_nt_xent_where_the_positive_alone_is_near():
    random = torch.Generator().manual_seed(0)
    hands = torch.randn(6, 21, 2, generator=random)
    z1, z2 = torch.nn.functional.normalize(torch.randn(2, 6, 8, generator=random), dim=2)
    target = soft_targets(hands, hands * 2, 1e-3)
    assert nt_xent(z1, z2, target=target).item() == pytest.approx(nt_xent(z1, z2).item(), abs=1e-5)


def test_drawing_everything_together_gains_nothing_with_soft_targets():
    """The loss of equal embeddings is the largest of all that only draw together."""
    random = torch.Generator().manual_seed(0)
    hands = torch.randn(8, 21, 2, generator=random)
    target = soft_targets(hands, hands + 0.1, 0.06)
    same = torch.nn.functional.normalize(torch.ones(8, 16), dim=1)
    assert nt_xent(same, same, target=target).item() == pytest.approx(math.log(15), abs=1e-5)
    assert torch.allclose(target.sum(1), torch.ones(16), atol=1e-6)


def test_soft_loss_of_many_pairs_made_some_rows_at_a_time():
    """With 2,100 pairs the rows come in blocks; the gradient is that of the whole."""
    random = torch.Generator().manual_seed(0)
    n = 2100
    z1, z2 = torch.nn.functional.normalize(torch.randn(2, n, 8, generator=random), dim=2)
    hands = torch.randn(2, n, 21, 2, generator=random)
    target = soft_targets(*hands, 0.5)
    z = torch.cat([z1, z2]).requires_grad_()
    logits = (z @ z.T / 0.5).fill_diagonal_(-1e30)
    whole = torch.nn.functional.cross_entropy(logits, target)
    (expected,) = torch.autograd.grad(whole, z)
    z1.requires_grad_()
    loss = nt_xent(z1, z2, target=target)
    loss.backward()
    assert loss.item() == pytest.approx(whole.item(), rel=1e-6)
    assert torch.allclose(z1.grad, expected[:n], atol=1e-8)


# ----------------------------------------------------------------------------------------- backbone

@pytest.fixture(scope="module")
def reference():
    torch.manual_seed(0)
    network = torchvision.models.resnet18()
    for p in network.buffers():
        if p.dtype == torch.float32:
            p.uniform_(0.5, 1.5)
    return network.eval()


def save(path, content):
    torch.save(content, path)
    return path


@pytest.mark.parametrize("layout", ["ours", "torchvision", "state_dict", "official",
                                    "before 0.4.1"])
def test_every_published_layout_loads(reference, layout, tmp_path):
    state = reference.state_dict()
    numbers = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
    numbered = {f"encoder.features.{numbers[k.split('.')[0]]}.{k.split('.', 1)[1]}": v
                for k, v in state.items() if not k.startswith("fc.")}
    content = {
        "ours": {k: v for k, v in state.items() if not k.startswith("fc.")},
        "torchvision": state,
        "state_dict": {"state_dict": state, "epoch": 99},
        "official": {"state_dict": {**numbered, "projection_head.0.weight": torch.zeros(3, 3)},
                     "epoch": 3},
        "before 0.4.1": {k: v for k, v in state.items() if "num_batches" not in k},
    }[layout]
    network = load_backbone("resnet18", save(tmp_path / "weights.pt", content)).eval()
    x = torch.rand(2, 3, 32, 32)
    reference.fc, head = torch.nn.Identity(), reference.fc
    assert torch.equal(network(x), reference(x))
    assert network(x).shape == (2, network.width) == (2, 512)
    reference.fc = head


@pytest.mark.parametrize("prefix", ["module.", "backbone.", "module.encoder_q."])
def test_the_resnet_of_another_network_is_found_under_its_prefix(reference, prefix, tmp_path,
                                                                 capsys):
    """As DataParallel, MoCo, Lightning and timm write it, beside what else they train: of two
    ResNets the first."""
    content = {f"{prefix}{k}": v for k, v in reference.state_dict().items()}
    content |= {f"encoder_k.{k}": torch.zeros_like(v) for k, v in reference.state_dict().items()}
    content["queue"] = torch.zeros(3)
    path = save(tmp_path / "a.pt", content)
    network = load_backbone("resnet18", path)
    assert all(torch.equal(v, reference.state_dict()[k]) for k, v in network.state_dict().items())
    assert capsys.readouterr().out == f"{path}: the ResNet under {prefix} is used\n"


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_resnet_of_another_depth_is_told_by_its_shapes(reference, prefix, tmp_path):
    state = {f"{prefix}{k}": v for k, v in reference.state_dict().items()}
    words = r"a resnet50: Missing .*layer1.0.conv3.weight.*; size mismatch for layer1.0.conv1.weight"
    with pytest.raises(InputError, match=words):
        load_backbone("resnet50", save(tmp_path / "a.pt", state))


def renamed(state):
    return {key.replace("conv", "convolution"): value for key, value in state.items()}


@pytest.mark.parametrize("change, words", [
    (lambda s: {k: v for k, v in s.items() if k != "layer1.0.conv2.weight"},
     'Missing .*: "layer1.0.conv2.weight".$'),
    (lambda s: renamed(s), 'Missing .*"conv1.weight".*; Unexpected .*"convolution1.weight"'),
    (lambda s: {**s, "layer1.0.bn1.bias": torch.zeros(3)},
     "size mismatch for layer1.0.bn1.bias: "),
    (lambda s: {**s, "surplus": torch.zeros(1)}, 'a resnet18: Unexpected .*: "surplus".$'),
    (lambda s: {**s, "conv1.weight": s["conv1.weight"] * math.nan},
     "must be finite, not so: conv1.weight$"),
    (lambda s: [1, 2], "expected a state dict"),
    (lambda s: {0: torch.zeros(1)}, "expected a state dict")])
def test_weights_that_do_not_fit_are_named(reference, change, words, tmp_path):
    state = {k: v for k, v in reference.state_dict().items() if not k.startswith("fc.")}
    with pytest.raises(InputError, match=rf"a\.pt.*{words}"):
        load_backbone("resnet18", save(tmp_path / "a.pt", change(state)))


@pytest.mark.parametrize("content, words", [
    (None, "missing"), (b"these are not weights", "checkpoint written by torch.save"),
    (b"PK\3\4 and no more", "checkpoint written by torch.save")])
def test_files_that_are_no_weights_are_named(content, words, tmp_path):
    if content:
        (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(InputError, match=words):
        load_backbone("resnet18", tmp_path / "a.pt")


class Configuration(dict):
    """Stands for the configuration object that official training checkpoints pickle."""


def test_pickled_objects_are_never_run(reference, tmp_path):
    save(tmp_path / "official.pt", {"state_dict": reference.state_dict(),
                                    "hyper_parameters": Configuration(a=1)})
    with pytest.raises(InputError, match="never loaded.*state_dict"):
        load_backbone("resnet18", tmp_path / "official.pt")
    (tmp_path / "pickle.pt").write_bytes(
        pickle.dumps({"conv1.weight": Configuration()}, protocol=2))
    with pytest.raises(InputError, match="pickle.pt"):
        load_backbone("resnet18", tmp_path / "pickle.pt")


# -------------------------------------------------------------------------------------------- files

def test_an_array_comes_back_as_it_was_saved(tmp_path):
    good = np.arange(6, dtype=np.float32).reshape(3, 2)
    common.save_array(tmp_path / "good.npy", good)
    assert np.array_equal(common.load_array(tmp_path / "good.npy", np.float32, (None, 2)), good)


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("content", [None, b"", b"hello", "cut"])
def test_a_damaged_array_is_named_with_what_was_expected(tmp_path, content, mmap):
    path = tmp_path / "a.npy"
    np.save(path, np.zeros((3, 2), np.float32))
    if content == "cut":
        content = path.read_bytes()[:-4]
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(InputError, match=r"a.npy: .*expected float32 \(N, 2\)"):
        common.load_array(path, np.float32, (None, 2), mmap=mmap)


def test_an_array_that_could_run_code_is_never_loaded(tmp_path):
    np.save(tmp_path / "object.npy", np.array([{"run": "me"}], object), allow_pickle=True)
    with pytest.raises(InputError, match="not a .npy file of numbers"):
        common.load_array(tmp_path / "object.npy", np.float32, (None,))


@pytest.mark.parametrize("array, words", [
    (np.zeros((3, 2)), "is float64"), (np.zeros((3, 1), np.float32), r"is float32 \(3, 1\)"),
    (np.full((3, 2), np.nan, np.float32), "finite, row 0")])
def test_an_array_of_another_kind_is_named(tmp_path, array, words):
    np.save(tmp_path / "wrong.npy", array)
    with pytest.raises(InputError, match=words):
        common.load_array(tmp_path / "wrong.npy", np.float32, (3, 2))


@pytest.mark.parametrize("write", [lambda file: np.save(file, np.zeros(1 << 20)),
                                   lambda file: torch.save(torch.zeros(1 << 20), file)])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, write):
    """A limit on the size of files stands for the full disk: real writes fail half way."""
    common.save_array(tmp_path / "a.npy", np.arange(3))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(InputError, match="a.npy: could not be written: (File|.*requested)"):
            with common.atomic(tmp_path / "a.npy") as file:
                write(file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert np.array_equal(np.load(tmp_path / "a.npy"), np.arange(3))
    assert [p.name for p in tmp_path.iterdir()] == ["a.npy"]


def test_temporary_files_are_named_by_program(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tools/evaluate.py"])
    with common.atomic(tmp_path / "a.npy") as file:
        assert Path(file.name).name == f".a.npy.evaluate.{os.getpid()}.tmp"


def test_a_start_clears_what_a_killed_run_of_the_same_program_left(tmp_path, monkeypatch):
    names = [".a.npy.finetune.123.tmp", ".a.npy.evaluate.123.tmp"]
    for name in names:
        (tmp_path / name).write_text("left by a killed run")
    monkeypatch.setattr(sys, "argv", ["evaluate.py"])
    common.open_folder(tmp_path).close()
    assert [(tmp_path / name).exists() for name in names] == [True, False]


@pytest.fixture
def photograph(tmp_path):
    """-> path and pixels (H, W, 3) of a JPEG, turned as EXIF's orientation 6 says."""
    image = np.zeros((64, 96, 3), np.uint8)
    image[:, :48] = (200, 40, 0)
    path = tmp_path / "photograph.jpg"
    encoded = cv2.imencode(".jpg", np.rot90(image)[:, :, ::-1])[1].tobytes()
    exif = (b"Exif\0\0II*\0\x08\0\0\0" + b"\x01\0" + b"\x12\x01\x03\0\x01\0\0\0\x06\0\0\0"
            + b"\0\0\0\0")
    path.write_bytes(encoded[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif
                     + encoded[2:])
    return path, image


def test_a_photograph_is_read_upright_and_in_rgb(photograph):
    path, image = photograph
    seen = common.read_picture(path)
    assert np.abs(seen.astype(int) - image).mean() < 2


@pytest.mark.parametrize("share", [0, 0.45, 0.99])
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".webp", ".tif"])
def test_a_picture_that_is_cut_short_is_refused(tmp_path, suffix, share):
    noise = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    content = cv2.imencode(suffix, noise)[1].tobytes()
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content[:int(share * len(content))])
    with pytest.raises(InputError, match=f"^{path}: cut short, or not a picture"):
        common.read_picture(path)


def test_a_picture_that_is_missing_is_named(tmp_path):
    with pytest.raises(InputError, match="a.jpg: could not be read: No such file"):
        common.read_picture(tmp_path / "a.jpg")


@pytest.mark.parametrize("content", [
    "händ\r\nb\r\n".encode("utf-8"), "händ\nb".encode("utf-8-sig"), "händ\r\nb".encode("utf-16"),
    b"\xfe\xff" + "händ\nb\n".encode("utf-16-be")])
def test_lists_are_read_as_windows_writes_them_too(tmp_path, content):
    (tmp_path / "list.txt").write_bytes(content)
    assert common.read_lines(tmp_path / "list.txt") == ["händ", "b"]


def test_a_name_in_another_encoding_is_that_of_its_file(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"caf\xe9\n")
    (name,) = common.read_lines(tmp_path / "list.txt")
    assert os.fsencode(name) == b"caf\xe9"


@pytest.mark.parametrize("content", [b"a.mp4\0b.mp4\0", "a.mp4".encode("utf-16-le")])
def test_a_list_with_nul_bytes_is_refused(tmp_path, content):
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(InputError, match="list.txt: holds NUL bytes, expected text"):
        common.read_lines(tmp_path / "list.txt")


# --------------------------------------------------------------------------------------------- runs

def git(folder, *arguments):
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    result = subprocess.run(["git", "-C", folder, *who, *arguments], check=True,
                            capture_output=True, text=True)
    return result.stdout.strip()


def test_a_log_begins_with_versions_and_machine(tmp_path):
    common.start_log(tmp_path, {}, packages=("scipy",))
    facts = json.loads((tmp_path / "log.jsonl").read_text())["facts"]
    assert facts["torch"] == torch.__version__ and facts["numpy"] == np.__version__
    assert re.match(r"\d+\.\d+", facts["scipy"]) and re.match(r"\d+\.\d+", facts["torchvision"])
    assert facts["python"] == sys.version.split()[0] and facts["opencv"] == cv2.__version__
    assert facts["machine"]


def test_the_commit_is_marked_where_files_differ_from_it(tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / "a.py").write_text("1")
    git(tmp_path, "add", "a.py")
    git(tmp_path, "commit", "-qm", "one")
    git(tmp_path, "tag", "v1")
    commit = git(tmp_path, "rev-parse", "HEAD")[:12]
    (tmp_path / "run").mkdir()  # what is not in git changes nothing
    assert common.commit_of(tmp_path) == commit
    (tmp_path / "a.py").write_text("2")
    assert common.commit_of(tmp_path) == f"{commit}+"
    assert common.commit_of(tmp_path / "run") is None  # a folder within somebody's repository


def test_the_settings_of_a_run_are_plain_values():
    args = argparse.Namespace(lr=1.0, out=Path("runs/a"), margin=(0.9, 1.5), seed=None)
    assert common.plain(args, ranks=2) == {"lr": 1.0, "out": "runs/a", "margin": [0.9, 1.5],
                                           "seed": None, "ranks": 2}


def settings_of(**values):
    return common.plain(argparse.Namespace(**values), micro_batch=8)


def save_checkpoint(folder, settings, step):
    model = torch.nn.Linear(9, 9)
    adam = torch.optim.Adam(model.parameters())
    common.save_checkpoint(folder, settings, 1234, step, model, adam)


def open_run(folder, settings, may_change=(), data=1234):
    """As a rank that does not write: no lock is left."""
    return common.open_run(folder, settings, data, may_change, rank=1)


def test_a_run_goes_on_from_its_last_checkpoint(tmp_path):
    settings = settings_of(lr=1.0, workers=2, out=tmp_path)
    assert open_run(tmp_path, settings, ("workers", "out")) is None
    for step in (1, 2):
        save_checkpoint(tmp_path, settings, step)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    other_workers = settings_of(lr=1.0, workers=9, out=tmp_path)
    assert open_run(tmp_path, other_workers, ("workers", "out"))["step"] == 2
    with pytest.raises(InputError, match="was trained on other hands, pairs or labels"):
        open_run(tmp_path, settings, data=1235)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    model = torch.nn.Linear(2, 2)
    model.bias.data[0] = torch.nan
    with pytest.raises(InputError, match="a weight is not finite after step 7"):
        common.save_checkpoint(tmp_path, {}, None, 7, model, None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change, words", [
    (dict(lr=2.0), r"\(--lr was 1.0, is 2.0\)"),
    (dict(micro_batch=4), r"\(--micro-batch was 8, is 4\)"),
    (dict(new_flag=3), r"\(--new-flag was None, is 3\)"),
    (dict(lr=2.0, seed=1), r"\(--lr was 1.0, is 2.0; --seed was 0, is 1\)")])
def test_other_settings_are_another_run_and_are_named(tmp_path, change, words):
    settings = settings_of(lr=1.0, seed=0, workers=2)
    save_checkpoint(tmp_path, settings, 1)
    with pytest.raises(InputError, match=words):
        open_run(tmp_path, settings | change | dict(workers=9), ("workers",))


@pytest.mark.parametrize("cut", [0, 1, 100, -1])
def test_a_damaged_checkpoint_is_named(tmp_path, cut):
    settings = settings_of(lr=1.0)
    path = tmp_path / "checkpoint.pt"
    for step in (1, 2):  # an earlier one does not stand in for it
        save_checkpoint(tmp_path, settings, step)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(InputError, match=rf"^{path}: truncated, or not a checkpoint") as error:
        open_run(tmp_path, settings)
    assert "\n" not in str(error.value)


def test_the_checkpoint_of_something_else_is_named(tmp_path):
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "checkpoint.pt")
    with pytest.raises(InputError, match="checkpoint.pt: not the checkpoint of such a run"):
        open_run(tmp_path, settings_of(lr=1.0))


def test_the_log_goes_on_after_the_checkpoint(tmp_path):
    settings = settings_of(lr=1.0)
    assert common.start_log(tmp_path, settings) == []
    for step in (1, 2, 3):
        common.write_log(tmp_path, dict(step=step))
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    assert [row["step"] for row in common.start_log(tmp_path, settings, step=2)] == [1, 2]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[0]["args"] == {"lr": 1.0, "micro_batch": 8}
    assert [line.get("step") for line in lines] == [None, 1, 2]


def test_settings_are_printed_beside_the_defaults_that_they_leave(capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--warmup", type=int)
    args = parser.parse_args(["--batch-size", "16"])
    args.warmup = 3  # as parse_args fills in what follows from other arguments
    common.print_settings(args, parser, negatives=30)
    assert re.sub(" +", " ", capsys.readouterr().out) == (
        "arguments:\n lr 0.1\n batch_size 16 (default: 8)\n warmup 3\neffective:\n negatives 30\n")


def test_progress_of_quick_items_is_a_few_lines_in_a_log_file(tmp_path, monkeypatch):
    with open(tmp_path / "errors.log", "w") as errors:
        monkeypatch.setattr(sys, "stderr", errors)
        for _ in common.progress(range(50)):
            time.sleep(0.01)
    lines = re.split(r"[\r\n]+", (tmp_path / "errors.log").read_text().strip())
    assert len(lines) <= 3 and "50/50" in lines[-1]


def may_open(folder):
    """Whether another process may open the folder."""
    other = multiprocessing.get_context("fork").Process(target=common.open_folder, args=(folder,))
    other.start()
    other.join()
    return other.exitcode == 0


def test_a_second_live_run_is_refused(tmp_path, capfd):
    lock = common.open_folder(tmp_path / "run")
    assert not may_open(tmp_path / "run") and "another run is writing" in capfd.readouterr().err
    lock.close()
    assert may_open(tmp_path / "run")


def test_a_loader_process_that_outlives_its_parent_does_not_hold_the_lock(tmp_path):
    lock = common.open_folder(tmp_path / "run")
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    lock.close()
    assert may_open(tmp_path / "run") and child.is_alive()
    child.kill()
    child.join()


# ---------------------------------------------------------------------------------------- processes

class Cut:
    """Fails while it is read, as what a loader process was handing over when it died."""
    def __reduce__(self):
        return exec, ("raise EOFError",)


class Items:
    """Item k is 1 / k, but for those that break the process which reads them."""

    def __call__(self, k):
        if k == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        if k == 8:
            raise InputError("crops.bin: truncated")
        if k == 9:
            return Cut()
        if k == 10:  # as torch words it
            raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: "
                               "No space left on device")
        return torch.full((), 1 / k)


def load(batches, workers=2):
    try:
        return list(common.load_items(Items(), batches, workers, list))
    finally:
        for child in multiprocessing.active_children():
            child.kill()  # as run_script does: they ignore SIGTERM, and Python would wait for them


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_order(workers):
    found = load([[4, 1], [2], [1, 16, 16]], workers)
    assert found == [[0.25, 1], [0.5], [1, 0.0625, 0.0625]]


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_the_random_state_and_the_handler_of_dead_children_alone(workers):
    before = torch.random.get_rng_state()
    handler = signal.getsignal(signal.SIGCHLD)
    load([[3, 1], [2]], workers)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert signal.getsignal(signal.SIGCHLD) == handler


@pytest.mark.parametrize("item, reason", [(7, "exited unexpectedly"), (9, "EOFError"),
                                          (10, "No space left on device")])
def test_a_loader_process_that_dies_or_complains_is_told_in_one_line(item, reason):
    words = f"^a loader process failed .*{reason}.*--workers"
    with pytest.raises(InputError, match=words) as error:
        load([[1], [item]])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("item, error, words", [(8, InputError, "crops.bin: truncated"),
                                                (0, ZeroDivisionError, "division by zero")])
def test_other_errors_of_a_loader_process_stay_what_they_are(item, error, words):
    with pytest.raises(error, match=words):
        load([[1], [item]])


def test_without_loader_processes_an_error_stays_what_it_is():
    with pytest.raises(RuntimeError, match="^unable to allocate"):
        load([[1], [10]], workers=0)


class Kept:
    """Items that cannot be sent to another process."""

    def __call__(self, k):
        return k

    def __reduce__(self):
        raise AssertionError("the items were copied")


def test_loader_processes_share_what_they_read_however_python_starts_others():
    """Sent to a process, the items would be copied: gigabytes of crops."""
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        assert list(common.load_items(Kept(), [[3, 1], [2]], 1, sum)) == [4, 2]
    finally:
        multiprocessing.set_start_method(None, force=True)


SIGTERMS = """
import os, signal
from common import catch_sigterm
stop = catch_sigterm()
os.kill(os.getpid(), signal.SIGTERM)
assert stop
print("goes on after one", flush=True)
os.kill(os.getpid(), signal.SIGTERM)
print("goes on after two", flush=True)
"""


def test_the_first_sigterm_is_noted_and_the_second_ends_the_process(tmp_path):
    result = subprocess.run([sys.executable, "-c", SIGTERMS], capture_output=True, text=True,
                            timeout=200, env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)})
    assert result.stdout == "goes on after one\n", result.stderr
    assert result.returncode == -signal.SIGTERM


# ------------------------------------------------------------------------------------------ drawing

def test_a_drawn_skeleton_passes_through_its_joints_and_leaves_the_picture_alone():
    image = np.zeros((224, 224, 3), np.uint8)
    keypoints = random_hand(np.random.default_rng(8))
    drawn = common.draw_hand(image, keypoints)
    assert not image.any()
    for joint, (x, y) in enumerate(np.round(keypoints).astype(int)):
        if joint:
            assert drawn[y - 1:y + 2, x - 1:x + 2].any()
    common.draw_hand(image, keypoints * 1e6)  # far outside is no error


CURVES = """
import common
common.plot_curves("curves.png", [dict(step=1, loss=2.0), dict(step=2, loss=1.0)], [["loss"]])
"""


def test_a_users_matplotlib_settings_do_not_reach_a_plot(tmp_path):
    """A notebook names a backend; a matplotlibrc may ask for a LaTeX that is not here."""
    (tmp_path / "matplotlibrc").write_text(
        "backend: qtagg\nfont.family: nowhere\ntext.usetex: True\n")
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT), "PATH": "/nowhere",
                   "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    result = subprocess.run([sys.executable, "-c", CURVES], cwd=tmp_path, env=environment,
                            capture_output=True, text=True, timeout=100)
    assert (result.returncode, result.stderr) == (0, "")
    assert cv2.imread(str(tmp_path / "curves.png")).shape == (352, 462, 3)


def test_a_plot_that_cannot_be_drawn_costs_one_line(tmp_path, capsys):
    with common.figure(tmp_path / "a.png", (3, 2)) as drawn:
        drawn.subplots().set_title("$\\nonsense$")
    assert capsys.readouterr().err.count("a.png: could not be drawn") == 1
    assert list(tmp_path.iterdir()) == []
