"""Windows, attention and position embedding: tensors in, tensors out. Knows torch and timm's layers only."""
