"""A command as a document types it, run by the server of `tests.documents.warm_server`.

What it prints, to either stream, goes to stdout.
"""

import json
import os
import socket
import sys

_, address, name, *arguments = sys.argv
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect(address)
    asked = {"name": name, "arguments": arguments, "environment": {**os.environ}}
    asked |= {"cwd": os.getcwd()}
    connection.sendall(json.dumps(asked).encode())
    connection.shutdown(socket.SHUT_WR)
    with connection.makefile("rb") as answer:
        done = json.load(answer)
sys.stdout.write(done["printed"])
sys.exit(done["code"])
