"""The benchmarks: what they write, and that they run."""

import re
import subprocess
import sys

import bench
from conftest import ENVIRONMENT, ROOT


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
    bench.run_stage(path, "large", [bench.Row("1080p, 1 worker", "10.0 frames/s")])
    bench.run_stage(path, "mine", [bench.Row("250000 hands", "100 s, 1.00 GB"),
                                   bench.Row("500000 hands", "200 s, 2.00 GB"),
                                   bench.Row("noticing copies", "100 µs a hand")])
    bench.run_stage(path, "step", [bench.Row("32 pairs, 32 at a time", "100 views/s, 1.00 GB")])
    rows = {row[0]: row[1:] for row in bench.estimate(path)}
    extracted = next(row for name, row in rows.items() if name.startswith("extract"))
    assert extracted[:3] == ["1", "100", "400"]  # 36,000 frames at 10 a second
    assert float(extracted[3]) == round(387.7 * 2.24 / 2.07)
    mined = next(row for name, row in rows.items() if name.startswith("mine, hours"))
    assert mined[1] == "0.5"  # 3.6M hands: 1,440 s, and 360 s for copies
    trained = next(row for name, row in rows.items() if name.startswith("pre-train"))
    assert trained[0] == "20"  # 7.2M views at 100 a second
    assert all(len(row) == len(bench.PLANS) + 1 for row in rows.values())


def test_the_gpus_benchmark_runs_on_a_cpu_without_what_a_gpu_machine_lacks(tmp_path):
    """The whole of it, tiny, in a process that has neither mediapipe nor av nor yaml."""
    code = ("import runpy, sys; sys.modules |= dict.fromkeys(('mediapipe', 'av', 'yaml')); "
            "sys.argv = ['bench.py', 'gpu', '--size', 'tiny', '--out', "
            f"{str(tmp_path / 'gpu.md')!r}]; "
            f"runpy.run_path({str(ROOT / 'tests' / 'bench.py')!r}, run_name='__main__')")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                            env=ENVIRONMENT)
    assert result.returncode == 0, result.stdout + result.stderr
    blocks = bench.read_blocks(tmp_path / "gpu.md")
    assert list(blocks) == ["correctness", "resuming", "speed of pre-training", "loss", "mining",
                            "fine-tuning", "one rank of nccl", "compiled"]
    assert blocks["correctness"].count("| right |") == 12
    off = re.findall(r"resumed \| (\S+) \|", blocks["resuming"])
    assert off == ["0.0e+00", "0.0e+00"]  # bit for bit
    assert len(re.findall(r"pairs, 4 at a time, fp32 \| \d+ views/s", str(blocks))) == 2
