"""Draws Vega-Lite figures: `render.py FOLDER` writes NAME.png and NAME.pdf for each of the specifications in the JSON
object on stdin; `render.py` alone prints the script that draws them in a browser.

A program of its own: its JavaScript engine takes 200 MiB that a process never gives back, and nothing of Rampart.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import vl_convert
from PIL import Image


def main() -> None:
    if len(sys.argv) == 1:
        # Its type says that an argument is needed; without one the bundle is what a page needs.
        sys.stdout.buffer.write(vl_convert.javascript_bundle().encode())  # type: ignore[call-arg]
        return
    folder = Path(sys.argv[1])
    for name, spec in json.load(sys.stdin.buffer).items():
        drawn = Image.open(io.BytesIO(vl_convert.vegalite_to_png(spec, scale=2)))
        # In a palette it takes a sixth to a tenth of the room; there are few colours but for those of smoothed edges.
        drawn.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(folder / f"{name}.png", optimize=True)
        (folder / f"{name}.pdf").write_bytes(vl_convert.vegalite_to_pdf(spec))


if __name__ == "__main__":
    main()
