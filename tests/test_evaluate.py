"""Metrics on poses with known answers, and against other libraries."""

import csv
import json

import cv2
import numpy as np
import pytest
from scipy.linalg import orthogonal_procrustes

import evaluate
from conftest import refused, run


def poses(n=40, seed=0):
    rng = np.random.default_rng(seed)
    truth = rng.normal(0, 40, (n, 21, 3))
    truth[:, 9] = truth[:, 0] + (0, 90, 0)
    return truth + (0, 0, 600), rng


def all_valid(truth):
    return np.ones(truth.shape[:2], bool)


def save_run(folder, prediction, truth, valid=None):
    folder.mkdir()
    np.save(folder / "pred_xyz.npy", prediction.astype(np.float32))
    np.save(folder / "gt_xyz.npy", truth.astype(np.float32))
    if valid is not None:
        np.save(folder / "valid.npy", valid)
    return folder


def test_perfect_and_hopeless():
    truth, _ = poses()
    result, curve = evaluate.score(truth, truth, all_valid(truth))
    assert all(result[k] == pytest.approx(0, abs=1e-6) for k in result if k.endswith("mpjpe"))
    assert all(result[k] == 1 for k in result if "auc" in k and "pa" not in k) and (curve == 1).all()
    assert result["pa_auc_0_50"] > 0.99  # rounding leaves an error above the threshold 0
    far = truth.copy()
    far[:, 1:] += (1000, 0, 0)
    result, _ = evaluate.score(far, truth, all_valid(truth))
    assert result["mpjpe"] == pytest.approx(1000 * 20 / 21) and result["auc_0_50"] == pytest.approx(1 / 21)  # wrist: 0
    assert result["abs_mpjpe"] == pytest.approx(1000 * 20 / 21)


def test_what_each_alignment_forgives():
    truth, rng = poses()
    prediction = truth + rng.normal(0, 8, truth.shape)
    valid = all_valid(truth)
    base, _ = evaluate.score(prediction, truth, valid)
    moved, _ = evaluate.score(prediction + (30, -20, 100), truth, valid)
    assert moved["mpjpe"] == pytest.approx(base["mpjpe"]) and moved["abs_mpjpe"] > base["abs_mpjpe"] + 50
    grown, _ = evaluate.score(prediction * 1.3, truth, valid)
    assert grown["scaled_mpjpe"] == pytest.approx(base["scaled_mpjpe"]) and grown["mpjpe"] > base["mpjpe"] + 5
    turned = prediction @ np.linalg.qr(rng.normal(size=(3, 3)))[0]
    turned[..., 0] *= -1  # a reflection is allowed
    turned, _ = evaluate.score(turned, truth, valid)
    assert turned["pa_mpjpe"] == pytest.approx(base["pa_mpjpe"]) and turned["scaled_mpjpe"] > base["scaled_mpjpe"] + 5


def freihand_align(truth, prediction):
    """FreiHAND's protocol, one sample, written down from its description with scipy's Procrustes rotation."""
    t, p = truth - truth.mean(0), prediction - prediction.mean(0)
    st, sp = np.linalg.norm(t) + 1e-8, np.linalg.norm(p) + 1e-8
    rotation, scale = orthogonal_procrustes(t / st, p / sp)
    return (p / sp) @ rotation.T * scale * st + truth.mean(0)


def test_procrustes_against_scipy_with_invalid_joints():
    truth, rng = poses()
    prediction = truth @ np.linalg.qr(rng.normal(size=(3, 3)))[0] * 0.7 + rng.normal(0, 10, truth.shape)
    valid = rng.uniform(size=truth.shape[:2]) > 0.3
    found = evaluate.align(prediction, truth, valid)
    for i in range(len(truth)):
        v = valid[i]
        assert np.allclose(found[i, v], freihand_align(truth[i, v], prediction[i, v]), rtol=1e-6, atol=1e-6)
    zero = evaluate.align(np.zeros_like(truth), truth, all_valid(truth))  # works because of the 1e-8
    assert np.allclose(zero, truth.mean(1, keepdims=True))


def test_pck_and_auc_on_known_errors():
    truth = np.zeros((2, 21, 3))
    truth[:, 9] = (0, 90, 0)
    prediction = truth.copy()
    prediction[0, 5] += (25.0, 0, 0)
    result, curve = evaluate.score(prediction, truth, all_valid(truth))
    assert result["per_joint"][5] == pytest.approx(12.5) and result["mpjpe"] == pytest.approx(12.5 / 21)
    step = np.linspace(0, 50, 100)
    assert np.array_equal(curve, np.where(step < 25, 1 - 0.5 / 21, 1))
    shares = evaluate.pck_curve(np.array([0.0, 20.0, 50.0]), np.array([0, 20, 49, 50]))
    assert shares.tolist() == [1 / 3, 2 / 3, 2 / 3, 1]
    ramp = np.linspace(0, 1, 15)
    assert evaluate.area_under(ramp, np.linspace(20, 50, 15)) == pytest.approx(0.5)


def test_every_metric_against_a_slow_loop():
    truth, rng = poses(12)
    prediction, valid = truth + rng.normal(0, 15, truth.shape), rng.uniform(size=truth.shape[:2]) > 0.25
    result, _ = evaluate.score(prediction, truth, valid)
    errors = {"abs_": [[] for _ in range(21)], "": [[] for _ in range(21)], "scaled_": [[] for _ in range(21)],
              "pa_": [[] for _ in range(21)]}
    for p, t, v in zip(prediction, truth, valid):
        aligned = freihand_align(t[v], p[v])
        scale = np.linalg.norm(t[9] - t[0]) / np.linalg.norm(p[9] - p[0])
        for j in np.flatnonzero(v):
            errors["abs_"][j].append(np.linalg.norm(p[j] - t[j]))
            errors["pa_"][j].append(np.linalg.norm(aligned[v[:j].sum()] - t[j]))
            if v[0]:
                errors[""][j].append(np.linalg.norm(p[j] - p[0] - t[j] + t[0]))
            if v[0] and v[9]:
                errors["scaled_"][j].append(np.linalg.norm((p[j] - p[0]) * scale - t[j] + t[0]))
    for prefix, lists in errors.items():
        assert result[prefix + "mpjpe"] == pytest.approx(np.mean([np.mean(e) for e in lists]), rel=1e-6)
        for name, steps in (("auc_0_50", np.linspace(0, 50, 100)), ("auc_20_50", np.linspace(20, 50, 15))):
            if prefix + name in result:
                pck = [np.mean([np.mean(np.array(e) <= s) for e in lists]) for s in steps]
                assert result[prefix + name] == pytest.approx(np.trapz(pck, steps) / (steps[-1] - steps[0]), rel=1e-6)
    assert result["samples_without_wrist"] == (~valid[:, 0]).sum()
    assert result["samples_without_bone"] == (~(valid[:, 0] & valid[:, 9])).sum()


def test_invalid_joints_change_nothing():
    truth, rng = poses()
    prediction, valid = truth + rng.normal(0, 10, truth.shape), rng.uniform(size=truth.shape[:2]) > 0.3
    other = np.where(valid[..., None], prediction, 1e5)
    keep = valid[:, 0] & valid[:, 9]  # an invalid wrist or joint 9 takes the sample out; they may then be anything
    a, _ = evaluate.score(prediction, truth, valid)
    b, _ = evaluate.score(other, truth, valid)
    assert keep.any() and not keep.all() and all(a[k] == pytest.approx(b[k]) for k in a)


KEYS = ("samples", "abs_mpjpe", "abs_auc_0_50", "mpjpe", "auc_0_50", "auc_20_50", "scaled_mpjpe", "scaled_auc_0_50",
        "scaled_auc_20_50", "pa_mpjpe", "pa_auc_0_50", "per_joint")


def test_runs_are_compared_in_one_table(tmp_path):
    truth, rng = poses()
    noise = rng.normal(0, 10, truth.shape)
    first = save_run(tmp_path / "first", truth + noise, truth)
    second = save_run(tmp_path / "second", truth + 0.5 * noise, truth, all_valid(truth))
    printed = run("evaluate.py", first, second, "--out", tmp_path / "all").stdout
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (first, second)]
    assert all(set(KEYS) <= set(m) and len(m["per_joint"]) == 21 for m in metrics)
    assert metrics[1]["mpjpe"] == pytest.approx(metrics[0]["mpjpe"] / 2, rel=1e-4)
    table = (tmp_path / "all" / "table.md").read_text()
    assert table in printed and "AUC 0-50" in table and "+50.0 %" in table
    assert f"**{metrics[1]['mpjpe']:.2f}**" in table and f"| {metrics[0]['mpjpe']:.2f} |" in table
    rows = list(csv.reader((tmp_path / "all" / "table.csv").open()))
    assert [row[0] for row in rows] == ["run", "first", "second"] and rows[2][2] == f"{metrics[1]['mpjpe']:.2f}"
    assert cv2.imread(str(tmp_path / "all" / "pck.png")) is not None
    assert "abs. MPJPE" in run("evaluate.py", first, "--absolute").stdout


def test_names_tell_runs_apart():
    assert evaluate.run_names(["a/x", "b/x"]) == ["a/x", "b/x"] and evaluate.run_names(["a/x", "b/y"]) == ["x", "y"]


def test_bad_input_is_refused_in_one_line(tmp_path):
    truth, _ = poses()
    good = save_run(tmp_path / "good", truth, truth)
    run("evaluate.py", tmp_path / "nowhere", status=2)
    assert "no such folder" in refused("evaluate.py", good, tmp_path / "nowhere")
    assert not (good / "metrics.json").exists()  # all runs are read before any is scored
    (tmp_path / "empty").mkdir()
    assert "gt_xyz.npy: missing" in refused("evaluate.py", tmp_path / "empty")
    assert "pred_xyz.npy" in refused("evaluate.py", save_run(tmp_path / "short", truth[:-1], truth))
    nan = truth.copy()
    nan[3, 4] = np.nan
    line = refused("evaluate.py", save_run(tmp_path / "nan", nan, truth))
    assert "pred_xyz.npy: valid joints must be finite, those of 1 samples are not: 3" in line
    assert "valid.npy" in refused("evaluate.py", save_run(tmp_path / "mask", truth, truth, all_valid(truth)[:, :20]))
    assert "gt_xyz.npy: valid joints must be finite, those of 1 samples are not: 3" in refused(
        "evaluate.py", save_run(tmp_path / "truth", truth, nan, all_valid(truth)))
    none = save_run(tmp_path / "none", truth, truth, ~all_valid(truth))
    assert "no joint is valid" in refused("evaluate.py", none)


def test_metres_are_noticed(tmp_path):
    truth, _ = poses()
    assert "are these mm?" in run("evaluate.py", save_run(tmp_path / "m", truth / 1000, truth / 1000)).stdout
