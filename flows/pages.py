"""The server's pages: the version that is served, what they may call, and a mended select.

The server unpacks its pages into a directory of ours, `prefect server start` alone into its own package.
"""

import base64
import hashlib
from pathlib import Path

# A click on a select is handled twice in Prefect 3.8.8, by the button and by what holds it, so that the list closes at
# once; only the arrow beside the button opens it. With this the button passes clicks on and handles none itself.
SELECT = """
addEventListener("click", (event) => {
  const button = event.target.closest?.("button");
  if (button?.matches(".p-select-button__control")) {
    event.stopPropagation();
    button.parentElement.dispatchEvent(new MouseEvent("click", {bubbles: true}));
  }
}, true);
"""


def only_first_version(directory: Path) -> None:
    """Let the server unpack the first version of its pages into `directory` and not the second.

    Those of the second call a host outside, whatever the settings say, and the first invite to them where both are
    there. A link to nowhere stands where the second would be unpacked: the server notes that it cannot, and goes on.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / "v2").is_symlink():
        (directory / "v2").symlink_to("not-wanted")


def mend(directory: Path, server_url: str) -> None:
    """Put the policy and the script above into the first version's page, once the server has unpacked it."""
    page = directory / "v1" / "index.html"
    text = page.read_text()
    if SELECT not in text:
        head = f'<meta http-equiv="Content-Security-Policy" content="{policy(server_url)}"><script>{SELECT}</script>'
        page.write_text(text.replace("<head>", f"<head>\n{head}", 1))


def policy(server_url: str) -> str:
    """What the browser may load and call from the pages: this server, and nobody else.

    The pages call the server by `server_url`, also where they were opened under another name of this machine.
    """
    digest = base64.b64encode(hashlib.sha256(SELECT.encode()).digest()).decode()
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
