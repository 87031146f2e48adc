"""What can be set in an experiment, in parts; `mmfm_jax.experiment` joins them. Nothing here needs JAX."""
