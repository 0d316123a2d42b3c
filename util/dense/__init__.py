"""What tasks on dense features share and are made of: the encoder under them, their flags, models and measures."""
