"""Methods beside each other: scores, cost, other projects' caches, records, tables and plots."""
