"""Add two numbers: /function/add?a=1&b=2, or POST {"a": 1, "b": 2}"""
from flask import abort, jsonify


def main(request):
    values = request.get_json() if request.is_json else request.values
    try:
        a, b = float(values["a"]), float(values["b"])
    except (KeyError, TypeError, ValueError):
        abort(400, "a and b must be numbers")
    return jsonify(sum=a + b)
