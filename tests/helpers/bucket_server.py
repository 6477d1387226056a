"""The storage emulator, with what it leaves out and the real service does: generations of what is
read, and conditions.

TensorStore writes a manifest again only if it still is what was read; without the header it refuses
("Malformed StorageGeneration"), and only now and then, because most checkpoints commit their
manifest once.
"""

import sys
import threading
from http import HTTPStatus

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

_download = objects.download


def download(request, response, storage, *args, **kwargs):
    try:
        found = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
        response["x-goog-generation"] = found["generation"]
        response["x-goog-metageneration"] = found["metageneration"]
    except NotFound:
        pass  # The emulator answers that itself.
    return _download(request, response, storage, *args, **kwargs)


_one = threading.RLock()


def _conditional(handler):
    """The handler, which does nothing and answers 412 where the object has another generation than
    the request names.
    """

    def handle(request, response, storage, *args, **kwargs):
        wanted = request.query.get("ifGenerationMatch")
        if not wanted:
            return handler(request, response, storage, *args, **kwargs)
        name = request.params.get("object_id") or request.query["name"][0]
        with _one:
            try:
                found = storage.get_file_obj(request.params["bucket_name"], name)["generation"]
            except NotFound:
                found = "0"
            if found != wanted[0]:
                # Unread, it would break the connection.
                _ = request.data if request.method == "POST" else None
                response.status = HTTPStatus.PRECONDITION_FAILED
                response.json({"error": {"code": 412, "message": "conditionNotMet"}})
                return None
            return handler(request, response, storage, *args, **kwargs)

    return handle


# Before the server's table of addresses is made.
objects.download = download
objects.insert = _conditional(objects.insert)
objects.delete = _conditional(objects.delete)

if __name__ == "__main__":
    from gcp_storage_emulator.__main__ import main

    sys.exit(main(sys.argv[1:]))
