"""The whole of SiMHand on rendered hands, from videos to the table, on two CPU cores in ten to seventeen minutes.

Makes its own data (synthetic.py), then runs the five scripts as a user would, each command printed before it runs. A
second call goes on where the first one stopped.

    python tests/demo.py
    python tests/demo.py --out /tmp/demo
"""

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="demo", help="folder for data and runs (default: demo)")
    return parser.parse_args()


def main():
    out = Path(parse_args().out)
    out.mkdir(parents=True, exist_ok=True)
    times = {}

    def stage(name, script, *arguments):
        command = [sys.executable, str(ROOT / script), *map(str, arguments)]
        shown = shlex.join(["python", script, *map(str, arguments)])
        print(f"\n\033[1m$ {shown}\033[0m" if sys.stdout.isatty() else f"\n$ {shown}", flush=True)
        start = time.time()
        status = subprocess.run(command).returncode
        if status:
            sys.exit(f"demo.py: {script} ended with status {status}; the same command goes on where this stopped")
        times[name] = times.get(name, 0) + time.time() - start

    small = ("--backbone", "resnet18", "--input-size", 64)
    finetune = ("--dataset", "freihand", "--root", out / "freihand", *small, "--epochs", 30, "--batch-size", 8)
    stage("render", "tests/synthetic.py", "videos", out / "videos", "--videos", 32, "--seconds", 8, "--fps", 5)
    stage("render", "tests/synthetic.py", "freihand", out / "freihand", "--train", 60, "--evaluation", 200)
    stage("extract", "extract_hands.py", out / "videos", "--out", out / "hands", "--fps", 5, "--size", 112)
    stage("mine", "mine_pairs.py", out / "hands")
    stage("pre-train", "pretrain.py", out / "hands", "--out", out / "simhand", "--weights", "none", *small,
          "--batch-size", 64, "--epochs", 12)
    stage("fine-tune from SiMHand", "finetune.py", "--weights", out / "simhand" / "backbone.pt",
          "--out", out / "finetuned-simhand", *finetune)
    stage("fine-tune from nothing", "finetune.py", "--weights", "none", "--out", out / "finetuned-none", *finetune)
    stage("evaluate", "evaluate.py", out / "finetuned-none", out / "finetuned-simhand", "--out", out)

    print("seconds: " + "  ".join(f"{name} {seconds:.0f}" for name, seconds in times.items())
          + f"  together {sum(times.values()):.0f}")
    print("pictures: " + "  ".join(str(out / name) for name in (
        "hands/hands.jpg", "hands/pairs.jpg", "hands/distances.png", "simhand/views.jpg", "simhand/curves.png",
        "finetuned-simhand/overlay.jpg", "pck.png", "joints.png")))
    print((out / "table.md").read_text())


if __name__ == "__main__":
    main()
