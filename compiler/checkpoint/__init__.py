"""The checkpoint: its files, configuration and tokenizer, and the recipe of its family."""
