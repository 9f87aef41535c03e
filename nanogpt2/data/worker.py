"""A process that tokenises: texts come by its standard input, their ids leave by its output.

The first message is the tokenizer, as JSON of its `arguments`. Each further one is text, answered
by its ids as `encode_texts` makes them. A message is 8 bytes, its size in bytes as a little-endian
number, and the bytes; text is UTF-8. The process ends with its input, so it cannot outlive the one
that started it, however that ends. It loads numpy and tiktoken, but no torch.
"""

import json
import struct
import sys
from typing import IO

SIZE = struct.Struct("<Q")


def send(stream: IO[bytes], data: bytes) -> None:
    """Write a message."""
    stream.write(SIZE.pack(len(data)))
    stream.write(data)
    stream.flush()


def receive(stream: IO[bytes]) -> bytes:
    """Read a message. Raises EOFError where the stream ends before the message does."""
    head = stream.read(SIZE.size)
    size = SIZE.unpack(head)[0] if len(head) == SIZE.size else 1
    data = stream.read(size) if len(head) == SIZE.size else b""
    if len(data) < size:
        raise EOFError
    return data


def main() -> None:
    """Answer every message until the input ends."""
    from nanogpt2.data.encode import encode_texts
    from nanogpt2.tokenizer import Tokenizer

    source, sink = sys.stdin.buffer, sys.stdout.buffer
    try:
        tokenizer = Tokenizer.of(json.loads(receive(source)))
        while True:
            text = receive(source).decode()
            send(sink, b"".join(ids.tobytes() for ids in encode_texts([text], tokenizer)))
    except (EOFError, BrokenPipeError):
        # leave without the interpreter's last flush, which would report the broken pipe
        sys.stderr = None
