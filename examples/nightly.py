"""Clean up every night at half past three."""
import pathlib
import time

SETTINGS = {"schedule": "30 3 * * *", "auth": "internal"}


def main(request):
    removed = 0
    for path in pathlib.Path("uploads").glob("*"):
        if path.is_file() and time.time() - path.stat().st_mtime > 30 * 86400:
            path.unlink()
            removed += 1
    return {"removed": removed}
