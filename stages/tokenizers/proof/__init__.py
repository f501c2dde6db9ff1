"""The proof that an emitted tokenizer equals the checkpoint's: checks T01 to T23."""
