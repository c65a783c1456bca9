"""The engine directory.

`directory.EngineDir` is an open engine directory, `editing.amended` changes one, and
`manifest.Manifest` describes one.
"""
