"""What every part uses: threads, ranks, limits, progress, reports."""
