"""The server's pages: which version is served, what the pages may call, and four corrections to them (pages.js).

The server puts its pages into a directory of ours; `prefect server start` alone would put them into its package.
"""

import base64
import hashlib
from pathlib import Path

SCRIPT = Path(__file__).with_suffix(".js")


def only_first_version(directory: Path) -> None:
    """Let the server put the first version of its pages into `directory`, and not the second.

    Pages of the second version call an outside host, whatever the settings say. A dangling link stands where the second
    version would be written: the server logs that it cannot write there, and goes on.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / "v2").is_symlink():
        (directory / "v2").symlink_to("not-wanted")


def correct(directory: Path, server_url: str) -> None:
    """Put the content policy and the script into the page of the first version, which the server has written."""
    page, script = directory / "v1" / "index.html", SCRIPT.read_text()
    begin, end = "<!-- corrected -->", "<!-- -->"
    meta = f'<meta http-equiv="Content-Security-Policy" content="{policy(server_url, script)}">'
    text = page.read_text()
    if begin in text:  # by an earlier start, perhaps on another port
        text = text.partition(begin)[0] + text.partition(end)[2]
    page.write_text(text.replace("<head>", f"<head>{begin}{meta}<script>{script}</script>{end}", 1))


def policy(server_url: str, script: str) -> str:
    """The content policy: the browser may load from and call this server only.

    The pages call the server by `server_url`, also where they were opened under another name of this machine.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = {
        "default-src": "'self'",
        "connect-src": f"'self' {server_url} {server_url.replace('http', 'ws', 1)}",
        "script-src": f"'self' 'unsafe-eval' 'sha256-{digest}'",  # the timeline compiles its shaders
        "style-src": "'self' 'unsafe-inline'",
        "img-src": "'self' data: blob:",
        "font-src": "'self' data:",
        "worker-src": "'self' blob:",
    }
    return "; ".join(f"{kind} {sources}" for kind, sources in allowed.items())
