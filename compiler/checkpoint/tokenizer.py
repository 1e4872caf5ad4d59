"""Write the checkpoint's tokenizer, as transformers reads it, to the bundle."""

from __future__ import annotations

import shutil
from pathlib import Path

from llmc.compiler.bundle_writer import BundleWriter
from llmc.compiler.checkpoint.checkpoint import Checkpoint
from llmc.runtime.errors import CheckpointError

_WANTED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def save(checkpoint: Checkpoint, writer: BundleWriter) -> None:
    """Write `tokenizer/`, or nothing for a checkpoint without a tokenizer.

    transformers rebuilds some tokenizers from their class and overrides parts of tokenizer.json. So the
    bundle gets what transformers would save, not a copy of the files: the runtime needs tokenizer.json alone.
    Raises CheckpointError if transformers cannot read the tokenizer.
    """
    if not any(file.name != "generation_config.json" for file in checkpoint.tokenizer_files):
        return
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.path, local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise bare exceptions of many kinds
        raise CheckpointError(
            f"transformers cannot read the tokenizer in {checkpoint.path}: {str(error).splitlines()[0]}",
            "download the tokenizer's files again, or remove them to build without a tokenizer",
        ) from error
    with writer.temporary_directory() as directory:
        tokenizer.save_pretrained(directory)
        for name in _WANTED:
            if (Path(directory) / name).is_file():
                shutil.copyfile(Path(directory) / name, writer.path(f"tokenizer/{name}"))
