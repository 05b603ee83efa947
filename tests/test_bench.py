"""The benchmark's file: a stage's rows are replaced, those of the others kept."""

import datetime

import numpy as np

import bench


def write(path, stage, rows, day):
    lines = [bench.as_line(stage, row) for row in rows]
    bench.write_results(path, stage, lines, f"python tests/bench.py {stage}",
                        f"2 cores of an invented processor {day}", datetime.date(2000, 1, day))


def test_a_stage_replaces_its_own_rows_alone(tmp_path):
    path = tmp_path / "bench.md"
    write(path, "step", [bench.Row("a step", "1 s"), bench.Row("mine", "2 s")], 1)
    write(path, "mine", [bench.Row("few", "3 s", "6 s", "2.0", "a tree"),
                         bench.Row("many", "4 s")], 2)
    kept = path.read_text().splitlines()
    write(path, "mine", [bench.Row("few", "5 s", "6 s", "1.2", "a tree")], 3)

    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ")
    assert "`python tests/bench.py mine` on 2000-01-03, on 2 cores of an invented processor 3" \
        in lines[2]
    table = lines[lines.index(bench.HEADER[0]):]
    steps = [line for line in kept if line.startswith("| step |")]
    assert len(steps) == 2
    assert table == [*bench.HEADER, "| mine | few | 5 s | 6 s | 1.2 | a tree |", *steps, "",
                     "- mine: 2000-01-03, 2 cores of an invented processor 3",
                     "- step: 2000-01-01, 2 cores of an invented processor 1"]
    assert [file.name for file in tmp_path.iterdir()] == ["bench.md"]


def test_the_reference_of_mining_finds_the_nearest_of_other_videos(tmp_path):
    """Against all distances. Of 40 hands a video, more than 32 must be asked for."""
    points = np.random.default_rng(0).normal(size=(400, 3)).astype(np.float32)
    video = np.arange(400) // 40
    points[video == 3] *= 1e-3  # all of a video nearer to each other than to any other
    np.save(tmp_path / "embeddings.npy", points)
    tree = bench.plant_tree(tmp_path / "embeddings.npy")
    every = np.linalg.norm(points[:, None].astype(float) - points, axis=2)
    every[video[:, None] == video] = np.inf
    rows = np.array([130, 5, 399, 121])
    assert np.allclose(bench.ask_tree(tree, video, rows), every.min(1)[rows], rtol=1e-9)
