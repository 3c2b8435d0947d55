"""The server's pages: the version that is served, what they may call, and what is mended in them (pages.js).

The server unpacks its pages into a directory of ours, `prefect server start` alone into its own package.
"""

import base64
import hashlib
from pathlib import Path

SCRIPT = Path(__file__).with_suffix(".js")


def only_first_version(directory: Path) -> None:
    """Let the server unpack the first version of its pages into `directory` and not the second.

    Those of the second call a host outside, whatever the settings say, and the first invite to them where both are
    there. A link to nowhere stands where the second would be unpacked: the server notes that it cannot, and goes on.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / "v2").is_symlink():
        (directory / "v2").symlink_to("not-wanted")


def mend(directory: Path, server_url: str) -> None:
    """Put the policy and the script into the first version's page, once the server has unpacked it."""
    page, script = directory / "v1" / "index.html", SCRIPT.read_text()
    begin, end = "<!-- mended -->", "<!-- -->"
    meta = f'<meta http-equiv="Content-Security-Policy" content="{policy(server_url, script)}">'
    text = page.read_text()
    if begin in text:  # by an earlier start, perhaps on another port
        text = text.partition(begin)[0] + text.partition(end)[2]
    page.write_text(text.replace("<head>", f"<head>{begin}{meta}<script>{script}</script>{end}", 1))


def policy(server_url: str, script: str) -> str:
    """What the browser may load and call from the pages: this server, and nobody else.

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
