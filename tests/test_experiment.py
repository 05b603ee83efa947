"""The runner of the experiments, and the commands of the demo and the study."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import common
import demo
import experiment
import study
from experiment import Column, Command
from test_readme import parse


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """A folder of an experiment, and scripts for it: good.py writes the file that it is given and
    says so, bad.py says why it fails."""
    (tmp_path / "good.py").write_text(
        "import sys, time, pathlib\nprint('at work', flush=True)\ntime.sleep(float(sys.argv[2]))\n"
        "pathlib.Path(sys.argv[1]).write_text(str(time.time()))\n")
    (tmp_path / "bad.py").write_text("print('no luck')\nraise SystemExit(3)\n")
    monkeypatch.setattr(experiment, "ROOT", tmp_path)
    out = tmp_path / "out"
    experiment.start(out, size=1)
    return out


def good(out, name, seconds=0):
    return Command(name, out / name, ("good.py", out / name, seconds))


def test_what_is_done_is_not_run_again_and_lanes_run_side_by_side(scripts, capsys, monkeypatch):
    monkeypatch.setattr(experiment, "PAUSE", 0.2)
    lanes = [[good(scripts, "a", 1), good(scripts, "b")], [good(scripts, "c", 1)]]
    began = time.time()
    experiment.run_lanes(scripts, lanes, 2)
    assert time.time() - began < 2.8
    first = {name: float((scripts / name).read_text()) for name in "abc"}
    assert first["a"] < first["b"]
    printed = capsys.readouterr().out
    assert printed.count("$ python good.py") == 3 and "  a: at work" in printed
    (scripts / "b").unlink()
    experiment.run_lanes(scripts, lanes, 2)
    assert capsys.readouterr().out.count("$ python good.py") == 1
    assert float((scripts / "a").read_text()) == first["a"]
    assert (scripts / "logs" / "b.log").read_text().count("$ python good.py") == 2


def test_a_failure_ends_all_and_says_why(scripts):
    bad = Command("bad", scripts / "bad", ("bad.py",))
    with pytest.raises(common.InputError, match=r"bad ended with status 3 \(no luck\), see .*bad"):
        experiment.run_lanes(scripts, [[bad, good(scripts, "after")], [good(scripts, "d")]], 1)
    assert not (scripts / "after").exists() and not (scripts / "d").exists()
    unwritten = Command("unwritten", scripts / "nothing", ("good.py", scripts / "other", 0))
    with pytest.raises(common.InputError, match="unwritten ended without .*nothing"):
        experiment.run_lanes(scripts, [[unwritten]], 1)


def test_a_folder_of_another_experiment_is_refused(scripts):
    experiment.start(scripts, size=1)
    with pytest.raises(common.InputError, match="--size was 1, is 2"):
        experiment.start(scripts, size=2)


def test_the_table_has_mean_deviation_n_and_p():
    rows = {"none": {"error": [60.0, 62.0, 61.0]}, "near": {"error": [50.0, 58.0, 51.0]},
            "SiMHand": {"error": [50.0, 51.0, 52.5]}, "ceiling": {"error": "1.0"}}
    columns = {"error": Column("error, mm", 1, min)}
    lines = experiment.table(rows, columns, "SiMHand").splitlines()
    assert lines[0] == "| pre-training | n | error, mm |"
    assert lines[2] == "| none | 3 | 61.0 ± 1.0, p < .001 |"
    a, b = rows["near"]["error"], rows["SiMHand"]["error"]
    t = (np.mean(a) - np.mean(b)) / (np.var(a, ddof=1) / 3 + np.var(b, ddof=1) / 3) ** 0.5
    freedom = (np.var(a, ddof=1) + np.var(b, ddof=1)) ** 2 / (
        (np.var(a, ddof=1) ** 2 + np.var(b, ddof=1) ** 2) / 2)
    p = 2 * stats.t.sf(abs(t), freedom)
    assert lines[3] == f"| near | 3 | 53.0 ± 4.4, p .{round(1000 * p):03d} |"
    assert lines[4] == "| SiMHand | 3 | **51.2** ± 1.3 |"
    assert lines[5] == "| ceiling | 1 | 1.0 |"
    assert experiment.findings(rows, "error", columns["error"], "SiMHand") == (
        "At p < .05: SiMHand is better than none (-16.1 %, p < .001). Not told apart from SiMHand: "
        f"near (-3.5 %, p .{round(1000 * p):03d}).")
    larger = Column("hits", 1, max)
    assert "SiMHand is worse than none" in experiment.findings(rows, "error", larger, "SiMHand")


@pytest.mark.parametrize("few", ([[1.0], [2.0, 3.0]], [[1.0, 1.0], [2.0, 2.0]]))
def test_no_p_where_it_cannot_be_told(few):
    assert experiment.welch(*few) is None


def test_the_report_names_commits_and_machines(tmp_path):
    for name, commit in (("a", "abc"), ("b", "abc"), ("c", "def+")):
        (tmp_path / name).mkdir()
        first = {"args": {}, "facts": {"torch": "2.9", "machine": "a machine", "commit": commit}}
        (tmp_path / name / "log.jsonl").write_text(json.dumps(first) + "\n")
    made = experiment.made_by([tmp_path / name for name in "abc"])
    assert made == "Made by: commit abc, def+; machine a machine; torch 2.9."


def commands_of(lanes, tmp_path, monkeypatch):
    """The commands of lanes in order, parsed by the scripts' own parsers -> {kind: list of
    arguments}; each reads only what one before it has written."""
    made = set()
    kinds = {}
    for command in (command for lane in lanes for command in lane):
        args = vars(parse(command.words, monkeypatch))
        if args.get("weights") not in (None, "none"):
            assert Path(args["weights"]) in made
        assert not set(args.get("runs", ())) - {str(path.parent) for path in made}
        made.add(command.done or Path())
        kinds.setdefault(command.name.split("-")[0], []).append(args)
    return kinds


def differing(runs):
    return {key for key in runs[0] if any(args[key] != runs[0][key] for args in runs)}


METHOD = {"method", "hands", "pairs", "weighting", "weight_on", "weight_keypoints", "equivariance",
          "keypoint_loss", "target_temperature", "top_k", "rotation", "crop_margin", "border",
          "crop_move", "paper", "temperature"}


def test_the_demos_methods_differ_in_the_method_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--out", str(tmp_path)])
    args = demo.parse_args()
    lanes = [demo.lane(args, method, seed) for seed in range(3) for method in demo.ROWS]
    kinds = commands_of([demo.preparation(args), *lanes, demo.evaluation(args)], tmp_path,
                        monkeypatch)
    assert len(kinds["pretrain"]) == 12 and len(kinds["finetuned"]) == len(kinds["frozen"]) == 15
    assert differing(kinds["pretrain"]) <= METHOD | {"seed", "out"}
    for kind in ("frozen", "finetuned"):
        assert differing(kinds[kind]) == {"seed", "out", "weights"}
    assert [len(args["runs"]) for args in kinds["evaluate"]] == [15, 15]


@pytest.mark.parametrize("size", study.SIZES)
def test_the_studys_methods_differ_in_the_method_alone(size, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["study.py", "--size", size, "--out", str(tmp_path)])
    args = study.parse_args()
    size = study.SIZES[size]
    lanes = [study.lane(args, method, seed) for method, seed in study.plan(args)]
    kinds = commands_of([study.preparation(args), *lanes], tmp_path, monkeypatch)
    assert len(kinds["pretrain"]) == 3 * 7 + len(size["pools"]) + len(study.ABLATIONS)
    assert len(kinds["tuned"]) == 8 * sum(seeds for *_, seeds in size["tunings"])
    assert differing(kinds["pretrain"]) <= METHOD | {"seed", "out", "epochs"}
    for kind, others in (("knn", {"crop"}), ("tuned", {"epochs"})):
        assert differing(kinds[kind]) <= {"seed", "out", "weights", "label_fraction", *others}


def test_the_default_is_what_the_tables_call_simhand(monkeypatch):
    command = ["pretrain.py", "hands", "--out", "run"]
    named = parse([*command, *experiment.METHODS["simhand"]], monkeypatch)
    assert parse(command, monkeypatch) == named and named.method == "simhand"
