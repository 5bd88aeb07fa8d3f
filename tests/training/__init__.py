"""Tests of the checkpoint manager."""
