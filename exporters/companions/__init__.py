"""Optional parts of an engine directory: text encoder, stored captions, VAE decoder."""
