"""Keep libtiff, which Pillow reads TIFF files with, from writing to standard error."""

from __future__ import annotations

import ctypes

from PIL import _imaging


def silence() -> None:
    """Takes libtiff's own handlers for errors and warnings away; what it says of a damaged file, Pillow raises too.

    This holds for the whole process. A Pillow that was built without libtiff has nothing to silence.
    """
    library = ctypes.CDLL(_imaging.__file__)  # finds what Pillow's own module is linked with
    for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
        install = getattr(library, name, None)
        if install is not None:
            install.argtypes, install.restype = [ctypes.c_void_p], ctypes.c_void_p
            install(None)
