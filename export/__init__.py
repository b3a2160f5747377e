"""Ahead of time: a MobileVLM checkpoint becomes one ``.pte`` (``python -m mvlm.export --help``)."""
