"""Large series of images in shards, which processes draw and publish independently."""
