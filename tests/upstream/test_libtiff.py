"""libtiff says nothing of a damaged file; Pillow raises what is wrong."""

import subprocess
import sys
import textwrap

CUT = """
    import io, warnings
    from PIL import Image
    from vlmfix.upstream import libtiff

    warnings.simplefilter("ignore")
    if {silent}:
        libtiff.silence()
    file = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(file, "TIFF", compression="tiff_lzw")
    damaged = file.getvalue().replace(file.getvalue()[8:40], bytes(32))
    try:
        Image.open(io.BytesIO(damaged)).load()
    except OSError as error:
        print(type(error).__name__)
"""


def said(silent):
    script = textwrap.dedent(CUT.format(silent=silent))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return done.stdout, done.stderr


def test_libtiff_is_silenced():
    out, loud = said(False)
    assert out == "OSError\n"
    assert loud
    assert said(True) == (out, "")
