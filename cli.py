"""What the command lines of all scripts share: types of flags, and one line on stderr with exit status 2 for bad input."""

import argparse
import sys
from fractions import Fraction


class Parser(argparse.ArgumentParser):
    """argparse, with errors on one line and the default of every flag in its help."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message):
        message = " ".join(str(message).split())
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        raise SystemExit(2)


def _checked(convert, accept, wanted):
    def parse(text):
        try:
            value = convert(text)
            if accept(value):
                return value
        except (ValueError, ZeroDivisionError):
            pass
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")

    return parse


positive_int = _checked(int, lambda v: v > 0, "an integer above 0")
natural_int = _checked(int, lambda v: v >= 0, "an integer of 0 or more")
positive_float = _checked(float, lambda v: 0 < v < float("inf"), "a number above 0")
natural_float = _checked(float, lambda v: 0 <= v < float("inf"), "a number of 0 or more")
unit_float = _checked(float, lambda v: 0 <= v <= 1, "a number in [0, 1]")


def ratio(text):
    """"8/255" or "0.031", as given, after a check that it lies in (0, 1]: images have values in [0, 1]."""
    _checked(Fraction, lambda v: 0 < v <= 1, "a fraction or decimal in (0, 1], such as 8/255 or 0.031")(text)
    return text
