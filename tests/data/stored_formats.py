"""Writers of formats that others store ids and text in, from the published layouts, independent of the readers."""

import json
import struct
from itertools import accumulate

import numpy as np

CODES = {"u1": 1, "i1": 2, "<i2": 3, "<i4": 4, "<i8": 5, "<f8": 6, "<f4": 7, "<u2": 8}


def write_pair(stem, documents, dtype="<u2", layout="mapped", modes=False):
    """Writes `stem`.bin and .idx: each document a list of sequences, each a list of ids."""
    sequences = [np.array(ids, dtype) for document in documents for ids in document]
    bounds = [0, *accumulate(len(document) for document in documents)]
    lengths = [len(ids) for ids in sequences]
    firsts = [0, *accumulate(lengths)]
    size = np.dtype(dtype).itemsize
    stem.with_suffix(".bin").write_bytes(b"".join(ids.tobytes() for ids in sequences))
    if layout == "mapped":
        parts = [
            b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, CODES[dtype], len(sequences), len(bounds)),
            struct.pack(f"<{len(lengths)}i", *lengths),
            struct.pack(f"<{len(lengths)}q", *(first * size for first in firsts[:-1])),
            struct.pack(f"<{len(bounds)}q", *bounds),
            bytes(len(sequences)) if modes else b"",
        ]
    else:
        counts = (1, CODES[dtype], size, len(sequences), len(lengths), len(bounds))
        numbers = [*range(len(sequences) + 1), *firsts, *lengths, *bounds]
        parts = [b"TNTIDX\x00\x00" + struct.pack("<6Q", *counts), struct.pack(f"<{len(numbers)}q", *numbers)]
    stem.with_suffix(".idx").write_bytes(b"".join(parts))
    return stem


SHAPE_CODES = {1: 0, 2: 1, 4: 2, 8: 3}
DTYPE_CODES = {"uint16": 16, "int32": 33, "uint32": 32, "int64": 65}


def encode(encoding, value):
    """A value of a column as its encoding writes it."""
    kind, *options = encoding.split(":")
    if kind in ("str", "bytes"):
        return value.encode() if kind == "str" else value
    if kind == "int":
        return np.int64(value).tobytes()
    if kind != "ndarray":
        return np.array(value, kind).tobytes()
    array = np.array(value, options[0] if options else "int32")
    data = b"" if options else bytes([DTYPE_CODES[array.dtype.name]])
    if len(options) < 2:
        size = next(n for n in SHAPE_CODES if max(array.shape) < 256**n)
        data += bytes([array.ndim << 2 | SHAPE_CODES[size]]) + np.array(array.shape, f"<u{size}").tobytes()
    return data + array.tobytes()


def fixed_size(encoding):
    kind, *options = encoding.split(":")
    if kind == "int":
        return 8
    return (
        int(np.prod([int(n) for n in options[1].split(",")])) * np.dtype(options[0]).itemsize if options[1:] else None
    )


def shard_bytes(columns, samples):
    names = sorted(columns)
    sizes = [fixed_size(columns[name]) for name in names]
    config = {"column_encodings": [columns[n] for n in names], "column_names": names, "column_sizes": sizes}
    config |= {"compression": None, "format": "mds", "hashes": [], "size_limit": 1 << 26, "version": 2}
    body = []
    for sample in samples:
        values = [encode(columns[name], sample[name]) for name in names]
        free = [len(value) for value, size in zip(values, sizes, strict=True) if size is None]
        body.append(np.array(free, "<u4").tobytes() + b"".join(values))
    text = json.dumps(config, sort_keys=True).encode()
    first = 4 * (len(samples) + 2) + len(text)
    offsets = np.cumsum([first, *map(len, body)]).astype("<u4")
    return np.uint32(len(samples)).tobytes() + offsets.tobytes() + text + b"".join(body), config


def write_mds(folder, columns, *shards, sub="", zipped=None):
    """A folder with a shard for each list of samples, and its index.json."""
    entries = []
    for number, samples in enumerate(shards):
        data, config = shard_bytes(columns, samples)
        name = f"{sub}shard.{number:05d}.mds"
        entry = {**config, "samples": len(samples), "zip_data": None}
        entry["raw_data"] = {"basename": name, "bytes": len(data), "hashes": {}}
        if zipped:
            data, name = zipped(data), f"{name}.zstd"
            entry |= {"compression": "zstd:7", "zip_data": {"basename": name, "bytes": len(data), "hashes": {}}}
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
        entries.append(entry)
    (folder / "index.json").write_text(json.dumps({"shards": entries, "version": 2}))
    return folder
