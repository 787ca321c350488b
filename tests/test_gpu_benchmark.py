"""The benchmark for accelerators, tiny and on a CPU: it must run where there is torch and numpy, and little else."""

from __future__ import annotations

import re
import subprocess
import sys

from tests.commands import ROOT

MISSING = ("pydantic", "ray", "mlflow", "torchvision", "typer", "safetensors", "pyarrow", "sklearn", "PIL")


def test_the_benchmark_needs_torch_and_numpy_alone() -> None:
    words = "gpu.py --device cpu --model small_cnn --limit 60 --epochs 1 --models 1 --batch-size 16 --no-compile"
    code = (
        f"import runpy, sys\nfor name in {MISSING}: sys.modules[name] = None\n"
        f"sys.argv = {[*words.split(), '--loader-workers', '0', '--processes']}\n"
        "runpy.run_path('tests/benchmarks/gpu.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    seconds = [float(found) for found in re.findall(r"([\d.]+) s a model", done.stdout)]
    assert len(seconds) == 2
    assert float(re.findall(r"^ratio ([\d.]+)$", done.stdout, re.MULTILINE)[0]) > 0
