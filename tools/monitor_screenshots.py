"""Takes the pictures of the web page in docs/.

    python tools/monitor_screenshots.py --one RUN [--runs runs/quickstart]

The light one shows ``--one``, a run whose engines draw beside the training, as the timeline tells: in docs/ that is
seed 0 of `isentrope lab run --suite staleness -m partial_2`. The dark one compares the quickstart's runs, as
`make quickstart` leaves them; without them only the first is taken. Needs chromium and requirements/browser.txt.
"""

from __future__ import annotations

import argparse
import io
import shutil
import threading
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from pipeline.monitoring.web.server import PageServer
from pipeline.monitoring.web.view import RunView

ROOT = Path(__file__).resolve().parents[1]


def picture(browser: Browser, runs: list[Path], out: Path, scheme: str, width: int, height: int, hover: float) -> None:
    """One window of the page with the pointer over the entropy chart, at a share of its width."""
    with PageServer([RunView(run) for run in runs], "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        page.goto(server.url)
        page.wait_for_selector("#sample .tokens")
        page.wait_for_selector("#live:has-text('completed')")
        plot = page.locator("#band .u-over").first.bounding_box()
        page.mouse.move(plot["x"] + hover * plot["width"], plot["y"] + plot["height"] / 3)
        page.wait_for_timeout(300)  # the cursor follows with the next frame
        taken = Image.open(io.BytesIO(page.screenshot()))
        taken.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(out, optimize=True)
        page.close()
        server.shutdown()


def main() -> None:
    """Both pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", type=Path, required=True, help="run folder of the light picture")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "quickstart", help="folder of grpo, pi and scope")
    parser.add_argument("--chromium", default=shutil.which("chromium") or "chromium", help="the browser's program")
    arguments = parser.parse_args()
    compared = [arguments.runs / name for name in ("grpo", "pi", "scope")]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=arguments.chromium, args=["--no-sandbox", "--disable-gpu", "--font-render-hinting=none"]
        )
        picture(browser, [arguments.one], ROOT / "docs" / "monitor_web.png", "light", 1440, 2560, 0.61)
        if all(run.is_dir() for run in compared):
            picture(browser, compared, ROOT / "docs" / "monitor_web_dark.png", "dark", 1440, 1150, 0.61)
        browser.close()


if __name__ == "__main__":
    main()
