"""A trained run measured on held-out patients."""
