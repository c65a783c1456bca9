"""The cache update as a TensorRT plugin: kernel source, compilation at run time, registration."""
