"""One rendered set, extracted and mined once, serves the whole session; tests copy what
they change. With pytest-xdist (-n 2) several processes share the tests, and that set."""

import contextlib
import fcntl
import importlib
import io
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import types
import warnings
from pathlib import Path

import pytest

# Whatever the user's shell says of ranks, threads and plots, the tests see a plain machine.
for name in [*os.environ]:
    if re.match("RANK|LOCAL_|GROUP_|ROLE_|WORLD_SIZE|MASTER_|SLURM_|TORCH|MPL|OMP_|GOMP_", name):
        del os.environ[name]
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded: a core for each process

ROOT = Path(__file__).resolve().parent.parent
REAL = ROOT.parent / "shared" / "real" / "handpose3d_stereo"
ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
TINY = ("--backbone", "resnet18", "--weights", "none", "--input-size", "32", "--workers", "0")
OURS = "|".join(path.stem for path in (*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")))
# Scripts are forked off a process that has the large packages loaded: that saves each two seconds.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["pytest", "cv2", "torchvision", "scipy.stats", "matplotlib.figure",
                               "matplotlib.backends.backend_agg", "sklearn.decomposition"])


def pytest_configure(config):
    """A warning of our own code fails its test. Other packages' warnings are theirs to
    mend. What a warning becomes that is raised where an object is cleaned up, such as a
    file left open, fails too."""
    config.addinivalue_line("filterwarnings", rf"error:::({OURS})\Z")
    config.addinivalue_line("filterwarnings", "error::pytest.PytestUnraisableExceptionWarning")


def pytest_collection_modifyitems(items):
    """The longest tests first, so that no process is left alone with them at the end."""
    items.sort(key=lambda item: item.path.stem not in ("test_readme", "test_bench"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A process that has nothing left to do takes tests from the other."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


@pytest.fixture
def tmp_path(tmp_path):
    """A folder that goes with its test: together they would take tens of gigabytes."""
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


def run(script, *arguments, status=0, cwd=".", ranks=1):
    """Run a script in a process of its own, as a user would, but that its own warnings are errors.
    ranks: in so many, as torchrun would. -> CompletedProcess; a wrong exit status shows all that
    was printed."""
    command = [script, *arguments]
    with tempfile.TemporaryDirectory() as folder:
        logs = [os.path.join(folder, name) for name in ("stdout", "stderr")]
        processes = [fork(command, *logs, cwd=cwd, **each) for each in variables_of(ranks)]
        for process in processes:
            process.join(600)
            process.kill()  # where it waits for a rank that failed
        ended = [process.exitcode for process in processes]
        printed, errors = (Path(log).read_text() for log in logs)
    assert ended == [status] * ranks, f"{script} ended with {ended}\n{printed}\n{errors}"
    return subprocess.CompletedProcess(command, status, printed, errors)


def torchrun(script, *arguments, cwd="."):
    """Run a script, ours or another that may import ours, as two ranks. The launcher itself, for
    which torch would be loaded three times more, starts those of a test in test_pretrain.py."""
    return run(script, *arguments, cwd=cwd, ranks=2)


def variables_of(ranks):
    """What torchrun puts into the environment of each of its processes."""
    if ranks == 1:
        return [{}]
    with socket.socket() as place:
        place.bind(("localhost", 0))
        port = place.getsockname()[1]
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
             "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)} for rank in range(ranks)]


def fork(command, *logs, cwd=".", **variables):
    """Start a script in a process group of its own, off the process that has the large packages
    loaded. logs: the files that stdout and stderr are appended to. -> the process"""
    command = [str(ROOT / command[0]), *map(str, command[1:])]
    where = os.path.abspath(cwd)
    environment = {**ENVIRONMENT, **variables}
    process = SERVER.Process(target=become, args=(command, where, environment, *logs))
    process.start()
    return process


def become(command, cwd, environment, *logs):
    """In a process of its own: run a script as `python` does."""
    os.setpgid(0, 0)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for stream, log in zip((1, 2), logs):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.argv = command
    sys.path.insert(0, os.path.dirname(command[0]))
    for ours in ("__main__", "common"):
        warnings.filterwarnings("error", module=rf"{ours}\Z")
    main = types.ModuleType("__main__")
    main.__file__ = command[0]
    sys.modules["__main__"] = sys.modules["__mp_main__"] = main  # the latter of multiprocessing
    exec(compile(Path(command[0]).read_bytes(), command[0], "exec"), main.__dict__)


def run_main(script, *arguments):
    """Run a script's main() in this process: another would take seconds. -> exit status,
    stdout, stderr."""
    import common  # not above: the processes of `run` load this file

    module = importlib.import_module(Path(script).stem)
    printed, errors = io.StringIO(), io.StringIO()
    argv, handler, status = sys.argv, signal.getsignal(signal.SIGTERM), 0
    sys.argv = [script, *map(str, arguments)]
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(printed):
            common.run_script(module.main)
    except SystemExit as ended:
        status = ended.code
    finally:
        sys.argv = argv
        signal.signal(signal.SIGTERM, handler)
    return status, printed.getvalue(), errors.getvalue()


def run_here(script, *arguments):
    """Run a script in this process. -> what it prints."""
    status, printed, errors = run_main(script, *arguments)
    assert not status, f"{script} ended with {status}\n{printed}\n{errors}"
    return printed


def refused(script, *arguments):
    """Run a script on input that it must refuse: status 2 and one line on stderr. -> that line."""
    status, _, errors = run_main(script, *arguments)
    bar = re.compile(r"\d+/\d+ \[")
    lines = [line for line in errors.splitlines() if line.strip() and not bar.search(line)]
    assert status == 2 and len(lines) == 1 and lines[0].startswith(f"{script}: "), errors
    return lines[0]


def listing(folder):
    """{name: bytes} of a folder's files, those of logs and locks apart."""
    apart = {"log.jsonl", "worker.log", ".lock"}
    return {p.name: p.read_bytes() for p in sorted(folder.rglob("*"))
            if p.is_file() and p.name not in apart}


def made_once(tmp_path_factory, name, make):
    """The folder NAME that make(folder) makes, by the first process that needs it."""
    base = tmp_path_factory.getbasetemp()
    if WORKERS > 1:
        base = base.parent  # of all processes
    folder = base / name
    with open(base / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            unfinished = base / f"{name}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            make(unfinished)
            unfinished.rename(folder)
    return folder


@pytest.fixture(scope="session")
def rendered(tmp_path_factory):
    """Folder with videos/ (8 of 4 s at 5 fps, and their truth) and freihand/ (16 training
    samples, 8 for testing)."""
    def make(folder):
        import synthetic
        folder.mkdir()
        synthetic.write_videos(folder / "videos", videos=8, seconds=4, fps=5, seed=0)
        synthetic.write_freihand(folder / "freihand", train=16, evaluation=8, seed=0)

    return made_once(tmp_path_factory, "rendered", make)


@pytest.fixture(scope="session")
def extracted(rendered, tmp_path_factory):
    """The hands folder of the rendered videos, every frame sampled. Not to be changed."""
    def make(folder):
        run("extract_hands.py", rendered / "videos", "--out", folder, "--fps", 5)

    return made_once(tmp_path_factory, "extracted", make)


@pytest.fixture(scope="session")
def mined(extracted, tmp_path_factory):
    """The same, mined with three neighbours each. Not to be changed."""
    def make(folder):
        shutil.copytree(extracted, folder)
        run("mine_pairs.py", folder, "--top-k", 3, "--no-rotation-free")

    return made_once(tmp_path_factory, "mined", make)


@pytest.fixture
def hands(extracted, tmp_path):
    """A copy of the extracted hands folder, to break."""
    return Path(shutil.copytree(extracted, tmp_path / "hands"))


@pytest.fixture
def pairs(mined, tmp_path):
    """A copy of the mined hands folder, to break."""
    return Path(shutil.copytree(mined, tmp_path / "pairs"))
