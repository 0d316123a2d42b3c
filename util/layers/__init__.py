"""Windows, attention and position embedding: tensors in, tensors out. Knows torch, timm's layers and `util.errors`."""
