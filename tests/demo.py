"""The whole of SiMHand on rendered hands, from videos to two tables, on two CPU cores in about ten
minutes.

Makes its own data (synthetic.py, the small world), then runs the five scripts as a user would, each
command printed before it runs. SiMHand and PeCLR are pre-trained on the same hands, cut out of the
same videos, none of them labelled; labelled pictures of other persons then show what each learnt,
beside a network that was not pre-trained. A second call goes on where the first one stopped.
Another --seed makes other persons, poses and pictures, and trains anew, in a folder of its own.

    python tests/demo.py
    python tests/demo.py --seed 1
    python tests/demo.py --out /tmp/demo
"""

import argparse
import concurrent.futures
import contextlib
import itertools
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from study import CORES, PRECISION

PERSONS = 64  # in the videos, one in each
LABELLED = 160  # hands, each shown before four backgrounds
METHODS = {"none": "no pre-training", "peclr": "PeCLR", "simhand": "SiMHand"}
PRETRAINING = {"peclr": ("--method", "peclr"), "simhand": ()}
TITLES = {"frozen": "Frozen: the network stays as pre-training left it, and each test picture "
                    "takes the pose of the labelled picture that looks most alike to the network.",
          "finetuned": "Fine-tuned: the network goes on to learn, from the labelled pictures."}
PICTURES = ("hands/hands.jpg", "hands/pairs.jpg", "hands/distances.png", "simhand/views.jpg",
            "simhand/curves.png", "finetuned-simhand/overlay.jpg", "finetuned/pck.png",
            "finetuned/joints.png")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="folder for data and runs (default: demo, or demo/seedN with "
                        "--seed N)")
    parser.add_argument("--seed", type=int, default=0,
                        help="of rendering, pre-training and fine-tuning (default: 0)")
    args = parser.parse_args()
    args.out = Path(args.out or (f"demo/seed{args.seed}" if args.seed else "demo"))
    return args


def main():
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.time()
    times = {}
    for stage, group in itertools.groupby(commands(args.out, args.seed), lambda row: row[0]):
        began = time.time()
        group = [command for _, *command in group]
        if stage == "pre-train":
            run_side_by_side(args.out / "logs", group)
        else:
            for command in group:
                run(command)
        times[stage] = time.time() - began
    print("\nseconds: " + "  ".join(f"{stage} {seconds:.0f}" for stage, seconds in times.items())
          + f"  together {time.time() - start:.0f}")
    print("pictures: " + "  ".join(str(args.out / name) for name in PICTURES))
    text = report(args.out)
    (args.out / "demo.md").write_text(text)
    print(f"\n{text}")


def commands(out, seed):
    """-> stage, script and arguments of each command, in the order in which they run."""
    world = ("--world", "small", "--seed", seed)
    network = ("--backbone", "resnet18", "--input-size", 64, "--seed", seed, "--workers", 0,
               "--precision", PRECISION)
    labels = ("--dataset", "freihand", "--root", out / "freihand", "--border", "mirror", *network)
    starts = {"none": "none"}
    yield ("render", "tests/synthetic.py", "videos", out / "videos", *world, "--videos", PERSONS,
           "--seconds", 8, "--fps", 3, "--workers", CORES)
    yield ("render", "tests/synthetic.py", "freihand", out / "freihand", *world,
           "--train", LABELLED, "--evaluation", 240)
    yield ("extract", "extract_hands.py", out / "videos", "--out", out / "hands", "--fps", 3,
           "--size", 128)
    yield "mine", "mine_pairs.py", out / "hands"
    for method, flags in PRETRAINING.items():
        yield ("pre-train", "pretrain.py", out / "hands", "--out", out / method, *flags,
               "--weights", "none", "--batch-size", 64, "--epochs", 12, "--optimizer", "adam",
               "--lr", 1e-3, *network)
        starts[method] = out / method / "backbone.pt"
    for method in METHODS:
        yield ("probe", "finetune.py", *labels, "--weights", starts[method],
               "--out", out / f"frozen-{method}", "--head", "knn")
    for method in METHODS:
        yield ("fine-tune", "finetune.py", *labels, "--weights", starts[method],
               "--out", out / f"finetuned-{method}", "--head", "linear", "--batch-size", 32,
               "--epochs", 8, "--rotation", 15, "--no-colour")
    for kind in TITLES:
        runs = [out / f"{kind}-{method}" for method in METHODS]
        yield "evaluate", "evaluate.py", *runs, "--out", out / kind


def run_side_by_side(logs, commands):
    """All at once, since a network as small as this one is hardly faster on two cores than on one;
    what each prints goes to a file of its own."""
    logs.mkdir(exist_ok=True)
    threads = max(1, CORES // len(commands))
    with concurrent.futures.ThreadPoolExecutor(len(commands)) as pool:
        running = []
        for command in commands:
            log = logs / f"{command[command.index('--out') + 1].name}.log"
            running.append(pool.submit(run, command, log, threads))
        for one in running:
            one.result()


def run(command, log=None, threads=None):
    """Run a script as a user would; where it fails, the demo ends."""
    script, *arguments = map(str, command)
    shown = "$ " + shlex.join(["python", script, *arguments])
    environment = dict(os.environ)
    if threads:
        shown += f" > {log}"
        environment["OMP_NUM_THREADS"] = str(threads)
    print(f"\n\033[1m{shown}\033[0m" if sys.stdout.isatty() else f"\n{shown}", flush=True)
    with open(log, "w") if log else contextlib.nullcontext() as output:
        status = subprocess.run([sys.executable, str(ROOT / script), *arguments], stdout=output,
                                stderr=output and subprocess.STDOUT, env=environment).returncode
    if status:
        where = f", see {log}" if log else ""
        sys.exit(f"demo.py: {script} ended with status {status}{where}; "
                 "the same command goes on where this stopped")


def report(out):
    """-> the two tables, each with what it says in plain words, as Markdown."""
    rows = map(json.loads, (out / "simhand" / "log.jsonl").read_text().splitlines())
    hands = next(row["hands"] for row in rows if "hands" in row)
    parts = [f"Pre-trained on {hands} hands of {PERSONS} persons, without labels. Then {LABELLED} "
             "labelled hands, and pictures of other persons to test on. Error: how far the 21 "
             "joints are from the truth on average, in mm, the wrists laid on each other."]
    for kind, title in TITLES.items():
        metrics = {method: json.loads((out / f"{kind}-{method}" / "metrics.json").read_text())
                   for method in METHODS}
        parts += [title, table(metrics), conclusion(metrics)]
    return "\n\n".join(parts) + "\n"


def table(metrics):
    lines = ["| pre-training | error, mm | 95 % interval | error less by |",
             "| --- | --- | --- | --- |"]
    for method, name in METHODS.items():
        error = metrics[method]["mpjpe"]
        low, high = metrics[method]["intervals"]["mpjpe"]
        gain = ""
        if method != "none":
            gain = f"{100 * (1 - error / metrics['none']['mpjpe']):.1f} %"
        lines.append(f"| {name} | {error:.1f} | {low:.1f} to {high:.1f} | {gain} |")
    return "\n".join(lines)


def conclusion(metrics):
    """SiMHand against the others, in a sentence."""
    error = {method: values["mpjpe"] for method, values in metrics.items()}
    words = []
    for other, name in (("none", "without pre-training"), ("peclr", "with PeCLR")):
        change = 100 * (1 - error["simhand"] / error[other])
        words.append(f"{abs(change):.1f} % {'smaller' if change > 0 else 'larger'} than {name}")
    return f"With SiMHand the error is {' and '.join(words)}."


if __name__ == "__main__":
    main()
