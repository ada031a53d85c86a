"""Forecasts as numbers: grid, schedule, rows, forecasters, plans, the sampler. No models, no pipelines, no disk."""
