"""Plugins for inference engines. The engines import them; reshard itself does not."""
