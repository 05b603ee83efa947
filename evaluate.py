"""Score 3D hand poses: MPJPE and PCK-AUC, for any method's predictions, and compare runs.

Reads pred_xyz.npy and gt_xyz.npy (T, 21, 3) in mm, and valid.npy (T, 21) where there is one, from each run's folder;
log.jsonl, where there is one, for the data set's name and the plots that need a run's settings. Writes metrics.json
beside the predictions, and into --out table.md, table.csv, table.tex, and as .png and .pdf: pck, joints (error of each
joint), and labels and pool (error against label fraction and size of pre-training) where the runs differ in those.

    python evaluate.py runs/freihand-imagenet runs/freihand-simhand --out runs/comparison
    python evaluate.py runs/freihand-*-seed? --seeds --baseline peclr --out runs/comparison
    python evaluate.py runs/freihand-simhand --submission freihand
    python evaluate.py runs/tiny
"""

import argparse
import csv
import io
import json
import re
import zipfile
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from common import PARENTS, atomic, load_array, print_settings, read_log, require, run_script

HINT = "finetune.py writes it; any method's predictions will do"
THRESHOLDS = {"auc_0_50": np.linspace(0, 50, 100), "auc_20_50": np.linspace(20, 50, 15)}  # mm
COLUMNS = {"mpjpe": "MPJPE", "auc_0_50": "AUC 0-50", "auc_20_50": "AUC 20-50", "scaled_mpjpe": "scaled MPJPE",
           "scaled_auc_20_50": "scaled AUC 20-50", "pa_mpjpe": "PA-MPJPE", "pa_auc_0_50": "PA-AUC 0-50"}
ABSOLUTE = {"abs_mpjpe": "abs. MPJPE", "abs_auc_0_50": "abs. AUC 0-50"}
LEGEND = "MPJPE in mm, wrist-aligned; scaled: by the true bone 0-9 over the predicted; PA: after Procrustes; AUC " \
         "over the thresholds named, mm; "
DATASETS = {"freihand": "FreiHAND", "dexycb": "DexYCB", "assemblyhands": "AssemblyHands"}
RESAMPLES, GROUPS = 1000, 50_000  # of the bootstrap


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="folders with predictions. A run's row in the table is its name "
                        "without the data set's: freihand-simhand and dexycb-simhand share one")
    parser.add_argument("--out", help="folder for tables and plots (default: here; of a single run, its own)")
    parser.add_argument("--baseline", metavar="ROW", help="row over whose MPJPE the gain is (default: the first)")
    parser.add_argument("--seeds", action="store_true", help="runs whose names differ only in a seed and its number "
                        "(simhand-seed0, simhand-seed1) share a row: mean and standard deviation over them, instead of "
                        "the 95 %% bootstrap interval over a run's samples")
    parser.add_argument("--absolute", action="store_true", help="absolute camera coordinates in the table too")
    parser.add_argument("--allow-missing", action="store_true", help="leave samples out whose prediction is NaN, and "
                        "count them (default: an error)")
    parser.add_argument("--submission", choices=sorted(SUBMISSIONS), help="also write each run's predictions as the "
                        "benchmark wants them, by names.txt: FreiHAND's pred.zip, or DexYCB's dexycb.txt")
    return parser.parse_args()


def main():
    args = parse_args()
    out = Path(args.out or (args.runs[0] if len(args.runs) == 1 else "."))
    require(not out.is_file(), f"{out}: is a file, expected a folder to write to")
    print_settings(args)
    for run in args.runs:  # all of them first: a wrong folder costs no minutes
        load_run(Path(run), args.allow_missing)
        if args.submission:
            official(Path(run))
    runs = name_runs(args.runs, args.seeds)
    baseline = args.baseline or runs[0]["row"]
    require(any(run["row"] == baseline for run in runs),
            f"--baseline {baseline}: no such row, expected one of {', '.join(dict.fromkeys(r['row'] for r in runs))}")
    for run in runs:
        prediction, truth, valid, missing, warnings = load_run(run["folder"], args.allow_missing)
        print(*warnings, sep="\n", end="\n" * bool(warnings))
        run["metrics"], run["curve"] = score(prediction, truth, valid, RESAMPLES)
        run["metrics"]["samples_missing"] = missing
        write_text(run["folder"] / "metrics.json", json.dumps(run["metrics"], indent=1) + "\n")
        if args.submission:
            SUBMISSIONS[args.submission](run["folder"])
    out.mkdir(parents=True, exist_ok=True)
    columns = COLUMNS | (ABSOLUTE if args.absolute else {})
    tables = make_tables(runs, columns, baseline, args.seeds)
    print(tables["table.md"])
    for name, text in tables.items():
        write_text(out / name, text)
    plots = {"pck": plot_pck(runs), "joints": plot_joints(runs),
             "labels": plot_against(runs, "label_fraction", "share of the labels"),
             "pool": plot_against(runs, "pool", "hands in pre-training")}
    wrote = [*tables]
    for name, figure in plots.items():
        for kind in ("png", "pdf") if figure else ():
            with atomic(out / f"{name}.{kind}") as file:
                figure.savefig(file, format=kind, dpi=110)
            wrote.append(f"{name}.{kind}")
    print(f"wrote metrics.json beside the predictions of {len(runs)} run{'s' * (len(runs) > 1)}; into {out}: "
          + ", ".join(wrote))


# ---------------------------------------------------------------------------------------------- runs

def load_run(folder, allow_missing=False):
    """-> prediction, truth (T, 21, 3) float32 mm, 0 where not valid; valid (T, 21); number of samples left out for a
    prediction that is not finite; warnings."""
    require(folder.is_dir(), f"{folder}: no such folder, expected a run with pred_xyz.npy and gt_xyz.npy")
    truth = load_array(folder / "gt_xyz.npy", np.float32, (None, 21, 3), hint=HINT, finite=False)
    prediction = load_array(folder / "pred_xyz.npy", np.float32, (len(truth), 21, 3), hint=HINT, finite=False)
    valid, warnings, missing = np.ones(truth.shape[:2], bool), [], 0
    if (folder / "valid.npy").exists():
        valid = load_array(folder / "valid.npy", bool, truth.shape[:2], hint=HINT)
    for name, array in (("gt_xyz.npy", truth), ("pred_xyz.npy", prediction)):
        bad = np.flatnonzero((valid & ~np.isfinite(array).all(2)).any(1))
        if len(bad) and array is prediction and allow_missing:
            valid[bad], missing = False, len(bad)
            warnings.append(f"{folder}: warning: {missing} of {len(valid)} samples left out, their predictions are not "
                            "finite; other runs are scored on more")
            continue
        require(not len(bad), f"{folder / name}: valid joints must be finite, those of {len(bad)} samples are not: "
                f"{', '.join(map(str, bad[:5]))}" + (", ..." if len(bad) > 5 else "")
                + (" (--allow-missing leaves them out)" if array is prediction else ""))
    require(valid.any(), f"{folder / 'valid.npy'}: no joint is valid, nothing can be scored")
    both = valid[:, 0] & valid[:, 9]
    for name, array in (("gt_xyz.npy", truth), ("pred_xyz.npy", prediction)):
        array[~valid] = 0
        middle = np.median(np.linalg.norm(array[both, 9] - array[both, 0], axis=1)) if both.any() else 90
        if not 40 <= middle <= 140:
            warnings.append(f"{folder / name}: warning: the bone 0-9 has a median of {middle:.3g}, expected 40 to 140: "
                            "are these mm" + (", not metres?" if middle < 1 else "?"))
    return prediction, truth, valid, missing, warnings


def name_runs(folders, seeds):
    """-> a dict for each run: folder; name, the shortest tail of its path that tells it from the others; data, the
    data set's name or ""; row in the table; settings, as far as its log tells."""
    parts = [Path(folder).resolve().parts for folder in folders]
    require(len(set(parts)) == len(parts), "the same run is given twice")
    tail = next(k for k in range(1, 100) if len({p[-k:] for p in parts}) == len(parts))
    runs = []
    for folder, part in zip(folders, parts):
        name, settings = "/".join(part[-tail:]), read_settings(Path(folder))
        data = settings.get("data") or next((label for word, label in DATASETS.items() if word in name.lower()), "")
        row = name
        if seeds:
            row, found = re.subn(r"[-_./]?seed[-_]?\d+", "", name)
            require(found, f"{folder}: --seeds expects a seed in each name, as in simhand-seed0 or seed0/simhand")
        for word in DATASETS:
            row = re.sub(rf"(^|[-_./]){word}(?=$|[-_./])", "", row, flags=re.I)
        row = row.strip("-_./") or part[-tail - 1]  # the folder around it, where the data set's name was all
        runs.append(dict(folder=Path(folder), name=name, data=data, row=row, settings=settings))
    if not seeds and len({(run["row"], run["data"]) for run in runs}) < len(runs):
        runs = [run | {"row": run["name"]} for run in runs]
    return runs


def read_settings(folder):
    """What the log of a fine-tuning run says of it -> dict, empty where there is no such log."""
    if not (folder / "log.jsonl").exists():
        return {}
    rows = read_log(folder / "log.jsonl")
    args = rows[0].get("args", {}) if rows else {}
    before = next((row["pretraining"] for row in rows if "pretraining" in row), {})
    settings = dict(before.get("args") or {})  # of pre-training: method, weighting ...
    settings |= {key: "+".join(map(str, settings[key])) for key in ("hands", "pairs") if settings.get(key)}
    settings |= {key: args[key] for key in ("label_fraction", "backbone", "head", "freeze") if key in args}
    settings["pool"] = before.get("hands")
    settings.setdefault("method", Path(str(args.get("weights", ""))).stem)
    words = [DATASETS.get(args.get("dataset"), ""), args.get("setup") or "", args.get("modality") or ""]
    return settings | {"data": " ".join(word for word in words if word)}


# ---------------------------------------------------------------------------------------------- metrics

def score(prediction, truth, valid, resamples=0):
    """All metrics of one run -> dict as in metrics.json, and the PCK curve (100,) of the wrist-aligned error.

    Means are taken per joint, then over joints. Samples without a valid wrist are left out of the wrist-aligned
    metrics, those without a valid joint 9 out of the rescaled ones too; both are counted. An AUC is the mean of each
    error's own area, that under a step from 0 to 1 at the error: so it can be averaged and resampled like an error.
    resamples: of the bootstrap over samples; with 0 there are no intervals.
    """
    errors = distances(prediction, truth, valid)
    result = {"samples": len(valid), "samples_without_wrist": int((~valid[:, 0]).sum()),
              "samples_without_bone": int((~(valid[:, 0] & valid[:, 9])).sum()),
              "samples_without_procrustes": int((valid.sum(1) < 3).sum())}
    keys, tables, order = [], [], np.random.default_rng(0).permutation(len(valid))
    for prefix in list(errors):
        error = errors.pop(prefix)  # a million samples have 170 MB of each
        counts = ~np.isnan(error)
        n, values = counts.sum(0), {"mpjpe": np.where(counts, error, 0)}
        for name, steps in THRESHOLDS.items():
            if prefix in ("", "scaled_") or name == "auc_0_50":
                areas = area_under(np.tri(len(steps), len(steps) + 1), steps)  # column k: 1 from threshold k on
                first = np.searchsorted(steps, error)  # threshold that the error reaches; NaN comes last: 0
                values[name] = areas[first]
            if prefix + name == "auc_0_50":
                reached = np.stack([np.bincount(first[counts[:, j], j], minlength=101)[:100] for j in range(21)])
                curve = mean_over_joints(np.cumsum(reached, 1).T, n)
        for name, value in values.items():
            result[prefix + name] = number(mean_over_joints(value.sum(0), n))
            keys.append(prefix + name)
        tables.append([sum_groups(table, order) for table in ([counts, *values.values()] if resamples else ())])
        if prefix == "":
            result["per_joint"] = [number(v) for v in values["mpjpe"].sum(0) / np.where(n, n, np.nan)]
    if resamples:
        drawn = bootstrap(tables, resamples)
        result["intervals"] = {key: [number(v) for v in np.percentile(column, (2.5, 97.5))]
                               for key, column in zip(keys, drawn)}
    return result, curve


def distances(prediction, truth, valid):
    """-> {kind: (T, 21) float64 mm, NaN where a joint does not count}, for the four alignments."""
    found = {kind: np.full(valid.shape, np.nan) for kind in ("abs_", "", "scaled_", "pa_")}
    for low in range(0, len(valid), 50_000):  # bounds the memory
        rows = slice(low, low + 50_000)
        p, t, v = prediction[rows].astype(np.float64), truth[rows].astype(np.float64), valid[rows]
        relative_p, relative_t, wrist = p - p[:, :1], t - t[:, :1], v & v[:, :1]
        predicted_bone = np.linalg.norm(relative_p[:, 9], axis=1)
        factor = np.linalg.norm(relative_t[:, 9], axis=1) / np.where(predicted_bone > 0, predicted_bone, 1)
        for kind, difference, counts in (
                ("abs_", p - t, v), ("", relative_p - relative_t, wrist),
                ("scaled_", relative_p * factor[:, None, None] - relative_t, wrist & v[:, 9:10]),
                ("pa_", align(p, t, v) - t, v & (v.sum(1) >= 3)[:, None])):  # fewer points fit any pose
            found[kind][rows] = np.where(counts, np.linalg.norm(difference, axis=2), np.nan)
    return found


def sum_groups(table, order):
    """(T, 21) -> (T, 21) in another order, or with more than GROUPS samples the sums of as many random groups."""
    sums = np.zeros((min(len(table), GROUPS), 21))
    for low in range(0, len(table), GROUPS):
        rows = order[low:low + GROUPS]
        sums[:len(rows)] += table[rows]
    return sums


def bootstrap(tables, resamples, seed=0):
    """For each alignment: how often joints count, and the sums of each metric, of each sample (G, 21) -> for each
    metric (resamples,): that of G samples drawn with replacement, the same ones for all. Random groups in place of
    samples have the same variance, and bound the time."""
    rng, size, made = np.random.default_rng(seed), len(tables[0][0]), []
    for _ in range(resamples):
        times = np.bincount(rng.integers(size, size=size), minlength=size).astype(np.float64)
        made.append([mean_over_joints(times @ s, n) for counts, *sums in tables
                     for n in [times @ counts] for s in sums])
    return np.transpose(made)


def mean_over_joints(sums, n):
    """(..., 21) over how many each -> mean over the joints that occur, NaN where none does."""
    share = np.where(n > 0, sums / np.maximum(n, 1), 0)
    return share.sum(-1) / np.where((n > 0).any(-1), (n > 0).sum(-1), np.nan)


def number(value):
    """A plain float; None, which json can hold, for NaN."""
    return float(value) if np.isfinite(value) else None


def area_under(pck, thresholds):
    """(thresholds, ...) -> trapezoids, divided by the range: 1 where every error is below the first threshold."""
    return np.trapz(pck, thresholds, axis=0) / (thresholds[-1] - thresholds[0])


def align(prediction, truth, valid):
    """Each prediction (T, 21, 3) moved on its truth by the best similarity over the valid joints, reflections allowed,
    as in FreiHAND's eval.py."""
    weight = valid[..., None] / np.maximum(valid.sum(1), 1)[:, None, None]
    mean_p, mean_t = (prediction * weight).sum(1, keepdims=True), (truth * weight).sum(1, keepdims=True)
    p, t = (prediction - mean_p) * valid[..., None], (truth - mean_t) * valid[..., None]
    norm_p, norm_t = (np.linalg.norm(x, axis=(1, 2), keepdims=True) + 1e-8 for x in (p, t))
    u, singular, vt = np.linalg.svd((t / norm_t).transpose(0, 2, 1) @ (p / norm_p))
    scale = singular.sum(1)[:, None, None] * norm_t
    return (prediction - mean_p) / norm_p @ (u @ vt).transpose(0, 2, 1) * scale + mean_t


# ---------------------------------------------------------------------------------------------- tables

def make_tables(runs, columns, baseline, seeds):
    """-> {file: text}: a row for each name, columns grouped by data set, the gain in MPJPE over the baseline's in
    percent, best in bold; behind each value its 95 % interval, or over seeds the standard deviation."""
    rows, groups = (list(dict.fromkeys(run[key] for run in runs)) for key in ("row", "data"))
    several = len(rows) > 1
    heads = ["samples", *["runs"] * seeds, *columns.values(), *["gain, %"] * several]
    found = {}  # row, data set, column -> value, and its interval's ends or its deviation
    for run in runs:
        for key in columns:
            mine = [r["metrics"] for r in runs if (r["row"], r["data"]) == (run["row"], run["data"])]
            values = [m[key] for m in mine if m[key] is not None]
            if values:
                behind = mine[0]["intervals"][key] if not seeds else [np.std(values, ddof=1)] if values[1:] else []
                found[run["row"], run["data"], key] = np.mean(values), *behind
    lines = []  # for each row its cells: text, texts of what stands behind it, whether it is the best of its column
    for row in rows:
        cells = []
        for group in groups:
            mine = [run["metrics"] for run in runs if (run["row"], run["data"]) == (row, group)]
            counts = {str(m["samples"] - m["samples_missing"]) for m in mine}
            cells += [("/".join(sorted(counts)), (), False), *[(str(len(mine)), (), False)] * seeds]
            for key in columns:
                best = (min if "mpjpe" in key else max)(
                    (found[r, group, key][0] for r in rows if (r, group, key) in found), default=None)
                value, *behind = (f"{v:.{2 if 'mpjpe' in key else 3}f}" for v in found.get((row, group, key), [np.nan]))
                cells.append((value.replace("nan", ""), behind, several and (row, group, key) in found
                              and found[row, group, key][0] == best))
            ours, theirs = (found.get((r, group, "mpjpe"), [0])[0] for r in (row, baseline))
            cells += [(f"{100 * (1 - ours / theirs):+.1f}" if ours and theirs else "", (), False)] * several
        lines.append(cells)

    titles = [f"{group} {head}".strip() for group in groups for head in heads]
    markdown = [["run", *titles], ["---"] * (1 + len(titles))]
    latex = [" & ".join(["run", *map(escape, heads * len(groups))]) + " \\\\ \\midrule"]
    if any(groups):
        spans = (f"\\multicolumn{{{len(heads)}}}{{c}}{{{escape(group)}}}" for group in groups)
        latex.insert(0, " & ".join(["", *spans]) + " \\\\")
    ends = ("deviation",) if seeds else ("low", "high")
    metrics = [head in columns.values() for head in heads] * len(groups)
    table = [["run", *(t for title, of in zip(titles, metrics)
                       for t in (title, *(f"{title} {end}" for end in ends if of)))]]
    for row, cells in zip(rows, lines):
        joined = ["", " ± {}", " ({}-{})"], ["", " $\\pm$ {}", " {{\\scriptsize ({}--{})}}"]
        shown, typeset = ([(bold % text if best else text) + form[len(behind)].format(*behind)
                           for text, behind, best in cells] for bold, form in zip(("**%s**", "\\textbf{%s}"), joined))
        markdown.append([row.replace("|", "\\|"), *shown])
        latex.append(" & ".join([escape(row), *typeset]) + " \\\\")
        table.append([row, *(t for (text, behind, _), of in zip(cells, metrics)
                             for t in (text, *(list(behind) + [""] * len(ends))[:len(ends) * of]))])
    legend = LEGEND + ("± standard deviation over the seeds." if seeds else
                       f"in brackets 95 % of {RESAMPLES} bootstrap resamples of the samples.")
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(table)
    return {"table.md": "\n".join("| " + " | ".join(line) + " |" for line in markdown) + f"\n\n{legend}"
            + f" Gain: in MPJPE, over {baseline}." * several + "\n", "table.csv": text.getvalue(),
            "table.tex": "\n".join([f"% {legend} Needs \\usepackage{{booktabs}}.",
                                    f"\\begin{{tabular}}{{l{'r' * len(titles)}}} \\toprule", *latex,
                                    "\\bottomrule \\end{tabular}", ""])}


def escape(text):
    """Text as LaTeX prints it."""
    special = {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}
    return "".join(special.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in text)


def write_text(path, text):
    with atomic(path) as file:
        file.write(text.encode())


# ---------------------------------------------------------------------------------------------- plots

# A hand to draw errors on, x right, y up; a real one's joints lie too close for bars.
OPEN_HAND = np.array([(0, 0), (-.45, .2), (-.85, .5), (-1.15, .85), (-1.4, 1.2), (-.4, 1.0), (-.5, 1.45), (-.56, 1.85),
                      (-.6, 2.2), (0, 1.05), (0, 1.55), (0, 1.97), (0, 2.35), (.37, .97), (.47, 1.42), (.53, 1.82),
                      (.58, 2.17), (.7, .8), (.9, 1.15), (1.02, 1.48), (1.12, 1.8)])


def panels(runs, width, height):
    """-> figure, and for each data set its axis and runs."""
    groups = list(dict.fromkeys(run["data"] for run in runs))
    figure = Figure(figsize=(width * len(groups), height), layout="tight")
    for axis, group in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups):
        axis.set_title(group)
        yield figure, axis, [run for run in runs if run["data"] == group]


def plot_pck(runs):
    for figure, axis, mine in panels(runs, 6, 4):
        for row in dict.fromkeys(run["row"] for run in mine):
            curve = np.mean([run["curve"] for run in mine if run["row"] == row], 0)
            area = area_under(curve, THRESHOLDS["auc_0_50"])
            axis.plot(THRESHOLDS["auc_0_50"], curve, label=f"{row}  (AUC 0-50 {area:.3f})")
        axis.set(xlabel="threshold on the wrist-aligned error, mm", ylabel="share of joints (PCK)")
        axis.set(xlim=(0, 50), ylim=(0, 1))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return figure


def plot_joints(runs):
    """The error of each joint as a bar on a drawn hand, side by side for all rows."""
    for figure, axis, mine in panels(runs, 6.5, 6.5):
        for joint, parent in enumerate(PARENTS):
            axis.plot(*OPEN_HAND[[parent, joint]].T, color="0.8", linewidth=7, solid_capstyle="round", zorder=0)
        rows = list(dict.fromkeys(run["row"] for run in mine))
        errors = np.array([np.mean([[np.nan if e is None else e for e in run["metrics"]["per_joint"]]
                                    for run in mine if run["row"] == row], 0) for row in rows])
        top, width = np.nanmax(errors, initial=1e-9), 0.2 / max(len(rows), 2)
        for k, (row, error) in enumerate(zip(rows, errors)):
            x = OPEN_HAND[:, 0] + (k - (len(rows) - 1) / 2) * width
            axis.bar(x, error * 0.25 / top, width * 0.9, OPEN_HAND[:, 1], label=row, color=f"C{k % 10}")
            if len(rows) <= 2:
                for place, y, value in zip(x, OPEN_HAND[:, 1] + error * 0.25 / top + 0.01, error):
                    axis.text(place, y, f"{value:.0f}", fontsize=5.5, ha="center", va="bottom")
        axis.bar(1.15, 0.25, 0.03, 0, color="0.3")
        axis.text(1.12, 0.12, f"{top:.0f} mm", ha="right", va="center")
        axis.set(xlim=(-1.9, 1.4), aspect="equal")
        axis.axis("off")
        axis.legend(fontsize=8, loc="upper left", title="wrist-aligned error of each joint", title_fontsize=8)
    return figure


def plot_against(runs, key, label):
    """MPJPE against a setting, a line for each kind of run through the mean of its runs; None unless the setting takes
    several values on a data set. Runs that have none are drawn as a level."""
    def differs(mine):
        return len({run["settings"].get(key) for run in mine} - {None}) > 1

    runs = [run for _, _, mine in panels(runs, 1, 1) for run in mine if differs(mine)]
    for figure, axis, mine in panels(runs, 5, 4) if runs else ():
        kinds = kinds_of(mine, but="pairs" if key == "pool" else None)
        for k, kind in enumerate(dict.fromkeys(kinds)):
            points = [(run["settings"].get(key), run["metrics"]["mpjpe"]) for run, of in zip(mine, kinds) if of == kind
                      and run["metrics"]["mpjpe"] is not None]
            x, y = (np.array(column) for column in zip(*points)) if points else ((), ())
            if any(value is None for value in x):
                axis.axhline(np.mean(y), linestyle="--", color=f"C{k % 10}", label=kind)
            elif points:
                axis.plot(x, y, "o", color=f"C{k % 10}", markersize=4)
                steps = np.unique(x)
                axis.plot(steps, [y[x == step].mean() for step in steps], color=f"C{k % 10}", label=kind)
        axis.set(xscale="log", xlabel=label, ylabel="MPJPE, mm, wrist-aligned")
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8)
    return figure if runs else None


def kinds_of(runs, but):
    """-> what tells each run from the others: the settings, of those that can make a line in a plot, that differ."""
    keys = [key for key in ("method", "weighting", "weight_on", "weight_keypoints", "top_k", "hands", "pairs",
                            "backbone", "head", "freeze")
            if key != but and len({run["settings"].get(key) for run in runs} - {None}) > 1]
    return [", ".join(str(value) if isinstance(value, str) else f"{key} {value}" for key in keys
                      if (value := run["settings"].get(key)) is not None) or "runs" for run in runs]


# ---------------------------------------------------------------------------------------------- submissions

def official(folder):
    """-> official indices (T,) in their order, predictions (T, 21, 3) as the camera sees them: left hands, which
    pred_xyz.npy mirrors, are left again."""
    path, hint = folder / "names.txt", "expected a line a sample: index, tab, picture, tab, left or right"
    require(path.is_file(), f"{path}: missing, {hint}")
    try:
        rows = [line.split(b"\t") for line in path.read_bytes().splitlines()]
        index, left = np.array([int(row[0]) for row in rows]), np.array([row[-1] == b"left" for row in rows])
    except ValueError:
        rows = []
    require(rows and all(len(row) == 3 and row[2] in (b"left", b"right") for row in rows), f"{path}: {hint}")
    require(len(np.unique(index)) == len(index), f"{path}: an index occurs twice")
    xyz = load_array(folder / "pred_xyz.npy", np.float32, (len(rows), 21, 3), hint=f"as many as {path} has lines")
    xyz[left, :, 0] *= -1
    order = np.argsort(index)
    return index[order], xyz[order]


def write_freihand(folder):
    """pred.zip with pred.json: [keypoints (T, 21, 3), vertices (T, 778, 3)] in metres; there is no mesh, so zeros."""
    index, xyz = official(folder)
    require(np.array_equal(index, np.arange(len(index))), f"{folder / 'names.txt'}: FreiHAND's list has no gaps, "
            f"expected the indices 0 to {len(index) - 1}")
    none = json.dumps([[0] * 3] * 778)
    text = f"[{json.dumps((xyz.astype(np.float64) / 1000).tolist())}, [{', '.join([none] * len(xyz))}]]"
    with atomic(folder / "pred.zip") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("pred.json", text)
    print(f"wrote {folder}/pred.zip, {len(xyz)} samples" + (
        "" if len(xyz) == 3960 else ": FreiHAND's evaluation has 3960, its server will refuse this"))


def write_dexycb(folder):
    """dexycb.txt, a line a sample: index and 63 coordinates in mm, as DexYCB's toolkit reads it."""
    index, xyz = official(folder)
    lines = (",".join([str(i), *(f"{v:.6f}" for v in pose)]) for i, pose in zip(index, xyz.reshape(-1, 63)))
    write_text(folder / "dexycb.txt", "\n".join(lines) + "\n")
    print(f"wrote {folder}/dexycb.txt, {len(xyz)} samples")


SUBMISSIONS = {"freihand": write_freihand, "dexycb": write_dexycb}


if __name__ == "__main__":
    run_script(main)
