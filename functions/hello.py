"""Say hello: to ?name=Tony, or to what follows the function's name, /Tony."""
from flask import escape


def main(request):
    name = request.view_args["subpath"] or request.args.get("name", "World")
    return f"Hello, {escape(name)}!"
