"""The README cannot drift: its commands parse, its files exist, and the CI runs what it says."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conftest import ENVIRONMENT, ROOT

SCRIPTS = ("extract_hands", "mine_pairs", "pretrain", "finetune", "evaluate")
README = (ROOT / "README.md").read_text()
BLOCKS = "\n".join(re.findall(r"```(?:bash)?\n(.*?)```", README, re.S))
COMMANDS = [line for line in BLOCKS.splitlines() if re.match(r"(python|torchrun) .*\b\w+\.py", line)
            and not re.search(r"\$|\\$", line)]  # those with variables are tested below


def parse(words, monkeypatch):
    """A script's name and arguments -> what its own parser makes of them."""
    monkeypatch.setattr(sys, "argv", [Path(words[0]).name, *map(str, words[1:])])
    return __import__(Path(sys.argv[0]).stem).parse_args()


def test_every_stage_has_a_command():
    found = {name for name in SCRIPTS for command in COMMANDS if f"{name}.py" in command}
    assert found == set(SCRIPTS)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command, monkeypatch):
    words = shlex.split(command)
    script = next(k for k, word in enumerate(words) if word.endswith(".py"))
    assert vars(parse(words[script:], monkeypatch))


def test_the_papers_commands_parse_and_build_on_each_other(tmp_path, monkeypatch):
    """The blocks are run by bash with a `python` that only notes its arguments; the
    scripts' own parsers read them. A comment begins a new experiment."""
    section = README.split("\n## The paper\n")[1].split("\n## ")[0]
    experiments, letter = re.findall(r"```bash\n(.*?)```", section, re.S)
    blocks = re.sub(r"(?m)^# .*", "python next", experiments) + f"python next\n{letter}"
    note = (f"#!{sys.executable}\nimport json, sys\n"
            f"open({str(tmp_path / 'noted')!r}, 'a').write(json.dumps(sys.argv[1:]) + '\\n')\n")
    for name in ("python", "torchrun"):
        (tmp_path / name).write_text(note)
        (tmp_path / name).chmod(0o755)
    environment = ENVIRONMENT | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": "/home/me"}
    subprocess.run(["bash", "-euc", blocks], check=True, cwd=tmp_path, env=environment)
    hands, mined, backbones, tuned, scored, counts = set(), {}, {}, set(), [], []
    for words in [*map(json.loads, (tmp_path / "noted").read_text().splitlines()), ["next"]]:
        if words == ["next"]:  # what each experiment needs stands in the table above them
            before = np.sum(counts, 0) if counts else (0, 0)
            counts.append((len(backbones) - before[0], len(tuned) - before[1]))
            continue
        args = parse(words, monkeypatch)
        if words[0] == "extract_hands.py":
            hands.add(args.out)
        elif words[0] == "mine_pairs.py":
            assert args.hands in hands
            mined[args.out or args.hands] = args.hands, args.top_k
        elif words[0] == "pretrain.py":
            assert [mined[folder][0] for folder in args.pairs or args.hands] == args.hands, words
            assert args.top_k <= mined[args.hands[0]][1] and args.out not in backbones
            backbones[args.out] = args.backbone
        elif words[0] == "finetune.py":
            if args.weights != "imagenet":
                assert backbones[os.path.dirname(args.weights)] == args.backbone, words
            assert args.out not in tuned
            tuned.add(args.out)
        else:
            scored.append(args.out)
            assert set(args.runs) <= tuned, set(args.runs) - tuned
            assert not args.baseline or any(run.endswith(f"-{args.baseline}") for run in args.runs)
    table = re.findall(r"^\| [^|]+ \| (\d+) \| (\d+) \|", section, re.M)
    assert counts == [(0, 0), (0, 0), *((int(a), int(b)) for a, b in table)] and len(counts) == 8
    assert len(scored) == len(set(scored))


def test_the_letter_of_the_paper_has_its_values(monkeypatch):
    """Those that our defaults leave, said once more here by hand."""
    section = README.split("\n### To the paper's letter\n")[1].split("\n#")[0]
    lines = re.search(r"```bash\n(.*?)```", section, re.S)[1].replace("\\\n", " ").splitlines()
    extract, mine, pretrain = (parse(shlex.split(line)[1:], monkeypatch) for line in lines)
    assert (extract.margin, extract.border, extract.size, extract.fps) == (1.3, "black", 224, 1)
    assert not mine.rotation_free and (mine.dims, mine.top_k) == (14, 1)
    assert (pretrain.border, pretrain.weighting, pretrain.weight_on) == ("black", "linear", "both")
    assert abs(pretrain.crop_move - 15 / 224) < 1e-3 and pretrain.shift_unit == "side"
    assert pretrain.crop_margin == [0.9, 1.5] and pretrain.rotation == 45
    assert (pretrain.batch_size, pretrain.epochs, pretrain.lr) == (8192, 100, 3.2e-3)
    assert (pretrain.temperature, pretrain.optimizer) == (0.5, "lars-adam")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_teaches_and_only_extraction_needs_mediapipe(script):
    """--help in a process where mediapipe cannot be imported."""
    code = ("import runpy, sys; sys.modules['mediapipe'] = None; "
            f"sys.argv = ['{script}.py', '--help']; sys.path.insert(0, r'{ROOT}'); "
            f"runpy.run_path(r'{ROOT / script}.py', run_name='__main__')")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                            env=ENVIRONMENT)
    assert result.returncode == 0 and "python " + script + ".py" in result.stdout, result.stderr


def test_only_extraction_imports_mediapipe():
    for path in ROOT.glob("*.py"):
        assert ("import mediapipe" in path.read_text()) == (path.name == "extract_hands.py")


def test_ci_runs_the_second_command_exactly():
    first, second = [line for line in BLOCKS.splitlines() if line.startswith("python3 -m venv")]
    assert first.endswith("tests/demo.py") and second.endswith("-m pytest -n 2")
    assert second in (ROOT / ".ci" / "run").read_text().splitlines()


def test_files_named_in_the_readme_are_named_in_a_script():
    """As a string of its own, with or without its ending; not in a docstring or a help text."""
    strings = set()
    for path in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                strings.add(node.value.lstrip("/"))
    names = re.findall(r"`([a-z_-]+\.(?:npy|pt|txt|jpg|png|jsonl|json|md|csv|tex|zip))`", README)
    assert len(set(names)) > 20
    for name in set(names):
        assert name in strings or Path(name).stem in strings, name


def test_every_import_is_named_in_requirements():
    names = {"cv2": "opencv-python-headless", "sklearn": "scikit-learn", "yaml": "PyYAML"}
    required = (ROOT / "requirements.txt").read_text()
    own = {path.stem for path in [*ROOT.glob("*.py"), *(ROOT / "tests").glob("*.py")]}
    own |= {"PIL"}  # a reference of the benchmark; comes with torchvision
    for path in [*ROOT.glob("*.py"), *(ROOT / "tests").glob("*.py")]:
        for module in imported(path) - own - sys.stdlib_module_names:
            package = names.get(module, module)
            found = re.search(rf"^{package}\b", required, re.M)
            assert found, f"{path.name} imports {module}"


def imported(path):
    """The modules that a file imports, wherever in it, without what lies below them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found
