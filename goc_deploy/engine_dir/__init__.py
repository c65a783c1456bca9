"""The engine directory: `manifest`, `reading.read_manifest` and `read_verified`, `plans.load_plan`."""
