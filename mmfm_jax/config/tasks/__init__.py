"""What each task can be configured with, one file a task, named as its file in `mmfm_jax/tasks`."""
