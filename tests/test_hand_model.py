"""MediaPipe's model: how it is made, kept and given; and that no other connection is tried."""

import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import extract_hands
from common import load_hands
from conftest import ENVIRONMENT, ROOT, refused, run


@pytest.fixture(scope="session")
def wheels(tmp_path_factory):
    """A folder that holds the wheel with the model's files, fetched by pip."""
    folder = tmp_path_factory.mktemp("wheels")
    command = [sys.executable, "-m", "pip", "download", *extract_hands.MODEL_RELEASE, "--no-deps",
               "--only-binary=:all:", "--dest", folder]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder for the model, not there yet. pip has no network, and no wheel until `offer`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    offer(tmp_path, monkeypatch)
    return tmp_path / "cache" / "simhand"


def offer(folder, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))


def test_it_is_made_once_from_the_wheel_kept_and_made_again_where_it_is_damaged(
        wheels, cache, tmp_path, monkeypatch, capsys):
    offer(wheels, monkeypatch)
    path = Path(extract_hands.find_model(None))
    assert path == cache / "hand_landmarker.task"
    with zipfile.ZipFile(path) as bundle:  # MediaPipe reads the files where they lie
        assert {member.compress_type for member in bundle.infolist()} == {zipfile.ZIP_STORED}
    content = path.read_bytes()
    assert "mediapipe==0.10.21" in capsys.readouterr().out

    offer(tmp_path, monkeypatch)
    assert extract_hands.find_model(None) == str(path) and capsys.readouterr().out == ""
    offer(wheels, monkeypatch)
    for damaged in (content[:4_000_000] + bytes(1000) + content[4_001_000:], content[:4_000_000]):
        path.write_bytes(damaged)
        extract_hands.find_model(None)
        assert path.read_bytes() == content


def test_two_processes_at_once_make_it_once(wheels, cache, monkeypatch):
    offer(wheels, monkeypatch)
    code = "import extract_hands; print(extract_hands.find_model(None))"
    processes = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True,
                                  stdout=subprocess.PIPE) for _ in range(2)]
    printed = "".join(process.communicate(timeout=100)[0] for process in processes)
    assert printed.count("making ") == 1
    assert sorted(path.name for path in cache.iterdir()) == [".lock", "hand_landmarker.task"]


def test_without_a_registry_it_ends_in_one_line_and_leaves_nothing(cache, tmp_path):
    (tmp_path / "a.mp4").write_text("never looked at")
    line = refused("extract_hands.py", tmp_path / "a.mp4", "--out", tmp_path / "hands")
    assert "No matching distribution found for mediapipe==0.10.21" in line
    assert "hand_landmarker.task" in line and "give it with --model" in line
    assert not (tmp_path / "hands").exists()
    assert [path.name for path in cache.iterdir()] == [".lock"]


def test_without_a_home_or_a_cache_that_can_be_written_it_ends_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_text("never looked at")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a.mp4"))
    line = refused("extract_hands.py", tmp_path / "a.mp4", "--out", tmp_path / "hands")
    assert "Not a directory" in line and "give it with --model" in line
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where the user has no name
    line = refused("extract_hands.py", tmp_path / "a.mp4", "--out", tmp_path / "hands")
    assert "home" in line and "give it with --model" in line


def hands_are_those_of(folder, video, extracted):
    """Whether a hands folder of this video has its crops and keypoints in that of all videos."""
    one, every = load_hands(folder), load_hands(extracted)
    rows = np.flatnonzero(every.rows["video"] == every.videos.index(video.name))
    crops = every.crops[every.offsets[rows[0]]:every.offsets[rows[-1] + 1]]
    return (np.array_equal(one.keypoints, every.keypoints[rows])
            and np.array_equal(one.crops, crops))


def test_a_model_that_is_given_needs_no_cache_and_may_move(rendered, extracted, tmp_path,
                                                           monkeypatch):
    moved = Path(shutil.copy(extract_hands.find_model(None), tmp_path / "a model.task"))
    video = min((rendered / "videos").glob("*.mp4"))
    arguments = (video, "--out", tmp_path / "hands", "--fps", 5, "--model")
    monkeypatch.setitem(ENVIRONMENT, "XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "text.task").write_text("no zip")
    for name in ("text.task", "nowhere.task"):
        line = refused("extract_hands.py", *arguments, tmp_path / name)
        assert f"{name}: expected MediaPipe's hand_landmarker.task" in line
    run("extract_hands.py", *arguments, moved)
    assert hands_are_those_of(tmp_path / "hands", video, extracted)
    assert not (tmp_path / "cache").exists()
    printed = run("extract_hands.py", *arguments, moved.rename(tmp_path / "b.task")).stdout
    assert re.search(r"^ +to_do +0$", printed, re.M)


# Runs a Python file; the kernel kills its process, or any that it starts, when it asks for a socket
# of the internet, also from C++. The rules are those of seccomp: load the system call's number; if
# it is that of socket(), load its first argument; kill if that is AF_INET or AF_INET6; allow else.
OFFLINE = """
import ctypes, platform, runpy, socket, struct, sys
number = {"x86_64": 41, "aarch64": 198}[platform.machine()]
rules = [(0x20, 0, 0, 0), (0x15, 0, 4, number), (0x20, 0, 0, 16), (0x15, 1, 0, socket.AF_INET),
         (0x15, 0, 1, socket.AF_INET6), (0x06, 0, 0, 0x80000000), (0x06, 0, 0, 0x7FFF0000)]
program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
given = struct.pack("HxxxxxxP", len(rules), ctypes.addressof(program))
system = ctypes.CDLL(None, use_errno=True)
if system.prctl(38, 1, 0, 0, 0) or system.prctl(22, 2, given, 0, 0):
    sys.exit("not permitted")
if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path.insert(0, sys.argv[0].rpartition("/")[0])
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_no_connection_is_tried(rendered, extracted, tmp_path):
    (tmp_path / "offline.py").write_text(OFFLINE)
    (tmp_path / "connect.py").write_text("import socket\nsocket.socket(socket.AF_INET)\n")
    offline = [sys.executable, tmp_path / "offline.py"]
    tried = subprocess.run([*offline, tmp_path / "connect.py"], capture_output=True, text=True)
    if platform.machine() not in ("x86_64", "aarch64") or "not permitted" in tried.stderr:
        pytest.skip("this kernel does not let a process forbid itself a system call")
    assert tried.returncode == -signal.SIGSYS
    extract_hands.find_model(None)  # made here, if it must be
    video = min((rendered / "videos").glob("*.mp4"))
    command = [*offline, ROOT / "extract_hands.py", video, "--fps", "5", "--out",
               tmp_path / "hands"]
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert result.returncode == 0, result.stderr
    assert hands_are_those_of(tmp_path / "hands", video, extracted)
