"""How good an encoder is, and the encoder as files."""
