"""The README's picture: a clip of the testbed, the tokens that two methods keep of it, and the answers from them.

`vidsieve testbed render scenes` and then `python benchmarks/picture.py scenes docs/kept.png`.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

from PIL import Image

import vidsieve
from vidsieve.answering import answer
from vidsieve.loading import load_model
from vidsieve.report.pictures import kept_figure

CLIP, QUESTION = "scene-0000.mp4", "what colour is the new seal ?"
METHODS = {"cacovid": {"policy": "testbed"}, "divprune": {}}
COLOURS = 128  # of the file's palette, which keeps it small


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenes", type=Path, help="folder that `vidsieve testbed render` wrote")
    parser.add_argument("file", type=Path, help="the picture to write, .png")
    parser.add_argument("--retention", type=float, default=0.1)
    options = parser.parse_args()
    rows = map(json.loads, (options.scenes / "questions.jsonl").read_text("utf-8").splitlines())
    (correct,) = (row["answer"] for row in rows if (row["video"], row.get("question")) == (CLIP, QUESTION))
    model, processor = load_model("testbed")
    video = vidsieve.read_video(options.scenes / CLIP, frames=16)
    kept = {}
    for name, fields in METHODS.items():
        method = vidsieve.load(name, retention=options.retention, **fields)
        reply = answer(model, processor, video, QUESTION, method, max_new_tokens=4)
        (trace,) = reply.traces
        kept[f"{name}: {reply.text} {'✓' if reply.text == correct else '✗'}"] = trace.indices
    text = answer(model, processor, video, QUESTION, max_new_tokens=4).text
    title = f"“{QUESTION}”   all tokens: {text} {'✓' if text == correct else '✗'}"
    figure = kept_figure(video.pixels, trace.grid, kept, title, columns=6)
    figure.set_figheight(4.6)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=100, format="png")
    picture = Image.open(drawn).convert("RGB").quantize(COLOURS, kmeans=3, dither=Image.Dither.NONE)
    picture.save(options.file, optimize=True)
    print(f"{options.file}: {options.file.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
