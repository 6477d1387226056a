"""The storage emulator, with the one header that it leaves out and the real service sends: the generation of what is read.

TensorStore writes a manifest again only if it still is what was read; without the header it refuses ("Malformed
StorageGeneration"), and only now and then, because most checkpoints commit their manifest once.
"""

import sys

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


objects.download = download  # Before the server's table of addresses is made.

if __name__ == "__main__":
    from gcp_storage_emulator.__main__ import main

    sys.exit(main(sys.argv[1:]))
