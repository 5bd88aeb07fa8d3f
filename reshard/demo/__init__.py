"""The main job on real input, small enough for a laptop: what `reshard demo` runs."""
