"""nbval compares a notebook's printed text with what is stored; this adds the pictures, the numbers that were computed
live (lines that begin with "~ ", equal within 0.03), and that every code cell was run."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

TOLERANCE = 0.03  # of numbers after "~ ": gradient signs flip between CPUs
RMS = 3.0  # of 255, between a stored and a fresh picture: another title is 4.5, other data about 20


def pictures_in(outputs):
    return [base64.b64decode(o["data"]["image/png"]) for o in outputs if "image/png" in o.get("data", {})]


def live_lines(outputs):
    text = "".join(o.get("text", "") for o in outputs if o.get("output_type") == "stream")
    return re.findall(r"^~ .*", text, re.M)


def check_picture(stored, fresh):
    """AssertionError unless two PNGs look the same."""
    stored, fresh = (np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), dtype=float) for png in (stored, fresh))
    assert stored.shape == fresh.shape, f"the picture is now {fresh.shape}, stored {stored.shape}"
    rms = np.sqrt(np.mean((stored - fresh) ** 2))
    assert rms <= RMS, f"the picture differs from the stored one by an RMS of {rms:.1f} of 255"


def check_live_line(stored, fresh):
    """AssertionError unless two lines are equal but for numbers that differ by TOLERANCE at most."""
    number = r"-?\d+(?:\.\d+)?"
    assert re.sub(number, "#", stored) == re.sub(number, "#", fresh), f"stored {stored!r}, now {fresh!r}"
    pairs = zip(re.findall(number, stored), re.findall(number, fresh), strict=True)
    assert all(abs(float(a) - float(b)) <= TOLERANCE for a, b in pairs), f"stored {stored!r}, now {fresh!r}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    outcome = yield
    cell = getattr(item, "cell", None)
    if cell is not None and item.test_outputs is not None:
        assert cell.execution_count, "this cell was never run"
        for of, check in ((pictures_in, check_picture), (live_lines, check_live_line)):
            stored, fresh = of(cell.outputs), of(item.test_outputs)
            assert len(stored) == len(fresh), f"{len(fresh)} where {len(stored)} are stored"
            for pair in zip(stored, fresh, strict=True):
                check(*pair)
    return outcome
