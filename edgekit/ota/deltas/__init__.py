"""What turns an old file of weights into a new one: made on the server, applied on the device.

``container``, ``layouts``, ``residuals``, ``coders``, ``applying`` and ``listing`` are the device's half, which needs
numpy and zstandard; ``making`` and ``locating`` are the server's, which need nothing more. ``docs/wire.md`` has the
format.
"""
