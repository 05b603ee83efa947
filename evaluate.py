"""Score 3D hand poses, of any method, by MPJPE and PCK-AUC, and compare runs.

Reads from each run's folder pred_xyz.npy and gt_xyz.npy (T, 21, 3) in mm, and where they exist:
valid.npy (T, 21), the joints that count; wrist.npy (T,), the samples that their wrist aligns even
where that joint does not count; the log of finetune.py, for the data set's name and the curves.
Writes metrics.json beside the predictions, and into --out table.md, .csv and .tex and the plots, as
.png and .pdf: pck, labels (error against the share of the labels) and pool (against the size of
pre-training), where a method's runs differ in these. It replaces only files listed in .evaluate.

    python evaluate.py runs/freihand-imagenet runs/freihand-simhand --out runs/comparison
    python evaluate.py runs/freihand-*-seed? --seeds --baseline freihand-peclr --out runs/comparison
    python evaluate.py runs/freihand-simhand --submission freihand
    python evaluate.py runs/tiny

To read: main, then the metrics. Whoever wants the metrics may stop at the banner "runs".
"""

import argparse
import csv
import dataclasses
import io
import json
import os
import re
import zipfile
import zlib
from pathlib import Path

import numpy as np

from common import (atomic, figure, load_array, logged_settings, read_log, require, run_facts,
                    run_script, save_lines)

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
# Plots of the error against a setting: its name in `read_settings`, and on the axis.
CURVES = {"labels": ("label_fraction", "share of the labels"),
          "pool": ("pool", "hands in pre-training")}
OUTPUTS = ("table.md", "table.csv", "table.tex", "pck.png", "pck.pdf", "labels.png", "labels.pdf",
           "pool.png", "pool.pdf")
SUBMISSIONS = {"freihand": "pred.zip", "dexycb": "dexycb.txt"}


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("runs", nargs="+", help="folders with predictions")
    flag("--out", help="folder for tables and plots (default: of a single run, its own)")
    flag("--names", nargs="+", metavar="NAME",
         help="what the table calls each run (default: its folder's name)")
    flag("--baseline", metavar="NAME",
         help="run over whose MPJPE the gain is taken (default: the first of each data set)")
    flag("--seeds", action="store_true", help="runs simhand-seed0, simhand-seed1, ... share a row: "
         "their mean and standard deviation, how many they are (n), and p of Welch's two-sided "
         "t-test of the MPJPE against --baseline")
    flag("--absolute", action="store_true", help="absolute camera coordinates in the table too")
    flag("--allow-missing", action="store_true",
         help="leave samples out whose prediction is NaN, and count them (default: an error)")
    flag("--submission", choices=[*SUBMISSIONS], help="also write each run's predictions as the "
         "benchmark wants them, by names.txt: FreiHAND's pred.zip, or DexYCB's dexycb.txt")
    return parser.parse_args()


@dataclasses.dataclass
class Run:
    """A folder with predictions, and what is found out about it."""
    folder: Path
    name: str
    data: str  # the data set's name, or ""
    settings: dict  # as `read_settings` gives them
    truth: int  # a checksum: whether two runs have the same true poses
    valid: int  # the same of the joints that count
    names: np.ndarray = None  # (T,) NAMES_DTYPE, for a submission
    metrics: dict = None  # as in metrics.json
    curve: np.ndarray = None  # (100,), PCK of the wrist-aligned error


def main():
    args = parse_args()
    require(args.out or len(args.runs) == 1,
            "several runs need --out, a folder for their tables and plots")
    out = Path(args.out or args.runs[0])
    groups = open_runs(args)
    runs = [run for same in groups.values() for run in same]
    names = sorted({name for _, name in groups})
    require(args.baseline in (None, *names),
            f"--baseline {args.baseline}: no such run, expected one of {', '.join(names)}")
    out.mkdir(parents=True, exist_ok=True)
    claim(out, OUTPUTS)
    for run in runs:
        claim(run.folder, ["metrics.json"])

    for run in runs:
        score_run(run, args)
    write_tables(out, groups, args)
    draw_pck(out, groups)
    for name, (key, label) in CURVES.items():
        draw(out, name, curves(groups, key), xlabel=label, ylabel="MPJPE, mm, wrist-aligned",
             xscale="log")
    print(f"wrote metrics.json beside the predictions, tables and plots into {out}")


def score_run(run, args):
    """Read a run's poses; write its metrics.json, and its submission where one is wanted."""
    poses = load_poses(run.folder)
    if args.submission:  # before anything is left out
        write_submission(run, poses, args.submission)
    poses, missing = leave_out_unused(run.folder, poses, args.allow_missing)
    run.metrics, run.curve = score(poses.prediction, poses.truth, poses.valid, poses.wrist)
    run.metrics["samples_missing"] = missing
    without = run.metrics["samples_without_wrist"]
    if without:
        print(f"{run.folder}: {without} of {len(poses.valid)} samples have no wrist to align by")
    content = json.dumps(run.metrics | {"facts": run_facts("scipy")}, indent=1)
    save_lines(run.folder / "metrics.json", [content])


# ------------------------------------------------------------------------------------- the metrics

# Thresholds of PCK, mm.
THRESHOLDS = {"auc_0_50": np.linspace(0, 50, 100), "auc_20_50": np.linspace(20, 50, 15)}
# How the metrics' names begin for each alignment, and the AUCs that are taken of it beside the
# MPJPE. None; wrist on wrist; that, and rescaled by the bone 0-9 (the paper's); Procrustes.
ALIGNMENTS = {
    "abs_": ("auc_0_50",),
    "": ("auc_0_50", "auc_20_50"),
    "scaled_": ("auc_0_50", "auc_20_50"),
    "pa_": ("auc_0_50",)}


def score(prediction, truth, valid, wrist):
    """All metrics of one run -> dict as in metrics.json, and the PCK curve (100,) of the
    wrist-aligned error.

    MPJPE is the mean error of each joint, then the mean over the joints; PCK likewise. An AUC is
    the area under the PCK curve.

    wrist (T,): samples that their wrist aligns. Others are left out of the wrist-aligned metrics,
    and those without a valid joint 9 out of the rescaled ones too; both are counted.
    """
    result = {"samples": len(valid),
              "samples_without_wrist": int((~wrist).sum()),
              "samples_without_bone": int((~(wrist & valid[:, 9])).sum()),
              "samples_without_procrustes": int((valid.sum(1) < 3).sum())}
    errors = distances(prediction, truth, valid, wrist)
    curves = {}
    for alignment, names in ALIGNMENTS.items():
        error = errors.pop(alignment)  # a million samples have 170 MB of each
        error.sort(0)  # for `pck`; NaN comes last
        n = (~np.isnan(error)).sum(0)
        sums = np.nansum(error, 0)
        result[f"{alignment}mpjpe"] = number(mean_over_joints(sums, n))
        for name in names:
            curve = pck(error, n, THRESHOLDS[name])
            curves[alignment + name] = curve
            result[alignment + name] = number(area(curve, THRESHOLDS[name]))
        if alignment == "":
            result["per_joint"] = [number(mean) for mean in sums / np.where(n, n, np.nan)]
    return result, curves["auc_0_50"]


def distances(prediction, truth, valid, wrist):
    """-> {alignment: (T, 21) float64 mm, NaN where a joint does not count}."""
    found = {alignment: np.full(valid.shape, np.nan) for alignment in ALIGNMENTS}
    for start in range(0, len(valid), 50_000):  # bounds the memory
        rows = slice(start, start + 50_000)
        p = prediction[rows].astype(np.float64)
        t = truth[rows].astype(np.float64)
        counts = valid[rows]
        with_wrist = counts & wrist[rows, None]
        with_bone = with_wrist & counts[:, 9:10]
        enough = counts.sum(1, keepdims=True) >= 3  # fewer points fit any pose

        relative = p - p[:, :1]
        relative_truth = t - t[:, :1]
        bone = np.linalg.norm(relative[:, 9], axis=1)
        true_bone = np.linalg.norm(relative_truth[:, 9], axis=1)
        factor = true_bone / np.where(bone > 0, bone, 1)
        scaled = relative * factor[:, None, None]

        found["abs_"][rows] = distance(p, t, counts)
        found[""][rows] = distance(relative, relative_truth, with_wrist)
        found["scaled_"][rows] = distance(scaled, relative_truth, with_bone)
        found["pa_"][rows] = distance(align(p, t, counts), t, counts & enough)
    return found


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


def pck(error, n, thresholds):
    """Errors (T, 21), sorted, n of each joint -> (K,), the share of them at most each threshold."""
    within = [np.searchsorted(column, thresholds, side="right") for column in error.T]
    return mean_over_joints(np.stack(within, 1), n)


def area(curve, thresholds):
    """The area under a PCK curve, 1 where all errors lie below all thresholds."""
    return np.trapezoid(curve, thresholds) / (thresholds[-1] - thresholds[0])


def mean_over_joints(sums, n):
    """Sums (..., 21) of n values each -> mean of each joint, then over the joints that occur; NaN
    where none does."""
    means = np.where(n > 0, sums / np.maximum(n, 1), 0)
    occur = (n > 0).sum(-1)
    return means.sum(-1) / np.where(occur > 0, occur, np.nan)


def number(value):
    """A plain float; None, which json can hold, for NaN."""
    return float(value) if np.isfinite(value) else None


# -------------------------------------------------------------------------------------------- runs

HINT = "finetune.py writes it; any method's predictions will do"
DATASETS = {"freihand": "FreiHAND", "dexycb": "DexYCB", "assemblyhands": "AssemblyHands"}
# What predictions may be in by mistake: factor to mm, unit, and the share of the hand's size below
# which the error must then be. Merely bad ones may be a tenth of a hand, and pass.
UNITS = ((1000, "metres", 0.75), (10, "centimetres", 0.5))


@dataclasses.dataclass
class Poses:
    """The T samples of a run."""
    prediction: np.ndarray  # (T, 21, 3) float32, mm
    truth: np.ndarray  # (T, 21, 3) float32, mm
    valid: np.ndarray  # (T, 21), joints that count
    wrist: np.ndarray  # (T,), samples that their wrist aligns


def open_runs(args):
    """Check all folders before any is scored, which takes minutes -> {(data set, name): Runs that
    share a row of the table}, data set by data set."""
    names = args.names or [Path(os.path.abspath(folder)).name for folder in args.runs]
    require(len(names) == len(args.runs),
            f"--names has {len(names)} names, expected {len(args.runs)}, one for each run")
    runs = []
    for folder, name in zip(map(Path, args.runs), names):
        poses = load_poses(folder, mmap=True)
        refuse_other_units(folder, poses)
        settings = read_settings(folder)
        truth = zlib.crc32(np.ascontiguousarray(poses.truth))
        valid = zlib.crc32(np.ascontiguousarray(poses.valid))
        run = Run(folder, name, settings["data"], settings, truth, valid)
        if args.submission:
            run.names = read_names(run, args.submission, len(poses.truth))
        runs.append(run)
    for run in runs:  # one without a log is on the data set whose true poses it has
        same = [other.data for other in runs if other.truth == run.truth and other.data]
        run.data = run.data or next(iter(same), "")
    groups = {}
    for data in dict.fromkeys(run.data for run in runs):  # each once, in order
        mine = [run for run in runs if run.data == data]
        for run in mine:
            same = [str(other.folder) for other in mine if other.name == run.name]
            require(len(same) == 1, f"{' and '.join(same)} have one name, --names can give others")
            if (run.truth, run.valid) != (mine[0].truth, mine[0].valid):
                print(f"{run.folder}: warning: other true poses than {mine[0].folder}, or other "
                      "valid joints; scores do not compare")
            name = run.name
            if args.seeds:
                name = re.sub(r"[-_.]?seed[-_]?\d+", "", run.name)
                require(name not in ("", run.name), f"{run.name}: --seeds expects names like "
                        "simhand-seed0, --names can give them")
            groups.setdefault((data, name), []).append(run)
    return groups


def load_poses(folder, mmap=False):
    """A run's arrays as they are -> Poses. mmap: the poses are read only when they are looked
    at."""
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


@np.errstate(all="ignore")  # what is not finite is not looked at here
def refuse_other_units(folder, poses):
    """An InputError where the true poses are no hands in mm, or where the predicted ones come near
    them in another unit."""
    some = slice(None, None, len(poses.valid) // 10_000 + 1)
    truth = poses.truth[some] - poses.truth[some][:, :1]
    prediction = poses.prediction[some] - poses.prediction[some][:, :1]
    used = poses.valid[some] & poses.wrist[some][:, None]
    used &= np.isfinite(truth).all(2) & np.isfinite(prediction).all(2)
    used[:, 0] = False
    if not used.any():
        return
    size = np.median(np.linalg.norm(truth[used], axis=1))
    require(30 <= size <= 300, f"{folder / 'gt_xyz.npy'}: joints are {size:.3g} from the wrist in "
            "the median, expected hands in mm, 30 to 300")
    for factor, unit, share in UNITS:
        error = np.median(np.linalg.norm(factor * prediction[used] - truth[used], axis=1))
        require(error > share * size, f"{folder / 'pred_xyz.npy'}: poses seem to be in {unit}, "
                f"expected mm: multiply them by {factor}")


def leave_out_unused(folder, poses, allow_missing):
    """-> Poses without the samples whose prediction is not finite, and with 0 for the joints that
    are not used; how many samples were left out. The arrays given may be overwritten."""
    used = poses.valid.copy()
    used[:, 0] = poses.wrist
    for name, array in (("gt_xyz.npy", poses.truth), ("pred_xyz.npy", poses.prediction)):
        lost = (used & ~np.isfinite(array).all(2)).any(1)
        require(not lost.any() or allow_missing and name == "pred_xyz.npy",
                f"{folder / name}: valid joints must be finite, those of {lost.sum()} samples are "
                f"not: {', '.join(map(str, np.flatnonzero(lost)[:5]))} (--allow-missing leaves out "
                "samples without a prediction)")
    if lost.any():
        used = used[~lost]
        poses = Poses(*(array[~lost] for array in vars(poses).values()))
    require(poses.valid.any(), f"{folder}: holds no sample with a valid joint and a prediction")
    poses.truth[~used] = 0
    poses.prediction[~used] = 0
    return poses, int(lost.sum())


def read_settings(folder):
    """What the log of a fine-tuning tells: the data set, `data` being its name in the table, and
    how it was trained: `method` and `pool` (hands) of the pre-training, `label_fraction`."""
    args = logged_settings(folder)
    rows = read_log(folder / "log.jsonl") if args else []
    before = next((row["pretraining"] for row in rows if "pretraining" in row), {})
    words = [DATASETS.get(str(args.get("dataset"))), args.get("setup"), args.get("modality"),
             "filtered" if args.get("paper_filter") else None]
    method = Path(str(args.get("weights", ""))).stem  # "none", "imagenet", or a file's
    settings = {key: args.get(key) for key in ("dataset", "paper_filter", "label_fraction")}
    made_by = before.get("args") or {}
    return settings | {"data": " ".join(word for word in words if word),
                       "pool": before.get("hands"),
                       "method": made_by.get("method", method)}


def claim(folder, names):
    """Note in .evaluate that files of these names are ours. An InputError where one is there and
    was not noted before."""
    path = folder / ".evaluate"
    ours = path.read_text().splitlines() if path.exists() else []
    foreign = [name for name in names if name not in ours and (folder / name).exists()]
    require(not foreign, f"{folder}: holds {', '.join(foreign)}, which evaluate.py did not write "
            "and would replace: move it away")
    save_lines(path, sorted({*ours, *names}))


# ------------------------------------------------------------------------------------------ tables

LEGEND = ("MPJPE in mm, wrist-aligned; scaled: by the true bone 0-9 over the predicted; PA: after "
          "Procrustes; AUC over the thresholds named, mm.")
LATEX = {"\\": r"\symbol{92}", "~": r"\symbol{126}", "^": r"\symbol{94}", "±": r"$\pm$"}
LATEX |= {character: f"\\{character}" for character in "&%$#_{}"}


def write_tables(out, groups, args):
    rows = make_rows(groups, args)
    legend = LEGEND
    if args.seeds:
        legend += " n: runs; ±: their standard deviation."
    if len(groups) > 1:
        legend += f" Gain: in MPJPE, over {args.baseline or 'the first'}"
        legend += "; p: Welch's two-sided t-test of it." if args.seeds else "."
    markdown = markdown_table(rows, legend)
    print(f"{markdown}\n")
    save_lines(out / "table.md", [markdown])
    save_lines(out / "table.csv", [csv_table(rows)])
    save_lines(out / "table.tex", [latex_table(rows, legend)])


def make_rows(groups, args):
    """{(data set, name): runs} -> rows of texts, the first one the heads. As in Markdown the best
    of a data set is **bold**; a mean over seeds is followed by ± and their standard deviation."""
    columns = COLUMNS | ABSOLUTE_COLUMNS if args.absolute else COLUMNS
    rows = []
    for (data, name), runs in groups.items():
        row = {"data set": data, "run": name}
        row["samples"] = "/".join(sorted({str(run.metrics["samples"]) for run in runs}))
        if args.seeds:
            row["n"] = str(len(runs))
        for key, title in columns.items():
            row[title] = metric_cell(values_of_runs(runs, key), 2 if "mpjpe" in key else 3)
        if len(groups) > 1:
            baseline = args.baseline or next(other for place, other in groups if place == data)
            row["gain, %"], p = compare(runs, groups.get((data, baseline), []))
            if args.seeds:
                row["p"] = p
        rows.append(row)
    mark_best(rows, columns.values())
    if not any(row["data set"] for row in rows):
        for row in rows:
            del row["data set"]
    return [list(rows[0]), *(list(row.values()) for row in rows)]


def values_of_runs(runs, key):
    """A metric of the runs that share a row, without those that have none."""
    return [run.metrics[key] for run in runs if run.metrics[key] is not None]


def metric_cell(values, digits):
    if not values:
        return ""
    text = f"{np.mean(values):.{digits}f}"
    return f"{text} ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else text


def compare(runs, base):
    """-> by how many percent of the baseline's the MPJPE is lower, and p of Welch's two-sided
    t-test, as texts; "" where it cannot be said. p wants two runs or more on each side."""
    ours = values_of_runs(runs, "mpjpe")
    theirs = values_of_runs(base, "mpjpe")
    gain = p = ""
    if ours and theirs and np.mean(theirs):
        gain = f"{100 * (1 - np.mean(ours) / np.mean(theirs)):+.1f}"
    if runs is not base and min(len(ours), len(theirs)) > 1 and np.ptp(ours) + np.ptp(theirs):
        from scipy.stats import ttest_ind  # here: it takes a second to import
        p = f"{ttest_ind(ours, theirs, equal_var=False).pvalue:.2g}"
    return gain, p


def mark_best(rows, heads):
    """Put ** around each value that no other row of its data set surpasses."""
    for data in {row["data set"] for row in rows}:
        for head in heads:
            some = [row for row in rows if row["data set"] == data and row[head]]
            values = [float(row[head].split()[0]) for row in some]
            for row, value in zip(some, values):
                if len(some) > 1 and value == (min if "MPJPE" in head else max)(values):
                    row[head] = f"**{row[head]}**"


def markdown_table(rows, legend):
    text = ""
    for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]:
        cells = [cell.replace("|", "\\|") for cell in row]
        text += f"| {' | '.join(cells)} |\n"
    return f"{text}\n{legend}"


def csv_table(rows):
    """A standard deviation has a column of its own."""
    columns = []
    for head, *cells in zip(*rows):
        if head in ("data set", "run"):
            columns.append([head, *cells])
            continue
        parts = [cell.strip("*").partition(" ± ") for cell in cells]
        columns.append([head, *(mean for mean, _, _ in parts)])
        if any(deviation for _, _, deviation in parts):
            columns.append([f"{head} deviation", *(deviation for _, _, deviation in parts)])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(zip(*columns))
    return text.getvalue().strip()


def latex_table(rows, legend):
    lines = []
    for row in rows:
        cells = [cell.translate(str.maketrans(LATEX)) for cell in row]
        cells = [re.sub(r"^\*\*(.+)\*\*$", r"\\textbf{\1}", cell) for cell in cells]
        lines.append(" & ".join(cells) + r" \\")
    lines[0] += r" \midrule"
    names = rows[0].index("run") + 1
    numbers = len(rows[0]) - names
    return "\n".join([f"% {legend} Needs \\usepackage{{booktabs}}.",
                      rf"\begin{{tabular}}{{{'l' * names}{'r' * numbers}}} \toprule", *lines,
                      r"\bottomrule \end{tabular}"])


# ------------------------------------------------------------------------------------------- plots

def draw_pck(out, groups):
    panels = {}
    for (data, name), runs in groups.items():
        area = metric_cell(values_of_runs(runs, "auc_0_50"), 3) or "unknown"
        curve = np.mean([run.curve for run in runs], 0)
        label = f"{name}  (AUC 0-50 {area})"
        panels.setdefault(data, {})[label] = THRESHOLDS["auc_0_50"], curve
    draw(out, "pck", panels, xlabel="threshold, mm, wrist-aligned", ylabel="share of joints (PCK)",
         xlim=(0, 50), ylim=(0, 1))


def curves(groups, key):
    """The MPJPE against a setting, through the means of the runs of each method of pre-training
    -> {data set: {method: (values, MPJPEs)}}, of methods that have several values."""
    points = {}
    for (data, _), runs in groups.items():
        for run in runs:
            value = run.settings[key]
            if value is not None and run.metrics["mpjpe"] is not None:
                line = points.setdefault((data, run.settings["method"]), {})
                line.setdefault(value, []).append(run.metrics["mpjpe"])
    panels = {}
    for (data, method), line in points.items():
        if len(line) > 1:
            means = {value: np.mean(line[value]) for value in sorted(line)}
            panels.setdefault(data, {})[method] = list(means), list(means.values())
    return panels


def draw(out, name, panels, **axes):
    """Lines {data set: {label: (x, y)}} as .png and .pdf; without any, those drawn before go."""
    height = 4 + 0.2 * max(map(len, panels.values()), default=0)
    for kind in ("png", "pdf"):
        path = out / f"{name}.{kind}"
        path.unlink(missing_ok=True)
        if not panels:
            continue
        with figure(path, (6 * len(panels), height)) as drawn:
            parts = drawn.subplots(1, len(panels), squeeze=False)[0]
            for axis, (data, lines) in zip(parts, panels.items()):
                for k, (label, (x, y)) in enumerate(lines.items()):
                    label = label.replace("$", "\\$")  # a dollar would start a formula
                    dots = "." if len(x) < 50 else ""
                    axis.plot(x, y, dots + ("-", "--", ":", "-.")[k // 10 % 4], label=label)
                axis.set(title=data, **axes)
                axis.grid(alpha=0.3)
                # Below: there may be many names, and long ones.
                axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.2))


# ------------------------------------------------------------------------------------- submissions

# A line of names.txt: the sample's index in the benchmark's list, and whether it is a left hand.
NAMES_DTYPE = np.dtype([("index", np.int64), ("left", bool)])


def read_names(run, benchmark, count):
    """names.txt of a run of `count` samples -> (count,) NAMES_DTYPE."""
    whole = run.settings["dataset"] in (None, benchmark) and not run.settings["paper_filter"]
    require(whole, f"{run.folder}: was tested on {run.data or 'other data'}, not on the whole of "
            f"{benchmark}")
    path = run.folder / "names.txt"
    hint = "expected a line a sample: index, tab, picture, tab, left or right"
    lines = [line.split(b"\t") for line in path.read_bytes().splitlines()]
    is_left = {b"left": True, b"right": False}
    try:
        names = [(int(index), is_left[side]) for index, _, side in lines]
        names = np.array(names, NAMES_DTYPE)
    except (KeyError, OverflowError, ValueError):  # a line of another number of parts, too
        names = ()
    require(0 < len(names) == count, f"{path}: {hint}, as many as in pred_xyz.npy, {count}")
    index = np.sort(names["index"])
    require(index[0] >= 0, f"{path}: has no official indices but -1, as finetune.py writes where "
            "it had only a part of the data set; a benchmark wants it whole")
    full = benchmark != "freihand" or index[-1] == count - 1
    require(full and (np.diff(index) > 0).all(), f"{path}: an index occurs twice, or one of "
            "FreiHAND's is missing")
    return names


def write_submission(run, poses, benchmark):
    """The predictions as the camera sees them, in the order of the benchmark's list: left hands,
    which pred_xyz.npy mirrors, are left again. FreiHAND wants pred.json in a zip, [keypoints
    (T, 21, 3), vertices (T, 778, 3)] in metres; DexYCB lines of the index and 63 numbers in mm."""
    path = run.folder / SUBMISSIONS[benchmark]
    claim(run.folder, [path.name])
    finite = np.isfinite(poses.prediction).all((1, 2))
    require(finite.all(), f"{run.folder / 'pred_xyz.npy'}: values must be finite, row "
            f"{finite.argmin()} is not; a benchmark wants every joint of every sample")
    order = np.argsort(run.names["index"])
    names = run.names[order]
    xyz = poses.prediction[order]
    xyz[names["left"], :, 0] *= -1
    note = ""
    with atomic(path) as file:
        if benchmark == "freihand":
            content = [(xyz.astype(np.float64) / 1000).tolist(), [[[0] * 3] * 778] * len(xyz)]
            with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("pred.json", json.dumps(content))
            note = " (FreiHAND has 3960); its mesh is zeros, so that only the scores of xyz count"
        else:  # all digits, as a wrist that is the true one counts at the threshold 0
            lines = np.column_stack([names["index"], xyz.reshape(-1, 63)])
            np.savetxt(file, lines, ["%d"] + ["%.17g"] * 63, ",")
    # finetune.py takes the wrist and the length of the bone 0-9 from the truth.
    if np.isclose(poses.prediction[:, 0], poses.truth[:, 0], atol=1e-3).all(1).mean() > 0.5:
        note += "; contains ground truth: to compare offline, not for a leaderboard"
    print(f"wrote {path}, {len(xyz)} samples{note}")


if __name__ == "__main__":
    run_script(main)
