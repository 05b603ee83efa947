"""The benchmarks: what they write, and that they run."""

import bench


def test_a_stage_replaces_its_own_block_alone(tmp_path):
    path = tmp_path / "bench.md"
    bench.run_stage(path, "step", [bench.Row("a step", "1 s"), bench.Row("another", "2 s")])
    bench.run_stage(path, "mine", [bench.Row("few", "3 s", "6 s", "2.0", "a tree")])
    kept = bench.read_blocks(path)["step"]
    bench.run_stage(path, "mine", [bench.Row("few", "5.5 s, 1 GB", "6 s", "1.1", "a tree")])

    assert path.read_text().startswith("# Speed and memory\n\n## step\n\n")
    blocks = bench.read_blocks(path)
    assert list(blocks) == ["step", "mine"] and blocks["step"] == kept
    facts, _, *table = blocks["mine"].splitlines()
    assert f"{bench.CORES} cores; python" in facts and "machine" in facts
    assert table == ["| what | ours | reference | ratio | the reference is |",
                     "|---|---|---|---|---|", "| few | 5.5 s, 1 GB | 6 s | 1.1 | a tree |"]
    assert bench.measured(path, "mine", "few") == [5.5, 1]
    assert [file.name for file in tmp_path.iterdir()] == ["bench.md"]


def test_what_data_sets_take_follows_from_the_measured_rows(tmp_path):
    """Sums by hand, of 36,000 frames in 10 hours."""
    path = tmp_path / "bench.md"
    bench.run_stage(path, "extract", [bench.Row("1080p, 1 worker", "10.0 frames/s"),
                                      bench.Row("merge 3 videos", "100 s, 1.00 GB")])
    bench.run_stage(path, "mine", [bench.Row("1000000 hands", "100 s, 1.00 GB"),
                                   bench.Row("2000000 hands", "200 s, 2.00 GB")])
    bench.run_stage(path, "loader", [bench.Row("views of 128 px", "2000 views/s")])
    bench.run_stage(path, "step", [bench.Row("32 pairs, 32 at a time", "100 views/s, 1.00 GB")])
    rows = {row[0]: row[1:] for row in bench.estimate(path)}
    extracted = next(row for name, row in rows.items() if name.startswith("extract"))
    assert extracted[:3] == ["1", "100", "400"]  # 36,000 frames at 10 a second
    assert float(extracted[3]) == round(387.7 * 2.24 / 2.07)
    mined = next(row for name, row in rows.items() if name.startswith("mine, hours"))
    assert mined[1] == "0.1"  # 3.6M hands, 360 s
    views = next(row for name, row in rows.items() if name.startswith("views for ResNet-50"))
    assert views[0] == "1"  # 7.2M views at 2,000 a second
    assert all(len(row) == len(bench.PLANS) + 1 for row in rows.values())
