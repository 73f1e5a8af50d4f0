"""Exit with 0 if the container's page (port 7860) or its API (port 8000) is healthy."""

from http.client import HTTPConnection, HTTPException


def is_healthy(port: int) -> bool:
    """Return whether /healthz on that port answers with 200."""
    connection = HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False


raise SystemExit(not any(map(is_healthy, (7860, 8000))))
