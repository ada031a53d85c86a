"""Grids, rows and samplers as numbers: arithmetic that knows nothing of models, pipelines or disks."""
