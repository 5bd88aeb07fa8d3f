"""Plugins for inference engines and trainers. reshard itself does not import them."""
