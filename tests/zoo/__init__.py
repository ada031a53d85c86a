"""A zoo of tiny pipelines, one of every kind that diffusers has, and an oracle that knows nothing of lesa."""
