"""Score 3D hand poses: MPJPE and PCK-AUC, for any method's predictions, and compare runs.

Reads pred_xyz.npy and gt_xyz.npy (T, 21, 3) in mm, and where there are such valid.npy (T, 21), joints that count, and
wrist.npy (T,), samples whose wrist aligns them even where that joint does not count, from each run's folder; log.jsonl, where there is one, for the data set's name and the plots that need a run's settings. Writes metrics.json
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
import math
import os
import re
import zipfile
import zlib
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from common import PARENTS, InputError, atomic, load_array, print_settings, read_log, require, run_script

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
    runs = name_runs(args.runs, args.seeds)
    for run in runs:  # all of them first: a wrong folder costs no minutes
        load_run(run["folder"], args.allow_missing)
        if args.submission:
            official(run["folder"], args.submission, run["settings"])
    baseline = args.baseline or runs[0]["row"]
    require(any(run["row"] == baseline for run in runs),
            f"--baseline {baseline}: no such row, expected one of {', '.join(dict.fromkeys(r['row'] for r in runs))}")
    out.mkdir(parents=True, exist_ok=True)
    for run in runs:
        prediction, truth, valid, wrist, missing, warnings = load_run(run["folder"], args.allow_missing)
        run["metrics"], run["curve"] = score(prediction, truth, valid, RESAMPLES, wrist)
        run["metrics"]["samples_missing"], run["truth"] = missing, zlib.crc32(truth)
        without = run["metrics"]["samples_without_wrist"]
        warnings += [f"{run['folder']}: {without} of {len(valid)} samples have no wrist to align by"] * bool(without)
        first = next(r for r in runs if r["data"] == run["data"])
        if run["truth"] != first["truth"]:
            warnings.append(f"{run['folder']}: warning: other true poses than {first['folder']}; scores do not compare")
        print(*warnings, sep="\n", end="\n" * bool(warnings))
        write_text(run["folder"] / "metrics.json", json.dumps(run["metrics"], indent=1) + "\n")
        if args.submission:
            SUBMISSIONS[args.submission](run["folder"], *official(run["folder"], args.submission, run["settings"]))
    tables = make_tables(runs, COLUMNS | (ABSOLUTE if args.absolute else {}), baseline, args.seeds)
    print(tables["table.md"])
    for name, text in tables.items():
        write_text(out / name, text)
    plots = {"pck": plot_pck(runs), "joints": plot_joints(runs),
             "labels": plot_against(runs, "label_fraction", "share of the labels"),
             "pool": plot_against(runs, "pool", "hands in pre-training")}
    for path, figure in ((out / f"{name}.{kind}", figure) for name, figure in plots.items() for kind in ("png", "pdf")):
        path.unlink(missing_ok=True)  # of other runs
        if figure:
            with atomic(path) as file:
                figure.savefig(file, format=path.suffix[1:], dpi=110, bbox_inches="tight")
    print(f"wrote metrics.json beside the predictions of {len(runs)} run{'s' * (len(runs) > 1)}; into {out}: "
          + ", ".join([*tables, *(f"{name}.png and .pdf" for name, figure in plots.items() if figure)]))


# ---------------------------------------------------------------------------------------------- runs

def load_run(folder, allow_missing=False):
    """-> prediction, truth (T, 21, 3) float32 mm, 0 where not used; valid (T, 21): joints that count; wrist (T,): samples
    that their wrist aligns; number of samples left out for a prediction that is not finite; warnings."""
    require(folder.is_dir(), f"{folder}: no such folder, expected a run with pred_xyz.npy and gt_xyz.npy")
    truth = load_array(folder / "gt_xyz.npy", np.float32, (None, 21, 3), hint=HINT, finite=False)
    prediction = load_array(folder / "pred_xyz.npy", np.float32, (len(truth), 21, 3), hint=HINT, finite=False)
    valid, warnings = np.ones(truth.shape[:2], bool), []
    if (folder / "valid.npy").exists():
        valid = load_array(folder / "valid.npy", bool, truth.shape[:2], hint=HINT)
    used = valid.copy()
    if (folder / "wrist.npy").exists():
        used[:, 0] |= load_array(folder / "wrist.npy", bool, truth.shape[:1], hint=HINT)
    bad = {name: (used & ~np.isfinite(array).all(2)).any(1) for name, array in (
        ("gt_xyz.npy", truth), ("pred_xyz.npy", prediction))}
    missing = bad.pop("pred_xyz.npy") if allow_missing else np.zeros(len(valid), bool)
    for name, rows in bad.items():
        require(not rows.any(), f"{folder / name}: valid joints must be finite, those of {rows.sum()} samples are not: "
                f"{', '.join(map(str, np.flatnonzero(rows)[:5]))}" + ", ..." * int(rows.sum() > 5)
                + " (--allow-missing leaves them out)" * (name == "pred_xyz.npy"))
    if missing.any():
        warnings.append(f"{folder}: warning: {missing.sum()} of {len(valid)} samples left out, their predictions are "
                        "not finite; other runs are scored on more")
        prediction, truth, valid, used = (array[~missing] for array in (prediction, truth, valid, used))
    require(valid.any(), f"{folder}: holds no sample with a valid joint{' and a finite prediction' * allow_missing}")
    both = used[:, 0] & used[:, 9]
    for name, array in (("gt_xyz.npy", truth), ("pred_xyz.npy", prediction)):
        array[~used] = 0
        middle = np.median(np.linalg.norm(array[both, 9] - array[both, 0], axis=1)) if both.any() else 90
        if not 40 <= middle <= 140:
            warnings.append(f"{folder / name}: warning: the bone 0-9 has a median of {middle:.3g}, expected 40 to 140: "
                            "are these mm" + (", not metres?" if middle < 1 else "?"))
    return prediction, truth, valid, used[:, 0], int(missing.sum()), warnings


def name_runs(folders, seeds):
    """-> a dict for each run: folder; name, the shortest tail of its path that tells it from the others; data, the
    data set's name or ""; row in the table; settings, as far as its log tells."""
    real, parts = [Path(folder).resolve() for folder in folders], [Path(os.path.abspath(f)).parts for f in folders]
    twice = [str(folder) for folder, path in zip(folders, real) if real.count(path) > 1]
    require(not twice, f"the same run is given twice: {', '.join(twice)}")
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
    rows = read_log(folder / "log.jsonl") or [{}]
    try:
        args = rows[0].get("args") or {}
        before = next((row["pretraining"] for row in rows if "pretraining" in row), {})
        settings = {"method": Path(str(args.get("weights", ""))).stem} | dict(before.get("args") or {})
        settings |= {key: "+".join(map(str, settings[key])) for key in ("hands", "pairs") if settings.get(key)}
        settings |= {key: args.get(key) for key in ("label_fraction", "backbone", "head", "freeze", "paper_filter")}
        settings |= {"pool": before.get("hands"), "dataset": args.get("dataset")}
        words = [DATASETS.get(args.get("dataset"), ""), args.get("setup"), args.get("modality")]
        settings["data"] = " ".join(word for word in words if word)
        numbers = [settings[key] for key in ("label_fraction", "pool") if settings[key] is not None]
        if not all(0 < value < math.inf for value in numbers):
            raise ValueError
    except (AttributeError, TypeError, ValueError):
        raise InputError(f"{folder / 'log.jsonl'}: expected the log of finetune.py, or none")
    return settings


# ---------------------------------------------------------------------------------------------- metrics

def score(prediction, truth, valid, resamples=0, wrist=None):
    """All metrics of one run -> dict as in metrics.json, and the PCK curve (100,) of the wrist-aligned error.

    Means are taken per joint, then over joints. wrist (T,): samples that their wrist aligns, by default those where it
    is valid. Others are left out of the wrist-aligned metrics, those without a valid joint 9 out of the rescaled ones
    too; both are counted. An AUC is the mean of each error's own area, that under a step from 0 to 1 at the error: so
    it can be averaged and resampled like an error. resamples: of the bootstrap over samples; with 0 there are no
    intervals.
    """
    wrist = valid[:, 0] if wrist is None else wrist
    errors = distances(prediction, truth, valid, wrist)
    result = {"samples": len(valid), "samples_without_wrist": int((~wrist).sum()),
              "samples_without_bone": int((~(wrist & valid[:, 9])).sum()),
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
        if resamples:
            tables.append([sum_groups(table, order) for table in (counts, *values.values())])
        if prefix == "":
            result["per_joint"] = [number(v) for v in values["mpjpe"].sum(0) / np.where(n, n, np.nan)]
    if resamples:
        drawn = bootstrap(tables, resamples)
        result["intervals"] = {key: [None, None] if result[key] is None else  # a draw may miss the few that count
                               np.nanpercentile(column, (2.5, 97.5)).tolist() for key, column in zip(keys, drawn)}
    return result, curve


def distances(prediction, truth, valid, wrist):
    """-> {kind: (T, 21) float64 mm, NaN where a joint does not count}, for the four alignments."""
    found = {kind: np.full(valid.shape, np.nan) for kind in ("abs_", "", "scaled_", "pa_")}
    for low in range(0, len(valid), 50_000):  # bounds the memory
        rows = slice(low, low + 50_000)
        p, t, v = prediction[rows].astype(np.float64), truth[rows].astype(np.float64), valid[rows]
        relative_p, relative_t, aligned = p - p[:, :1], t - t[:, :1], v & wrist[rows, None]
        predicted_bone = np.linalg.norm(relative_p[:, 9], axis=1)
        factor = np.linalg.norm(relative_t[:, 9], axis=1) / np.where(predicted_bone > 0, predicted_bone, 1)
        for kind, difference, counts in (
                ("abs_", p - t, v), ("", relative_p - relative_t, aligned),
                ("scaled_", relative_p * factor[:, None, None] - relative_t, aligned & v[:, 9:10]),
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
    return np.trapezoid(pck, thresholds, axis=0) / (thresholds[-1] - thresholds[0])


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

def fill_cells(runs, rows, groups, columns, baseline, seeds):
    """-> for each row a list of cells, data set by data set: text; texts of what stands behind it, the ends of its 95 %
    interval or the deviation over seeds; whether it is the best of its column."""
    scores, found, best, lines = {}, {}, {}, []
    for run in runs:
        scores.setdefault((run["row"], run["data"]), []).append(run["metrics"])
    for (row, group), mine in scores.items():
        for key in columns:
            values = [m[key] for m in mine if m[key] is not None]
            if values:
                behind = mine[0]["intervals"][key] if not seeds else [np.std(values, ddof=1)] if values[1:] else []
                value, better = np.mean(values), min if "mpjpe" in key else max
                found[row, group, key] = value, *behind
                best[group, key] = better(value, best.get((group, key), value))
    for row in rows:
        cells = []
        for group in groups:
            mine = scores.get((row, group), [])
            cells += [("/".join(sorted({str(m["samples"]) for m in mine})), (), False)]
            cells += [(str(len(mine)), (), False)] * seeds
            for key in columns:
                value, *behind = found.get((row, group, key), [None])
                text, *behind = ("" if v is None else f"{v:.{2 if 'mpjpe' in key else 3}f}" for v in (value, *behind))
                cells.append((text, behind, len(rows) > 1 and value is not None and value == best[group, key]))
            ours, theirs = (found.get((r, group, "mpjpe"), [0])[0] for r in (row, baseline))
            gain = f"{100 * (1 - ours / theirs):+.1f}" if ours and theirs else ""
            cells += [(gain, (), False)] * (len(rows) > 1)
        lines.append(cells)
    return lines


def make_tables(runs, columns, baseline, seeds):
    """-> {file: text}: a row for each name, columns grouped by data set, the gain in MPJPE over the baseline's in
    percent, best in bold; behind each value its 95 % interval, or over seeds the standard deviation."""
    rows, groups = (list(dict.fromkeys(run[key] for run in runs)) for key in ("row", "data"))
    lines = fill_cells(runs, rows, groups, columns, baseline, seeds)
    heads = ["samples", *["runs"] * seeds, *columns.values(), *["gain, %"] * (len(rows) > 1)]
    titles = [f"{group} {head}".strip() if groups[1:] else head for group in groups for head in heads]
    markdown = [["run", *titles], ["---"] * (1 + len(titles))]
    latex = [" & ".join(["run", *map(escape, heads * len(groups))]) + " \\\\ \\midrule"]
    if groups[1:]:
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
    legend = f"{groups[0]}. " * bool(groups[0] and not groups[1:]) + LEGEND + (
        "± standard deviation over the seeds." if seeds else
        f"in brackets 95 % of {RESAMPLES} bootstrap resamples of the samples.")
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(table)
    return {"table.md": "\n".join("| " + " | ".join(line) + " |" for line in markdown) + f"\n\n{legend}"
            + f" Gain: in MPJPE, over {baseline}." * (len(rows) > 1) + "\n", "table.csv": text.getvalue(),
            "table.tex": "\n".join([f"% {legend} Needs \\usepackage{{booktabs}}.",
                                    f"\\begin{{tabular}}{{l{'r' * len(titles)}}} \\toprule", *latex,
                                    "\\bottomrule \\end{tabular}", ""])}


def escape(text):
    """Text as LaTeX prints it."""
    return re.sub(r"[&%$#_{}]|([\\~^])", lambda m: f"\\symbol{{{ord(m[0])}}}" if m[1] else "\\" + m[0], text)


def write_text(path, text):
    with atomic(path) as file:
        file.write(text.encode())


# ---------------------------------------------------------------------------------------------- plots

# A hand to draw errors on, x right, y up; a real one's joints lie too close for bars.
OPEN_HAND = np.array([(0, 0), (-.45, .2), (-.85, .5), (-1.15, .85), (-1.4, 1.2), (-.4, 1.0), (-.5, 1.45), (-.56, 1.85),
                      (-.6, 2.2), (0, 1.05), (0, 1.55), (0, 1.97), (0, 2.35), (.37, .97), (.47, 1.42), (.53, 1.82),
                      (.58, 2.17), (.7, .8), (.9, 1.15), (1.02, 1.48), (1.12, 1.8)])


def panels(runs, width, height):
    """-> figure, and for each data set its axis and runs. Names below it: there may be many, and long ones."""
    groups = list(dict.fromkeys(run["data"] for run in runs))
    figure = Figure(figsize=(width * len(groups), height))
    for axis, group in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups):
        axis.set_title(group)
        yield figure, axis, [run for run in runs if run["data"] == group]
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.8 / height))


def by_row(runs, mine):
    """-> name, colour and runs of each row that has some among `mine`; rows keep their colours."""
    rows = list(dict.fromkeys(run["row"] for run in runs))
    colours = colormaps["tab10" if len(rows) <= 10 else "tab20"].colors
    for k, row in enumerate(rows):
        if any(run["row"] == row for run in mine):  # a dollar would start a formula
            yield row.replace("$", "\\$"), colours[k % len(colours)], [run for run in mine if run["row"] == row]


def plot_pck(runs):
    for figure, axis, mine in panels(runs, 6, 4):
        for name, colour, same in by_row(runs, mine):
            curve = np.mean([run["curve"] for run in same], 0)
            area = f"AUC 0-50 {area_under(curve, THRESHOLDS['auc_0_50']):.3f}"
            axis.plot(THRESHOLDS["auc_0_50"], curve, color=colour,
                      label=f"{name}  ({'no wrist' if np.isnan(curve).any() else area})")
        axis.set(xlabel="threshold, mm, wrist-aligned", ylabel="share of joints (PCK)", xlim=(0, 50), ylim=(0, 1))
        axis.grid(alpha=0.3)
    return figure


def plot_joints(runs):
    """The error of each joint as a bar on a drawn hand, side by side for all rows."""
    for figure, axis, mine in panels(runs, 6.5, 6.5):
        for joint, parent in enumerate(PARENTS):
            axis.plot(*OPEN_HAND[[parent, joint]].T, color="0.8", linewidth=7, solid_capstyle="round", zorder=0)
        bars = [(name, colour, np.array([run["metrics"]["per_joint"] for run in same], float).mean(0))
                for name, colour, same in by_row(runs, mine)]
        top, width = np.nan_to_num([error for *_, error in bars]).max(initial=1e-9), 0.2 / max(len(bars), 2)
        for k, (name, colour, error) in enumerate(bars):
            x = OPEN_HAND[:, 0] + (k - (len(bars) - 1) / 2) * width
            drawn = axis.bar(x, error * 0.25 / top, width * 0.9, OPEN_HAND[:, 1], label=name, color=colour)
            if len(bars) <= 2:
                axis.bar_label(drawn, [f"{value:.0f}" for value in error], fontsize=5.5)
        axis.bar(1.15, 0.25, 0.03, 0, color="0.3")
        axis.text(1.12, 0.12, f"{top:.0f} mm", ha="right", va="center")
        axis.set(xlim=(-1.9, 1.4), aspect="equal", xlabel="wrist-aligned error of each joint", xticks=(), yticks=())
    return figure


def plot_against(runs, key, label):
    """MPJPE against a setting, a line for each kind of run through the mean of its runs; None unless the setting takes
    several values on a data set. Runs that have none are drawn as a level."""
    values = {(run["data"], run["settings"].get(key)) for run in runs if run["settings"].get(key) is not None}
    runs = [run for run in runs if sum(data == run["data"] for data, _ in values) > 1
            and run["metrics"]["mpjpe"] is not None]
    for figure, axis, mine in panels(runs, 5, 4) if runs else ():
        kinds = kinds_of(mine, but=("label_fraction",) if key == "label_fraction" else ("pairs",))
        for k, kind in enumerate(dict.fromkeys(kinds)):
            points, means = [(run["settings"].get(key), run["metrics"]["mpjpe"])
                             for run, of in zip(mine, kinds) if of == kind], {}
            for x, y in sorted(points, key=lambda point: point[0] or 0):
                means.setdefault(x, []).append(y)
            if None in means:
                axis.axhline(np.mean(means.pop(None)), linestyle="--", color=f"C{k % 10}", label=kind)
            if means:
                axis.plot(*zip(*(point for point in points if point[0])), "o", color=f"C{k % 10}", markersize=4)
                axis.plot(list(means), list(map(np.mean, means.values())), color=f"C{k % 10}", label=kind)
        axis.set(xscale="log", xlabel=label, ylabel="MPJPE, mm, wrist-aligned")
        axis.minorticks_off()
        ticks = sorted({run["settings"].get(key) for run in mine} - {None})
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=30)
        axis.grid(alpha=0.3)
    return figure if runs else None


def kinds_of(runs, but):
    """-> what tells each run from the others: the settings, of those that can make a line in a plot, that differ."""
    keys = [key for key in ("method", "weighting", "weight_on", "weight_keypoints", "top_k", "hands", "pairs",
                            "backbone", "head", "freeze", "label_fraction")
            if key not in but and len({run["settings"].get(key) for run in runs} - {None}) > 1]
    return [", ".join(str(value) if key == "method" else f"{key} {value}" for key in keys
                      if (value := run["settings"].get(key)) is not None) or "runs" for run in runs]


# ---------------------------------------------------------------------------------------------- submissions

def official(folder, benchmark, settings):
    """-> official indices (T,) in their order, predictions (T, 21, 3) as the camera sees them: left hands, which
    pred_xyz.npy mirrors, are left again."""
    path, hint = folder / "names.txt", "expected a line a sample: index, tab, picture, tab, left or right"
    require(settings.get("dataset") in (None, benchmark) and not settings.get("paper_filter"),
            f"{folder}: --submission {benchmark}: was tested on {settings.get('dataset')}"
            + " with --paper-filter, which leaves samples out" * bool(settings.get("paper_filter")))
    require(path.is_file(), f"{path}: missing, {hint}")
    try:
        rows = [line.split(b"\t") for line in path.read_bytes().splitlines()]
        index, left = np.array([int(row[0]) for row in rows]), np.array([row[-1] == b"left" for row in rows])
    except ValueError:
        rows = []
    require(rows and all(len(row) == 3 and row[2] in (b"left", b"right") for row in rows), f"{path}: {hint}")
    require(index.min() >= 0, f"{path}: has no official indices but -1, as finetune.py writes where it had only a part "
            f"of the data set; a benchmark wants it whole")
    require(len(np.unique(index)) == len(index), f"{path}: an index occurs twice")
    require(benchmark != "freihand" or np.array_equal(np.sort(index), np.arange(len(index))),
            f"{path}: FreiHAND's list has no gaps, expected the indices 0 to {len(index) - 1}")
    xyz = load_array(folder / "pred_xyz.npy", np.float32, (len(rows), 21, 3), hint="one for each line of names.txt; "
                     "a benchmark wants them all")
    xyz[left, :, 0] *= -1
    order = np.argsort(index)
    return index[order], xyz[order]


def write_freihand(folder, index, xyz):
    """pred.zip with pred.json: [keypoints (T, 21, 3), vertices (T, 778, 3)] in metres; there is no mesh, so zeros."""
    none = json.dumps([[0] * 3] * 778)
    text = f"[{json.dumps((xyz.astype(np.float64) / 1000).tolist())}, [{', '.join([none] * len(xyz))}]]"
    with atomic(folder / "pred.zip") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("pred.json", text)
    print(f"wrote {folder}/pred.zip, {len(xyz)} samples; its mesh is zeros: of the server's scores only those of xyz "
          "mean anything" + ("" if len(xyz) == 3960 else
                             "; FreiHAND's evaluation has 3960 samples, its server will refuse this"))


def write_dexycb(folder, index, xyz):
    """dexycb.txt, a line a sample: index and 63 coordinates in mm, as DexYCB's toolkit reads it; with all digits, as a
    wrist that is the true one counts at the threshold 0."""
    poses = xyz.reshape(-1, 63).astype(np.float64)
    lines = (",".join([str(i), *map(repr, pose.tolist())]) for i, pose in zip(index, poses))
    write_text(folder / "dexycb.txt", "\n".join(lines) + "\n")
    print(f"wrote {folder}/dexycb.txt, {len(xyz)} samples")


SUBMISSIONS = {"freihand": write_freihand, "dexycb": write_dexycb}


if __name__ == "__main__":
    run_script(main)
