"""The dashboard's pages as a person uses them: open the form, fill it in, look at a run. Driven by Playwright."""

import contextlib
import ctypes
import fcntl
import io
import os
import re
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from playwright.sync_api import Error as PlaywrightError
from playwright.sync_api import Page, Request, Response, expect, sync_playwright
from playwright.sync_api import TimeoutError as PlaywrightTimeout

CHROMIUM = Path("/usr/bin/chromium")
QUIET = [  # without these a browser looks up its maker's hosts at every start
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
OUTSIDE = re.compile(r"^(https?|wss?)://(?!127\.0\.0\.1[:/])")
NEW_NETWORK = 0x40000000  # CLONE_NEWNET of linux/sched.h
CLICK_SECONDS = 10  # to wait for the answer to a click on Submit
SECONDS = 60  # to wait for something in a page: cores may be busy

# Pages draw five times per second instead of sixty, without animations. Here a processor draws what otherwise a
# graphics card does.
FEWER_FRAMES = """
const still = new CSSStyleSheet();
still.replaceSync("*, *::before, *::after { animation: none !important; transition: none !important; }");
document.adoptedStyleSheets = [...document.adoptedStyleSheets, still];
window.requestAnimationFrame = draw => setTimeout(() => draw(performance.now()), 200);
window.cancelAnimationFrame = number => clearTimeout(number);
"""

# How many colours an image has; one that failed to load has none.
COLOURS = """image => {
  if (!image.complete || !image.naturalWidth) return 0;
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  const pixels = new Uint32Array(context.getImageData(0, 0, canvas.width, canvas.height).data.buffer);
  return new Set(pixels).size;
}"""


@contextlib.contextmanager
def network_without_outside() -> Iterator[bool]:
    """Let this thread, and what it starts, see a network with nothing but loopback; whether that is permitted."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/thread-self/ns/net") as before:
        permitted = libc.unshare(NEW_NETWORK) == 0
        try:
            if permitted:
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
                    up = struct.pack("16sH14x", b"lo", 0x1 | 0x40)  # IFF_UP | IFF_RUNNING of linux/if.h
                    fcntl.ioctl(any_socket, 0x8914, up)  # SIOCSIFFLAGS
            yield permitted
        finally:
            if permitted and libc.setns(before.fileno(), NEW_NETWORK) != 0:
                raise OSError(ctypes.get_errno(), "cannot return to the network of before")


def is_new_run(message: Request | Response) -> bool:
    """Whether a form asks for a run, or the server answers it."""
    request = message.request if isinstance(message, Response) else message
    return request.method == "POST" and request.url.endswith("/create_flow_run")


class Ui:
    """One browser on the dashboard's pages."""

    def __init__(self, context, address: str, screenshots: Path):
        self.context, self.address, self.screenshots = context, address, screenshots
        self.outside: list[str] = []  # what the pages asked of other hosts
        context.set_default_timeout(1000 * SECONDS)
        context.add_init_script(FEWER_FRAMES)
        self.waiting = 0  # runs that the form has asked for, without an answer yet
        context.on("request", lambda request: self._note(request.url))
        context.on("request", lambda request: self._count(request, 1))
        for end in ("requestfinished", "requestfailed"):
            context.on(end, lambda request: self._count(request, -1))
        context.on("page", lambda page: page.on("websocket", lambda websocket: self._note(websocket.url)))
        context.route(OUTSIDE, lambda route: route.abort())
        self.page = context.new_page()

    def _note(self, url: str) -> None:
        if OUTSIDE.match(url):
            self.outside.append(url)

    def _count(self, request: Request, change: int) -> None:
        self.waiting += change * is_new_run(request)

    def shot(self, name: str, page: Page | None = None) -> None:
        """A picture of the page as it is."""
        (page or self.page).screenshot(path=self.screenshots / f"{name}.png")

    def open_form(self, deployment: str) -> None:
        """From the list of deployments to the form of a run."""
        self.page.goto(f"{self.address}/deployments")
        self.page.get_by_role("link", name=deployment, exact=True).click()
        self.page.get_by_role("button", name="Run", exact=True).click()
        self.page.locator(".p-overflow-menu-item", has_text="Custom run").click()
        self.page.locator(".flow-run-name-input").wait_for()

    def parameter(self, name: str):
        """A parameter's part of the form."""
        label = self.page.locator(".schema-form-property__label", has_text=re.compile(rf"^{name}( |$)"))
        return self.page.locator(".schema-form-property", has=label).last

    def choose(self, parameter: str, value: str) -> None:
        """Pick a value from a parameter's list, by a click in the middle of it."""
        self.parameter(parameter).locator(".p-select-button__control").click()
        self.page.get_by_role("option", name=value, exact=True).click()

    def add(self, parameter: str, *values: str) -> None:
        """Add an item to a list, and type into its fields."""
        part = self.parameter(parameter)
        fields = part.locator("textarea, input[type=number]")
        before = fields.count()
        part.get_by_role("button", name="Add item").click()
        for i, value in enumerate(values):
            fields.nth(before + i).fill(value)

    def submit(self) -> str:
        """Send the form; the id of the run that the server has made.

        A click may be lost while the form still takes in what was typed, and the server answers 5xx while SQLite is
        busy. In both cases no run was made, and a person would click again, too.
        """
        self.page.wait_for_timeout(500)  # the form takes in what was typed a little later
        button = self.page.get_by_role("button", name="Submit")
        deadline = time.monotonic() + SECONDS
        answer = None
        while answer is None or answer.status >= 500:
            assert time.monotonic() < deadline, f"no run was made: {answer and answer.text()}; {self.text()[-500:]}"
            with contextlib.suppress(PlaywrightTimeout):
                with self.page.expect_response(is_new_run, timeout=1000 * CLICK_SECONDS) as answered:
                    if self.waiting == 0:  # else the server takes its time: a second click would make a second run
                        button.dispatch_event("click")  # the button may be below a message
                answer = answered.value
        assert answer.ok, answer.text()
        return answer.json()["id"]

    def rest(self) -> None:
        """Show nothing. The page of a run is drawn anew all the time, which takes a core away from the run."""
        self.page.goto("about:blank")

    def open_run(self, run: str, tab: str = "Logs") -> None:
        """A run's page."""
        self.page.goto(f"{self.address}/runs/flow-run/{run}")
        self.tab(tab)

    def tab(self, name: str) -> None:
        """One of the tabs of the page."""
        self.page.get_by_text(name, exact=True).click()

    def open_artifact(self, name: str) -> None:
        """An artifact from the cards of the run's tab."""
        self.page.locator(".artifact-card__title", has_text=re.compile(rf"^{name}$")).click()
        self.page.wait_for_url(re.compile("/artifacts/artifact/"))
        expect(self.page.get_by_text("Show raw data")).to_be_visible()

    def see(self, text: str | re.Pattern, seconds: float = SECONDS) -> None:
        """Wait until the page shows a text."""
        expect(self.page.locator("body")).to_contain_text(text, timeout=1000 * seconds)

    def text(self) -> str:
        """What the page shows now; nothing while it is being loaded."""
        try:
            return self.page.inner_text("body", timeout=1000)
        except PlaywrightError:
            return ""

    def rows(self) -> list[list[str]]:
        """The table in the page, its head first."""
        rows = self.page.locator("table tr")
        rows.nth(1).wait_for()
        return rows.evaluate_all("rows => rows.map(row => [...row.cells].map(cell => cell.innerText.trim()))")

    def colours_of_images(self) -> list[int]:
        """How many colours each image of the text has."""
        return [image.evaluate(COLOURS) for image in self.page.locator("article img").all()]

    def colours_of_timeline(self) -> dict[tuple[int, int, int], int]:
        """The colours that the run's timeline is drawn in, with their numbers of pixels."""
        picture = Image.open(io.BytesIO(self.page.locator("canvas").first.screenshot())).convert("RGB")
        return {colour: count for count, colour in picture.getcolors(picture.width * picture.height)}


@contextlib.contextmanager
def browser(address: str, screenshots: Path) -> Iterator[Ui]:
    """A headless chromium."""
    screenshots.mkdir(parents=True, exist_ok=True)
    expect.set_options(timeout=1000 * SECONDS)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET, env=dict(os.environ))
        try:
            context = chromium.new_context(viewport={"width": 1280, "height": 1000})
            yield Ui(context, address, screenshots)
        finally:
            chromium.close()
