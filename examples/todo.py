"""A small JSON API over sqlite3: GET, POST, PUT and DELETE on /function/todo and /function/todo/<number>"""
import sqlite3
from contextlib import closing

from flask import abort, jsonify


def connect():
    db = sqlite3.connect("./serverless.db", isolation_level=None)
    db.row_factory = sqlite3.Row
    db.execute("CREATE TABLE IF NOT EXISTS todo (id INTEGER PRIMARY KEY, text TEXT NOT NULL, done INTEGER NOT NULL DEFAULT 0)")
    return db


def find(db, number):
    row = db.execute("SELECT * FROM todo WHERE id = ?", (number,)).fetchone()
    return dict(row) if row else abort(404, f"there is no todo {number}")


def main(request):
    number = request.view_args["subpath"]
    with closing(connect()) as db:
        if request.method == "POST":
            new = db.execute("INSERT INTO todo (text) VALUES (?)", (request.get_json()["text"],)).lastrowid
            return find(db, new), 201
        if not number:
            return jsonify([dict(row) for row in db.execute("SELECT * FROM todo ORDER BY id")])
        todo = find(db, number)
        if request.method == "PUT":
            todo.update(request.get_json())
            db.execute("UPDATE todo SET text = ?, done = ? WHERE id = ?", (todo["text"], bool(todo["done"]), number))
            return find(db, number)
        if request.method == "DELETE":
            db.execute("DELETE FROM todo WHERE id = ?", (number,))
            return None
        return todo
