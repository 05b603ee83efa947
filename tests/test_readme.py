"""The README cannot drift: its commands run, its files exist, and the CI runs what it says.

bash reads the README's code blocks, with functions in place of the programs, which note how they
are called. Then the commands that it notes run one after the other, in a folder with made-up data
where the README's are, and with flags appended that make them small.
"""

import ast
import json
import re
import shutil
import subprocess
import sys
import threading
import time
import typing
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torchvision

import conftest
import datasets
import experiment
from conftest import ENVIRONMENT, ROOT, TINY, made_once

SCRIPTS = ("extract_hands", "mine_pairs", "pretrain", "finetune", "evaluate")
README = (ROOT / "README.md").read_text()
HOME = "/home/somebody"
# Not run, and why.
NOT_RUN = {r"^(pip|git) ": "needs the network",
           r"^python3 -m venv": "needs the network, for what is installed into it",
           r"^python -m pytest": "is this very test",
           r"^srun ": "needs Slurm; test_extract_hands.py has its variables"}
# Flags that make a command small, and the file that it writes last.
SMALL = {"extract_hands.py": ("--workers", 1),
         "mine_pairs.py": (),
         "pretrain.py": (*TINY, "--batch-size", 8, "--micro-batch", 4, "--epochs", 1),
         "finetune.py": (*TINY, "--batch-size", 8, "--epochs", 1),
         "evaluate.py": (),
         "tests/demo.py": ("--persons", 6, "--seconds", 2, "--labelled", 12, "--tested", 8,
                           "--input-size", 32, "--epochs", 1, "--batch-size", 4, "--tuning-epochs",
                           1, "--seeds", 1, "--methods", "none", "--out", "demo"),
         "tests/digits.py": ("--epochs", 1, "--batch-size", 4, "--seeds", 1, "--methods",
                             "untrained", "poses"),
         "tests/study.py": ("--size", "tiny", "--seeds", 1, "--methods", "none", "--out", "study"),
         "tests/bench.py": ("--size", "tiny", "--out", "bench.md")}
WRITES = {"extract_hands.py": "hands.jpg", "mine_pairs.py": "pairs.jpg",
          "pretrain.py": "backbone.pt", "finetune.py": "pred_xyz.npy", "evaluate.py": "table.md",
          "tests/demo.py": "demo.md", "tests/digits.py": "digits.md", "tests/study.py": "study.md",
          "tests/bench.py": ""}
# Files that the README names, and that none of its commands writes.
OF_OTHERS = {"hand_landmarker.task": "MediaPipe's", "train.npy": "the user's own labels",
             "test.npy": "the same", "val.npy": "the same", "videos.txt": "",
             "wrist.npy": "AssemblyHands', in the paper's commands",
             "training_xyz.json": "FreiHAND's", "evaluation_xyz.json": "the same",
             "study.md": "written here", "bench.md": "written here"}


class Call(typing.NamedTuple):
    line: tuple  # numbers of the lines by which bash came there
    program: str
    words: list

    def script(self):
        return self.words[0] if self.words and self.words[0].endswith(".py") else None


def parse(words, monkeypatch):
    """A script's name and arguments -> what its own parser makes of them."""
    monkeypatch.setattr(sys, "argv", [Path(words[0]).name, *map(str, words[1:])])
    return __import__(Path(sys.argv[0]).stem).parse_args()


def calls_of(text):
    """The Calls of the code blocks in a text, in order."""
    blocks = [block for language, block in re.findall(r"```(\w*)\n(.*?)```", text, re.S)
              if language in ("", "bash")]
    script = "".join(f"{name}() {{ note {name} \"$@\"; }}\n" for name in (
        "python", "python3", "torchrun", "srun", "git", "pip"))
    script += ("note() { printf '%s\\0' \"${BASH_LINENO[*]:1}\" \"$@\"; printf '\\n'; }\n"
               "cd() { :; }\n")
    for block in blocks:  # its beginning and its comments are noted too
        script += "note '#'\n" + re.sub(r"(?m)^#.*", "note '#'", block).replace(".venv/bin/", "")
    result = subprocess.run(["bash", "-euc", script], capture_output=True, text=True,
                            env={**ENVIRONMENT, "HOME": HOME})
    assert result.returncode == 0, result.stderr
    calls = []
    for line in result.stdout.splitlines():
        where, program, *words = line.split("\0")[:-1]
        words = words[next((k for k, word in enumerate(words) if word.endswith(".py")), 0):]
        calls.append(Call(tuple(where.split()), program, words))
    return calls


# The paper's experiments start in a folder of their own: their runs have the names of earlier ones.
SECTIONS = {text.splitlines()[0]: text for text in README.split("\n## ")}
PAPER = calls_of(SECTIONS["The paper"])
STAGES = calls_of("\n".join(text for title, text in SECTIONS.items() if title != "The paper"))
TOOLS = [call for call in STAGES + PAPER if (call.script() or "").startswith("tests/")]


def test_every_command_parses_and_every_stage_has_one(monkeypatch):
    found = {call.script() for call in STAGES}
    assert found >= {f"{name}.py" for name in SCRIPTS}
    for call in STAGES + PAPER:
        if call.script():
            assert vars(parse(call.words, monkeypatch))


@pytest.fixture(scope="session")
def world(rendered, tmp_path_factory):
    """A folder with what the README's user has: data sets below home/, and in here/ what lies in
    the working folder."""
    def make(folder):
        home = folder / "home"
        here = folder / "here"
        here.mkdir(parents=True)
        clips = sorted((rendered / "videos").glob("*.mp4"))
        for name, some in (("videos", clips), ("ego4d/v1/full_scale", clips[:4]),
                           ("100doh/videos", clips[4:])):
            (home / name).mkdir(parents=True)
            for clip in some:
                shutil.copy(clip, home / name)
        (home / "videos" / "broken.mp4").write_bytes(b"no video")
        (here / "videos.txt").write_text(f"{clips[0]}\n")
        for name in ("", "_eval"):
            shutil.copytree(rendered / f"freihand{name}", home / f"FreiHAND_pub_v2{name}")
        datasets.write_dexycb(home / "DexYCB", sequences=1)
        datasets.write_assemblyhands(home / "AssemblyHands")
        pictures = sorted((rendered / "freihand" / "training" / "rgb").glob("*.jpg"))
        (home / "pictures").mkdir()
        for picture in pictures[:5]:
            shutil.copy(picture, home / "pictures")
        for number, picture in enumerate(pictures[:40]):  # eight students of five digits
            digit = here / "Sign-Language-Digits-Dataset" / "Dataset" / str(number % 5)
            digit.mkdir(parents=True, exist_ok=True)
            shutil.copy(picture, digit / f"IMG_{1000 + number}.JPG")
        for name in ("peclr_rn50_yt3dh_fh.pth", "resnet50_simhand.pth"):  # the small network's
            torch.save(torchvision.models.resnet18().state_dict(), here / name)
        write_hand100m(home / "Hand100M", here / "Hand100M_Ego4D_1m_v1-1.json", pictures)

    return made_once(tmp_path_factory, "world", make)


def write_hand100m(frames, path, pictures):
    """SiMHand's published annotations in small: two videos of two frames, a hand in each."""
    rng = np.random.default_rng(0)
    images = []
    annotations = []
    for number in range(4):
        name = f"video{number // 2}/frame_{30 * (number % 2):06d}.jpg"
        (frames / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(pictures[number], frames / name)
        images.append({"id": number, "file_name": name, "width": 224, "height": 224})
        annotations.append({"hand_id": str(number), "image_id": number,
                            "boxes": "[50.0, 50.0, 170.0, 170.0]", "left_right": "Right",
                            "positive_sample": [(number + 2) % 4], "distance": [0.1],
                            "keypoint_25d": rng.uniform(0.2, 0.8, 63).tolist()})
    path.write_text(json.dumps({"info": {}, "images": images, "annotations": annotations}))


def execute(call, home, folder, start=conftest.run):
    """Run a command of the README in this folder, made small. -> its folder of results."""
    text = " ".join([call.program, *call.words])
    if any(re.match(pattern, text) for pattern in NOT_RUN):
        return None
    assert call.script() in SMALL, f"{text}: expected it in SMALL or NOT_RUN"
    script, *words = [word.replace(HOME, str(home)) for word in call.words]
    given = [word for word in words if word.startswith("--")]
    more = list(SMALL[script])
    if script == "finetune.py" and "--predict" in given:
        more = ["--workers", 0]
    elif "--weights" in given and words[words.index("--weights") + 1] != "imagenet":
        del more[more.index("--weights"):][:2]
    if "--steps" in given:
        more += ["--steps", 4]
    if "--label-fraction" in given:  # a few pictures are left
        more += ["--batch-size", 4]
    if script == "mine_pairs.py" and "--limit" in given:
        more = ["--limit", 15]
    if out_of(words) and (folder / out_of(words)).exists():  # another command's: it is wanted yet
        more += ["--out", f"others/{time.time_ns()}"]
    if call.program == "torchrun":
        start = conftest.torchrun
    start(script, *words, *more, cwd=folder)
    words += map(str, more)
    out = out_of(words) or words[0]
    if "--steps" not in given:
        assert (folder / out / WRITES[script]).exists(), f"{text}: no {WRITES[script]} in {out}"
    return out


def out_of(words):
    """What follows the last --out of a command: that one counts."""
    places = [k for k, word in enumerate(words) if word == "--out"]
    return words[places[-1] + 1] if places else None


def execute_all(calls, world, folder):
    """Run these commands in order. Of minings and trainings, those that have a flag or a data set
    that none before them had; the first with the same data stands for each other."""
    shutil.copytree(world / "here", folder, dirs_exist_ok=True)
    done = {}
    seen = set()
    for call in calls:
        script = call.script()
        if call in TOOLS or call.program == "#":
            continue
        if script not in ("mine_pairs.py", "pretrain.py", "finetune.py") or not out_of(call.words):
            execute(call, world / "home", folder)
            continue
        words = call.words
        data = words[words.index("--dataset") + 1] if "--dataset" in words else words[1]
        key = (call.program, script, "" if script == "pretrain.py" else data)
        flags = {word for word in words if word.startswith("--") and word not in SMALL[script]}
        weights = "imagenet" if "imagenet" in words else "a file"
        news = {key, *((*key[:2], flag) for flag in (*flags, weights))} - seen
        if news:
            result = execute(call, world / "home", folder)
            done.setdefault(key, result)
            seen |= news
        elif not (folder / out_of(words)).exists():  # other commands may read it
            (folder / out_of(words)).parent.mkdir(parents=True, exist_ok=True)
            (folder / out_of(words)).symlink_to(folder / done[key])


def test_the_commands_of_the_stages_run(world, tmp_path):
    execute_all(STAGES, world, tmp_path)
    endings = "npy|pt|txt|jpg|png|jsonl|json|md|csv|tex|zip"
    names = set(re.findall(rf"`([a-z_-]+\.(?:{endings}))`", README))
    assert len(names) > 20
    missing = [name for name in names - set(OF_OTHERS) if not [*tmp_path.rglob(name)]]
    assert not missing


def test_the_lines_that_use_the_backbone(tmp_path):
    """With torch and torchvision alone, as the README says."""
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    imported = re.findall(r"(?m)^(?:import|from) ([^.\n]+)", code)
    assert imported == ["torch, torchvision", "torchvision"]
    folder = tmp_path / "runs" / "simhand"
    folder.mkdir(parents=True)
    backbone = torchvision.models.resnet50()
    backbone.fc = torch.nn.Identity()
    torch.save(backbone.state_dict(), folder / "backbone.pt")
    picture = np.random.default_rng(0).integers(0, 255, (300, 300, 3)).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "hand.jpg"), picture)
    code += "\nassert features.shape == (1, 2048) and features.isfinite().all()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=ENVIRONMENT)


def test_the_commands_of_the_paper_run(world, tmp_path):
    execute_all(PAPER, world, tmp_path)


def run_experiment(script, *arguments, cwd):
    """Here, and its commands forked off: each process that loads torch takes seconds."""
    one = threading.Lock()

    def fork(command, log, environment):
        with one:  # processes of two threads get in each other's way
            process = conftest.fork(command, log, log)
            process.join()
            return process.exitcode

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setattr(experiment, "run_script", fork)
        conftest.run_here(script, *arguments)


@pytest.mark.parametrize("words", [
    *[call.words for call in TOOLS], ["tests/study.py"], ["tests/bench.py", "loader"]],
    ids=lambda words: Path(words[0]).stem)
def test_the_experiments_run(words, world, tmp_path):
    shutil.copytree(world / "here", tmp_path, dirs_exist_ok=True)
    start = conftest.run if words[0] == "tests/bench.py" else run_experiment
    execute(Call((), "python", words), world / "home", tmp_path, start)


def test_the_papers_runs_are_counted_in_its_table():
    """A comment begins an experiment; how many runs it needs stands in the table above."""
    counts = []
    for call in PAPER:
        if call.program == "#":
            counts.append({"pretrain.py": 0, "finetune.py": 0})
        elif call.script() in counts[-1]:
            counts[-1][call.script()] += 1
    needed = [tuple(count.values()) for count in counts if any(count.values())]
    table = re.findall(r"^\| [^|]+ \| (\d+) \| (\d+) \|", SECTIONS["The paper"], re.M)
    assert needed == [(int(pretrained), int(tuned)) for pretrained, tuned in table]


def rows_of(text):
    """{first cell of a table's rows: their other cells}"""
    rows = {}
    for line in text.splitlines():
        if re.match(r"\| [^-]", line):
            first, *cells = [cell.strip() for cell in line.strip("|").split("|")]
            rows.setdefault(first, set()).update(cells)
    return rows


@pytest.mark.parametrize("section, report", [
    ("Result", "digits.md"), ("Your own videos", "bench.md"),
    ("Speed, and several machines", "bench.md")])
def test_the_tables_hold_what_was_measured(section, report):
    measured = rows_of((ROOT / "tests" / report).read_text())
    shown = rows_of(SECTIONS[section])
    assert len(shown) > 4
    for what, cells in shown.items():
        assert cells <= measured[what], what


@pytest.mark.parametrize("start, report", [
    ("The demo runs", "demo.md"), ("[The study]", "study.md")])
def test_the_figures_in_sentences_are_those_of_the_reports(start, report):
    paragraph = next(part for part in README.split("\n\n") if part.startswith(start))
    text = (ROOT / "tests" / report).read_text()
    means = {f"{float(mean):.1f}" for mean in re.findall(r"\| \**(\d+\.\d+)", text)}
    shown = re.findall(r"\d+\.\d", paragraph)
    assert len(shown) > 5 and means.issuperset(shown)
    said = re.findall(r"p <? ?\.\d+", paragraph)
    assert said and {*said} <= {*re.findall(r"p <? ?\.\d+", text)}


def test_the_figures_of_the_signers_pool_are_its_reports():
    sentence = re.search(r"`--pool HANDS`.*?pool\.md", README, re.S)[0]
    report = (ROOT / "tests" / "pool.md").read_text()
    figures = re.findall(r"0\.\d{3}|p \.\d+", sentence)
    assert len(figures) == 6 and all(figure in report for figure in figures)


def test_the_papers_values(monkeypatch):
    """What --paper sets, said once more here by hand."""
    extract = parse(["extract_hands.py", "videos", "--out", "hands", "--paper"], monkeypatch)
    mine = parse(["mine_pairs.py", "hands", "--paper"], monkeypatch)
    pretrain = parse(["pretrain.py", "hands", "--out", "run", "--paper"], monkeypatch)
    assert (extract.margin, extract.border, extract.size, extract.fps) == (1.3, "black", 224, 1)
    assert not mine.rotation_free and (mine.dims, mine.top_k) == (14, 1)
    assert (pretrain.border, pretrain.weighting, pretrain.weight_on) == ("black", "linear", "both")
    assert abs(pretrain.crop_move - 15 / 224) < 1e-3 and pretrain.shift_unit == "side"
    assert pretrain.crop_margin == [0.9, 1.5] and pretrain.rotation == 45
    assert (pretrain.batch_size, pretrain.epochs, pretrain.lr) == (8192, 100, 3.2e-3)
    assert (pretrain.temperature, pretrain.optimizer) == (0.5, "lars-adam")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_teaches_and_only_extraction_needs_mediapipe(script, tmp_path):
    """--help in a process where mediapipe cannot be imported."""
    (tmp_path / "without.py").write_text(
        "import runpy, sys; sys.modules['mediapipe'] = None; sys.argv = sys.argv[1:]; "
        f"sys.path.insert(0, r'{ROOT}'); runpy.run_path(sys.argv[0], run_name='__main__')")
    result = conftest.run(tmp_path / "without.py", ROOT / f"{script}.py", "--help")
    assert f"python {script}.py" in result.stdout


def test_only_extraction_imports_mediapipe():
    for path in ROOT.glob("*.py"):
        assert ("import mediapipe" in path.read_text()) == (path.name == "extract_hands.py")


def test_ci_runs_the_second_command_exactly():
    first, second = re.findall(r"^python3 -m venv.*", README, re.M)
    assert first.endswith("tests/demo.py") and second.endswith("-m pytest -n 2")
    assert second in (ROOT / ".ci" / "run").read_text().splitlines()


def test_every_import_is_named_in_requirements():
    names = {"cv2": "opencv-python-headless", "sklearn": "scikit-learn", "yaml": "PyYAML",
             "xdist": "pytest-xdist"}
    required = (ROOT / "requirements.txt").read_text()
    own = {path.stem for path in [*ROOT.glob("*.py"), *(ROOT / "tests").glob("*.py")]}
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
