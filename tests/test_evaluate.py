"""Metrics on poses with known answers and against other libraries; tables, submissions, and what
is refused."""

import csv
import json
import math
import re
import statistics
import subprocess
import sys
import zipfile

import cv2
import numpy as np
import pytest
from scipy.linalg import orthogonal_procrustes
from scipy.stats import ttest_ind

import evaluate
from conftest import ENVIRONMENT, ROOT, refused, run_here

KEYS = ("samples", "abs_mpjpe", "abs_auc_0_50", "mpjpe", "auc_0_50", "auc_20_50", "scaled_mpjpe",
        "scaled_auc_0_50", "scaled_auc_20_50", "pa_mpjpe", "pa_auc_0_50", "per_joint", "facts")
FREIHAND = {"dataset": "freihand"}


def poses(n=40, seed=0):
    rng = np.random.default_rng(seed)
    truth = rng.normal(0, 40, (n, 21, 3))
    truth[:, 9] = truth[:, 0] + (0, 90, 0)
    return truth + (0, 0, 600), rng


def noisy(truth, millimetres=10, seed=1):
    return truth + np.random.default_rng(seed).normal(0, millimetres, truth.shape)


def all_valid(truth):
    return np.ones(truth.shape[:2], bool)


def score(prediction, truth, valid=None):
    """The metrics where each valid wrist aligns."""
    valid = all_valid(truth) if valid is None else valid
    return evaluate.score(prediction, truth, valid, valid[:, 0])[0]


def save_run(folder, prediction, truth, **more):
    folder.mkdir(parents=True)
    np.save(folder / "pred_xyz.npy", prediction.astype(np.float32))
    np.save(folder / "gt_xyz.npy", truth.astype(np.float32))
    for name, array in more.items():
        np.save(folder / f"{name}.npy", array)
    return folder


def write_log(folder, pretraining=None, hands=None, **args):
    rows = [{"command": "", "args": args}]
    rows += [{"pretraining": {"args": pretraining, "hands": hands}}] * bool(pretraining)
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def save_seeds(folder, method, errors):
    """A run of each error in mm, by which all joints but the wrist are off. -> their folders."""
    truth, _ = poses()
    runs = []
    for seed, error in enumerate(errors):
        prediction = truth.copy()
        prediction[:, 1:] += (error * 21 / 20, 0, 0)
        runs.append(save_run(folder / f"{method}-seed{seed}", prediction, truth))
    return runs


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def rows_of(folder):
    """The table.csv of a folder -> a dict a row."""
    return list(csv.DictReader((folder / "table.csv").read_text().splitlines()))


DRAW = evaluate.draw


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """Plots take most of a run's time: only tests that look at them draw."""
    monkeypatch.setattr(evaluate, "draw", lambda *_, **__: None)


@pytest.fixture
def plots(no_plots, monkeypatch):
    monkeypatch.setattr(evaluate, "draw", DRAW)


# ---- metrics

def test_perfect_poses_have_no_error():
    truth, _ = poses()
    result = score(truth, truth)
    assert all(result[k] == pytest.approx(0, abs=1e-6) for k in result if k.endswith("mpjpe"))
    assert all(result[k] == 1 for k in result if "auc" in k and "pa" not in k)
    assert result["pa_auc_0_50"] > 0.99  # rounding leaves an error above the threshold 0


def test_hopeless_poses_have_no_area_but_the_wrists():
    truth, _ = poses()
    far = truth.copy()
    far[:, 1:] += (1000, 0, 0)
    result = score(far, truth)
    assert result["mpjpe"] == result["abs_mpjpe"] == pytest.approx(1000 * 20 / 21)
    assert result["auc_0_50"] == pytest.approx(1 / 21)


def test_aligned_by_the_wrist_the_place_does_not_count():
    truth, _ = poses()
    base, moved = score(noisy(truth), truth), score(noisy(truth) + (30, -20, 100), truth)
    assert moved["mpjpe"] == pytest.approx(base["mpjpe"])
    assert moved["abs_mpjpe"] > base["abs_mpjpe"] + 50


def test_rescaled_by_the_bone_the_size_does_not_count():
    truth, _ = poses()
    base, grown = score(noisy(truth), truth), score(noisy(truth) * 1.3, truth)
    assert grown["scaled_mpjpe"] == pytest.approx(base["scaled_mpjpe"])
    assert grown["mpjpe"] > base["mpjpe"] + 5


def test_after_procrustes_turns_and_reflections_do_not_count():
    truth, rng = poses()
    turned = noisy(truth) @ np.linalg.qr(rng.normal(size=(3, 3)))[0]
    turned[..., 0] *= -1
    base, turned = score(noisy(truth), truth), score(turned, truth)
    assert turned["pa_mpjpe"] == pytest.approx(base["pa_mpjpe"])
    assert turned["scaled_mpjpe"] > base["scaled_mpjpe"] + 5


def freihand_align(truth, prediction):
    """FreiHAND's protocol, one sample, written down from its description with scipy's Procrustes
    rotation."""
    t, p = truth - truth.mean(0), prediction - prediction.mean(0)
    st, sp = np.linalg.norm(t) + 1e-8, np.linalg.norm(p) + 1e-8
    rotation, scale = orthogonal_procrustes(t / st, p / sp)
    return (p / sp) @ rotation.T * scale * st + truth.mean(0)


def test_procrustes_against_scipy_with_invalid_joints():
    truth, rng = poses()
    prediction = noisy(truth @ np.linalg.qr(rng.normal(size=(3, 3)))[0] * 0.7)
    valid = rng.uniform(size=truth.shape[:2]) > 0.3
    found = evaluate.align(prediction, truth, valid)
    for i, v in enumerate(valid):
        assert np.allclose(found[i, v], freihand_align(truth[i, v], prediction[i, v]),
                           rtol=1e-6, atol=1e-6)


def test_procrustes_of_a_prediction_without_extent_is_the_middle():
    truth, _ = poses()
    found = evaluate.align(np.zeros_like(truth), truth, all_valid(truth))
    assert np.allclose(found, truth.mean(1, keepdims=True))


def test_two_joints_are_not_aligned():
    """A similarity fits any two points, and would score them 0."""
    truth, _ = poses(6)
    prediction, valid = noisy(truth), all_valid(truth)
    valid[0, 2:] = False
    result = score(prediction, truth, valid)
    assert result["samples_without_procrustes"] == 1
    assert result["pa_mpjpe"] == pytest.approx(score(prediction[1:], truth[1:])["pa_mpjpe"])


def test_the_curve_steps_where_the_error_is():
    truth = np.zeros((2, 21, 3))
    truth[:, 9] = (0, 90, 0)
    prediction = truth.copy()
    prediction[0, 5] += (25.0, 0, 0)
    valid = all_valid(truth)
    result, curve = evaluate.score(prediction, truth, valid, valid[:, 0])
    assert result["per_joint"][5] == pytest.approx(12.5)
    assert np.allclose(curve, np.where(np.linspace(0, 50, 100) < 25, 1 - 0.5 / 21, 1), rtol=1e-12)


def test_an_error_at_a_threshold_counts():
    truth = np.zeros((2, 21, 3))
    prediction = truth.copy()
    prediction[:, 1:] += (50, 0, 0)
    valid = all_valid(truth)
    result, curve = evaluate.score(prediction, truth, valid, valid[:, 0])
    assert curve[-2:].tolist() == [1 / 21, 1]
    assert result["auc_20_50"] == pytest.approx(1 / 21 + 20 / 21 * 0.5 / 14)


def slow_errors(prediction, truth, valid):
    """{alignment: 21 lists of errors}"""
    errors = {name: [[] for _ in range(21)] for name in ("abs_", "", "scaled_", "pa_")}
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
    return errors


def slow_pck(errors, steps):
    return [np.mean([np.mean(np.array(joint) <= step) for joint in errors]) for step in steps]


def test_every_metric_against_a_slow_loop():
    truth, rng = poses(12)
    prediction, valid = noisy(truth, 15), rng.uniform(size=truth.shape[:2]) > 0.25
    result, curve = evaluate.score(prediction, truth, valid, valid[:, 0])
    steps = {"auc_0_50": np.linspace(0, 50, 100), "auc_20_50": np.linspace(20, 50, 15)}
    for prefix, errors in slow_errors(prediction, truth, valid).items():
        assert result[prefix + "mpjpe"] == pytest.approx(np.mean([np.mean(e) for e in errors]),
                                                         rel=1e-6)
        for name in {"auc_0_50", "auc_20_50"} & {key.removeprefix(prefix) for key in result}:
            area = np.trapezoid(slow_pck(errors, steps[name]), steps[name])
            area /= steps[name][-1] - steps[name][0]
            if prefix + name in result:
                assert result[prefix + name] == pytest.approx(area, rel=1e-6)
        if prefix == "":
            assert np.allclose(curve, slow_pck(errors, steps["auc_0_50"]), atol=1e-12)
    assert result["samples_without_wrist"] == (~valid[:, 0]).sum()
    assert result["samples_without_bone"] == (~(valid[:, 0] & valid[:, 9])).sum()


def test_samples_beyond_the_first_fifty_thousand_count():
    truth = np.tile(poses(1)[0], (50_001, 1, 1)).astype(np.float32)
    prediction = truth.copy()
    prediction[-1, 5] += (7, 0, 0)
    valid = np.ones((50_001, 21), bool)
    for error in evaluate.distances(prediction, truth, valid, valid[:, 0]).values():
        assert not np.isnan(error).any() and error[-1, 5] > 5


def test_invalid_joints_change_nothing():
    truth, rng = poses()
    prediction, valid = noisy(truth), rng.uniform(size=truth.shape[:2]) > 0.3
    assert not valid[:, 0].all() and not valid[:, 9].all()
    other = np.where(valid[..., None], prediction, 1e5)
    found, wanted = score(other, truth, valid), score(prediction, truth, valid)
    assert all(found[key] == pytest.approx(wanted[key]) for key in wanted)


def test_samples_without_a_wrist_are_counted(tmp_path):
    truth, _ = poses()
    valid = all_valid(truth)
    valid[3:, 0] = False
    printed = run_here("evaluate.py", save_run(tmp_path / "run", truth, truth, valid=valid))
    assert "37 of 40 samples have no wrist to align by" in printed


def test_without_any_wrist_only_what_needs_none_has_a_value(tmp_path):
    truth, _ = poses()
    valid = all_valid(truth)
    valid[:, 0] = False
    folder = save_run(tmp_path / "run", truth, truth, valid=valid)
    run_here("evaluate.py", folder)
    row, = rows_of(folder)
    assert row["MPJPE"] == "" and row["PA-MPJPE"] == "0.00"


def toolkit_error(prediction, truth, valid, wrist):
    """AssemblyHands' protocol, from its description: poses relative to the wrist's place,
    whether that joint is valid or not; the valid joints' errors; the mean of each joint,
    then of the joints that have one."""
    errors = [[] for _ in range(21)]
    for p, t, v, known in zip(prediction, truth, valid, wrist):
        for j in range(21):
            if v[j] and known:
                errors[j].append(math.dist(p[j] - p[0], t[j] - t[0]))
    return np.mean([np.mean(each) for each in errors if each])


@pytest.fixture
def assembly(tmp_path):
    """A run, scored, whose first 25 wrists are not valid; of the first six the place is not known
    either. -> folder, prediction, truth, valid, wrist"""
    truth, rng = poses(60)
    prediction, valid = noisy(truth, 15), rng.uniform(size=truth.shape[:2]) > 0.2
    valid[:25, 0] = False
    prediction[:25, 1:] += (20, 0, 0)  # so that it matters whether they count
    truth[:5, 0] = 0
    truth[5, 0] = np.nan
    wrist = np.arange(60) > 5
    folder = save_run(tmp_path / "run", prediction, truth, valid=valid, wrist=wrist)
    run_here("evaluate.py", folder)
    return folder, prediction, truth, valid, wrist


def test_a_wrist_that_is_known_but_not_valid_aligns_its_sample(assembly):
    folder, prediction, truth, valid, wrist = assembly
    ours, strict = metrics_of(folder)["mpjpe"], toolkit_error(prediction, truth, valid, valid[:, 0])
    assert ours == pytest.approx(toolkit_error(prediction, truth, valid, wrist), rel=1e-6)
    assert ours > strict + 1 and metrics_of(folder)["samples_without_wrist"] == 6


def test_the_bones_length_needs_a_valid_joint_9(assembly):
    folder, prediction, truth, valid, wrist = assembly
    some = valid[:, 9] & wrist
    length = [np.linalg.norm(pose[:, 9] - pose[:, 0], axis=1) for pose in (truth, prediction)]
    scaled = (prediction - prediction[:, :1]) * (length[0] / length[1])[:, None, None]
    wanted = toolkit_error(scaled, truth - truth[:, :1], valid, some)
    assert metrics_of(folder)["scaled_mpjpe"] == pytest.approx(wanted, rel=1e-6)
    assert metrics_of(folder)["samples_without_bone"] == 60 - some.sum()


def test_a_wrist_that_aligns_must_have_a_place(assembly):
    folder, *_ = assembly
    np.save(folder / "wrist.npy", np.ones(60, bool))
    assert "gt_xyz.npy: valid joints must be finite, those of 1 samples are not: 5" in (
        refused("evaluate.py", folder))


# ---- tables and plots

def test_metrics_json_has_all_keys_and_what_made_it(tmp_path):
    truth, _ = poses()
    folder = save_run(tmp_path / "run", noisy(truth), truth)
    run_here("evaluate.py", folder)
    metrics = metrics_of(folder)
    assert set(KEYS) <= set(metrics) and len(metrics["per_joint"]) == 21
    assert "intervals" not in metrics
    assert metrics["facts"]["numpy"] == np.__version__ and metrics["facts"]["machine"]
    assert metrics["facts"]["scipy"] and metrics["facts"]["commit"]


@pytest.fixture
def pair(tmp_path):
    """Two runs, the second with half of the errors."""
    truth, _ = poses()
    noise = noisy(truth) - truth
    return (save_run(tmp_path / "first", truth + noise, truth),
            save_run(tmp_path / "second", truth + 0.5 * noise, truth))


def test_runs_are_compared_in_one_table(pair, tmp_path):
    printed = run_here("evaluate.py", *pair, "--out", tmp_path / "out")
    table = (tmp_path / "out" / "table.md").read_text()
    first, second = map(metrics_of, pair)
    assert table in printed and "Gain: in MPJPE, over the first." in table
    assert f"| first | 40 | {first['mpjpe']:.2f} | {first['auc_0_50']:.3f} |" in table
    assert f"| second | 40 | **{second['mpjpe']:.2f}** | **{second['auc_0_50']:.3f}** |" in table
    assert "| +50.0 |" in table


def test_the_gain_is_taken_over_the_baseline(pair, tmp_path):
    table = run_here("evaluate.py", *pair, "--baseline", "second", "--out", tmp_path / "out")
    assert "over second" in table and "| -100.0 |" in table


def test_an_unknown_baseline_is_refused(pair, tmp_path):
    assert "--baseline third: no such run, expected one of first, second" in refused(
        "evaluate.py", *pair, "--baseline", "third", "--out", tmp_path / "out")


def test_absolute_errors_are_in_the_table_when_asked(pair):
    assert "abs. MPJPE" not in run_here("evaluate.py", pair[0])
    assert "abs. MPJPE" in run_here("evaluate.py", pair[0], "--absolute")


def test_the_csv_holds_what_the_markdown_shows(pair, tmp_path):
    run_here("evaluate.py", *pair, "--out", tmp_path / "out")
    lines = (tmp_path / "out" / "table.md").read_text().replace("*", "").splitlines()
    cells = [line.strip("| ").split(" | ") for line in (lines[0], *lines[2:4])]
    assert cells == list(csv.reader((tmp_path / "out" / "table.csv").read_text().splitlines()))


def test_of_a_single_run_all_goes_beside_its_predictions(pair, plots):
    run_here("evaluate.py", pair[0])
    assert (pair[0] / "table.md").exists() and (pair[0] / "pck.pdf").exists()
    assert cv2.imread(str(pair[0] / "pck.png")) is not None
    assert not (pair[0] / "labels.png").exists()


def latex_cells(path):
    """The cells of each line of a LaTeX table."""
    lines = [line.split("\\\\")[0] for line in path.read_text().splitlines() if "\\\\" in line]
    return [re.split(r" (?<!\\)& ", line.strip()) for line in lines]


def test_the_latex_table_has_the_same_cells(pair, tmp_path):
    run_here("evaluate.py", *pair, "--names", "a_b|c", "simhand", "--out", tmp_path / "out")
    heads, first, second = latex_cells(tmp_path / "out" / "table.tex")
    mean = rows_of(tmp_path / "out")[1]["MPJPE"]
    assert len(heads) == len(first) == len(second) == 10
    assert first[0] == r"a\_b|c" and second[2] == rf"\textbf{{{mean}}}"
    assert heads[-1] == r"gain, \%"


def test_every_special_character_is_escaped_for_latex():
    text = r"a_b{c}%&$#" + "\\~^ ±"
    assert text.translate(str.maketrans(evaluate.LATEX)) == (
        r"a\_b\{c\}\%\&\$\#\symbol{92}\symbol{126}\symbol{94} $\pm$")


def test_each_data_set_has_its_rows_baseline_and_best(tmp_path):
    truth, _ = poses()
    other, _ = poses(30, seed=1)
    noise, dexycb = noisy(truth) - truth, dict(dataset="dexycb", setup="s1")
    for folder, poses_of, scale, args in (("freihand/peclr", truth, 1, FREIHAND),
                                          ("dexycb/simhand", other, 0.5, dexycb),
                                          ("freihand/simhand", truth, 0.8, FREIHAND),
                                          ("dexycb/peclr", other, 0.4, dexycb)):
        prediction = poses_of + scale * noise[:len(poses_of)]
        write_log(save_run(tmp_path / folder, prediction, poses_of), **args)
    run_here("evaluate.py", *tmp_path.glob("*/*"), "--baseline", "peclr", "--out", tmp_path / "out")
    rows = {(row["data set"], row["run"]): row["gain, %"] for row in rows_of(tmp_path / "out")}
    assert rows == {("FreiHAND", "peclr"): "+0.0", ("FreiHAND", "simhand"): "+20.0",
                    ("DexYCB s1", "peclr"): "+0.0", ("DexYCB s1", "simhand"): "-25.0"}
    assert (tmp_path / "out" / "table.md").read_text().count("**") == 2 * 2 * 7


def test_a_run_without_a_log_is_on_the_data_set_whose_truth_it_has(tmp_path):
    truth, _ = poses()
    ours = write_log(save_run(tmp_path / "ours", noisy(truth), truth), **FREIHAND)
    theirs = save_run(tmp_path / "theirs", truth, truth)
    run_here("evaluate.py", theirs, ours, "--out", tmp_path / "out")
    assert [row["data set"] for row in rows_of(tmp_path / "out")] == ["FreiHAND", "FreiHAND"]


def test_runs_of_one_name_need_others(tmp_path):
    truth, _ = poses()
    runs = [save_run(tmp_path / part / "x", truth, truth) for part in "ab"]
    line = refused("evaluate.py", *runs, "--out", tmp_path / "out")
    assert f"{runs[0]} and {runs[1]} have one name, --names can give others" in line
    run_here("evaluate.py", *runs, "--names", "a", "b", "--out", tmp_path / "out")
    assert [row["run"] for row in rows_of(tmp_path / "out")] == ["a", "b"]


def test_names_are_one_for_each_run(pair, tmp_path):
    assert "--names has 1 names, expected 2" in refused(
        "evaluate.py", *pair, "--names", "a", "--out", tmp_path / "out")


def test_seeds_share_a_row(tmp_path):
    runs = save_seeds(tmp_path, "peclr", (50, 52, 57)) + save_seeds(tmp_path, "simhand", (40, 44))
    table = run_here("evaluate.py", *runs, "--seeds", "--out", tmp_path / "out")
    deviation = statistics.stdev((50, 52, 57))
    assert f"| peclr | 40 | 3 | 53.00 ± {deviation:.2f} |" in table
    assert "**42.00 ± 2.83**" in table
    first, second = rows_of(tmp_path / "out")
    assert (first["n"], second["n"]) == ("3", "2")
    assert (first["MPJPE"], first["MPJPE deviation"]) == ("53.00", f"{deviation:.2f}")
    assert second["gain, %"] == f"{100 * (1 - 42 / 53):+.1f}"


def test_p_is_that_of_welchs_test(tmp_path):
    errors = {"peclr": (50, 52, 57), "simhand": (40, 44, 46, 60)}
    runs = [folder for name in errors for folder in save_seeds(tmp_path, name, errors[name])]
    run_here("evaluate.py", *runs, "--seeds", "--baseline", "simhand", "--out", tmp_path / "out")
    first, second = rows_of(tmp_path / "out")
    p = ttest_ind(errors["peclr"], errors["simhand"], equal_var=False).pvalue
    assert float(first["p"]) == pytest.approx(p, rel=0.05) and 0.1 < p < 0.9
    assert second["p"] == ""  # the baseline itself


@pytest.mark.parametrize("errors", [(40,), (50, 50)])
def test_p_is_empty_where_nothing_can_be_said(errors, tmp_path):
    """One run, or two groups without any spread."""
    runs = save_seeds(tmp_path, "peclr", (55, 55)) + save_seeds(tmp_path, "simhand", errors)
    run_here("evaluate.py", *runs, "--seeds", "--out", tmp_path / "out")
    assert [row["p"] for row in rows_of(tmp_path / "out")] == ["", ""]


def test_the_curve_of_seeds_is_their_mean(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(evaluate, "draw",
                        lambda out, name, panels, **_: drawn.update({name: panels}))
    run_here("evaluate.py", *save_seeds(tmp_path, "simhand", (19, 40)), "--seeds", "--out",
             tmp_path / "out")
    (_, curve), = drawn["pck"][""].values()
    assert curve[60] == pytest.approx((1 + 1 / 21) / 2)  # 30 mm: one run's joints and both wrists


def test_seeds_want_a_seed_in_each_name(pair, tmp_path):
    assert "--seeds expects names like simhand-seed0" in refused(
        "evaluate.py", *pair, "--seeds", "--out", tmp_path / "out")


@pytest.fixture
def swept(tmp_path):
    """Runs of two methods, two shares of the labels and two sizes of pre-training, one of them
    twice; and one without pre-training."""
    truth, _ = poses()
    settings = [(method, share, pool) for method in ("peclr", "simhand") for share in (0.1, 1.0)
                for pool in (100, 1000)] + [("simhand", 0.1, 100)]
    for k, (method, share, pool) in enumerate(settings):
        folder = save_run(tmp_path / f"run{k}", noisy(truth, 5 + k), truth)
        write_log(folder, dict(method=method), pool, dataset="freihand", label_fraction=share)
    folder = save_run(tmp_path / "nothing", noisy(truth, 30), truth)
    write_log(folder, dataset="freihand", label_fraction=1.0, weights="none")
    return sorted(tmp_path.iterdir())


def mean_error(runs, method, **wanted):
    """The mean MPJPE of the runs of a method whose logs say so."""
    errors = []
    for folder in runs:
        settings = evaluate.read_settings(folder)
        if {"method": method, **wanted}.items() <= settings.items():
            errors.append(metrics_of(folder)["mpjpe"])
    return pytest.approx(np.mean(errors))


def test_a_curve_has_a_line_for_each_method_through_the_means(swept, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(evaluate, "draw",
                        lambda out, name, panels, **axes: drawn.update({name: panels}))
    run_here("evaluate.py", *swept, "--out", tmp_path / "out")
    for name, key, values in (("labels", "label_fraction", [0.1, 1.0]),
                              ("pool", "pool", [100, 1000])):
        lines = drawn[name]["FreiHAND"]
        assert list(lines) == ["peclr", "simhand"]  # without pre-training there is one run: no line
        for method, (x, y) in lines.items():
            assert x == values
            assert y == [mean_error(swept, method, **{key: value}) for value in values]


def test_curves_are_drawn_and_go_when_other_runs_have_none(swept, tmp_path, plots):
    out = tmp_path / "out"
    run_here("evaluate.py", *swept, "--out", out)
    assert all(cv2.imread(str(out / f"{name}.png")) is not None for name in ("labels", "pool"))
    run_here("evaluate.py", *swept[:2], "--out", out)
    assert not list(out.glob("labels.*")) and not list(out.glob("pool.*"))


def test_a_users_matplotlib_settings_do_not_end_a_run(pair, tmp_path):
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.family: No Such Font\n")
    environment = ENVIRONMENT | {"MPLBACKEND": "module://matplotlib_inline.backend_inline",
                                 "MATPLOTLIBRC": str(tmp_path), "PATH": "/nowhere"}
    command = [sys.executable, ROOT / "evaluate.py", pair[0]]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0 and result.stderr == ""
    assert cv2.imread(str(pair[0] / "pck.png")) is not None


# ---- files of others

def test_several_runs_need_a_folder_for_their_table(pair, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert "several runs need --out" in refused("evaluate.py", *pair)
    assert not list((tmp_path / "here").iterdir()) and not (pair[0] / "metrics.json").exists()


@pytest.mark.parametrize("name", ["table.tex", "labels.pdf", "pool.png"])
def test_a_file_of_another_program_is_neither_replaced_nor_deleted(name, pair, tmp_path):
    out = tmp_path / "paper"
    out.mkdir()
    (out / name).write_text("mine")
    assert f"{out}: holds {name}, which evaluate.py did not write" in refused(
        "evaluate.py", *pair, "--out", out)
    assert (out / name).read_text() == "mine" and [p.name for p in out.iterdir()] == [name]


def test_metrics_of_another_program_are_not_replaced(pair):
    (pair[0] / "metrics.json").write_text("{}")
    assert "holds metrics.json" in refused("evaluate.py", pair[0])
    assert (pair[0] / "metrics.json").read_text() == "{}"


def test_a_second_call_replaces_what_the_first_wrote(pair, tmp_path):
    for runs in (pair, pair[:1]):
        run_here("evaluate.py", *runs, "--out", tmp_path / "out")
    assert [row["run"] for row in rows_of(tmp_path / "out")] == ["first"]


# ---- units

@pytest.mark.parametrize("scale, unit, factor", [(0.001, "metres", "1000"),
                                                 (0.1, "centimetres", "10")])
def test_predictions_in_another_unit_are_refused_with_the_factor(scale, unit, factor, tmp_path):
    truth, _ = poses()
    folder = save_run(tmp_path / "run", noisy(truth, 15) * scale, truth)
    line = refused("evaluate.py", folder)
    assert f"pred_xyz.npy: poses seem to be in {unit}, expected mm: multiply them by {factor}" in (
        line)
    assert not (folder / "metrics.json").exists()


def test_true_poses_in_another_unit_are_refused(tmp_path):
    truth, _ = poses()
    folder = save_run(tmp_path / "run", truth / 1000, truth / 1000)
    assert "gt_xyz.npy: joints are 0.08" in refused("evaluate.py", folder)


def bad_predictions():
    truth, rng = poses()
    middle = np.broadcast_to(truth.mean(0), truth.shape)
    noise = rng.normal(size=truth.shape)
    yield "constant pose", truth[0] + 0 * truth
    yield "mean pose", middle
    yield "small mean pose", middle[:, :1] + 0.1 * (middle - middle[:, :1])
    yield "collapsed to the wrist", truth[:, :1] + 0 * truth
    yield "collapsed but for noise of the size of metres", truth[:, :1] + 0.06 * noise
    yield "noise of the size of centimetres", truth[:, :1] + 6 * noise
    yield "noise", truth[:, :1] + 60 * noise
    yield "exploded", 60_000 * noise
    yield "another hand", truth[::-1]


@pytest.mark.parametrize("prediction", [pytest.param(xyz, id=name)
                                        for name, xyz in bad_predictions()])
def test_a_bad_prediction_in_millimetres_is_not_taken_for_another_unit(prediction, tmp_path):
    folder = save_run(tmp_path / "run", prediction, poses()[0])
    evaluate.refuse_other_units(folder, evaluate.load_poses(folder))


# ---- submissions

def official_scores(keypoints, truth):
    """FreiHAND's and DexYCB's protocols on full arrays, in the unit given: mean and area,
    absolute, relative to the wrist, and aligned; from their descriptions."""
    aligned = np.stack([freihand_align(t, p) for t, p in zip(truth, keypoints)])
    for p, t in ((keypoints, truth), (keypoints - keypoints[:, :1], truth - truth[:, :1]),
                 (aligned, truth)):
        errors, steps = np.sqrt(((p - t) ** 2).sum(2)), np.linspace(0, 50, 100)
        pck = np.array([(errors <= step).mean(0) for step in steps])
        areas = np.trapezoid(pck, steps, axis=0) / np.trapezoid(np.ones(100), steps)
        yield errors.mean(0).mean(), areas.mean()


def scores_of(folder):
    """What metrics.json says, as a list like that of official_scores."""
    metrics = metrics_of(folder)
    pairs = [(metrics[f"{kind}mpjpe"], metrics[f"{kind}auc_0_50"]) for kind in ("abs_", "", "pa_")]
    return [pytest.approx(pair, rel=1e-6) for pair in pairs]


def write_names(folder, index, sides):
    lines = [f"{i}\tsome where/{i}.jpg\t{side}\n" for i, side in zip(index, sides)]
    (folder / "names.txt").write_text("".join(lines))


def test_the_file_for_freihand_scores_there_as_we_do(tmp_path):
    """Read back and scored by the benchmark's protocol, it gives the numbers of metrics.json."""
    truth, rng = poses(30)
    order = rng.permutation(30)
    folder = save_run(tmp_path / "run", noisy(truth, 12), truth)
    write_names(folder, order, ["right"] * 30)
    printed = run_here("evaluate.py", folder, "--submission", "freihand")
    assert "30 samples (FreiHAND has 3960); its mesh is zeros" in printed
    with zipfile.ZipFile(folder / "pred.zip") as archive:
        xyz, vertices = json.loads(archive.read("pred.json"))
    assert np.shape(vertices) == (30, 778, 3) and not np.any(vertices)
    official_truth = np.empty_like(truth)
    official_truth[order] = truth.astype(np.float32)
    assert list(official_scores(np.array(xyz) * 1000, official_truth)) == scores_of(folder)


def test_the_file_for_dexycb_scores_there_as_we_do(tmp_path):
    """The same, with left hands, which pred_xyz.npy mirrors, and gaps between the indices."""
    truth, rng = poses(30)
    order, left = rng.permutation(30), rng.uniform(size=30) < 0.5
    folder = save_run(tmp_path / "run", noisy(truth, 12), truth)
    write_names(folder, 3 * order, np.where(left, "left", "right"))
    write_log(folder, dataset="dexycb", paper_filter=False)
    run_here("evaluate.py", folder, "--submission", "dexycb")
    text = (folder / "dexycb.txt").read_text()
    rows = np.array([line.split(",") for line in text.splitlines()], float)
    assert rows.shape == (30, 64) and rows[:, 0].tolist() == list(range(0, 90, 3))
    assert text.startswith("0,")
    mirrored = np.where(left, -1, 1)[:, None, None] ** np.array([1, 0, 0])
    official_truth = np.empty_like(truth)
    official_truth[order] = truth.astype(np.float32).astype(float) * mirrored
    predicted = np.load(folder / "pred_xyz.npy").astype(float) * mirrored
    assert np.array_equal(rows[:, 1:].reshape(30, 21, 3)[order], predicted)  # every digit
    scores = official_scores(rows[:, 1:].reshape(30, 21, 3), official_truth)
    assert list(scores) == scores_of(folder)


@pytest.mark.parametrize("own_wrist", [False, True])
def test_a_submission_that_holds_the_true_wrist_says_so(own_wrist, tmp_path):
    truth, _ = poses()
    prediction = noisy(truth)
    if not own_wrist:  # as finetune.py writes it
        prediction[:, 0] = truth[:, 0]
    folder = save_run(tmp_path / "run", prediction, truth)
    write_names(folder, range(40), ["right"] * 40)
    printed = run_here("evaluate.py", folder, "--submission", "dexycb")
    words = "contains ground truth: to compare offline, not for a leaderboard"
    assert (words in printed) == (not own_wrist)


@pytest.fixture
def submitted(tmp_path):
    """A run with names.txt, whose indices have gaps."""
    truth, _ = poses(30)
    folder = save_run(tmp_path / "run", truth, truth)
    write_names(folder, range(0, 90, 3), ["right"] * 30)
    return folder


def test_freihand_wants_every_sample(submitted):
    assert "one of FreiHAND's is missing" in refused(
        "evaluate.py", submitted, "--submission", "freihand")


@pytest.mark.parametrize("words, args", [
    ("was tested on DexYCB filtered", dict(dataset="dexycb", paper_filter=True)),
    ("was tested on AssemblyHands", dict(dataset="assemblyhands"))])
def test_a_benchmark_wants_its_own_test_split(words, args, submitted):
    write_log(submitted, **args)
    assert words in refused("evaluate.py", submitted, "--submission", "dexycb")


def test_a_benchmark_wants_every_joint(submitted):
    prediction = np.load(submitted / "pred_xyz.npy")
    prediction[7, 4] = np.nan
    np.save(submitted / "pred_xyz.npy", prediction)
    assert "pred_xyz.npy: values must be finite, row 7 is not" in refused(
        "evaluate.py", submitted, "--allow-missing", "--submission", "dexycb")
    assert not (submitted / "dexycb.txt").exists()


@pytest.mark.parametrize("text, words", [
    ("-1\tx\tright\n" * 30, "no official indices but -1"),
    ("0\tx\tright\n" * 30, "an index occurs twice"), ("0\tx\n" * 30, "index, tab, picture"),
    ("a\tx\tleft\n" * 30, "index, tab, picture"), ("0\tx\tup\n" * 30, "left or right"),
    ("0\tx\tleft\n", "as many as in pred_xyz.npy, 30"), ("", "as many as")])
def test_broken_names_are_refused_before_anything_is_scored(text, words, submitted):
    (submitted / "names.txt").write_text(text)
    line = refused("evaluate.py", submitted, "--submission", "dexycb")
    assert f"{submitted}/names.txt: " in line and words in line
    assert not (submitted / "metrics.json").exists()


# ---- bad input

def broken(tmp_path):
    """Folders that are no runs, and what is said of them."""
    truth, _ = poses()
    nan = truth.copy()
    nan[3, 4] = np.nan
    (tmp_path / "empty").mkdir()
    cut = save_run(tmp_path / "cut", truth, truth) / "pred_xyz.npy"
    cut.write_bytes(cut.read_bytes()[:5000])
    yield "nowhere", "gt_xyz.npy: missing"
    yield "empty", "gt_xyz.npy: missing"
    yield "cut", "pred_xyz.npy: truncated"
    yield save_run(tmp_path / "short", truth[:-1], truth), "pred_xyz.npy: is float32 (39, 21, 3)"
    yield save_run(tmp_path / "none", truth[:0], truth[:0]), "none: holds no sample"
    yield save_run(tmp_path / "one hand", truth[0], truth[0]), "gt_xyz.npy: is float32 (21, 3)"
    yield save_run(tmp_path / "mask", truth, truth, valid=all_valid(truth)[:, :20]), "valid.npy: is"
    yield save_run(tmp_path / "unused", truth, truth, valid=~all_valid(truth)), "holds no sample"
    yield save_run(tmp_path / "wrists", truth, truth, wrist=np.ones(39, bool)), "wrist.npy: is bool"
    yield (save_run(tmp_path / "truth", truth, nan),
           "gt_xyz.npy: valid joints must be finite, those of 1 samples are not: 3")


def test_what_is_no_run_is_refused_in_one_line(tmp_path):
    for folder, words in broken(tmp_path):
        assert words in refused("evaluate.py", tmp_path / folder)


def test_all_folders_are_looked_at_before_any_is_scored(pair, tmp_path):
    assert "nowhere/gt_xyz.npy: missing" in refused("evaluate.py", pair[0], tmp_path / "nowhere",
                                                    "--out", tmp_path / "out")
    assert not (pair[0] / "metrics.json").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "{}\n", '{"step": 1}\n', '{"args": ["--lr", 1]}\n',
                                  '{"args": null}\n',
                                  '{"args": {"dataset": ["a"], "weights": null}}\n'])
def test_a_log_without_settings_is_none(text, pair):
    (pair[0] / "log.jsonl").write_text(text)
    assert evaluate.read_settings(pair[0])["data"] == ""


@pytest.fixture
def lost(tmp_path):
    """A run whose fourth prediction is not finite."""
    truth, _ = poses()
    nan = truth.copy()
    nan[3, 4] = np.nan
    return save_run(tmp_path / "lost", nan, truth)


def test_a_sample_without_a_prediction_is_refused(lost):
    assert ("pred_xyz.npy: valid joints must be finite, those of 1 samples are not: 3"
            in refused("evaluate.py", lost))


def test_samples_without_a_prediction_are_left_out_when_asked(lost):
    assert "| lost | 39 | 0.00 " in run_here("evaluate.py", lost, "--allow-missing")
    assert metrics_of(lost)["samples_missing"] == 1


def test_without_any_prediction_there_is_nothing_to_score(lost):
    np.save(lost / "pred_xyz.npy", np.full((40, 21, 3), np.inf, np.float32))
    assert "lost: holds no sample with a valid joint and a prediction" in refused(
        "evaluate.py", lost, "--allow-missing")


def test_runs_with_other_true_poses_are_noticed(pair, tmp_path):
    truth, _ = poses()
    other = save_run(tmp_path / "other", truth, truth + 1)
    printed = run_here("evaluate.py", *pair, other, "--out", tmp_path / "out")
    assert printed.count("warning: other true poses than") == 1
    assert f"{other}: warning: other true poses than {pair[0]}" in printed


def test_runs_with_other_valid_joints_are_noticed(pair, tmp_path):
    valid = np.ones((len(np.load(pair[0] / "gt_xyz.npy")), 21), bool)
    valid[:, 8] = False
    np.save(pair[1] / "valid.npy", valid)
    printed = run_here("evaluate.py", *pair, "--out", tmp_path / "out")
    assert f"{pair[1]}: warning: " in printed and "or other valid joints" in printed


def test_arrays_stored_by_columns_score_the_same(pair, tmp_path):
    run_here("evaluate.py", pair[0])
    before = metrics_of(pair[0])
    for name in ("gt_xyz", "pred_xyz"):
        array = np.load(pair[0] / f"{name}.npy")
        np.save(pair[0] / f"{name}.npy", np.asfortranarray(array))
    assert "warning" not in run_here("evaluate.py", *pair, "--out", tmp_path / "out")
    assert metrics_of(pair[0])["mpjpe"] == before["mpjpe"]
