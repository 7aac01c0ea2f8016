"""Work that ends in every possible way; by itself, because every process that does it imports its module."""

import os
import time

from tools.study.clock import OutOfTimeError
from vlmfix.errors import DataError


def double(number):
    if number == 3:
        raise DataError("three", "take another number")
    if number == 4:
        raise ZeroDivisionError("four")
    if number == 5:
        raise OutOfTimeError
    return 2 * number


def gpu_of_process() -> str:
    """The GPU that this process sees; not at once, so that another process takes the next job."""
    time.sleep(1)
    return os.environ["CUDA_VISIBLE_DEVICES"]
