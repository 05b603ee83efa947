"""The runner of the experiments: demo.py, digits.py and study.py describe their worlds to it.

A world is a list of commands, each with the file that it writes last. A command whose file is there
is not run again, so a second call goes on where the first one stopped. What the commands print goes
to OUT/logs; the last line of each running command's log is shown now and then. Then come the
tables: mean and standard deviation over seeds, n, p, and what made the runs.
"""

import argparse
import concurrent.futures
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
import typing
from pathlib import Path

import numpy as np
import torch
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import common

CORES = len(os.sched_getaffinity(0))
# Elsewhere bf16 is slower.
PRECISION = "bf16" if torch.cuda.is_available() or re.search(
    "avx512_bf16|amx_bf16", Path("/proc/cpuinfo").read_text()) else "fp32"
# Flags of pretrain.py that make a method, and what tables call it. The default's are named, so that
# a folder of runs stays what it is when the default changes.
ALONE = ("--keypoint-loss", 0)
METHODS = {"simclr": ("--method", "simclr"),
           "peclr": ("--method", "peclr"),
           "keypoints": ("--method", "keypoints"),
           "simhand-paper": ("--paper",),
           "simhand-none": ("--weighting", "none", *ALONE),
           "simhand-soft": ("--weighting", "soft", *ALONE),
           "simhand": ("--weighting", "soft", "--keypoint-loss", 3)}
TITLES = {"none": "none", "simclr": "SimCLR", "peclr": "PeCLR",
          "keypoints": "keypoints regressed", "simhand-paper": "SiMHand (paper)",
          "simhand-none": "SiMHand, mined pairs alone",
          "simhand-soft": "SiMHand, pairs and soft targets", "simhand": "SiMHand"}
PAUSE = 30 if sys.stdout.isatty() else 60  # seconds between two looks at the logs


class Command(typing.NamedTuple):
    name: str  # of its log, OUT/logs/NAME.log
    done: Path  # the file that it writes last; None: it is run at each call, and goes on by itself
    words: tuple  # script and arguments


# ------------------------------------------------------------------------------- running commands

def add_flags(parser, out, methods, seeds):
    """The flags that all experiments have."""
    parser.add_argument("--out", type=Path, default=Path(out),
                        help=f"folder for everything (default: {out})")
    parser.add_argument("--methods", nargs="+", choices=methods, default=list(methods),
                        metavar="METHOD", help="rows of the tables, SiMHand's is always there: "
                        f"{', '.join(methods)} (default: all)")
    parser.add_argument("--seeds", type=int, default=seeds,
                        help=f"number of seeds of each pre-training (default: {seeds})")


def in_order(methods, rows):
    """The methods that are wanted, in the order of the tables, and SiMHand, which the others are
    compared with."""
    return [method for method in rows if method in {*methods, "simhand"}]


def start(out, **settings):
    """Make the folder of an experiment; one that holds other settings is refused. What is only
    more of the same, as seeds, methods, does not count."""
    (out / "logs").mkdir(parents=True, exist_ok=True)
    settings = common.plain(argparse.Namespace(**settings), simhand=[*METHODS["simhand"]])
    old = common.logged_settings(out)
    if not old:
        common.start_log(out, settings)
    else:
        common.refuse_other_arguments(out, old, settings, ())


def run_lanes(out, lanes, jobs):
    """Run the commands of each lane in order, `jobs` lanes side by side, each with its share of the
    cores. After the first failure nothing new is started."""
    running = {}  # the log of each command at work, and the last line shown of it
    failed = threading.Event()

    def follow(lane):
        for command in lane:
            if failed.is_set():
                return
            try:
                run(out, command, max(1, CORES // jobs), running)
            except BaseException:
                failed.set()
                raise

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(follow, lane) for lane in lanes]
        while concurrent.futures.wait(futures, timeout=PAUSE).not_done:
            show_progress(running)
    for future in futures:
        future.result()


def run(out, command, threads, running):
    """Run a command as a user would, unless it is done."""
    if command.done and command.done.exists():
        return
    script, *arguments = map(str, command.words)
    shown = shlex.join(["python", script, *arguments])
    say(f"$ {shown}")
    log = out / "logs" / f"{command.name}.log"
    began = time.time()
    with open(log, "a") as file:
        file.write(f"$ {shown}\n")
    running[log] = ""
    status = run_script([str(ROOT / script), *arguments], log,
                        {**os.environ, "OMP_NUM_THREADS": str(threads)})
    del running[log]
    common.require(not status, f"{command.name} ended with status {status} ({last_line(log)}), see "
                   f"{log}; the same command goes on where this stopped")
    common.require(not command.done or command.done.exists(),
                   f"{command.name} ended without {command.done}, see {log}")
    say(f"{command.name}: {time.time() - began:.0f} s")


def run_script(command, log, environment):
    """Run a Python script with its arguments; what it prints is appended to a log. -> status"""
    with open(log, "a") as file:
        return subprocess.run([sys.executable, *command], stdout=file, stderr=subprocess.STDOUT,
                              env=environment).returncode


def show_progress(running):
    """The last line of the log of each command at work, where it has changed."""
    for log, before in list(running.items()):
        line = last_line(log)
        if log in running and line != before and not line.startswith("$ "):
            running[log] = line
            say(f"  {log.stem}: {line}", passing=True)


def last_line(log):
    lines = [line.strip() for line in re.split(r"[\r\n]+", log.read_text()) if line.strip()]
    return lines[-1]


def say(text, passing=False):
    """Print a line. On a terminal the next one takes the place of one that only passes."""
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns - 1
        text = f"\r\033[K{text[:width]}" if passing else f"\r\033[K{text}\n"
        print(text, end="", flush=True)
    else:
        print(text, flush=True)


# ------------------------------------------------------------------------------------ the report

class Column(typing.NamedTuple):
    title: str
    places: int  # after the point
    best: typing.Callable  # min or max


def welch(values, others):
    """p of Welch's two-sided test; None where it cannot tell."""
    if min(len(values), len(others)) < 2 or np.ptp(values) == np.ptp(others) == 0:
        return None
    return float(stats.ttest_ind(values, others, equal_var=False).pvalue)


def show_p(p):
    if p is None:
        return ""
    return "p < .001" if p < 0.001 else f"p {p:.3f}".replace("0.", ".")


def table(rows, columns, baseline):
    """Rows with the values of all seeds -> Markdown.

    rows: {title: {name of a column: a list of one value a seed, or a text, which is compared with
    nothing}}. columns: {name: Column}. baseline: the row that p compares each other row with.
    """
    lines = ["| pre-training | n | " + " | ".join(c.title for c in columns.values()) + " |",
             "|---" * (2 + len(columns)) + "|"]
    for title, row in rows.items():
        cells = [cell(rows, title, name, column, baseline) for name, column in columns.items()]
        n = max((len(v) for v in row.values() if not isinstance(v, str)), default=1)
        lines.append(f"| {title} | {n} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def cell(rows, title, name, column, baseline):
    """Mean, standard deviation and p of a row in a column."""
    values = rows[title].get(name, "")
    if isinstance(values, str):
        return values
    means = {row: np.mean(by_name[name]) for row, by_name in rows.items()
             if not isinstance(by_name.get(name, ""), str)}
    text = f"{means[title]:.{column.places}f}"
    if means[title] == column.best(means.values()):
        text = f"**{text}**"
    if len(values) > 1:
        text += f" ± {np.std(values, ddof=1):.{column.places}f}"
    if title != baseline and name in rows.get(baseline, {}):
        p = show_p(welch(values, rows[baseline][name]))
        text += f", {p}" if p else ""
    return text


def findings(rows, name, column, baseline):
    """What the table shows at p < .05 of the baseline against each other row, in two sentences."""
    ours = rows[baseline][name]
    shown = {"better": [], "worse": [], "open": []}
    for title, row in rows.items():
        if title == baseline or isinstance(row.get(name, ""), str):
            continue
        p = welch(ours, row[name])
        change = 100 * (np.mean(ours) / np.mean(row[name]) - 1)
        is_better = column.best(np.mean(ours), np.mean(row[name])) == np.mean(ours)
        kind = "open" if p is None or p >= 0.05 else "better" if is_better else "worse"
        shown[kind].append(f"{title} ({', '.join(filter(None, (f'{change:+.1f} %', show_p(p))))})")
    parts = [f"{baseline} is {kind} than {listed(shown[kind])}" for kind in ("better", "worse")
             if shown[kind]]
    text = f"At p < .05: {'; '.join(parts) or 'nothing'}."
    if shown["open"]:
        text += f" Not told apart from {baseline}: {listed(shown['open'])}."
    return text


def listed(items):
    return " and ".join(filter(None, (", ".join(items[:-1]), items[-1])))


def finished_runs(folder, method, last):
    """The folders of a method's runs in `folder`, one a seed, that hold the file written last:
    earlier calls may have made more of them than --seeds."""
    return sorted(path.parent for path in folder.glob(f"{method}-seed*/{last}"))


def read_metrics(folders, columns):
    """metrics.json of each seed's run -> {column: a list of its values}."""
    runs = [json.loads((folder / "metrics.json").read_text()) for folder in folders]
    return {name: [metrics[name] for metrics in runs] for name in columns}


def made_by(folders):
    """The commits, machines and versions that made the runs in these folders, in a line."""
    made = {}
    for folder in folders:
        for name, value in common.read_log(folder / "log.jsonl")[0].get("facts", {}).items():
            made.setdefault(name, []).append(str(value))
    order = ("commit", "machine", *sorted(made.keys() - {"commit", "machine"}))
    parts = [f"{name} {', '.join(dict.fromkeys(made[name]))}" for name in order if name in made]
    return f"Made by: {'; '.join(parts)}." if parts else "Nothing says what made these runs."
