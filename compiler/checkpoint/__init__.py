"""What the user gave: the checkpoint's files, its configuration and tokenizer, and its family's recipe."""
