"""Score 3D hand poses, of any method, by MPJPE and PCK-AUC, and compare runs.

Reads from each run's folder pred_xyz.npy and gt_xyz.npy (T, 21, 3) in mm. Reads as well, where
they exist: valid.npy (T, 21), the joints that count; wrist.npy (T,), the samples that their wrist
aligns even where that joint does not count; log.jsonl, for the data set's name and the settings
that plots need. Writes metrics.json beside the predictions. Writes into --out table.md, table.csv
and table.tex, and as .png and .pdf: pck; joints (the error of each joint); labels and pool (the
error against the label fraction and against the size of pre-training) where the runs differ in
these.

    python evaluate.py runs/freihand-imagenet runs/freihand-simhand --out runs/comparison
    python evaluate.py runs/freihand-*-seed? --seeds --baseline peclr --out runs/comparison
    python evaluate.py runs/freihand-simhand --submission freihand
    python evaluate.py runs/tiny

To read: arguments, main, then the metrics, and how a run is read. Whoever wants the metrics may
stop at the banner "tables".
"""

import argparse
import csv
import dataclasses
import io
import json
import math
import os
import re
import zipfile
import zlib
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from common import (PARENTS, InputError, atomic, load_array, print_settings, read_log, require,
                    run_script)

# Metrics of the table, by their keys in metrics.json.
COLUMNS = {
    "mpjpe": "MPJPE",
    "auc_0_50": "AUC 0-50",
    "auc_20_50": "AUC 20-50",
    "scaled_mpjpe": "scaled MPJPE",
    "scaled_auc_20_50": "scaled AUC 20-50",
    "pa_mpjpe": "PA-MPJPE",
    "pa_auc_0_50": "PA-AUC 0-50"}
ABSOLUTE_COLUMNS = {"abs_mpjpe": "abs. MPJPE", "abs_auc_0_50": "abs. AUC 0-50"}
DATASETS = {"freihand": "FreiHAND", "dexycb": "DexYCB", "assemblyhands": "AssemblyHands"}


def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("runs", nargs="+", help="folders with predictions. A run's row in the table is its name "
         "without the data set's: freihand-simhand and dexycb-simhand share one")
    flag("--out", help="folder for tables and plots (default: here; of a single run, its own)")
    flag("--baseline", metavar="ROW",
         help="row over whose MPJPE the gain is taken (default: the first)")
    flag("--seeds", action="store_true", help="runs whose names differ only in a seed and its "
         "number (simhand-seed0, simhand-seed1) share a row: mean and standard deviation over "
         "them, instead of the 95 %% bootstrap interval over a run's samples")
    flag("--absolute", action="store_true", help="absolute camera coordinates in the table too")
    flag("--allow-missing", action="store_true",
         help="leave samples out whose prediction is NaN, and count them (default: an error)")
    flag("--submission", choices=("dexycb", "freihand"), help="also write each run's predictions "
         "as the benchmark wants them, by names.txt: FreiHAND's pred.zip, or DexYCB's dexycb.txt")
    return parser


def parse_args():
    return make_parser().parse_args()


@dataclasses.dataclass
class Run:
    """A folder with predictions, and what is found out about it."""
    folder: Path
    name: str  # the shortest tail of its path that tells it from the others
    data: str  # the data set's name, or ""
    row: str  # the row of the table that it belongs to
    settings: dict  # those that its log tells, as of `read_settings`
    names: np.ndarray = None  # (T,) NAMES_DTYPE, for a submission
    metrics: dict = None  # as in metrics.json
    curve: np.ndarray = None  # (100,), PCK of the wrist-aligned error
    truth_digest: int = 0  # tells whether two runs have the same true poses


def main():
    args = parse_args()
    default_out = args.runs[0] if len(args.runs) == 1 else "."
    out = Path(args.out or default_out)
    require(not out.is_file(), f"{out}: is a file, expected a folder to write to")
    print_settings(args, make_parser())
    runs = name_runs(args.runs, args.seeds)
    for run in runs:  # all of them first: a wrong folder costs no minutes
        check_run(run, args.submission)
    rows = unique(run.row for run in runs)
    baseline = args.baseline or rows[0]
    require(baseline in rows,
            f"--baseline {baseline}: no such row, expected one of {', '.join(rows)}")
    out.mkdir(parents=True, exist_ok=True)

    for run in runs:
        score_run(run, args)
        warn_of_other_truth(run, runs)

    columns = COLUMNS | ABSOLUTE_COLUMNS if args.absolute else COLUMNS
    tables = make_tables(runs, columns, baseline, args.seeds)
    print(tables["table.md"])
    for name, text in tables.items():
        write_text(out / name, text)

    plots = {"pck": plot_pck(runs),
             "joints": plot_joints(runs),
             "labels": plot_against(runs, "label_fraction", "share of the labels"),
             "pool": plot_against(runs, "pool", "hands in pre-training")}
    drawn = [name for name, figure in plots.items() if figure]
    for name, figure in plots.items():
        write_plot(out, name, figure)

    count = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    written = [*tables, *(f"{name}.png and .pdf" for name in drawn)]
    print(f"wrote metrics.json beside the predictions of {count}; into {out}: "
          f"{', '.join(written)}")


def score_run(run, args):
    """Read a run's poses, once; write its metrics.json, and its submission where one is wanted."""
    poses = load_poses(run.folder)
    if args.submission:  # before anything is left out
        write_submission(run, poses.prediction, args.submission)
    poses, missing = leave_out_unused(run.folder, poses, args.allow_missing)
    run.metrics, run.curve = score(poses.prediction, poses.truth, poses.valid, RESAMPLES,
                                   poses.wrist)
    run.metrics["samples_missing"] = missing
    run.truth_digest = zlib.crc32(np.ascontiguousarray(poses.truth))
    without = run.metrics["samples_without_wrist"]
    if without:
        print(f"{run.folder}: {without} of {len(poses.valid)} samples have no wrist to align by")
    write_text(run.folder / "metrics.json", json.dumps(run.metrics, indent=1) + "\n")


def warn_of_other_truth(run, runs):
    first = next(other for other in runs if other.data == run.data)
    if run.truth_digest != first.truth_digest:
        print(f"{run.folder}: warning: other true poses than {first.folder}; scores do not "
              "compare")


def unique(items):
    """Each item once, in the order of the first ones."""
    return list(dict.fromkeys(items))


# ------------------------------------------------------------------------------------- the metrics

# Thresholds of PCK, mm.
THRESHOLDS = {"auc_0_50": np.linspace(0, 50, 100), "auc_20_50": np.linspace(20, 50, 15)}
# How the metrics' names begin for each alignment, and the metrics that are taken of it. The
# alignments: none; wrist on wrist; that, and rescaled by the bone 0-9 (the paper's); Procrustes.
ALIGNMENTS = {
    "abs_": ("mpjpe", "auc_0_50"),
    "": ("mpjpe", "auc_0_50", "auc_20_50"),
    "scaled_": ("mpjpe", "auc_0_50", "auc_20_50"),
    "pa_": ("mpjpe", "auc_0_50")}
RESAMPLES = 1000  # of the bootstrap
GROUPS = 50_000  # what it draws at most: samples, or groups of them where there are more


def score(prediction, truth, valid, resamples=0, wrist=None):
    """All metrics of one run -> dict as in metrics.json, and the PCK curve (100,) of the
    wrist-aligned error.

    MPJPE is the mean error of each joint, then the mean over the joints; PCK likewise. An AUC is
    the mean of each error's own area, that under a step from 0 to 1 at the error: so it can be
    averaged and resampled like an error.

    wrist (T,): samples that their wrist aligns, by default those where it is valid. Others are
    left out of the wrist-aligned metrics, and those without a valid joint 9 out of the rescaled
    ones too; both are counted. resamples: of the bootstrap over samples; 0: no intervals.
    """
    if wrist is None:
        wrist = valid[:, 0]
    result = {"samples": len(valid),
              "samples_without_wrist": int((~wrist).sum()),
              "samples_without_bone": int((~(wrist & valid[:, 9])).sum()),
              "samples_without_procrustes": int((valid.sum(1) < 3).sum())}
    errors = distances(prediction, truth, valid, wrist)
    order = np.random.default_rng(0).permutation(len(valid))
    keys = []
    tables = []
    for alignment, names in ALIGNMENTS.items():
        error = errors.pop(alignment)  # a million samples have 170 MB of each
        counts = ~np.isnan(error)
        n = counts.sum(0)
        groups = [sum_groups(counts, order)]
        for name in names:
            key = alignment + name
            keys.append(key)
            sums, of_groups = add_up(values_of(error, name), order)
            result[key] = number(mean_over_joints(sums, n))
            groups.append(of_groups)
        tables.append(groups)
        if alignment == "":
            sums = np.nansum(error, 0)
            result["per_joint"] = [number(mean) for mean in sums / np.where(n, n, np.nan)]
            curve = pck_curve(error, THRESHOLDS["auc_0_50"])
    if resamples:
        drawn = dict(zip(keys, bootstrap(tables, resamples)))
        result["intervals"] = {key: interval(drawn[key], result[key]) for key in keys}
    return result, curve


def distances(prediction, truth, valid, wrist):
    """-> {alignment: (T, 21) float64 mm, NaN where a joint does not count}."""
    found = {alignment: np.full(valid.shape, np.nan) for alignment in ALIGNMENTS}
    for start in range(0, len(valid), 50_000):  # bounds the memory
        rows = slice(start, start + 50_000)
        some = distances_of_some(prediction[rows].astype(np.float64),
                                 truth[rows].astype(np.float64), valid[rows], wrist[rows])
        for alignment, values in some.items():
            found[alignment][rows] = values
    return found


def distances_of_some(prediction, truth, valid, wrist):
    """The same, of samples in float64, all at once."""
    relative = prediction - prediction[:, :1]
    relative_truth = truth - truth[:, :1]
    with_wrist = valid & wrist[:, None]

    bone = np.linalg.norm(relative[:, 9], axis=1)
    true_bone = np.linalg.norm(relative_truth[:, 9], axis=1)
    factor = true_bone / np.where(bone > 0, bone, 1)
    scaled = relative * factor[:, None, None]
    with_bone = with_wrist & valid[:, 9:10]

    aligned = align(prediction, truth, valid)
    enough = valid.sum(1, keepdims=True) >= 3  # fewer points fit any pose
    return {"abs_": distance(prediction, truth, valid),
            "": distance(relative, relative_truth, with_wrist),
            "scaled_": distance(scaled, relative_truth, with_bone),
            "pa_": distance(aligned, truth, valid & enough)}


def distance(prediction, truth, counts):
    """(T, 21, 3) twice -> (T, 21), NaN where a joint does not count."""
    return np.where(counts, np.linalg.norm(prediction - truth, axis=2), np.nan)


def align(prediction, truth, valid):
    """Each prediction (T, 21, 3) moved on its truth by the best similarity over the valid joints,
    reflections allowed, as in FreiHAND's eval.py."""
    weight = valid[..., None] / np.maximum(valid.sum(1), 1)[:, None, None]
    mean_p = (prediction * weight).sum(1, keepdims=True)
    mean_t = (truth * weight).sum(1, keepdims=True)
    p = (prediction - mean_p) * valid[..., None]
    t = (truth - mean_t) * valid[..., None]
    norm_p = np.linalg.norm(p, axis=(1, 2), keepdims=True) + 1e-8
    norm_t = np.linalg.norm(t, axis=(1, 2), keepdims=True) + 1e-8
    u, singular, vt = np.linalg.svd((t / norm_t).transpose(0, 2, 1) @ (p / norm_p))
    rotation = (u @ vt).transpose(0, 2, 1)
    scale = singular.sum(1)[:, None, None] * norm_t
    return (prediction - mean_p) / norm_p @ rotation * scale + mean_t


def values_of(error, name):
    """What each error adds to a metric, (T, 21), 0 for NaN."""
    if name == "mpjpe":
        return np.where(np.isnan(error), 0, error)
    thresholds = THRESHOLDS[name]
    count = len(thresholds)
    steps = np.tri(count, count + 1)  # column k: a PCK of 1 from threshold k on
    areas = area_under(steps, thresholds)
    # The first threshold that is not below the error. NaN comes last, where the area is 0.
    reached = np.searchsorted(thresholds, error)
    return areas[reached]


def area_under(pck, thresholds):
    """(thresholds, ...) -> trapezoids, divided by the range: 1 where every error is below the
    first threshold."""
    return np.trapezoid(pck, thresholds, axis=0) / (thresholds[-1] - thresholds[0])


def pck_curve(error, thresholds):
    """(T, 21), NaN where a joint does not count -> PCK at each threshold."""
    n = (~np.isnan(error)).sum(0)
    count = len(thresholds)
    found = []
    for column in error.T:
        reached = np.searchsorted(thresholds, column)
        newly = np.bincount(reached, minlength=count + 1)[:count]  # the last: beyond all, or NaN
        found.append(np.cumsum(newly))
    return mean_over_joints(np.stack(found).T, n)


def mean_over_joints(sums, n):
    """Sums (..., 21) of n values each -> mean of each joint, then over the joints that occur; NaN
    where none does."""
    means = np.where(n > 0, sums / np.maximum(n, 1), 0)
    occur = (n > 0).sum(-1)
    return means.sum(-1) / np.where(occur > 0, occur, np.nan)


def number(value):
    """A plain float; None, which json can hold, for NaN."""
    return float(value) if np.isfinite(value) else None


def add_up(values, order):
    """(T, 21) -> (21,), their sums over all samples; (G, 21), those over groups of samples."""
    return values.sum(0), sum_groups(values, order)


def sum_groups(table, order):
    """(T, 21) -> (T, 21) in another order, or with more than GROUPS samples the sums of as many
    random groups."""
    sums = np.zeros((min(len(table), GROUPS), 21))
    for start in range(0, len(table), GROUPS):
        rows = order[start:start + GROUPS]
        sums[:len(rows)] += table[rows]
    return sums


def bootstrap(tables, resamples, seed=0):
    """Metrics of samples that are drawn with replacement, as many as there are, the same ones for
    all metrics -> (metrics, resamples).

    tables: for each alignment a list of (G, 21): how often each joint counts in each sample, and
    then for each metric what the sample adds. Random groups in place of samples have the same
    variance, and bound the time.
    """
    rng = np.random.default_rng(seed)
    size = len(tables[0][0])
    drawn = []
    for _ in range(resamples):
        times = np.bincount(rng.integers(size, size=size), minlength=size).astype(np.float64)
        means = []
        for counts, *metrics in tables:
            n = times @ counts
            means += [mean_over_joints(times @ values, n) for values in metrics]
        drawn.append(means)
    return np.transpose(drawn)


def interval(drawn, value):
    """The ends of the 95 % interval of a metric's resamples."""
    if value is None:
        return [None, None]
    # A draw may miss the few samples that count, and is then NaN.
    return np.nanpercentile(drawn, (2.5, 97.5)).tolist()


# ------------------------------------------------------------------------------- files: runs' poses

HINT = "finetune.py writes it; any method's predictions will do"


@dataclasses.dataclass
class Poses:
    """The T samples of a run."""
    prediction: np.ndarray  # (T, 21, 3) float32, mm
    truth: np.ndarray  # (T, 21, 3) float32, mm
    valid: np.ndarray  # (T, 21), joints that count
    wrist: np.ndarray  # (T,), samples that their wrist aligns


def check_run(run, benchmark):
    """Find out whether all files are there and fit each other; the poses are not read yet."""
    poses = load_poses(run.folder, mmap=True)
    if benchmark:
        run.names = read_names(run, benchmark, len(poses.truth))


def load_poses(folder, mmap=False):
    """A run's arrays as they are -> Poses. mmap: the poses are read only when they are looked
    at."""
    require(folder.is_dir(),
            f"{folder}: no such folder, expected a run with pred_xyz.npy and gt_xyz.npy")
    truth = load_array(folder / "gt_xyz.npy", np.float32, (None, 21, 3), hint=HINT, mmap=mmap,
                       finite=False)
    count = len(truth)
    prediction = load_array(folder / "pred_xyz.npy", np.float32, (count, 21, 3), hint=HINT,
                            mmap=mmap, finite=False)
    valid = np.ones((count, 21), bool)
    if (folder / "valid.npy").exists():
        valid = load_array(folder / "valid.npy", bool, (count, 21), hint=HINT)
    wrist = valid[:, 0]
    if (folder / "wrist.npy").exists():
        wrist = wrist | load_array(folder / "wrist.npy", bool, (count,), hint=HINT)
    return Poses(prediction, truth, valid, wrist)


def leave_out_unused(folder, poses, allow_missing):
    """-> Poses without the samples whose prediction is not finite, and with 0 for the joints that
    are not used; how many samples were left out. The arrays given may be overwritten."""
    used = poses.valid.copy()
    used[:, 0] = poses.wrist
    refuse_samples(folder / "gt_xyz.npy", not_finite(poses.truth, used))
    lost = not_finite(poses.prediction, used)
    if not allow_missing:
        refuse_samples(folder / "pred_xyz.npy", lost, " (--allow-missing leaves them out)")
    missing = int(lost.sum())
    if missing:
        print(f"{folder}: warning: {missing} of {len(lost)} samples left out, their predictions "
              "are not finite; other runs are scored on more")
        used = used[~lost]
        poses = Poses(poses.prediction[~lost], poses.truth[~lost], poses.valid[~lost],
                      poses.wrist[~lost])
    wanted = " and a finite prediction" if allow_missing else ""
    require(poses.valid.any(), f"{folder}: holds no sample with a valid joint{wanted}")
    for name, array in (("gt_xyz.npy", poses.truth), ("pred_xyz.npy", poses.prediction)):
        array[~used] = 0
        warn_of_unit(folder / name, array, used)
    return poses, missing


def not_finite(array, used):
    """-> (T,), samples with a used joint that is NaN or infinite."""
    return (used & ~np.isfinite(array).all(2)).any(1)


def refuse_samples(path, lost, hint=""):
    """An InputError that names the first samples that are lost, if any is."""
    count = lost.sum()
    first = ", ".join(map(str, np.flatnonzero(lost)[:5]))
    more = ", ..." if count > 5 else ""
    require(not count, f"{path}: valid joints must be finite, those of {count} samples are not: "
            f"{first}{more}{hint}")


def warn_of_unit(path, array, used):
    """Warn where the bone 0-9 is not as long as a hand's in mm."""
    both = used[:, 0] & used[:, 9]
    if not both.any():
        return
    middle = np.median(np.linalg.norm(array[both, 9] - array[both, 0], axis=1))
    if not 40 <= middle <= 140:
        guess = "mm, not metres?" if middle < 1 else "mm?"
        print(f"{path}: warning: the bone 0-9 has a median of {middle:.3g}, expected 40 to 140: "
              f"are these {guess}")


# --------------------------------------------------------------- files: runs' names and settings

SEED = r"[-_./]?seed[-_]?\d+"  # in a run's name


def name_runs(folders, seeds):
    """-> a Run for each folder."""
    real = [Path(folder).resolve() for folder in folders]
    twice = [str(folder) for folder, path in zip(folders, real) if real.count(path) > 1]
    require(not twice, f"the same run is given twice: {', '.join(twice)}")
    parts = [Path(os.path.abspath(folder)).parts for folder in folders]
    tail = 1
    while len({part[-tail:] for part in parts}) < len(parts):
        tail += 1
    runs = []
    for folder, part in zip(folders, parts):
        name = "/".join(part[-tail:])
        if seeds:
            require(re.search(SEED, name), f"{folder}: --seeds expects a seed in each name, as in "
                    "simhand-seed0 or seed0/simhand")
        # The folder around it serves where the data set's name was all.
        row = row_of(name, seeds) or part[-tail - 1]
        settings = read_settings(Path(folder))
        data = settings.get("data") or data_of(name)
        runs.append(Run(Path(folder), name, data, row, settings))
    places = {(run.row, run.data) for run in runs}
    if not seeds and len(places) < len(runs):  # one run would hide another
        for run in runs:
            run.row = run.name
    return runs


def row_of(name, seeds):
    """A run's name without the data set's, and without the seed's where seeds share a row."""
    if seeds:
        name = re.sub(SEED, "", name)
    for word in DATASETS:
        name = re.sub(rf"(^|[-_./]){word}(?=$|[-_./])", "", name, flags=re.I)
    return name.strip("-_./")


def data_of(name):
    """The data set that a run's name tells, or ""."""
    for word, label in DATASETS.items():
        if word in name.lower():
            return label
    return ""


def read_settings(folder):
    """What the log of a fine-tuning run says of it -> dict, empty where there is no such log."""
    path = folder / "log.jsonl"
    if not path.exists():
        return {}
    rows = read_log(path) or [{}]
    try:
        return settings_of(rows)
    except (AttributeError, TypeError, ValueError):
        raise InputError(f"{path}: expected the log of finetune.py, or none")


def settings_of(rows):
    """The rows of a log -> settings of pre-training, of fine-tuning, `pool` (hands in
    pre-training) and `data` (the data set's name)."""
    args = rows[0].get("args") or {}
    before = next((row["pretraining"] for row in rows if "pretraining" in row), {})
    settings = {"method": Path(str(args.get("weights", ""))).stem}
    settings |= dict(before.get("args") or {})
    for key in ("hands", "pairs"):
        if settings.get(key):
            settings[key] = "+".join(map(str, settings[key]))
    for key in ("label_fraction", "backbone", "head", "freeze", "paper_filter", "dataset"):
        settings[key] = args.get(key)
    settings["pool"] = before.get("hands")
    words = [DATASETS.get(args.get("dataset"), ""), args.get("setup"), args.get("modality")]
    settings["data"] = " ".join(word for word in words if word)
    for key in ("label_fraction", "pool"):
        if settings[key] is not None and not 0 < settings[key] < math.inf:
            raise ValueError
    return settings


def write_text(path, text):
    with atomic(path) as file:
        file.write(text.encode())


# ------------------------------------------------------------------------------------------ tables

LEGEND = ("MPJPE in mm, wrist-aligned; scaled: by the true bone 0-9 over the predicted; PA: after "
          "Procrustes; AUC over the thresholds named, mm; ")


@dataclasses.dataclass
class Value:
    """A metric of the runs that share a row."""
    mean: float
    behind: list  # the ends of its 95 % interval, or the deviation over seeds, if it is known


@dataclasses.dataclass
class Cell:
    text: str
    behind: list = None  # texts of what stands behind a metric; None: this is no metric
    best: bool = False  # of its column


@dataclasses.dataclass
class Table:
    """Rows of cells, data set by data set."""
    datasets: list
    heads: list  # of the columns, the same for each data set
    rows: dict  # name -> cells
    legend: str

    def titles(self):
        """Of all columns, with the data set's name where there are several."""
        titles = []
        for dataset in self.datasets:
            for head in self.heads:
                titles.append(f"{dataset} {head}".strip() if self.datasets[1:] else head)
        return titles


def make_tables(runs, columns, baseline, seeds):
    """-> {file: text}: a row for each name, columns grouped by data set, the gain in MPJPE over
    the baseline's in percent, the best in bold; behind each value its 95 % interval, or over
    seeds the standard deviation."""
    datasets = unique(run.data for run in runs)
    rows = fill_rows(runs, columns, baseline, seeds)
    heads = ["samples"]
    if seeds:
        heads.append("runs")
    heads += columns.values()
    if len(rows) > 1:
        heads.append("gain, %")
    legend = LEGEND
    if datasets[0] and not datasets[1:]:
        legend = f"{datasets[0]}. {legend}"
    if seeds:
        legend += "± standard deviation over the seeds."
    else:
        legend += f"in brackets 95 % of {RESAMPLES} bootstrap resamples of the samples."
    table = Table(datasets, heads, rows, legend)
    return {"table.md": markdown_table(table, baseline),
            "table.csv": csv_table(table, ("deviation",) if seeds else ("low", "high")),
            "table.tex": latex_table(table)}


def fill_rows(runs, columns, baseline, seeds):
    """-> {row: cells}, data set by data set."""
    metrics = {}
    for run in runs:
        metrics.setdefault((run.row, run.data), []).append(run.metrics)
    values = {}  # of each row, data set and metric that has one
    for (row, dataset), same in metrics.items():
        for key in columns:
            value = summarise(same, key, seeds)
            if value is not None:
                values[row, dataset, key] = value
    best = find_best(values)

    names = unique(run.row for run in runs)
    rows = {name: [] for name in names}
    for name, cells in rows.items():
        for dataset in unique(run.data for run in runs):
            same = metrics.get((name, dataset), [])
            counts = sorted({str(each["samples"]) for each in same})
            cells.append(Cell("/".join(counts)))
            if seeds:
                cells.append(Cell(str(len(same))))
            for key in columns:
                cell = metric_cell(values.get((name, dataset, key)), key)
                if len(names) > 1:
                    cell.best = (name, dataset, key) in best
                cells.append(cell)
            if len(names) > 1:
                ours = values.get((name, dataset, "mpjpe"))
                theirs = values.get((baseline, dataset, "mpjpe"))
                cells.append(Cell(gain(ours, theirs)))
    return rows


def summarise(metrics, key, seeds):
    """A metric of the runs that share a row -> Value, or None where no run has one."""
    values = [each[key] for each in metrics if each[key] is not None]
    if not values:
        return None
    behind = []
    if not seeds:  # there is one run a row
        behind = metrics[0]["intervals"][key]
    elif len(values) > 1:
        behind = [np.std(values, ddof=1)]
    return Value(np.mean(values), behind)


def find_best(values):
    """-> the (row, data set, metric) that no other row surpasses."""
    columns = {}
    for (_, dataset, key), value in values.items():
        columns.setdefault((dataset, key), []).append(value.mean)
    found = set()
    for (row, dataset, key), value in values.items():
        better = min if "mpjpe" in key else max
        if value.mean == better(columns[dataset, key]):
            found.add((row, dataset, key))
    return found


def metric_cell(value, key):
    if value is None:
        return Cell("", [])
    digits = 2 if "mpjpe" in key else 3
    return Cell(f"{value.mean:.{digits}f}", [f"{each:.{digits}f}" for each in value.behind])


def gain(ours, theirs):
    """How far an MPJPE lies below another one, in percent of that, as text; "" where it cannot be
    said."""
    if ours is None or theirs is None or not ours.mean or not theirs.mean:
        return ""
    return f"{100 * (1 - ours.mean / theirs.mean):+.1f}"


def markdown_table(table, baseline):
    titles = table.titles()
    lines = [["run", *titles], ["---"] * (1 + len(titles))]
    for name, cells in table.rows.items():
        lines.append([name.replace("|", "\\|"), *map(markdown_cell, cells)])
    text = ""
    for line in lines:
        text += f"| {' | '.join(line)} |\n"
    text += f"\n{table.legend}"
    if len(table.rows) > 1:
        text += f" Gain: in MPJPE, over {baseline}."
    return text + "\n"


def markdown_cell(cell):
    text = f"**{cell.text}**" if cell.best else cell.text
    if not cell.behind:
        return text
    if len(cell.behind) == 1:
        return f"{text} ± {cell.behind[0]}"
    low, high = cell.behind
    return f"{text} ({low}-{high})"


def csv_table(table, ends):
    """ends: what stands behind a metric, each in a column of its own."""
    heads = ["run"]
    first, *_ = table.rows.values()
    for title, cell in zip(table.titles(), first):
        heads.append(title)
        if cell.behind is not None:
            heads += [f"{title} {end}" for end in ends]
    lines = [heads]
    for name, cells in table.rows.items():
        line = [name]
        for cell in cells:
            line.append(cell.text)
            if cell.behind is not None:
                line += cell.behind or [""] * len(ends)
        lines.append(line)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


def latex_table(table):
    width = len(table.heads)
    columns = "r" * width * len(table.datasets)
    lines = [f"% {table.legend} Needs \\usepackage{{booktabs}}.",
             f"\\begin{{tabular}}{{l{columns}}} \\toprule"]
    if table.datasets[1:]:
        spans = [f"\\multicolumn{{{width}}}{{c}}{{{escape(name)}}}" for name in table.datasets]
        lines.append(" & ".join(["", *spans]) + " \\\\")
    heads = [escape(head) for head in table.heads]
    lines.append(" & ".join(["run", *heads * len(table.datasets)]) + " \\\\ \\midrule")
    for name, cells in table.rows.items():
        lines.append(" & ".join([escape(name), *map(latex_cell, cells)]) + " \\\\")
    lines.append("\\bottomrule \\end{tabular}")
    return "\n".join(lines) + "\n"


def latex_cell(cell):
    text = f"\\textbf{{{cell.text}}}" if cell.best else cell.text
    if not cell.behind:
        return text
    if len(cell.behind) == 1:
        return f"{text} $\\pm$ {cell.behind[0]}"
    low, high = cell.behind
    return f"{text} {{\\scriptsize ({low}--{high})}}"


def escape(text):
    """Text as LaTeX prints it."""
    escaped = ""
    for character in text:
        if character in "\\~^":
            escaped += f"\\symbol{{{ord(character)}}}"
        elif character in "&%$#_{}":
            escaped += f"\\{character}"
        else:
            escaped += character
    return escaped


# ------------------------------------------------------------------------------------------- plots

# A hand to draw errors on, x right, y up; a real one's joints lie too close for bars.
OPEN_HAND = np.array([
    (0, 0),
    (-.45, .2), (-.85, .5), (-1.15, .85), (-1.4, 1.2),
    (-.4, 1.0), (-.5, 1.45), (-.56, 1.85), (-.6, 2.2),
    (0, 1.05), (0, 1.55), (0, 1.97), (0, 2.35),
    (.37, .97), (.47, 1.42), (.53, 1.82), (.58, 2.17),
    (.7, .8), (.9, 1.15), (1.02, 1.48), (1.12, 1.8)])


def panels(runs, width, height):
    """-> figure, and for each data set its axis and its runs."""
    groups = {}
    for run in runs:
        groups.setdefault(run.data, []).append(run)
    figure = Figure(figsize=(width * len(groups), height))
    axes = figure.subplots(1, len(groups), squeeze=False)[0]
    for axis, dataset in zip(axes, groups):
        axis.set_title(dataset)
    return figure, list(zip(axes, groups.values()))


def add_legend(axis):
    """Below the panel: there may be many names, and long ones."""
    below = -0.8 / axis.figure.get_figheight()
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, below))


def by_row(runs, mine):
    """Yields label, colour and runs of each row that has some among `mine`. In all panels a row
    has the same colour."""
    rows = unique(run.row for run in runs)
    colours = colormaps["tab10" if len(rows) <= 10 else "tab20"].colors
    for k, row in enumerate(rows):
        same = [run for run in mine if run.row == row]
        if same:
            label = row.replace("$", "\\$")  # a dollar would start a formula
            yield label, colours[k % len(colours)], same


def plot_pck(runs):
    figure, parts = panels(runs, 6, 4)
    thresholds = THRESHOLDS["auc_0_50"]
    for axis, mine in parts:
        for label, colour, same in by_row(runs, mine):
            curve = np.mean([run.curve for run in same], 0)
            area = f"AUC 0-50 {area_under(curve, thresholds):.3f}"
            if np.isnan(curve).any():
                area = "no wrist"
            axis.plot(thresholds, curve, color=colour, label=f"{label}  ({area})")
        axis.set(xlabel="threshold, mm, wrist-aligned", ylabel="share of joints (PCK)",
                 xlim=(0, 50), ylim=(0, 1))
        axis.grid(alpha=0.3)
        add_legend(axis)
    return figure


def plot_joints(runs):
    """The error of each joint as a bar on a drawn hand, side by side for all rows."""
    figure, parts = panels(runs, 6.5, 6.5)
    for axis, mine in parts:
        for joint, parent in enumerate(PARENTS):
            axis.plot(*OPEN_HAND[[parent, joint]].T, color="0.8", linewidth=7,
                      solid_capstyle="round", zorder=0)
        draw_bars(axis, list(by_row(runs, mine)))
        axis.set(xlim=(-1.9, 1.4), aspect="equal", xlabel="wrist-aligned error of each joint",
                 xticks=(), yticks=())
        add_legend(axis)
    return figure


def draw_bars(axis, rows):
    """A bar for each joint and row, and one beside the hand that tells the scale."""
    errors = []
    for _, _, same in rows:
        per_joint = np.array([run.metrics["per_joint"] for run in same], float)  # None: NaN
        errors.append(per_joint.mean(0))
    top = np.nan_to_num(errors).max(initial=1e-9)
    width = 0.2 / max(len(rows), 2)
    for k, (label, colour, _) in enumerate(rows):
        x = OPEN_HAND[:, 0] + (k - (len(rows) - 1) / 2) * width
        drawn = axis.bar(x, errors[k] * 0.25 / top, width * 0.9, OPEN_HAND[:, 1], label=label,
                         color=colour)
        if len(rows) <= 2:
            axis.bar_label(drawn, [f"{value:.0f}" for value in errors[k]], fontsize=5.5)
    axis.bar(1.15, 0.25, 0.03, 0, color="0.3")
    axis.text(1.12, 0.12, f"{top:.0f} mm", ha="right", va="center")


def plot_against(runs, key, label):
    """MPJPE against a setting, a line for each kind of run through the mean of its runs; None
    unless the setting takes several values on a data set. Runs that have none are drawn as a
    level."""
    values = {}
    for run in runs:
        values.setdefault(run.data, set()).add(run.settings.get(key))
    runs = [run for run in runs
            if len(values[run.data] - {None}) > 1 and run.metrics["mpjpe"] is not None]
    if not runs:
        return None
    figure, parts = panels(runs, 5, 4)
    for axis, mine in parts:
        kinds = {}
        for run, kind in zip(mine, kinds_of(mine, key)):
            kinds.setdefault(kind, []).append(run)
        for k, (kind, same) in enumerate(kinds.items()):
            draw_line(axis, same, key, kind, f"C{k % 10}")
        axis.set(xscale="log", xlabel=label, ylabel="MPJPE, mm, wrist-aligned")
        axis.minorticks_off()
        ticks = sorted({run.settings.get(key) for run in mine} - {None})
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=30)
        axis.grid(alpha=0.3)
        add_legend(axis)
    return figure


def draw_line(axis, runs, key, label, colour):
    """Runs of one kind: a dot for each, and a line through the means at each value of the
    setting."""
    errors = {}
    for run in sorted(runs, key=lambda run: run.settings.get(key) or 0):
        errors.setdefault(run.settings.get(key), []).append(run.metrics["mpjpe"])
    if None in errors:
        level = np.mean(errors.pop(None))
        axis.axhline(level, linestyle="--", color=colour, label=label)
    if errors:
        with_value = [run for run in runs if run.settings.get(key)]
        axis.plot([run.settings[key] for run in with_value],
                  [run.metrics["mpjpe"] for run in with_value], "o", color=colour, markersize=4)
        means = [np.mean(each) for each in errors.values()]
        axis.plot(list(errors), means, color=colour, label=label)


# Settings that can make a line in a plot.
LINE_SETTINGS = ("method", "weighting", "weight_on", "weight_keypoints", "top_k", "hands", "pairs",
                 "backbone", "head", "freeze", "label_fraction")


def kinds_of(runs, axis_setting):
    """-> for each run what tells it from the others, but for what is on the axis: the settings
    that differ."""
    # With the size of pre-training the folder of pairs changes too.
    on_axis = "label_fraction" if axis_setting == "label_fraction" else "pairs"
    keys = []
    for key in LINE_SETTINGS:
        values = {run.settings.get(key) for run in runs} - {None}
        if len(values) > 1 and key != on_axis:
            keys.append(key)
    kinds = []
    for run in runs:
        words = []
        for key in keys:
            value = run.settings.get(key)
            if value is not None:
                words.append(str(value) if key == "method" else f"{key} {value}")
        kinds.append(", ".join(words) or "runs")
    return kinds


def write_plot(folder, name, figure):
    """figure: None where there is nothing to draw; a plot of other runs goes all the same."""
    for kind in ("png", "pdf"):
        path = folder / f"{name}.{kind}"
        path.unlink(missing_ok=True)
        if figure:
            with atomic(path) as file:
                figure.savefig(file, format=kind, dpi=110, bbox_inches="tight")


# ------------------------------------------------------------------------------------- submissions

# A line of names.txt: the sample's index in the benchmark's list, and whether it is a left hand.
NAMES_DTYPE = np.dtype([("index", np.int64), ("left", bool)])


def read_names(run, benchmark, count):
    """names.txt of a run of `count` samples -> (count,) NAMES_DTYPE."""
    tested = run.settings.get("dataset")
    filtered = run.settings.get("paper_filter")
    how = " with --paper-filter, which leaves samples out" if filtered else ""
    require(tested in (None, benchmark) and not filtered,
            f"{run.folder}: --submission {benchmark}: was tested on {tested}{how}")
    path = run.folder / "names.txt"
    hint = "expected a line a sample: index, tab, picture, tab, left or right"
    require(path.is_file(), f"{path}: missing, {hint}")
    lines = [line.split(b"\t") for line in path.read_bytes().splitlines()]
    is_left = {b"left": True, b"right": False}
    try:
        names = [(int(index), is_left[side]) for index, _, side in lines]
        names = np.array(names, NAMES_DTYPE)
    except (KeyError, OverflowError, ValueError):  # a line of another number of parts, too
        names = ()
    require(len(names), f"{path}: {hint}")
    index = np.sort(names["index"])
    require(index[0] >= 0, f"{path}: has no official indices but -1, as finetune.py writes where "
            "it had only a part of the data set; a benchmark wants it whole")
    require((np.diff(index) > 0).all(), f"{path}: an index occurs twice")
    require(benchmark != "freihand" or index[-1] == len(index) - 1,
            f"{path}: FreiHAND's list has no gaps, expected the indices 0 to {len(index) - 1}")
    require(len(names) == count, f"{path}: has {len(names)} lines, expected {count}, one for each "
            "sample of pred_xyz.npy; a benchmark wants them all")
    return names


def write_submission(run, prediction, benchmark):
    finite = np.isfinite(prediction).all((1, 2))
    require(finite.all(), f"{run.folder / 'pred_xyz.npy'}: values must be finite, row "
            f"{finite.argmin()} is not; a benchmark wants every joint of every sample")
    index, xyz = submission_order(run.names, prediction)
    if benchmark == "freihand":
        write_freihand(run.folder, xyz)
    else:
        write_dexycb(run.folder, index, xyz)


def submission_order(names, prediction):
    """-> official indices (T,) in their order, predictions (T, 21, 3) as the camera sees them:
    left hands, which pred_xyz.npy mirrors, are left again."""
    order = np.argsort(names["index"])
    names = names[order]
    xyz = prediction[order]
    xyz[names["left"], :, 0] *= -1
    return names["index"], xyz


def write_freihand(folder, xyz):
    """pred.zip with pred.json: [keypoints (T, 21, 3), vertices (T, 778, 3)] in metres; there is no
    mesh, so zeros."""
    keypoints = json.dumps((xyz.astype(np.float64) / 1000).tolist())
    mesh = json.dumps([[0] * 3] * 778)
    vertices = ", ".join([mesh] * len(xyz))
    with atomic(folder / "pred.zip") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("pred.json", f"[{keypoints}, [{vertices}]]")
    print(f"wrote {folder}/pred.zip, {len(xyz)} samples; its mesh is zeros: of the server's scores "
          "only those of xyz mean anything")
    if len(xyz) != 3960:
        print("FreiHAND's evaluation has 3960 samples, its server will refuse this")


def write_dexycb(folder, index, xyz):
    """dexycb.txt, a line a sample: index and 63 coordinates in mm, as DexYCB's toolkit reads it;
    with all digits, as a wrist that is the true one counts at the threshold 0."""
    lines = []
    for i, pose in zip(index, xyz.reshape(-1, 63).astype(np.float64)):
        lines.append(",".join([str(i), *map(repr, pose.tolist())]) + "\n")
    write_text(folder / "dexycb.txt", "".join(lines))
    print(f"wrote {folder}/dexycb.txt, {len(xyz)} samples")


if __name__ == "__main__":
    run_script(main)
