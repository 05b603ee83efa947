"""The demo's commands parse, build on each other, and compare nothing but the pre-training."""

import json
from pathlib import Path

import demo
from test_readme import parse


def test_commands_parse_and_differ_in_the_pre_training_alone(tmp_path, monkeypatch):
    made, settings = set(), {}
    for name, *words in demo.commands(tmp_path, 3):
        if words[0] == "tests/synthetic.py":
            words[0] = "synthetic.py"
        args = vars(parse(words, monkeypatch))
        assert args.get("seed", 3) == 3 or name == "mine"
        if words[0] == "finetune.py":
            weights = args.pop("weights")
            assert weights == "none" or str(Path(weights).parent) in made
        made.add(args.pop("out") or args["hands"])
        settings.setdefault(name, []).append(args)
        if words[0] == "evaluate.py":
            assert set(args["runs"]) <= made and len(args["runs"]) == 3
    for name, count in (("pre-train", 2), ("probe", 3), ("fine-tune", 3)):
        first, *others = settings[name]
        assert len(others) == count - 1
        for other in others:
            assert {key for key in first if first[key] != other[key]} <= {"method"}


def test_report_says_who_is_better(tmp_path):
    (tmp_path / "simhand").mkdir()
    (tmp_path / "simhand" / "log.jsonl").write_text('{"args": {}}\n{"hands": 1234}\n')
    errors = {"frozen-none": 40, "frozen-peclr": 25, "frozen-simhand": 20,
              "finetuned-none": 20, "finetuned-peclr": 10, "finetuned-simhand": 15}
    for name, error in errors.items():
        (tmp_path / name).mkdir()
        metrics = {"mpjpe": error, "intervals": {"mpjpe": [error - 1, error + 1]}}
        (tmp_path / name / "metrics.json").write_text(json.dumps(metrics))
    frozen, tuned = demo.report(tmp_path).split("Fine-tuned:")
    assert "1234 hands" in frozen
    assert "| SiMHand | 20.0 | 19.0 to 21.0 | 50.0 % |" in frozen
    assert "50.0 % smaller than without pre-training and 20.0 % smaller than with PeCLR" in frozen
    assert "25.0 % smaller than without pre-training and 50.0 % larger than with PeCLR" in tuned
