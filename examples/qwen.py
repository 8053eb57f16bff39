"""Ask Qwen2.5-VL or Qwen3-VL about a video, with all of its tokens and with a part of them.

    python examples/qwen.py clip.mp4 "What happens in this video?" --methods divprune,vidcom2 --retention 0.1

The weights come from the Hugging Face Hub: 16 GB for the default model, 4 GB for Qwen/Qwen3-VL-2B-Instruct. Without a
GPU an answer takes minutes. Every answer is greedy; the first one is the model's own.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import vidsieve
from vidsieve.adapters.encoded import on_device
from vidsieve.answering import chat


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", help="a video file, or a folder of frames")
    parser.add_argument("question")
    parser.add_argument("--model", default="Qwen/Qwen2.5-VL-7B-Instruct", help="Hub name or folder")
    parser.add_argument(
        "--methods", default="divprune", help="names, comma-separated; a trained one: a policy's folder"
    )
    parser.add_argument("--retention", type=float, default=0.1, help="fraction of the video tokens kept")
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForImageTextToText.from_pretrained(options.model, dtype="auto").to(device)
    processor = AutoProcessor.from_pretrained(options.model)
    video = vidsieve.read_video(options.video, frames=options.frames)
    inputs = on_device(chat(processor, video, options.question), device)
    template = vidsieve.Template.of(processor)  # where a question-aware method finds the question

    def generate() -> tuple[str, float]:
        start = time.perf_counter()
        ids = model.generate(**inputs, max_new_tokens=options.max_new_tokens, do_sample=False)
        new = ids[:, inputs["input_ids"].shape[1] :]
        return processor.batch_decode(new, skip_special_tokens=True)[0].strip(), time.perf_counter() - start

    def show(label: str, answer: tuple[str, float]) -> None:
        print(f"{label} ({answer[1]:.1f} s): {answer[0]}", flush=True)

    generate()  # what the first call alone takes, such as compiling kernels
    show("all tokens", generate())
    for name in options.methods.split(","):
        method: Any = vidsieve.load(name, retention=options.retention)
        with vidsieve.attach(model, method, template=template) as session:
            answer = generate()
        trace = session.trace.videos[0]
        show(f"{method.describe()}: {trace.kept} of {trace.total} video tokens", answer)


if __name__ == "__main__":
    main()
