"""Metrics on poses with known answers, and against other libraries."""

import csv
import dataclasses
import json
import math
import re
import statistics
import zipfile

import cv2
import numpy as np
import pytest
from scipy.linalg import orthogonal_procrustes
from scipy.stats import bootstrap

import evaluate
from common import InputError
from conftest import refused, run, run_here


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


def rows_of(path):
    """A .csv file -> a dict a row."""
    return list(csv.DictReader(path.read_text().splitlines()))


def test_perfect_poses_have_no_error_and_hopeless_ones_no_area():
    truth, _ = poses()
    result, curve = evaluate.score(truth, truth, all_valid(truth))
    assert all(result[k] == pytest.approx(0, abs=1e-6) for k in result if k.endswith("mpjpe"))
    assert (all(result[k] == 1 for k in result if "auc" in k and "pa" not in k)
            and (curve == 1).all())
    assert result["pa_auc_0_50"] > 0.99  # rounding leaves an error above the threshold 0
    far = truth.copy()
    far[:, 1:] += (1000, 0, 0)
    result, _ = evaluate.score(far, truth, all_valid(truth))
    assert (result["mpjpe"] == pytest.approx(1000 * 20 / 21)
            and result["auc_0_50"] == pytest.approx(1 / 21))  # wrist: 0
    assert result["abs_mpjpe"] == pytest.approx(1000 * 20 / 21)


def test_what_each_alignment_forgives():
    truth, rng = poses()
    prediction = truth + rng.normal(0, 8, truth.shape)
    valid = all_valid(truth)
    base, _ = evaluate.score(prediction, truth, valid)
    moved, _ = evaluate.score(prediction + (30, -20, 100), truth, valid)
    assert (moved["mpjpe"] == pytest.approx(base["mpjpe"])
            and moved["abs_mpjpe"] > base["abs_mpjpe"] + 50)
    grown, _ = evaluate.score(prediction * 1.3, truth, valid)
    assert (grown["scaled_mpjpe"] == pytest.approx(base["scaled_mpjpe"])
            and grown["mpjpe"] > base["mpjpe"] + 5)
    turned = prediction @ np.linalg.qr(rng.normal(size=(3, 3)))[0]
    turned[..., 0] *= -1  # a reflection is allowed
    turned, _ = evaluate.score(turned, truth, valid)
    assert (turned["pa_mpjpe"] == pytest.approx(base["pa_mpjpe"])
            and turned["scaled_mpjpe"] > base["scaled_mpjpe"] + 5)


def freihand_align(truth, prediction):
    """FreiHAND's protocol, one sample, written down from its description with scipy's Procrustes
    rotation."""
    t, p = truth - truth.mean(0), prediction - prediction.mean(0)
    st, sp = np.linalg.norm(t) + 1e-8, np.linalg.norm(p) + 1e-8
    rotation, scale = orthogonal_procrustes(t / st, p / sp)
    return (p / sp) @ rotation.T * scale * st + truth.mean(0)


def test_procrustes_against_scipy_with_invalid_joints():
    truth, rng = poses()
    prediction = (truth @ np.linalg.qr(rng.normal(size=(3, 3)))[0] * 0.7
                  + rng.normal(0, 10, truth.shape))
    valid = rng.uniform(size=truth.shape[:2]) > 0.3
    found = evaluate.align(prediction, truth, valid)
    for i in range(len(truth)):
        v = valid[i]
        assert np.allclose(found[i, v], freihand_align(truth[i, v], prediction[i, v]),
                           rtol=1e-6, atol=1e-6)
    # Works because of the 1e-8.
    zero = evaluate.align(np.zeros_like(truth), truth, all_valid(truth))
    assert np.allclose(zero, truth.mean(1, keepdims=True))


def test_pck_and_auc_on_known_errors():
    truth = np.zeros((2, 21, 3))
    truth[:, 9] = (0, 90, 0)
    prediction = truth.copy()
    prediction[0, 5] += (25.0, 0, 0)
    result, curve = evaluate.score(prediction, truth, all_valid(truth))
    assert (result["per_joint"][5] == pytest.approx(12.5)
            and result["mpjpe"] == pytest.approx(12.5 / 21))
    step = np.linspace(0, 50, 100)
    assert np.allclose(curve, np.where(step < 25, 1 - 0.5 / 21, 1), rtol=1e-12, atol=0)
    prediction[:, 1:] = truth[:, 1:] + (50, 0, 0)  # an error at a threshold counts
    result, curve = evaluate.score(prediction, truth, all_valid(truth))
    assert curve[-2:].tolist() == [1 / 21, 1]
    assert result["auc_20_50"] == pytest.approx(1 / 21 + 20 / 21 * 0.5 / 14)
    ramp = np.linspace(0, 1, 15)
    assert evaluate.area_under(ramp, np.linspace(20, 50, 15)) == pytest.approx(0.5)


def test_every_metric_against_a_slow_loop():
    truth, rng = poses(12)
    prediction, valid = (truth + rng.normal(0, 15, truth.shape),
                         rng.uniform(size=truth.shape[:2]) > 0.25)
    result, curve = evaluate.score(prediction, truth, valid)
    errors = {"abs_": [[] for _ in range(21)], "": [[] for _ in range(21)],
              "scaled_": [[] for _ in range(21)], "pa_": [[] for _ in range(21)]}
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
        assert result[prefix + "mpjpe"] == pytest.approx(np.mean([np.mean(e) for e in lists]),
                                                         rel=1e-6)
        for name, steps in (("auc_0_50", np.linspace(0, 50, 100)),
                            ("auc_20_50", np.linspace(20, 50, 15))):
            if prefix + name in result:
                pck = [np.mean([np.mean(np.array(e) <= s) for e in lists]) for s in steps]
                area = np.trapezoid(pck, steps) / (steps[-1] - steps[0])
                assert result[prefix + name] == pytest.approx(area, rel=1e-6)
    steps = np.linspace(0, 50, 100)
    assert np.allclose(curve, [np.mean([np.mean(np.array(e) <= s) for e in errors[""]])
                               for s in steps], atol=1e-12)
    assert result["samples_without_wrist"] == (~valid[:, 0]).sum()
    assert result["samples_without_bone"] == (~(valid[:, 0] & valid[:, 9])).sum()


def test_two_joints_are_not_aligned():
    """A similarity fits any two points, and would score them 0."""
    truth, rng = poses(6)
    prediction, valid = truth + rng.normal(0, 15, truth.shape), all_valid(truth)
    whole, _ = evaluate.score(prediction[1:], truth[1:], valid[1:])
    valid[0, 2:] = False
    result, _ = evaluate.score(prediction, truth, valid)
    assert (result["samples_without_procrustes"] == 1
            and result["pa_mpjpe"] == pytest.approx(whole["pa_mpjpe"]))


def test_a_few_samples_with_a_wrist_still_have_intervals(tmp_path):
    """Some draws hold none of them."""
    truth, rng = poses()
    valid = all_valid(truth)
    valid[3:, 0] = False
    run = save_run(tmp_path / "run", truth + rng.normal(0, 10, truth.shape), truth, valid)
    printed = run_here("evaluate.py", run)
    assert "37 of 40 samples have no wrist to align by" in printed
    low, high = json.loads((run / "metrics.json").read_text())["intervals"]["mpjpe"]
    assert 0 < low < high
    valid[:, 0] = False
    run_here("evaluate.py", save_run(tmp_path / "none", truth, truth, valid),
             "--out", tmp_path / "out")
    row, = rows_of(tmp_path / "out" / "table.csv")
    assert row["MPJPE"] == row["MPJPE low"] == "" and row["PA-MPJPE"] == "0.00"


def test_invalid_joints_change_nothing():
    truth, rng = poses()
    prediction, valid = (truth + rng.normal(0, 10, truth.shape),
                         rng.uniform(size=truth.shape[:2]) > 0.3)
    other = np.where(valid[..., None], prediction, 1e5)
    # An invalid wrist or joint 9 takes the sample out; they may then be anything.
    keep = valid[:, 0] & valid[:, 9]
    a, _ = evaluate.score(prediction, truth, valid)
    b, _ = evaluate.score(other, truth, valid)
    assert keep.any() and not keep.all() and all(a[k] == pytest.approx(b[k]) for k in a)


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


def test_a_wrist_that_is_known_but_not_valid_aligns_its_sample(tmp_path):
    truth, rng = poses(60)
    prediction, valid = (truth + rng.normal(0, 15, truth.shape),
                         rng.uniform(size=truth.shape[:2]) > 0.2)
    valid[:25, 0] = False
    prediction[:25, 1:] += (20, 0, 0)  # so that it matters whether they count
    truth[:5, 0] = 0
    truth[5, 0] = np.nan
    wrist = np.arange(60) > 5  # of six the place is not known
    known = save_run(tmp_path / "known", prediction, truth, valid)
    np.save(known / "wrist.npy", wrist)
    plain = save_run(tmp_path / "plain", prediction, truth, valid)
    run_here("evaluate.py", known, plain, "--out", tmp_path / "out")
    ours, strict = (json.loads((run / "metrics.json").read_text()) for run in (known, plain))
    assert ours["mpjpe"] == pytest.approx(toolkit_error(prediction, truth, valid, wrist), rel=1e-6)
    assert strict["mpjpe"] == pytest.approx(toolkit_error(prediction, truth, valid, valid[:, 0]),
                                            rel=1e-6)
    assert ours["mpjpe"] > strict["mpjpe"] + 1
    assert (ours["samples_without_wrist"] == 6 < strict["samples_without_wrist"]
            == (~valid[:, 0]).sum())
    assert ours["samples_without_bone"] == 60 - (wrist & valid[:, 9]).sum()
    some = valid[:, 9] & wrist  # its length needs joint 9 as well, which must be valid
    length = [np.linalg.norm(pose[:, 9] - pose[:, 0], axis=1) for pose in (truth, prediction)]
    scaled = (prediction - prediction[:, :1]) * (length[0] / length[1])[:, None, None]
    relative = truth - truth[:, :1]
    assert ours["scaled_mpjpe"] == pytest.approx(toolkit_error(scaled, relative, valid, some),
                                                 rel=1e-6)
    for key in ("abs_mpjpe", "pa_mpjpe", "abs_auc_0_50", "pa_auc_0_50"):  # they align by no wrist
        assert ours[key] == strict[key]
    np.save(known / "wrist.npy", wrist[:-1])
    assert "wrist.npy: is bool (59,), expected bool (60)" in refused("evaluate.py", known)
    np.save(known / "wrist.npy", np.ones(60, bool))
    assert "gt_xyz.npy: valid joints must be finite, those of 1 samples are not: 5" in refused(
        "evaluate.py", known)


KEYS = ("samples", "abs_mpjpe", "abs_auc_0_50", "mpjpe", "auc_0_50", "auc_20_50", "scaled_mpjpe",
        "scaled_auc_0_50", "scaled_auc_20_50", "pa_mpjpe", "pa_auc_0_50", "per_joint")


def test_intervals_against_scipys_bootstrap():
    truth, rng = poses(150)
    prediction, valid = (truth + rng.normal(0, 15, truth.shape),
                         rng.uniform(size=truth.shape[:2]) > 0.25)
    prediction[::7] += rng.normal(0, 40, prediction[::7].shape)  # a skewed distribution
    result, _ = evaluate.score(prediction, truth, valid, 4000)
    again, _ = evaluate.score(prediction, truth, valid, 4000)
    assert result == again
    errors = np.linalg.norm(prediction - prediction[:, :1] - truth + truth[:, :1], axis=2)
    errors[~(valid & valid[:, :1])] = np.nan
    steps = np.linspace(20, 50, 15)

    def auc(rows):
        known = ~np.isnan(errors[rows])
        return np.trapezoid([np.mean([np.mean(errors[rows][k, j] <= step)
                                      for j, k in enumerate(known.T)])
                             for step in steps], steps) / 30

    for key, statistic, tolerance in (
            ("mpjpe", lambda rows: np.nanmean(errors[rows], 0).mean(), 0.06),
            ("auc_20_50", auc, 0.1)):
        draws = 4000 if key == "mpjpe" else 600
        wanted = bootstrap((np.arange(150),), statistic, method="percentile", n_resamples=draws,
                           vectorized=False, random_state=1).confidence_interval
        low, high = result["intervals"][key]
        assert low < result[key] < high
        assert [low, high] == pytest.approx(list(wanted),
                                            abs=tolerance * (wanted.high - wanted.low))
    assert set(result["intervals"]) == {key for key in result if "mpjpe" in key or "auc" in key}


def test_intervals_of_many_samples_against_the_normal_approximation(monkeypatch):
    """More samples than the bootstrap draws one by one: it draws groups of them, the last ones
    smaller."""
    monkeypatch.setattr(evaluate, "GROUPS", 5000)
    rng = np.random.default_rng(0)
    size = 12_000
    truth = rng.normal(0, 40, (size, 21, 3)).astype(np.float32)
    prediction = (truth + rng.normal(0, 15, truth.shape).astype(np.float32)
                  * rng.uniform(0, 2, (size, 1, 1)))
    prediction[-2000:] += np.float32([0, 0, 300])  # the last ones weigh in
    result, _ = evaluate.score(prediction, truth, all_valid(truth), 400)
    each = np.linalg.norm(prediction - truth, axis=2).mean(1)
    groups = evaluate.sum_groups(each[:, None] * np.ones(21),
                                 np.random.default_rng(0).permutation(size))
    assert (groups.shape == (evaluate.GROUPS, 21)
            and groups.sum(0) == pytest.approx(each.sum() * np.ones(21)))
    low, high = result["intervals"]["abs_mpjpe"]
    assert high - low == pytest.approx(2 * 1.96 * each.std() / size ** 0.5, rel=0.2)
    assert (low + high) / 2 == pytest.approx(each.mean(), rel=5e-3)
    assert result["abs_mpjpe"] == pytest.approx(each.mean(), rel=1e-6)


def test_runs_are_compared_in_one_table(tmp_path):
    truth, rng = poses()
    noise = rng.normal(0, 10, truth.shape)
    first = save_run(tmp_path / "first", truth + noise, truth)
    second = save_run(tmp_path / "second", truth + 0.5 * noise, truth, all_valid(truth))
    out = tmp_path / "all"
    printed = run("evaluate.py", first, second, "--out", out).stdout
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (first, second)]
    assert all(set(KEYS) <= set(m) and len(m["per_joint"]) == 21 for m in metrics)
    assert metrics[1]["mpjpe"] == pytest.approx(metrics[0]["mpjpe"] / 2, rel=1e-4)
    table = (out / "table.md").read_text()
    assert (table in printed and "AUC 0-50" in table and "| +50.0 |" in table
            and "over first" in table)
    low, high = metrics[1]["intervals"]["mpjpe"]
    assert f"**{metrics[1]['mpjpe']:.2f}** ({low:.2f}-{high:.2f})" in table
    assert (f"**{metrics[1]['auc_0_50']:.3f}** (" in table
            and metrics[1]["auc_0_50"] > metrics[0]["auc_0_50"])
    assert f"| {metrics[0]['mpjpe']:.2f} (" in table
    rows = rows_of(out / "table.csv")
    assert ([row["run"] for row in rows] == ["first", "second"]
            and rows[1]["MPJPE"] == f"{metrics[1]['mpjpe']:.2f}")
    assert rows[1]["MPJPE low"] == f"{low:.2f}" and rows[1]["gain, %"] == "+50.0"
    for name in ("pck", "joints"):
        assert cv2.imread(str(out / f"{name}.png")) is not None
        assert (out / f"{name}.pdf").read_bytes()[:4] == b"%PDF"
    assert not (out / "labels.png").exists() and not (out / "pool.png").exists()
    table = run_here("evaluate.py", first, second, "--absolute", "--baseline", "second",
                     "--out", out)
    assert "abs. MPJPE" in table and "over second" in table and "| -100.0 |" in table
    heads = table.split("| run |")[1].splitlines()[0].split("|")
    assert (all(re.search(r" \d+-\d+ $", head) for head in heads if "AUC" in head)
            and "AUC" in heads[2])
    assert "--baseline third: no such row, expected one of first, second" in refused(
        "evaluate.py", first, second, "--baseline", "third", "--out", out)
    run_here("evaluate.py", first)  # of a single run, all goes beside its predictions
    assert ((first / "table.md").exists() and (first / "joints.pdf").exists()
            and not (second / "table.md").exists())


def write_log(folder, pretraining=None, hands=None, **args):
    rows = [{"command": "", "args": args}]
    rows += [{"pretraining": {"args": pretraining, "hands": hands}}] * bool(pretraining)
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def columns_of(latex):
    """The cells of each line of a LaTeX table's body; a \\multicolumn counts as often as it
    is wide."""
    lines = [line.split("\\\\")[0] for line in latex.splitlines() if "\\\\" in line]
    cells = [re.split(r"(?<!\\)&", line) for line in lines]
    return [sum(int(m[1]) if (m := re.search(r"multicolumn\{(\d+)", cell)) else 1
                for cell in line)
            for line in cells]


def test_columns_are_grouped_by_data_set(tmp_path):
    truth, rng = poses()
    noise, runs = rng.normal(0, 10, truth.shape), []
    freihand, dexycb = dict(dataset="freihand"), dict(dataset="dexycb", setup="s1")
    for name, scale, args in (("freihand-a_b", 1, freihand), ("dexycb-simhand", 0.5, dexycb),
                              ("freihand-simhand", 0.8, freihand), ("dexycb-a_b", 0.4, {})):
        runs.append(write_log(save_run(tmp_path / name, truth + scale * noise, truth), **args))
    runs[3].joinpath("log.jsonl").unlink()  # of another's method: the name alone tells its data set
    data = [each.data for each in evaluate.name_runs(runs, False)]
    assert data == ["FreiHAND", "DexYCB s1", "FreiHAND", "DexYCB"]
    write_log(runs[3], dataset="dexycb", setup="s1")
    run_here("evaluate.py", *runs, "--baseline", "a_b", "--out", tmp_path / "out")
    latex = (tmp_path / "out" / "table.tex").read_text()
    assert len(set(columns_of(latex))) == 1 and len(columns_of(latex)) == 4 and "a\\_b" in latex
    # A best one a column and data set.
    assert latex.count("{") == latex.count("}") and latex.count("\\textbf") == 14
    first, second = rows_of(tmp_path / "out" / "table.csv")
    assert (first["run"], second["run"]) == ("a_b", "simhand")
    assert second["FreiHAND gain, %"] == "+20.0" and second["DexYCB s1 gain, %"] == "-25.0"
    assert first["DexYCB s1 gain, %"] == "+0.0"
    text = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert (text[0].count("|") == text[2].count("|") == text[3].count("|")
            and text[3].startswith("| simhand |"))


def test_names_are_escaped_for_latex():
    assert evaluate.escape(r"a_b{c}%") == r"a\_b\{c\}\%"
    assert evaluate.escape("\\~^") == r"\symbol{92}\symbol{126}\symbol{94}"


def test_seeds_share_a_row(tmp_path):
    truth, rng = poses()
    runs = [save_run(tmp_path / f"{name}-seed{k}",
                     truth + scale * rng.normal(0, 10, truth.shape), truth)
            for name, scale in (("peclr", 1), ("simhand", 0.7)) for k in range(3)]
    table = run_here("evaluate.py", *runs, "--seeds", "--out", tmp_path / "out")
    errors = [json.loads((folder / "metrics.json").read_text())["mpjpe"] for folder in runs]
    assert f"{statistics.mean(errors[:3]):.2f} ± {statistics.stdev(errors[:3]):.2f}" in table
    assert f"**{statistics.mean(errors[3:]):.2f}** ± {statistics.stdev(errors[3:]):.2f}" in table
    rows = rows_of(tmp_path / "out" / "table.csv")
    assert [row["runs"] for row in rows] == ["3", "3"]
    assert rows[0]["MPJPE deviation"] == f"{statistics.stdev(errors[:3]):.2f}"
    assert rows[1]["gain, %"] == (
        f"{100 * (1 - statistics.mean(errors[3:]) / statistics.mean(errors[:3])):+.1f}")
    run_here("evaluate.py", runs[0], "--seeds", "--out", tmp_path / "one")
    only, = rows_of(tmp_path / "one" / "table.csv")
    assert only["MPJPE deviation"] == ""  # of one there is none
    plain = save_run(tmp_path / "plain", truth, truth)
    assert "expects a seed in each name" in refused("evaluate.py", *runs, plain, "--seeds",
                                                    "--out", tmp_path / "out")


def test_plots_against_label_fraction_and_size_of_pretraining(tmp_path):
    truth, rng = poses()
    noise, runs = rng.normal(0, 10, truth.shape), []
    for method in ("peclr", "simhand"):
        for fraction in (0.1, 1.0):
            for pool in (100, 1000):
                name, scale = f"{method}-{fraction}-{pool}", rng.uniform(0.5, 2)
                before = dict(method=method, hands=["data/hands"], pairs=[f"data/{pool}"], out=name)
                folder = save_run(tmp_path / name, truth + scale * noise, truth)
                runs.append(write_log(folder, before, pool, dataset="freihand",
                                      label_fraction=fraction,
                                      weights=f"runs/{name}/backbone.pt"))
    runs.append(write_log(save_run(tmp_path / "nothing", truth + 3 * noise, truth),
                          dataset="freihand", label_fraction=1.0, weights="none"))
    run_here("evaluate.py", *runs, "--out", tmp_path / "out")
    for name in ("labels", "pool"):
        assert cv2.imread(str(tmp_path / "out" / f"{name}.png")) is not None
    loaded = evaluate.name_runs(runs, False)
    for each in loaded:
        each.metrics = json.loads((each.folder / "metrics.json").read_text())
    error = {each.name: each.metrics["mpjpe"] for each in loaded}
    axis, = evaluate.plot_against(loaded, "pool", "hands").axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axis.lines}
    for method in ("peclr", "simhand"):
        for fraction in (0.1, 1.0):
            assert lines[f"{method}, label_fraction {fraction}"] == [
                [pool, pytest.approx(error[f"{method}-{fraction}-{pool}"])] for pool in (100, 1000)]
    # A level: no pre-training.
    assert lines["none, label_fraction 1.0"][0][1] == pytest.approx(error["nothing"])
    # As of another seed: points apart, the line through the mean.
    twin = dataclasses.replace(loaded[0], metrics={"mpjpe": 100.0})
    # Without a log: a level.
    theirs = dataclasses.replace(loaded[0], metrics={"mpjpe": 50.0}, settings={})
    axis, = evaluate.plot_against([*loaded[:2], twin, theirs], "pool", "hands").axes
    lines = [line.get_xydata().tolist() for line in axis.lines]
    mean = (error["peclr-0.1-100"] + 100) / 2
    assert [line[0][1] for line in lines if len(line) == 2 and line[0][0] == 0] == [50.0]
    assert [[100, pytest.approx(mean)], [1000, pytest.approx(error["peclr-0.1-1000"])]] in lines
    axis, = evaluate.plot_against(loaded, "label_fraction", "labels").axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axis.lines}
    assert lines["simhand, pairs data/100"] == [
        [f, pytest.approx(error[f"simhand-{f}-100"])] for f in (0.1, 1.0)]
    assert evaluate.plot_against(loaded[:2], "label_fraction", "labels") is None  # the same in both


def test_names_tell_runs_apart(tmp_path):
    def rows(*paths, seeds=False):
        return [run.row for run in evaluate.name_runs([tmp_path / path for path in paths], seeds)]

    assert rows("a/x", "b/x") == ["a/x", "b/x"] and rows("a/x", "b/y") == ["x", "y"]
    assert rows("x-freihand-1", "freihand_x", "y/freihand") == ["x-1", "x", "y"]
    assert rows("a/freihand", "b/freihand", "a/dexycb") == ["a", "b", "a"]
    assert rows("x-seed1", "x-seed10", "x-seed2", seeds=True) == ["x", "x", "x"]
    assert rows("simhand/seed0", "simhand/seed1", "seed0-x", seeds=True) == [
        "simhand", "simhand", "x"]
    # One row would hide one of them.
    assert rows("freihand-x", "x-freihand") == ["freihand-x", "x-freihand"]
    with pytest.raises(InputError, match="twice"):
        rows("x", "y/../x")


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
    metrics = json.loads((folder / "metrics.json").read_text())
    pairs = [(metrics[f"{kind}mpjpe"], metrics[f"{kind}auc_0_50"]) for kind in ("abs_", "", "pa_")]
    return [pytest.approx(pair, rel=1e-6) for pair in pairs]


def test_the_file_for_freihand_scores_there_as_we_do(tmp_path):
    """Read back and scored by the benchmark's protocol, it gives the numbers of metrics.json."""
    truth, rng = poses(30)
    order = rng.permutation(30)
    folder = save_run(tmp_path / "run", truth + rng.normal(0, 12, truth.shape), truth)
    (folder / "names.txt").write_text("".join(f"{i}\tsome where/{i}.jpg\tright\n" for i in order))
    printed = run_here("evaluate.py", folder, "--submission", "freihand")
    assert "3960" in printed and "its mesh is zeros" in printed and "only those of xyz" in printed
    with zipfile.ZipFile(folder / "pred.zip") as archive:
        xyz, vertices = json.loads(archive.read("pred.json"))
    assert (np.shape(xyz) == (30, 21, 3) and np.shape(vertices) == (30, 778, 3)
            and not np.any(vertices))
    official_truth = np.empty_like(truth)
    official_truth[order] = truth.astype(np.float32)
    assert list(official_scores(np.array(xyz) * 1000, official_truth)) == scores_of(folder)


def test_the_file_for_dexycb_scores_there_as_we_do(tmp_path):
    """The same, with left hands, which pred_xyz.npy mirrors, and gaps between the indices."""
    truth, rng = poses(30)
    order = rng.permutation(30)
    left = rng.uniform(size=30) < 0.5
    folder = save_run(tmp_path / "run", truth + rng.normal(0, 12, truth.shape), truth)
    sides = np.where(left, "left", "right")
    (folder / "names.txt").write_text("".join(f"{3 * i}\tx\t{side}\n"
                                              for i, side in zip(order, sides)))
    write_log(folder, dataset="dexycb", paper_filter=False)
    run_here("evaluate.py", folder, "--submission", "dexycb")
    rows = np.array([line.split(",")
                     for line in (folder / "dexycb.txt").read_text().splitlines()], float)
    assert rows.shape == (30, 64) and rows[:, 0].tolist() == list(range(0, 90, 3))
    mirrored = np.where(left, -1, 1)[:, None, None] ** np.array([1, 0, 0])
    official_truth = np.empty_like(truth)
    official_truth[order] = truth.astype(np.float32).astype(float) * mirrored
    predicted = np.load(folder / "pred_xyz.npy").astype(float) * mirrored
    assert np.array_equal(rows[:, 1:].reshape(30, 21, 3)[order], predicted)  # every digit
    scores = official_scores(rows[:, 1:].reshape(30, 21, 3), official_truth)
    assert list(scores) == scores_of(folder)


def test_submissions_that_a_benchmark_would_not_take_are_refused(tmp_path):
    truth, _ = poses(30)
    folder = save_run(tmp_path / "run", truth, truth)
    (folder / "names.txt").write_text("".join(f"{3 * i}\tx\tright\n" for i in range(30)))
    assert "has no gaps" in refused("evaluate.py", folder, "--submission", "freihand")
    write_log(folder, dataset="dexycb", paper_filter=True)
    assert "leaves samples out" in refused("evaluate.py", folder, "--submission", "dexycb")
    write_log(folder, dataset="assemblyhands")
    assert "was tested on assemblyhands" in refused("evaluate.py", folder, "--submission", "dexycb")
    write_log(folder, dataset="dexycb", paper_filter=False)
    hole = truth.copy()
    hole[7, 4] = np.nan
    lost = save_run(tmp_path / "lost", hole, truth)
    (lost / "names.txt").write_text((folder / "names.txt").read_text())
    line = refused("evaluate.py", lost, "--allow-missing", "--submission", "dexycb")
    assert "pred_xyz.npy: values must be finite, row 7 is not" in line
    assert not (lost / "dexycb.txt").exists()

    for text, words in (("-1\tx\tright\n" * 30, "no official indices but -1"),
                        ("0\tx\tright\n" * 30, "an index occurs twice"),
                        ("0\tx\n", "index, tab, picture"),
                        ("a\tx\tleft\n", "index, tab, picture"), ("0\tx\tup\n", "left or right"),
                        ("0\tx\tleft\n", "pred_xyz.npy")):
        (folder / "names.txt").write_text(text)
        assert words in refused("evaluate.py", folder, "--submission", "dexycb")
    (folder / "names.txt").unlink()
    assert "names.txt: missing" in refused("evaluate.py", folder, "--submission", "dexycb")
    assert not (folder / "metrics.json").exists()  # files are looked at before anything is scored


def test_bad_input_is_refused_in_one_line(tmp_path):
    truth, _ = poses()
    good = save_run(tmp_path / "good", truth, truth)
    run("evaluate.py", tmp_path / "nowhere", status=2)
    assert "no such folder" in refused("evaluate.py", good, tmp_path / "nowhere")
    short = save_run(tmp_path / "short", truth[:-1], truth)
    assert "pred_xyz.npy: is float32 (39, 21, 3)" in refused("evaluate.py", good, short)
    assert not (good / "metrics.json").exists()  # all folders are looked at before any is scored
    (tmp_path / "empty").mkdir()
    assert "gt_xyz.npy: missing" in refused("evaluate.py", tmp_path / "empty")
    none = save_run(tmp_path / "empty arrays", truth[:0], truth[:0])
    assert "empty arrays: holds no sample with a valid joint" in refused("evaluate.py", none)
    assert "valid.npy" in refused(
        "evaluate.py", save_run(tmp_path / "mask", truth, truth, all_valid(truth)[:, :20]))
    nan = truth.copy()
    nan[3, 4] = np.nan
    assert "gt_xyz.npy: valid joints must be finite, those of 1 samples are not: 3" in refused(
        "evaluate.py", save_run(tmp_path / "truth", truth, nan, all_valid(truth)))
    none = save_run(tmp_path / "none", truth, truth, ~all_valid(truth))
    assert "none: holds no sample with a valid joint" in refused("evaluate.py", none)
    (tmp_path / "linked").symlink_to(good)
    assert "the same run is given twice: " in refused("evaluate.py", good, tmp_path / "linked")
    for row in ({"args": [1]}, {"pretraining": "x"}, {"pretraining": {"args": {"hands": 7}}},
                {"args": {"setup": 3}}, {"args": {"label_fraction": "0.3"}},
                {"args": {"dataset": ["freihand"]}}, {"args": "abc"}):
        (good / "log.jsonl").write_text(json.dumps(row) + "\n")
        assert "log.jsonl: expected the log of finetune.py, or none" in refused("evaluate.py", good)
    for text in ("", "{}\n", '{"args": null}\n'):
        (good / "log.jsonl").write_text(text)
        run_here("evaluate.py", good)  # these are no logs of another program


def test_samples_without_a_prediction_are_left_out_only_when_asked(tmp_path):
    truth, _ = poses()
    nan = truth.copy()
    nan[3, 4] = np.nan
    lost = save_run(tmp_path / "nan", nan, truth)
    line = refused("evaluate.py", lost)
    assert ("pred_xyz.npy: valid joints must be finite, those of 1 samples are not: 3 "
            "(--allow-missing") in line
    table = run_here("evaluate.py", lost, "--allow-missing")
    assert "1 of 40 samples left out" in table and "| nan | 39 | 0.00 " in table
    assert json.loads((lost / "metrics.json").read_text())["samples_missing"] == 1
    every = save_run(tmp_path / "every", np.full_like(truth, np.inf), truth)
    assert "every: holds no sample with a valid joint and a finite" in refused(
        "evaluate.py", every, "--allow-missing")


def test_runs_with_other_true_poses_are_noticed(tmp_path):
    truth, _ = poses()
    good = save_run(tmp_path / "good", truth, truth)
    same = save_run(tmp_path / "same", truth + 2, truth)
    other = save_run(tmp_path / "other", truth, truth + 1)
    printed = run_here("evaluate.py", good, same, other, "--out", tmp_path / "out")
    assert printed.count("warning: other true poses than") == 1
    assert f"{other}: warning: other true poses than {good}" in printed
    np.save(same / "gt_xyz.npy", np.asfortranarray(truth, np.float32))  # however they are stored
    assert "warning" not in run_here("evaluate.py", good, same, "--out", tmp_path / "out")


def test_metres_are_noticed(tmp_path):
    truth, _ = poses()
    warnings = run_here("evaluate.py", save_run(tmp_path / "m", truth / 1000, truth))
    assert (warnings.count("not metres?") == 1
            and "pred_xyz.npy: warning: the bone 0-9 has a median of 0.09" in warnings)
    assert run_here("evaluate.py", save_run(tmp_path / "b", truth / 1000, truth / 1000)).count(
        "not metres?") == 2
    assert run_here("evaluate.py", save_run(tmp_path / "cm", truth / 10, truth / 10)).count(
        "are these mm?") == 2
    assert "warning" not in run_here("evaluate.py", save_run(tmp_path / "mm", truth, truth))
