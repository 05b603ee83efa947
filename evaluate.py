"""Score 3D hand poses: MPJPE and PCK-AUC, for any method's predictions.

Reads pred_xyz.npy and gt_xyz.npy (T, 21, 3) in mm, and valid.npy (T, 21) where there is one, from each run's folder.
Writes metrics.json beside them; for all runs together, into --out, table.md, table.csv and pck.png.

    python evaluate.py runs/imagenet-freihand runs/simhand-freihand --out runs/comparison
    python evaluate.py runs/tiny
"""

import argparse
import csv
import io
import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from common import atomic, load_array, print_settings, require, run_script

HINT = "finetune.py writes it; any method's predictions will do"
THRESHOLDS = {"auc_0_50": np.linspace(0, 50, 100), "auc_20_50": np.linspace(20, 50, 15)}  # mm
COLUMNS = {"mpjpe": "MPJPE", "auc_0_50": "AUC 0-50", "auc_20_50": "AUC 20-50", "scaled_mpjpe": "scaled MPJPE",
           "scaled_auc_20_50": "scaled AUC 20-50", "pa_mpjpe": "PA-MPJPE", "pa_auc_0_50": "PA-AUC 0-50"}
ABSOLUTE = {"abs_mpjpe": "abs. MPJPE", "abs_auc_0_50": "abs. AUC 0-50"}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="folders with predictions; gains are over the first")
    parser.add_argument("--out", default=".", help="folder for the table and the plot of several runs (default: here)")
    parser.add_argument("--absolute", action="store_true", help="absolute camera coordinates in the table too")
    return parser.parse_args()


def main():
    args = parse_args()
    require(not Path(args.out).is_file(), f"{args.out}: is a file, expected a folder to write to")
    print_settings(args)
    loaded = [load_run(Path(run)) for run in args.runs]  # all of them first: a wrong folder costs no minutes
    metrics, curves = [], []
    for run, (prediction, truth, valid) in zip(args.runs, loaded):
        values, curve = score(prediction, truth, valid)
        metrics.append(values)
        curves.append(curve)
        with atomic(Path(run) / "metrics.json") as file:
            file.write((json.dumps(values, indent=1) + "\n").encode())
    names = run_names(args.runs)
    columns = COLUMNS | (ABSOLUTE if args.absolute else {})
    markdown, table = make_table(names, metrics, columns)
    print(markdown)
    wrote = [str(Path(run) / "metrics.json") for run in args.runs]
    if len(args.runs) > 1:
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        for name, text in (("table.md", markdown), ("table.csv", table)):
            with atomic(out / name) as file:
                file.write(text.encode())
        plot_pck(out / "pck.png", names, curves)
        wrote += [str(out / name) for name in ("table.md", "table.csv", "pck.png")]
    print("wrote " + ", ".join(wrote))


def load_run(run):
    """-> prediction, truth (T, 21, 3) float64 mm, valid (T, 21)."""
    require(run.is_dir(), f"{run}: no such folder, expected a run with pred_xyz.npy and gt_xyz.npy")
    truth = load_array(run / "gt_xyz.npy", np.float32, (None, 21, 3), hint=HINT, finite=False)
    prediction = load_array(run / "pred_xyz.npy", np.float32, (len(truth), 21, 3), hint=HINT, finite=False)
    valid = np.ones(truth.shape[:2], bool)
    if (run / "valid.npy").exists():
        valid = load_array(run / "valid.npy", bool, truth.shape[:2], hint=HINT)
    for name, array in (("pred_xyz.npy", prediction), ("gt_xyz.npy", truth)):
        bad = np.flatnonzero((valid & ~np.isfinite(array).all(2)).any(1))
        require(not len(bad), f"{run / name}: valid joints must be finite, those of {len(bad)} samples are not: "
                f"{', '.join(map(str, bad[:5]))}")
    require(valid.any(), f"{run / 'valid.npy'}: no joint is valid, nothing can be scored")
    bones = np.linalg.norm(truth[:, 9] - truth[:, 0], axis=1)[valid[:, 0] & valid[:, 9]]
    if len(bones) and not 40 <= np.median(bones) <= 140:
        print(f"{run / 'gt_xyz.npy'}: warning: the bone 0-9 has a median of {np.median(bones):.3g}, expected 40 to "
              "140: are these mm?")
    return *(np.where(valid[..., None], array, 0).astype(np.float64) for array in (prediction, truth)), valid


def score(prediction, truth, valid):
    """All metrics of one run -> dict as in metrics.json, and the PCK curve (100,) of the wrist-aligned error.

    Means are taken per joint, then over joints. Samples without a valid wrist are left out of the wrist-aligned
    metrics, those without a valid joint 9 out of the rescaled ones too; both are counted.
    """
    wrist = valid & valid[:, :1]
    scaled = wrist & valid[:, 9:10]
    relative_p, relative_t = prediction - prediction[:, :1], truth - truth[:, :1]
    predicted_bone = np.linalg.norm(relative_p[:, 9], axis=1)
    factor = np.linalg.norm(relative_t[:, 9], axis=1) / np.where(predicted_bone > 0, predicted_bone, 1)
    absolute = np.linalg.norm(prediction - truth, axis=2)
    aligned = np.linalg.norm(relative_p - relative_t, axis=2)
    rescaled = np.linalg.norm(relative_p * factor[:, None, None] - relative_t, axis=2)
    possible = valid.sum(1) >= 3  # fewer points fit any pose
    procrustes = np.linalg.norm(align(prediction, truth, valid) - truth, axis=2)
    result = {"samples": len(valid), "samples_without_wrist": int((~valid[:, 0]).sum()),
              "samples_without_bone": int((~(valid[:, 0] & valid[:, 9])).sum()),
              "samples_without_procrustes": int((~possible).sum())}
    for prefix, error, mask in (("abs_", absolute, valid), ("", aligned, wrist), ("scaled_", rescaled, scaled),
                                ("pa_", procrustes, valid & possible[:, None])):
        joints = [error[mask[:, j], j] for j in range(21)]
        result[prefix + "mpjpe"] = mean_of([e.mean() for e in joints if len(e)])
        for name, thresholds in THRESHOLDS.items():
            pck = np.mean([pck_curve(e, thresholds) for e in joints if len(e)] or [np.full(len(thresholds), np.nan)], 0)
            if prefix in ("", "scaled_") or name == "auc_0_50":
                result[prefix + name] = mean_of([area_under(pck, thresholds)])
            if prefix + name == "auc_0_50":
                curve = pck
    result["per_joint"] = [mean_of(aligned[wrist[:, j], j]) for j in range(21)]
    return result, curve


def mean_of(values):
    """The mean as a plain float; None, which json can hold, where there is nothing to average."""
    return float(np.mean(values)) if len(values) and np.isfinite(values).all() else None


def pck_curve(error, thresholds):
    """Share of errors (n,) at or below each threshold."""
    return np.searchsorted(np.sort(error), thresholds, side="right") / len(error)


def area_under(pck, thresholds):
    """Trapezoids, divided by the range: 1 where every error is below the first threshold."""
    return np.trapz(pck, thresholds) / (thresholds[-1] - thresholds[0])


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


def run_names(runs):
    """The shortest tails of the paths that tell the runs apart."""
    parts = [Path(run).resolve().parts for run in runs]
    tail = next((k for k in range(1, 20) if len({p[-k:] for p in parts}) == len(set(parts))), 1)
    return ["/".join(p[-tail:]) for p in parts]


def make_table(names, metrics, columns):
    """-> Markdown and CSV, a row a run, with the gain in MPJPE over the first run in percent; best in bold."""
    header = ["run", "samples", *columns.values()] + (["gain"] if len(names) > 1 else [])
    best = {key: (min if "mpjpe" in key else max)((m[key] for m in metrics if m[key] is not None), default=None)
            for key in columns}
    lines, rows = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)], [header]
    for name, m in zip(names, metrics):
        gain = [] if len(names) == 1 else ["" if not m["mpjpe"] or not metrics[0]["mpjpe"]
                                           else f"{100 * (1 - m['mpjpe'] / metrics[0]['mpjpe']):+.1f} %"]
        cells = ["" if m[key] is None else f"{m[key]:.2f}" if "mpjpe" in key else f"{m[key]:.3f}" for key in columns]
        bold = [f"**{cell}**" if len(names) > 1 and cell and m[key] == best[key] else cell
                for key, cell in zip(columns, cells)]
        lines.append("| " + " | ".join([name, str(m["samples"]), *bold, *gain]) + " |")
        rows.append([name, m["samples"], *cells, *gain])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return "\n".join(lines) + "\n\nMPJPE in mm, wrist-aligned; scaled: by the true bone 0-9 over the predicted; PA: " \
        "after Procrustes; AUC over the thresholds named, mm.\n", text.getvalue()


def plot_pck(path, names, curves):
    figure = Figure(figsize=(6, 4), layout="tight")
    axis = figure.subplots()
    for name, curve in zip(names, curves):
        area = area_under(curve, THRESHOLDS["auc_0_50"])
        axis.plot(THRESHOLDS["auc_0_50"], curve, label=f"{name}  (AUC 0-50 {area:.3f})")
    axis.set(xlabel="threshold on the wrist-aligned error, mm", ylabel="share of joints (PCK)")
    axis.set(xlim=(0, 50), ylim=(0, 1))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    with atomic(path) as file:
        figure.savefig(file, format="png", dpi=110)


if __name__ == "__main__":
    run_script(main)
