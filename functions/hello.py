"""Say hello: /function/hello?name=Tony or /function/hello/Tony"""
from flask import escape


def main(request):
    name = request.view_args["subpath"] or request.args.get("name", "World")
    return f"Hello, {escape(name)}!"
