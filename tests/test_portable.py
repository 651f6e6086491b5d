"""Every module imports on Windows, which has no fcntl, and on macOS, which has no os.sched_getaffinity; reproduce.py
works without them, too."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
WITHOUT = """
import importlib, os, sys
sys.modules["fcntl"] = None  # importing it raises ImportError
if hasattr(os, "sched_getaffinity"):
    del os.sched_getaffinity
"""
IMPORT = """
failed = {}
for module in MODULES:
    try:
        importlib.import_module(module)
    except Exception as error:
        failed[module] = repr(error)
assert not failed, failed
"""
USE = """
import reproduce, torch
torch.cuda.device_count = lambda: 0
assert 1 <= len(reproduce.job_slots()) <= 4
os.chdir(FOLDER)
reproduce.missing_and_differing = lambda cell: ({}, [])
reproduce.commands_left = lambda cell: []
cell = reproduce.Cell("table3", "digits", "mart", 1)
list(reproduce.finish(cell, {}, []))
assert (cell.run / "output.log").exists()
"""


def passes(code):
    done = subprocess.run([sys.executable, "-c", WITHOUT + code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_module_imports():
    modules = sorted(path.stem for path in ROOT.glob("*.py"))
    assert len(modules) > 10
    passes(f"MODULES = {modules}{IMPORT}")


def test_reproduce_counts_cores_and_opens_its_log(tmp_path):
    passes(f"FOLDER = {str(tmp_path)!r}{USE}")
