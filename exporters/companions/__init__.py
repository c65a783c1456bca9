"""What an engine directory holds in addition to the model: text encoder, captions, VAE decoder."""
