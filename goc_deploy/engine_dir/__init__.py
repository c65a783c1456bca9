"""The engine directory.

`directory.EngineDir` is an open one, `editing.amended` changes one, `manifest.Manifest` describes one.
"""
