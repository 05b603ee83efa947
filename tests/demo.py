"""The whole of SiMHand on rendered hands, from videos to two tables, on two CPU cores in eleven
minutes.

Makes its own data (synthetic.py, the small world), then runs the five scripts as a user would, each
command printed before it runs. Every method is pre-trained on the same hands, cut out of the same
videos, none of them labelled; labelled pictures of other persons then show what each learnt, beside
a network that was not pre-trained. Each row is three runs with a seed each. A second call goes on
where the first one stopped. Another --world makes other persons, poses and pictures, in a folder of
its own.

    python tests/demo.py
    python tests/demo.py --world 1
    python tests/demo.py --out /tmp/demo
"""

import argparse
import time

import experiment  # first: it makes the scripts importable
import common
from experiment import CORES, METHODS, PRECISION, TITLES, Column, Command

ROWS = ("none", "peclr", "keypoints", "simhand-paper", "simhand")
KINDS = {"frozen": "Frozen: the network stays as pre-training left it, and each test picture "
                   "takes the pose of the labelled picture that looks most alike to the network.",
         "finetuned": "Fine-tuned: the network goes on to learn, from the labelled pictures."}
COLUMNS = {"mpjpe": Column("error, mm", 1, min),
           "pa_mpjpe": Column("after Procrustes, mm", 1, min)}
PICTURES = ("hands/hands.jpg", "hands/pairs.jpg", "hands/distances.png",
            "pretrained/simhand-seed0/views.jpg", "pretrained/simhand-seed0/curves.png",
            "finetuned/simhand-seed0/overlay.jpg", "tables/finetuned/pck.png")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    experiment.add_flags(parser, "demo", ROWS, 3)
    flag = parser.add_argument
    flag("--world", type=int, default=0, help="seed of the rendering (default: 0)")
    flag("--persons", type=int, default=64, help="in the videos, one in each (default: 64)")
    flag("--seconds", type=int, default=7, help="of each video (default: 7)")
    flag("--labelled", type=int, default=160,
         help="labelled hands, each shown before four backgrounds (default: 160)")
    flag("--tested", type=int, default=240, help="test pictures (default: 240)")
    flag("--input-size", type=int, default=40, help="side of the network's input (default: 40)")
    flag("--epochs", type=int, default=4, help="of pre-training (default: 4)")
    flag("--batch-size", type=int, default=64, help="of pre-training (default: 64)")
    flag("--tuning-epochs", type=int, default=3, help="of fine-tuning (default: 3)")
    args = parser.parse_args()
    args.methods = experiment.in_order(args.methods, ROWS)
    if args.world and args.out == parser.get_default("out"):
        args.out = args.out / f"world{args.world}"
    return args


def main():
    args = parse_args()
    out = args.out
    began = time.time()
    given = vars(args).items()
    experiment.start(out, **{name: value for name, value in given
                             if name not in ("out", "methods", "seeds")})
    plan = [(method, seed) for seed in range(args.seeds) for method in args.methods]
    experiment.run_lanes(out, [preparation(args)], 1)
    experiment.run_lanes(out, [lane(args, method, seed) for method, seed in plan], CORES)
    experiment.run_lanes(out, [evaluation(args)], 1)
    text = report(args)
    (out / "demo.md").write_text(text)
    print(f"\n{(time.time() - began) / 60:.1f} minutes in this call; to look at:",
          *(f"  {out / name}" for name in PICTURES), f"\n{text}", sep="\n")


def preparation(args):
    """The commands before pre-training: data, hands, pairs."""
    out = args.out
    world = ("--world", "small", "--seed", args.world)
    yield Command("videos", None, (
        "tests/synthetic.py", "videos", out / "videos", *world, "--videos", args.persons,
        "--seconds", args.seconds, "--fps", 3, "--workers", CORES))
    yield Command("labels", out / "freihand_eval" / "evaluation_xyz.json", (
        "tests/synthetic.py", "freihand", out / "freihand", *world, "--train", args.labelled,
        "--evaluation", args.tested))
    for suffix, paper in (("", ()), ("-paper", ("--paper",))):
        if paper and "simhand-paper" not in args.methods:
            continue
        hands = out / f"hands{suffix}"
        yield Command(f"extract{suffix}", hands / "hands.jpg", (
            "extract_hands.py", out / "videos", "--out", hands, "--fps", 3, "--size", 128, *paper))
        yield Command(f"mine{suffix}", hands / "pairs.jpg", ("mine_pairs.py", hands, *paper))


def lane(args, method, seed):
    """The commands of one run of one method: pre-training, the frozen network, fine-tuning."""
    out = args.out
    name = f"{method}-seed{seed}"
    network = ("--backbone", "resnet18", "--input-size", args.input_size, "--seed", seed,
               "--workers", 0, "--precision", PRECISION)
    weights = "none"
    if method != "none":
        weights = out / "pretrained" / name / "backbone.pt"
        hands = out / ("hands-paper" if method == "simhand-paper" else "hands")
        yield Command(f"pretrain-{name}", weights, (
            "pretrain.py", hands, "--out", weights.parent, *METHODS[method], "--weights", "none",
            "--batch-size", args.batch_size, "--epochs", args.epochs, "--optimizer", "adam",
            "--lr", 1e-3, "--probe", 0, *network))
    labels = ("finetune.py", "--dataset", "freihand", "--root", out / "freihand", "--border",
              "mirror", "--weights", weights, *network)
    yield Command(f"frozen-{name}", out / "frozen" / name / "pred_xyz.npy", (
        *labels, "--out", out / "frozen" / name, "--head", "knn"))
    yield Command(f"finetuned-{name}", out / "finetuned" / name / "pred_xyz.npy", (
        *labels, "--out", out / "finetuned" / name, "--head", "linear", "--batch-size", 32,
        "--epochs", args.tuning_epochs, "--rotation", 15, "--no-colour"))


def folders(args, kind, method):
    return [args.out / kind / f"{method}-seed{seed}" for seed in range(args.seeds)]


def evaluation(args):
    for kind in KINDS:
        runs = [run for method in args.methods for run in folders(args, kind, method)]
        yield Command(f"evaluate-{kind}", None, (
            "evaluate.py", *runs, "--seeds", "--baseline", "simhand", "--out",
            args.out / "tables" / kind))


def report(args):
    """-> the two tables, each with what it shows in plain words, as Markdown."""
    log = common.read_log(args.out / "pretrained" / "simhand-seed0" / "log.jsonl")
    hands = next(row["hands"] for row in log if "hands" in row)
    parts = [f"Pre-trained on {hands} hands of {args.persons} persons, without labels. Then "
             f"{args.labelled} labelled hands, and {args.tested} pictures of other persons to test "
             "on. Error: how far the 21 joints are from the truth on average, the wrists laid on "
             f"each other. Mean ± standard deviation over n runs; p: {TITLES['simhand']} against "
             "that row, Welch's two-sided test over the runs."]
    runs = []
    for kind, title in KINDS.items():
        rows = {TITLES[method]: experiment.read_metrics(folders(args, kind, method), COLUMNS)
                for method in args.methods}
        parts += [title, experiment.table(rows, COLUMNS, TITLES["simhand"]).rstrip(),
                  experiment.findings(rows, "mpjpe", COLUMNS["mpjpe"], TITLES["simhand"])]
        runs += [run for method in args.methods for run in folders(args, kind, method)]
    return "\n\n".join([*parts, experiment.made_by(runs)]) + "\n"


if __name__ == "__main__":
    common.run_script(main)
