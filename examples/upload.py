"""Keep uploaded files: curl -F file=@photo.jpg http://127.0.0.1:8000/function/upload, and GET them by name"""
import os

from flask import abort, send_from_directory
from werkzeug.utils import secure_filename


def main(request):
    os.makedirs("uploads", exist_ok=True)
    if request.method != "POST":
        return send_from_directory("uploads", request.view_args["subpath"])
    upload = request.files.get("file")
    name = secure_filename(upload.filename) if upload else ""
    if not name:
        abort(400, "send a file in the field named file")
    upload.save(os.path.join("uploads", name))
    return {"name": name, "size": os.path.getsize(os.path.join("uploads", name))}, 201
