"""The time, once a second, as server-sent events: curl -N http://127.0.0.1:8000/function/clock?n=5"""
import time

from flask import Response


def main(request):
    def ticks():
        for _ in range(min(3600, request.args.get("n", 10, type=int))):
            yield f"data: {time.strftime('%H:%M:%S')}\n\n"
            time.sleep(1)

    return Response(ticks(), mimetype="text/event-stream", headers={"Cache-Control": "no-cache"})
