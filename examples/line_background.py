"""A LINE bot that takes its time: the webhook is checked and answered at once, the reply is made in the background.

Put LINE_CHANNEL_SECRET and LINE_CHANNEL_ACCESS_TOKEN into .env.local; the webhook's URL is
https://<your host>/function/line_background. Nothing needs to be installed.
"""
import json
import urllib.request

SETTINGS = {"verify": "line", "async": True, "methods": ["POST"], "retries": 1}


def main(request, config):
    for event in request.get_json()["events"]:
        if event["type"] == "message" and event["message"]["type"] == "text":
            push(config["LINE_CHANNEL_ACCESS_TOKEN"], event["source"]["userId"], f"You said: {event['message']['text']}")


def push(token, user, text):
    """Send a message; a reply token would be too old after a retry."""
    body = json.dumps({"to": user, "messages": [{"type": "text", "text": text}]}).encode()
    urllib.request.urlopen(urllib.request.Request("https://api.line.me/v2/bot/message/push", body, {
        "Content-Type": "application/json", "Authorization": f"Bearer {token}"}), timeout=20)
