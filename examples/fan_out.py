"""Fetch many pages, each in a call of its own: /function/fan_out starts them, their ids are the answer."""
import urllib.request

from fnserve import enqueue, jsonify

PAGES = ["https://example.com/", "https://example.org/", "https://example.net/"]


def main(request):
    if request.is_json:  # one of the queued calls: a failure is tried again, the others go on
        url = request.get_json()["url"]
        with urllib.request.urlopen(url, timeout=20) as answer:
            return {"url": url, "bytes": len(answer.read())}
    return jsonify([enqueue("fan_out", json={"url": url}, delay=number) for number, url in enumerate(PAGES)])
