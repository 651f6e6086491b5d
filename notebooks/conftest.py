"""nbval compares a notebook's printed text with what is stored; this adds the pictures, the numbers that were computed
live (lines that begin with "~ ", equal within 0.03), and that every code cell was run."""

import base64
import copy
import io
import os
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

TOLERANCE = 0.03  # of numbers after "~ ": gradient signs flip between CPUs
RMS = 3.0  # of 255, between a stored and a fresh picture: another title is 4.5, other data about 20
RMS_ATTACKED = 8.0  # for cells tagged "attacked": with other convolution kernels 32/255 examples gave 3.4


def pictures_in(outputs):
    return [base64.b64decode(o["data"]["image/png"]) for o in outputs if "image/png" in o.get("data", {})]


def live_lines(outputs):
    text = "".join(o.get("text", "") for o in outputs if o.get("output_type") == "stream")
    return re.findall(r"^~ .*", text, re.M)


def check_picture(stored, fresh, limit=RMS):
    """AssertionError unless two PNGs look the same."""
    stored, fresh = (np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), dtype=float) for png in (stored, fresh))
    assert stored.shape == fresh.shape, f"the picture is now {fresh.shape}, stored {stored.shape}"
    rms = np.sqrt(np.mean((stored - fresh) ** 2))
    assert rms <= limit, f"the picture differs from the stored one by an RMS of {rms:.1f} of 255"


def check_live_line(stored, fresh):
    """AssertionError unless two lines are equal but for numbers that differ by TOLERANCE at most."""
    number = r"-?\d+(?:\.\d+)?"
    assert re.sub(number, "#", stored) == re.sub(number, "#", fresh), f"stored {stored!r}, now {fresh!r}"
    pairs = zip(re.findall(number, stored), re.findall(number, fresh), strict=True)
    assert all(abs(float(a) - float(b)) <= TOLERANCE for a, b in pairs), f"stored {stored!r}, now {fresh!r}"


def check_outputs(stored, fresh, attacked=False):
    """AssertionError unless two lists of outputs show the same pictures and live numbers."""
    for of, check, limit in ((pictures_in, check_picture, [RMS_ATTACKED if attacked else RMS]),
                             (live_lines, check_live_line, [])):
        a, b = of(stored), of(fresh)
        assert len(a) == len(b), f"{len(b)} where {len(a)} are stored"
        for pair in zip(a, b, strict=True):
            check(*pair, *limit)


def pytest_configure(config):
    """nbval's flags, where it is installed: in pyproject.toml they would end every pytest that has no nbval."""
    if hasattr(config.option, "nbval"):
        config.option.nbval = config.option.nbval_current_env = True
        config.option.nbval_sanitize_with = str(pathlib.Path(__file__).with_name("sanitize.cfg"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Before nbval starts a kernel: beside other programs two threads take many times the CPU time of one."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    cell = getattr(item, "cell", None)
    stored = copy.deepcopy(cell.outputs) if cell is not None else None  # nbval merges streams in place
    outcome = yield
    if cell is not None and item.test_outputs is not None:
        assert cell.execution_count, "this cell was never run"
        check_outputs(stored, item.test_outputs, "attacked" in cell.metadata.get("tags", ()))
    return outcome
