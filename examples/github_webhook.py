"""Receive GitHub's webhooks: signed, answered at once, run in the background, each delivery once.

Put GITHUB_WEBHOOK_SECRET into .env.local; the webhook's URL is https://<your host>/function/github_webhook.
"""
import sqlite3

SETTINGS = {"verify": "github", "async": True, "dedupe": "X-GitHub-Delivery", "methods": ["POST"]}


def main(request):
    event, sent = request.headers.get("X-GitHub-Event"), request.get_json()
    with sqlite3.connect("serverless.db") as db:
        db.execute("CREATE TABLE IF NOT EXISTS pushes (repository TEXT, ref TEXT, pusher TEXT)")
        if event == "push":
            db.execute("INSERT INTO pushes VALUES (?, ?, ?)",
                       (sent["repository"]["full_name"], sent["ref"], sent["pusher"]["name"]))
    print(event, "received")
