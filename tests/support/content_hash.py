"""A hash of the contents of a checkpoint."""

from __future__ import annotations

import hashlib
import json

from llmc.compiler.checkpoint.checkpoint import Checkpoint


def content_hash(checkpoint: Checkpoint) -> str:
    """Return the sha256 of the configuration and of every tensor's name, dtype, shape and data.

    It does not depend on how the tensors are sharded or the JSON is laid out.
    """
    digest = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode())
    for name, ref in sorted(checkpoint.tensors.items()):
        digest.update(json.dumps([name, ref.dtype, ref.shape]).encode())
        for chunk in ref.iter_chunks(1 << 24):
            digest.update(chunk.tobytes())
    return digest.hexdigest()
