"""Infrastructure that all other packages use: threads, forks, ranks, limits, progress, reports and logs."""
