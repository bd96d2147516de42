"""Say hello, to the name in the path (/Tony) or in the query (?name=Tony)."""
from flask import escape


def main(request):
    name = request.view_args["subpath"] or request.args.get("name", "World")
    return f"Hello, {escape(name)}!"
