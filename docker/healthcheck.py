"""Exit with 0 if what the container runs is healthy: the page (port 7860), or the API of `serve`.

The page's container can have an API too, as a job: it is not healthy by that.
"""

from http.client import HTTPConnection, HTTPException
from pathlib import Path


def is_healthy(port: int) -> bool:
    """Return whether /healthz on that port answers with 200."""
    connection = HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False


# The first process is tini, with the container's command in its arguments.
command = Path("/proc/1/cmdline").read_bytes().partition(b"/entrypoint.py\0")[2]
raise SystemExit(not is_healthy(8000 if command.startswith(b"serve\0") else 7860))
