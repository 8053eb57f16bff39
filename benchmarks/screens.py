"""Screenshots of the README, the site, a report and `vidsieve ui`: light, dark, narrow and printed.

`python benchmarks/screens.py FOLDER` writes all of them to look at; it takes five minutes. Those of the documents are
written by `python benchmarks/screens.py docs --pages report,ui --looks light --height 1340`. Needs Chromium, which is
driven through a pipe, and what `make test` installs.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import markdown
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("readme", "home", "method", "report", "ui")
LOOKS: dict[str, dict[str, Any]] = {
    "light": {"width": 1280},
    "dark": {"width": 1280, "scheme": "dark"},
    "narrow": {"width": 400},
    "print": {"width": 718, "media": "print"},  # A4 between its margins
}
QUESTION = "what colour is the new seal ?"
SECONDS = 120.0
"""Most time that a page may take to be there."""
COLOURS = 128  # of the files' palettes, which keep them small
STYLE = """
:root { color-scheme: light dark; }
body { max-width: 55rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 sans-serif; }
h1, h2 { border-bottom: 1px solid #8886; padding-bottom: .3em; }
img { max-width: 100%; }
pre { padding: 1rem; overflow: auto; line-height: 1.45; }
pre, :not(pre) > code { background: #8882; font-size: 85%; }
table { border-collapse: collapse; display: block; overflow: auto; }
th, td { border: 1px solid #8886; padding: .4rem .8rem; }
"""


class Chromium:
    """A browser without a window, driven by its DevTools protocol over a pipe.

    Parameters
    ----------
    browser : name or path of the program
    folder : of its profile
    """

    def __init__(self, browser: str, folder: Path) -> None:
        program = shutil.which(browser)
        if program is None:
            raise SystemExit(f"no program {browser!r}: install Chromium, or name a browser of its kind with --browser")
        reads, self._write = os.pipe()
        self._read, writes = os.pipe()
        flags = ("--headless", "--no-sandbox", "--hide-scrollbars", "--remote-debugging-pipe")
        command = [program, *flags, f"--user-data-dir={folder}", "about:blank"]
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", f'exec "$@" 3<&{reads} 4>&{writes}', "sh", *command],
            pass_fds=(reads, writes),
            stderr=subprocess.DEVNULL,
        )
        os.close(reads)
        os.close(writes)
        self._numbers, self._session, self._buffer = itertools.count(1), {}, b""
        (target,) = (one for one in self("Target.getTargets")["targetInfos"] if one["type"] == "page")
        session = self("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = {"sessionId": session["sessionId"]}

    def __call__(self, method: str, **fields: Any) -> dict[str, Any]:
        """Return the answer to a command of the protocol."""
        number = next(self._numbers)
        os.write(self._write, json.dumps({"id": number, "method": method, "params": fields, **self._session}).encode())
        os.write(self._write, b"\0")
        while True:
            message = self._message()
            if message.get("id") == number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                return message["result"]

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            more = os.read(self._read, 2**20)
            if not more:
                raise SystemExit("the browser has ended")
            self._buffer += more
        text, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(text)

    def value(self, script: str, **fields: Any) -> Any:
        """Return what a script gives; its object, if ``returnByValue=False``."""
        answer = self("Runtime.evaluate", **{"expression": script, "returnByValue": True, **fields})
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script}: {answer['exceptionDetails'].get('exception', {}).get('description')}")
        return answer["result"].get("value", answer["result"].get("objectId"))

    def wait(self, script: str) -> None:
        """Wait until a script gives true."""
        end = time.monotonic() + SECONDS
        while not self.value(script):
            if time.monotonic() > end:
                raise SystemExit(f"not there after {SECONDS:g} seconds: {script}")
            time.sleep(0.2)

    def open(self, address: str, *, width: int, scheme: str = "light", media: str = "screen") -> None:
        """Open a page as it looks at a width, in a colour scheme, on a screen or printed."""
        self("Page.navigate", url="about:blank")
        self.wait("location.href == 'about:blank'")
        self("Storage.clearDataForOrigin", origin="file://", storageTypes="all")  # the site remembers its colours
        self("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self("Emulation.setEmulatedMedia", media=media, features=features)
        self("Page.navigate", url=address)
        self.wait(f"location.href.startsWith({json.dumps(address)}) && document.readyState == 'complete'")

    def picture(self, height: int | None) -> Image.Image:
        """Return the page from its top, down to a height or its end."""
        moving = "one.playState == 'running' && one.effect.getComputedTiming().iterations != Infinity"
        self.wait(f"!document.getAnimations().some((one) => {moving})")
        size = self("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], height or 9000), "scale": 1}
        taken = self("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        return Image.open(io.BytesIO(base64.b64decode(taken["data"]))).convert("RGB")

    def close(self) -> None:
        """End the browser."""
        self("Browser.close")
        self._process.wait(30)


def vidsieve(*words: str | Path, cwd: Path) -> None:
    """Run a command."""
    subprocess.run([sys.executable, "-m", "vidsieve", *words], cwd=cwd, check=True)


def readme(folder: Path) -> str:
    """Return the address of the README as a page, roughly as GitHub shows it."""
    text = markdown.markdown((ROOT / "README.md").read_text("utf-8"), extensions=["tables", "fenced_code"])
    page = folder / "readme.html"
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><base href="{ROOT.as_uri()}/">'
    page.write_text(f"<!doctype html>{head}<style>{STYLE}</style>{text}", "utf-8")
    return page.as_uri()


def site(folder: Path) -> Path:
    """Return the folder of the built site."""
    built = folder / "site"
    if not built.exists():
        command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", built]
        subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    return built


def report(folder: Path) -> str:
    """Return the address of the report of a run."""
    vidsieve("testbed", "render", "scenes", cwd=folder)
    methods = ("--methods", "cacovid,divprune", "--retention", "0.25,0.1")
    run = ("--model", "testbed", *methods, "--subset", "48", "--indices", "--out", "runs/clips")
    vidsieve("eval", "questions", "scenes/questions.jsonl", *run, cwd=folder)
    vidsieve("report", "runs/clips", "report.html", "--videos", "1", cwd=folder)
    return (folder / "report.html").as_uri()


@contextlib.contextmanager
def served() -> Iterator[str]:
    """Run `vidsieve ui`; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-m", "vidsieve", "ui", "--port", str(port)])
    try:
        end = time.monotonic() + SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                if server.poll() is not None or time.monotonic() > end:
                    raise SystemExit("vidsieve ui does not listen") from None
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.terminate()
        server.wait(60)


def ask(browser: Chromium, clip: Path) -> None:
    """Upload a clip to the page of `vidsieve ui`, ask about it, and wait for the picture of what was kept."""
    browser.wait("document.querySelector('input[type=file]') !== null")
    chooser = browser.value("document.querySelector('input[type=file]')", returnByValue=False)
    browser("DOM.setFileInputFiles", files=[str(clip)], objectId=chooser)
    browser.wait("document.querySelector('video')?.readyState >= 2")
    browser.value("document.querySelector('textarea').focus()")
    browser("Input.insertText", text=QUESTION)
    browser.value("[...document.querySelectorAll('button')].find((one) => one.innerText == 'Ask').click()")
    browser.wait("[...document.images].some((one) => one.width > 200 && one.src.startsWith('data:') && one.complete)")
    browser.wait("document.activeElement.blur(), true")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where the pictures go")
    parser.add_argument("--pages", default=",".join(PAGES), help="comma-separated (default: %(default)s)")
    parser.add_argument("--looks", default=",".join(LOOKS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--height", type=int, help="pixels from the top (default: the whole page)")
    parser.add_argument("--browser", default="chromium", help="Chromium, or a browser of its kind")
    options = parser.parse_args()
    pages, looks = options.pages.split(","), options.looks.split(",")
    if wrong := [*set(pages) - set(PAGES), *set(looks) - set(LOOKS)]:
        parser.error(f"{', '.join(wrong)}: pages are {', '.join(PAGES)}, looks are {', '.join(LOOKS)}")
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="vidsieve-screens-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        browser = Chromium(options.browser, folder / "profile")
        stack.callback(browser.close)
        addresses: dict[str, Callable[[], str]] = {
            "readme": lambda: readme(folder),
            "home": lambda: (site(folder) / "index.html").as_uri(),
            "method": lambda: (site(folder) / "methods" / "cacovid.html").as_uri(),
            "report": lambda: report(folder),
            "ui": lambda: stack.enter_context(served()),
        }
        for page in pages:
            address = addresses[page]()
            if page == "ui" and not (folder / "scenes").exists():
                vidsieve("testbed", "render", "scenes", cwd=folder)
            for look in looks:
                browser.open(address, **LOOKS[look])
                if page == "ui":
                    ask(browser, folder / "scenes" / "scene-0000.mp4")
                file = options.folder / (f"{page}.png" if look == "light" else f"{page}-{look}.png")
                picture = browser.picture(options.height)
                picture.quantize(COLOURS, kmeans=3, dither=Image.Dither.NONE).save(file, optimize=True)
                print(f"{file}: {picture.width}x{picture.height}, {file.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
