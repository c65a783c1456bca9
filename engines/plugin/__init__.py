"""The cache update as a TensorRT plugin: kernel source, its compilation at run time, and registration."""
